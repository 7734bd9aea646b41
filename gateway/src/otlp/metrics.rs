//! The registry's own text, as OTLP: one vocabulary, two ways out.
// Metric values are fractions on the wire; nothing is billed from them.
#![allow(clippy::float_arithmetic, clippy::cast_possible_truncation)]

use std::{collections::BTreeMap, time::SystemTime};

use super::message::{
    Data, Gauge, Histogram, HistogramPoint, KeyValue, Metric, MetricsRequest, Number, NumberValue,
    Resource, ResourceMetrics, ScopeMetrics, Sum, text,
};
use super::spans::{nanos, scope};

/// `AGGREGATION_TEMPORALITY_CUMULATIVE`.
const CUMULATIVE: i32 = 2;

/// Every metric of a text in the OpenMetrics format, as prometheus-client writes it.
pub(super) fn request(
    resource: &Resource,
    exposition: &str,
    started: SystemTime,
    now: SystemTime,
) -> MetricsRequest {
    let times = (nanos(started), nanos(now));
    MetricsRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource.clone()),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(scope()),
                metrics: metrics(exposition, times),
            }],
        }],
    }
}

/// Name or what follows the family's in it, labels, value.
type Sample<'t> = (&'t str, Vec<(String, String)>, f64);

#[derive(Default)]
struct Family<'t> {
    help: &'t str,
    kind: &'t str,
    /// Suffix of the name, labels, value.
    samples: Vec<Sample<'t>>,
}

fn metrics(exposition: &str, times: (u64, u64)) -> Vec<Metric> {
    let mut families: BTreeMap<&str, Family<'_>> = BTreeMap::new();
    let mut current = "";
    for line in exposition.lines() {
        if let Some(meta) = line.strip_prefix("# ") {
            let mut words = meta.splitn(3, ' ');
            let (keyword, name, rest) = (words.next(), words.next(), words.next());
            current = name.unwrap_or_default();
            let family = families.entry(current).or_default();
            match keyword {
                Some("HELP") => family.help = rest.unwrap_or_default(),
                Some("TYPE") => family.kind = rest.unwrap_or_default(),
                _ => {}
            }
        } else if let Some((name, labels, value)) = sample(line)
            && let Some(suffix) = name.strip_prefix(current)
        {
            let family = families.entry(current).or_default();
            family.samples.push((suffix, labels, value));
        }
    }
    families.remove("EOF");
    let families = families.into_iter();
    families
        .filter(|(_, family)| !family.samples.is_empty())
        .map(|(name, family)| Metric {
            name: name.to_owned(),
            description: family.help.to_owned(),
            data: Some(family.data(times)),
        })
        .collect()
}

/// `name{label="value",…} number …`; what follows the number (an exemplar) is left out.
fn sample(line: &str) -> Option<Sample<'_>> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, value) = rest.split_once("=\"")?;
            let mut text = String::new();
            let mut chars = value.char_indices();
            let after = loop {
                match chars.next()? {
                    (at, '"') => break at + 1,
                    (_, '\\') => text.push(match chars.next()?.1 {
                        'n' => '\n',
                        other => other,
                    }),
                    (_, other) => text.push(other),
                }
            };
            labels.push((label.trim_start_matches(',').to_owned(), text));
            rest = &value[after..];
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?;
    Some((name, labels, value.parse().ok()?))
}

impl Family<'_> {
    fn data(self, (started, now): (u64, u64)) -> Data {
        if self.kind == "histogram" {
            return Data::Histogram(Histogram {
                points: self.histograms(started, now),
                temporality: CUMULATIVE,
            });
        }
        let points = |start: u64| {
            let samples = self.samples.iter();
            let points = samples.map(|(_, labels, value)| Number {
                start_time_unix_nano: start,
                time_unix_nano: now,
                value: Some(number(*value)),
                attributes: attributes(labels),
            });
            points.collect()
        };
        if self.kind == "counter" {
            return Data::Sum(Sum {
                points: points(started),
                temporality: CUMULATIVE,
                is_monotonic: true,
            });
        }
        Data::Gauge(Gauge { points: points(0) })
    }

    fn histograms(&self, started: u64, now: u64) -> Vec<HistogramPoint> {
        let mut points: BTreeMap<Vec<(String, String)>, HistogramPoint> = BTreeMap::new();
        for (suffix, labels, value) in &self.samples {
            let mut labels = labels.clone();
            let mut bound = None;
            labels.retain(|(name, value)| {
                let is_bound = name == "le";
                if is_bound {
                    bound = value.parse::<f64>().ok();
                }
                !is_bound
            });
            let point = points
                .entry(labels)
                .or_insert_with_key(|labels| HistogramPoint {
                    start_time_unix_nano: started,
                    time_unix_nano: now,
                    attributes: attributes(labels),
                    ..HistogramPoint::default()
                });
            let whole = whole(*value).and_then(|value| u64::try_from(value).ok());
            match *suffix {
                "_sum" => point.sum = Some(*value),
                "_count" => point.count = whole.unwrap_or_default(),
                "_bucket" => {
                    // Text counts up to each bound; OTLP counts in each.
                    let before: u64 = point.bucket_counts.iter().sum();
                    let here = whole.unwrap_or_default().saturating_sub(before);
                    point.bucket_counts.push(here);
                    let finite = bound.filter(|bound| bound.is_finite());
                    point.explicit_bounds.extend(finite);
                }
                _ => {}
            }
        }
        points.into_values().collect()
    }
}

fn number(value: f64) -> NumberValue {
    whole(value).map_or(NumberValue::Double(value), NumberValue::Int)
}

/// Within what a double holds exactly.
fn whole(value: f64) -> Option<i64> {
    let exact = value.fract() == 0.0 && value.abs() < 9e15;
    exact.then_some(value as i64)
}

fn attributes(labels: &[(String, String)]) -> Vec<KeyValue> {
    labels
        .iter()
        .map(|(name, value)| text(name, value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP em_bytes Bytes.\n# TYPE em_bytes counter\n# UNIT em_bytes bytes\n\
        em_bytes_total{route=\"a \\\"b\\\"\",tenant=\"x\"} 12\n\
        # HELP em_time Time.\n# TYPE em_time histogram\n\
        em_time_sum{route=\"a\"} 1.5\nem_time_count{route=\"a\"} 3\n\
        em_time_bucket{le=\"0.1\",route=\"a\"} 1\nem_time_bucket{le=\"1.0\",route=\"a\"} 3\n\
        em_time_bucket{le=\"+Inf\",route=\"a\"} 3\n\
        # HELP em_level Level.\n# TYPE em_level gauge\nem_level -4\n# EOF\n";

    #[test]
    fn counters_histograms_and_gauges_keep_names_labels_and_values() {
        let metrics = metrics(TEXT, (1, 2));
        let names: Vec<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
        assert_eq!(names, ["em_bytes", "em_level", "em_time"]);
        let Some(Data::Sum(sum)) = &metrics[0].data else {
            panic!("{metrics:?}");
        };
        assert_eq!(sum.points[0].value, Some(NumberValue::Int(12)));
        assert_eq!(
            sum.points[0].attributes,
            [text("route", "a \"b\""), text("tenant", "x")]
        );
        let Some(Data::Gauge(gauge)) = &metrics[1].data else {
            panic!("{metrics:?}");
        };
        assert_eq!(gauge.points[0].value, Some(NumberValue::Int(-4)));
        let Some(Data::Histogram(histogram)) = &metrics[2].data else {
            panic!("{metrics:?}");
        };
        let point = &histogram.points[0];
        assert_eq!((point.count, point.sum), (3, Some(1.5)));
        assert_eq!(point.bucket_counts, [1, 2, 0]);
        assert_eq!(point.explicit_bounds, [0.1, 1.0]);
    }
}
