//! Tables, and how an older file becomes a current one.

use rusqlite::Connection;

/// `PRAGMA user_version` of the tables below.
pub(super) const VERSION: i64 = 1;

const V1: &str = "
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
";

/// Brings a connection's file to [`VERSION`]; fails on a file from a newer program.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), String> {
    let read = |connection: &Connection| {
        connection
            .query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))
            .map_err(|error| error.to_string())
    };
    let found = read(connection)?;
    if found > VERSION {
        return Err(format!(
            "it has schema version {found}, this program knows {VERSION}: run the newer program"
        ));
    }
    if found == 0 {
        let transaction = connection
            .transaction()
            .map_err(|error| error.to_string())?;
        transaction
            .execute_batch(V1)
            .map_err(|error| error.to_string())?;
        transaction
            .pragma_update(None, "user_version", VERSION)
            .map_err(|error| error.to_string())?;
        transaction.commit().map_err(|error| error.to_string())?;
    }
    Ok(())
}
