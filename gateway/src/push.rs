//! Push: usage events to a sink over HTTP, so that every byte is counted there exactly once.
//!
//! ```text
//! ledger outbox → batch → event (CloudEvents) → signature → sender (HTTP) → verdict → ledger
//! ```
//! One thread a sink, one batch under way at a time. A batch keeps its number and its events
//! their ids over every attempt. What may have arrived is written down before it is sent, so a
//! crash at any point sends the same again, and the sink's deduplication makes one of it; past
//! the sink's memory ([`PushSink::dedupe`]) nothing is sent again on a guess: the sink is asked
//! (`confirm_url`), or a person is (`edgemeter push decide`).
//!
//! Deliberately absent: in-memory queues. What is not acknowledged is in the ledger.

mod delivery;
mod event;
mod sender;
mod signature;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Sender as StopSender, channel},
    },
    thread::JoinHandle,
};

use crate::{
    config::PushSink,
    ledger::{Ledger, LedgerError, outbox::Backlog},
};

pub use delivery::Delivery;
pub use event::{EVENT_TYPE, cloud_event, id};
pub use sender::Sender;
pub use signature::{Secrets, sign, verify};

/// What a sink's thread publishes.
#[derive(Clone, Debug, Default)]
pub struct PushState {
    /// What the sink has and has not.
    pub backlog: Backlog,
    /// Attempts that the sink accepted.
    pub accepted: u64,
    /// Attempts that certainly did not arrive.
    pub not_arrived: u64,
    /// Attempts of which nobody knows.
    pub unanswered: u64,
    /// Batches refused.
    pub refused: u64,
    /// Age of the oldest window that is not acknowledged, seconds.
    pub lag_seconds: i64,
    /// Why the last attempt failed; None when it did not.
    pub error: Option<String>,
}

/// The state of every sink, by name.
pub type PushView = Arc<Mutex<BTreeMap<String, PushState>>>;

/// The running threads.
pub struct Pushes {
    threads: Vec<(StopSender<()>, JoinHandle<()>)>,
}

impl Pushes {
    /// Starts a thread for each sink. The ledger must have been told of them
    /// ([`Ledger::push_to`]).
    ///
    /// # Errors
    /// A secret or certificate cannot be read, or no thread could be started.
    pub fn start(sinks: &[PushSink], ledger: &Ledger, view: &PushView) -> anyhow::Result<Self> {
        let mut threads = Vec::new();
        for sink in sinks {
            let sender = Sender::new(sink)?;
            let mut delivery =
                Delivery::new(sink.clone(), ledger.clone(), sender, Arc::clone(view));
            view.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(sink.name.to_string())
                .or_default();
            let (stop, stopped) = channel();
            let thread = std::thread::Builder::new()
                .name(format!("push {}", sink.name))
                .spawn(move || delivery.run(&stopped))?;
            threads.push((stop, thread));
        }
        Ok(Self { threads })
    }

    /// Ends the threads; an attempt under way is finished first, within its time-out. What is
    /// left is sent after the next start.
    pub fn stop(self) {
        for (stop, thread) in self.threads {
            drop(stop);
            if thread.join().is_err() {
                log::error!("a push thread panicked; its events are in the ledger");
            }
        }
    }
}

/// A line a sink: what `edgemeter push status` prints.
///
/// # Errors
/// The ledger cannot be read.
pub fn status(sinks: &[PushSink], ledger: &Ledger) -> Result<String, LedgerError> {
    let mut out = String::new();
    for sink in sinks {
        let backlog = ledger.backlog(sink.name.as_str())?;
        let _ = writeln!(
            out,
            "{}: {} acknowledged ({} B), {} waiting, {} sent, {} refused, {} in doubt ({} B), \
             {} B in the open window",
            sink.name,
            backlog.acknowledged,
            backlog.acknowledged_bytes,
            backlog.waiting,
            backlog.sent,
            backlog.refused,
            backlog.in_doubt,
            backlog.outstanding_bytes,
            backlog.open_bytes,
        );
    }
    Ok(out)
}
