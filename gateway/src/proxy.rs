//! The reverse proxy: pingora's request phases, each handing its decision to a module below.
//!
//! request → [`route`] → [`upstream`] → [`record`] → attribution and access log.

pub mod alarm;
mod answer;
pub mod app;
mod attempt;
pub mod caching;
pub mod coding;
pub mod connection;
pub mod edge;
pub mod experiment;
mod forward;
pub mod forward_auth;
pub mod frames;
pub mod full;
pub mod full_http2;
pub mod gate;
pub mod generation;
pub mod guard;
mod headers;
pub mod hints;
pub mod keys;
pub mod lane;
pub mod limit;
pub mod meter;
pub mod mirror;
pub mod outbound;
mod phases;
pub mod proxy_header;
pub mod record;
mod records;
mod request;
mod retry;
mod rotation;
pub mod route;
pub mod shared_limit;
mod slow_reader;
pub mod strict;
pub mod tls;
pub mod token;
pub mod upstream;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderName;
use pingora::cache::lock::{CacheKeyLockImpl, CacheLock};

use crate::access_log::AccessLog;
use crate::acme::Challenges;
use crate::budget::Budgets;
use crate::cache::Store;
use crate::census::Census;
use crate::config::ListenerIndex;
use crate::export::{EdgeMetrics, RequestMetrics};
use crate::otlp::Exporter;
use crate::trace::Sampler;

use alarm::Alarm;
use gate::Gate;
use generation::Generation;
use meter::Meter;
use mirror::Mirroring;
use request::{cookie, host, request_id, tenant};

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// On responses while a budget warns: its name, the share used, its period.
const BUDGET_HEADER: &str = "x-edgemeter-budget";
static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Milliseconds the sender still waits: shortens a request's deadline, and goes on to the upstream.
static X_TIMEOUT: HeaderName = HeaderName::from_static("x-edgemeter-timeout-ms");

/// What all listeners share for as long as the process lives. What a reload changes is in the
/// [`Generation`].
pub struct Shared {
    /// The configuration in force.
    pub generation: ArcSwap<Generation>,
    /// The kernel side.
    pub meter: Meter,
    /// Request metrics.
    pub metrics: RequestMetrics,
    /// Copies of requests.
    pub mirroring: Mirroring,
    /// None when not configured.
    pub access_log: Option<AccessLog>,
    /// What may be used.
    pub budgets: Arc<Budgets>,
    /// Connections open now.
    pub gate: Arc<Gate>,
    /// What was refused.
    pub edge: EdgeMetrics,
    /// Who sends what is in no request.
    pub alarm: Alarm,
    /// Stored responses.
    pub cache: ResponseCache,
    /// What pages said that they need.
    pub learned: hints::Learned,
    /// Where what no request waits for is done.
    pub background: tokio::runtime::Handle,
    /// What is alive.
    pub census: Arc<Census>,
    /// What ACME servers ask for.
    pub challenges: Challenges,
    /// Which requests are recorded.
    pub sampler: Sampler,
    /// Where they are sent; None: nowhere.
    pub exporter: Option<Exporter>,
}

/// Stored responses, and the locks by which one request fetches for all that wait. pingora wants
/// them to live as long as the process.
#[derive(Clone, Copy)]
pub struct ResponseCache {
    /// What is stored.
    pub store: &'static Store,
    /// Who fetches.
    pub lock: &'static CacheKeyLockImpl,
}

impl ResponseCache {
    /// For the rest of the process.
    #[must_use]
    pub fn new(store: Store) -> Self {
        // After this long, waiting requests fetch for themselves.
        let lock = CacheLock::new_boxed(Duration::from_secs(10));
        Self {
            store: Box::leak(Box::new(store)),
            lock: Box::leak(lock),
        }
    }
}

/// The proxy of one listener.
pub struct Gateway {
    /// Shared state.
    pub shared: Arc<Shared>,
    /// Which listener.
    pub listener: ListenerIndex,
}
