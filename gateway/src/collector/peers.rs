//! What the kernel saw of the connections to each upstream peer since the last look. Plain values:
//! the proxy's balancing knows nothing of the kernel.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv6Addr, SocketAddr},
};

use flow_abi::{FlowCounters, FlowKey, flow_flag};

use crate::proxy::upstream::feed::PeerSample;

/// What the cumulative counters were at the last look.
#[derive(Debug, Default)]
pub struct PeerFlows {
    seen: HashMap<FlowKey, Seen>,
    look: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    sent_frames: u64,
    retransmitted_frames: u64,
    reset: bool,
    look: u64,
}

/// Sums of one look.
#[derive(Debug, Default)]
pub struct Look {
    samples: HashMap<SocketAddr, PeerSample>,
    /// Sum and number of round-trip times.
    rtts: HashMap<SocketAddr, (u64, u64)>,
}

impl PeerFlows {
    /// A flow of this look. A flow met for the first time counts whole: it began since.
    pub fn visit(
        &mut self,
        look: &mut Look,
        peers: &HashSet<SocketAddr>,
        key: &FlowKey,
        flow: &FlowCounters,
    ) {
        let remote = Ipv6Addr::from(key.remote).to_canonical();
        let remote = SocketAddr::new(remote, key.remote_port);
        if !peers.contains(&remote) {
            return;
        }
        let now = Seen {
            sent_frames: flow.tx_frames,
            retransmitted_frames: flow.tx_retransmit_frames,
            reset: flow.flags & flow_flag::RST != 0,
            look: self.look + 1,
        };
        let before = self.seen.insert(*key, now).unwrap_or(Seen {
            sent_frames: 0,
            retransmitted_frames: 0,
            reset: false,
            look: 0,
        });
        let sent = now.sent_frames.saturating_sub(before.sent_frames);
        let sample = look.samples.entry(remote).or_default();
        sample.sent_frames += sent;
        let retransmitted = now.retransmitted_frames;
        sample.retransmitted_frames += retransmitted.saturating_sub(before.retransmitted_frames);
        // A connection that was answered and then reset; a refused one is the proxy's to notice.
        sample.resets += u64::from(now.reset && !before.reset && flow.srtt_us > 0);
        if sent > 0 && flow.srtt_us > 0 {
            let (sum, count) = look.rtts.entry(remote).or_default();
            *sum += u64::from(flow.srtt_us);
            *count += 1;
        }
    }

    /// The look is over: flows that were not met are forgotten.
    pub fn finish(&mut self, look: Look) -> HashMap<SocketAddr, PeerSample> {
        self.look += 1;
        let current = self.look;
        self.seen.retain(|_, seen| seen.look == current);
        let mut samples = look.samples;
        for (peer, (sum, count)) in look.rtts {
            let sample = samples.entry(peer).or_default();
            sample.rtt_us = u32::try_from(sum / count).unwrap_or(u32::MAX);
        }
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(remote_port: u16, local_port: u16) -> FlowKey {
        FlowKey {
            remote: std::net::Ipv4Addr::new(10, 0, 0, 2)
                .to_ipv6_mapped()
                .octets(),
            remote_port,
            local_port,
            protocol: 6,
            ..FlowKey::default()
        }
    }

    fn flow(sent: u64, retransmitted: u64, srtt_us: u32, flags: u32) -> FlowCounters {
        FlowCounters {
            tx_frames: sent,
            tx_retransmit_frames: retransmitted,
            srtt_us,
            flags,
            ..FlowCounters::default()
        }
    }

    #[test]
    fn only_what_is_new_counts() {
        let peer: SocketAddr = "10.0.0.2:9000".parse().unwrap();
        let peers = HashSet::from([peer]);
        let mut flows = PeerFlows::default();
        let mut look_at = |all: &[(FlowKey, FlowCounters)]| {
            let mut look = Look::default();
            for (key, flow) in all {
                flows.visit(&mut look, &peers, key, flow);
            }
            flows.finish(look).get(&peer).copied()
        };
        let sample = |sent, retransmitted, resets, rtt_us| {
            Some(PeerSample {
                sent_frames: sent,
                retransmitted_frames: retransmitted,
                resets,
                rtt_us,
            })
        };
        let first = [
            (key(9000, 1), flow(100, 1, 200, 0)),
            (key(9001, 1), flow(7, 7, 7, 7)),
        ];
        assert_eq!(look_at(&first), sample(100, 1, 0, 200));
        let second = [
            (key(9000, 1), flow(150, 3, 300, 0)),
            (key(9000, 2), flow(10, 0, 100, flow_flag::RST)),
        ];
        assert_eq!(look_at(&second), sample(60, 2, 1, 200));
        assert_eq!(look_at(&second), sample(0, 0, 0, 0));
        assert_eq!(look_at(&[]), None);
        assert!(flows.seen.is_empty());
    }
}
