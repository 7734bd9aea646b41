//! Orders, pure: what is asked for, what it costs, and why it can be refused.
//!
//! A [`Draft`] is the parsed request, one line per SKU. Prices turn it into [`Line`]s,
//! and an [`Order`] is what was committed. No clock and no storage here: identity, time
//! and prices are arguments.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::catalogue::{Sku, SkuError};
use crate::money::{Money, MoneyError};

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

/// Why a well-formed order was refused by the business.
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
    /// The prices cannot be summed.
    Total(TotalRefusal),
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
    /// from turning into a purchase. The others are faulty input, and never remembered.
    #[must_use]
    pub fn is_remembered(&self) -> bool {
        matches!(self, Self::InsufficientStock { .. })
    }
}

/// One line of an order with its price at the time of purchase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What was bought.
    pub sku: Sku,
    /// Units bought.
    pub quantity: u32,
    /// Price of one unit.
    pub unit_price: Money,
    /// `unit_price` times `quantity`.
    pub total: Money,
}

impl Line {
    /// Prices `quantity` units.
    ///
    /// # Errors
    /// [`Refusal::Total`] when the product does not fit.
    pub fn price(sku: Sku, quantity: u32, unit_price: Money) -> Result<Self, Refusal> {
        let total = unit_price.checked_mul(quantity).map_err(refuse_total)?;
        Ok(Self {
            sku,
            quantity,
            unit_price,
            total,
        })
    }
}

/// The sum over `lines`.
///
/// # Errors
/// [`Refusal::Total`] for no lines, two currencies or more than 64 bits.
pub fn total(lines: &[Line]) -> Result<Money, Refusal> {
    let mut totals = lines.iter().map(|line| line.total);
    let first = totals.next().ok_or(Refusal::Total(TotalRefusal::NoLines))?;
    totals
        .try_fold(first, Money::checked_add)
        .map_err(refuse_total)
}

fn refuse_total(error: MoneyError) -> Refusal {
    Refusal::Total(match error {
        MoneyError::Mixed(..) => TotalRefusal::MixedCurrencies,
        MoneyError::Overflow | MoneyError::Currency(_) | MoneyError::BasisPoints(_) => {
            TotalRefusal::Overflow
        }
    })
}

/// An order's identity: a version 7 UUID, so time-ordered with 74 random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrderId(Uuid);

impl OrderId {
    /// An identity for an order placed now.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// Parses the hyphenated form; `None` if it is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // Length first: the parser also takes braced and URN forms, which are other URLs.
        (text.len() == 36)
            .then(|| Uuid::try_parse(text).ok().map(Self))
            .flatten()
    }
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl Serialize for OrderId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where an order is in its life. Payment and cancellation will add states here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Stock is deducted; nothing was paid yet.
    Placed,
}

impl Status {
    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
        }
    }

    /// The state of that name, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        (name == Self::Placed.as_str()).then_some(Self::Placed)
    }
}

/// A committed order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Order {
    /// Its identity.
    pub id: OrderId,
    /// Its state.
    pub status: Status,
    /// Counts changes, from 1; the entity tag.
    pub version: i64,
    /// What was bought, ordered by SKU.
    pub lines: Vec<Line>,
    /// The sum of the line totals.
    pub total: Money,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

impl Order {
    /// The strong entity tag of this version.
    #[must_use]
    pub fn etag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::Currency;

    fn sku(text: &str) -> Sku {
        Sku::parse(text).unwrap()
    }

    #[test]
    fn duplicate_skus_are_summed_and_sorted() {
        let draft = Draft::new([("b", 2), ("a", 1), ("b", 3)]).unwrap();
        let lines: Vec<_> = draft.lines().collect();
        assert_eq!(lines, [(&sku("a"), 1), (&sku("b"), 5)]);
    }

    #[test]
    fn drafts_have_bounds() {
        assert_eq!(Draft::new([]), Err(DraftError::Empty));
        assert_eq!(Draft::new([("a", 0)]), Err(DraftError::Quantity(sku("a"))));
        assert!(Draft::new([("a", QUANTITY_MAX)]).is_ok());
        // The bound holds for the sum, even one that leaves 32 bits.
        let split = [("a", QUANTITY_MAX), ("a", 1)];
        assert_eq!(Draft::new(split), Err(DraftError::Quantity(sku("a"))));
        let huge = [("a", u32::MAX), ("a", u32::MAX)];
        assert_eq!(Draft::new(huge), Err(DraftError::Quantity(sku("a"))));
        let names: Vec<String> = (0..=LINES_MAX).map(|n| n.to_string()).collect();
        let many = || names.iter().map(|name| (name.as_str(), 1));
        assert_eq!(Draft::new(many()), Err(DraftError::Lines));
        assert!(Draft::new(many().skip(1)).is_ok());
    }

    #[test]
    fn totals_are_sums_of_unit_price_times_quantity() {
        let line = |name, quantity, minor| {
            Line::price(sku(name), quantity, Money::new(minor, Currency::CNY)).unwrap()
        };
        let lines = [line("a", 3, 1999), line("b", 1, 1)];
        assert_eq!(total(&lines), Ok(Money::new(5998, Currency::CNY)));
        assert_eq!(total(&[]), Err(Refusal::Total(TotalRefusal::NoLines)));
    }

    #[test]
    fn totals_refuse_two_currencies_and_overflow() {
        let euro = Currency::parse("EUR").unwrap();
        let one = |name, money| Line::price(sku(name), 1, money).unwrap();
        let mixed = [
            one("a", Money::new(1, Currency::CNY)),
            one("b", Money::new(1, euro)),
        ];
        assert_eq!(
            total(&mixed),
            Err(Refusal::Total(TotalRefusal::MixedCurrencies))
        );
        let most = Money::new(i64::MAX, Currency::CNY);
        assert_eq!(
            total(&[one("a", most), one("b", most)]),
            Err(Refusal::Total(TotalRefusal::Overflow))
        );
        assert_eq!(
            Line::price(sku("a"), 2, most),
            Err(Refusal::Total(TotalRefusal::Overflow))
        );
    }

    #[test]
    fn ids_rise_with_time_and_have_one_spelling() {
        let first = OrderId::generate();
        let second = OrderId::generate();
        assert!(first.to_string() < second.to_string());
        assert_eq!(OrderId::parse(&first.to_string()), Some(first));
        assert_eq!(OrderId::parse(&format!("{{{first}}}")), None);
        assert_eq!(OrderId::parse(&first.0.simple().to_string()), None);
    }
}
