//! What was refused at the edge, and why.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::{Registry, Unit},
};

use crate::{
    config::Config,
    proxy::{alarm::Desync, caching::RESULTS, gate::Turned, strict::Refusal},
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    listener: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteReasonLabels {
    route: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CacheLabels {
    route: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabel {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EarlyLabels {
    route: String,
    source: &'static str,
}

/// Who made a 103; the label of the metric.
const EARLY_SOURCES: [&str; 2] = ["gateway", "upstream"];

/// Counters of the edge.
#[derive(Clone, Debug, Default)]
pub struct EdgeMetrics {
    requests: Family<ReasonLabels, Counter>,
    connections: Family<ReasonLabels, Counter>,
    denied: Family<RouteReasonLabels, Counter>,
    store_errors: Counter,
    desync: Family<ReasonLabels, Counter>,
    cache: Family<CacheLabels, Counter>,
    cache_saved: Family<RouteLabel, Counter>,
    compressed: Family<RouteLabel, Counter>,
    hints: Family<RouteLabel, Counter>,
    early: Family<EarlyLabels, Counter>,
    key_failures: Counter,
}

/// Why a route denied a request; the label of the metric.
pub const DENIALS: [&str; 6] = [
    "access_list",
    "rate_limit",
    "body_too_large",
    "token",
    "forward_auth",
    "forward_auth_failed",
];

impl EdgeMetrics {
    /// Registers them.
    pub fn new(config: &Config, registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "edgemeter_requests_refused",
            "HTTP requests refused by the listener's rules for framing and limits, by reason",
            metrics.requests.clone(),
        );
        registry.register(
            "edgemeter_connections_refused",
            "Connections closed before their first request, by reason",
            metrics.connections.clone(),
        );
        registry.register(
            "edgemeter_requests_denied",
            "Requests a route's policy denied, by reason",
            metrics.denied.clone(),
        );
        registry.register(
            "edgemeter_rate_limit_store_errors",
            "Requests whose shared rate limit could not be asked",
            metrics.store_errors.clone(),
        );
        registry.register(
            "edgemeter_token_key_failures",
            "Failed attempts to read the public keys of a token issuer; the log names it",
            metrics.key_failures.clone(),
        );
        registry.register(
            "edgemeter_cache_requests",
            "Requests of routes with a cache, by what the cache did",
            metrics.cache.clone(),
        );
        registry.register_with_unit(
            "edgemeter_cache_saved",
            "Response body bytes served from the cache that the service did not have to send",
            Unit::Bytes,
            metrics.cache_saved.clone(),
        );
        registry.register_with_unit(
            "edgemeter_compression_saved",
            "Response body bytes that compression kept off the wire to clients",
            Unit::Bytes,
            metrics.compressed.clone(),
        );
        registry.register(
            "edgemeter_hints",
            "Preload hints given to clients",
            metrics.hints.clone(),
        );
        registry.register(
            "edgemeter_early_hints",
            "103 responses sent to HTTP/2 clients, by who made them",
            metrics.early.clone(),
        );
        registry.register_with_unit(
            "edgemeter_desync",
            "Bytes received on a listener that are in no request, by what was wrong",
            Unit::Bytes,
            metrics.desync.clone(),
        );
        metrics.expect(config);
        metrics
    }

    /// A counter that is absent until it first moves hides that first move from rate().
    pub fn expect(&self, config: &Config) {
        for listener in &config.listeners {
            let listener = listener.name.as_str();
            for refusal in Refusal::ALL {
                let _ = self.requests.get_or_create(&of(listener, refusal.reason()));
            }
            for desync in Desync::ALL {
                let _ = self.desync.get_or_create(&of(listener, desync.reason()));
            }
            for turned in Turned::ALL {
                let _ = self
                    .connections
                    .get_or_create(&of(listener, turned.reason()));
            }
        }
        for route in &config.routes {
            let label = RouteLabel {
                route: route.name.as_str().to_owned(),
            };
            for family in [&self.cache_saved, &self.compressed, &self.hints] {
                let _ = family.get_or_create(&label);
            }
            for source in EARLY_SOURCES {
                let route = route.name.as_str().to_owned();
                let _ = self.early.get_or_create(&EarlyLabels { route, source });
            }
            for result in RESULTS {
                let route = route.name.as_str().to_owned();
                let _ = self.cache.get_or_create(&CacheLabels { route, result });
            }
            for reason in DENIALS {
                let route = route.name.as_str().to_owned();
                let _ = self
                    .denied
                    .get_or_create(&RouteReasonLabels { route, reason });
            }
        }
    }

    /// A request was refused.
    pub fn refused(&self, listener: &str, refusal: Refusal) {
        self.requests
            .get_or_create(&of(listener, refusal.reason()))
            .inc();
    }

    /// A connection was turned away.
    pub fn turned(&self, listener: &str, turned: Turned) {
        self.connections
            .get_or_create(&of(listener, turned.reason()))
            .inc();
    }

    /// A route denied a request.
    pub fn denied(&self, route: &str, reason: &'static str) {
        let route = route.to_owned();
        self.denied
            .get_or_create(&RouteReasonLabels { route, reason })
            .inc();
    }

    /// An issuer's keys could not be read.
    pub fn keys_failed(&self) {
        self.key_failures.inc();
    }

    /// What the cache did for a request, and the body bytes it saved.
    pub fn cached(&self, route: &str, result: &'static str, saved: u64) {
        let route = route.to_owned();
        let label = RouteLabel {
            route: route.clone(),
        };
        self.cache
            .get_or_create(&CacheLabels { route, result })
            .inc();
        self.cache_saved.get_or_create(&label).inc_by(saved);
    }

    /// Body bytes the cache has saved on a route so far.
    #[must_use]
    pub fn cache_saved(&self, route: &str) -> u64 {
        let route = route.to_owned();
        self.cache_saved.get_or_create(&RouteLabel { route }).get()
    }

    /// Bytes that compression saved.
    pub fn compressed(&self, route: &str, saved: u64) {
        let route = route.to_owned();
        self.compressed
            .get_or_create(&RouteLabel { route })
            .inc_by(saved);
    }

    /// Hints given with a response.
    pub fn hinted(&self, route: &str, count: usize) {
        let route = route.to_owned();
        self.hints
            .get_or_create(&RouteLabel { route })
            .inc_by(count as u64);
    }

    /// A 103 was sent.
    pub fn hinted_early(&self, route: &str, source: &'static str) {
        let route = route.to_owned();
        self.early
            .get_or_create(&EarlyLabels { route, source })
            .inc();
    }

    /// Bytes that are in no request.
    pub fn desync(&self, listener: &str, desync: Desync, bytes: u64) {
        let labels = of(listener, desync.reason());
        self.desync.get_or_create(&labels).inc_by(bytes);
    }

    /// The shared store of rate limits did not answer.
    pub fn store_error(&self) {
        self.store_errors.inc();
    }
}

fn of(listener: &str, reason: &'static str) -> ReasonLabels {
    ReasonLabels {
        listener: listener.to_owned(),
        reason,
    }
}
