//! Route to peer: who gets the next request, and who gets none.
//!
//! Three things keep a peer from requests: ejection (it failed in a row: for the base time, then for
//! twice as long, up to the maximum, until it answers), an active check, and the kernel's verdict
//! ([`feed`]), which lowers its share or ejects it. When less than the panic threshold of the peers
//! is left, all of them are used: a wrong guess about health must not become an outage.
//!
//! Time is an argument. [`check`] asks the peers, [`limits`] refuses what would only queue.

mod attempt;
pub mod check;
pub mod feed;
pub mod limits;
mod peer;
mod pick;
mod ring;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;

use super::rotation::Rotation;
use crate::config::{self, Balance, PeerAddress};
use crate::export::UpstreamSeries;
use feed::{PeerHealth, PeerSample, SHARE_WHOLE};
use limits::{Admission, Budget, Gate, Refused};
use peer::Health;
use ring::Ring;

pub use attempt::Attempt;
pub use peer::{Cause, Peer, PeerCounts, PeerState};

/// The peers of one upstream. Shared between threads.
#[derive(Debug)]
pub struct Pool {
    /// Its configuration.
    pub settings: config::Upstream,
    peers: ArcSwap<Peers>,
    turns: Rotation,
    random: AtomicU64,
    /// Peers that fail their check.
    down: AtomicUsize,
    /// Until then a peer is ejected, microseconds since `born`.
    ejected_until: AtomicU64,
    born: Instant,
    /// The kernel's verdict lowers some peer's share.
    lowered: AtomicBool,
    gate: Arc<Gate>,
    /// Of retries.
    pub budget: Budget,
    /// Picks while too few peers were left.
    pub panics: AtomicU64,
    /// Its request metrics.
    pub series: UpstreamSeries,
    started: AtomicBool,
}

#[derive(Debug, Default)]
struct Peers {
    list: Vec<Arc<Peer>>,
    ring: Option<Ring>,
    /// Whose turn it is while the kernel lowers nobody's share.
    turns: Option<Box<[u32]>>,
}

impl Pool {
    /// All peers healthy. Peers with names are added by [`resolve`](Self::resolve).
    pub fn new(upstream: &config::Upstream) -> Self {
        let pool = Self {
            settings: upstream.clone(),
            peers: ArcSwap::default(),
            turns: Rotation::default(),
            random: AtomicU64::new(std::process::id().into()),
            down: AtomicUsize::new(0),
            ejected_until: AtomicU64::new(0),
            born: Instant::now(),
            lowered: AtomicBool::new(false),
            gate: Arc::new(Gate::new(&upstream.limits)),
            budget: Budget::new(&upstream.retry),
            panics: AtomicU64::new(0),
            series: UpstreamSeries::default(),
            started: AtomicBool::new(false),
        };
        pool.resolve(&HashMap::new());
        pool
    }

    /// True the first time it is asked: whoever asked starts the checks.
    pub fn start(&self) -> bool {
        !self.started.swap(true, Ordering::Relaxed)
    }

    /// Whether any peer is given by name.
    pub fn has_names(&self) -> bool {
        let mut peers = self.settings.peers.iter();
        peers.any(|peer| matches!(peer.address, PeerAddress::Name { .. }))
    }

    /// The addresses that names lead to now: each is a peer. A name that is not among them keeps
    /// what it had. Peers whose address stays keep what is known about them.
    pub fn resolve(&self, names: &HashMap<(Box<str>, u16), Vec<SocketAddr>>) {
        let mut wanted: Vec<(SocketAddr, u64)> = Vec::new();
        for peer in &self.settings.peers {
            let weight = u64::from(peer.weight.get());
            match &peer.address {
                PeerAddress::Socket(address) => wanted.push((*address, weight)),
                PeerAddress::Name { host, port } => {
                    let found = names.get(&(host.clone(), *port));
                    wanted.extend(found.into_iter().flatten().map(|at| (*at, weight)));
                }
            }
        }
        let known = self.peers.load();
        let mut list: Vec<Arc<Peer>> = Vec::new();
        for (address, weight) in wanted {
            if list.iter().any(|peer| peer.address == address) {
                continue;
            }
            let same = |peer: &&Arc<Peer>| peer.address == address && peer.weight == weight;
            let kept = known.list.iter().find(same).cloned();
            list.push(kept.unwrap_or_else(|| Arc::new(Peer::new(address, weight))));
        }
        let ring = matches!(self.settings.balance, Balance::Hash(_))
            .then(|| Ring::new(list.iter().map(|peer| (peer.address, peer.weight))));
        let turns = matches!(self.settings.balance, Balance::RoundRobin)
            .then(|| Rotation::round(list.iter().map(|peer| peer.weight)))
            .flatten();
        self.peers.store(Arc::new(Peers { list, ring, turns }));
        self.recount();
    }

    /// The addresses of all peers.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let peers = self.peers.load();
        peers.list.iter().map(|peer| peer.address).collect()
    }

    /// The peers, for checks and metrics.
    pub fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.load().list.clone()
    }

    /// A request begins. Refused at the limit of requests.
    ///
    /// # Errors
    /// The limit is reached.
    pub fn admit(&self) -> Result<Admission, Refused> {
        self.budget.deposit();
        Admission::new(&self.gate)
    }

    /// Requests refused so far, by reason.
    pub fn refused(&self) -> impl Iterator<Item = (Refused, u64)> {
        self.gate.refused()
    }

    /// What the kernel saw of the peers' connections since the last time.
    pub fn observe(&self, samples: &HashMap<SocketAddr, PeerSample>, now: Instant) {
        if !self.settings.kernel_informed {
            return;
        }
        let peers = self.peers.load();
        let mut verdicts: Vec<PeerHealth> = Vec::new();
        for peer in &peers.list {
            let mut health = peer.lock();
            let sample = samples.get(&peer.address).copied().unwrap_or_default();
            health.kernel.observe(&sample);
            verdicts.push(health.kernel);
        }
        let mut lowered = false;
        let best_rtt = verdicts.iter().filter_map(PeerHealth::rtt_us).min();
        for (peer, verdict) in peers.list.iter().zip(&verdicts) {
            let share = verdict.share(best_rtt);
            peer.share.store(share, Ordering::Relaxed);
            lowered |= share != SHARE_WHOLE;
            if verdict.is_beyond_use() && peers.list.len() > 1 {
                let mut health = peer.lock();
                if !health.is_ejected(now) {
                    self.eject(peer, &mut health, Cause::Kernel, now);
                }
            }
        }
        self.lowered.store(lowered, Ordering::Relaxed);
    }

    /// An active check ended.
    pub fn checked(&self, peer: &Peer, good: bool) {
        let Some(check) = &self.settings.check else {
            return;
        };
        peer.counts.checks[usize::from(!good)].fetch_add(1, Ordering::Relaxed);
        let mut health = peer.lock();
        if good {
            health.checks = health.checks.max(0) + 1;
            if health.checks >= i64::from(check.healthy) && health.down {
                health.down = false;
                log::info!("{} {} is healthy again", self.settings.name, peer.address);
            }
        } else {
            health.checks = health.checks.min(0) - 1;
            if -health.checks >= i64::from(check.unhealthy) && !health.down {
                health.down = true;
                log::warn!("{} {} fails its check", self.settings.name, peer.address);
            }
        }
        drop(health);
        self.recount();
    }

    /// Counts the peers that fail their check.
    fn recount(&self) {
        let peers = self.peers.load();
        let down = peers.list.iter().filter(|peer| peer.lock().down).count();
        self.down.store(down, Ordering::Relaxed);
    }

    /// The state of every peer.
    pub fn states(&self, now: Instant) -> Vec<(Arc<Peer>, PeerState)> {
        let peers = self.peers.load();
        let state = |peer: &Arc<Peer>| {
            let kernel = peer.lock().kernel;
            PeerState {
                active: peer.active.load(Ordering::Relaxed),
                available: peer.is_available(now),
                share: peer.share.load(Ordering::Relaxed),
                kernel,
            }
        };
        peers
            .list
            .iter()
            .map(|peer| (Arc::clone(peer), state(peer)))
            .collect()
    }

    fn eject(&self, peer: &Peer, health: &mut Health, cause: Cause, now: Instant) {
        let ejection = &self.settings.ejection;
        health.ejection = (health.ejection * 2).clamp(ejection.base, ejection.max);
        let until = now + health.ejection;
        health.ejected_until = Some(until);
        let until_us = until.saturating_duration_since(self.born).as_micros();
        let until_us = u64::try_from(until_us).unwrap_or(u64::MAX);
        self.ejected_until.fetch_max(until_us, Ordering::Relaxed);
        peer.counts.ejections[cause as usize].fetch_add(1, Ordering::Relaxed);
        log::warn!(
            "{} {} is ejected for {:?} ({})",
            self.settings.name,
            peer.address,
            health.ejection,
            cause.as_str()
        );
    }
}

/// What the hash balance goes by, of any text.
pub fn hash_key(text: &[u8]) -> u64 {
    ring::hash(text)
}
