//! Which peer gets an attempt.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::feed::SHARE_WHOLE;
use super::limits::Refused;
use super::{Attempt, Peer, Peers, Pool, ring};
use crate::config::Balance;

impl Pool {
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
