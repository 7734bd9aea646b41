//! Request metrics. With [`super::wire`], the only places where metric names are written.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{
    access_log::Leg as LoggedLeg,
    config::{Config, Name},
    owner::{Leg, Quality},
    proxy::{meter::UNROUTED, route::Route, upstream::Pool},
    units::PayloadBytes,
};

/// Seconds, 100 µs to 10 s.
const DURATION_BUCKETS: [f64; 14] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0,
];
/// Seconds, 20 µs to 1 s.
const RTT_BUCKETS: [f64; 12] = [
    0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.02, 0.1, 0.3, 1.0,
];

/// Frames.
const RETRANSMIT_BUCKETS: [f64; 8] = [0.0, 1.0, 2.0, 5.0, 10.0, 50.0, 250.0, 1000.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabel {
    route: String,
}

impl RouteLabel {
    fn new(route: Option<&Route>) -> Self {
        Self {
            route: route
                .map_or(UNROUTED, |route| route.name.as_str())
                .to_owned(),
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UpstreamLabel {
    upstream: String,
}

impl UpstreamLabel {
    fn new(upstream: &Name) -> Self {
        Self {
            upstream: upstream.as_str().to_owned(),
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    service: String,
    status_class: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LegLabels {
    leg: &'static str,
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TlsLabels {
    upstream: String,
    route: String,
}

/// Classes of status; 0 means that no response was sent.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// A route's series, each looked up by its labels once and kept at the route.
#[derive(Debug, Default)]
pub struct RouteSeries {
    requests: [OnceLock<Counter>; CLASSES.len()],
    request_body: OnceLock<Counter>,
    response_body: OnceLock<Counter>,
    duration: OnceLock<Histogram>,
    client_rtt: OnceLock<Histogram>,
    /// By leg.
    handshake: [OnceLock<Histogram>; 2],
    retransmits: [OnceLock<Histogram>; 2],
}

/// An upstream's series, each looked up once and kept at its pool.
#[derive(Debug, Default)]
pub struct UpstreamSeries {
    rtt: OnceLock<Histogram>,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Counters the proxy adds to.
#[derive(Clone)]
pub struct RequestMetrics {
    requests: Family<RequestLabels, Counter>,
    request_body: Family<RouteLabel, Counter>,
    response_body: Family<RouteLabel, Counter>,
    duration: Histograms<RouteLabel>,
    client_rtt: Histograms<RouteLabel>,
    upstream_rtt: Histograms<UpstreamLabel>,
    handshake: Histograms<LegLabels>,
    tls_handshake: Histograms<TlsLabels>,
    retransmits: Histograms<LegLabels>,
    connect_failures: Family<UpstreamLabel, Counter>,
    unrouted: Arc<RouteSeries>,
}

impl RequestMetrics {
    /// Makes and registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let durations: fn() -> Histogram = || Histogram::new(DURATION_BUCKETS);
        let rtts: fn() -> Histogram = || Histogram::new(RTT_BUCKETS);
        let frames: fn() -> Histogram = || Histogram::new(RETRANSMIT_BUCKETS);
        let metrics = Self {
            requests: Family::default(),
            request_body: Family::default(),
            response_body: Family::default(),
            duration: Family::new_with_constructor(durations),
            client_rtt: Family::new_with_constructor(rtts),
            upstream_rtt: Family::new_with_constructor(rtts),
            handshake: Family::new_with_constructor(rtts),
            tls_handshake: Family::new_with_constructor(durations),
            retransmits: Family::new_with_constructor(frames),
            connect_failures: Family::default(),
            unrouted: Arc::default(),
        };
        registry.register(
            "edgemeter_requests",
            "Requests finished, by route and class of the status sent (none: no response)",
            metrics.requests.clone(),
        );
        registry.register_with_unit(
            "edgemeter_request_body",
            "HTTP request body bytes received from clients",
            Unit::Bytes,
            metrics.request_body.clone(),
        );
        registry.register_with_unit(
            "edgemeter_response_body",
            "HTTP response body bytes sent to clients",
            Unit::Bytes,
            metrics.response_body.clone(),
        );
        registry.register_with_unit(
            "edgemeter_request_duration",
            "From the parsed request header to the end of the response",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register_with_unit(
            "edgemeter_client_rtt",
            "The kernel's smoothed round-trip time to the client at the end of each request",
            Unit::Seconds,
            metrics.client_rtt.clone(),
        );
        registry.register_with_unit(
            "edgemeter_upstream_rtt",
            "The kernel's smoothed round-trip time to the upstream peer at the end of each request",
            Unit::Seconds,
            metrics.upstream_rtt.clone(),
        );
        registry.register_with_unit(
            "edgemeter_route_handshake",
            "The TCP handshake's round trip of each connection, by leg and the route of its first request",
            Unit::Seconds,
            metrics.handshake.clone(),
        );
        registry.register_with_unit(
            "edgemeter_upstream_tls_handshake",
            "The TLS handshake of each connection to an upstream, by the route of its first request; from the connected socket to the end of the handshake",
            Unit::Seconds,
            metrics.tls_handshake.clone(),
        );
        registry.register(
            "edgemeter_route_retransmits",
            "Frames sent again for each request, by leg and route; told when all is acknowledged or the connection ends",
            metrics.retransmits.clone(),
        );
        registry.register(
            "edgemeter_upstream_connect_failures",
            "Failed attempts to connect to an upstream peer",
            metrics.connect_failures.clone(),
        );
        metrics
    }

    /// A configuration comes into force. A counter that is absent until it first moves hides that
    /// first move from rate(): the names of this configuration appear now.
    pub fn expect(&self, config: &Config) {
        for upstream in &config.upstreams {
            let label = UpstreamLabel::new(&upstream.name);
            let _ = self.connect_failures.get_or_create(&label);
        }
        for route in &config.routes {
            for upstream in route.upstreams().map(|index| &config.upstreams[index.0]) {
                if upstream.tls.is_some() {
                    let labels = TlsLabels {
                        upstream: upstream.name.as_str().to_owned(),
                        route: route.name.as_str().to_owned(),
                    };
                    let _ = self.tls_handshake.get_or_create(&labels);
                }
            }
        }
    }

    /// A request is over. Status 0 means that no response was sent.
    pub fn request(
        &self,
        route: Option<&Route>,
        status: u16,
        duration: Duration,
        request_body: PayloadBytes,
        response_body: PayloadBytes,
    ) {
        let series = self.series(route);
        let name = || RouteLabel::new(route);
        let class = Some(usize::from(status / 100)).filter(|class| *class < CLASSES.len());
        let class = class.unwrap_or(0);
        series.requests[class]
            .get_or_init(|| {
                let labels = RequestLabels {
                    route: name().route,
                    service: route
                        .map_or(UNROUTED, |route| route.service.as_str())
                        .to_owned(),
                    status_class: CLASSES[class],
                };
                self.requests.get_or_create(&labels).clone()
            })
            .inc();
        series
            .request_body
            .get_or_init(|| self.request_body.get_or_create(&name()).clone())
            .inc_by(request_body.0);
        series
            .response_body
            .get_or_init(|| self.response_body.get_or_create(&name()).clone())
            .inc_by(response_body.0);
        series
            .duration
            .get_or_init(|| self.duration.get_or_create(&name()).clone())
            .observe(duration.as_secs_f64());
    }

    /// Round-trip time of the client connection; 0 is unknown and not observed.
    pub fn client_rtt(&self, route: Option<&Route>, srtt_us: u32) {
        if srtt_us > 0 {
            let rtt = Duration::from_micros(srtt_us.into());
            let rtts = &self.series(route).client_rtt;
            rtts.get_or_init(|| {
                let label = RouteLabel::new(route);
                self.client_rtt.get_or_create(&label).clone()
            })
            .observe(rtt.as_secs_f64());
        }
    }

    /// Round-trip time of an upstream connection; 0 is unknown and not observed.
    pub fn upstream_rtt(&self, pool: &Pool, srtt_us: u32) {
        if srtt_us > 0 {
            let rtt = Duration::from_micros(srtt_us.into());
            let rtts = &pool.series.rtt;
            rtts.get_or_init(|| {
                let label = UpstreamLabel::new(&pool.settings.name);
                self.upstream_rtt.get_or_create(&label).clone()
            })
            .observe(rtt.as_secs_f64());
        }
    }

    /// A connection to an upstream was made for a request, over TLS. One lookup a connection.
    pub fn tls_handshake(&self, route: Option<&Route>, upstream: &Name, took: Duration) {
        let labels = TlsLabels {
            upstream: upstream.as_str().to_owned(),
            route: RouteLabel::new(route).route,
        };
        self.tls_handshake
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }

    /// A request's part on one connection is over.
    pub fn leg(&self, route: Option<&Route>, leg: Leg, on: &LoggedLeg) {
        let series = self.series(route);
        let labels = || LegLabels {
            leg: leg.as_str(),
            route: RouteLabel::new(route).route,
        };
        let at = usize::from(leg == Leg::Upstream);
        if let Some(us) = on.connection.take_handshake_us() {
            series.handshake[at]
                .get_or_init(|| self.handshake.get_or_create(&labels()).clone())
                .observe(Duration::from_micros(us.into()).as_secs_f64());
        }
        let retransmits = series.retransmits[at]
            .get_or_init(|| self.retransmits.get_or_create(&labels()).clone());
        if let (Quality::Exact, [ticket]) = (on.quality, on.tickets.as_slice()) {
            on.connection
                .count_retransmits(*ticket, retransmits.clone());
        } else {
            // HTTP/2: streams have taken turns, and the ranges are many.
            let ranges = on.tickets.iter().filter_map(|t| on.connection.read(*t));
            let frames: u64 = ranges.map(|range| range.retransmit_frames).sum();
            let frames = u32::try_from(frames).unwrap_or(u32::MAX);
            retransmits.observe(frames.into());
        }
    }

    fn series<'r>(&'r self, route: Option<&'r Route>) -> &'r RouteSeries {
        route.map_or(&self.unrouted, |route| &route.series)
    }

    /// A peer could not be connected to.
    pub fn connect_failure(&self, upstream: &Name) {
        self.connect_failures
            .get_or_create(&UpstreamLabel::new(upstream))
            .inc();
    }
}
