//! The statistics of a comparison, as in gbstats 0.8.0 (a test compares the two).
//!
//! Relative lift Δ = (μT − μC) ∕ μC, whose variance by the delta method is
//! s² = σT² ∕ (μC² nT) + σC² μT² ∕ (μC⁴ nC). With a prior N(m₀, v₀) the posterior is the
//! precision-weighted mean; P(win) = Φ(m ∕ s), and the expected loss of shipping is
//! s φ(m ∕ s) − m Φ(−m ∕ s).
//!
//! The bound that may be looked at any number of times is the confidence sequence of
//! Waudby-Smith et al. 2023, eq. 9 and 161.
#![allow(
    clippy::float_arithmetic,
    reason = "probabilities are real numbers; counts come in as integers, and money never does"
)]

use statrs::distribution::{ChiSquared, ContinuousCDF as _};
use statrs::function::erf::{erfc, erfc_inv};

use super::Metric;

/// What was counted in one variant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Customers exposed.
    pub units: u64,
    /// Sum of their outcomes: conversions, or minor units.
    pub sum: u64,
    /// Sum of the squares of their outcomes.
    pub sum_of_squares: u128,
}

impl Sample {
    /// A sample of outcomes that are 0 or 1.
    #[must_use]
    pub const fn of_conversions(units: u64, converted: u64) -> Self {
        Self {
            units,
            sum: converted,
            sum_of_squares: converted as u128,
        }
    }

    /// The mean outcome; 0 without customers.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.units == 0 {
            return 0.0;
        }
        real(self.sum.into()) / real(self.units.into())
    }

    /// The variance of one outcome, as gbstats takes it: p(1 − p) of a proportion, the
    /// unbiased estimate otherwise.
    fn variance(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Conversion => self.mean() * (1.0 - self.mean()),
            Metric::Revenue if self.units > 1 => {
                let (units, sum) = (u128::from(self.units), u128::from(self.sum));
                // In integers as far as they reach: the difference of two large squares is
                // what a float would lose.
                let exact = units
                    .checked_mul(self.sum_of_squares)
                    .zip(sum.checked_mul(sum))
                    .and_then(|(squares, square)| squares.checked_sub(square));
                let scatter = exact.map_or_else(
                    || real(units) * real(self.sum_of_squares) - real(sum) * real(sum),
                    real,
                );
                scatter / (real(units) * real(units - 1))
            }
            Metric::Revenue => 0.0,
        }
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "53 bits of a count are more than its own noise leaves"
)]
fn real(count: u128) -> f64 {
    count as f64
}

/// The belief about the relative lift before any data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prior {
    /// Expected lift.
    pub mean: f64,
    /// Its variance.
    pub variance: f64,
}

impl Prior {
    /// N(0, 0.3²): lifts beyond ±60 % are not expected.
    pub const DEFAULT: Self = Self {
        mean: 0.0,
        variance: 0.09,
    };
}

/// What is known of the relative lift.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// Its mean.
    pub mean: f64,
    /// Its standard deviation.
    pub deviation: f64,
    /// The probability that the treatment is better.
    pub win: f64,
    /// Expected relative loss of shipping the treatment.
    pub risk_of_shipping: f64,
    /// Expected relative loss of keeping the control.
    pub risk_of_keeping: f64,
    /// The central 95 %.
    pub interval: (f64, f64),
}

/// Relative lift and its variance; `None` without a baseline or without scatter.
fn lift(control: &Sample, treatment: &Sample, metric: Metric) -> Option<(f64, f64)> {
    if control.units == 0 || treatment.units == 0 || control.sum == 0 {
        return None;
    }
    let (of_control, of_treatment) = (control.variance(metric), treatment.variance(metric));
    if of_control <= 0.0 || of_treatment <= 0.0 {
        return None;
    }
    let (base, mean) = (control.mean(), treatment.mean());
    let variance = of_treatment / (base.powi(2) * real(treatment.units.into()))
        + of_control * mean.powi(2) / (base.powi(4) * real(control.units.into()));
    Some(((mean - base) / base, variance))
}

/// The posterior of the relative lift; `None` when the data say nothing yet: no customers,
/// no baseline, or no scatter.
#[must_use]
pub fn posterior(
    control: &Sample,
    treatment: &Sample,
    metric: Metric,
    prior: Option<Prior>,
) -> Option<Posterior> {
    let (seen, variance) = lift(control, treatment, metric)?;
    let (prior_mean, prior_precision) =
        prior.map_or((0.0, 0.0), |prior| (prior.mean, 1.0 / prior.variance));
    let precision = 1.0 / variance + prior_precision;
    let mean = (seen / variance + prior_mean * prior_precision) / precision;
    let deviation = (1.0 / precision).sqrt();
    let z = mean / deviation;
    let half_width = normal_quantile(0.975) * deviation;
    Some(Posterior {
        mean,
        deviation,
        win: normal_cdf(z),
        risk_of_shipping: deviation * normal_density(z) - mean * normal_cdf(-z),
        risk_of_keeping: deviation * normal_density(z) + mean * normal_cdf(z),
        interval: (mean - half_width, mean + half_width),
    })
}

/// A confidence interval of the relative lift that holds at all sample sizes at once, so
/// that it may be looked at any number of times. It is tightest at `tuned_for` customers.
#[must_use]
pub fn sequential_interval(
    control: &Sample,
    treatment: &Sample,
    metric: Metric,
    alpha: f64,
    tuned_for: u64,
) -> Option<(f64, f64)> {
    let (seen, variance) = lift(control, treatment, metric)?;
    let customers = real(u128::from(control.units) + u128::from(treatment.units));
    let rho_squared =
        (-2.0 * alpha.ln() + (-2.0 * alpha.ln() + 1.0).ln()) / real(u128::from(tuned_for.max(1)));
    let scale = customers * rho_squared + 1.0;
    let half_width = (variance * customers).sqrt()
        * (2.0 * scale * (scale.sqrt() / alpha).ln() / (customers.powi(2) * rho_squared)).sqrt();
    Some((seen - half_width, seen + half_width))
}

/// The probability of a split at least this uneven if customers are dealt by `weights`.
/// A tiny one means that the assignment or the logging is broken, and no result is worth
/// anything. 1 without customers.
#[must_use]
pub fn sample_ratio_p(units: &[u64], weights: &[u16]) -> f64 {
    let all: u128 = units.iter().map(|&units| u128::from(units)).sum();
    let whole: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
    let Ok(distribution) = ChiSquared::new(real(units.len().saturating_sub(1) as u128)) else {
        return 1.0;
    };
    if all == 0 {
        return 1.0;
    }
    let statistic: f64 = units
        .iter()
        .zip(weights)
        .filter(|(_, weight)| **weight > 0)
        .map(|(&units, &weight)| {
            let expected = real(u128::from(weight)) / real(whole) * real(all);
            (real(units.into()) - expected).powi(2) / expected
        })
        .sum();
    distribution.sf(statistic)
}

fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z / std::f64::consts::SQRT_2)
}

fn normal_density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

fn normal_quantile(p: f64) -> f64 {
    -std::f64::consts::SQRT_2 * erfc_inv(2.0 * p)
}

/// Basis points as a fraction.
pub(super) fn fraction(points: u16) -> f64 {
    f64::from(points) / 10_000.0
}

/// `points` split evenly over `among`, subtracted from one: the bar that keeps the chance
/// of one false winner among several treatments what it is for one.
pub(super) fn bar(win_points: u16, among: usize) -> f64 {
    let slack = 1.0 - fraction(win_points);
    1.0 - slack / real(among.max(1) as u128)
}

/// Minus a fraction.
pub(super) fn negative(points: u16) -> f64 {
    -fraction(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(left: f64, right: f64) {
        assert!((left - right).abs() < 1e-9, "{left} is not {right}");
    }

    #[test]
    fn equal_samples_are_even_odds() {
        let sample = Sample::of_conversions(1_000, 100);
        let even = posterior(&sample, &sample, Metric::Conversion, Some(Prior::DEFAULT)).unwrap();
        near(even.mean, 0.0);
        near(even.win, 0.5);
        near(even.risk_of_shipping, even.risk_of_keeping);
    }

    #[test]
    fn the_prior_pulls_a_small_sample_towards_no_effect() {
        let (control, treatment) = (
            Sample::of_conversions(100, 10),
            Sample::of_conversions(100, 15),
        );
        let lift = |prior| posterior(&control, &treatment, Metric::Conversion, prior).unwrap();
        near(lift(None).mean, 0.5);
        assert!(lift(Some(Prior::DEFAULT)).mean < 0.25);
    }

    #[test]
    fn nothing_is_said_without_customers_baseline_or_scatter() {
        let some = Sample::of_conversions(10, 5);
        for other in [
            Sample::default(),
            Sample::of_conversions(10, 0),
            Sample::of_conversions(10, 10),
        ] {
            assert_eq!(posterior(&other, &some, Metric::Conversion, None), None);
        }
    }

    #[test]
    fn an_uneven_split_is_told_from_chance() {
        assert!(sample_ratio_p(&[5_050, 4_950], &[5_000, 5_000]) > 0.3);
        assert!(sample_ratio_p(&[5_300, 4_700], &[5_000, 5_000]) < 1e-8);
        near(sample_ratio_p(&[0, 0], &[5_000, 5_000]), 1.0);
    }

    #[test]
    fn the_bound_narrows_and_holds_for_large_money() {
        let money = |units: u64| Sample {
            units,
            sum: units * 1_000_000,
            sum_of_squares: u128::from(units) * 2_000_000_000_000,
        };
        let width = |units| {
            let sample = money(units);
            let (low, high) =
                sequential_interval(&sample, &sample, Metric::Revenue, 0.05, 5_000).unwrap();
            high - low
        };
        assert!(width(100) > width(1_000) && width(1_000) > width(100_000));
    }
}
