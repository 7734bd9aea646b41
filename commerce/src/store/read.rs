//! Reads: a few connections that cannot write, each used by one blocking thread at a time.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension as _, Row};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Store, StoreError, open_to_read};
use crate::catalogue::{Product, Sku};
use crate::metrics::Metrics;
use crate::money::Money;
use crate::order::{Line, Order, OrderId};

/// Reads that may wait for a connection, per connection.
const WAITING_PER_READER: usize = 256;

/// A page of a listing, in a stable order.
#[derive(Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The entries.
    pub items: Vec<T>,
    /// Whether another page follows the last entry.
    pub more: bool,
}

impl<T> Page<T> {
    /// `found` was asked for one entry more than `limit`, which tells whether more follow.
    fn cut(mut found: Vec<T>, limit: u32) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = found.len() > limit;
        found.truncate(limit);
        Self { items: found, more }
    }
}

impl Store {
    /// One order of `principal`. Another's order is not found rather than forbidden: its
    /// existence is nobody's business.
    ///
    /// # Errors
    /// [`StoreError::ReadersBusy`] at once, [`StoreError::Sqlite`] if the file cannot be read.
    pub async fn order(&self, principal: String, id: OrderId) -> Result<Option<Order>, StoreError> {
        self.readers
            .run(move |connection| order(connection, &principal, id))
            .await
    }

    /// Orders of `principal` in the order they were committed, after the order `after`;
    /// `None` when there is no such order.
    ///
    /// # Errors
    /// As [`Store::order`].
    pub async fn orders(
        &self,
        principal: String,
        after: Option<OrderId>,
        limit: u32,
    ) -> Result<Option<Page<Order>>, StoreError> {
        self.readers
            .run(move |connection| orders(connection, &principal, after, limit))
            .await
    }

    /// One product.
    ///
    /// # Errors
    /// As [`Store::order`].
    pub async fn product(&self, sku: Sku) -> Result<Option<Product>, StoreError> {
        let find = move |connection: &Connection| {
            let sql = "SELECT sku, name, description, price_minor, currency, available
                       FROM product JOIN stock USING (sku) WHERE sku = ?1";
            connection
                .prepare_cached(sql)?
                .query_row([sku], read_product)
                .optional()
        };
        self.readers.run(find).await
    }

    /// Products in the order of their SKUs, after the SKU `after`, which need not exist.
    ///
    /// # Errors
    /// As [`Store::order`].
    pub async fn products(
        &self,
        after: Option<Sku>,
        limit: u32,
    ) -> Result<Page<Product>, StoreError> {
        let list = move |connection: &Connection| {
            let sql = "SELECT sku, name, description, price_minor, currency, available
                       FROM product JOIN stock USING (sku)
                       WHERE sku > ?1 ORDER BY sku LIMIT ?2";
            // The empty string sorts before every SKU.
            let after = after.as_ref().map_or("", Sku::as_str);
            let found = connection
                .prepare_cached(sql)?
                .query_map((after, limit.saturating_add(1)), read_product)?
                .collect::<rusqlite::Result<_>>()?;
            Ok(Page::cut(found, limit))
        };
        self.readers.run(list).await
    }
}

fn order(connection: &Connection, principal: &str, id: OrderId) -> rusqlite::Result<Option<Order>> {
    // One snapshot for the order and its lines.
    let transaction = connection.unchecked_transaction()?;
    let found = transaction
        .prepare_cached(
            "SELECT id, status, version, total_minor, currency, created_at_ms
             FROM orders WHERE id = ?1 AND principal = ?2",
        )?
        .query_row((id, principal), read_order)
        .optional()?;
    found
        .map(|order| with_lines(&transaction, order))
        .transpose()
}

fn orders(
    connection: &Connection,
    principal: &str,
    after: Option<OrderId>,
    limit: u32,
) -> rusqlite::Result<Option<Page<Order>>> {
    let transaction = connection.unchecked_transaction()?;
    let after_seq = match after {
        None => 0,
        Some(id) => {
            let seq = transaction
                .prepare_cached("SELECT seq FROM orders WHERE id = ?1 AND principal = ?2")?
                .query_row((id, principal), |row| row.get::<_, i64>(0))
                .optional()?;
            let Some(seq) = seq else { return Ok(None) };
            seq
        }
    };
    let found = transaction
        .prepare_cached(
            "SELECT id, status, version, total_minor, currency, created_at_ms
             FROM orders WHERE principal = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3",
        )?
        .query_map((principal, after_seq, limit.saturating_add(1)), read_order)?
        .map(|order| with_lines(&transaction, order?))
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some(Page::cut(found, limit)))
}

/// An order still without its lines.
fn read_order(row: &Row<'_>) -> rusqlite::Result<Order> {
    Ok(Order {
        id: row.get(0)?,
        status: row.get(1)?,
        version: row.get(2)?,
        lines: Vec::new(),
        total: Money::new(row.get(3)?, row.get(4)?),
        created_at_ms: row.get(5)?,
    })
}

fn with_lines(connection: &Connection, mut order: Order) -> rusqlite::Result<Order> {
    let currency = order.total.currency();
    order.lines = connection
        .prepare_cached(
            "SELECT sku, quantity, unit_price_minor, total_minor
             FROM order_line WHERE order_id = ?1 ORDER BY sku",
        )?
        .query_map([order.id], |row| {
            Ok(Line {
                sku: row.get(0)?,
                quantity: row.get(1)?,
                unit_price: Money::new(row.get(2)?, currency),
                total: Money::new(row.get(3)?, currency),
            })
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(order)
}

fn read_product(row: &Row<'_>) -> rusqlite::Result<Product> {
    Ok(Product {
        sku: row.get(0)?,
        name: row.get(1)?,
        description: row.get(2)?,
        price: Money::new(row.get(3)?, row.get(4)?),
        available: row.get(5)?,
    })
}

/// The connections, and how many may wait for one.
pub(super) struct Readers {
    idle: Mutex<Vec<Connection>>,
    /// One permit per connection, so that a holder always finds one idle.
    connections: Arc<Semaphore>,
    /// One permit per read that runs or waits: the bound of the queue.
    admitted: Semaphore,
    metrics: Metrics,
}

impl Readers {
    pub(super) fn open(
        path: &Path,
        count: NonZeroU32,
        metrics: Metrics,
    ) -> Result<Self, StoreError> {
        let idle = (0..count.get())
            .map(|_| open_to_read(path))
            .collect::<Result<Vec<_>, _>>()?;
        let count = idle.len();
        Ok(Self {
            idle: Mutex::new(idle),
            connections: Arc::new(Semaphore::new(count)),
            admitted: Semaphore::new(count.saturating_mul(WAITING_PER_READER)),
            metrics,
        })
    }

    pub(super) async fn ping(self: &Arc<Self>) -> Result<(), StoreError> {
        let touch = |connection: &Connection| {
            connection
                .query_row("SELECT 1 FROM product LIMIT 1", [], |_| Ok(()))
                .optional()
        };
        self.run(touch).await.map(|_| ())
    }

    /// Runs `read` on an idle connection, on a thread that may block.
    ///
    /// A caller that goes away does not cancel a read that runs; its connection returns to
    /// the pool when it ends.
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let Ok(_admitted) = self.admitted.try_acquire() else {
            self.metrics.read_refused();
            return Err(StoreError::ReadersBusy);
        };
        let permit = Arc::clone(&self.connections).acquire_owned().await;
        let lent = Lent {
            connection: self.idle().pop(),
            readers: Arc::clone(self),
            _permit: permit.map_err(|_| StoreError::Closed)?,
        };
        let task =
            tokio::task::spawn_blocking(move || lent.connection.as_ref().map(read).transpose());
        let found = task
            .await
            .map_err(|error| StoreError::Thread(error.into()))??;
        // As many permits as connections: a holder always finds one.
        found.ok_or(StoreError::ReadersBusy)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection out of the pool. It goes back on drop, even when the read panicked.
struct Lent {
    /// Present until the drop.
    connection: Option<Connection>,
    readers: Arc<Readers>,
    /// Dropped after the connection is back, so that the next holder finds it.
    _permit: OwnedSemaphorePermit,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.readers.idle().extend(self.connection.take());
    }
}
