//! What is refused rather than queued, and what may be tried again.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

use crate::config;

/// Why a request got no peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too many requests under way at the upstream.
    Requests,
    /// Too many requests waiting for a connection.
    Pending,
    /// Every peer has as many requests as it may.
    PerPeer,
    /// No name has led to an address yet.
    Unresolved,
}

impl Refused {
    const ALL: [Self; 4] = [
        Self::Requests,
        Self::Pending,
        Self::PerPeer,
        Self::Unresolved,
    ];

    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Pending => "pending",
            Self::PerPeer => "per_peer",
            Self::Unresolved => "unresolved",
        }
    }
}

/// Counts requests against an upstream's limits.
#[derive(Debug)]
pub struct Gate {
    requests: AtomicU32,
    pending: AtomicU32,
    requests_max: u32,
    pending_max: u32,
    refused: [AtomicU64; Refused::ALL.len()],
}

impl Gate {
    pub(super) fn new(limits: &config::UpstreamLimits) -> Self {
        Self {
            requests: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            requests_max: limits.requests,
            pending_max: limits.pending,
            refused: Default::default(),
        }
    }

    pub(super) fn refuse(&self, why: Refused) -> Refused {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
        why
    }

    pub(super) fn refused(&self) -> impl Iterator<Item = (Refused, u64)> {
        let counts = Refused::ALL.iter().zip(&self.refused);
        counts.map(|(why, count)| (*why, count.load(Ordering::Relaxed)))
    }

    /// A request waits for a connection.
    pub(super) fn wait(&self) -> Result<(), Refused> {
        if self.pending.fetch_add(1, Ordering::Relaxed) >= self.pending_max {
            self.pending.fetch_sub(1, Ordering::Relaxed);
            return Err(self.refuse(Refused::Pending));
        }
        Ok(())
    }

    /// It waits no more.
    pub(super) fn connected(&self) {
        self.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request under way at an upstream, until dropped.
#[derive(Debug)]
pub struct Admission(Arc<Gate>);

impl Admission {
    pub(super) fn new(gate: &Arc<Gate>) -> Result<Self, Refused> {
        if gate.requests.fetch_add(1, Ordering::Relaxed) >= gate.requests_max {
            gate.requests.fetch_sub(1, Ordering::Relaxed);
            return Err(gate.refuse(Refused::Requests));
        }
        Ok(Self(Arc::clone(gate)))
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Retries cost what requests earn: an upstream that fails altogether gets little more load than it
/// would without retries.
#[derive(Debug)]
pub struct Budget {
    /// Hundredths of a retry.
    balance: AtomicI64,
    earned: i64,
    most: i64,
    /// Retries made.
    pub retries: AtomicU64,
    /// Retries the budget refused.
    pub exhausted: AtomicU64,
}

/// A retry.
const COST: i64 = 100;

impl Budget {
    /// Full: the reserve.
    pub fn new(retry: &config::Retry) -> Self {
        let most = i64::from(retry.budget_reserve) * COST;
        Self {
            balance: AtomicI64::new(most),
            earned: i64::from(retry.budget_percent),
            most: most.max(COST),
            retries: AtomicU64::new(0),
            exhausted: AtomicU64::new(0),
        }
    }

    /// A request earns its percentage.
    pub fn deposit(&self) {
        let before = self.balance.fetch_add(self.earned, Ordering::Relaxed);
        if before + self.earned > self.most {
            self.balance.fetch_min(self.most, Ordering::Relaxed);
        }
    }

    /// Whether one more retry is allowed; it is paid for then.
    pub fn withdraw(&self) -> bool {
        let paid = self
            .balance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |balance| {
                (balance >= COST).then_some(balance - COST)
            });
        let counter = if paid.is_ok() {
            &self.retries
        } else {
            &self.exhausted
        };
        counter.fetch_add(1, Ordering::Relaxed);
        paid.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(percent: u32, reserve: u32) -> config::Retry {
        config::Retry {
            attempts: 1,
            statuses: Vec::new(),
            budget_percent: percent,
            budget_reserve: reserve,
            idempotency_key: true,
        }
    }

    #[test]
    fn retries_are_the_reserve_and_a_percentage() {
        let budget = Budget::new(&retry(20, 10));
        let mut retries = 0;
        // Every request fails and wants a retry.
        for _ in 0..1_000 {
            budget.deposit();
            retries += u32::from(budget.withdraw());
        }
        assert!((205..=210).contains(&retries), "{retries}");
        assert_eq!(
            budget.exhausted.load(Ordering::Relaxed),
            u64::from(1_000 - retries)
        );
    }

    #[test]
    fn quiet_times_earn_no_more_than_the_reserve() {
        let budget = Budget::new(&retry(20, 10));
        (0..100_000).for_each(|_| budget.deposit());
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10);
    }

    #[test]
    fn limits_are_given_back() {
        let gate = Arc::new(Gate::new(&config::UpstreamLimits {
            requests: 2,
            pending: 1,
            per_peer: 1,
        }));
        let first = Admission::new(&gate).unwrap();
        let _second = Admission::new(&gate).unwrap();
        assert_eq!(Admission::new(&gate).unwrap_err(), Refused::Requests);
        drop(first);
        assert!(Admission::new(&gate).is_ok());
        gate.wait().unwrap();
        assert_eq!(gate.wait().unwrap_err(), Refused::Pending);
        gate.connected();
        gate.wait().unwrap();
        let counts: Vec<u64> = gate.refused().map(|(_, count)| count).collect();
        assert_eq!(counts, [1, 1, 0, 0]);
    }
}
