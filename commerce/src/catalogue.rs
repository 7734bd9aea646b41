//! Products: what can be ordered, at which unit price.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::money::{Currency, Money};
use crate::row;
use crate::store::sql::{Field, Param, Row, SqlError};

/// Longest SKU, in characters.
pub const SKU_LEN_MAX: usize = 64;

/// A stock keeping unit: 1 to [`SKU_LEN_MAX`] ASCII letters, digits, `-`, `_` or `.`.
///
/// The alphabet is safe in a URL path, in HTML and in a log line without escaping.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ToSchema)]
#[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,64}$", example = "1001")]
pub struct Sku(String);

impl Sku {
    /// Parses a SKU.
    ///
    /// # Errors
    /// [`SkuError`] when the text is empty, too long, or has another character.
    pub fn parse(text: &str) -> Result<Self, SkuError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if (1..=SKU_LEN_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(SkuError)
        }
    }

    /// The SKU as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Sku {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a SKU.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a SKU is 1 to {SKU_LEN_MAX} ASCII letters, digits, '-', '_' or '.'")]
pub struct SkuError;

impl Field for Sku {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::parse(&String::load(row)?).map_err(|_| SqlError::Column("a SKU"))
    }
}

row! {
    /// A product as shown to clients.
    pub struct Product in "product JOIN stock USING (sku)" {
        /// Its SKU.
        pub sku: Sku ["sku"],
        /// Its name.
        pub name: String ["name"],
        /// A paragraph about it.
        pub description: String ["description"],
        /// Price of one unit.
        pub price: Money ["price_minor", "currency"],
        /// Units available when it was read; only an order's answer is a promise.
        pub available: i64 ["available"],
    }
}

/// A product to add to the catalogue, with its opening stock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewProduct {
    /// Its SKU.
    pub sku: Sku,
    /// Its name.
    pub name: String,
    /// A paragraph about it.
    pub description: String,
    /// Price of one unit; must be positive.
    pub price: Money,
    /// Units in stock at first.
    pub initial: u32,
}

/// Units of every demonstration product at first: enough for a day of load.
const SEED_STOCK_UNITS: u32 = 100_000_000;

/// The fixed demonstration catalogue, ordered by SKU.
///
/// # Errors
/// [`SeedError`] if the embedded file is faulty, which a test rules out.
pub fn seed() -> Result<Vec<NewProduct>, SeedError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Row {
        sku: String,
        price_minor: i64,
        name: String,
        description: String,
    }
    let rows: Vec<Row> = serde_json::from_str(include_str!("catalogue/seed.json"))?;
    rows.into_iter()
        .map(|row| {
            Ok(NewProduct {
                sku: Sku::parse(&row.sku)?,
                name: row.name,
                description: row.description,
                price: Money::new(row.price_minor, Currency::CNY),
                initial: SEED_STOCK_UNITS,
            })
        })
        .collect()
}

/// The embedded catalogue is faulty: a build defect, never the user's fault.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// Not the expected JSON.
    #[error("the embedded catalogue: {0}")]
    Json(#[from] serde_json::Error),
    /// A malformed SKU.
    #[error("the embedded catalogue: {0}")]
    Sku(#[from] SkuError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_has_distinct_products_with_price_and_text() {
        let products = seed().unwrap();
        assert_eq!(products.len(), 49);
        assert!(
            products.windows(2).all(|pair| pair[0].sku < pair[1].sku),
            "sorted and distinct"
        );
        assert!(products.iter().all(|product| product.price.minor() > 0));
        assert!(
            products
                .iter()
                .all(|product| product.description.len() > 100)
        );
        assert_eq!(products[0].sku.as_str(), "1001");
    }

    #[test]
    fn skus_need_no_escaping_anywhere() {
        assert!(Sku::parse("A-1_b.9").is_ok());
        for wrong in ["", "a b", "a/b", "<b>", "é", &"x".repeat(SKU_LEN_MAX + 1)] {
            assert_eq!(Sku::parse(wrong), Err(SkuError), "{wrong}");
        }
    }
}
