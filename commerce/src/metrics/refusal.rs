//! Why an order was refused, as a label.

use crate::order::Refusal;

/// Why an order was not created; the `reason` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// Malformed key, tenant, JSON or lines.
    InvalidRequest,
    /// The key was used with another body.
    KeyReused,
    /// No product has the SKU.
    UnknownSku,
    /// Fewer units available than asked for.
    InsufficientStock,
    /// The prices have no sum.
    Total,
    /// A coupon is unknown or not valid now.
    Coupon,
    /// The group has no place for them.
    Group,
    /// The order's state, version or payment does not allow the change.
    State,
    /// The writer's queue was full, or the writer was gone.
    Overloaded,
    /// The storage failed.
    Storage,
}

impl RefusalReason {
    /// Every reason, in the order of the variants.
    pub(super) const ALL: [Self; 10] = [
        Self::InvalidRequest,
        Self::KeyReused,
        Self::UnknownSku,
        Self::InsufficientStock,
        Self::Total,
        Self::Coupon,
        Self::Group,
        Self::State,
        Self::Overloaded,
        Self::Storage,
    ];

    /// The reason behind a refusal.
    #[must_use]
    pub const fn of(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::UnknownSku(_) => Self::UnknownSku,
            Refusal::InsufficientStock { .. } => Self::InsufficientStock,
            Refusal::Total(_) => Self::Total,
            Refusal::Coupon(_) => Self::Coupon,
            Refusal::NotFound
            | Refusal::Stale { .. }
            | Refusal::State { .. }
            | Refusal::PaymentPending
            | Refusal::RefundQuantity(_)
            | Refusal::Spent => Self::State,
        }
    }

    /// The label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::KeyReused => "key_reused",
            Self::UnknownSku => "unknown_sku",
            Self::InsufficientStock => "insufficient_stock",
            Self::Total => "total",
            Self::Coupon => "coupon",
            Self::Group => "group",
            Self::State => "state",
            Self::Overloaded => "overloaded",
            Self::Storage => "storage",
        }
    }
}
