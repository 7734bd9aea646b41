//! The names of these families and what a scrape says about them.

use prometheus_client::registry::{Registry, Unit};

use super::Growth;

/// Every family of this file, in the order of a scrape.
#[cfg(test)]
pub(in crate::metrics) const NAMES: &[&str] = &[
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

impl Growth {
    pub(in crate::metrics) fn register(&self, registry: &mut Registry) {
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
