//! Money in whole billionths: no floats, one division, half to even.
//!
//! A [`Rate`] is a price per so many bytes. What a number of bytes costs is the exact product
//! `bytes x nanos` divided once by `unit_bytes`. Callers who add many small costs add the
//! undivided products ([`Rate::exact`]) and divide the sum ([`Rate::settle`]), so that a thousand
//! rounded fractions never differ from the rounded whole.
//!
//! Deliberately absent: conversion between currencies. Amounts carry no currency; one configuration
//! has one.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// Billionths in one unit of currency.
const NANOS_PER_UNIT: u128 = 1_000_000_000;
/// Decimals a billionth can carry.
const DECIMALS_MAX: usize = 9;

/// Why a text is not money; reads on from the text: `"1e3" is not a decimal number`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    /// Something else than digits with at most one point between them.
    #[error("is not a decimal number")]
    NotDecimal,
    /// A decimal finer than a billionth.
    #[error("has more than {DECIMALS_MAX} decimals")]
    TooManyDecimals,
    /// Beyond what the type holds.
    #[error("is too large")]
    TooLarge,
    /// Not three capital letters.
    #[error("is not a currency code of three capital letters")]
    Currency,
}

/// The product or sum does not fit 128 bits: the input is not a plausible count of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("amount of money overflows 128 bits")]
pub struct Overflow;

/// An ISO 4217 code such as `USD`; only its shape is checked.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Currency([u8; 3]);

impl FromStr for Currency {
    type Err = MoneyError;

    fn from_str(text: &str) -> Result<Self, MoneyError> {
        match text.as_bytes() {
            &[a, b, c] if [a, b, c].iter().all(u8::is_ascii_uppercase) => Ok(Self([a, b, c])),
            _ => Err(MoneyError::Currency),
        }
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|&letter| write!(f, "{}", char::from(letter)))
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Currency({self})")
    }
}

/// An amount in billionths of one currency unit. Negative amounts are corrections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub i128);

impl Nanos {
    /// The sum, or [`Overflow`].
    pub fn checked_add(self, other: Self) -> Result<Self, Overflow> {
        self.0.checked_add(other.0).map(Self).ok_or(Overflow)
    }
}

/// `12.00`, `0.0123`, `-0.000000001`: at least two decimals, no trailing zeros beyond them.
impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let text = format!("{sign}{}", Decimal(self.0.unsigned_abs()));
        f.pad(&text)
    }
}

impl FromStr for Nanos {
    type Err = MoneyError;

    fn from_str(text: &str) -> Result<Self, MoneyError> {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let magnitude = parse_nanos(digits)?;
        let amount = if negative {
            0_i128.checked_sub_unsigned(magnitude)
        } else {
            0_i128.checked_add_unsigned(magnitude)
        };
        amount.map(Self).ok_or(MoneyError::TooLarge)
    }
}

/// A price in billionths, never negative. At most `i64::MAX`, so that its product with any `u64`
/// count of bytes fits an `i128`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitPrice(u64);

impl UnitPrice {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    const MAX: u64 = i64::MAX.unsigned_abs();

    /// The price in billionths of one currency unit.
    pub fn nanos(self) -> u64 {
        self.0
    }
}

impl FromStr for UnitPrice {
    type Err = MoneyError;

    fn from_str(text: &str) -> Result<Self, MoneyError> {
        match u64::try_from(parse_nanos(text)?) {
            Ok(nanos) if nanos <= Self::MAX => Ok(Self(nanos)),
            _ => Err(MoneyError::TooLarge),
        }
    }
}

impl fmt::Display for UnitPrice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Decimal(u128::from(self.0)).fmt(f)
    }
}

/// A price per `unit_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    /// What `unit_bytes` cost.
    pub price: UnitPrice,
    /// How many bytes `price` buys.
    pub unit_bytes: NonZeroU64,
}

impl Rate {
    /// What these bytes cost, rounded half to even. Signed counts are for corrections.
    pub fn cost(&self, bytes: impl Into<i128>) -> Result<Nanos, Overflow> {
        let product = bytes.into().checked_mul(i128::from(self.price.nanos()));
        product.map(|exact| self.settle(exact)).ok_or(Overflow)
    }

    /// The undivided product in nano-bytes: sum these, then [`settle`](Self::settle) once.
    /// It cannot overflow: `u64` x at most `i64::MAX` stays below `i128::MAX`.
    pub fn exact(&self, bytes: u64) -> i128 {
        i128::from(bytes) * i128::from(self.price.nanos())
    }

    /// Divides a sum of [`exact`](Self::exact) products, rounding half to even.
    pub fn settle(&self, exact: i128) -> Nanos {
        let unit = i128::from(self.unit_bytes.get());
        // Euclidean: the remainder is never negative, so one rule serves both signs.
        let floor = exact.div_euclid(unit);
        let remainder = exact.rem_euclid(unit);
        let up = match (remainder * 2).cmp(&unit) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => floor % 2 != 0,
            std::cmp::Ordering::Greater => true,
        };
        Nanos(floor + i128::from(up))
    }
}

/// Prints billionths as a decimal of two to nine places.
struct Decimal(u128);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fraction = format!("{:09}", self.0 % NANOS_PER_UNIT);
        let kept = fraction.trim_end_matches('0').len().max(2);
        write!(f, "{}.{}", self.0 / NANOS_PER_UNIT, &fraction[..kept])
    }
}

fn parse_nanos(text: &str) -> Result<u128, MoneyError> {
    let (whole, fraction) = match text.split_once('.') {
        Some((_, "")) => return Err(MoneyError::NotDecimal),
        Some(parts) => parts,
        None => (text, ""),
    };
    let digits_only = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits_only(whole) || !digits_only(fraction) {
        return Err(MoneyError::NotDecimal);
    }
    if fraction.len() > DECIMALS_MAX {
        return Err(MoneyError::TooManyDecimals);
    }
    // Digits only, so the one remaining reason to fail is size.
    let whole: u128 = whole.parse().map_err(|_| MoneyError::TooLarge)?;
    let fraction: u128 = format!("{fraction:0<DECIMALS_MAX$}")
        .parse()
        .map_err(|_| MoneyError::TooLarge)?;
    whole
        .checked_mul(NANOS_PER_UNIT)
        .and_then(|nanos| nanos.checked_add(fraction))
        .ok_or(MoneyError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(price: &str, unit_bytes: u64) -> Rate {
        Rate {
            price: price.parse().unwrap(),
            unit_bytes: NonZeroU64::new(unit_bytes).unwrap(),
        }
    }

    #[test]
    fn ten_gigabytes_at_eighty_cents_cost_eight() {
        let cost = rate("0.80", 1_000_000_000).cost(10_000_000_000_u64);
        assert_eq!(cost.unwrap().to_string(), "8.00");
    }

    #[test]
    fn one_gibibyte_costs_the_price() {
        let cost = rate("0.09", 1 << 30).cost(1_u64 << 30).unwrap();
        assert_eq!(cost, Nanos(90_000_000));
        assert_eq!(cost.to_string(), "0.09");
    }

    #[test]
    fn halves_round_to_even_on_both_sides_of_zero() {
        let per_two = rate("0.000000001", 2);
        let settled = |exact: i128| per_two.settle(exact).0;
        assert_eq!(settled(1), 0);
        assert_eq!(settled(3), 2);
        assert_eq!(settled(5), 2);
        assert_eq!(settled(-1), 0);
        assert_eq!(settled(-3), -2);
        assert_eq!(settled(-5), -2);
        let per_three = rate("0.000000001", 3);
        assert_eq!(per_three.settle(1), Nanos(0));
        assert_eq!(per_three.settle(2), Nanos(1));
        assert_eq!(per_three.settle(-2), Nanos(-1));
    }

    #[test]
    fn summing_before_dividing_loses_nothing() {
        let rate = rate("0.09", 1 << 30);
        let sum: i128 = (0..1_000).map(|_| rate.exact(1_500)).sum();
        assert_eq!(rate.settle(sum), rate.cost(1_500_000).unwrap());
    }

    #[test]
    fn overflow_is_an_error() {
        let dearest = rate("9223372036.854775807", 1);
        assert_eq!(dearest.cost(i128::MAX), Err(Overflow));
        assert_eq!(Nanos(i128::MAX).checked_add(Nanos(1)), Err(Overflow));
        assert!(dearest.exact(u64::MAX) > 0);
        assert_eq!(
            dearest.cost(u64::MAX).unwrap().0,
            dearest.exact(u64::MAX),
            "the largest count at the largest price still fits"
        );
        assert_eq!(
            rate("0.000000001", u64::MAX).settle(i128::MIN).0,
            -9_223_372_036_854_775_809
        );
    }

    #[test]
    fn amounts_print_two_to_nine_places() {
        for (nanos, text) in [
            (0, "0.00"),
            (12_000_000_000, "12.00"),
            (12_300_000, "0.0123"),
            (1, "0.000000001"),
            (-1_500_000_000, "-1.50"),
        ] {
            assert_eq!(Nanos(nanos).to_string(), text);
        }
        assert_eq!(format!("{:>6}", Nanos(0)), "  0.00");
    }

    #[test]
    fn what_is_printed_parses_back() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for shift in 0..64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let amount = Nanos(i128::from(state >> shift) - i128::from(state >> 1));
            assert_eq!(amount.to_string().parse(), Ok(amount));
            let price = UnitPrice((state >> shift) & UnitPrice::MAX);
            assert_eq!(price.to_string().parse(), Ok(price));
        }
        for amount in [Nanos(i128::MAX), Nanos(i128::MIN)] {
            assert_eq!(amount.to_string().parse(), Ok(amount));
        }
    }

    #[test]
    fn bad_decimals_say_why() {
        for (text, why) in [
            ("", MoneyError::NotDecimal),
            (".5", MoneyError::NotDecimal),
            ("5.", MoneyError::NotDecimal),
            ("1e3", MoneyError::NotDecimal),
            ("-1", MoneyError::NotDecimal),
            ("+1", MoneyError::NotDecimal),
            ("1,5", MoneyError::NotDecimal),
            ("1.2.3", MoneyError::NotDecimal),
            ("\u{664}", MoneyError::NotDecimal),
            ("0.0000000001", MoneyError::TooManyDecimals),
            ("9223372036.854775808", MoneyError::TooLarge),
            (&"9".repeat(60), MoneyError::TooLarge),
        ] {
            assert_eq!(text.parse::<UnitPrice>(), Err(why), "{text}");
        }
    }

    #[test]
    fn currencies_are_three_capital_letters() {
        assert_eq!("USD".parse::<Currency>().unwrap().to_string(), "USD");
        for text in ["usd", "US", "USDT", "U5D", ""] {
            assert_eq!(text.parse::<Currency>(), Err(MoneyError::Currency));
        }
    }
}
