//! What the payment provider says, whenever and however often it says it.

use uuid::Uuid;

use super::pay::{self, Provider};
use super::refund;
use super::{Command, Locks, Tx, find};
use crate::event::{self, Origin, Topic};
use crate::metrics::Metrics;
use crate::order::{OrderId, Status};
use crate::payment::{Kind, Payment, PaymentEvent, PaymentStatus, recompute};
use crate::store::StoreError;
use crate::store::sql::Param;
use crate::trace::TraceId;

/// One event of the provider.
#[derive(Debug)]
pub struct Callback {
    /// The order of the payment: looked up before, so that it can be locked.
    pub order: OrderId,
    /// About which payment.
    pub payment: Uuid,
    /// The provider's identity of the event; `refund:<id>` for a refund.
    pub event_id: String,
    /// The provider's order of events.
    pub sequence: i64,
    /// What happened.
    pub kind: Kind,
    /// How much, in minor units.
    pub amount_minor: i64,
    /// How refunds that follow are made.
    pub provider: Provider,
}

/// What it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The order is paid.
    Paid,
    /// The money came too late, or twice, and goes back.
    SentBack,
    /// Only the payment changed.
    Recorded,
    /// It was known already.
    Repeated,
}

impl Command for Callback {
    type Output = Applied;

    fn locks(&self, locks: &mut Locks) {
        locks.name("payment", &self.payment.to_string());
        locks.order(&self.order);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Applied, StoreError> {
        let payment = tx.select::<Payment>("WHERE id = ?1", &[Param::Uuid(self.payment)])?;
        let payment = payment
            .into_iter()
            .next()
            .ok_or(StoreError::Inconsistent("a payment vanished"))?;
        let mut events =
            tx.select::<PaymentEvent>("WHERE payment_id = ?1", &[Param::Uuid(self.payment)])?;
        if events.iter().any(|event| event.event_id == self.event_id) {
            return Ok(Applied::Repeated);
        }
        let event = PaymentEvent {
            payment_id: self.payment,
            event_id: self.event_id.clone(),
            sequence: self.sequence,
            kind: self.kind,
            amount_minor: self.amount_minor,
            at_ms: tx.now_ms,
        };
        tx.insert(&event)?;
        events.push(event);
        let before = recompute(events.split_last().map_or(&[], |(_, before)| before));
        let after = recompute(&events);
        let order = find(tx.connection(), None, self.order)?;
        let mut order = order.ok_or(StoreError::Inconsistent("an order vanished"))?;
        let origin = Origin {
            actor: "provider".to_owned(),
            trace: TraceId::of(None, Some(&order.trace_id)),
        };
        let has_refund_open = match self.kind {
            Kind::Captured => {
                return self.captured(tx, &payment, &mut order, after.captured, &origin);
            }
            Kind::Failed => {
                if after.status == PaymentStatus::Failed && before.status == PaymentStatus::Pending
                {
                    let json = serde_json::to_string(&Payment {
                        status: after.status,
                        ..payment.clone()
                    })?;
                    event::emit(tx, Topic::PaymentFailed, &order, &origin, json)?;
                }
                false
            }
            Kind::Refunded => {
                let id = self.event_id.strip_prefix("refund:").unwrap_or_default();
                let done = tx.execute(
                    "UPDATE refund SET status = 'completed'
                     WHERE id = ?1 AND payment_id = ?2 AND status <> 'completed'",
                    &[Param::Text(id.into()), Param::Uuid(self.payment)],
                )?;
                if done == 1 {
                    let json = serde_json::json!({ "id": id, "payment_id": self.payment });
                    event::emit(
                        tx,
                        Topic::RefundCompleted,
                        &order,
                        &origin,
                        json.to_string(),
                    )?;
                }
                self.has_open_refund(tx)?
            }
        };
        // A refund may overtake its capture: then the capture is still to come.
        let is_open = after.status == PaymentStatus::Pending || has_refund_open;
        let check = is_open.then(|| self.next_check(tx.now_ms)).flatten();
        refund::restate(tx, self.payment, check)?;
        Ok(Applied::Recorded)
    }

    fn committed(&self, applied: &Applied, metrics: &Metrics) {
        if *applied == Applied::Paid {
            metrics.order_changed(Topic::OrderPaid);
        }
    }
}

impl Callback {
    /// Money was taken. It pays the order, or it goes back: the reservation has ended, the
    /// order is paid already, or it is less than the total.
    fn captured(
        &self,
        tx: &mut Tx<'_>,
        payment: &Payment,
        order: &mut crate::order::Order,
        captured: i64,
        origin: &Origin,
    ) -> Result<Applied, StoreError> {
        let pays = order.status == Status::Placed && !order.is_overdue(tx.now_ms);
        if pays && captured < order.total.minor() {
            // The rest may still come; the provider is asked for it.
            refund::restate(tx, self.payment, self.next_check(tx.now_ms))?;
            return Ok(Applied::Recorded);
        }
        let excess = if pays {
            captured.saturating_sub(order.total.minor())
        } else {
            self.amount_minor
        };
        let check = (excess > 0).then(|| self.next_check(tx.now_ms)).flatten();
        refund::restate(tx, self.payment, check)?;
        if excess > 0 {
            let amount = crate::money::Money::new(excess, payment.amount.currency());
            let reason = if pays { "overpaid" } else { "late_payment" };
            let id = Uuid::now_v7();
            refund::request(
                tx,
                order,
                payment,
                id,
                amount,
                reason,
                self.provider,
                origin,
            )?;
        }
        if !pays {
            return Ok(Applied::SentBack);
        }
        pay::settle(tx, order, origin)?;
        Ok(Applied::Paid)
    }

    fn has_open_refund(&self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        let open = tx.query(
            "SELECT 1 FROM refund WHERE payment_id = ?1 AND status <> 'completed'",
            &[Param::Uuid(self.payment)],
        )?;
        Ok(!open.is_empty())
    }

    fn next_check(&self, now_ms: i64) -> Option<i64> {
        match self.provider {
            Provider::Immediate => None,
            Provider::External { check_after_ms } => Some(now_ms.saturating_add(check_after_ms)),
        }
    }
}
