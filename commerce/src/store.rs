//! Persistence: one SQLite file in WAL mode with `synchronous=FULL`.
//!
//! ```text
//! Store::place ─► bounded queue ─► writer thread (the only connection that writes)
//! Store::order, … ─► bounded wait ─► one of a few read connections, on a blocking thread
//! ```
//!
//! SQLite's write-ahead log is the local log; nothing else is written. `FULL` stays: with
//! `NORMAL` a power loss takes acknowledged orders with it.

mod columns;
mod place;
mod read;
mod schema;
mod writer;

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::catalogue::NewProduct;
use crate::metrics::Metrics;

pub use place::{PlaceOrder, Placement, Verdict};
pub use read::Page;
pub(crate) use schema::{VERSION as SCHEMA_VERSION, version as schema_version};
pub use writer::WriterThread;

/// How long the writer waits for another process that holds the write lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How large the store's queues are.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Commands that may wait for the writer.
    pub queue_capacity: NonZeroUsize,
    /// Connections that read.
    pub readers: NonZeroU32,
}

/// A handle to the database. Cloning is cheap and shares everything.
#[derive(Clone)]
pub struct Store {
    writer: writer::Writer,
    readers: Arc<read::Readers>,
}

impl Store {
    /// Opens or creates the file, brings its schema up to date, adds `seed` if the
    /// catalogue is empty, and starts the writer.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] if the file cannot be used, [`StoreError::SchemaTooNew`] if a
    /// newer version wrote it, [`StoreError::Thread`] if the writer cannot start.
    pub fn open(
        path: &Path,
        limits: Limits,
        seed: &[NewProduct],
        metrics: &Metrics,
    ) -> Result<(Self, WriterThread), StoreError> {
        let connection = open_to_write(path)?;
        add_products_if_empty(&connection, seed)?;
        let readers = Arc::new(read::Readers::open(path, limits.readers, metrics.clone())?);
        let (writer, thread) = writer::start(connection, limits.queue_capacity, metrics.clone())?;
        Ok((Self { writer, readers }, thread))
    }

    /// Queues an order and waits until it is on the disk, or refused.
    ///
    /// Dropping the future does not take the order back: it was queued, and its key replays
    /// the answer.
    ///
    /// # Errors
    /// [`StoreError::QueueFull`] at once; [`StoreError::Closed`] while shutting down;
    /// [`StoreError::Batch`] or [`StoreError::Sqlite`] if the storage failed. After the
    /// last two a retry with the same key is safe.
    pub async fn place(&self, order: PlaceOrder) -> Result<Placement, StoreError> {
        self.writer.place(order).await
    }

    /// Proves that the writer takes commands and the file can be read.
    ///
    /// # Errors
    /// [`StoreError::Stalled`] after `patience`, or whatever the storage reported.
    pub async fn check(&self, patience: Duration) -> Result<(), StoreError> {
        let checks = async {
            self.writer.ping().await?;
            self.readers.ping().await
        };
        tokio::time::timeout(patience, checks)
            .await
            .map_err(|_| StoreError::Stalled)?
    }
}

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The writer's queue is full. Nothing was done; retry later.
    #[error("the writer's queue is full")]
    QueueFull,
    /// Too many reads wait already. Retry later.
    #[error("too many reads are waiting")]
    ReadersBusy,
    /// The writer has stopped. Nothing more will be done by this process.
    #[error("the writer has stopped")]
    Closed,
    /// The store did not answer a health check in time.
    #[error("the store did not answer in time")]
    Stalled,
    /// The transaction around the command failed. Retrying with the same key is safe.
    #[error("the transaction failed: {0}")]
    Batch(Arc<rusqlite::Error>),
    /// SQLite refused a statement.
    #[error("the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The answer could not be rendered, so nothing was stored.
    #[error("rendering the answer: {0}")]
    Render(#[from] serde_json::Error),
    /// The file was written by a newer version.
    #[error("the database has schema {found}, and this program knows up to {known}")]
    SchemaTooNew {
        /// Version in the file.
        found: u32,
        /// Newest version known here.
        known: u32,
    },
    /// A thread could not be started, or died.
    #[error("a storage thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Opens the file for writing, creating and migrating it as needed.
fn open_to_write(path: &Path) -> Result<Connection, StoreError> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Pages, 16 MiB: fewer, larger checkpoints between the commits that customers wait for.
    connection.pragma_update(None, "wal_autocheckpoint", 4096)?;
    connection.set_prepared_statement_cache_capacity(64);
    schema::migrate(&mut connection)?;
    Ok(connection)
}

/// Opens the file so that nothing can be written through the connection.
///
/// # Errors
/// Whatever SQLite reports, a missing file first of all.
pub(crate) fn open_to_read(path: &Path) -> Result<Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Adds products with their opening stock and its ledger movement.
fn add_products_if_empty(
    connection: &Connection,
    products: &[NewProduct],
) -> Result<(), StoreError> {
    let transaction = connection.unchecked_transaction()?;
    let empty: bool =
        transaction.query_row("SELECT NOT EXISTS (SELECT 1 FROM product)", [], |row| {
            row.get(0)
        })?;
    if empty {
        for product in products {
            let NewProduct {
                sku,
                name,
                description,
                price,
                initial,
            } = product;
            transaction.execute(
                "INSERT INTO product (sku, name, description, price_minor, currency)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                (sku, name, description, price.minor(), price.currency()),
            )?;
            transaction.execute(
                "INSERT INTO stock (sku, initial, available) VALUES (?1, ?2, ?2)",
                (sku, initial),
            )?;
            transaction.execute(
                "INSERT INTO stock_movement (sku, delta, reason, at_ms) VALUES (?1, ?2, 'initial', 0)",
                (sku, initial),
            )?;
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_sqlite_is_past_the_wal_reset_bug() {
        // 3.7.0 to 3.51.2 can corrupt a WAL database that has two connections.
        assert!(
            rusqlite::version_number() >= 3_051_003,
            "{}",
            rusqlite::version()
        );
    }

    #[test]
    fn the_writing_connection_is_durable_and_the_reading_one_cannot_write() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.db");
        let writing = open_to_write(&path).unwrap();
        let pragma = |name| {
            writing
                .pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0))
                .unwrap()
        };
        assert_eq!(
            pragma("journal_mode"),
            rusqlite::types::Value::Text("wal".to_owned())
        );
        assert_eq!(
            pragma("synchronous"),
            rusqlite::types::Value::Integer(2),
            "2 is FULL"
        );
        assert_eq!(pragma("foreign_keys"), rusqlite::types::Value::Integer(1));
        let reading = open_to_read(&path).unwrap();
        assert!(reading.execute("DELETE FROM product", []).is_err());
    }

    #[test]
    fn seeding_happens_once() {
        let directory = tempfile::tempdir().unwrap();
        let connection = open_to_write(&directory.path().join("c.db")).unwrap();
        let seed = crate::catalogue::seed().unwrap();
        add_products_if_empty(&connection, &seed).unwrap();
        connection
            .execute("DELETE FROM stock_movement", [])
            .unwrap();
        add_products_if_empty(&connection, &seed).unwrap();
        let count = |table: &str| {
            let sql = format!("SELECT count(*) FROM {table}");
            connection
                .query_row(&sql, [], |row| row.get::<_, u32>(0))
                .unwrap()
        };
        assert_eq!(
            (count("product"), count("stock"), count("stock_movement")),
            (48, 48, 0)
        );
    }
}
