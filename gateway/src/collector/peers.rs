//! What the kernel saw of the connections to each upstream peer since the last look. Plain values:
//! the proxy's balancing knows nothing of the kernel.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{Ipv6Addr, SocketAddr},
};

use flow_abi::{FlowCounters, FlowKey, flow_flag};

use crate::proxy::upstream::feed::PeerSample;

/// What the cumulative counters were at the last look.
#[derive(Debug, Default)]
pub struct PeerFlows {
    seen: HashMap<FlowKey, Seen>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    sent_frames: u64,
    retransmitted_frames: u64,
    reset: bool,
}

/// Sums of one look.
#[derive(Debug, Default)]
pub struct Look {
    samples: HashMap<SocketAddr, PeerSample>,
    /// Sum and number of round-trip times.
    rtts: HashMap<SocketAddr, (u64, u64)>,
}

impl PeerFlows {
    /// Asks for the flows that are known, and forgets those that are gone.
    ///
    /// # Errors
    /// What asking answered; the flows asked for before are in the look.
    pub fn follow(
        &mut self,
        look: &mut Look,
        peers: &HashSet<SocketAddr>,
        ask: impl Fn(&FlowKey) -> io::Result<Option<FlowCounters>>,
    ) -> io::Result<()> {
        let mut failed = Ok(());
        self.seen.retain(|key, seen| {
            if failed.is_err() {
                return true;
            }
            match ask(key) {
                Ok(Some(flow)) if peers.contains(&remote(key)) => {
                    look.add(remote(key), seen, &flow);
                    true
                }
                Ok(_) => false,
                Err(error) => {
                    failed = Err(error);
                    true
                }
            }
        });
        failed
    }

    /// A flow that the walk met. One met for the first time counts whole: it began since.
    pub fn visit(
        &mut self,
        look: &mut Look,
        peers: &HashSet<SocketAddr>,
        key: &FlowKey,
        flow: &FlowCounters,
    ) {
        let remote = remote(key);
        if peers.contains(&remote) {
            look.add(remote, self.seen.entry(*key).or_default(), flow);
        }
    }
}

impl Look {
    fn add(&mut self, peer: SocketAddr, seen: &mut Seen, flow: &FlowCounters) {
        let now = Seen {
            sent_frames: flow.tx_frames,
            retransmitted_frames: flow.tx_retransmit_frames,
            reset: flow.flags & flow_flag::RST != 0,
        };
        let before = std::mem::replace(seen, now);
        let sent = now.sent_frames.saturating_sub(before.sent_frames);
        let sample = self.samples.entry(peer).or_default();
        sample.sent_frames += sent;
        let retransmitted = now.retransmitted_frames;
        sample.retransmitted_frames += retransmitted.saturating_sub(before.retransmitted_frames);
        // A connection that was answered and then reset; a refused one is the proxy's to notice.
        sample.resets += u64::from(now.reset && !before.reset && flow.srtt_us > 0);
        if sent > 0 && flow.srtt_us > 0 {
            let (sum, count) = self.rtts.entry(peer).or_default();
            *sum += u64::from(flow.srtt_us);
            *count += 1;
        }
    }

    /// The look is over.
    pub fn samples(self) -> HashMap<SocketAddr, PeerSample> {
        let mut samples = self.samples;
        for (peer, (sum, count)) in self.rtts {
            let sample = samples.entry(peer).or_default();
            sample.rtt_us = u32::try_from(sum / count).unwrap_or(u32::MAX);
        }
        samples
    }
}

fn remote(key: &FlowKey) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::from(key.remote).to_canonical(), key.remote_port)
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
        let mut look_at = |all: &[(FlowKey, FlowCounters)], met: &[usize]| {
            let table: HashMap<_, _> = all.iter().copied().collect();
            let mut look = Look::default();
            flows
                .follow(&mut look, &peers, |key| Ok(table.get(key).copied()))
                .unwrap();
            for &at in met {
                flows.visit(&mut look, &peers, &all[at].0, &all[at].1);
            }
            (look.samples().get(&peer).copied(), flows.seen.len())
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
        assert_eq!(look_at(&first, &[0, 1]), (sample(100, 1, 0, 200), 1));
        let second = [
            (key(9000, 1), flow(150, 3, 300, 0)),
            (key(9000, 2), flow(10, 0, 100, flow_flag::RST)),
        ];
        // The walk has not come to the new one yet; the known one is asked for.
        assert_eq!(look_at(&second, &[]), (sample(50, 2, 0, 300), 1));
        assert_eq!(look_at(&second, &[0, 1]), (sample(10, 0, 1, 100), 2));
        assert_eq!(look_at(&second, &[0, 1]), (sample(0, 0, 0, 0), 2));
        assert_eq!(look_at(&[], &[]), (None, 0));
    }
}
