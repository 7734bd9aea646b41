//! What became of spans and metrics on their way to a collector.

use std::sync::{Arc, atomic::Ordering};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::otlp::Counts;

/// Reads the exporter's counts.
#[derive(Debug)]
pub struct OtlpMetrics(pub Arc<Counts>);

impl Collector for OtlpMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counts = &self.0;
        for (name, help, count) in [
            (
                "edgemeter_otlp_spans_sent",
                "Spans a collector took",
                &counts.spans_sent,
            ),
            (
                "edgemeter_otlp_requests_lost",
                "Recorded requests whose spans were lost to a full queue or a collector that does \
                 not take them",
                &counts.requests_lost,
            ),
            (
                "edgemeter_otlp_failures",
                "Messages a collector did not take",
                &counts.failures,
            ),
        ] {
            let encoder = out.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(count.load(Ordering::Relaxed)).encode(encoder)?;
        }
        Ok(())
    }
}
