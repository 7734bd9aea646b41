//! The schema, as the list of steps that lead to it.
//!
//! `PRAGMA user_version` counts the steps a file has taken. A released step never changes:
//! add another one.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// Step `n` brings a file from version `n` to `n + 1`.
///
/// Closed vocabularies (status, reason) are not `CHECK`ed: SQLite cannot alter a check
/// without rewriting the table. The types in `columns` refuse what they do not know.
const STEPS: &[&str] = &["
CREATE TABLE product (
    sku          TEXT    NOT NULL PRIMARY KEY,
    name         TEXT    NOT NULL,
    description  TEXT    NOT NULL,
    price_minor  INTEGER NOT NULL CHECK (price_minor > 0),
    currency     TEXT    NOT NULL CHECK (length(currency) = 3)
) STRICT;

-- Apart from product: these rows are hot, and small rows make small commits.
CREATE TABLE stock (
    sku        TEXT    NOT NULL PRIMARY KEY REFERENCES product (sku),
    initial    INTEGER NOT NULL CHECK (initial >= 0),
    available  INTEGER NOT NULL CHECK (available >= 0)
) STRICT, WITHOUT ROWID;

-- seq is the commit order, and so the order of pages; ids only look ordered.
CREATE TABLE orders (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    id             TEXT    NOT NULL UNIQUE,
    principal      TEXT    NOT NULL,
    status         TEXT    NOT NULL,
    version        INTEGER NOT NULL CHECK (version > 0),
    total_minor    INTEGER NOT NULL CHECK (total_minor >= 0),
    currency       TEXT    NOT NULL CHECK (length(currency) = 3),
    created_at_ms  INTEGER NOT NULL
) STRICT;
CREATE INDEX orders_by_principal ON orders (principal, seq);

CREATE TABLE order_line (
    order_id          TEXT    NOT NULL REFERENCES orders (id),
    sku               TEXT    NOT NULL REFERENCES product (sku),
    quantity          INTEGER NOT NULL CHECK (quantity > 0),
    unit_price_minor  INTEGER NOT NULL CHECK (unit_price_minor > 0),
    total_minor       INTEGER NOT NULL,
    PRIMARY KEY (order_id, sku)
) STRICT, WITHOUT ROWID;

-- The stock ledger: the sum of deltas of a SKU is what is available.
CREATE TABLE stock_movement (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,
    sku       TEXT    NOT NULL REFERENCES stock (sku),
    delta     INTEGER NOT NULL,
    reason    TEXT    NOT NULL,
    order_id  TEXT    REFERENCES orders (id),
    at_ms     INTEGER NOT NULL
) STRICT;

CREATE TABLE idempotency (
    principal     TEXT    NOT NULL,
    route         TEXT    NOT NULL,
    key           TEXT    NOT NULL,
    fingerprint   BLOB    NOT NULL CHECK (length(fingerprint) = 32),
    status        INTEGER NOT NULL,
    content_type  TEXT    NOT NULL,
    location      TEXT,
    etag          TEXT,
    body          BLOB    NOT NULL,
    order_id      TEXT    REFERENCES orders (id),
    at_ms         INTEGER NOT NULL,
    PRIMARY KEY (principal, route, key)
) STRICT;
CREATE UNIQUE INDEX idempotency_by_order ON idempotency (order_id) WHERE order_id IS NOT NULL;

-- Written with the order, delivered by a relay that reads it in seq order.
CREATE TABLE outbox (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id  TEXT    NOT NULL UNIQUE,
    topic     TEXT    NOT NULL,
    order_id  TEXT    NOT NULL REFERENCES orders (id),
    payload   TEXT    NOT NULL,
    at_ms     INTEGER NOT NULL
) STRICT;
"];

/// The version this program writes and audits.
pub(crate) const VERSION: u32 = 1;
const _: () = assert!(STEPS.len() == VERSION as usize, "one version per step");

/// Takes the steps the file has not taken, each in a transaction of its own.
///
/// # Errors
/// [`StoreError::SchemaTooNew`] leaves the file untouched.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    loop {
        // Version and step in one transaction: two processes may start at once.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let found = version(&transaction)?;
        if found > VERSION {
            return Err(StoreError::SchemaTooNew {
                found,
                known: VERSION,
            });
        }
        let step = usize::try_from(found)
            .ok()
            .and_then(|taken| STEPS.get(taken));
        let Some(step) = step else { return Ok(()) };
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", found.saturating_add(1))?;
        transaction.commit()?;
    }
}

/// How many steps the file has taken.
///
/// # Errors
/// Whatever SQLite reports, a file that is no database first of all.
pub(crate) fn version(connection: &Connection) -> rusqlite::Result<u32> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migration_reaches_the_version_and_is_repeatable() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        migrate(&mut connection).unwrap();
        assert_eq!(version(&connection).unwrap(), VERSION);
    }

    #[test]
    fn a_newer_file_is_left_alone() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection
            .pragma_update(None, "user_version", VERSION + 1)
            .unwrap();
        let error = migrate(&mut connection).unwrap_err();
        assert!(matches!(error, StoreError::SchemaTooNew { .. }), "{error}");
        assert_eq!(version(&connection).unwrap(), VERSION + 1);
    }
}
