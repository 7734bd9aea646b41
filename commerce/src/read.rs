//! Reads: orders, their events and payments, products. Each is one snapshot.

use crate::catalogue::{Product, Sku};
use crate::command::find;
use crate::event::Event;
use crate::order::{Line, Order, OrderId};
use crate::payment::Payment;
use crate::store::sql::{Connection, Param, Record, SqlError};
use crate::store::{Store, StoreError, horizon};

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
    /// One order of `principal`.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn order(&self, principal: String, id: OrderId) -> Result<Option<Order>, StoreError> {
        self.read(move |connection| find(connection, Some(&principal), id))
            .await
    }

    /// Orders of `principal` in the order they were written, after the order `after`;
    /// `None` when there is no such order.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn orders(
        &self,
        principal: String,
        after: Option<OrderId>,
        limit: u32,
    ) -> Result<Option<Page<Order>>, StoreError> {
        let last = self.read(horizon::last).await?;
        self.read(move |connection| orders(connection, &principal, after, last, limit))
            .await
    }

    /// What happened to an order of `principal`: its audit trail. `None` when there is no
    /// such order.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn order_events(
        &self,
        principal: String,
        id: OrderId,
    ) -> Result<Option<Vec<Event>>, StoreError> {
        self.of_order(principal, id, "ORDER BY seq").await
    }

    /// The payments of an order of `principal`. `None` when there is no such order.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn order_payments(
        &self,
        principal: String,
        id: OrderId,
    ) -> Result<Option<Vec<Payment>>, StoreError> {
        self.of_order(principal, id, "ORDER BY created_at_ms, id")
            .await
    }

    async fn of_order<R: Record + Send + 'static>(
        &self,
        principal: String,
        id: OrderId,
        sorted: &'static str,
    ) -> Result<Option<Vec<R>>, StoreError> {
        self.read(move |connection| {
            if find(connection, Some(&principal), id)?.is_none() {
                return Ok(None);
            }
            let rest = format!("WHERE order_id = ?1 {sorted}");
            R::select(connection, &rest, &[id.param()]).map(Some)
        })
        .await
    }

    /// One product.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn product(&self, sku: Sku) -> Result<Option<Product>, StoreError> {
        self.read(move |connection| {
            let sku = Param::Text(sku.as_str().into());
            let found = Product::select(connection, "WHERE sku = ?1", &[sku])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Products in the order of their SKUs, after the SKU `after`, which need not exist.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub async fn products(
        &self,
        after: Option<Sku>,
        limit: u32,
    ) -> Result<Page<Product>, StoreError> {
        self.read(move |connection| {
            // The empty string sorts before every SKU.
            let after = Param::Text(after.as_ref().map_or("", Sku::as_str).into());
            let one_more = Param::Integer(i64::from(limit).saturating_add(1));
            let rest = "WHERE sku > ?1 ORDER BY sku LIMIT ?2";
            let found = Product::select(connection, rest, &[after, one_more])?;
            Ok(Page::cut(found, limit))
        })
        .await
    }
}

fn orders(
    connection: &mut dyn Connection,
    principal: &str,
    after: Option<OrderId>,
    last: i64,
    limit: u32,
) -> Result<Option<Page<Order>>, SqlError> {
    let principal = || Param::Text(principal.into());
    let after_seq = match after {
        None => 0,
        Some(id) => {
            let rows = connection.query(
                "SELECT seq FROM orders WHERE id = ?1 AND principal = ?2",
                &[id.param(), principal()],
            )?;
            match rows.into_iter().next() {
                Some(mut row) => row.take()?,
                None => return Ok(None),
            }
        }
    };
    let mut found = Order::select(
        connection,
        "WHERE principal = ?1 AND seq > ?2 AND seq <= ?4 ORDER BY seq LIMIT ?3",
        &[
            principal(),
            Param::Integer(after_seq),
            Param::Integer(i64::from(limit).saturating_add(1)),
            Param::Integer(last),
        ],
    )?;
    for order in &mut found {
        order.lines = Line::select(
            connection,
            "WHERE order_id = ?1 ORDER BY sku",
            &[order.id.param()],
        )?;
    }
    Ok(Some(Page::cut(found, limit)))
}
