//! The deadline of a reservation has come. The writer runs this when the next one is due.

use super::cancel::release;
use super::stock::Move;
use super::{Command, Tx, change, find};
use crate::event::{Origin, Topic};
use crate::metrics::Metrics;
use crate::order::{Action, OrderId};
use crate::store::StoreError;
use crate::store::sql::{Backend, Connection, Param, SqlError};
use crate::trace::TraceId;

/// Most orders in one transaction.
const ORDERS_MAX: i64 = 256;

/// Ends reservations that are due. Its output says how many: none means that no
/// more is due.
#[derive(Debug)]
pub(crate) struct Expire;

impl Command for Expire {
    type Output = usize;

    fn run(&self, tx: &mut Tx<'_>) -> Result<usize, StoreError> {
        let due = due(tx)?;
        for &id in &due {
            let order = find(tx.connection(), None, id)?;
            let mut order = order.ok_or(StoreError::Inconsistent("an order vanished"))?;
            release(tx, &order, Move::Expire)?;
            let origin = Origin {
                actor: "expiry".to_owned(),
                trace: TraceId::of(None, Some(&order.trace_id)),
            };
            change(tx, &mut order, Action::Expire, Topic::OrderExpired, &origin)?;
        }
        Ok(due.len())
    }

    fn committed(&self, expired: &usize, metrics: &Metrics) {
        metrics.orders_expired(u64::try_from(*expired).unwrap_or(u64::MAX));
    }
}

/// The orders that are due, locked together with their stock.
fn due(tx: &mut Tx<'_>) -> Result<Vec<OrderId>, StoreError> {
    let now = Param::Integer(tx.now_ms);
    let is_postgres = tx.connection().backend() == Backend::Postgres;
    let sql = if is_postgres {
        // Another machine's writer may be at the same orders.
        "SELECT id FROM orders WHERE status = 'placed' AND expires_at_ms <= ?1
         ORDER BY expires_at_ms LIMIT ?2 FOR UPDATE SKIP LOCKED"
    } else {
        "SELECT id FROM orders WHERE status = 'placed' AND expires_at_ms <= ?1
         ORDER BY expires_at_ms LIMIT ?2"
    };
    let rows = tx.query(sql, &[now, Param::Integer(ORDERS_MAX)])?;
    let due = rows
        .into_iter()
        .map(|mut row| row.take())
        .collect::<Result<Vec<OrderId>, SqlError>>()?;
    if is_postgres && !due.is_empty() {
        let ids: Vec<String> = due.iter().map(ToString::to_string).collect();
        tx.write(
            "SELECT 1 FROM stock WHERE sku IN (SELECT sku FROM order_line
                 WHERE order_id = ANY (string_to_array(?1, E'\\n')))
             ORDER BY sku FOR NO KEY UPDATE",
            &[Param::Text(ids.join("\n").into())],
        )?;
    }
    Ok(due)
}

/// When the next reservation ends: milliseconds since the Unix epoch.
pub(crate) fn next_deadline_ms(connection: &mut dyn Connection) -> Result<Option<i64>, SqlError> {
    let rows = connection.query(
        "SELECT min(expires_at_ms) FROM orders WHERE status = 'placed'",
        &[],
    )?;
    rows.into_iter()
        .next()
        .map_or(Ok(None), |mut row| row.take())
}
