//! Gauges that are read when they are asked for: the cache's tiers, open connections, and the
//! peers behind the desync alarm.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

use flow_abi::Direction;

use crate::{cache::Level, config::ListenerIndex, owner::Leg, proxy::Shared, socket_filter};

/// Peers that get a series of their own.
const PEERS_SHOWN: usize = 20;

/// Reads them.
pub struct LevelMetrics(pub Arc<Shared>);

impl std::fmt::Debug for LevelMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LevelMetrics")
    }
}

impl Collector for LevelMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (memory, disk) = self.0.cache.store.levels();
        let tiers = [("memory", memory), ("disk", disk.unwrap_or_default())];
        let mut gauge = |name, help, unit: Option<&Unit>, value: fn(&Level) -> u64| {
            let mut family = out.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            for (tier, level) in &tiers {
                let value = i64::try_from(value(level)).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(family.encode_family(&[("tier", *tier)])?)?;
            }
            Ok::<(), std::fmt::Error>(())
        };
        gauge(
            "edgemeter_cache_objects",
            "Responses in the cache",
            None,
            |level| level.objects,
        )?;
        gauge(
            "edgemeter_cache_size",
            "Bytes the cache takes",
            Some(&Unit::Bytes),
            |level| level.bytes,
        )?;
        let mut family = out.encode_descriptor(
            "edgemeter_cache_evictions",
            "Responses forgotten to make room",
            None,
            MetricType::Counter,
        )?;
        for (tier, level) in &tiers {
            ConstCounter::new(level.evictions).encode(family.encode_family(&[("tier", *tier)])?)?;
        }
        let mut family = out.encode_descriptor(
            "edgemeter_client_connections",
            "Client connections open now, by listener",
            None,
            MetricType::Gauge,
        )?;
        let generation = self.0.generation.load();
        for (index, listener) in generation.config.listeners.iter().enumerate() {
            let open = self.0.gate.open(ListenerIndex(index));
            let open = i64::try_from(open).unwrap_or(i64::MAX);
            let label = [("listener", listener.name.as_str())];
            ConstGauge::new(open).encode(family.encode_family(&label)?)?;
        }
        if let Some(prices) = &generation.config.prices
            && let Some(price) = prices.find(Leg::Upstream, Direction::Rx)
        {
            let mut family = out.encode_descriptor(
                "edgemeter_cache_saved_nanos",
                "What the bytes the cache saved would have cost on the way from the service, at the price in force",
                None,
                MetricType::Gauge,
            )?;
            let currency = prices.currency.to_string();
            let routes = generation.config.routes.iter();
            for route in routes.filter(|route| route.policy.cache.is_some()) {
                let saved = self.0.edge.cache_saved(route.name.as_str());
                let nanos = price.rate.settle(price.rate.exact(saved)).0;
                let label = [("route", route.name.as_str()), ("currency", &*currency)];
                ConstGauge::new(i64::try_from(nanos).unwrap_or(i64::MAX))
                    .encode(family.encode_family(&label)?)?;
            }
        }
        let mut family = out.encode_descriptor(
            "edgemeter_listener_kernel_drops",
            "Packets the kernel dropped at a listening socket with an access list in the kernel: by the list, or a full accept queue",
            None,
            MetricType::Counter,
        )?;
        let listeners = generation.config.listeners.iter();
        for listener in listeners.filter(|listener| listener.protection.access.kernel) {
            let drops = socket_filter::drops(listener.address).unwrap_or_default();
            let label = [("listener", listener.name.as_str())];
            ConstCounter::new(drops).encode(family.encode_family(&label)?)?;
        }
        let (top, lost) = self.0.alarm.top(PEERS_SHOWN);
        let mut family = out.encode_descriptor(
            "edgemeter_desync_peer",
            "Bytes in no request of the peers that sent the most; others have no series",
            Some(&Unit::Bytes),
            MetricType::Gauge,
        )?;
        for (peer, share) in top {
            let bytes = i64::try_from(share.bytes).unwrap_or(i64::MAX);
            let label = [("peer", peer.to_string())];
            ConstGauge::new(bytes).encode(family.encode_family(&label)?)?;
        }
        let mut family = out.encode_descriptor(
            "edgemeter_desync_peers_lost",
            "Peers of the desync alarm forgotten to make room for others",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(lost).encode(family.encode_family(&[("kind", "peer")])?)
    }
}
