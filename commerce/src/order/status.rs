//! An order's states, and what leads from one to the next.

use serde::Serialize;
use utoipa::ToSchema;

use crate::store::sql::{Field, Param, Row, SqlError};

/// Where an order is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Stock is reserved until the deadline; nothing was paid yet.
    Placed,
    /// Paid; the stock is sold.
    Paid,
    /// Given up by the buyer; the stock is free again.
    Cancelled,
    /// Not paid by the deadline; the stock is free again.
    Expired,
    /// A part of the money went back.
    PartiallyRefunded,
    /// All of the money went back.
    Refunded,
}

/// What can happen to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The whole total was captured.
    Pay,
    /// The buyer gives up.
    Cancel,
    /// The deadline has come.
    Expire,
    /// Some units go back.
    RefundPart,
    /// All units that are left go back.
    RefundRest,
}

impl Action {
    /// What it is called in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pay => "paid",
            Self::Cancel => "cancelled",
            Self::Expire => "expired",
            Self::RefundPart | Self::RefundRest => "refunded",
        }
    }
}

impl Status {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::Placed,
        Self::Paid,
        Self::Cancelled,
        Self::Expired,
        Self::PartiallyRefunded,
        Self::Refunded,
    ];

    /// The state machine: where `action` leads from here, or `None` if it is not allowed.
    #[must_use]
    pub const fn after(self, action: Action) -> Option<Self> {
        match (self, action) {
            (Self::Placed, Action::Pay) => Some(Self::Paid),
            (Self::Placed, Action::Cancel) => Some(Self::Cancelled),
            (Self::Placed, Action::Expire) => Some(Self::Expired),
            (Self::Paid | Self::PartiallyRefunded, Action::RefundPart) => {
                Some(Self::PartiallyRefunded)
            }
            (Self::Paid | Self::PartiallyRefunded, Action::RefundRest) => Some(Self::Refunded),
            _ => None,
        }
    }

    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Paid => "paid",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::PartiallyRefunded => "partially_refunded",
            Self::Refunded => "refunded",
        }
    }

    /// The state of that name, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }
}

impl Field for Status {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::parse(&String::load(row)?).ok_or(SqlError::Column("an order's status"))
    }
}
