//! Upstreams as written, and an example of each field.

use serde::Deserialize;
use toml::Spanned;

use crate::config::raw::{Number, RawPeer, Text};
use crate::config::tls::RawUpstreamTls;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawUpstream {
    pub(in crate::config) name: Text,
    pub(in crate::config) peers: Spanned<Vec<Spanned<RawPeer>>>,
    pub(in crate::config) http2: Option<bool>,
    pub(in crate::config) tls: Option<RawUpstreamTls>,
    pub(in crate::config) proxy_protocol: Option<Text>,
    pub(in crate::config) balance: Option<Text>,
    pub(in crate::config) hash: Option<Spanned<RawHash>>,
    pub(in crate::config) kernel_informed: Option<bool>,
    pub(in crate::config) resolve_interval_ms: Option<Number>,
    pub(in crate::config) connect_timeout_ms: Option<Number>,
    pub(in crate::config) read_timeout_ms: Option<Number>,
    pub(in crate::config) write_timeout_ms: Option<Number>,
    pub(in crate::config) idle_timeout_ms: Option<Number>,
    pub(in crate::config) retries: Option<Number>,
    #[serde(default)]
    pub(in crate::config) retry: RawRetry,
    #[serde(default)]
    pub(in crate::config) ejection: RawEjection,
    pub(in crate::config) check: Option<Spanned<RawCheck>>,
    #[serde(default)]
    pub(in crate::config) limits: RawLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawHash {
    pub(in crate::config) header: Option<Text>,
    pub(in crate::config) cookie: Option<Text>,
    pub(in crate::config) source: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawRetry {
    pub(in crate::config) statuses: Option<Vec<Number>>,
    pub(in crate::config) budget_percent: Option<Number>,
    pub(in crate::config) budget_reserve: Option<Number>,
    pub(in crate::config) idempotency_key: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawEjection {
    pub(in crate::config) connect_failures: Option<Number>,
    pub(in crate::config) server_errors: Option<Number>,
    pub(in crate::config) base_ms: Option<Number>,
    pub(in crate::config) max_ms: Option<Number>,
    pub(in crate::config) panic_percent: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawCheck {
    pub(in crate::config) path: Option<Text>,
    pub(in crate::config) host: Option<Text>,
    pub(in crate::config) grpc: Option<Text>,
    pub(in crate::config) tcp: Option<bool>,
    pub(in crate::config) interval_ms: Option<Number>,
    pub(in crate::config) timeout_ms: Option<Number>,
    pub(in crate::config) healthy: Option<Number>,
    pub(in crate::config) unhealthy: Option<Number>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawLimits {
    pub(in crate::config) requests: Option<Number>,
    pub(in crate::config) pending: Option<Number>,
    pub(in crate::config) per_peer: Option<Number>,
}

/// An example line for each field.
pub(in crate::config) const EXAMPLES: &[(&str, &str)] = &[
    ("upstreams", "[[upstreams]]"),
    ("upstreams.name", r#"name = "orders""#),
    ("upstreams.peers", r#"peers = ["10.0.0.2:9000"]"#),
    ("upstreams.peers.address", r#"address = "10.0.0.2:9000""#),
    ("upstreams.peers.weight", "weight = 2"),
    ("upstreams.http2", "http2 = false"),
    ("upstreams.balance", r#"balance = "least-request""#),
    ("upstreams.hash", r#"hash = { cookie = "uid" }"#),
    ("upstreams.hash.header", r#"header = "x-customer""#),
    ("upstreams.hash.cookie", r#"cookie = "uid""#),
    ("upstreams.hash.source", "source = true"),
    ("upstreams.kernel_informed", "kernel_informed = true"),
    (
        "upstreams.resolve_interval_ms",
        "resolve_interval_ms = 5000",
    ),
    ("upstreams.connect_timeout_ms", "connect_timeout_ms = 1000"),
    ("upstreams.read_timeout_ms", "read_timeout_ms = 30000"),
    ("upstreams.write_timeout_ms", "write_timeout_ms = 30000"),
    ("upstreams.idle_timeout_ms", "idle_timeout_ms = 30000"),
    ("upstreams.retries", "retries = 1"),
    ("upstreams.retry", "[upstreams.retry]"),
    ("upstreams.retry.statuses", "statuses = [502, 503, 504]"),
    ("upstreams.retry.budget_percent", "budget_percent = 20"),
    ("upstreams.retry.budget_reserve", "budget_reserve = 100"),
    ("upstreams.retry.idempotency_key", "idempotency_key = true"),
    ("upstreams.ejection", "[upstreams.ejection]"),
    (
        "upstreams.ejection.connect_failures",
        "connect_failures = 3",
    ),
    ("upstreams.ejection.server_errors", "server_errors = 5"),
    ("upstreams.ejection.base_ms", "base_ms = 1000"),
    ("upstreams.ejection.max_ms", "max_ms = 30000"),
    ("upstreams.ejection.panic_percent", "panic_percent = 34"),
    ("upstreams.check", r#"check = { path = "/livez" }"#),
    ("upstreams.check.path", r#"path = "/livez""#),
    ("upstreams.check.host", r#"host = "orders.internal""#),
    ("upstreams.check.grpc", r#"grpc = "orders.Orders""#),
    ("upstreams.check.tcp", "tcp = true"),
    ("upstreams.check.interval_ms", "interval_ms = 1000"),
    ("upstreams.check.timeout_ms", "timeout_ms = 1000"),
    ("upstreams.check.healthy", "healthy = 2"),
    ("upstreams.check.unhealthy", "unhealthy = 3"),
    ("upstreams.limits", "[upstreams.limits]"),
    ("upstreams.limits.requests", "requests = 10000"),
    ("upstreams.limits.pending", "pending = 1000"),
    ("upstreams.limits.per_peer", "per_peer = 1000"),
];
