//! Why the business says no.

use super::{Action, Status};
use crate::catalogue::Sku;

/// Why a well-formed request was refused by the business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No product has this SKU.
    UnknownSku(Sku),
    /// Fewer units available than asked for.
    InsufficientStock {
        /// The first SKU that ran out.
        sku: Sku,
        /// Units asked for.
        requested: u32,
    },
    /// A coupon is unknown or not valid now.
    Coupon(String),
    /// The prices cannot be summed.
    Total(TotalRefusal),
    /// There is no such order of this principal.
    NotFound,
    /// `If-Match` names another version.
    Stale {
        /// The version now.
        current: i64,
    },
    /// The order's state does not allow it.
    State {
        /// The state now.
        status: Status,
        /// What was asked for.
        action: Action,
    },
    /// A payment is already under way.
    PaymentPending,
    /// More units than were bought and not yet refunded.
    RefundQuantity(Sku),
    /// What was bought is in use: a period of membership.
    Spent,
}

/// Why prices have no sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TotalRefusal {
    /// No line, and so no currency; a [`Draft`] rules it out.
    NoLines,
    /// Two currencies in one order.
    MixedCurrencies,
    /// More than 64 bits of minor units.
    Overflow,
}

impl Refusal {
    /// Whether the refusal is the key's lasting answer.
    ///
    /// Running out of stock is an answer the client acted on; replaying it keeps a retry
    /// from turning into a purchase. Faulty input and stale versions are never remembered.
    #[must_use]
    pub fn is_remembered(&self) -> bool {
        match self {
            Self::InsufficientStock { .. } | Self::State { .. } | Self::Spent => true,
            Self::UnknownSku(_)
            | Self::Coupon(_)
            | Self::Total(_)
            | Self::NotFound
            | Self::Stale { .. }
            | Self::PaymentPending
            | Self::RefundQuantity(_) => false,
        }
    }
}
