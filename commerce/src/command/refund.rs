//! Refunds: units go back for what was paid for them, the stored allocation of the discount
//! reversed. All parts of an order sum to exactly its total.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::member;
use super::pay::Provider;
use super::stock::{self, Move};
use super::{Effect, Expected, Locks, Outcome, Render, Tx, Verdict, change, find_to_change};
use crate::catalogue::Sku;
use crate::event::{self, Origin, Topic};
use crate::metrics::Metrics;
use crate::money::Money;
use crate::order::{Action, Order, OrderId, Refusal};
use crate::payment::{Kind, Payment, PaymentEvent, Refund, RefundLine, recompute};
use crate::store::StoreError;
use crate::store::sql::Param;

/// A request to refund.
#[derive(Debug)]
pub struct RefundOrder {
    /// Whose order it must be.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// Which order.
    pub order: OrderId,
    /// Which version of it.
    pub expected: Expected,
    /// Units by SKU; `None` for everything that is left.
    pub lines: Option<BTreeMap<Sku, u32>>,
    /// Whether the units are for sale again.
    pub restock: bool,
    /// Why, in the client's words.
    pub reason: String,
    /// Who pays back.
    pub provider: Provider,
    /// Renders the answer.
    pub render: Render,
}

impl Effect for RefundOrder {
    /// Whether money goes back.
    type Value = bool;

    fn locks(&self, locks: &mut Locks) {
        locks.order(&self.order);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<bool>, StoreError> {
        let plan = match find_to_change(
            tx,
            &self.principal,
            self.order,
            self.expected,
            Action::RefundPart,
        )? {
            Ok(order) if member::is_spent(tx, order.id)? => Err(Refusal::Spent),
            Ok(order) => self.plan(tx, order)?,
            Err(refusal) => Err(refusal),
        };
        let (mut order, units, is_rest) = match plan {
            Ok(plan) => plan,
            Err(refusal) => {
                return Ok(Outcome {
                    reply: (self.render)(&Verdict::Refused(&refusal))?,
                    remember: refusal.is_remembered(),
                    created: None,
                    value: false,
                });
            }
        };
        let payment = captured_payment(tx, order.id)?.ok_or(StoreError::Inconsistent(
            "a paid order has no captured payment",
        ))?;
        let id = Uuid::now_v7();
        let mut amount = order.total.zero();
        let mut rows = Vec::with_capacity(units.len());
        for (sku, Share { quantity, money }) in units {
            amount = amount
                .checked_add(money)
                .map_err(|_| StoreError::Inconsistent("a refund does not fit 64 bits"))?;
            if self.restock && !stock::shift(tx, Move::Restock, order.id, &sku, quantity)? {
                return Err(StoreError::Inconsistent("refunded units were not sold"));
            }
            rows.push(RefundLine {
                refund_id: id,
                order_id: order.id,
                sku,
                quantity,
                amount: money,
                restocked: self.restock,
            });
        }
        request(
            tx,
            &order,
            &payment,
            id,
            amount,
            &self.reason,
            self.provider,
            &self.origin,
        )?;
        for row in &rows {
            tx.insert(row)?;
        }
        order.refunded = order
            .refunded
            .checked_add(amount)
            .map_err(|_| StoreError::Inconsistent("refunds do not fit 64 bits"))?;
        let action = if is_rest {
            Action::RefundRest
        } else {
            Action::RefundPart
        };
        let json = change(tx, &mut order, action, Topic::OrderRefunded, &self.origin)?;
        Ok(Outcome {
            reply: (self.render)(&Verdict::Changed(&order, &json))?,
            remember: true,
            created: None,
            value: true,
        })
    }

    fn committed(&self, refunded: &bool, metrics: &Metrics) {
        if *refunded {
            metrics.order_changed(Topic::OrderRefunded);
        }
    }
}

/// Units of one line and what was paid for them.
struct Share {
    quantity: u32,
    money: Money,
}

type Plan = (Order, Vec<(Sku, Share)>, bool);

impl RefundOrder {
    /// Which units go back for how much, and whether none are left then.
    fn plan(&self, tx: &mut Tx<'_>, order: Order) -> Result<Result<Plan, Refusal>, StoreError> {
        let mut before: BTreeMap<Sku, u32> = BTreeMap::new();
        let rows = tx.query(
            "SELECT sku, CAST(sum(quantity) AS BIGINT) FROM refund_line
             WHERE order_id = ?1 GROUP BY sku",
            &[order.id.param()],
        )?;
        for mut row in rows {
            before.insert(row.take()?, row.take()?);
        }
        if let Some(lines) = &self.lines {
            let known = |sku: &Sku| order.lines.iter().any(|line| line.sku == *sku);
            if let Some(sku) = lines.keys().find(|sku| !known(sku)) {
                return Ok(Err(Refusal::RefundQuantity(sku.clone())));
            }
        }
        let (mut units, mut is_rest) = (Vec::new(), true);
        for line in &order.lines {
            let done = before.get(&line.sku).copied().unwrap_or(0);
            let left = line.quantity.saturating_sub(done);
            let quantity = match &self.lines {
                None => left,
                Some(lines) => lines.get(&line.sku).copied().unwrap_or(0),
            };
            if quantity > left {
                return Ok(Err(Refusal::RefundQuantity(line.sku.clone())));
            }
            is_rest &= quantity == left;
            if quantity == 0 {
                continue;
            }
            let overflow = |_| StoreError::Inconsistent("a line does not fit 64 bits");
            let money = line
                .payable(done.saturating_add(quantity))
                .and_then(|after| after.checked_sub(line.payable(done)?))
                .map_err(overflow)?;
            units.push((line.sku.clone(), Share { quantity, money }));
        }
        Ok(match units.is_empty() {
            true => {
                let line = order.lines.first();
                let sku = line.map(|line| line.sku.clone());
                Err(sku.map_or(Refusal::NotFound, Refusal::RefundQuantity))
            }
            false => Ok((order, units, is_rest)),
        })
    }
}

/// The payment that an order's money came by.
fn captured_payment(tx: &mut Tx<'_>, order: OrderId) -> Result<Option<Payment>, StoreError> {
    let found = tx.select::<Payment>(
        // By its state and not its amount: an order discounted to nothing was paid as well. One
        // that was refunded in part is still the one the rest came by.
        "WHERE order_id = ?1 AND status IN ('captured', 'partially_refunded', 'refunded')
         ORDER BY captured_minor DESC, created_at_ms LIMIT 1",
        &[order.param()],
    )?;
    Ok(found.into_iter().next())
}

/// Writes a refund of `amount` out of `payment` and asks the provider for it.
///
/// # Errors
/// [`StoreError`]
#[expect(clippy::too_many_arguments, reason = "each is a column of the refund")]
pub fn request(
    tx: &mut Tx<'_>,
    order: &Order,
    payment: &Payment,
    id: Uuid,
    amount: Money,
    reason: &str,
    provider: Provider,
    origin: &Origin,
) -> Result<(), StoreError> {
    // Of nothing, nothing is asked back.
    let is_immediate = provider == Provider::Immediate || amount.minor() == 0;
    let refund = Refund {
        id,
        order_id: order.id,
        payment_id: payment.id,
        status: if is_immediate {
            "completed"
        } else {
            "requested"
        }
        .to_owned(),
        reason: reason.to_owned(),
        amount,
        created_at_ms: tx.now_ms,
    };
    tx.insert(&refund)?;
    if is_immediate {
        tx.insert(&PaymentEvent {
            payment_id: payment.id,
            event_id: format!("refund:{id}"),
            sequence: 1,
            kind: Kind::Refunded,
            amount_minor: amount.minor(),
            at_ms: tx.now_ms,
        })?;
        // A refund that the provider was asked for before may still be open.
        return restate(tx, payment.id, payment.check_at_ms);
    }
    if let Provider::External { check_after_ms } = provider {
        // Its callback may be lost as well.
        let check = tx.now_ms.saturating_add(check_after_ms);
        tx.write(
            "UPDATE payment SET check_at_ms = ?2 WHERE id = ?1",
            &[Param::Uuid(payment.id), Param::Integer(check)],
        )?;
    }
    let json = tx.json(&refund)?;
    event::emit(tx, Topic::RefundRequested, order, origin, json)
}

/// Recomputes a payment's amounts and state from its events.
pub(super) fn restate(
    tx: &mut Tx<'_>,
    payment: Uuid,
    check_at_ms: Option<i64>,
) -> Result<(), StoreError> {
    let events = tx.select::<PaymentEvent>("WHERE payment_id = ?1", &[Param::Uuid(payment)])?;
    let totals = recompute(&events);
    tx.write(
        "UPDATE payment SET status = ?2, captured_minor = ?3, refunded_minor = ?4, check_at_ms = ?5
         WHERE id = ?1",
        &[
            Param::Uuid(payment),
            Param::Text(totals.status.as_str().into()),
            Param::Integer(totals.captured),
            Param::Integer(totals.refunded),
            check_at_ms.map_or(Param::Null, Param::Integer),
        ],
    )?;
    Ok(())
}
