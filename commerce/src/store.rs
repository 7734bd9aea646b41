//! Persistence: SQLite on one machine, PostgreSQL for several; the same commands on both.
//!
//! ```text
//! Store::run ──► bounded queue ─► writer thread (batch, one transaction, then the answers)
//! Store::read ─► bounded wait ──► one of a few connections, on a blocking thread
//! ```

mod checkpoint;
pub(crate) mod horizon;
mod locks;
mod postgres;
mod readers;
pub mod schema;
pub mod sql;
mod sqlite;
mod writer;

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::catalogue::NewProduct;
use crate::metrics::Metrics;
use sql::{Backend, Connection, Param, SqlError};

pub use locks::Locks;
pub(crate) use writer::unix_time_ms;
pub use writer::{Command, Tx, WriterThread};

/// How large the store's queues are.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Commands that may wait for the writer.
    pub queue_capacity: NonZeroUsize,
    /// Connections that read.
    pub readers: NonZeroU32,
}

/// Which database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file on this machine.
    Sqlite(PathBuf),
    /// A server: `postgres://user@host:port/database`.
    Postgres(String),
}

impl Target {
    /// Which kind it is.
    #[must_use]
    pub fn backend(&self) -> Backend {
        match self {
            Self::Sqlite(_) => Backend::Sqlite,
            Self::Postgres(_) => Backend::Postgres,
        }
    }

    /// A connection that may write.
    ///
    /// # Errors
    /// [`SqlError`] when it cannot be opened.
    fn open(&self) -> Result<Box<dyn Connection>, SqlError> {
        Ok(match self {
            Self::Sqlite(path) => Box::new(sqlite::Sqlite::open(path)?),
            Self::Postgres(url) => Box::new(postgres::Postgres::open(url)?),
        })
    }

    /// A connection for reads. It creates nothing.
    ///
    /// # Errors
    /// [`SqlError`], a missing file first of all.
    pub(crate) fn open_to_read(&self) -> Result<Box<dyn Connection>, SqlError> {
        Ok(match self {
            Self::Sqlite(path) => Box::new(sqlite::Sqlite::open_to_read(path)?),
            Self::Postgres(url) => Box::new(postgres::Postgres::open(url)?),
        })
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        let path = text.strip_prefix("sqlite:").unwrap_or(text);
        if path.is_empty() || path.contains("://") {
            return Err(TargetError);
        }
        Ok(Self::Sqlite(path.into()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "{}", path.display()),
            // Not the password.
            Self::Postgres(url) => {
                let place = url.rsplit('@').next().unwrap_or_default();
                write!(f, "postgres://{place}")
            }
        }
    }
}

/// The text names no database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write sqlite:FILE or postgres://user@host:port/database")]
pub struct TargetError;

/// A handle to the database. Cloning is cheap and shares everything.
#[derive(Clone)]
pub struct Store {
    writer: writer::Writer,
    readers: Arc<readers::Readers>,
    backend: Backend,
    events: watch::Receiver<u64>,
}

impl Store {
    /// Opens or creates the database, brings its schema up to date, adds `seed` if the
    /// catalogue is empty, and starts the writer. It blocks.
    ///
    /// # Errors
    /// [`StoreError::Sql`] if the database cannot be used, [`StoreError::SchemaTooNew`] if a
    /// newer version wrote it, [`StoreError::Thread`] if the writer cannot start.
    pub fn open(
        target: &Target,
        limits: Limits,
        seed: &[NewProduct],
        metrics: &Metrics,
    ) -> Result<(Self, WriterThread), StoreError> {
        let mut connection = target.open()?;
        schema::migrate(connection.as_mut())?;
        add_products_if_empty(connection.as_mut(), seed)?;
        let readers = readers::Readers::open(target, limits.readers, metrics.clone())?;
        let (wrote, events) = watch::channel(0);
        let (writer, thread) = writer::start(
            move || Ok(connection),
            limits.queue_capacity,
            metrics.clone(),
            wrote,
        )?;
        let store = Self {
            writer,
            readers: Arc::new(readers),
            backend: target.backend(),
            events,
        };
        Ok((store, thread))
    }

    /// Queues a command and waits until what it did is on the disk.
    ///
    /// Dropping the future does not take the command back: it was queued, and its key
    /// replays the answer.
    ///
    /// # Errors
    /// [`StoreError::QueueFull`] at once; [`StoreError::Closed`] while shutting down;
    /// [`StoreError::Batch`] or [`StoreError::Sql`] if the storage failed. After the
    /// last two a retry with the same key is safe.
    pub async fn run<C: Command>(&self, command: C) -> Result<C::Output, StoreError> {
        self.writer.run(command).await
    }

    /// As [`Store::run`], waiting for room in the queue: for work of our own.
    ///
    /// # Errors
    /// As [`Store::run`], without [`StoreError::QueueFull`].
    pub async fn run_patiently<C: Command>(&self, command: C) -> Result<C::Output, StoreError> {
        self.writer.run_patiently(command).await
    }

    /// Reads one snapshot.
    ///
    /// # Errors
    /// [`StoreError::ReadersBusy`] at once, [`StoreError::Sql`] if it cannot be read.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut dyn Connection) -> Result<T, SqlError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.readers.run(read).await
    }

    /// Which database is behind it.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Changes when events were committed by this process.
    #[must_use]
    pub fn events(&self) -> watch::Receiver<u64> {
        self.events.clone()
    }

    /// Proves that the writer takes commands and the database can be read.
    ///
    /// # Errors
    /// [`StoreError::Stalled`] after `patience`, or whatever the storage reported.
    pub async fn check(&self, patience: Duration) -> Result<(), StoreError> {
        let checks = async {
            self.writer.run_patiently(Ping).await?;
            self.read(|connection| {
                connection.query("SELECT 1 FROM product LIMIT 1", &[])?;
                Ok(())
            })
            .await
        };
        tokio::time::timeout(patience, checks)
            .await
            .map_err(|_| StoreError::Stalled)?
    }
}

/// Answered after a COMMIT like any other, which is what makes it a check.
struct Ping;

impl Command for Ping {
    type Output = ();

    fn run(&self, _: &mut Tx<'_>) -> Result<(), StoreError> {
        Ok(())
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
    Batch(Arc<StoreError>),
    /// The database refused a statement.
    #[error("the database: {0}")]
    Sql(#[from] SqlError),
    /// The answer could not be rendered, so nothing was stored.
    #[error("rendering the answer: {0}")]
    Render(#[from] serde_json::Error),
    /// Stored rows contradict each other; the audit names them.
    #[error("the stored data is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// The database was written by a newer version.
    #[error("the database has schema {found}, and this program knows up to {known}")]
    SchemaTooNew {
        /// Version found.
        found: u32,
        /// Newest version known here.
        known: u32,
    },
    /// A thread could not be started, or died.
    #[error("a storage thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl StoreError {
    fn is_worth_repeating(&self) -> bool {
        matches!(self, Self::Sql(error) if error.is_worth_repeating())
    }
}

/// Adds products with their opening stock and its ledger movement.
fn add_products_if_empty(
    connection: &mut dyn Connection,
    products: &[NewProduct],
) -> Result<(), SqlError> {
    connection.begin()?;
    let added = add_products(connection, products);
    match added {
        Ok(()) => connection.commit(),
        Err(error) => {
            connection.rollback()?;
            Err(error)
        }
    }
}

fn add_products(connection: &mut dyn Connection, products: &[NewProduct]) -> Result<(), SqlError> {
    if connection.backend() == Backend::Postgres {
        // Two machines may start over an empty database.
        connection.script("LOCK TABLE product IN SHARE ROW EXCLUSIVE MODE")?;
    }
    if !connection
        .query("SELECT 1 FROM product LIMIT 1", &[])?
        .is_empty()
    {
        return Ok(());
    }
    for product in products {
        let NewProduct {
            sku,
            name,
            description,
            price,
            initial,
        } = product;
        let sku = || Param::Text(sku.as_str().into());
        let initial = || Param::Integer(i64::from(*initial));
        connection.write(
            "INSERT INTO product (sku, name, description, price_minor, currency)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            &[
                sku(),
                Param::Text(name.into()),
                Param::Text(description.into()),
                Param::Integer(price.minor()),
                Param::Text(price.currency().as_str().into()),
            ],
        )?;
        connection.write(
            "INSERT INTO stock (sku, initial, available, reserved, sold) VALUES (?1, ?2, ?2, 0, 0)",
            &[sku(), initial()],
        )?;
        connection.write(
            "INSERT INTO stock_movement (sku, reason, available, reserved, sold, at_ms)
             VALUES (?1, 'initial', ?2, 0, 0, 0)",
            &[sku(), initial()],
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_file_or_a_server() {
        assert_eq!("c.db".parse(), Ok(Target::Sqlite("c.db".into())));
        assert_eq!(
            "sqlite:/v/c.db".parse(),
            Ok(Target::Sqlite("/v/c.db".into()))
        );
        let url = "postgres://u:secret@db:5432/shop";
        let target: Target = url.parse().unwrap();
        assert_eq!(target, Target::Postgres(url.to_owned()));
        assert_eq!(target.to_string(), "postgres://db:5432/shop");
        assert_eq!("mysql://x".parse::<Target>(), Err(TargetError));
    }

    #[test]
    fn seeding_happens_once() {
        let directory = tempfile::tempdir().unwrap();
        let target = Target::Sqlite(directory.path().join("c.db"));
        let mut connection = target.open().unwrap();
        schema::migrate(connection.as_mut()).unwrap();
        let seed = crate::catalogue::seed().unwrap();
        add_products_if_empty(connection.as_mut(), &seed).unwrap();
        connection.script("DELETE FROM stock_movement").unwrap();
        add_products_if_empty(connection.as_mut(), &seed).unwrap();
        let mut count = |table: &str| -> i64 {
            let sql = format!("SELECT count(*) FROM {table}");
            connection
                .query(&sql, &[])
                .unwrap()
                .remove(0)
                .take()
                .unwrap()
        };
        assert_eq!(
            (count("product"), count("stock"), count("stock_movement")),
            (49, 49, 0)
        );
    }
}
