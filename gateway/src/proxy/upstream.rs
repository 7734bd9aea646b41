//! Route to peer: who gets the next request, and who gets none.
//!
//! Three things keep a peer from requests: ejection (it failed in a row: for the base time, then for
//! twice as long, up to the maximum, until it answers), an active check, and the kernel's verdict
//! ([`feed`]), which lowers its share or ejects it. When less than the panic threshold of the peers
//! is left, all of them are used: a wrong guess about health must not become an outage.
//!
//! Time is an argument. [`check`] asks the peers, [`limits`] refuses what would only queue.

pub mod check;
pub mod feed;
pub mod limits;
mod ring;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::rotation::Rotation;
use crate::config::{self, Balance, PeerAddress};
use crate::export::UpstreamSeries;
use feed::{PeerHealth, PeerSample, SHARE_WHOLE};
use limits::{Admission, Budget, Gate, Refused};
use ring::Ring;

/// One server, for as long as its address stays in the pool.
#[derive(Debug)]
pub struct Peer {
    /// Where to connect.
    pub address: SocketAddr,
    weight: u64,
    /// Requests under way.
    active: AtomicU32,
    /// The kernel's verdict, of [`SHARE_WHOLE`].
    share: AtomicU32,
    health: Mutex<Health>,
    /// What it counts.
    pub counts: PeerCounts,
}

/// Cumulative, for metrics.
#[derive(Debug, Default)]
pub struct PeerCounts {
    /// Times it was picked.
    pub picks: AtomicU64,
    /// Ejections by [`Cause`].
    pub ejections: [AtomicU64; Cause::ALL.len()],
    /// Active checks: good, bad.
    pub checks: [AtomicU64; 2],
}

/// Why a peer was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It could not be connected to, or connections broke.
    Connect,
    /// It answered 500 or above.
    ServerError,
    /// The kernel saw resets or loss beyond use.
    Kernel,
}

impl Cause {
    /// All of them, in the order of [`PeerCounts::ejections`].
    pub const ALL: [Self; 3] = [Self::Connect, Self::ServerError, Self::Kernel];

    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ServerError => "server_error",
            Self::Kernel => "kernel",
        }
    }
}

#[derive(Debug, Default)]
struct Health {
    connect_failures: u32,
    server_errors: u32,
    /// How long the last ejection lasted; zero after a success.
    ejection: Duration,
    ejected_until: Option<Instant>,
    /// Active checks in a row: good ones positive, bad ones negative.
    checks: i64,
    /// By active check.
    down: bool,
    kernel: PeerHealth,
}

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

/// A peer as operators see it.
#[derive(Clone, Copy, Debug)]
pub struct PeerState {
    /// Requests under way.
    pub active: u32,
    /// Neither ejected nor down.
    pub available: bool,
    /// The kernel's verdict, of [`SHARE_WHOLE`].
    pub share: u32,
    /// What it is based on.
    pub kernel: PeerHealth,
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

    /// The peer for an attempt: one that was not `tried`, if there is one; `key` is the hash of
    /// what the balance goes by. The attempt counts as under way until it is dropped.
    ///
    /// # Errors
    /// A limit is reached, or a name has not been resolved yet.
    pub fn pick(
        self: &Arc<Self>,
        key: Option<u64>,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Result<Attempt, Refused> {
        let peers = self.peers.load();
        let all = peers.list.len();
        if all == 0 {
            return Err(self.gate.refuse(Refused::Unresolved));
        }
        if tried.is_empty()
            && self.all_available(now)
            && let Some(peer) = self.pick_of_all(key, &peers)
        {
            return self.begin(peer);
        }
        let usable: Vec<bool> = peers
            .list
            .iter()
            .map(|peer| peer.is_available(now))
            .collect();
        let left = usable.iter().filter(|usable| **usable).count();
        let threshold = usize::try_from(self.settings.ejection.panic_percent).unwrap_or(100);
        let panic = left == 0 || left * 100 < all * threshold;
        if panic {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
        let untried = |peer: &Arc<Peer>| !tried.contains(&peer.address);
        let healthy: Vec<usize> = (0..all)
            .filter(|&at| (panic || usable[at]) && untried(&peers.list[at]))
            .collect();
        // A peer that was tried in vain is never better than an ejected one that was not.
        let mut candidates = healthy;
        if candidates.is_empty() {
            candidates = (0..all).filter(|&at| untried(&peers.list[at])).collect();
        }
        if candidates.is_empty() {
            candidates = (0..all).collect();
        }
        let limit = self.settings.limits.per_peer;
        let active = |at: usize| peers.list[at].active.load(Ordering::Relaxed);
        candidates.retain(|&at| active(at) < limit);
        let chosen = match (&self.settings.balance, key, &peers.ring) {
            (Balance::Hash(_), Some(key), Some(ring)) => {
                ring.walk(key).find(|at| candidates.contains(at))
            }
            (Balance::RoundRobin, ..) => {
                let weights = candidates
                    .iter()
                    .map(|&at| peers.list[at].effective_weight());
                self.turns.pick(weights).map(|at| candidates[at])
            }
            _ => self.less_busy(&candidates, &peers.list),
        };
        let Some(peer) = chosen.and_then(|at| peers.list.get(at)) else {
            return Err(self.gate.refuse(Refused::PerPeer));
        };
        self.begin(peer)
    }

    /// Whether every peer is: then there is nothing to look at them one by one for.
    fn all_available(&self, now: Instant) -> bool {
        let now_us = now.saturating_duration_since(self.born).as_micros();
        self.down.load(Ordering::Relaxed) == 0
            && u128::from(self.ejected_until.load(Ordering::Relaxed)) < now_us
    }

    /// The peer for an attempt where all are available, without looking at each. None where the
    /// chosen one is at its limit, or the balance needs them all.
    fn pick_of_all<'p>(&self, key: Option<u64>, peers: &'p Peers) -> Option<&'p Arc<Peer>> {
        let list = &peers.list;
        let at = match (&self.settings.balance, key, &peers.ring) {
            _ if list.len() == 1 => 0,
            (Balance::Hash(_), Some(key), Some(ring)) => ring.walk(key).next()?,
            (Balance::RoundRobin, ..) => {
                let turns = peers.turns.as_deref().filter(|turns| !turns.is_empty())?;
                if self.lowered.load(Ordering::Relaxed) {
                    return None;
                }
                let turn = usize::try_from(self.turns.turn()).unwrap_or(0);
                usize::try_from(turns[turn % turns.len()]).ok()?
            }
            _ => {
                if self.lowered.load(Ordering::Relaxed) {
                    return None;
                }
                let first = self.random(list.len())?;
                let second = self.random(list.len() - 1)?;
                let second = if second == first {
                    list.len() - 1
                } else {
                    second
                };
                less_busy(list, first, second)
            }
        };
        let peer = &list[at];
        (peer.active.load(Ordering::Relaxed) < self.settings.limits.per_peer).then_some(peer)
    }

    fn begin(self: &Arc<Self>, peer: &Arc<Peer>) -> Result<Attempt, Refused> {
        self.gate.wait()?;
        peer.active.fetch_add(1, Ordering::Relaxed);
        peer.counts.picks.fetch_add(1, Ordering::Relaxed);
        Ok(Attempt {
            pool: Arc::clone(self),
            peer: Arc::clone(peer),
            waiting: true,
        })
    }

    /// Power of two choices: of two at random, the one with less under way for its weight.
    fn less_busy(&self, candidates: &[usize], peers: &[Arc<Peer>]) -> Option<usize> {
        let lowered = |&at: &usize| peers[at].share.load(Ordering::Relaxed) != SHARE_WHOLE;
        if candidates.iter().any(lowered) {
            return self.less_busy_by_share(candidates, peers);
        }
        let first = *candidates.get(self.random(candidates.len())?)?;
        if candidates.len() == 1 {
            return Some(first);
        }
        let others: usize = candidates.len() - 1;
        let mut second = self.random(others)?;
        if candidates[second] == first {
            second = others;
        }
        Some(less_busy(peers, first, candidates[second]))
    }

    /// The same where the kernel has lowered a share: a peer comes into the choice as often as its
    /// share allows. Comparing what is under way would do otherwise: with little under way a
    /// lowered peer would get nothing at all, nobody would see that it is well again, and the
    /// first to forgive it would send it a burst.
    fn less_busy_by_share(&self, candidates: &[usize], peers: &[Arc<Peer>]) -> Option<usize> {
        let whole: u64 = candidates
            .iter()
            .map(|&at| peers[at].effective_weight())
            .sum();
        let draw = || {
            let mut ticket = self.random(usize::try_from(whole).ok()?)? as u64;
            let weight_of = |at: usize| peers[at].effective_weight();
            let drawn = candidates.iter().copied().find(|&at| {
                let weight = weight_of(at);
                let found = ticket < weight;
                ticket = ticket.saturating_sub(weight);
                found
            });
            drawn.or_else(|| candidates.last().copied())
        };
        let first = draw()?;
        // Another one to compare with, unless it is rare.
        let second = (0..2).filter_map(|_| draw()).find(|&at| at != first);
        let second = second.unwrap_or(first);
        let load = |at: usize| u64::from(peers[at].active.load(Ordering::Relaxed)) + 1;
        let left = u128::from(load(first)) * u128::from(peers[second].weight);
        let right = u128::from(load(second)) * u128::from(peers[first].weight);
        Some(if left <= right { first } else { second })
    }

    /// A number below the bound; `None` for 0. A Weyl sequence through a mixer: no lock.
    fn random(&self, bound: usize) -> Option<usize> {
        let step = 0x9e37_79b9_7f4a_7c15;
        let mixed = ring::mix(self.random.fetch_add(step, Ordering::Relaxed));
        usize::try_from(mixed.checked_rem(bound as u64)?).ok()
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

/// Of two, the one with less under way for its weight.
fn less_busy(peers: &[Arc<Peer>], first: usize, second: usize) -> usize {
    // a.active / a.weight < b.active / b.weight, without dividing.
    let load = |at: usize| u64::from(peers[at].active.load(Ordering::Relaxed)) + 1;
    let (a, b) = (&peers[first], &peers[second]);
    let left = u128::from(load(first)) * u128::from(b.effective_weight());
    let right = u128::from(load(second)) * u128::from(a.effective_weight());
    if left <= right { first } else { second }
}

impl Peer {
    fn new(address: SocketAddr, weight: u64) -> Self {
        Self {
            address,
            weight,
            active: AtomicU32::new(0),
            share: AtomicU32::new(SHARE_WHOLE),
            health: Mutex::default(),
            counts: PeerCounts::default(),
        }
    }

    fn effective_weight(&self) -> u64 {
        (self.weight * u64::from(self.share.load(Ordering::Relaxed))).max(1)
    }

    fn is_available(&self, now: Instant) -> bool {
        let health = self.lock();
        !health.down && !health.is_ejected(now)
    }

    /// Every step leaves it consistent, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }
}

/// A request's try at one peer: under way until dropped.
#[derive(Debug)]
pub struct Attempt {
    pool: Arc<Pool>,
    peer: Arc<Peer>,
    /// For a connection.
    waiting: bool,
}

impl Attempt {
    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.peer.address
    }

    /// Whether another peer could still be tried.
    pub fn others_left(&self, tried: &[SocketAddr]) -> bool {
        let peers = self.pool.peers.load();
        peers.list.iter().any(|peer| !tried.contains(&peer.address))
    }

    /// It has its connection. A connection taken from a pool says nothing about the peer.
    pub fn connected(&mut self, reused: bool) {
        if std::mem::take(&mut self.waiting) {
            self.pool.gate.connected();
        }
        if !reused {
            self.peer.lock().connect_failures = 0;
        }
    }

    /// It could not be connected to, or its connection broke before it had answered.
    pub fn broke(&self, now: Instant) {
        let mut health = self.peer.lock();
        // Attempts under way when the peer was ejected, or made in panic: known already.
        // Counting them would double the ejection once for each request in flight.
        if health.is_ejected(now) {
            return;
        }
        health.connect_failures = health.connect_failures.saturating_add(1);
        let most = self.pool.settings.ejection.connect_failures;
        if most > 0 && health.connect_failures >= most {
            self.pool
                .eject(&self.peer, &mut health, Cause::Connect, now);
        }
    }

    /// It answered.
    pub fn answered(&self, status: u16, now: Instant) {
        let mut health = self.peer.lock();
        health.connect_failures = 0;
        if status < 500 {
            health.server_errors = 0;
            health.ejection = Duration::ZERO;
            return;
        }
        if health.is_ejected(now) {
            return;
        }
        health.server_errors = health.server_errors.saturating_add(1);
        let most = self.pool.settings.ejection.server_errors;
        if most > 0 && health.server_errors >= most {
            health.server_errors = 0;
            self.pool
                .eject(&self.peer, &mut health, Cause::ServerError, now);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.waiting {
            self.pool.gate.connected();
        }
        self.peer.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the hash balance goes by, of any text.
pub fn hash_key(text: &[u8]) -> u64 {
    ring::hash(text)
}

#[cfg(test)]
mod tests;
