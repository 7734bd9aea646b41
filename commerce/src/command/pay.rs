//! Paying: at once, or by asking the provider and waiting for what it says.

use uuid::Uuid;

use super::stock::{self, Move};
use super::{Effect, Expected, Locks, Outcome, Render, Tx, Verdict, change, find_to_change};
use crate::event::{self, Origin, Topic};
use crate::metrics::Metrics;
use crate::order::{Action, Order, OrderId, Refusal};
use crate::payment::{Kind, Payment, PaymentEvent, PaymentStatus};
use crate::store::StoreError;

/// Who takes the money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// Nobody: the money counts as taken. For demonstrations and tests.
    Immediate,
    /// A service that is asked by an event and answers by callbacks.
    External {
        /// Milliseconds without a callback after which it is asked what became of it.
        check_after_ms: i64,
    },
}

/// A request to pay an order.
#[derive(Debug)]
pub struct Pay {
    /// Whose order it must be.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// Which order.
    pub order: OrderId,
    /// Which version of it.
    pub expected: Expected,
    /// Who takes the money.
    pub provider: Provider,
    /// Renders the answer.
    pub render: Render,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paid {
    /// The order is paid.
    Now,
    /// The provider was asked.
    Requested,
    /// Nothing happened.
    Refused,
}

impl Effect for Pay {
    type Value = Paid;

    fn locks(&self, locks: &mut Locks) {
        locks.order(&self.order);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<Paid>, StoreError> {
        let found = find_to_change(tx, &self.principal, self.order, self.expected, Action::Pay)?;
        let found = match found {
            Ok(order) if is_pending(tx, order.id)? => Err(Refusal::PaymentPending),
            found => found,
        };
        let mut order = match found {
            Ok(order) => order,
            Err(refusal) => {
                return Ok(Outcome {
                    reply: (self.render)(&Verdict::Refused(&refusal))?,
                    remember: refusal.is_remembered(),
                    created: None,
                    value: Paid::Refused,
                });
            }
        };
        let mut payment = Payment {
            id: Uuid::now_v7(),
            order_id: order.id,
            status: PaymentStatus::Pending,
            amount: order.total,
            captured: order.total.zero(),
            refunded: order.total.zero(),
            created_at_ms: tx.now_ms,
            check_at_ms: None,
        };
        // Nothing to take: there is nothing a provider could be asked for.
        let provider = match order.total.minor() {
            0 => Provider::Immediate,
            _ => self.provider,
        };
        match provider {
            Provider::Immediate => {
                payment.status = PaymentStatus::Captured;
                payment.captured = order.total;
                tx.insert(&payment)?;
                tx.insert(&PaymentEvent {
                    payment_id: payment.id,
                    event_id: format!("immediate:{}", payment.id),
                    sequence: 1,
                    kind: Kind::Captured,
                    amount_minor: order.total.minor(),
                    at_ms: tx.now_ms,
                })?;
                let json = settle(tx, &mut order, &self.origin)?;
                Ok(Outcome {
                    reply: (self.render)(&Verdict::Changed(&order, &json))?,
                    remember: true,
                    created: None,
                    value: Paid::Now,
                })
            }
            Provider::External { check_after_ms } => {
                payment.check_at_ms = Some(tx.now_ms.saturating_add(check_after_ms));
                tx.insert(&payment)?;
                let request = serde_json::to_string(&payment)?;
                event::emit(tx, Topic::PaymentRequested, &order, &self.origin, request)?;
                let json = serde_json::to_string(&order)?;
                Ok(Outcome {
                    reply: (self.render)(&Verdict::Accepted(&order, &json))?,
                    remember: true,
                    created: None,
                    value: Paid::Requested,
                })
            }
        }
    }

    fn committed(&self, paid: &Paid, metrics: &Metrics) {
        if *paid == Paid::Now {
            metrics.order_changed(Topic::OrderPaid);
        }
    }
}

/// Whether an earlier payment of this order may still succeed.
fn is_pending(tx: &mut Tx<'_>, order: OrderId) -> Result<bool, StoreError> {
    let pending = tx.query(
        "SELECT 1 FROM payment WHERE order_id = ?1 AND status = 'pending'",
        &[order.param()],
    )?;
    Ok(!pending.is_empty())
}

/// The total was captured: the reserved units are sold. Returns the order's JSON.
pub(super) fn settle(
    tx: &mut Tx<'_>,
    order: &mut Order,
    origin: &Origin,
) -> Result<String, StoreError> {
    for line in &order.lines {
        if !stock::shift(tx, Move::Sell, order.id, &line.sku, line.quantity)? {
            return Err(StoreError::Inconsistent("an order's stock is not reserved"));
        }
    }
    change(tx, order, Action::Pay, Topic::OrderPaid, origin)
}
