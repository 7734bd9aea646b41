//! Rate limits: the generic cell rate algorithm, one instant a key. Exact: never more than `burst`
//! at once nor more than `requests` in each `period` on top. Pure: time is an argument.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::config::RateLimit;

const SHARDS: usize = 16;
/// Keys of one limit and shard; beyond it idle ones are dropped, then the limit is as good as
/// global for new keys.
const KEYS_MAX: usize = 16_384;

/// Nanoseconds on any monotonic clock.
pub type Nanos = u64;

/// What a limit says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the request may pass.
    pub allowed: bool,
    /// How many more could pass now.
    pub remaining: u64,
    /// Until everything is given back, or until one may pass where none may.
    pub wait: Duration,
}

/// One limit in figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Between two requests at the steady rate, in nanoseconds.
    pub interval: Nanos,
    /// How far ahead of the steady rate requests may be, in nanoseconds.
    pub tolerance: Nanos,
}

impl Cell {
    /// Of a configured limit.
    #[must_use]
    pub fn new(limit: &RateLimit) -> Self {
        let period = u64::try_from(limit.period.as_nanos()).unwrap_or(u64::MAX);
        let interval = (period / limit.requests).max(1);
        Self {
            interval,
            tolerance: interval.saturating_mul(limit.burst.get()),
        }
    }

    /// The verdict on a request now, and the theoretical arrival time to remember if it passes.
    /// `arrival` is what was remembered; 0 for nothing.
    #[must_use]
    pub fn decide(self, arrival: Nanos, now: Nanos) -> (Verdict, Nanos) {
        let next = arrival.max(now).saturating_add(self.interval);
        let ahead = next - now;
        if ahead > self.tolerance {
            let wait = Duration::from_nanos(ahead - self.tolerance);
            let verdict = Verdict {
                allowed: false,
                remaining: 0,
                wait,
            };
            return (verdict, arrival);
        }
        let verdict = Verdict {
            allowed: true,
            remaining: (self.tolerance - ahead) / self.interval,
            wait: Duration::from_nanos(ahead),
        };
        (verdict, next)
    }
}

/// The keys of one limit.
#[derive(Debug)]
pub struct Limiter {
    cell: Cell,
    hasher: RandomState,
    shards: [Mutex<HashMap<u64, Nanos>>; SHARDS],
}

impl Limiter {
    /// Nothing used yet.
    #[must_use]
    pub fn new(limit: &RateLimit) -> Self {
        Self {
            cell: Cell::new(limit),
            hasher: RandomState::new(),
            shards: Default::default(),
        }
    }

    /// Counts a request, if it may pass.
    pub fn check(&self, key: &str, now: Nanos) -> Verdict {
        let hash = self.hasher.hash_one(key);
        let shard = usize::try_from(hash >> 60).unwrap_or(0) % SHARDS;
        let mut keys = self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= KEYS_MAX && !keys.contains_key(&hash) {
            keys.retain(|_, arrival| *arrival > now);
        }
        // Still full: an attacker's keys share what is left.
        let hash = if keys.len() >= KEYS_MAX && !keys.contains_key(&hash) {
            0
        } else {
            hash
        };
        let arrival = keys.entry(hash).or_insert(0);
        let (verdict, next) = self.cell.decide(*arrival, now);
        *arrival = next;
        verdict
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::config::{Name, RateKey};

    const SECOND: Nanos = 1_000_000_000;

    fn limit(requests: u64, seconds: u64, burst: u64) -> RateLimit {
        RateLimit {
            name: Name::new("l").unwrap(),
            key: RateKey::Client,
            requests: NonZeroU64::new(requests).unwrap(),
            period: Duration::from_secs(seconds),
            burst: NonZeroU64::new(burst).unwrap(),
            shared: false,
        }
    }

    fn pass(limiter: &Limiter, key: &str, now: Nanos) -> usize {
        (0..1000)
            .take_while(|_| limiter.check(key, now).allowed)
            .count()
    }

    #[test]
    fn a_burst_then_the_steady_rate_for_each_key() {
        let limiter = Limiter::new(&limit(10, 1, 5));
        let now = 50 * SECOND;
        assert_eq!(pass(&limiter, "a", now), 5);
        assert_eq!(pass(&limiter, "b", now), 5);
        let verdict = limiter.check("a", now);
        assert_eq!(verdict.wait, Duration::from_millis(100));
        assert_eq!(pass(&limiter, "a", now + SECOND / 10 - 1), 0);
        assert_eq!(pass(&limiter, "a", now + SECOND / 10), 1);
        assert_eq!(
            pass(&limiter, "a", now + 100 * SECOND),
            5,
            "no more than a burst is saved"
        );
    }

    #[test]
    fn a_minute_of_hammering_passes_exactly_the_rate() {
        let limiter = Limiter::new(&limit(7, 2, 3));
        let passed = (0..60_000)
            .filter(|ms| limiter.check("a", SECOND + ms * 1_000_000).allowed)
            .count();
        // 3 at once, then 3.5 a second.
        assert_eq!(passed, 3 + 209);
    }

    #[test]
    fn remaining_counts_down() {
        let limiter = Limiter::new(&limit(1, 1, 3));
        let left: Vec<u64> = (0..3)
            .map(|_| limiter.check("a", SECOND).remaining)
            .collect();
        assert_eq!(left, [2, 1, 0]);
    }

    #[test]
    fn keys_are_bounded() {
        let limiter = Limiter::new(&limit(1, 3600, 1));
        for key in 0..SHARDS * KEYS_MAX + 50_000 {
            limiter.check(&key.to_string(), SECOND);
        }
        let keys: usize = limiter.shards.iter().map(|s| s.lock().unwrap().len()).sum();
        assert!(keys <= SHARDS * (KEYS_MAX + 1), "{keys}");
    }
}
