//! Upstreams: groups of interchangeable servers, and how requests are spread over them, retried,
//! limited and kept away from the broken ones.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::ops::Range;
use std::time::Duration;

use http::HeaderName;
use serde::Deserialize;
use toml::Spanned;

use super::Name;
use super::check::{Checker, Seen};
use super::fields::example;
use super::pattern::PathPattern;
use super::raw::{Number, RawPeer, Text};
use super::tls::{ProxyVersion, RawUpstreamTls, UpstreamTls};

/// A group of interchangeable servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Unique among upstreams.
    pub name: Name,
    /// Not empty, no address twice.
    pub peers: Vec<Peer>,
    /// Speak HTTP/2 to the peers.
    pub http2: bool,
    /// Speak TLS to the peers.
    pub tls: Option<UpstreamTls>,
    /// Name the client to the peers.
    pub proxy_protocol: Option<ProxyVersion>,
    /// How a peer is chosen.
    pub balance: Balance,
    /// Whether what the kernel sees of a peer's connections (loss, round-trip time, resets) moves
    /// its share.
    pub kernel_informed: bool,
    /// Between two resolutions of the peers' names.
    pub resolve_interval: Duration,
    /// For a TCP connection to be established.
    pub connect_timeout: Duration,
    /// Between two reads.
    pub read_timeout: Duration,
    /// For one write.
    pub write_timeout: Duration,
    /// For how long an unused pooled connection is kept.
    pub idle_timeout: Duration,
    /// Retries.
    pub retry: Retry,
    /// Passive ejection.
    pub ejection: Ejection,
    /// Active checks.
    pub check: Option<HealthCheck>,
    /// What is refused rather than queued.
    pub limits: UpstreamLimits,
}

/// One server of an upstream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Where to connect.
    pub address: PeerAddress,
    /// Share of the traffic, relative to the other peers.
    pub weight: NonZeroU16,
}

/// Where a peer is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerAddress {
    /// Here.
    Socket(SocketAddr),
    /// Wherever this name leads to: each of its addresses is a peer.
    Name {
        /// Host name.
        host: Box<str>,
        /// Port.
        port: u16,
    },
}

impl std::fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// How a peer is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The less busy of two at random, by requests under way for each unit of weight.
    LeastRequest,
    /// In turns, by weight.
    RoundRobin,
    /// By what the request carries: the same value, the same peer.
    Hash(HashKey),
}

/// What is hashed; a request without it goes to a peer chosen by least request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// A header's value.
    Header(HeaderName),
    /// A cookie's value.
    Cookie(Box<str>),
    /// The client's address.
    Source,
}

/// When a request is sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Further attempts, each at another peer while there is one.
    pub attempts: usize,
    /// Statuses that are worth another attempt.
    pub statuses: Vec<u16>,
    /// Retries may be this percentage of the requests.
    pub budget_percent: u32,
    /// Retries always allowed, in all, before the percentage counts.
    pub budget_reserve: u32,
    /// POST and PATCH are retried when they carry an Idempotency-Key.
    pub idempotency_key: bool,
}

/// When a peer gets no more requests because of how it answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Failures to connect, or lost connections, in a row; 0 never.
    pub connect_failures: u32,
    /// Answers 500 and above in a row; 0 never.
    pub server_errors: u32,
    /// The first time; doubled each time.
    pub base: Duration,
    /// At most.
    pub max: Duration,
    /// With less than this percentage of the peers left, all are used.
    pub panic_percent: u32,
}

/// What a peer is asked now and then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// How it is asked.
    pub kind: CheckKind,
    /// Between two checks.
    pub interval: Duration,
    /// For one check.
    pub timeout: Duration,
    /// Good answers in a row that make a peer healthy.
    pub healthy: u32,
    /// Bad answers in a row that make it unhealthy.
    pub unhealthy: u32,
}

/// How a peer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// A connection is made and closed.
    Tcp,
    /// GET; a status below 400 is good.
    Http {
        /// Path.
        path: Box<str>,
        /// Host header; else the address.
        host: Option<Box<str>>,
    },
    /// `grpc.health.v1.Health/Check`; SERVING is good.
    Grpc {
        /// The service asked for; empty is the whole server.
        service: Box<str>,
    },
}

/// What is refused with 503 rather than queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamLimits {
    /// Requests under way at the upstream.
    pub requests: u32,
    /// Requests waiting for a connection.
    pub pending: u32,
    /// Requests under way at one peer: with HTTP/1.1 its connections in use.
    pub per_peer: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawUpstream {
    pub(super) name: Text,
    pub(super) peers: Spanned<Vec<Spanned<RawPeer>>>,
    pub(super) http2: Option<bool>,
    pub(super) tls: Option<RawUpstreamTls>,
    pub(super) proxy_protocol: Option<Text>,
    pub(super) balance: Option<Text>,
    pub(super) hash: Option<Spanned<RawHash>>,
    pub(super) kernel_informed: Option<bool>,
    pub(super) resolve_interval_ms: Option<Number>,
    pub(super) connect_timeout_ms: Option<Number>,
    pub(super) read_timeout_ms: Option<Number>,
    pub(super) write_timeout_ms: Option<Number>,
    pub(super) idle_timeout_ms: Option<Number>,
    pub(super) retries: Option<Number>,
    #[serde(default)]
    pub(super) retry: RawRetry,
    #[serde(default)]
    pub(super) ejection: RawEjection,
    pub(super) check: Option<Spanned<RawCheck>>,
    #[serde(default)]
    pub(super) limits: RawLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawHash {
    pub(super) header: Option<Text>,
    pub(super) cookie: Option<Text>,
    pub(super) source: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRetry {
    pub(super) statuses: Option<Vec<Number>>,
    pub(super) budget_percent: Option<Number>,
    pub(super) budget_reserve: Option<Number>,
    pub(super) idempotency_key: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawEjection {
    pub(super) connect_failures: Option<Number>,
    pub(super) server_errors: Option<Number>,
    pub(super) base_ms: Option<Number>,
    pub(super) max_ms: Option<Number>,
    pub(super) panic_percent: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCheck {
    pub(super) path: Option<Text>,
    pub(super) host: Option<Text>,
    pub(super) grpc: Option<Text>,
    pub(super) tcp: Option<bool>,
    pub(super) interval_ms: Option<Number>,
    pub(super) timeout_ms: Option<Number>,
    pub(super) healthy: Option<Number>,
    pub(super) unhealthy: Option<Number>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawLimits {
    pub(super) requests: Option<Number>,
    pub(super) pending: Option<Number>,
    pub(super) per_peer: Option<Number>,
}

/// An example line for each field.
pub(super) const EXAMPLES: &[(&str, &str)] = &[
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

impl Checker<'_> {
    pub(super) fn upstreams(&mut self, raw: &[RawUpstream]) -> Option<Vec<Upstream>> {
        let mut names = Seen::default();
        let checked: Vec<Option<Upstream>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("upstreams[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let peers = self.peers(raw, &format!("{here}.peers"));
                let mut timeout = |raw: Option<&Number>, key: &str, default: i64| {
                    let field = format!("{here}.{key}");
                    self.number(raw, &field, 1..=3_600_000, default)
                        .map(Duration::from_millis)
                };
                let connect = raw.connect_timeout_ms.as_ref();
                let connect_timeout = timeout(connect, "connect_timeout_ms", 1_000);
                let read = raw.read_timeout_ms.as_ref();
                let read_timeout = timeout(read, "read_timeout_ms", 30_000);
                let write = raw.write_timeout_ms.as_ref();
                let write_timeout = timeout(write, "write_timeout_ms", 30_000);
                let idle = raw.idle_timeout_ms.as_ref();
                let idle_timeout = timeout(idle, "idle_timeout_ms", 30_000);
                let resolve = raw.resolve_interval_ms.as_ref();
                let resolve_interval = timeout(resolve, "resolve_interval_ms", 5_000);
                let retry = self.retry(raw, &here);
                let balance = self.balance(raw, &here);
                let ejection = self.ejection(&raw.ejection, &format!("{here}.ejection"));
                let check = match &raw.check {
                    Some(raw) => self
                        .health_check(raw.get_ref(), raw.span(), &format!("{here}.check"))
                        .map(Some),
                    None => Some(None),
                };
                let limits = self.upstream_limits(&raw.limits, &format!("{here}.limits"));
                let (tls, proxy_protocol) = self.outbound(raw, &here);
                Some(Upstream {
                    name: name?,
                    tls: tls?,
                    proxy_protocol: proxy_protocol?,
                    peers: peers?,
                    http2: raw.http2.unwrap_or(false),
                    balance: balance?,
                    kernel_informed: raw.kernel_informed.unwrap_or(true),
                    resolve_interval: resolve_interval?,
                    connect_timeout: connect_timeout?,
                    read_timeout: read_timeout?,
                    write_timeout: write_timeout?,
                    idle_timeout: idle_timeout?,
                    retry: retry?,
                    ejection: ejection?,
                    check: check?,
                    limits: limits?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    fn peers(&mut self, raw: &RawUpstream, here: &str) -> Option<Vec<Peer>> {
        if raw.peers.get_ref().is_empty() {
            let fix = format!("write such as `{}`", example(here).unwrap_or_default());
            self.report(raw.peers.span(), here, "is empty", fix);
            return None;
        }
        let mut seen = Seen::default();
        let checked: Vec<Option<Peer>> = raw
            .peers
            .get_ref()
            .iter()
            .enumerate()
            .map(|(index, peer)| {
                let here = format!("{here}[{index}]");
                let (text, at, field, weight) = match peer.get_ref() {
                    RawPeer::Address(text) => (text, peer.span(), here.clone(), Some(1)),
                    RawPeer::Weighted(raw) => {
                        let weight = format!("{here}.weight");
                        let weight = self.number(raw.weight.as_ref(), &weight, 1..=1_000, 1);
                        let address = &raw.address;
                        let field = format!("{here}.address");
                        (address.get_ref(), address.span(), field, weight)
                    }
                };
                let address = self.peer_address(text, at.clone(), &field)?;
                let fix = "delete it; use `weight` for a larger share";
                self.unique(&mut seen, address.to_string(), at, &field, fix)?;
                Some(Peer {
                    address,
                    weight: weight.and_then(NonZeroU16::new)?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    /// An address, or a host name with a port.
    fn peer_address(&mut self, text: &str, at: Range<usize>, field: &str) -> Option<PeerAddress> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        let address = match text.rsplit_once(':') {
            // A name has a letter in its last label; what has none is an address, if a wrong one.
            Some((host, port))
                if host.split('.').all(label)
                    && host.rsplit('.').next().is_some_and(|last| {
                        last.bytes().any(|byte| byte.is_ascii_alphabetic())
                    })
                    && port.parse::<u16>().is_ok() =>
            {
                PeerAddress::Name {
                    host: host.to_ascii_lowercase().into(),
                    port: port.parse().unwrap_or_default(),
                }
            }
            _ => PeerAddress::Socket(self.address(text, at.clone(), field)?),
        };
        let port = match &address {
            PeerAddress::Socket(address) => address.port(),
            PeerAddress::Name { port, .. } => *port,
        };
        if port == 0 {
            let fix = "write the port the server listens on";
            self.report(at, field, "port 0 cannot be connected to", fix);
            return None;
        }
        Some(address)
    }

    fn balance(&mut self, raw: &RawUpstream, here: &str) -> Option<Balance> {
        let hash = match &raw.hash {
            Some(hash) => Some(self.hash_key(hash, &format!("{here}.hash"))?),
            None => None,
        };
        let Some(text) = &raw.balance else {
            return Some(hash.map_or(Balance::LeastRequest, Balance::Hash));
        };
        let field = format!("{here}.balance");
        let chosen = self.choice(
            text,
            &field,
            &[("least-request", 0), ("round-robin", 1), ("hash", 2)],
        )?;
        match (chosen, hash) {
            (0, None) => Some(Balance::LeastRequest),
            (1, None) => Some(Balance::RoundRobin),
            (2, Some(key)) => Some(Balance::Hash(key)),
            (2, None) => {
                let fix = "add such as `hash = { cookie = \"uid\" }`";
                self.report(text.span(), field, "does not say what is hashed", fix);
                None
            }
            _ => {
                let fix = "write `balance = \"hash\"` or delete `hash`";
                self.report(text.span(), field, "stands beside `hash`", fix);
                None
            }
        }
    }

    fn hash_key(&mut self, raw: &Spanned<RawHash>, here: &str) -> Option<HashKey> {
        let table = raw.get_ref();
        match (&table.header, &table.cookie, table.source) {
            (Some(text), None, None) => self
                .header_name(text, &format!("{here}.header"))
                .map(HashKey::Header),
            (None, Some(text), None) => Some(HashKey::Cookie(text.get_ref().as_str().into())),
            (None, None, Some(true)) => Some(HashKey::Source),
            _ => {
                let fix = "write one of `header`, `cookie` and `source = true`";
                self.report(raw.span(), here, "does not name one thing to hash", fix);
                None
            }
        }
    }

    fn retry(&mut self, raw: &RawUpstream, here: &str) -> Option<Retry> {
        let attempts = raw.retries.as_ref();
        let attempts = self.number(attempts, &format!("{here}.retries"), 0..=5, 1);
        let raw = &raw.retry;
        let here = format!("{here}.retry");
        let statuses = match &raw.statuses {
            None => Some(vec![502, 503, 504]),
            Some(list) => {
                let checked = list.iter().enumerate().map(|(index, number)| {
                    let field = format!("{here}.statuses[{index}]");
                    self.number(Some(number), &field, 500..=599, 503)
                });
                checked.collect::<Vec<_>>().into_iter().collect()
            }
        };
        let percent = raw.budget_percent.as_ref();
        let percent = self.number(percent, &format!("{here}.budget_percent"), 0..=1_000, 20);
        let reserve = raw.budget_reserve.as_ref();
        let field = format!("{here}.budget_reserve");
        let reserve = self.number(reserve, &field, 0..=1_000_000, 100);
        Some(Retry {
            attempts: attempts?,
            statuses: statuses?,
            budget_percent: percent?,
            budget_reserve: reserve?,
            idempotency_key: raw.idempotency_key.unwrap_or(true),
        })
    }

    fn ejection(&mut self, raw: &RawEjection, here: &str) -> Option<Ejection> {
        let mut number = |raw: &Option<Number>, key: &str, default: i64, most: i64| {
            self.number::<u32>(raw.as_ref(), &format!("{here}.{key}"), 0..=most, default)
        };
        let connect_failures = number(&raw.connect_failures, "connect_failures", 3, 1_000);
        let server_errors = number(&raw.server_errors, "server_errors", 5, 1_000);
        let base = number(&raw.base_ms, "base_ms", 1_000, 3_600_000);
        let max = number(&raw.max_ms, "max_ms", 30_000, 3_600_000);
        let panic_percent = number(&raw.panic_percent, "panic_percent", 34, 100);
        let base = Duration::from_millis(base?.into());
        Some(Ejection {
            connect_failures: connect_failures?,
            server_errors: server_errors?,
            base,
            max: Duration::from_millis(max?.into()).max(base),
            panic_percent: panic_percent?,
        })
    }

    fn health_check(
        &mut self,
        raw: &RawCheck,
        at: Range<usize>,
        here: &str,
    ) -> Option<HealthCheck> {
        let kind = match (&raw.path, &raw.grpc, raw.tcp) {
            (Some(text), None, None) => {
                let field = format!("{here}.path");
                let path = PathPattern::exact(text.get_ref());
                let host = raw.host.as_ref().map(|host| host.get_ref().as_str().into());
                self.accepted(path, text, &field).map(|_| CheckKind::Http {
                    path: text.get_ref().as_str().into(),
                    host,
                })
            }
            (None, Some(text), None) => Some(CheckKind::Grpc {
                service: text.get_ref().as_str().into(),
            }),
            (None, None, Some(true)) => Some(CheckKind::Tcp),
            _ => {
                let fix = "write one of `path`, `grpc` and `tcp = true`";
                self.report(at, here, "does not say what to ask", fix);
                None
            }
        };
        let mut number = |raw: &Option<Number>, key: &str, least: i64, most: i64, default: i64| {
            self.number::<u32>(
                raw.as_ref(),
                &format!("{here}.{key}"),
                least..=most,
                default,
            )
        };
        let interval = number(&raw.interval_ms, "interval_ms", 10, 3_600_000, 1_000);
        let timeout = number(&raw.timeout_ms, "timeout_ms", 1, 60_000, 1_000);
        let healthy = number(&raw.healthy, "healthy", 1, 100, 2);
        let unhealthy = number(&raw.unhealthy, "unhealthy", 1, 100, 3);
        Some(HealthCheck {
            kind: kind?,
            interval: Duration::from_millis(interval?.into()),
            timeout: Duration::from_millis(timeout?.into()),
            healthy: healthy?,
            unhealthy: unhealthy?,
        })
    }

    fn upstream_limits(&mut self, raw: &RawLimits, here: &str) -> Option<UpstreamLimits> {
        let mut number = |raw: &Option<Number>, key: &str| {
            let field = format!("{here}.{key}");
            self.number::<u32>(raw.as_ref(), &field, 1..=10_000_000, 10_000_000)
        };
        let requests = number(&raw.requests, "requests");
        let pending = number(&raw.pending, "pending");
        let per_peer = number(&raw.per_peer, "per_peer");
        Some(UpstreamLimits {
            requests: requests?,
            pending: pending?,
            per_peer: per_peer?,
        })
    }
}
