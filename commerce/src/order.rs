//! Orders, pure: what is asked for, what it costs, and why it can be refused.
//!
//! A [`Draft`] is the parsed request, one line per SKU. Prices turn it into [`Line`]s,
//! and an [`Order`] is what was committed: one definition for the row, the JSON and the
//! OpenAPI schema. No clock and no statement here: identity, time and prices are arguments.
//!
//! ```text
//! placed ──pay──► paid ──refund a part──► partially_refunded ──refund the rest──► refunded
//!   ├──cancel──► cancelled      └──refund all──────────────────────────────────────┘
//!   └──expire──► expired
//! ```

mod draft;
mod refusal;
mod status;

use std::fmt;

use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::catalogue::Sku;
use crate::money::{Money, MoneyError};
use crate::row;
use crate::store::sql::{Field, Param, Row, SqlError};

pub use draft::{Draft, DraftError, LINES_MAX, QUANTITY_MAX};
pub use refusal::{Refusal, TotalRefusal};
pub use status::{Action, Status};

row! {
    /// One line of an order with its price at the time of purchase.
    pub struct Line in "order_line" {
        /// Whose line it is.
        #[serde(skip)]
        pub order_id: OrderId ["order_id"],
        /// What was bought.
        pub sku: Sku ["sku"],
        /// Units bought.
        pub quantity: u32 ["quantity"],
        /// Price of one unit.
        pub unit_price: Money ["unit_price_minor", "currency"],
        /// `unit_price` times `quantity`.
        pub total: Money ["total_minor", "currency"],
        /// The part of the order's discounts that this line carries; a refund reverses it.
        pub allocated_discount: Money ["allocated_discount_minor", "currency"],
    }
}

impl Line {
    /// Prices `quantity` units, without a discount.
    ///
    /// # Errors
    /// [`Refusal::Total`] when the product does not fit.
    pub fn price(
        order_id: OrderId,
        sku: Sku,
        quantity: u32,
        unit_price: Money,
    ) -> Result<Self, Refusal> {
        let total = unit_price.checked_mul(quantity).map_err(refuse_total)?;
        Ok(Self {
            order_id,
            sku,
            quantity,
            unit_price,
            total,
            allocated_discount: total.zero(),
        })
    }

    /// What is paid for the first `units` of the line: their price minus their share of the
    /// discount, rounded so that the whole line is exact and every part is a difference of
    /// two of these. `units` above the quantity count as the quantity.
    ///
    /// # Errors
    /// [`MoneyError::Overflow`] beyond 64 bits.
    pub fn payable(&self, units: u32) -> Result<Money, MoneyError> {
        let units = units.min(self.quantity);
        let gross = self.unit_price.checked_mul(units)?;
        // i128: a discount of 63 bits times a quantity of 32.
        let share = i128::from(self.allocated_discount.minor())
            .checked_mul(i128::from(units))
            .and_then(|product| product.checked_div(i128::from(self.quantity)))
            .and_then(|share| i64::try_from(share).ok())
            .ok_or(MoneyError::Overflow)?;
        gross.checked_sub(Money::new(share, gross.currency()))
    }
}

/// What `lines` cost together, discounts taken off.
///
/// # Errors
/// [`Refusal::Total`] for no lines, two currencies or more than 64 bits.
pub fn total(lines: &[Line]) -> Result<Money, Refusal> {
    let first = lines
        .first()
        .ok_or(Refusal::Total(TotalRefusal::NoLines))?
        .total
        .zero();
    lines
        .iter()
        .try_fold(first, |sum, line| {
            sum.checked_add(line.total)?
                .checked_sub(line.allocated_discount)
        })
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, format = Uuid)]
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

    /// As a parameter of a statement.
    #[must_use]
    pub fn param(self) -> Param<'static> {
        Param::Uuid(self.0)
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

impl Field for OrderId {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(self.param());
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Uuid::load(row).map(Self)
    }
}

/// Lines are rows of their own table, and read apart.
impl Field for Vec<Line> {
    fn store<'a>(&'a self, _: &mut Vec<Param<'a>>) {}
    fn load(_: &mut Row) -> Result<Self, SqlError> {
        Ok(Self::new())
    }
}

row! {
    /// A committed order.
    pub struct Order in "orders" {
        /// Its identity.
        pub id: OrderId ["id"],
        /// Whose order it is.
        #[serde(skip)]
        pub principal: String ["principal"],
        /// Its state.
        pub status: Status ["status"],
        /// Counts changes, from 1; the entity tag.
        pub version: i64 ["version"],
        /// What was bought, ordered by SKU.
        pub lines: Vec<Line> [],
        /// The sum of the line totals, discounts taken off.
        pub total: Money ["total_minor", "currency"],
        /// What went back, or is on its way back.
        pub refunded: Money ["refunded_minor", "currency"],
        /// Milliseconds since the Unix epoch.
        pub created_at_ms: i64 ["created_at_ms"],
        /// When the reservation ends unless it is paid: milliseconds since the Unix epoch.
        pub expires_at_ms: i64 ["expires_at_ms"],
        /// The trace of the request that placed it.
        pub trace_id: String ["trace_id"],
    }
}

impl Order {
    /// The strong entity tag of this version.
    #[must_use]
    pub fn etag(&self) -> String {
        format!("\"{}\"", self.version)
    }

    /// Whether its reservation has ended at `now_ms`, whether or not that was recorded yet.
    #[must_use]
    pub fn is_overdue(&self, now_ms: i64) -> bool {
        self.status == Status::Placed && self.expires_at_ms <= now_ms
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
            let price = Money::new(minor, Currency::CNY);
            Line::price(OrderId::generate(), sku(name), quantity, price).unwrap()
        };
        let lines = [line("a", 3, 1999), line("b", 1, 1)];
        assert_eq!(total(&lines), Ok(Money::new(5998, Currency::CNY)));
        assert_eq!(total(&[]), Err(Refusal::Total(TotalRefusal::NoLines)));
    }

    #[test]
    fn totals_refuse_two_currencies_and_overflow() {
        let euro = Currency::parse("EUR").unwrap();
        let one = |name, money| Line::price(OrderId::generate(), sku(name), 1, money).unwrap();
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
            Line::price(OrderId::generate(), sku("a"), 2, most),
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

    #[test]
    fn only_the_drawn_arrows_exist() {
        use Action::{Cancel, Expire, Pay, RefundPart, RefundRest};
        let mut arrows = Vec::new();
        for from in Status::ALL {
            for action in [Pay, Cancel, Expire, RefundPart, RefundRest] {
                if let Some(to) = from.after(action) {
                    arrows.push((from.as_str(), to.as_str()));
                }
            }
            assert_eq!(Status::parse(from.as_str()), Some(from));
        }
        assert_eq!(
            arrows,
            [
                ("placed", "paid"),
                ("placed", "cancelled"),
                ("placed", "expired"),
                ("paid", "partially_refunded"),
                ("paid", "refunded"),
                ("partially_refunded", "partially_refunded"),
                ("partially_refunded", "refunded"),
            ]
        );
    }

    #[test]
    fn parts_of_a_discounted_line_sum_to_the_line() {
        let price = Money::new(1000, Currency::CNY);
        let mut line = Line::price(OrderId::generate(), sku("a"), 7, price).unwrap();
        line.allocated_discount = Money::new(100, Currency::CNY);
        let payable: Vec<i64> = (0..=7).map(|n| line.payable(n).unwrap().minor()).collect();
        assert_eq!((payable[0], payable[7]), (0, 6900));
        let parts: i64 = payable.windows(2).map(|pair| pair[1] - pair[0]).sum();
        assert_eq!(parts, 6900);
        assert_eq!(line.payable(8), line.payable(7));
    }
}
