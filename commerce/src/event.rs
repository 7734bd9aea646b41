//! Events: what happened to an order, written in its transaction.
//!
//! One table is the audit trail of every order and the queue of everything that is told
//! about it: the risk service, subscribers' webhooks, the payment provider.

use serde_json::value::RawValue;
use uuid::Uuid;

use crate::order::{Order, OrderId};
use crate::row;
use crate::store::sql::{Backend, Field, Param, Row, SqlError};
use crate::store::{StoreError, Tx};
use crate::trace::TraceId;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub enum Topic {
    /// Stock is reserved.
    #[serde(rename = "order.placed")]
    OrderPlaced,
    /// The total was captured.
    #[serde(rename = "order.paid")]
    OrderPaid,
    /// The buyer gave up.
    #[serde(rename = "order.cancelled")]
    OrderCancelled,
    /// The deadline came.
    #[serde(rename = "order.expired")]
    OrderExpired,
    /// Money goes back.
    #[serde(rename = "order.refunded")]
    OrderRefunded,
    /// The provider is to charge.
    #[serde(rename = "payment.requested")]
    PaymentRequested,
    /// The provider could not charge.
    #[serde(rename = "payment.failed")]
    PaymentFailed,
    /// The provider is to pay back.
    #[serde(rename = "refund.requested")]
    RefundRequested,
    /// The provider has paid back.
    #[serde(rename = "refund.completed")]
    RefundCompleted,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Self; 9] = [
        Self::OrderPlaced,
        Self::OrderPaid,
        Self::OrderCancelled,
        Self::OrderExpired,
        Self::OrderRefunded,
        Self::PaymentRequested,
        Self::PaymentFailed,
        Self::RefundRequested,
        Self::RefundCompleted,
    ];

    /// The name stored and sent. Those of an order's own changes start with `order.`: each
    /// version of an order has exactly one.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OrderPlaced => "order.placed",
            Self::OrderPaid => "order.paid",
            Self::OrderCancelled => "order.cancelled",
            Self::OrderExpired => "order.expired",
            Self::OrderRefunded => "order.refunded",
            Self::PaymentRequested => "payment.requested",
            Self::PaymentFailed => "payment.failed",
            Self::RefundRequested => "refund.requested",
            Self::RefundCompleted => "refund.completed",
        }
    }
}

impl Field for Topic {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        let name = String::load(row)?;
        Self::ALL
            .into_iter()
            .find(|topic| topic.as_str() == name)
            .ok_or(SqlError::Column("a topic"))
    }
}

/// JSON kept as text; it goes out as it was written.
#[derive(Clone, Debug, PartialEq, Eq, utoipa::ToSchema)]
#[schema(value_type = Object)]
pub struct Payload(pub String);

impl serde::Serialize for Payload {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl Field for Payload {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        self.0.store(params);
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        String::load(row).map(Self)
    }
}

row! {
    /// Something that happened to an order.
    pub struct Event in "outbox" {
        /// Its identity; consumers drop what they have seen.
        pub id: Uuid ["event_id"],
        /// What happened.
        #[serde(rename = "type")]
        pub topic: Topic ["topic"],
        /// To which order.
        pub order_id: OrderId ["order_id"],
        /// The order's version then.
        pub order_version: i64 ["version"],
        /// Whose order it is.
        #[serde(skip)]
        pub principal: String ["principal"],
        /// Who did it: the principal, `expiry` or `provider`.
        pub actor: String ["actor"],
        /// The trace of the request that caused it.
        pub trace_id: String ["trace_id"],
        /// The order, payment or refund after it.
        pub data: Payload ["payload"],
        /// Milliseconds since the Unix epoch.
        pub at_ms: i64 ["at_ms"],
    }
}

/// On whose behalf something happens.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Who did it.
    pub actor: String,
    /// The trace it belongs to.
    pub trace: TraceId,
}

/// Writes an event in the transaction of what it tells.
///
/// # Errors
/// [`StoreError`]
pub fn emit(
    tx: &mut Tx<'_>,
    topic: Topic,
    order: &Order,
    origin: &Origin,
    payload: String,
) -> Result<(), StoreError> {
    let event = Event {
        id: Uuid::now_v7(),
        topic,
        order_id: order.id,
        order_version: order.version,
        principal: order.principal.clone(),
        actor: origin.actor.clone(),
        trace_id: origin.trace.as_str().to_owned(),
        data: Payload(payload),
        at_ms: tx.now_ms,
    };
    tx.insert(&event)?;
    if tx.connection().backend() == Backend::Postgres {
        // One row for each sink to claim.
        tx.write(
            "INSERT INTO delivery (sink, event_id, leased_until_ms)
             SELECT id, ?1, 0 FROM sink
             WHERE deleted_at_ms IS NULL AND (principal IS NULL OR principal = ?2)
               AND (kind <> 'provider' OR ?3 IN ('payment.requested', 'refund.requested'))",
            &[
                Param::Uuid(event.id),
                Param::Text(event.principal.as_str().into()),
                Param::Text(topic.as_str().into()),
            ],
        )?;
    }
    tx.wrote_event();
    Ok(())
}
