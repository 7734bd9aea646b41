//! What a client asks for, before it has a price.

use std::collections::BTreeMap;

use crate::catalogue::{Sku, SkuError};

/// Most distinct SKUs in one order.
pub const LINES_MAX: usize = 100;

/// Most units of one SKU in one order.
pub const QUANTITY_MAX: u32 = 10_000;

/// What a client asks for: units by SKU.
///
/// Duplicate SKUs are summed before anything is deducted, so that two lines of one item
/// cannot pass a stock check separately. Ordered by SKU, so that every writer takes stock
/// rows in the same order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    lines: BTreeMap<Sku, u32>,
}

impl Draft {
    /// Validates and sums the requested lines.
    ///
    /// # Errors
    /// [`DraftError`]: no lines, too many, a malformed SKU, a quantity out of range.
    pub fn new<'a>(
        requested: impl IntoIterator<Item = (&'a str, u32)>,
    ) -> Result<Self, DraftError> {
        let mut lines = BTreeMap::new();
        for (sku, quantity) in requested {
            let sku = Sku::parse(sku)?;
            if quantity == 0 {
                return Err(DraftError::Quantity(sku));
            }
            let sum = lines
                .get(&sku)
                .copied()
                .unwrap_or(0_u32)
                .saturating_add(quantity);
            if sum > QUANTITY_MAX {
                return Err(DraftError::Quantity(sku));
            }
            lines.insert(sku, sum);
        }
        match lines.len() {
            0 => Err(DraftError::Empty),
            1..=LINES_MAX => Ok(Self { lines }),
            _ => Err(DraftError::Lines),
        }
    }

    /// The SKUs and their units, ordered by SKU.
    pub fn lines(&self) -> impl Iterator<Item = (&Sku, u32)> {
        self.lines.iter().map(|(sku, &quantity)| (sku, quantity))
    }
}

/// Why a request is not a draft. The client's fault; the same request fails again.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DraftError {
    /// No line at all.
    #[error("an order needs at least one line")]
    Empty,
    /// More than [`LINES_MAX`] SKUs.
    #[error("an order has at most {LINES_MAX} different SKUs")]
    Lines,
    /// Zero units, or more than [`QUANTITY_MAX`] summed over the lines of one SKU.
    #[error("the quantity of SKU {0} must be 1 to {QUANTITY_MAX} in sum")]
    Quantity(Sku),
    /// Not a SKU.
    #[error(transparent)]
    Sku(#[from] SkuError),
}
