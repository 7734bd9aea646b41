//! One sink's events, one batch at a time, until the ledger knows that the sink has them.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{
        PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    PushState, PushView, Sender, cloud_event, id,
    sender::{Known, Verdict},
};
use crate::{
    config::PushSink,
    ledger::{Ledger, LedgerError, outbox::Batch},
};

/// How often the outbox is looked at.
const POLL: Duration = Duration::from_secs(1);
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A sink that asks for more patience than this gets an attempt all the same.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// Delivers to one sink.
pub struct Delivery {
    sink: PushSink,
    source: String,
    ledger: Ledger,
    sender: Sender,
    view: PushView,
    state: PushState,
    /// Failed attempts in a row.
    failures: u32,
    /// A batch the sink has, and the ledger could not be told.
    unstored: Option<i64>,
    published: Option<Instant>,
}

/// What to do after a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// There is more.
    GoOn,
    /// Wait this long.
    Wait(Duration),
}

impl Delivery {
    /// For a sink, out of a ledger.
    #[must_use]
    pub fn new(sink: PushSink, ledger: Ledger, sender: Sender, view: PushView) -> Self {
        Self {
            source: format!("edgemeter/{}", ledger.gateway()),
            sink,
            ledger,
            sender,
            view,
            state: PushState::default(),
            failures: 0,
            unstored: None,
            published: None,
        }
    }

    /// Delivers until told to stop.
    pub fn run(&mut self, stopped: &Receiver<()>) {
        loop {
            let wait = match self.step(now()) {
                Next::GoOn => Duration::ZERO,
                Next::Wait(wait) => wait,
            };
            match stopped.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        }
    }

    /// One attempt at most.
    pub(super) fn step(&mut self, now: i64) -> Next {
        let next = match self.attempt(now) {
            Ok(next) => next,
            Err(error) => {
                log::error!("push {}: {error}", self.sink.name);
                self.state.error = Some(error.to_string());
                self.back_off(None)
            }
        };
        // Adding up a long backlog after every batch of it would take longer than sending it.
        if matches!(next, Next::Wait(_)) || self.published.is_none_or(|at| at.elapsed() > POLL) {
            self.publish(now);
            self.published = Some(Instant::now());
        }
        next
    }

    fn attempt(&mut self, now: i64) -> Result<Next, LedgerError> {
        let name = self.sink.name.clone();
        let name = name.as_str();
        if let Some(batch) = self.unstored {
            self.ledger.acknowledge(name, batch)?;
            self.unstored = None;
        }
        let Some(batch) = self.ledger.next_batch(name, self.sink.batch, now)? else {
            let kept = i64::try_from(self.sink.keep.as_secs()).unwrap_or(i64::MAX);
            let folded = self
                .ledger
                .fold_acknowledged(name, now.saturating_sub(kept))?;
            return Ok(if folded > 0 {
                Next::GoOn
            } else {
                Next::Wait(POLL)
            });
        };
        if let Some(first) = batch.first_sent
            && now.saturating_sub(first) >= self.memory()
        {
            return self.past_the_memory(&batch, first);
        }
        let events = batch.events.iter();
        let events: Vec<_> = events
            .map(|event| cloud_event(event, &self.source))
            .collect();
        let body = serde_json::Value::Array(events).to_string();
        let verdict = self.sender.send(&self.batch_id(&batch), now, &body);
        self.judge(&batch, verdict)
    }

    /// How long the sink remembers, seconds, less a tenth for clocks that differ.
    fn memory(&self) -> i64 {
        let seconds = self.sink.dedupe.as_secs();
        i64::try_from(seconds - seconds / 10).unwrap_or(i64::MAX)
    }

    fn batch_id(&self, batch: &Batch) -> String {
        format!("{}/{}/{}", self.source, self.sink.name, batch.number)
    }

    fn judge(&mut self, batch: &Batch, verdict: Verdict) -> Result<Next, LedgerError> {
        let name = self.sink.name.clone();
        let name = name.as_str();
        match verdict {
            Verdict::Accepted => {
                self.failures = 0;
                self.state.accepted += 1;
                self.state.error = None;
                // Known from now on, even if the ledger cannot be told before the next try.
                self.unstored = Some(batch.number);
                self.ledger.acknowledge(name, batch.number)?;
                self.unstored = None;
                Ok(Next::GoOn)
            }
            Verdict::NotArrived { why, retry_after } => {
                self.state.not_arrived += 1;
                self.failed(&why);
                // An earlier attempt may have arrived all the same.
                if batch.first_sent.is_none() {
                    self.ledger.not_arrived(name, batch.number)?;
                }
                Ok(self.back_off(retry_after))
            }
            Verdict::Unknown { why, retry_after } => {
                self.state.unanswered += 1;
                self.failed(&why);
                Ok(self.back_off(retry_after))
            }
            Verdict::Refused { why } => {
                self.state.refused += 1;
                self.failed(&why);
                if batch.first_sent.is_some() {
                    // Refused now, but an earlier attempt may have been taken: the same again,
                    // event by event, decides it.
                    self.ledger.doubt(name, batch.number, &why)?;
                } else if batch.events.len() > 1 {
                    self.ledger.split(name, batch)?;
                } else {
                    self.ledger.refuse(name, batch.number, &why)?;
                }
                Ok(Next::GoOn)
            }
        }
    }

    /// The sink may have forgotten what it saw: ask it, or leave it to a person.
    fn past_the_memory(&mut self, batch: &Batch, first: i64) -> Result<Next, LedgerError> {
        let name = self.sink.name.clone();
        let name = name.as_str();
        for event in &batch.events {
            match self.sender.knows(&self.source, &id(event)) {
                Some(Known::Yes) => self.ledger.acknowledge_event(name, event)?,
                Some(Known::No) => {}
                Some(Known::Unclear(why)) => {
                    self.failed(&why);
                    return Ok(self.back_off(None));
                }
                None => {
                    let why =
                        format!("sent at {first}, unanswered, and the sink may have forgotten it");
                    log::error!(
                        "push {name}: batch {} is in doubt: {why}; fix: look at the sink, then \
                         `edgemeter push decide --sink {name} --arrived` or `--not-arrived`",
                        batch.number
                    );
                    self.ledger.doubt(name, batch.number, &why)?;
                    return Ok(Next::GoOn);
                }
            }
        }
        // What is left of it is certainly not there.
        self.ledger.not_arrived(name, batch.number)?;
        Ok(Next::GoOn)
    }

    fn failed(&mut self, why: &str) {
        log::warn!("push {}: {why}", self.sink.name);
        self.state.error = Some(why.to_owned());
    }

    fn back_off(&mut self, retry_after: Option<Duration>) -> Next {
        let random = RandomState::new().hash_one(self.failures);
        let wait = backoff(self.failures, random);
        self.failures = self.failures.saturating_add(1);
        Next::Wait(retry_after.map_or(wait, |asked| wait.max(asked.min(RETRY_AFTER_MAX))))
    }

    fn publish(&mut self, now: i64) {
        match self.ledger.backlog(self.sink.name.as_str()) {
            Ok(backlog) => {
                self.state.lag_seconds = backlog.oldest.map_or(0, |oldest| (now - oldest).max(0));
                self.state.backlog = backlog;
            }
            Err(error) => self.state.error = Some(error.to_string()),
        }
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        view.insert(self.sink.name.to_string(), self.state.clone());
    }
}

/// Doubles with every failure, and lies between half of that and all of it, so that gateways
/// that failed together do not return together.
pub(super) fn backoff(failures: u32, random: u64) -> Duration {
    let full = BACKOFF_FIRST
        .saturating_mul(1_u32.checked_shl(failures.min(16)).unwrap_or(u32::MAX))
        .min(BACKOFF_MAX);
    let half = full / 2;
    let millis = u64::try_from(half.as_millis()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_millis(random % millis)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}
