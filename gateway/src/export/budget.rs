//! Budgets, as metrics: used, limit, forecast, and what happened to requests.

use std::sync::{Arc, atomic::Ordering};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::budget::{Budgets, Standing};

/// Encodes the latest judgement.
#[derive(Debug)]
pub struct BudgetMetrics(Arc<Budgets>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BudgetLabels {
    budget: String,
    unit: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActionLabels {
    budget: String,
    action: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabel {
    budget: String,
}

impl BudgetMetrics {
    /// A collector over the budgets.
    #[must_use]
    pub fn new(budgets: Arc<Budgets>) -> Self {
        Self(budgets)
    }
}

impl Collector for BudgetMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let judgement = self.0.judgement();
        for (name, help, value) in [
            (
                "edgemeter_budget_used",
                "Used in the budget's period so far",
                (|standing| standing.used) as fn(&Standing) -> i128,
            ),
            (
                "edgemeter_budget_limit",
                "The budget's limit; money in billionths of a currency unit",
                |standing| standing.limit,
            ),
            (
                "edgemeter_budget_forecast",
                "What will have been used when the period ends, at this pace",
                |standing| standing.forecast,
            ),
        ] {
            let mut gauges = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (watched, standing) in self.0.watched().iter().zip(&judgement.standings) {
                let labels = BudgetLabels {
                    budget: watched.budget.name.to_string(),
                    unit: watched.budget.limit.unit(),
                };
                let value = i64::try_from(value(standing)).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(gauges.encode_family(&labels)?)?;
            }
        }
        let mut warned = out.encode_descriptor(
            "edgemeter_budget_warned_percent",
            "The highest warning reached, percent of the limit; 0: none",
            None,
            MetricType::Gauge,
        )?;
        for (watched, standing) in self.0.watched().iter().zip(&judgement.standings) {
            let label = NameLabel {
                budget: watched.budget.name.to_string(),
            };
            ConstGauge::new(standing.warned_percent).encode(warned.encode_family(&label)?)?;
        }
        let mut judged = out.encode_descriptor(
            "edgemeter_budget_judged",
            "1 when the use is known now; 0: every request is allowed",
            None,
            MetricType::Gauge,
        )?;
        for (index, watched) in self.0.watched().iter().enumerate() {
            let label = NameLabel {
                budget: watched.budget.name.to_string(),
            };
            let known = judgement.standings.get(index).is_some();
            ConstGauge::new(i64::from(known)).encode(judged.encode_family(&label)?)?;
        }
        let mut actions = out.encode_descriptor(
            "edgemeter_budget_actions",
            "Requests that a budget had warned, slowed down or refused",
            None,
            MetricType::Counter,
        )?;
        for watched in self.0.watched() {
            for (action, counter) in [
                ("warned", &watched.warned),
                ("throttled", &watched.throttled),
                ("refused", &watched.refused),
            ] {
                let labels = ActionLabels {
                    budget: watched.budget.name.to_string(),
                    action,
                };
                let count = counter.load(Ordering::Relaxed);
                ConstCounter::new(count).encode(actions.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
