//! Metrics of groups, members, experiments, stock, pages and tasks.
//!
//! Labels come from the campaign file (experiments and variants, which are bounded there) or
//! from closed sets.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::Metrics;
use crate::campaigns::Finding;
use crate::census::{Census, Kind};
use crate::command::member::Renewed;
use crate::experiment::decision::Verdict;
use crate::experiment::revision::Number;
use crate::group::State;
use crate::membership::{Refresh, Renewal};

/// Every family of this file, in the order of a scrape.
#[cfg(test)]
pub(super) const NAMES: &[&str] = &[
    "commerce_deduct_duration_seconds",
    "commerce_stock_units",
    "commerce_oversold_skus",
    "commerce_groups",
    "commerce_group_joins_total",
    "commerce_groups_failed_total",
    "commerce_watcher_messages_total",
    "commerce_refresh_tokens_total",
    "commerce_renewals_total",
    "commerce_forgotten_rows_total",
    "commerce_campaign_revision",
    "commerce_campaign_rejections_total",
    "commerce_campaign_rollbacks_total",
    "commerce_exposures_total",
    "commerce_observations_dropped_total",
    "commerce_experiment_units",
    "commerce_experiment_lift",
    "commerce_experiment_win_probability",
    "commerce_experiment_sample_ratio_p",
    "commerce_experiment_state",
    "commerce_first_contentful_paint_seconds",
    "commerce_tasks",
    "commerce_task_oldest_age_seconds",
    "commerce_process_cpu_seconds_total",
    "commerce_process_resident_bytes",
];

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

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "commerce_deduct_duration",
            "Time from an order's arrival at the store to its commit or refusal",
            Unit::Seconds,
            self.deduct_duration.clone(),
        );
        registry.register(
            "commerce_stock_units",
            "Units of stock over all SKUs, by state",
            self.stock.clone(),
        );
        registry.register(
            "commerce_oversold_skus",
            "SKUs whose units are negative or do not sum to what there was; always 0",
            self.oversold.clone(),
        );
        registry.register("commerce_groups", "Groups, by state", self.groups.clone());
        registry.register(
            "commerce_group_joins",
            "Requests to open or join a group, by outcome; replays are not counted again",
            self.joins.clone(),
        );
        registry.register(
            "commerce_groups_failed",
            "Groups that ended without enough members; what was paid went back",
            self.groups_failed.clone(),
        );
        registry.register(
            "commerce_watcher_messages",
            "Snapshots and hints sent to those who watch groups",
            self.watcher_messages.clone(),
        );
        registry.register(
            "commerce_refresh_tokens",
            "Refresh tokens presented, by outcome; reused ones ended their login",
            self.refreshes.clone(),
        );
        registry.register(
            "commerce_renewals",
            "Renewals asked for, by outcome; known ones changed nothing",
            self.renewals.clone(),
        );
        registry.register(
            "commerce_forgotten_rows",
            "Idempotency keys and events removed because they were too old",
            self.forgotten.clone(),
        );
        registry.register(
            "commerce_campaign_revision",
            "The revision of the campaign in force; 0 is the empty one",
            self.revision.clone(),
        );
        registry.register(
            "commerce_campaign_rejections",
            "Campaign files refused; what was in force stayed",
            self.rejections.clone(),
        );
        registry.register(
            "commerce_campaign_rollbacks",
            "Campaigns rolled back because an experiment did harm",
            self.rollbacks.clone(),
        );
        registry.register(
            "commerce_exposures",
            "Times a customer was shown a variant of a running experiment",
            self.exposures.clone(),
        );
        registry.register(
            "commerce_observations_dropped",
            "Exposures and outcomes dropped because too many waited to be written",
            self.observations_dropped.clone(),
        );
        registry.register(
            "commerce_experiment_units",
            "Customers counted, by experiment and variant",
            self.units.clone(),
        );
        registry.register(
            "commerce_experiment_lift",
            "Expected relative lift over the control; 0.01 is one percent",
            self.lift.clone(),
        );
        registry.register(
            "commerce_experiment_win_probability",
            "Probability that the variant is better than the control",
            self.win.clone(),
        );
        registry.register(
            "commerce_experiment_sample_ratio_p",
            "Chance of so uneven a split between the variants",
            self.sample_ratio.clone(),
        );
        registry.register(
            "commerce_experiment_state",
            "0 running, 1 shipped, 2 kept, 3 rolled back, 4 mismatch",
            self.state.clone(),
        );
        registry.register_with_unit(
            "commerce_first_contentful_paint",
            "First contentful paint as browsers report it, by whether early hints were used",
            Unit::Seconds,
            self.paint.clone(),
        );
        registry.register(
            "commerce_tasks",
            "Tasks that live now, by kind",
            self.tasks.clone(),
        );
        registry.register_with_unit(
            "commerce_task_oldest_age",
            "Age of the oldest task, by kind",
            Unit::Seconds,
            self.oldest.clone(),
        );
        registry.register_with_unit(
            "commerce_process_cpu",
            "Processor time used, user and system",
            Unit::Seconds,
            self.cpu.clone(),
        );
        registry.register_with_unit(
            "commerce_process_resident",
            "Memory in use",
            Unit::Bytes,
            self.resident.clone(),
        );
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

    /// The tasks and the process as they are.
    pub fn process(&self, census: &Census) {
        for kind in Kind::ALL {
            let (tasks, oldest) = census.count(kind);
            let labels = KindLabel {
                kind: kind.as_str(),
            };
            gauge(count(tasks), &self.growth.tasks.get_or_create(&labels));
            gauge(count(oldest), &self.growth.oldest.get_or_create(&labels));
        }
        let Some((cpu, resident)) = usage() else {
            return;
        };
        // A counter only rises; the kernel's clock does too.
        let risen = cpu.saturating_sub(Duration::from_secs_f64(self.growth.cpu.get().max(0.0)));
        self.growth.cpu.inc_by(risen.as_secs_f64());
        gauge(count(resident), &self.growth.resident);
    }
}

/// Processor time and resident bytes of this process, by the kernel's own account.
fn usage() -> Option<(Duration, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name is in parentheses and may contain anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |at: usize| fields.get(at)?.parse::<u64>().ok();
    // proc_pid_stat(5): utime and stime are fields 14 and 15, in ticks of 10 ms; rss is
    // field 24, in pages. The first field here is the third there.
    let ticks = field(11)?.saturating_add(field(12)?);
    let resident = field(21)?.saturating_mul(4096);
    Some((Duration::from_millis(ticks.saturating_mul(10)), resident))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
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

    #[test]
    fn the_process_knows_its_own_use() {
        let (_, resident) = usage().unwrap();
        assert!(resident > 1024 * 1024, "{resident}");
    }
}
