//! What is alive, by kind and age.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Unit,
};

use crate::census::{AGES, Census};

/// Reads the census when it is asked.
#[derive(Debug)]
pub struct CensusMetrics(pub Arc<Census>);

impl Collector for CensusMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counts = self.0.counts();
        let mut family = out.encode_descriptor(
            "edgemeter_tasks",
            "Connections, requests and mirror copies alive now, by the age they are older than, \
             seconds; 0 is all of them",
            None,
            MetricType::Gauge,
        )?;
        for count in &counts {
            let mut older = count.alive;
            let bounds = std::iter::once(0).chain(AGES.iter().map(|age| age.as_secs()));
            for (bound, in_class) in bounds.zip(count.by_age) {
                let labels = [
                    ("kind", count.kind.as_str().to_owned()),
                    ("older_than", bound.to_string()),
                ];
                let value = i64::try_from(older).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                older -= in_class;
            }
        }
        let mut family = out.encode_descriptor(
            "edgemeter_task_oldest_age",
            "Age of the oldest one alive",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for count in &counts {
            let seconds = i64::try_from(count.oldest_ms / 1000).unwrap_or(i64::MAX);
            let label = [("kind", count.kind.as_str())];
            ConstGauge::new(seconds).encode(family.encode_family(&label)?)?;
        }
        Ok(())
    }
}
