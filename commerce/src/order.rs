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

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::catalogue::{Sku, SkuError};
use crate::money::{Money, MoneyError};
use crate::row;
use crate::store::sql::{Field, Param, Row, SqlError};

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
