//! Payments, pure: what the provider's events add up to.
//!
//! A provider repeats, delays, reorders and loses its callbacks. So amounts are never
//! incremented: they are sums over the distinct events, the same in any order.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::money::Money;
use crate::order::OrderId;
use crate::row;
use crate::store::sql::{Field, Param, Row, SqlError};

/// What a provider can report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Money was taken.
    Captured,
    /// The charge was declined; nothing was taken.
    Failed,
    /// Money went back.
    Refunded,
}

impl Kind {
    /// The name stored and sent.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Failed => "failed",
            Self::Refunded => "refunded",
        }
    }
}

impl Field for Kind {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match String::load(row)?.as_str() {
            "captured" => Ok(Self::Captured),
            "failed" => Ok(Self::Failed),
            "refunded" => Ok(Self::Refunded),
            _ => Err(SqlError::Column("a payment event's kind")),
        }
    }
}

row! {
    /// One thing the provider said.
    pub struct PaymentEvent in "payment_event" {
        /// About which payment.
        pub payment_id: Uuid ["payment_id"],
        /// The provider's identity of the event; repeated when the callback is.
        pub event_id: String ["event_id"],
        /// The provider's order of the events of a payment, from 1.
        pub sequence: i64 ["sequence"],
        /// What happened.
        pub kind: Kind ["kind"],
        /// How much, in minor units; 0 for a failure.
        pub amount_minor: i64 ["amount_minor"],
        /// When it arrived here.
        pub at_ms: i64 ["at_ms"],
    }
}

/// Where a payment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PaymentStatus {
    /// Asked for; the provider has not said yet.
    Pending,
    /// Declined.
    Failed,
    /// Money was taken.
    Captured,
    /// Some of it went back.
    PartiallyRefunded,
    /// All of it went back.
    Refunded,
}

impl PaymentStatus {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Failed,
        Self::Captured,
        Self::PartiallyRefunded,
        Self::Refunded,
    ];

    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Failed => "failed",
            Self::Captured => "captured",
            Self::PartiallyRefunded => "partially_refunded",
            Self::Refunded => "refunded",
        }
    }
}

impl Field for PaymentStatus {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        let name = String::load(row)?;
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == name)
            .ok_or(SqlError::Column("a payment's status"))
    }
}

row! {
    /// One attempt to be paid for an order.
    pub struct Payment in "payment" {
        /// Its identity, and the provider's idempotency key.
        pub id: Uuid ["id"],
        /// For which order.
        pub order_id: OrderId ["order_id"],
        /// What the events say.
        pub status: PaymentStatus ["status"],
        /// What was asked for.
        pub amount: Money ["amount_minor", "currency"],
        /// The sum of what was taken.
        pub captured: Money ["captured_minor", "currency"],
        /// The sum of what went back.
        pub refunded: Money ["refunded_minor", "currency"],
        /// Milliseconds since the Unix epoch.
        pub created_at_ms: i64 ["created_at_ms"],
        /// When the provider is asked again; null once it is settled.
        #[serde(skip)]
        pub check_at_ms: Option<i64> ["check_at_ms"],
    }
}

row! {
    /// Money on its way back.
    pub struct Refund in "refund" {
        /// Its identity, and the provider's idempotency key.
        pub id: Uuid ["id"],
        /// For which order.
        pub order_id: OrderId ["order_id"],
        /// Out of which payment.
        pub payment_id: Uuid ["payment_id"],
        /// `requested` or `completed`.
        pub status: String ["status"],
        /// Why.
        pub reason: String ["reason"],
        /// How much.
        pub amount: Money ["amount_minor", "currency"],
        /// Milliseconds since the Unix epoch.
        pub created_at_ms: i64 ["created_at_ms"],
    }
}

row! {
    /// The units of one line that a refund covers.
    pub struct RefundLine in "refund_line" {
        /// Of which refund.
        #[serde(skip)]
        pub refund_id: Uuid ["refund_id"],
        /// Of which order.
        #[serde(skip)]
        pub order_id: OrderId ["order_id"],
        /// Which line.
        pub sku: crate::catalogue::Sku ["sku"],
        /// How many units.
        pub quantity: u32 ["quantity"],
        /// What was paid for them, their share of the discount reversed.
        pub amount: Money ["amount_minor", "currency"],
        /// Whether they are for sale again.
        pub restocked: bool ["restocked"],
    }
}

/// What the events of one payment add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Minor units taken.
    pub captured: i64,
    /// Minor units gone back.
    pub refunded: i64,
    /// The state that follows.
    pub status: PaymentStatus,
}

/// Adds the distinct events up. Their order does not matter, nor does a repetition.
#[must_use]
pub fn recompute(events: &[PaymentEvent]) -> Totals {
    let mut seen = std::collections::BTreeSet::new();
    let (mut captured, mut refunded) = (0_i64, 0_i64);
    // Apart from the sums: what costs nothing is paid and refunded as well.
    let (mut was_captured, mut was_refunded, mut failed) = (false, false, false);
    for event in events {
        if !seen.insert(event.event_id.as_str()) {
            continue;
        }
        match event.kind {
            Kind::Captured => {
                was_captured = true;
                captured = captured.saturating_add(event.amount_minor);
            }
            Kind::Refunded => {
                was_refunded = true;
                refunded = refunded.saturating_add(event.amount_minor);
            }
            Kind::Failed => failed = true,
        }
    }
    let status = match (was_captured, was_refunded) {
        (false, false) if failed => PaymentStatus::Failed,
        (false, _) => PaymentStatus::Pending,
        (true, false) => PaymentStatus::Captured,
        (true, true) if refunded >= captured => PaymentStatus::Refunded,
        _ => PaymentStatus::PartiallyRefunded,
    };
    Totals {
        captured,
        refunded,
        status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, kind: Kind, amount_minor: i64) -> PaymentEvent {
        PaymentEvent {
            payment_id: Uuid::nil(),
            event_id: id.to_owned(),
            sequence: 1,
            kind,
            amount_minor,
            at_ms: 0,
        }
    }

    #[test]
    fn any_order_and_any_repetition_give_the_same_sums() {
        let events = [
            event("1", Kind::Captured, 700),
            event("2", Kind::Refunded, 200),
            event("3", Kind::Refunded, 500),
        ];
        let expected = Totals {
            captured: 700,
            refunded: 700,
            status: PaymentStatus::Refunded,
        };
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            let mut shuffled: Vec<PaymentEvent> = order.map(|n: usize| events[n].clone()).into();
            shuffled.extend(events.clone());
            assert_eq!(recompute(&shuffled), expected);
        }
        assert_eq!(
            recompute(&events[..2]).status,
            PaymentStatus::PartiallyRefunded
        );
        assert_eq!(recompute(&events[..1]).status, PaymentStatus::Captured);
        // A refund that overtook its capture is no state of its own.
        assert_eq!(recompute(&events[1..2]).status, PaymentStatus::Pending);
        assert_eq!(recompute(&[]).status, PaymentStatus::Pending);
        let nothing = [event("5", Kind::Captured, 0), event("6", Kind::Refunded, 0)];
        assert_eq!(recompute(&nothing[..1]).status, PaymentStatus::Captured);
        assert_eq!(recompute(&nothing).status, PaymentStatus::Refunded);
        assert_eq!(
            recompute(&[event("4", Kind::Failed, 0)]).status,
            PaymentStatus::Failed
        );
    }
}
