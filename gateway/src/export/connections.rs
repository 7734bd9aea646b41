//! Metrics of connections and kernel events. One of the places where metric names are written.

use std::{sync::Arc, time::Duration};

use flow_abi::{Connection, connection::UNKNOWN, kind};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::{
    connections::{Connections, End, Place, leg_word},
    kernel::Feature,
};

/// Seconds, 10 µs to 1 s: what an event waits before it is counted.
const DELAY_BUCKETS: [f64; 13] = [
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1.0,
];
/// Seconds, 20 µs to 10 s.
const ROUND_TRIP_BUCKETS: [f64; 14] = [
    0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.02, 0.05, 0.1, 0.3, 1.0,
    10.0,
];
/// Seconds, 1 ms to a day.
const LIFE_BUCKETS: [f64; 12] = [
    0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0,
];
/// Segments.
const RETRANSMIT_BUCKETS: [f64; 8] = [0.0, 1.0, 2.0, 5.0, 10.0, 50.0, 250.0, 1000.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PlaceLabels {
    leg: &'static str,
    endpoint: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EndLabels {
    leg: &'static str,
    endpoint: String,
    end: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SenderLabels {
    leg: &'static str,
    endpoint: String,
    sender: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EventLabels {
    event: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DropLabels {
    namespace: String,
    reason: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FeatureLabels {
    feature: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// What the event reader adds to.
#[derive(Clone)]
pub struct ConnectionMetrics {
    events: Family<EventLabels, Counter>,
    delay: Histograms<EventLabels>,
    opened: Family<PlaceLabels, Counter>,
    closed: Family<EndLabels, Counter>,
    handshake: Histograms<PlaceLabels>,
    rtt: Histograms<PlaceLabels>,
    min_rtt: Histograms<PlaceLabels>,
    life: Histograms<PlaceLabels>,
    retransmits: Histograms<PlaceLabels>,
    lost: Family<PlaceLabels, Counter>,
    out_of_order: Family<PlaceLabels, Counter>,
    zero_windows: Family<SenderLabels, Counter>,
}

impl ConnectionMetrics {
    /// Makes and registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let delays: fn() -> Histogram = || Histogram::new(DELAY_BUCKETS);
        let trips: fn() -> Histogram = || Histogram::new(ROUND_TRIP_BUCKETS);
        let lives: fn() -> Histogram = || Histogram::new(LIFE_BUCKETS);
        let segments: fn() -> Histogram = || Histogram::new(RETRANSMIT_BUCKETS);
        let metrics = Self {
            events: Family::default(),
            delay: Family::new_with_constructor(delays),
            opened: Family::default(),
            closed: Family::default(),
            handshake: Family::new_with_constructor(trips),
            rtt: Family::new_with_constructor(trips),
            min_rtt: Family::new_with_constructor(trips),
            life: Family::new_with_constructor(lives),
            retransmits: Family::new_with_constructor(segments),
            lost: Family::default(),
            out_of_order: Family::default(),
            zero_windows: Family::default(),
        };
        registry.register(
            "edgemeter_kernel_events",
            "Events the kernel programs reported, by kind",
            metrics.events.clone(),
        );
        registry.register_with_unit(
            "edgemeter_kernel_event_delay",
            "From the event in the kernel to its being counted here",
            Unit::Seconds,
            metrics.delay.clone(),
        );
        registry.register(
            "edgemeter_connections_opened",
            "TCP connections whose handshake was done, by leg and listener or upstream",
            metrics.opened.clone(),
        );
        registry.register(
            "edgemeter_connections_closed",
            "TCP connections that are over or never came about, by how they ended",
            metrics.closed.clone(),
        );
        registry.register_with_unit(
            "edgemeter_connection_handshake",
            "SYN to SYN-ACK of connections opened here, SYN-ACK to ACK of accepted ones",
            Unit::Seconds,
            metrics.handshake.clone(),
        );
        registry.register_with_unit(
            "edgemeter_connection_rtt",
            "The kernel's smoothed round-trip time at the end of each connection",
            Unit::Seconds,
            metrics.rtt.clone(),
        );
        registry.register_with_unit(
            "edgemeter_connection_min_rtt",
            "The kernel's minimum round-trip time at the end of each connection",
            Unit::Seconds,
            metrics.min_rtt.clone(),
        );
        registry.register_with_unit(
            "edgemeter_connection_life",
            "From the SYN (opened here) or the handshake (accepted) to the end",
            Unit::Seconds,
            metrics.life.clone(),
        );
        registry.register(
            "edgemeter_connection_retransmits",
            "Segments each connection sent again",
            metrics.retransmits.clone(),
        );
        registry.register(
            "edgemeter_connection_lost_segments",
            "Segments marked lost on connections that are over",
            metrics.lost.clone(),
        );
        registry.register(
            "edgemeter_connection_out_of_order_segments",
            "Segments received out of order on connections that are over",
            metrics.out_of_order.clone(),
        );
        registry.register(
            "edgemeter_connection_zero_windows",
            "Frames that said window 0 on connections that are over, by who sent them",
            metrics.zero_windows.clone(),
        );
        for event in kind::NAMES.into_iter().skip(1) {
            let labels = EventLabels { event };
            let _ = metrics.events.get_or_create(&labels);
            let _ = metrics.delay.get_or_create(&labels);
        }
        metrics
    }

    /// An event came, so long after it happened.
    pub fn event(&self, number: u32, delay_ns: u64) {
        let Some(event) = usize::try_from(number)
            .ok()
            .and_then(|number| kind::NAMES.get(number))
        else {
            return;
        };
        let labels = EventLabels { event };
        self.events.get_or_create(&labels).inc();
        self.delay
            .get_or_create(&labels)
            .observe(Duration::from_nanos(delay_ns).as_secs_f64());
    }

    /// A handshake is done.
    pub fn opened(&self, place: &Place) {
        self.opened.get_or_create(&labels(place)).inc();
    }

    /// A connection is over.
    pub fn closed(&self, place: &Place, end: End, connection: &Connection) {
        let labels = labels(place);
        let PlaceLabels { leg, endpoint } = labels.clone();
        self.closed
            .get_or_create(&EndLabels {
                leg,
                endpoint: endpoint.clone(),
                end: end.as_str(),
            })
            .inc();
        let microseconds = |histograms: &Histograms<PlaceLabels>, value: u32| {
            if value != 0 {
                let value = Duration::from_micros(value.into());
                histograms
                    .get_or_create(&labels)
                    .observe(value.as_secs_f64());
            }
        };
        microseconds(&self.handshake, connection.handshake_us);
        microseconds(&self.rtt, connection.srtt_us);
        microseconds(&self.min_rtt, connection.min_rtt_us);
        if connection.established_ns == 0 {
            return;
        }
        let life = connection.closed_ns.saturating_sub(connection.opened_ns);
        self.life
            .get_or_create(&labels)
            .observe(Duration::from_nanos(life).as_secs_f64());
        self.retransmits
            .get_or_create(&labels)
            .observe(connection.retransmits.into());
        for (family, value) in [
            (&self.lost, connection.lost),
            (&self.out_of_order, connection.out_of_order),
        ] {
            let counter = family.get_or_create(&labels);
            if value != UNKNOWN {
                counter.inc_by(value.into());
            }
        }
        for (sender, value) in [
            ("host", connection.zero_windows_sent),
            ("peer", connection.zero_windows_received),
        ] {
            self.zero_windows
                .get_or_create(&SenderLabels {
                    leg,
                    endpoint: endpoint.clone(),
                    sender,
                })
                .inc_by(value.into());
        }
    }
}

fn labels(place: &Place) -> PlaceLabels {
    PlaceLabels {
        leg: leg_word(place.leg),
        endpoint: place.endpoint.to_string(),
    }
}

/// What the kernel's own tables hold, read at each scrape.
pub struct KernelTables(pub Arc<Connections>);

impl std::fmt::Debug for KernelTables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KernelTables")
    }
}

impl Collector for KernelTables {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let connections = &self.0;
        let mut open = out.encode_descriptor(
            "edgemeter_connections_open",
            "TCP connections under way, by leg and listener or upstream",
            None,
            MetricType::Gauge,
        )?;
        for (place, count) in connections.open_by_place() {
            ConstGauge::new(count.cast_signed()).encode(open.encode_family(&labels(&place))?)?;
        }
        let mut lost = out.encode_descriptor(
            "edgemeter_kernel_events_lost",
            "Events lost because the ring buffer was full; connections are collected all the same",
            None,
            MetricType::Counter,
        )?;
        let counts = connections.events_lost();
        for (event, count) in kind::NAMES.into_iter().zip(counts).skip(1) {
            ConstCounter::new(count).encode(lost.encode_family(&EventLabels { event })?)?;
        }
        ConstCounter::new(connections.table_full()).encode(out.encode_descriptor(
            "edgemeter_connection_table_full",
            "Connections that found the kernel's connection table full: not shown, their bytes are counted",
            None,
            MetricType::Counter,
        )?)?;
        let mut drops = std::collections::BTreeMap::new();
        for (key, count) in connections.drops() {
            let namespace = connections.namespace(key.namespace);
            let reason = connections.drop_reason(key.reason);
            let sum = drops.entry((namespace, reason)).or_insert((0, 0));
            sum.0 += count.frames;
            sum.1 += count.bytes;
        }
        let mut frames = out.encode_descriptor(
            "edgemeter_dropped_frames",
            "Buffers this host threw away, by network namespace and the kernel's reason",
            None,
            MetricType::Counter,
        )?;
        for ((namespace, reason), (count, _)) in &drops {
            let labels = DropLabels {
                namespace: namespace.clone(),
                reason: reason.clone(),
            };
            ConstCounter::new(*count).encode(frames.encode_family(&labels)?)?;
        }
        let mut bytes = out.encode_descriptor(
            "edgemeter_dropped",
            "Bytes of the buffers in edgemeter_dropped_frames, with the headers that were still in front",
            Some(&Unit::Bytes),
            MetricType::Counter,
        )?;
        for ((namespace, reason), (_, count)) in &drops {
            let labels = DropLabels {
                namespace: namespace.clone(),
                reason: reason.clone(),
            };
            ConstCounter::new(*count).encode(bytes.encode_family(&labels)?)?;
        }
        let mut features = out.encode_descriptor(
            "edgemeter_kernel_feature_up",
            "1 when this kernel lets the feature work; /readyz says why not",
            None,
            MetricType::Gauge,
        )?;
        for Feature { name, result, .. } in &connections.features {
            let labels = FeatureLabels { feature: name };
            ConstGauge::new(i64::from(result.is_ok())).encode(features.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
