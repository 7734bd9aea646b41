//! Metrics of the configuration in force.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// What becomes of reloads.
#[derive(Clone)]
pub struct ConfigMetrics {
    reloads: Family<ResultLabel, Counter>,
    generation: Gauge,
    refused: Gauge,
    upgrades: Family<ResultLabel, Counter>,
}

impl ConfigMetrics {
    /// Makes and registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            reloads: Family::default(),
            generation: Gauge::default(),
            refused: Gauge::default(),
            upgrades: Family::default(),
        };
        registry.register(
            "edgemeter_upgrades",
            "Upgrades to another process, by result; a process that was replaced is asked no more",
            metrics.upgrades.clone(),
        );
        registry.register(
            "edgemeter_config_reloads",
            "Reloads of the configuration file, by result",
            metrics.reloads.clone(),
        );
        registry.register(
            "edgemeter_config_generation",
            "Number of the configuration in force: 1 at start, one more with each reload applied",
            metrics.generation.clone(),
        );
        registry.register(
            "edgemeter_config_refused",
            "1 when the last reload was refused and an older configuration is in force",
            metrics.refused.clone(),
        );
        for result in ["applied", "unchanged", "refused"] {
            let _ = metrics.reloads.get_or_create(&ResultLabel { result });
        }
        for result in ["served", "failed"] {
            let _ = metrics.upgrades.get_or_create(&ResultLabel { result });
        }
        metrics
    }

    /// An upgrade ended.
    pub fn upgraded(&self, served: bool) {
        let result = if served { "served" } else { "failed" };
        self.upgrades.get_or_create(&ResultLabel { result }).inc();
    }

    /// A configuration came into force.
    pub fn in_force(&self, number: u64) {
        self.generation.set(number.cast_signed());
    }

    /// A reload ended: with so many changes, or refused.
    pub fn reloaded(&self, changes: Option<usize>) {
        let result = match changes {
            None => "refused",
            Some(0) => "unchanged",
            Some(_) => "applied",
        };
        self.reloads.get_or_create(&ResultLabel { result }).inc();
        self.refused.set(i64::from(changes.is_none()));
    }
}
