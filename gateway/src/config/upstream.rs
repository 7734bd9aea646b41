//! Upstreams: groups of interchangeable servers, and how requests are spread over them, retried,
//! limited and kept away from the broken ones.

mod failure;
mod peers;
mod raw;

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use http::HeaderName;

use super::Name;
use super::check::{Checker, Seen};
use super::raw::Number;
use super::tls::{ProxyVersion, UpstreamTls};

pub(super) use raw::{EXAMPLES, RawUpstream};

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
}
