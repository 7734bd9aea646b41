//! Splitting an amount without losing a minor unit, and giving it back the same way.

use crate::money::{Money, MoneyError};
use crate::mutant::Mutant;

/// Splits `amount` in proportion to `weights` by largest remainder: every share is the
/// exact proportion rounded down or up to a minor unit, and the shares sum to `amount`.
/// Equal remainders go to the earlier index, so callers sort for a stable outcome.
///
/// With no positive weight the shares are 0. Negative weights count as 0, and `amount` is
/// taken between 0 and the sum of the weights: no share exceeds its weight.
#[must_use]
pub fn allocate(amount: i64, weights: &[i64]) -> Vec<i64> {
    let weights: Vec<i128> = weights
        .iter()
        .map(|&weight| i128::from(weight.max(0)))
        .collect();
    let sum: i128 = weights.iter().sum();
    if sum == 0 {
        return vec![0; weights.len()];
    }
    if Mutant::FloatMoney.is_on() {
        return in_floats(amount, &weights, sum);
    }
    by_largest_remainder(amount, &weights, sum)
}

fn by_largest_remainder(amount: i64, weights: &[i128], sum: i128) -> Vec<i64> {
    let amount = i128::from(amount).clamp(0, sum);
    // 64-bit factors: the product fits 128 bits.
    let exact: Vec<i128> = weights.iter().map(|weight| amount * weight).collect();
    let mut shares: Vec<i128> = exact.iter().map(|exact| exact / sum).collect();
    let mut left = amount - shares.iter().sum::<i128>();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by_key(|&at| std::cmp::Reverse(exact[at] % sum));
    for at in by_remainder {
        if left == 0 {
            break;
        }
        shares[at] += 1;
        left -= 1;
    }
    // No share exceeds its weight, which came from 64 bits.
    shares
        .into_iter()
        .map(|share| i64::try_from(share).unwrap_or(i64::MAX))
        .collect()
}

/// The classic bug: shares that are rounded one by one do not sum to the amount.
#[allow(
    clippy::float_arithmetic,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a mutant"
)]
fn in_floats(amount: i64, weights: &[i128], sum: i128) -> Vec<i64> {
    let share = |weight: &i128| (amount as f64 * (*weight as f64 / sum as f64)).round() as i64;
    weights.iter().map(share).collect()
}

/// What `returned` units of a line give back, after `returned_before` of its `quantity`.
///
/// It is the difference of two cumulative shares of what was paid (`net`), so that however
/// the units are split over refunds, the refunds sum to `net` and to nothing else.
///
/// # Errors
/// [`MoneyError::Overflow`] when more units come back than were sold.
pub fn refund(
    net: Money,
    quantity: u32,
    returned_before: u32,
    returned: u32,
) -> Result<Money, MoneyError> {
    let after = returned_before
        .checked_add(returned)
        .filter(|after| *after <= quantity && quantity > 0)
        .ok_or(MoneyError::Overflow)?;
    let share = |units: u32| {
        let share = i128::from(net.minor()) * i128::from(units) / i128::from(quantity);
        i64::try_from(share).map_err(|_| MoneyError::Overflow)
    };
    let minor = share(after)?
        .checked_sub(share(returned_before)?)
        .ok_or(MoneyError::Overflow)?;
    Ok(Money::new(minor, net.currency()))
}
