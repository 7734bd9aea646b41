-- A ledger as the first version of edgemeter wrote it.
-- Numbers the kernel credits bytes to. Append only: a number never changes its meaning.
CREATE TABLE owner (
    id       INTEGER PRIMARY KEY,
    kind     TEXT NOT NULL,
    leg      TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    route    TEXT NOT NULL,
    service  TEXT NOT NULL,
    tenant   TEXT NOT NULL,
    quality  TEXT NOT NULL
) STRICT;

-- Lifetimes of the kernel maps: counters start at zero with each.
CREATE TABLE epoch (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

-- Up to where each account has been posted. Blob: the ABI's Account, little endian u64s.
CREATE TABLE account_mark (
    epoch INTEGER NOT NULL REFERENCES epoch(id),
    owner INTEGER NOT NULL,
    ifindex INTEGER NOT NULL,
    counters BLOB NOT NULL,
    PRIMARY KEY (epoch, owner, ifindex)
) STRICT, WITHOUT ROWID;

-- The same for interface cells.
CREATE TABLE cell_mark (
    epoch INTEGER NOT NULL REFERENCES epoch(id),
    ifindex INTEGER NOT NULL,
    counters BLOB NOT NULL,
    PRIMARY KEY (epoch, ifindex)
) STRICT, WITHOUT ROWID;

-- What each owner moved, by minute (Unix seconds of its start), bytes on the wire.
CREATE TABLE posting (
    minute    INTEGER NOT NULL,
    interface TEXT NOT NULL,
    direction INTEGER NOT NULL,          -- 0 received, 1 sent
    owner     INTEGER NOT NULL,
    wire_bytes        INTEGER NOT NULL,
    frames            INTEGER NOT NULL,
    l4_payload_bytes  INTEGER NOT NULL,
    retransmit_bytes  INTEGER NOT NULL,
    retransmit_frames INTEGER NOT NULL,
    retransmit_payload_bytes INTEGER NOT NULL,
    PRIMARY KEY (minute, interface, direction, owner)
) STRICT, WITHOUT ROWID;

-- Totals and bytes in no account, by minute.
CREATE TABLE cell_posting (
    minute    INTEGER NOT NULL,
    interface TEXT NOT NULL,
    direction INTEGER NOT NULL,
    cell      TEXT NOT NULL,
    bytes     INTEGER NOT NULL,
    frames    INTEGER NOT NULL,
    PRIMARY KEY (minute, interface, direction, cell)
) STRICT, WITHOUT ROWID;

INSERT INTO owner VALUES (1, 'route', 'client', 'public', 'orders', 'commerce', 'acme', 'exact');
INSERT INTO epoch VALUES (1, 'boot:1');
INSERT INTO account_mark VALUES (1, 1, 2, x'640000000000000001000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000');
INSERT INTO posting VALUES (60, 'edge0', 1, 1, 100, 1, 60, 0, 0, 0);
INSERT INTO cell_posting VALUES (60, 'edge0', 1, 'total', 160, 2);
INSERT INTO cell_posting VALUES (60, 'edge0', 1, 'non_ip', 60, 1);
PRAGMA user_version = 1;
