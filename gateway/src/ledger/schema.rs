//! Tables, and how an older file becomes a current one. The same on both backends.

use super::sql::{Access, Database, Dialect, Fault, SqlError, Statements, values};

/// Version of the tables below: `PRAGMA user_version` on SQLite, a row on PostgreSQL.
pub(super) const VERSION: i64 = 3;

/// Written in PostgreSQL's words; [`words`] has SQLite's.
const TABLES: &str = "
-- Who posts here. An embedded ledger has one gateway.
CREATE TABLE gateway (
    id   BIGINT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

-- Numbers the kernel credits bytes to. Append only: a number never changes its meaning.
CREATE TABLE owner (
    gateway  BIGINT NOT NULL,
    id       BIGINT NOT NULL,
    kind     TEXT NOT NULL,
    leg      TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    route    TEXT NOT NULL,
    service  TEXT NOT NULL,
    tenant   TEXT NOT NULL,
    quality  TEXT NOT NULL,
    PRIMARY KEY (gateway, id)
) STRICT, WITHOUT ROWID;

-- Numbers of classes of remote addresses. Append only, as owners are; 0 is in no class.
CREATE TABLE class (
    gateway BIGINT NOT NULL,
    id      BIGINT NOT NULL,
    name    TEXT NOT NULL,
    PRIMARY KEY (gateway, id)
) STRICT, WITHOUT ROWID;

-- Lifetimes of the kernel maps: counters start at zero with each. `tick` counts the commits: a
-- poster that does not know the last one posts nothing.
CREATE TABLE epoch (
    gateway BIGINT NOT NULL,
    id      BIGINT NOT NULL,
    name    TEXT NOT NULL UNIQUE,
    tick    BIGINT NOT NULL,
    PRIMARY KEY (gateway, id)
) STRICT, WITHOUT ROWID;

-- Up to where each account has been posted. Bytes: the ABI's Account, little endian u64s.
CREATE TABLE account_mark (
    gateway  BIGINT NOT NULL,
    epoch    BIGINT NOT NULL,
    owner    BIGINT NOT NULL,
    ifindex  BIGINT NOT NULL,
    class    BIGINT NOT NULL,
    counters BYTEA NOT NULL,
    PRIMARY KEY (gateway, epoch, owner, ifindex, class)
) STRICT, WITHOUT ROWID;

-- The same for interface cells.
CREATE TABLE cell_mark (
    gateway  BIGINT NOT NULL,
    epoch    BIGINT NOT NULL,
    ifindex  BIGINT NOT NULL,
    counters BYTEA NOT NULL,
    PRIMARY KEY (gateway, epoch, ifindex)
) STRICT, WITHOUT ROWID;

-- What each owner moved in [start, start + grain), Unix seconds: bytes on the wire. Rows of
-- different grains stand side by side and never overlap in what they count.
CREATE TABLE posting (
    gateway   BIGINT NOT NULL,
    grain     BIGINT NOT NULL,          -- -1 second, 0 minute, 1 hour, 2 day, 3 month
    start     BIGINT NOT NULL,
    interface TEXT NOT NULL,
    direction BIGINT NOT NULL,          -- 0 received, 1 sent
    owner     BIGINT NOT NULL,
    class     BIGINT NOT NULL,
    wire_bytes        BIGINT NOT NULL,
    frames            BIGINT NOT NULL,
    l4_payload_bytes  BIGINT NOT NULL,
    retransmit_bytes  BIGINT NOT NULL,
    retransmit_frames BIGINT NOT NULL,
    retransmit_payload_bytes BIGINT NOT NULL,
    PRIMARY KEY (gateway, grain, start, interface, direction, owner, class)
) STRICT, WITHOUT ROWID;

-- Totals and bytes in no account, in the same way.
CREATE TABLE cell_posting (
    gateway   BIGINT NOT NULL,
    grain     BIGINT NOT NULL,
    start     BIGINT NOT NULL,
    interface TEXT NOT NULL,
    direction BIGINT NOT NULL,
    cell      TEXT NOT NULL,
    bytes     BIGINT NOT NULL,
    frames    BIGINT NOT NULL,
    PRIMARY KEY (gateway, grain, start, interface, direction, cell)
) STRICT, WITHOUT ROWID;

-- Where usage events are pushed to. `seq` numbers closed windows, `batch` what was sent together.
CREATE TABLE usage_sink (
    gateway BIGINT NOT NULL,
    sink    TEXT NOT NULL,
    seq     BIGINT NOT NULL,
    batch   BIGINT NOT NULL,
    restored BIGINT NOT NULL,           -- 1: the next tick may repeat what the sink has
    PRIMARY KEY (gateway, sink)
) STRICT, WITHOUT ROWID;

-- Posted and not yet in an event.
CREATE TABLE usage_open (
    gateway      BIGINT NOT NULL,
    sink         TEXT NOT NULL,
    window_start BIGINT NOT NULL,
    window_seconds BIGINT NOT NULL,
    owner        BIGINT NOT NULL,
    class        BIGINT NOT NULL,
    direction    BIGINT NOT NULL,
    wire_bytes   BIGINT NOT NULL,
    PRIMARY KEY (gateway, sink, window_start, window_seconds, owner, class, direction)
) STRICT, WITHOUT ROWID;

-- Events: what is the sink's to know, and whether it does. State: 0 waiting, 1 in a batch,
-- 2 refused for good, 3 in doubt, 4 acknowledged.
CREATE TABLE usage_event (
    gateway      BIGINT NOT NULL,
    sink         TEXT NOT NULL,
    seq          BIGINT NOT NULL,
    owner        BIGINT NOT NULL,
    class        BIGINT NOT NULL,
    direction    BIGINT NOT NULL,
    window_start BIGINT NOT NULL,
    window_seconds BIGINT NOT NULL,
    epoch        TEXT NOT NULL,
    wire_bytes   BIGINT NOT NULL,
    state        BIGINT NOT NULL,
    batch        BIGINT NOT NULL,
    first_sent   BIGINT NOT NULL,       -- Unix seconds from which on it may have arrived; 0: never
    note         TEXT NOT NULL,
    PRIMARY KEY (gateway, sink, seq, owner, class, direction)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_event_state ON usage_event (gateway, sink, state, seq);

-- Acknowledged events that are no longer kept one by one.
CREATE TABLE usage_acknowledged (
    gateway    BIGINT NOT NULL,
    sink       TEXT NOT NULL,
    owner      BIGINT NOT NULL,
    class      BIGINT NOT NULL,
    direction  BIGINT NOT NULL,
    events     BIGINT NOT NULL,
    wire_bytes BIGINT NOT NULL,
    PRIMARY KEY (gateway, sink, owner, class, direction)
) STRICT, WITHOUT ROWID;
";

/// Version 1 knew one gateway, one class and one grain.
const FROM_1: [&str; 6] = [
    "INSERT INTO owner SELECT 1, id, kind, leg, endpoint, route, service, tenant, quality
     FROM owner_1",
    "INSERT INTO epoch SELECT 1, id, name, 0 FROM epoch_1",
    "INSERT INTO account_mark SELECT 1, epoch, owner, ifindex, 0, counters FROM account_mark_1",
    "INSERT INTO cell_mark SELECT 1, epoch, ifindex, counters FROM cell_mark_1",
    "INSERT INTO posting SELECT 1, 0, minute, interface, direction, owner, 0, wire_bytes, frames,
        l4_payload_bytes, retransmit_bytes, retransmit_frames, retransmit_payload_bytes
     FROM posting_1",
    "INSERT INTO cell_posting SELECT 1, 0, minute, interface, direction, cell, bytes, frames
     FROM cell_posting_1",
];
const TABLES_1: [&str; 6] = [
    "owner",
    "epoch",
    "account_mark",
    "cell_mark",
    "posting",
    "cell_posting",
];

/// The tables in a backend's own words.
fn words(dialect: Dialect) -> String {
    match dialect {
        Dialect::Sqlite => TABLES.replace("BIGINT", "INTEGER").replace("BYTEA", "BLOB"),
        Dialect::Postgres => TABLES
            .replace(") STRICT, WITHOUT ROWID;", ");")
            .replace(") STRICT;", ");"),
    }
}

/// Brings a database to [`VERSION`] in one transaction; fails on one of a newer program.
pub(super) fn migrate(database: &mut dyn Database) -> Result<(), SqlError> {
    let dialect = database.dialect();
    let found = database.run(Access::Read, |statements| version(statements, dialect))?;
    if found == VERSION {
        return Ok(());
    }
    database.run(Access::Write, |statements| {
        if dialect == Dialect::Postgres {
            // Gateways may start side by side.
            statements.execute(
                "SELECT pg_advisory_xact_lock(hashtext(?1))",
                values!["edgemeter schema"],
            )?;
        }
        let found = version(statements, dialect)?;
        match (found, dialect) {
            (VERSION, _) => Ok(()),
            (0, _) => {
                statements.execute(&words(dialect), &[])?;
                stamp(statements, dialect)
            }
            (1, Dialect::Sqlite) => {
                for table in TABLES_1 {
                    statements.execute(&format!("ALTER TABLE {table} RENAME TO {table}_1"), &[])?;
                }
                statements.execute(&words(dialect), &[])?;
                for copy in FROM_1 {
                    statements.execute(copy, &[])?;
                }
                for table in TABLES_1.iter().rev() {
                    statements.execute(&format!("DROP TABLE {table}_1"), &[])?;
                }
                stamp(statements, dialect)
            }
            _ => Err(SqlError::new(
                Fault::Other,
                format!(
                    "it has schema version {found}, this program knows {VERSION}: run the newer \
                     program"
                ),
            )),
        }
    })
}

/// Fails unless the tables are of this version: who migrates them breaks the process that uses
/// them.
pub(super) fn expect_current(database: &mut dyn Database) -> Result<(), SqlError> {
    let dialect = database.dialect();
    let found = database.run(Access::Read, |statements| version(statements, dialect))?;
    if found == VERSION {
        return Ok(());
    }
    Err(SqlError::new(
        Fault::Other,
        format!(
            "it has schema version {found} and this program uses {VERSION}: not without stopping \
             the running gateway first"
        ),
    ))
}

fn version(statements: &mut dyn Statements, dialect: Dialect) -> Result<i64, SqlError> {
    let row = match dialect {
        Dialect::Sqlite => statements.one("PRAGMA user_version", &[])?,
        Dialect::Postgres => {
            let made = statements.one(
                "SELECT COUNT(*) FROM pg_tables
                 WHERE CAST(tablename AS TEXT) = ?1 AND schemaname = current_schema()",
                values!["ledger_version"],
            )?;
            if made.map_or(Ok(0), |row| row.int(0))? == 0 {
                return Ok(0);
            }
            statements.one("SELECT version FROM ledger_version", &[])?
        }
    };
    row.map_or(Ok(0), |row| row.int(0))
}

fn stamp(statements: &mut dyn Statements, dialect: Dialect) -> Result<(), SqlError> {
    let sql = match dialect {
        Dialect::Sqlite => format!("PRAGMA user_version = {VERSION}"),
        Dialect::Postgres => format!(
            "CREATE TABLE ledger_version (version BIGINT NOT NULL);
             INSERT INTO ledger_version VALUES ({VERSION})"
        ),
    };
    statements.execute(&sql, &[]).map(|_| ())
}
