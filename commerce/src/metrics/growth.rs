//! Metrics of groups, members, experiments, stock, pages and tasks.
//!
//! Labels come from the campaign file (experiments and variants, which are bounded there) or
//! from closed sets.

mod process;
mod registry;

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use super::Metrics;
use crate::campaigns::Finding;
use crate::command::member::Renewed;
use crate::experiment::decision::Verdict;
use crate::experiment::revision::Number;
use crate::group::State;
use crate::membership::{Refresh, Renewal};

#[cfg(test)]
pub(super) use registry::NAMES;

/// Seconds: around the target of 18 ms on average and 23 ms for 99 %.
const DEDUCT_SECONDS: [f64; 13] = [
    0.001, 0.002, 0.004, 0.006, 0.009, 0.012, 0.015, 0.018, 0.023, 0.035, 0.05, 0.1, 1.0,
];
/// Seconds: from a cached page to one that a customer leaves.
const PAINT_SECONDS: [f64; 10] = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.8, 3.0, 6.0];

type Real = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExperimentLabel {
    experiment: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VariantLabels {
    experiment: String,
    variant: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HintedLabel {
    hinted: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// What the stock rows sum to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StockTotals {
    /// Units for sale.
    pub available: i64,
    /// Units of unpaid orders.
    pub reserved: i64,
    /// Units paid for.
    pub sold: i64,
    /// SKUs with fewer than no units, or whose units do not sum to what there was.
    pub oversold_skus: i64,
}

/// The handles.
#[derive(Clone)]
pub(super) struct Growth {
    deduct_duration: Histogram,
    stock: Family<StateLabel, Gauge>,
    oversold: Gauge,
    groups: Family<StateLabel, Gauge>,
    joins: Family<OutcomeLabel, Counter>,
    groups_failed: Counter,
    watcher_messages: Counter,
    refreshes: Family<OutcomeLabel, Counter>,
    renewals: Family<OutcomeLabel, Counter>,
    forgotten: Family<WhatLabel, Counter>,
    revision: Gauge,
    rejections: Counter,
    rollbacks: Counter,
    exposures: Counter,
    observations_dropped: Counter,
    units: Family<VariantLabels, Gauge>,
    lift: Family<VariantLabels, Real>,
    win: Family<VariantLabels, Real>,
    sample_ratio: Family<ExperimentLabel, Real>,
    state: Family<ExperimentLabel, Gauge>,
    paint: Family<HintedLabel, Histogram, fn() -> Histogram>,
    tasks: Family<KindLabel, Gauge>,
    oldest: Family<KindLabel, Gauge>,
    cpu: Counter<f64, AtomicU64>,
    resident: Gauge,
}

impl Growth {
    pub(super) fn new() -> Self {
        let growth = Self {
            deduct_duration: Histogram::new(DEDUCT_SECONDS),
            stock: Family::default(),
            oversold: Gauge::default(),
            groups: Family::default(),
            joins: Family::default(),
            groups_failed: Counter::default(),
            watcher_messages: Counter::default(),
            refreshes: Family::default(),
            renewals: Family::default(),
            forgotten: Family::default(),
            revision: Gauge::default(),
            rejections: Counter::default(),
            rollbacks: Counter::default(),
            exposures: Counter::default(),
            observations_dropped: Counter::default(),
            units: Family::default(),
            lift: Family::default(),
            win: Family::default(),
            sample_ratio: Family::default(),
            state: Family::default(),
            paint: Family::new_with_constructor(|| Histogram::new(PAINT_SECONDS)),
            tasks: Family::default(),
            oldest: Family::default(),
            cpu: Counter::default(),
            resident: Gauge::default(),
        };
        // From zero: an increase from nothing is invisible to a rate.
        for outcome in ["joined", "refused"] {
            growth.joins.get_or_create_owned(&OutcomeLabel { outcome });
        }
        for outcome in ["rotated", "reused", "invalid"] {
            growth
                .refreshes
                .get_or_create_owned(&OutcomeLabel { outcome });
        }
        for what in ["keys", "events"] {
            growth.forgotten.get_or_create_owned(&WhatLabel { what });
        }
        for outcome in ["renewed", "known", "out_of_order", "unpaid"] {
            growth
                .renewals
                .get_or_create_owned(&OutcomeLabel { outcome });
        }
        for hinted in ["true", "false"] {
            growth.paint.get_or_create_owned(&HintedLabel { hinted });
        }
        for state in [State::Forming, State::Succeeded, State::Failed] {
            let state = state.as_str();
            growth.groups.get_or_create_owned(&StateLabel { state });
        }
        growth
    }
}

fn gauge(value: i64, at: &Gauge) {
    at.set(value);
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Metrics {
    /// An order was decided, so long after it reached the store.
    pub fn deducted(&self, duration: Duration) {
        self.growth.deduct_duration.observe(duration.as_secs_f64());
    }

    /// The stock as it is.
    pub fn stock(&self, totals: StockTotals) {
        for (state, units) in [
            ("available", totals.available),
            ("reserved", totals.reserved),
            ("sold", totals.sold),
        ] {
            gauge(
                units,
                &self.growth.stock.get_or_create(&StateLabel { state }),
            );
        }
        gauge(totals.oversold_skus, &self.growth.oversold);
    }

    /// The groups as they are.
    pub fn groups(&self, by_state: &[(State, i64)]) {
        for (state, groups) in by_state {
            let state = state.as_str();
            gauge(
                *groups,
                &self.growth.groups.get_or_create(&StateLabel { state }),
            );
        }
    }

    /// Somebody asked for a place.
    pub fn group_joined(&self, joined: bool) {
        let outcome = if joined { "joined" } else { "refused" };
        self.growth
            .joins
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }

    /// So many groups ended without enough members.
    pub fn groups_failed(&self, groups: u64) {
        self.growth.groups_failed.inc_by(groups);
    }

    /// A watcher was told something.
    pub fn watcher_told(&self) {
        self.growth.watcher_messages.inc();
    }

    /// A refresh token was presented.
    pub fn refresh_presented(&self, outcome: Refresh) {
        let outcome = match outcome {
            Refresh::Rotate => "rotated",
            Refresh::Reused => "reused",
            Refresh::Invalid => "invalid",
        };
        self.growth
            .refreshes
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }

    /// Rows were removed because they were too old.
    pub fn forgotten(&self, what: &'static str, rows: u64) {
        self.growth
            .forgotten
            .get_or_create_owned(&WhatLabel { what })
            .inc_by(rows);
    }

    /// A renewal was asked for.
    pub fn renewal(&self, renewed: &Renewed) {
        let outcome = match renewed {
            Renewed::NoMember => return,
            Renewed::Unpaid(_) => "unpaid",
            Renewed::Done(Renewal::Renewed(_), _) => "renewed",
            Renewed::Done(Renewal::Known, _) => "known",
            Renewed::Done(Renewal::OutOfOrder { .. }, _) => "out_of_order",
        };
        self.growth
            .renewals
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }

    /// This revision is in force.
    pub fn campaign_active(&self, revision: Number) {
        gauge(count(revision), &self.growth.revision);
    }

    /// A campaign file was refused.
    pub fn campaign_rejected(&self) {
        self.growth.rejections.inc();
    }

    /// A campaign did harm.
    pub fn campaign_rolled_back(&self) {
        self.growth.rollbacks.inc();
    }

    /// A customer was shown a variant.
    pub fn exposed(&self) {
        self.growth.exposures.inc();
    }

    /// An observation was lost.
    pub fn observation_dropped(&self) {
        self.growth.observations_dropped.inc();
    }

    /// An experiment was assessed.
    pub fn experiment_assessed(&self, finding: &Finding) {
        let experiment = || finding.name.clone();
        let growth = &self.growth;
        for (at, (variant, sample)) in finding.variants.iter().zip(&finding.samples).enumerate() {
            let labels = VariantLabels {
                experiment: experiment(),
                variant: variant.clone(),
            };
            gauge(count(sample.units), &growth.units.get_or_create(&labels));
            let Some(at) = at.checked_sub(1) else {
                continue;
            };
            // Without data the odds are even.
            let known = finding.assessment.treatments.get(at).copied().flatten();
            let (lift, win) = known.map_or((0.0, 0.5), |known| (known.mean, known.win));
            growth.lift.get_or_create(&labels).set(lift);
            growth.win.get_or_create(&labels).set(win);
        }
        let labels = ExperimentLabel {
            experiment: experiment(),
        };
        growth
            .sample_ratio
            .get_or_create(&labels)
            .set(finding.assessment.sample_ratio_p);
        let state = if finding.is_open() {
            match finding.assessment.verdict {
                Verdict::Mismatch => 4,
                _ => 0,
            }
        } else {
            match finding.stored.as_str() {
                "shipped" => 1,
                "kept" => 2,
                _ => 3,
            }
        };
        gauge(state, &growth.state.get_or_create(&labels));
    }

    /// A page was painted.
    pub fn painted(&self, hinted: bool, after: Duration) {
        let hinted = if hinted { "true" } else { "false" };
        self.growth
            .paint
            .get_or_create(&HintedLabel { hinted })
            .observe(after.as_secs_f64());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::census::Census;
    use crate::experiment::Metric;
    use crate::experiment::decision::Assessment;
    use crate::experiment::statistics::{Prior, Sample, posterior};

    /// A family is described once it has a member.
    pub(in crate::metrics) fn give_every_family_a_member(metrics: &Metrics) {
        metrics.stock(StockTotals::default());
        metrics.process(&Census::default());
        let sample = Sample::of_conversions(10, 5);
        metrics.experiment_assessed(&Finding {
            name: "e".to_owned(),
            variants: vec!["control".to_owned(), "treatment".to_owned()],
            samples: vec![sample; 2],
            assessment: Assessment {
                verdict: Verdict::Wait,
                sample_ratio_p: 1.0,
                treatments: vec![posterior(
                    &sample,
                    &sample,
                    Metric::Conversion,
                    Some(Prior::DEFAULT),
                )],
            },
            stored: "running".to_owned(),
            started_at_ms: 0,
        });
    }
}
