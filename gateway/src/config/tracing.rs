//! `[tracing]`: which requests are recorded, and where spans and metrics go.

use std::time::Duration;

use serde::Deserialize;

use super::check::Checker;
use super::raw::{Number, Text};

/// An OpenTelemetry collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// Base URL of OTLP over HTTP, without a slash at its end.
    pub endpoint: String,
    /// Of a million requests that bring no trace context.
    pub parts_per_million: u32,
    /// `service.name`.
    pub service_name: String,
    /// Requests that may wait to be sent; more are lost and counted.
    pub queue: usize,
    /// How long a span may wait for its last bytes to leave the kernel.
    pub settle: Duration,
    /// Between two exports of all metrics.
    pub metrics_interval: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTracing {
    endpoint: Text,
    sample_per_million: Option<Number>,
    service_name: Option<Text>,
    queue: Option<Number>,
    settle_ms: Option<Number>,
    metrics_interval_ms: Option<Number>,
}

impl Checker<'_> {
    pub(super) fn tracing(&mut self, raw: &RawTracing) -> Option<Tracing> {
        let endpoint = raw.endpoint.get_ref();
        let is_url = ["http://", "https://"]
            .iter()
            .any(|scheme| endpoint.starts_with(scheme))
            && endpoint.parse::<http::Uri>().is_ok();
        if !is_url {
            self.report(
                raw.endpoint.span(),
                "tracing.endpoint",
                format!("\"{endpoint}\" is not an http:// or https:// URL"),
                "write where a collector takes OTLP over HTTP, such as \"http://127.0.0.1:4318\"",
            );
        }
        let parts = raw.sample_per_million.as_ref();
        let parts = self.number(parts, "tracing.sample_per_million", 0..=1_000_000, 1_000);
        let queue = self.number(raw.queue.as_ref(), "tracing.queue", 1..=1_000_000, 4_096);
        let settle = self.number(
            raw.settle_ms.as_ref(),
            "tracing.settle_ms",
            0..=60_000,
            5_000,
        );
        let interval = raw.metrics_interval_ms.as_ref();
        let interval = self.number(
            interval,
            "tracing.metrics_interval_ms",
            100..=3_600_000,
            60_000,
        );
        let name = raw.service_name.as_ref();
        Some(Tracing {
            endpoint: is_url.then(|| endpoint.trim_end_matches('/').to_owned())?,
            parts_per_million: parts?,
            service_name: name.map_or("edgemeter".to_owned(), |name| name.get_ref().clone()),
            queue: queue?,
            settle: Duration::from_millis(settle?),
            metrics_interval: Duration::from_millis(interval?),
        })
    }
}
