//! Arithmetic that loses nothing: one rounding where a pool closes, shares that add up, decimals
//! with every digit.

use crate::money::Overflow;

/// `dividend / divisor`, rounded half to even. The one division of a pool.
///
/// # Panics
/// Never: a divisor that is not positive counts as 1, and the book's check refuses it before.
#[must_use]
pub fn divide_half_even(dividend: i128, divisor: i128) -> i128 {
    let divisor = divisor.max(1);
    // Euclidean: the remainder is never negative, so one rule serves both signs.
    let floor = dividend.div_euclid(divisor);
    let remainder = dividend.rem_euclid(divisor);
    // Not `remainder * 2`, which could overflow.
    let up = match remainder.cmp(&(divisor - remainder)) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => floor % 2 != 0,
        std::cmp::Ordering::Greater => true,
    };
    floor + i128::from(up)
}

/// Splits `total` by `weights`, largest remainder first: the shares add up to `total`, each is its
/// exact share rounded down or up. Equal remainders are served in the order given, so callers
/// sort by what does not depend on arrival.
///
/// Weights that are all zero leave everything with the first.
///
/// # Errors
/// A product does not fit 128 bits.
pub fn allocate(total: i128, weights: &[i128]) -> Result<Vec<i128>, Overflow> {
    let sum = weights
        .iter()
        .try_fold(0_i128, |sum, &weight| sum.checked_add(weight.max(0)))
        .ok_or(Overflow)?;
    if sum == 0 {
        let mut shares = vec![0; weights.len()];
        if let Some(first) = shares.first_mut() {
            *first = total;
        }
        return Ok(shares);
    }
    let mut shares = Vec::with_capacity(weights.len());
    let mut remainders = Vec::with_capacity(weights.len());
    let mut left = total;
    for (index, &weight) in weights.iter().enumerate() {
        let product = total.checked_mul(weight.max(0)).ok_or(Overflow)?;
        let share = product.div_euclid(sum);
        left -= share;
        shares.push(share);
        remainders.push((product.rem_euclid(sum), index));
    }
    // Stable: equal remainders stay in the order given.
    remainders.sort_by_key(|found| std::cmp::Reverse(found.0));
    for (_, index) in remainders {
        if left == 0 {
            break;
        }
        shares[index] += 1;
        left -= 1;
    }
    Ok(shares)
}

/// The exact decimal of a fraction whose divisor has no prime factors but 2 and 5, with at least
/// one decimal: `90000000.0`, `0.09`. [`is_finite`] says whether there is one.
#[must_use]
pub fn decimal(dividend: i128, divisor: i128) -> String {
    let divisor = divisor.max(1).unsigned_abs();
    let sign = if dividend < 0 { "-" } else { "" };
    let magnitude = dividend.unsigned_abs();
    let mut text = format!("{sign}{}.", magnitude / divisor);
    let mut remainder = magnitude % divisor;
    let mut digits = 0;
    // 2^63 x 5^27 x 10^18 at most: fewer decimals than this, or the fraction is endless.
    while remainder != 0 && digits < 128 {
        remainder *= 10;
        let digit = u8::try_from(remainder / divisor).unwrap_or(9);
        text.push(char::from(b'0' + digit));
        remainder %= divisor;
        digits += 1;
    }
    if digits == 0 {
        text.push('0');
    }
    text
}

/// Whether a fraction over this divisor is always a finite decimal.
#[must_use]
pub fn is_finite(divisor: u64) -> bool {
    let mut rest = divisor;
    for factor in [2, 5] {
        while rest != 0 && rest.is_multiple_of(factor) {
            rest /= factor;
        }
    }
    rest == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_go_to_the_even_side() {
        let rounded = |dividend| divide_half_even(dividend, 2);
        assert_eq!([1, 3, 5, -1, -3].map(rounded), [0, 2, 2, 0, -2]);
        assert_eq!(divide_half_even(i128::MAX, i128::MAX), 1);
        assert_eq!(divide_half_even(i128::MIN, 1), i128::MIN);
    }

    #[test]
    fn shares_add_up_and_ties_go_to_the_first() {
        assert_eq!(allocate(10, &[1, 1, 1]).unwrap(), [4, 3, 3]);
        assert_eq!(allocate(-10, &[1, 1, 1]).unwrap(), [-3, -3, -4]);
        assert_eq!(allocate(7, &[0, 0]).unwrap(), [7, 0]);
        assert_eq!(allocate(7, &[]).unwrap(), [0; 0]);
        assert_eq!(allocate(5, &[0, 9, -3]).unwrap(), [0, 5, 0]);
        assert_eq!(allocate(i128::MAX, &[2]), Err(Overflow));
    }

    #[test]
    fn decimals_have_every_digit() {
        assert_eq!(decimal(90_000_000, 1_000_000_000), "0.09");
        assert_eq!(decimal(90_000_000, 1), "90000000.0");
        assert_eq!(decimal(-3, 2), "-1.5");
        assert_eq!(decimal(1, 1 << 30), "0.000000000931322574615478515625");
    }

    #[test]
    fn finite_divisors_are_twos_and_fives() {
        assert!(
            [1, 1 << 30, 1_000_000_000, 1_024_000]
                .map(is_finite)
                .iter()
                .all(|yes| *yes)
        );
        assert!(![0, 3, 300, 7].map(is_finite).iter().any(|yes| *yes));
    }
}
