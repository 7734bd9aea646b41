//! How often the process was profiled.

use std::sync::{Arc, atomic::Ordering};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::profile::Profiler;

/// Reads the profiler's counts when it is asked.
#[derive(Debug)]
pub struct ProfileMetrics(pub Arc<Profiler>);

impl Collector for ProfileMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = out.encode_descriptor(
            "edgemeter_profiles",
            "CPU profiles asked for, by result",
            None,
            MetricType::Counter,
        )?;
        for (result, count) in [("taken", &self.0.taken), ("refused", &self.0.refused)] {
            let label = [("result", result)];
            let count = ConstCounter::new(count.load(Ordering::Relaxed));
            count.encode(family.encode_family(&label)?)?;
        }
        Ok(())
    }
}
