//! Metrics of upstreams and their peers, read from the pools when asked for.

use std::{
    fmt::{Debug, Error, Formatter},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::proxy::{
    Shared,
    mirror::Lost,
    upstream::{Cause, Peer, PeerState, Pool},
};

/// Encodes the pools of the configuration in force.
pub struct UpstreamMetrics(pub Arc<Shared>);

impl Debug for UpstreamMetrics {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("UpstreamMetrics")
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UpstreamLabel {
    upstream: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PeerLabels {
    upstream: String,
    peer: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    upstream: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PeerReasonLabels {
    upstream: String,
    peer: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CheckLabels {
    upstream: String,
    peer: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

type States = Vec<(Arc<Peer>, PeerState)>;

impl Collector for UpstreamMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), Error> {
        let generation = self.0.generation.load_full();
        let now = Instant::now();
        let pools: Vec<(&Pool, States)> = generation
            .pools
            .iter()
            .map(|pool| (&**pool, pool.states(now)))
            .collect();
        let peers = |of: fn(&PeerState) -> i64| {
            let each = pools.iter().flat_map(move |(pool, states)| {
                states.iter().map(move |(peer, state)| {
                    let labels = PeerLabels {
                        upstream: pool.settings.name.to_string(),
                        peer: peer.address.to_string(),
                    };
                    (labels, of(state))
                })
            });
            each.collect::<Vec<_>>()
        };
        gauges(
            &mut out,
            "edgemeter_peer_active_requests",
            "Requests under way at each peer",
            peers(|state| state.active.into()),
        )?;
        gauges(
            &mut out,
            "edgemeter_peer_available",
            "1 when a peer is neither ejected nor down by its check",
            peers(|state| state.available.into()),
        )?;
        gauges(
            &mut out,
            "edgemeter_peer_kernel_share_permille",
            "Share of its weight that the kernel's view of a peer's connections leaves it",
            peers(|state| state.share.into()),
        )?;
        gauges(
            &mut out,
            "edgemeter_peer_kernel_loss_ppm",
            "Retransmitted frames per million sent to a peer, smoothed",
            peers(|state| i64::try_from(state.kernel.loss_ppm).unwrap_or(i64::MAX)),
        )?;
        gauges(
            &mut out,
            "edgemeter_peer_kernel_rtt_microseconds",
            "The kernel's smoothed round-trip time to a peer; 0 when unknown",
            peers(|state| state.kernel.rtt_us.into()),
        )?;
        self.counters(&mut out, &pools)
    }
}

impl UpstreamMetrics {
    fn counters(
        &self,
        out: &mut DescriptorEncoder<'_>,
        pools: &[(&Pool, States)],
    ) -> Result<(), Error> {
        let mut picks = Vec::new();
        let mut ejections = Vec::new();
        let mut checks = Vec::new();
        let mut refused = Vec::new();
        let mut retries = Vec::new();
        let mut panics = Vec::new();
        for (pool, states) in pools {
            let upstream = pool.settings.name.to_string();
            for (peer, _) in states {
                let counts = &peer.counts;
                let address = peer.address.to_string();
                let labels = PeerLabels {
                    upstream: upstream.clone(),
                    peer: address.clone(),
                };
                picks.push((labels, counts.picks.load(Ordering::Relaxed)));
                for (cause, count) in Cause::ALL.iter().zip(&counts.ejections) {
                    let labels = PeerReasonLabels {
                        upstream: upstream.clone(),
                        peer: address.clone(),
                        reason: cause.as_str(),
                    };
                    ejections.push((labels, count.load(Ordering::Relaxed)));
                }
                for (result, count) in ["good", "bad"].iter().zip(&counts.checks) {
                    let labels = CheckLabels {
                        upstream: upstream.clone(),
                        peer: address.clone(),
                        result,
                    };
                    checks.push((labels, count.load(Ordering::Relaxed)));
                }
            }
            for (why, count) in pool.refused() {
                let labels = ReasonLabels {
                    upstream: upstream.clone(),
                    reason: why.as_str(),
                };
                refused.push((labels, count));
            }
            let budget = &pool.budget;
            for (reason, count) in [("made", &budget.retries), ("refused", &budget.exhausted)] {
                let labels = ReasonLabels {
                    upstream: upstream.clone(),
                    reason,
                };
                retries.push((labels, count.load(Ordering::Relaxed)));
            }
            panics.push((
                UpstreamLabel { upstream },
                pool.panics.load(Ordering::Relaxed),
            ));
        }
        counters(out, "edgemeter_peer_picks", "Attempts at each peer", picks)?;
        counters(
            out,
            "edgemeter_peer_ejections",
            "Times a peer was ejected, by reason",
            ejections,
        )?;
        counters(
            out,
            "edgemeter_peer_checks",
            "Active checks, by result",
            checks,
        )?;
        counters(
            out,
            "edgemeter_upstream_refused",
            "Requests refused with 503 because a limit was reached, by limit",
            refused,
        )?;
        counters(
            out,
            "edgemeter_upstream_retries",
            "Further attempts, made or refused by the budget",
            retries,
        )?;
        counters(
            out,
            "edgemeter_upstream_panics",
            "Picks among all peers because too few were available",
            panics,
        )?;
        let mirroring = &self.0.mirroring;
        let mut copies = vec![(
            ResultLabel { result: "sent" },
            mirroring.sent.load(Ordering::Relaxed),
        )];
        for (lost, count) in Lost::ALL.iter().zip(&mirroring.lost) {
            let result = lost.as_str();
            copies.push((ResultLabel { result }, count.load(Ordering::Relaxed)));
        }
        counters(
            out,
            "edgemeter_mirror_copies",
            "Copies of mirrored requests: sent, or why not",
            copies,
        )
    }
}

fn gauges<L: EncodeLabelSet>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Vec<(L, i64)>,
) -> Result<(), Error> {
    let mut family = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn counters<L: EncodeLabelSet>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Vec<(L, u64)>,
) -> Result<(), Error> {
    let mut family = out.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
