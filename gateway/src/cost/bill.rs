//! What rating makes: rows that add up.

use serde::{Deserialize, Serialize};

use super::{
    book::Price,
    calendar::{Month, Period},
    exact::decimal,
    usage::{Account, Kind, Side, Way},
};
use crate::money::Nanos;

/// Which part of a price a row is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Within the free allowance.
    Free,
    /// In this tier, from 1.
    Tier(usize),
    /// A further price on bytes that another row has.
    Adder(String),
    /// A fee for a day.
    Fixed,
    /// Bytes of a SKU that bills bandwidth or the other direction: counted here, billed there.
    Measured,
    /// Bytes that no SKU prices.
    Unpriced,
}

impl Part {
    /// The end of a price's id.
    #[must_use]
    pub fn word(&self) -> String {
        match self {
            Self::Free => "free".into(),
            Self::Tier(number) => format!("tier-{number}"),
            Self::Adder(id) => format!("adder-{id}"),
            Self::Fixed => "fixed".into(),
            Self::Measured => "measured".into(),
            Self::Unpriced => "unpriced".into(),
        }
    }
}

/// One row of a bill.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Charge {
    /// When; a day of the book's zone, or the part of a month a percentile was taken over.
    pub period: Period,
    /// The SKU's id; empty when there is none.
    pub sku: String,
    /// Which part of its price.
    pub part: Part,
    /// Whose.
    pub account: Account,
    /// After the quantity, such as `GiB`.
    pub unit: String,
    /// The priced quantity is `quantity / divisor` units, exactly.
    #[serde(with = "text")]
    pub quantity: i128,
    /// See `quantity`.
    #[serde(with = "text")]
    pub divisor: i128,
    /// Numerator of the unit price.
    #[serde(with = "text")]
    pub price: i128,
    /// Decimals of the unit price's numerator.
    pub price_decimals: u32,
    /// Bytes on the wire. Each byte is in one row only: zero in adders and fees.
    #[serde(with = "text")]
    pub wire_bytes: i128,
    /// The row's share of its pool, in nanos. The shares add up to the pool.
    #[serde(with = "text")]
    pub cost: i128,
    /// How the share was found.
    pub method: String,
    /// Something in it is an estimate: the split, or a gap in the readings.
    pub estimated: bool,
}

impl Charge {
    /// What the row costs.
    #[must_use]
    pub fn cost(&self) -> Nanos {
        Nanos(self.cost)
    }

    /// The priced quantity with every digit.
    #[must_use]
    pub fn quantity(&self) -> String {
        decimal(self.quantity, self.divisor)
    }

    /// The unit price with every digit.
    #[must_use]
    pub fn unit_price(&self) -> String {
        decimal(self.price, 10_i128.pow(self.price_decimals))
    }

    /// Unit price x quantity with every digit; None when it does not fit 128 bits.
    #[must_use]
    pub fn list_cost(&self) -> Option<String> {
        let product = self.price.checked_mul(self.quantity)?;
        let divisor = 10_i128.pow(self.price_decimals).checked_mul(self.divisor)?;
        Some(decimal(product, divisor))
    }

    /// What makes it the same row in another rating of the same month.
    #[must_use]
    pub fn identity(&self) -> impl Ord + Clone + use<> {
        (
            self.period,
            self.sku.clone(),
            self.part.clone(),
            self.account.clone(),
            self.unit.clone(),
            (self.divisor, self.price, self.price_decimals),
        )
    }
}

/// What one price of one month comes to, before it is shared out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The SKU's id.
    pub sku: String,
    /// Which part of its price.
    pub part: Part,
    /// The price.
    pub price: Price,
    /// Numerator of the quantity.
    pub quantity: i128,
    /// Its divisor.
    pub divisor: i128,
    /// Rounded once.
    pub cost: Nanos,
}

/// What made a bill: the same hashes make the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Of the price book.
    pub book: String,
    /// Of the class list.
    pub classes: String,
    /// Of the usage.
    pub usage: String,
}

/// A month, priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bill {
    /// Which.
    pub month: Month,
    /// The same in Unix seconds.
    pub period: Period,
    /// Rows in a fixed order.
    pub charges: Vec<Charge>,
    /// The pools that they share out.
    pub pools: Vec<Pool>,
    /// What it was made from.
    pub provenance: Provenance,
}

impl Bill {
    /// The bill with a row for unattributed bytes and one for overhead also where there are none:
    /// a missing row could be a forgotten one.
    #[must_use]
    pub fn with_standing_rows(mut self) -> Self {
        let period = Period {
            start: self.period.start,
            end: (self.period.start + 86_400).min(self.period.end),
        };
        for kind in [Kind::Overhead, Kind::Foreign] {
            let side = if kind == Kind::Overhead {
                Side::Client
            } else {
                Side::None
            };
            if self.charges.iter().any(|row| row.account.kind == kind) {
                continue;
            }
            self.charges.push(Charge {
                period,
                sku: String::new(),
                part: Part::Unpriced,
                account: Account {
                    interface: String::new(),
                    side,
                    way: Way::Tx,
                    class: String::new(),
                    kind,
                    endpoint: String::new(),
                    route: String::new(),
                    service: String::new(),
                    tenant: String::new(),
                    estimated: false,
                },
                unit: "B".into(),
                quantity: 0,
                divisor: 1,
                price: 0,
                price_decimals: 9,
                wire_bytes: 0,
                cost: 0,
                method: String::new(),
                estimated: false,
            });
        }
        self.charges.sort();
        self
    }
}

/// Numbers as text: other readers of JSON round beyond 2^53.
pub(super) mod text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(value: &i128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&value.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i128, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}
