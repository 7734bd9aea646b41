//! Budgets: how much a route, tenant or service may move or cost in a day or month, how it looks
//! at this pace, and what happens to requests past it.
//!
//! ```text
//! ledger → watch (a thread) → judge (pure) → Budgets ──→ proxy: allow, warn, slow down, refuse
//!                                                    └─→ metrics, alerts
//! ```
//! It fails open: where the use is not known now, because the ledger cannot be read or written,
//! nothing is metered, or the last judgement is old, every request is allowed, and
//! `edgemeter_budget_judged` is 0.

mod judge;
mod limit;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

pub use judge::{Standing, judge};
pub use limit::{Action, Budget, Limit, PeriodKind, Scope};
pub use watch::BudgetThread;

/// A client that is slowed down waits no longer than this for one piece of a body.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// What may happen to a request.
#[derive(Clone, Debug)]
pub enum Decision {
    /// Nothing.
    Allow,
    /// Goes on, and its response says so in a header.
    Warn(String),
    /// Goes on, its response body at a pace shared by all requests of the budget.
    Throttle(Arc<Pace>),
    /// Is answered 429.
    Refuse {
        /// The budget's name.
        budget: String,
        /// Until the period ends.
        retry_after: Duration,
    },
}

/// A budget with what has happened to it.
#[derive(Debug)]
pub struct Watched {
    /// As configured.
    pub budget: Budget,
    /// Requests whose response carried a warning.
    pub warned: AtomicU64,
    /// Requests whose response was slowed down.
    pub throttled: AtomicU64,
    /// Requests refused.
    pub refused: AtomicU64,
    pace: Arc<Pace>,
}

/// The latest judgement.
#[derive(Clone, Debug, Default)]
pub struct Judgement {
    /// By budget, in the order of the configuration; empty when the use is not known.
    pub standings: Vec<Standing>,
    /// Until when it may be acted on.
    pub valid_until: Option<Instant>,
}

/// All budgets, shared by proxy, watcher and metrics.
#[derive(Debug, Default)]
pub struct Budgets {
    watched: Vec<Watched>,
    judgement: ArcSwap<Judgement>,
}

impl Budgets {
    /// Nothing is judged yet, so everything is allowed.
    #[must_use]
    pub fn new(budgets: Vec<Budget>) -> Self {
        let watched = budgets.into_iter().map(|budget| Watched {
            pace: Arc::new(Pace::new(budget.throttle_bytes_per_second)),
            budget,
            warned: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        Self {
            watched: watched.collect(),
            judgement: ArcSwap::default(),
        }
    }

    /// In the order of the configuration.
    #[must_use]
    pub fn watched(&self) -> &[Watched] {
        &self.watched
    }

    /// The latest judgement, also an old one.
    #[must_use]
    pub fn judgement(&self) -> Arc<Judgement> {
        self.judgement.load_full()
    }

    /// Publishes a judgement.
    pub fn publish(&self, judgement: Judgement) {
        self.judgement.store(Arc::new(judgement));
    }

    /// What is to happen to a request. The strictest budget wins.
    #[must_use]
    pub fn decide(&self, route: &str, service: &str, tenant: &str, now: Instant) -> Decision {
        if self.watched.is_empty() {
            return Decision::Allow;
        }
        let judgement = self.judgement.load();
        if judgement.valid_until.is_none_or(|until| now > until) {
            return Decision::Allow;
        }
        let mut decision = Decision::Allow;
        for (watched, standing) in self.watched.iter().zip(&judgement.standings) {
            let budget = &watched.budget;
            if !budget.scope.covers(route, service, tenant) {
                continue;
            }
            if standing.is_exhausted() {
                match budget.action {
                    Action::None => {}
                    Action::Warn => decision = stricter(decision, warning(budget, standing)),
                    Action::Throttle => {
                        let throttle = Decision::Throttle(Arc::clone(&watched.pace));
                        decision = stricter(decision, throttle);
                    }
                    Action::Refuse => {
                        let left = standing.period.end - standing.at;
                        decision = stricter(
                            decision,
                            Decision::Refuse {
                                budget: budget.name.to_string(),
                                retry_after: Duration::from_secs(left.max(1).unsigned_abs()),
                            },
                        );
                    }
                }
            } else if standing.warned_percent > 0 && budget.action != Action::None {
                decision = stricter(decision, warning(budget, standing));
            }
            let counter = match &decision {
                Decision::Allow => continue,
                Decision::Warn(_) => &watched.warned,
                Decision::Throttle(_) => &watched.throttled,
                Decision::Refuse { .. } => &watched.refused,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        decision
    }
}

fn warning(budget: &Budget, standing: &Standing) -> Decision {
    Decision::Warn(format!(
        "{}; used={}%; period={}",
        budget.name,
        standing.used_percent(),
        budget.period.as_str()
    ))
}

fn stricter(a: Decision, b: Decision) -> Decision {
    let rank = |decision: &Decision| match decision {
        Decision::Allow => 0,
        Decision::Warn(_) => 1,
        Decision::Throttle(_) => 2,
        Decision::Refuse { .. } => 3,
    };
    if rank(&b) > rank(&a) { b } else { a }
}

/// A pace that many share: each takes its turn after the one before.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Mutex::new(None),
        }
    }

    /// How long these bytes have to wait.
    #[must_use]
    pub fn wait(&self, bytes: u64, now: Instant) -> Duration {
        let took = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second);
        let took = Duration::from_micros(u64::try_from(took).unwrap_or(u64::MAX)).min(DELAY_MAX);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody saves up, and nobody falls behind further than the longest wait.
        let begin = free_at.map_or(now, |at| at.clamp(now, now + DELAY_MAX));
        *free_at = Some(begin + took);
        begin.saturating_duration_since(now)
    }
}
