//! The thread that keeps judging. Days that are over do not change, and are read once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    Budgets, Judgement,
    judge::{Days, days, judge},
};
use crate::{
    config::Prices,
    export::WireView,
    ledger::{Ledger, LedgerError},
};

/// Between two judgements.
const INTERVAL: Duration = Duration::from_secs(5);
/// For how long one may be acted on.
const VALID: Duration = Duration::from_secs(60);
/// A day is final when it has been over for this long: ticks and clocks differ.
const SETTLED_SECONDS: i64 = 300;

/// The running thread.
pub struct BudgetThread {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

/// What the thread works with.
struct Watch {
    budgets: Arc<Budgets>,
    ledger: Ledger,
    prices: Option<Prices>,
    view: Arc<Mutex<WireView>>,
    days: Days,
}

impl BudgetThread {
    /// Starts it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        budgets: Arc<Budgets>,
        ledger: Ledger,
        prices: Option<Prices>,
        view: Arc<Mutex<WireView>>,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let mut watch = Watch {
            budgets,
            ledger,
            prices,
            view,
            days: BTreeMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("budgets".into())
            .spawn(move || watch.run(&stopped))?;
        Ok(Self { stop, thread })
    }

    /// Ends it; from then on nothing is refused.
    pub fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            log::error!("the budget thread panicked; every request is allowed");
        }
    }
}

impl Watch {
    fn run(&mut self, stopped: &Receiver<()>) {
        loop {
            self.judge_once();
            if !matches!(
                stopped.recv_timeout(INTERVAL),
                Err(RecvTimeoutError::Timeout)
            ) {
                return;
            }
        }
    }

    fn judge_once(&mut self) {
        // Metering that stands still must not refuse anybody, nor let a budget look unused.
        let blind = {
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            view.degraded.clone().or_else(|| view.ledger_error.clone())
        };
        let judged = match blind {
            Some(_) => None,
            None => match self.standings(unix_seconds()) {
                Ok(standings) => standings,
                Err(error) => {
                    log::error!("budgets are not judged, every request is allowed: {error}");
                    None
                }
            },
        };
        self.budgets.publish(match judged {
            Some(standings) => Judgement {
                standings,
                valid_until: Some(Instant::now() + VALID),
            },
            None => Judgement::default(),
        });
    }

    /// None when an amount does not fit.
    fn standings(&mut self, now: i64) -> Result<Option<Vec<super::Standing>>, LedgerError> {
        let Some(span) = self.ledger.span()? else {
            // Nothing posted yet, nothing used.
            let empty = Days::new();
            return Ok(self.judged(&empty, now, now));
        };
        let mut wanted = Vec::new();
        for watched in self.budgets.watched() {
            wanted.extend(days(&watched.budget, now));
        }
        self.days.retain(|day, _| wanted.contains(day));
        let mut live = Days::new();
        for day in wanted {
            if self.days.contains_key(&day) || live.contains_key(&day) {
                continue;
            }
            let sums = self.ledger.sums(day, true)?;
            if day.end + SETTLED_SECONDS <= now {
                self.days.insert(day, sums);
            } else {
                live.insert(day, sums);
            }
        }
        let mut all = self.days.clone();
        all.append(&mut live);
        Ok(self.judged(&all, span.start, now))
    }

    fn judged(&self, days: &Days, first: i64, now: i64) -> Option<Vec<super::Standing>> {
        let judged = self.budgets.watched().iter().map(|watched| {
            // Only days of the budget's own zone: budgets may have different ones.
            let own = super::judge::days(&watched.budget, now);
            let days = own
                .iter()
                .filter_map(|day| Some((*day, days.get(day)?.clone())));
            judge(
                &watched.budget,
                self.prices.as_ref(),
                &days.collect(),
                first,
                now,
            )
        });
        match judged.collect() {
            Ok(standings) => Some(standings),
            Err(error) => {
                log::error!("budgets are not judged, every request is allowed: {error}");
                None
            }
        }
    }
}

fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}
