//! Route to peer: smooth weighted round robin that avoids peers nobody can connect to.
//!
//! A peer that fails [`FAILURES_TO_EJECT`] connects in a row is ejected for [`EJECTION_MIN`]; if it
//! fails again when its time is up, for twice as long, up to [`EJECTION_MAX`]. One connect that
//! succeeds forgives everything. When every candidate is ejected the pool picks as if none was
//! (panic mode): a wrong guess about health must not become an outage.
//!
//! Only connects count. A slow or failing answer is the service's business, not the peer's address.
//! Time is an argument; deliberately absent: active checks.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config;

/// Consecutive connect failures after which a peer is ejected.
pub const FAILURES_TO_EJECT: u32 = 3;
/// How long a peer is ejected the first time.
pub const EJECTION_MIN: Duration = Duration::from_secs(1);
/// How long a peer is ejected at most.
pub const EJECTION_MAX: Duration = Duration::from_secs(30);

/// Position in [`config::Upstream::peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(pub usize);

/// A picked peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerRef {
    /// For [`Pool::report`], and for the next [`Pool::pick`] if connecting fails.
    pub index: PeerIndex,
    /// Where to connect.
    pub address: SocketAddr,
}

/// How an attempt to connect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new connection was established.
    Connected,
    /// Refused, unreachable or timed out.
    ConnectFailed,
}

/// The peers of one upstream. Shared between threads; the lock is held for a walk over the peers.
#[derive(Debug)]
pub struct Pool {
    peers: Mutex<Vec<Peer>>,
}

#[derive(Debug)]
struct Peer {
    address: SocketAddr,
    weight: i64,
    /// Smooth weighted round robin: grows by the weight at each pick, falls by the sum of the
    /// candidates' weights when picked. Bounded by that sum.
    credit: i64,
    /// Connect failures since the last success.
    failures: u32,
    /// How long the last ejection lasted; zero after a success.
    ejection: Duration,
    ejected_until: Option<Instant>,
}

impl Pool {
    /// All peers healthy.
    pub fn new(upstream: &config::Upstream) -> Self {
        let peers = upstream.peers.iter().map(|peer| Peer {
            address: peer.address,
            weight: i64::from(peer.weight.get()),
            credit: 0,
            failures: 0,
            ejection: Duration::ZERO,
            ejected_until: None,
        });
        Self {
            peers: Mutex::new(peers.collect()),
        }
    }

    /// The next peer that is not among the `tried` ones; `None` when all were tried. A peer that
    /// was tried in vain is never better than an ejected one that was not.
    pub fn pick(&self, tried: &[PeerIndex], now: Instant) -> Option<PeerRef> {
        let mut peers = self.lock();
        let untried = |index: usize| !tried.contains(&PeerIndex(index));
        let panic_mode = !peers
            .iter()
            .enumerate()
            .any(|(index, peer)| untried(index) && !peer.is_ejected(now));
        let mut total = 0;
        let mut best: Option<(i64, usize)> = None;
        for (index, peer) in peers.iter_mut().enumerate() {
            if !untried(index) || (peer.is_ejected(now) && !panic_mode) {
                continue;
            }
            peer.credit += peer.weight;
            total += peer.weight;
            // Strictly greater: among equals the first.
            if best.is_none_or(|(credit, _)| peer.credit > credit) {
                best = Some((peer.credit, index));
            }
        }
        let (_, index) = best?;
        let peer = peers.get_mut(index)?;
        peer.credit -= total;
        Some(PeerRef {
            index: PeerIndex(index),
            address: peer.address,
        })
    }

    /// What became of an attempt to connect. Connections taken from a pool are not reported: they
    /// say nothing new.
    pub fn report(&self, peer: PeerIndex, outcome: Outcome, now: Instant) {
        let mut peers = self.lock();
        let Some(peer) = peers.get_mut(peer.0) else {
            return;
        };
        match outcome {
            Outcome::Connected => {
                peer.failures = 0;
                peer.ejection = Duration::ZERO;
                peer.ejected_until = None;
            }
            // Attempts under way when the peer was ejected, or made in panic mode: known already.
            // Counting them would double the ejection once for each request in flight.
            Outcome::ConnectFailed if peer.is_ejected(now) => {}
            Outcome::ConnectFailed => {
                peer.failures = peer.failures.saturating_add(1);
                if peer.failures >= FAILURES_TO_EJECT {
                    peer.ejection = (peer.ejection * 2).clamp(EJECTION_MIN, EJECTION_MAX);
                    peer.ejected_until = Some(now + peer.ejection);
                }
            }
        }
    }

    /// How many peers are ejected now.
    pub fn ejected(&self, now: Instant) -> usize {
        let peers = self.lock();
        peers.iter().filter(|peer| peer.is_ejected(now)).count()
    }

    /// Every step leaves the peers consistent, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, Vec<Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::num::NonZeroU16;

    use super::*;

    fn pool(weights: &[u16]) -> Pool {
        let peers = weights.iter().zip(1..).map(|(&weight, port)| config::Peer {
            address: SocketAddr::from(([10, 0, 0, 1], port)),
            weight: NonZeroU16::new(weight).unwrap(),
        });
        Pool::new(&config::Upstream {
            name: config::Name::new("up").unwrap(),
            peers: peers.collect(),
            http2: false,
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(1),
            write_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(1),
            retries: 1,
        })
    }

    fn picks(pool: &Pool, count: usize, now: Instant) -> Vec<usize> {
        let pick = |_| pool.pick(&[], now).unwrap().index.0;
        (0..count).map(pick).collect()
    }

    fn fail(pool: &Pool, peer: usize, times: u32, now: Instant) {
        for _ in 0..times {
            pool.report(PeerIndex(peer), Outcome::ConnectFailed, now);
        }
    }

    #[test]
    fn weights_are_kept_and_spread() {
        let now = Instant::now();
        let pool = pool(&[5, 1, 1]);
        assert_eq!(picks(&pool, 7, now), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(picks(&pool, 7, now), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn a_pick_carries_the_address() {
        let picked = pool(&[1]).pick(&[], Instant::now()).unwrap();
        assert_eq!(picked.address.to_string(), "10.0.0.1:1");
    }

    #[test]
    fn tried_peers_are_not_picked_again() {
        let now = Instant::now();
        let pool = pool(&[9, 1]);
        let first = pool.pick(&[], now).unwrap().index;
        let second = pool.pick(&[first], now).unwrap().index;
        assert_ne!(first, second);
        assert_eq!(pool.pick(&[first, second], now), None);
    }

    #[test]
    fn three_failures_in_a_row_eject_for_a_second() {
        let now = Instant::now();
        let pool = pool(&[1, 1]);
        fail(&pool, 0, 2, now);
        pool.report(PeerIndex(0), Outcome::Connected, now);
        fail(&pool, 0, 2, now);
        assert_eq!(pool.ejected(now), 0);
        fail(&pool, 0, 1, now);
        assert_eq!(pool.ejected(now), 1);
        assert_eq!(picks(&pool, 3, now), [1, 1, 1]);
        let almost = now + EJECTION_MIN - Duration::from_nanos(1);
        assert_eq!(picks(&pool, 1, almost), [1]);
        assert!(picks(&pool, 2, now + EJECTION_MIN).contains(&0));
    }

    #[test]
    fn ejections_double_up_to_the_limit_and_success_forgives() {
        let mut now = Instant::now();
        let pool = pool(&[1, 1]);
        fail(&pool, 0, 3, now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let over = now + Duration::from_secs(seconds);
            assert_eq!(pool.ejected(over - Duration::from_nanos(1)), 1, "{seconds}");
            assert_eq!(pool.ejected(over), 0, "{seconds}");
            now = over;
            // The rest of those in flight change nothing.
            fail(&pool, 0, 50, now);
        }
        pool.report(PeerIndex(0), Outcome::Connected, now);
        assert_eq!(pool.ejected(now), 0);
        fail(&pool, 0, 3, now);
        assert_eq!(pool.ejected(now + EJECTION_MIN), 0);
    }

    #[test]
    fn when_all_are_ejected_none_is() {
        let now = Instant::now();
        let pool = pool(&[2, 1]);
        fail(&pool, 0, 3, now);
        fail(&pool, 1, 3, now);
        assert_eq!(pool.ejected(now), 2);
        assert_eq!(picks(&pool, 3, now), [0, 1, 0]);
        pool.report(PeerIndex(1), Outcome::Connected, now);
        assert_eq!(picks(&pool, 3, now), [1, 1, 1]);
        // A retry prefers an ejected peer over none.
        let retry = pool.pick(&[PeerIndex(1)], now).unwrap();
        assert_eq!(retry.index, PeerIndex(0));
    }

    #[test]
    fn a_single_peer_is_always_picked() {
        let now = Instant::now();
        let pool = pool(&[1]);
        fail(&pool, 0, 10, now);
        assert_eq!(picks(&pool, 2, now), [0, 0]);
        pool.report(PeerIndex(7), Outcome::ConnectFailed, now);
    }

    #[test]
    fn threads_share_the_rotation() {
        let now = Instant::now();
        let pool = pool(&[3, 1]);
        let all: Vec<usize> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| picks(&pool, 1_000, now)))
                .collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().unwrap())
                .collect()
        });
        let mut counts: HashMap<usize, usize> = HashMap::new();
        for peer in all {
            *counts.entry(peer).or_default() += 1;
        }
        assert_eq!(counts, HashMap::from([(0, 3_000), (1, 1_000)]));
    }
}
