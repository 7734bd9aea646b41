//! What to do with an experiment, from its counts. Pure, and final once it is not [`Verdict::Wait`].
//!
//! A treatment ships only at the horizon that was fixed before it began, on one look, with
//! the probability of winning, the expected loss and the split between the variants all in
//! order. Looking earlier and stopping at a good moment ships false winners; harm may be
//! looked for at any time, because its bound is made for that.

use super::statistics::{self, Posterior, Prior, Sample};
use super::{Experiment, Metric};
use crate::mutant::Mutant;

/// When and how an experiment is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Milliseconds from the start to the decision.
    pub horizon_ms: i64,
    /// Customers each variant must have by then; the decision waits for them.
    pub units_min: u64,
    /// Least probability of winning that ships, in basis points.
    pub win_points: u16,
    /// Most expected relative loss that ships, in basis points.
    pub risk_points: u16,
    /// Loss of the metric that is tolerated before harm is proved, in basis points.
    pub harm_points: u16,
    /// Chance of ever rolling back a harmless treatment, in basis points.
    pub harm_alpha_points: u16,
}

impl Default for Policy {
    /// A day, 1,000 customers, 99 % to win, 0.25 % at risk, 5 % to roll back for nothing.
    fn default() -> Self {
        Self {
            horizon_ms: 24 * 3_600 * 1_000,
            units_min: 1_000,
            win_points: 9_900,
            risk_points: 25,
            harm_points: 0,
            harm_alpha_points: 500,
        }
    }
}

/// Outcomes of the control below which the bound for harm is not used: it is asymptotic.
/// They are counted as (Σx)² ∕ Σx², which is the number of conversions, and for revenue the
/// number of equal orders that would scatter as much.
const HARM_OUTCOMES_MIN: u128 = 50;
/// A split less likely than this is a broken experiment.
const SAMPLE_RATIO_P_MIN: f64 = 0.001;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on; the horizon has not been reached.
    Wait,
    /// Give the variant at this index to everybody.
    Ship(usize),
    /// The control stays.
    Keep,
    /// The variant at this index does harm: back to the last good configuration, now.
    RollBack(usize),
    /// The split is not the configured one: nothing can be concluded, repair it first.
    Mismatch,
}

impl Verdict {
    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Wait => "running",
            Self::Ship(_) => "shipped",
            Self::Keep => "kept",
            Self::RollBack(_) => "rolled_back",
            Self::Mismatch => "mismatch",
        }
    }
}

/// The verdict and what it rests on.
#[derive(Clone, Debug, PartialEq)]
pub struct Assessment {
    /// What to do.
    pub verdict: Verdict,
    /// Chance of so uneven a split.
    pub sample_ratio_p: f64,
    /// What is known of each treatment, in the order of the variants after the control.
    pub treatments: Vec<Option<Posterior>>,
}

/// Assesses an experiment. `samples` are in the order of its variants; `elapsed_ms` since
/// its start.
#[must_use]
pub fn assess(experiment: &Experiment, samples: &[Sample], elapsed_ms: i64) -> Assessment {
    let units: Vec<u64> = samples.iter().map(|sample| sample.units).collect();
    let weights: Vec<u16> = experiment
        .variants
        .iter()
        .map(|variant| variant.weight.points())
        .collect();
    let sample_ratio_p = statistics::sample_ratio_p(&units, &weights);
    let Some((control, treatments)) = samples.split_first() else {
        return Assessment {
            verdict: Verdict::Wait,
            sample_ratio_p,
            treatments: Vec::new(),
        };
    };
    let (policy, metric) = (&experiment.policy, experiment.metric);
    let treatments_known: Vec<Option<Posterior>> = treatments
        .iter()
        .map(|treatment| statistics::posterior(control, treatment, metric, Some(Prior::DEFAULT)))
        .collect();
    let verdict = if let Some(harmful) = harmful(policy, metric, control, treatments) {
        Verdict::RollBack(harmful + 1)
    } else if let (true, Some(best)) = (Mutant::Peeking.is_on(), best(policy, &treatments_known)) {
        Verdict::Ship(best + 1)
    } else if !at_horizon(policy, &units, elapsed_ms) {
        Verdict::Wait
    } else if sample_ratio_p < SAMPLE_RATIO_P_MIN {
        Verdict::Mismatch
    } else {
        best(policy, &treatments_known).map_or(Verdict::Keep, |best| Verdict::Ship(best + 1))
    };
    Assessment {
        verdict,
        sample_ratio_p,
        treatments: treatments_known,
    }
}

/// Whether the one look that may ship has come. It depends on time and on how many came,
/// never on how they did.
fn at_horizon(policy: &Policy, units: &[u64], elapsed_ms: i64) -> bool {
    elapsed_ms >= policy.horizon_ms && units.iter().all(|&units| units >= policy.units_min)
}

/// The first treatment whose lift is below the tolerated loss for certain.
fn harmful(
    policy: &Policy,
    metric: Metric,
    control: &Sample,
    treatments: &[Sample],
) -> Option<usize> {
    // The treatments share the chance of a rollback for nothing.
    let share = u16::try_from(treatments.len().max(1)).unwrap_or(1);
    let alpha = statistics::fraction(policy.harm_alpha_points / share);
    let tuned_for = policy.units_min.saturating_mul(2);
    treatments.iter().position(|treatment| {
        outcomes(control) >= HARM_OUTCOMES_MIN
            && statistics::sequential_interval(control, treatment, metric, alpha, tuned_for)
                .is_some_and(|(_, high)| high < statistics::negative(policy.harm_points))
    })
}

fn outcomes(sample: &Sample) -> u128 {
    let sum = u128::from(sample.sum);
    (sum * sum)
        .checked_div(sample.sum_of_squares)
        .unwrap_or_default()
}

/// The treatment most likely to win among those that pass.
fn best(policy: &Policy, treatments: &[Option<Posterior>]) -> Option<usize> {
    let bar = statistics::bar(policy.win_points, treatments.len());
    let risk = statistics::fraction(policy.risk_points);
    treatments
        .iter()
        .enumerate()
        .filter_map(|(at, known)| known.map(|known| (at, known)))
        .filter(|(_, known)| known.win >= bar && known.risk_of_shipping <= risk)
        .max_by(|(_, one), (_, other)| one.mean.total_cmp(&other.mean))
        .map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::tests::experiment;

    const DAY_MS: i64 = 24 * 3_600 * 1_000;

    fn two(control: (u64, u64), treatment: (u64, u64)) -> [Sample; 2] {
        [control, treatment].map(|(units, converted)| Sample::of_conversions(units, converted))
    }

    fn verdict(samples: &[Sample], elapsed_ms: i64) -> Verdict {
        assess(&experiment(&[5_000, 5_000], 10_000), samples, elapsed_ms).verdict
    }

    #[test]
    fn a_winner_ships_at_the_horizon_and_not_before() {
        let samples = two((5_000, 500), (5_000, 620));
        assert_eq!(verdict(&samples, DAY_MS - 1), Verdict::Wait);
        assert_eq!(verdict(&samples, DAY_MS), Verdict::Ship(1));
    }

    #[test]
    fn too_few_customers_wait_however_late_it_is() {
        let samples = two((999, 100), (2_000, 300));
        assert_eq!(verdict(&samples, 10 * DAY_MS), Verdict::Wait);
    }

    #[test]
    fn no_difference_keeps_the_control() {
        assert_eq!(
            verdict(&two((5_000, 500), (5_000, 510)), DAY_MS),
            Verdict::Keep
        );
    }

    #[test]
    fn a_broken_split_concludes_nothing() {
        let samples = two((5_000, 500), (5_600, 690));
        assert_eq!(verdict(&samples, DAY_MS), Verdict::Mismatch);
    }

    #[test]
    fn harm_rolls_back_long_before_the_horizon() {
        let samples = two((1_500, 300), (1_500, 190));
        assert_eq!(verdict(&samples, 1), Verdict::RollBack(1));
    }

    #[test]
    fn several_treatments_share_the_chance_of_a_false_winner() {
        let three = experiment(&[3_334, 3_333, 3_333], 10_000);
        let sample = Sample::of_conversions;
        // 99.2 % to win: enough alone, not as one of two.
        let samples = [sample(5_000, 500), sample(5_000, 583), sample(5_000, 500)];
        let assessed = assess(&three, &samples, DAY_MS);
        let win = assessed.treatments[0].unwrap().win;
        assert!((0.99..0.995).contains(&win), "{win}");
        assert_eq!(assessed.verdict, Verdict::Keep);
        assert_eq!(verdict(&samples[..2], DAY_MS), Verdict::Ship(1));
    }
}
