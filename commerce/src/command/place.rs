//! Placing an order.
//!
//! ```text
//! price    ► refuse unknown SKUs, impossible totals, and what is not available
//! reserve  ► one conditional UPDATE per SKU
//! record   ► order, lines, ledger movements, event, answer under its key
//! ```
//!
//! Either all of it commits, or nothing but a remembered refusal.

use std::time::Duration;

use super::stock::{self, Move};
use super::{Effect, Locks, Outcome, Render, Tx, Verdict};
use crate::event::{self, Origin, Topic};
use crate::metrics::{Metrics, RefusalReason};
use crate::money::Money;
use crate::order::{self, Draft, Line, Order, OrderId, Refusal, Status};
use crate::store::StoreError;
use crate::store::sql::Param;

/// A request to place an order.
#[derive(Debug)]
pub struct Place {
    /// Whose order it will be.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// What is asked for.
    pub draft: Draft,
    /// How long the stock is reserved for a payment.
    pub hold: Duration,
    /// The gate calls it sold out: the ledger is asked without taking its rows' locks.
    pub is_sold_out: bool,
    /// Renders the answer.
    pub render: Render,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub enum Placed {
    /// A new order.
    Order {
        /// Its total.
        total: Money,
        /// Units over all lines.
        units: u64,
    },
    /// No order.
    Refused(RefusalReason),
}

impl Effect for Place {
    type Value = Placed;

    fn locks(&self, locks: &mut Locks) {
        if self.is_sold_out {
            return;
        }
        for (sku, _) in self.draft.lines() {
            locks.sku(sku);
        }
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<Placed>, StoreError> {
        let id = OrderId::generate();
        let priced = price(tx, id, &self.draft)?.and_then(|lines| {
            let total = order::total(&lines)?;
            Ok((lines, total))
        });
        match priced {
            Ok((lines, total)) => self.record(tx, id, lines, total),
            Err(refusal) => Ok(Outcome {
                reply: (self.render)(&Verdict::Refused(&refusal))?,
                remember: refusal.is_remembered(),
                created: None,
                value: Placed::Refused(RefusalReason::of(&refusal)),
            }),
        }
    }

    fn committed(&self, value: &Placed, metrics: &Metrics) {
        match value {
            Placed::Order { total, units } => {
                // Totals are sums of positive prices: never negative.
                let minor = u64::try_from(total.minor()).unwrap_or(0);
                metrics.order_created(minor, total.currency().to_string(), *units);
            }
            Placed::Refused(reason) => metrics.order_refused(*reason),
        }
    }

    fn failed(&self, metrics: &Metrics) {
        metrics.order_refused(RefusalReason::Storage);
    }
}

/// The lines with the catalogue's prices, if every one of them is available.
fn price(
    tx: &mut Tx<'_>,
    id: OrderId,
    draft: &Draft,
) -> Result<Result<Vec<Line>, Refusal>, StoreError> {
    let mut lines = Vec::new();
    for (sku, requested) in draft.lines() {
        let found = tx.query(
            "SELECT price_minor, currency, available
             FROM product JOIN stock USING (sku) WHERE sku = ?1",
            &[Param::Text(sku.as_str().into())],
        )?;
        let Some(mut row) = found.into_iter().next() else {
            return Ok(Err(Refusal::UnknownSku(sku.clone())));
        };
        let unit_price: Money = row.take()?;
        let available: i64 = row.take()?;
        if available < i64::from(requested) {
            let sku = sku.clone();
            return Ok(Err(Refusal::InsufficientStock { sku, requested }));
        }
        match Line::price(id, sku.clone(), requested, unit_price) {
            Ok(line) => lines.push(line),
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(Ok(lines))
}

impl Place {
    /// Writes everything an order consists of.
    fn record(
        &self,
        tx: &mut Tx<'_>,
        id: OrderId,
        lines: Vec<Line>,
        total: Money,
    ) -> Result<Outcome<Placed>, StoreError> {
        let hold_ms = i64::try_from(self.hold.as_millis()).unwrap_or(i64::MAX);
        let order = Order {
            id,
            principal: self.principal.clone(),
            status: Status::Placed,
            version: 1,
            lines,
            total,
            refunded: total.zero(),
            created_at_ms: tx.now_ms,
            expires_at_ms: tx.now_ms.saturating_add(hold_ms),
            trace_id: self.origin.trace.as_str().to_owned(),
        };
        tx.insert(&order)?;
        let mut units = 0_u64;
        for line in &order.lines {
            if !stock::shift(tx, Move::Reserve, id, &line.sku, line.quantity)? {
                // It was available a moment ago, in this transaction.
                return Err(StoreError::Inconsistent("stock changed while locked"));
            }
            tx.insert(line)?;
            units = units.saturating_add(u64::from(line.quantity));
        }
        let json = tx.json(&order)?;
        let reply = (self.render)(&Verdict::Placed(&order, &json))?;
        event::emit(tx, Topic::OrderPlaced, &order, &self.origin, json)?;
        tx.wake_at(order.expires_at_ms);
        Ok(Outcome {
            reply,
            remember: true,
            created: Some(id),
            value: Placed::Order { total, units },
        })
    }
}
