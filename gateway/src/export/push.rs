//! Push, as metrics: what each sink has, and has not.

use std::sync::PoisonError;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use crate::push::{PushState, PushView};

/// Encodes the latest state of every sink.
#[derive(Debug)]
pub struct PushMetrics(PushView);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SinkLabel {
    sink: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    sink: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    sink: String,
    outcome: &'static str,
}

impl PushMetrics {
    /// A collector over the view.
    #[must_use]
    pub fn new(view: PushView) -> Self {
        Self(view)
    }
}

impl Collector for PushMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut events = out.encode_descriptor(
            "edgemeter_push_events",
            "Usage events a sink does not have, by state: waiting, sent without an answer yet, refused, in doubt",
            None,
            MetricType::Gauge,
        )?;
        for (sink, state) in &view {
            for (word, count) in states(state) {
                let labels = StateLabels {
                    sink: sink.clone(),
                    state: word,
                };
                ConstGauge::new(count).encode(events.encode_family(&labels)?)?;
            }
        }
        let mut attempts = out.encode_descriptor(
            "edgemeter_push_attempts",
            "Batches sent since start, by what became of them",
            None,
            MetricType::Counter,
        )?;
        for (sink, state) in &view {
            for (outcome, count) in [
                ("accepted", state.accepted),
                ("not_arrived", state.not_arrived),
                ("unanswered", state.unanswered),
                ("refused", state.refused),
            ] {
                let labels = OutcomeLabels {
                    sink: sink.clone(),
                    outcome,
                };
                ConstCounter::new(count).encode(attempts.encode_family(&labels)?)?;
            }
        }
        for (name, help, unit, value) in [
            (
                "edgemeter_push_acknowledged",
                "Wire bytes in events the sink has acknowledged, all time",
                Unit::Bytes,
                (|state| state.backlog.acknowledged_bytes) as fn(&PushState) -> i64,
            ),
            (
                "edgemeter_push_outstanding",
                "Wire bytes in events the sink has not acknowledged, and in the open window",
                Unit::Bytes,
                |state| state.backlog.outstanding_bytes + state.backlog.open_bytes,
            ),
            (
                "edgemeter_push_lag",
                "Age of the oldest window the sink has not acknowledged",
                Unit::Seconds,
                |state| state.lag_seconds,
            ),
        ] {
            let mut gauges = out.encode_descriptor(name, help, Some(&unit), MetricType::Gauge)?;
            for (sink, state) in &view {
                let label = SinkLabel { sink: sink.clone() };
                ConstGauge::new(value(state)).encode(gauges.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}

fn states(state: &PushState) -> [(&'static str, i64); 4] {
    [
        ("waiting", state.backlog.waiting),
        ("sent", state.backlog.sent),
        ("refused", state.backlog.refused),
        ("in_doubt", state.backlog.in_doubt),
    ]
}
