//! The buyer gives an unpaid order up: its stock is free again.

use super::stock::{self, Move};
use super::{Effect, Expected, Locks, Outcome, Render, Tx, Verdict, change, find_to_change};
use crate::event::{Origin, Topic};
use crate::metrics::Metrics;
use crate::order::{Action, Order, OrderId};
use crate::store::StoreError;

/// A request to cancel.
#[derive(Debug)]
pub struct Cancel {
    /// Whose order it must be.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// Which order.
    pub order: OrderId,
    /// Which version of it.
    pub expected: Expected,
    /// Renders the answer.
    pub render: Render,
}

impl Effect for Cancel {
    /// Whether it was cancelled.
    type Value = bool;

    fn locks(&self, locks: &mut Locks) {
        locks.order(&self.order);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<bool>, StoreError> {
        let found = find_to_change(
            tx,
            &self.principal,
            self.order,
            self.expected,
            Action::Cancel,
        )?;
        let mut order = match found {
            Ok(order) => order,
            Err(refusal) => {
                return Ok(Outcome {
                    reply: (self.render)(&Verdict::Refused(&refusal))?,
                    remember: refusal.is_remembered(),
                    created: None,
                    value: false,
                });
            }
        };
        release(tx, &order, Move::Cancel)?;
        let json = change(
            tx,
            &mut order,
            Action::Cancel,
            Topic::OrderCancelled,
            &self.origin,
        )?;
        Ok(Outcome {
            reply: (self.render)(&Verdict::Changed(&order, &json))?,
            remember: true,
            created: None,
            value: true,
        })
    }

    fn committed(&self, cancelled: &bool, metrics: &Metrics) {
        if *cancelled {
            metrics.order_changed(Topic::OrderCancelled);
        }
    }
}

/// Gives the reserved units of every line back.
pub(super) fn release(tx: &mut Tx<'_>, order: &Order, reason: Move) -> Result<(), StoreError> {
    for line in &order.lines {
        if !stock::shift(tx, reason, order.id, &line.sku, line.quantity)? {
            return Err(StoreError::Inconsistent("an order's stock is not reserved"));
        }
    }
    Ok(())
}
