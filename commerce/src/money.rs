//! Money is an integer of minor units and a currency; nothing else is money.
//!
//! There are no `+` and `*` operators: every operation is checked and says how it failed.
//! A float cannot become money, which the compiler proves:
//!
//! ```compile_fail
//! use commerce::money::{Currency, Money};
//! let price = Money::new(19.99, Currency::CNY);
//! ```
//!
//! Neither can money be added without a check:
//!
//! ```compile_fail
//! use commerce::money::{Currency, Money};
//! let sum = Money::new(1, Currency::CNY) + Money::new(2, Currency::CNY);
//! ```

use std::fmt;

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use crate::store::sql::{Field, Param, Row, SqlError};

/// An ISO 4217 alphabetic code: three capital ASCII letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, pattern = "^[A-Z]{3}$", example = "CNY")]
pub struct Currency([u8; 3]);

impl Currency {
    /// The currency of the demonstration catalogue.
    pub const CNY: Self = Self(*b"CNY");

    /// Parses a code such as `CNY`.
    ///
    /// # Errors
    /// [`MoneyError::Currency`] unless the text is three capital ASCII letters.
    pub fn parse(code: &str) -> Result<Self, MoneyError> {
        match <[u8; 3]>::try_from(code.as_bytes()) {
            Ok(letters) if letters.iter().all(u8::is_ascii_uppercase) => Ok(Self(letters)),
            _ => Err(MoneyError::Currency(code.to_owned())),
        }
    }

    /// The code.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Always ASCII: `parse` and `CNY` make nothing else.
        std::str::from_utf8(&self.0).unwrap_or("???")
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An amount in minor units (cents, fen) of one currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Money {
    /// The amount in minor units.
    minor: i64,
    /// ISO 4217 code.
    currency: Currency,
}

/// Two columns: minor units and currency.
impl Field for Money {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(self.minor));
        params.push(Param::Text(self.currency.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        let minor = i64::load(row)?;
        let currency = Currency::parse(&String::load(row)?);
        Ok(Self::new(
            minor,
            currency.map_err(|_| SqlError::Column("a currency"))?,
        ))
    }
}

impl Money {
    /// `minor` units of `currency`.
    #[must_use]
    pub const fn new(minor: i64, currency: Currency) -> Self {
        Self { minor, currency }
    }

    /// The amount in minor units.
    #[must_use]
    pub const fn minor(self) -> i64 {
        self.minor
    }

    /// The currency.
    #[must_use]
    pub const fn currency(self) -> Currency {
        self.currency
    }

    /// The sum of two amounts.
    ///
    /// # Errors
    /// [`MoneyError::Mixed`] for two currencies, [`MoneyError::Overflow`] beyond 64 bits.
    pub fn checked_add(self, other: Self) -> Result<Self, MoneyError> {
        if self.currency != other.currency {
            return Err(MoneyError::Mixed(self.currency, other.currency));
        }
        let minor = self
            .minor
            .checked_add(other.minor)
            .ok_or(MoneyError::Overflow)?;
        Ok(Self { minor, ..self })
    }

    /// What is left after taking `other` away; may be negative.
    ///
    /// # Errors
    /// [`MoneyError::Mixed`] for two currencies, [`MoneyError::Overflow`] beyond 64 bits.
    pub fn checked_sub(self, other: Self) -> Result<Self, MoneyError> {
        if self.currency != other.currency {
            return Err(MoneyError::Mixed(self.currency, other.currency));
        }
        let minor = self
            .minor
            .checked_sub(other.minor)
            .ok_or(MoneyError::Overflow)?;
        Ok(Self { minor, ..self })
    }

    /// Nothing, in the same currency.
    #[must_use]
    pub const fn zero(self) -> Self {
        Self { minor: 0, ..self }
    }

    /// The price of `quantity` units at this unit price.
    ///
    /// # Errors
    /// [`MoneyError::Overflow`] beyond 64 bits.
    pub fn checked_mul(self, quantity: u32) -> Result<Self, MoneyError> {
        let minor = self
            .minor
            .checked_mul(i64::from(quantity))
            .ok_or(MoneyError::Overflow)?;
        Ok(Self { minor, ..self })
    }
}

/// A share in hundredths of a percent, 0 to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BasisPoints(u16);

impl BasisPoints {
    /// The whole.
    pub const WHOLE: u16 = 10_000;

    /// `points` hundredths of a percent.
    ///
    /// # Errors
    /// [`MoneyError::BasisPoints`] beyond 10,000.
    pub const fn new(points: u16) -> Result<Self, MoneyError> {
        if points <= Self::WHOLE {
            Ok(Self(points))
        } else {
            Err(MoneyError::BasisPoints(points))
        }
    }

    /// The number of hundredths of a percent.
    #[must_use]
    pub const fn points(self) -> u16 {
        self.0
    }

    /// This share of `amount`, rounded towards zero to a minor unit.
    #[must_use]
    pub fn of(self, amount: Money) -> Money {
        let share = i128::from(amount.minor) * i128::from(self.0) / i128::from(Self::WHOLE);
        // At most the amount itself, so it fits.
        let minor = i64::try_from(share).unwrap_or(amount.minor);
        Money { minor, ..amount }
    }
}

/// Why an operation on money has no result.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MoneyError {
    /// The amount does not fit 64 bits.
    #[error("the amount does not fit 64 bits of minor units")]
    Overflow,
    /// Two currencies cannot be added.
    #[error("{0} and {1} cannot be added")]
    Mixed(Currency, Currency),
    /// Not a currency code.
    #[error("{0:?} is not three capital letters")]
    Currency(String),
    /// More than the whole.
    #[error("{0} basis points are more than 10000, the whole")]
    BasisPoints(u16),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serialises_as_minor_units_and_code() {
        let json = serde_json::to_string(&Money::new(1999, Currency::CNY)).unwrap();
        assert_eq!(json, r#"{"minor":1999,"currency":"CNY"}"#);
    }

    #[test]
    fn sums_and_products_are_exact() {
        let price = Money::new(1999, Currency::CNY);
        assert_eq!(price.checked_mul(3).unwrap().minor(), 5997);
        assert_eq!(
            price
                .checked_add(Money::new(1, Currency::CNY))
                .unwrap()
                .minor(),
            2000
        );
    }

    #[test]
    fn overflow_is_an_error_and_never_wraps() {
        let most = Money::new(i64::MAX, Currency::CNY);
        assert_eq!(
            most.checked_add(Money::new(1, Currency::CNY)),
            Err(MoneyError::Overflow)
        );
        assert_eq!(most.checked_mul(2), Err(MoneyError::Overflow));
    }

    #[test]
    fn currencies_do_not_mix() {
        let euro = Currency::parse("EUR").unwrap();
        assert_eq!(
            Money::new(1, Currency::CNY).checked_add(Money::new(1, euro)),
            Err(MoneyError::Mixed(Currency::CNY, euro))
        );
    }

    #[test]
    fn a_share_rounds_towards_zero_and_never_exceeds_the_whole() {
        let share = |points, minor| {
            let points = BasisPoints::new(points).unwrap();
            points.of(Money::new(minor, Currency::CNY)).minor()
        };
        assert_eq!(share(1_500, 1_999), 299); // 299.85
        assert_eq!(share(10_000, i64::MAX), i64::MAX);
        assert_eq!(share(0, 1_999), 0);
        assert_eq!(
            BasisPoints::new(10_001),
            Err(MoneyError::BasisPoints(10_001))
        );
    }

    #[test]
    fn only_three_capital_letters_are_a_code() {
        for wrong in ["", "cny", "CN", "CNYX", "C1Y", "元"] {
            assert_eq!(
                Currency::parse(wrong),
                Err(MoneyError::Currency(wrong.to_owned()))
            );
        }
    }
}
