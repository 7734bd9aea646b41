//! The thread that writes: takes what is queued, commits it once, then answers.
//!
//! Batching needs no timer. While a COMMIT waits for the disk the queue fills, and the
//! next batch is what gathered: alone, an order waits for nobody; under load, up to
//! [`BATCH_COMMANDS_MAX`] share one disk write.
//!
//! Nobody is told of success before COMMIT returned. A caller that went away changes
//! nothing: its command is committed, and its key replays the answer.
//!
//! The thread also keeps the reservations' deadlines: it sleeps until the next one, so an
//! order expires at its deadline, before any command that comes later.

mod queue;
mod tx;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot, watch};

use super::StoreError;
use super::locks::Locks;
use super::sql::{Backend, Connection, SqlError};
use crate::command::expire::{self, Expire};
use crate::metrics::Metrics;
use queue::{Called, Job, Message};
use tx::Effects;

pub(super) use queue::Writer;
pub use queue::WriterThread;
pub use tx::Tx;

/// Most commands in one transaction: beyond it latency grows faster than throughput.
const BATCH_COMMANDS_MAX: usize = 128;
/// How often a transaction is run again after PostgreSQL chose it as a deadlock's victim.
const ATTEMPTS_MAX: u32 = 5;
/// PostgreSQL: how long until deadlines that another machine set, and did not keep, are seen.
const FOREIGN_DEADLINES: Duration = Duration::from_secs(1);

/// Something that changes the database: one transaction, shared with others of its batch.
///
/// It decides first and writes then. A refusal is an `Ok` that has written nothing but a
/// remembered answer; an `Err` takes the whole transaction back, and the batch's other
/// commands are run again without it. So `run` must not change `self`.
pub trait Command: Send + 'static {
    /// What the caller gets.
    type Output: Send + 'static;

    /// What [`Command::run`] will read and then change. PostgreSQL locks it before the first
    /// command of a batch runs, in one order for every machine; SQLite has one writer.
    fn locks(&self, _locks: &mut Locks) {}

    /// Does it.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails; a business refusal is an output.
    fn run(&self, tx: &mut Tx<'_>) -> Result<Self::Output, StoreError>;

    /// Counts what is true now, after the commit.
    fn committed(&self, _output: &Self::Output, _metrics: &Metrics) {}

    /// Counts that it was not done.
    fn failed(&self, _metrics: &Metrics) {}
}

/// Starts the thread. `events` counts committed events, for the relays to watch.
pub(super) fn start(
    open: impl FnOnce() -> Result<Box<dyn Connection>, StoreError> + Send + 'static,
    queue_capacity: NonZeroUsize,
    metrics: Metrics,
    events: watch::Sender<u64>,
) -> Result<(Writer, WriterThread), StoreError> {
    let (messages, queue) = mpsc::channel(queue_capacity.get());
    let for_thread = metrics.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    let thread = std::thread::Builder::new()
        .name("commerce-writer".to_owned())
        .spawn(move || {
            let batcher = Batcher {
                connection: open()?,
                metrics: for_thread,
                events,
                deadline_ms: None,
                learned: Instant::now(),
                buffer: Vec::new(),
            };
            batcher.serve(&runtime, queue)
        })?;
    let writer = Writer {
        messages: messages.clone(),
        metrics: metrics.clone(),
    };
    Ok((
        writer,
        WriterThread {
            messages,
            thread,
            metrics,
        },
    ))
}

struct Batcher {
    connection: Box<dyn Connection>,
    metrics: Metrics,
    events: watch::Sender<u64>,
    /// The earliest deadline known.
    deadline_ms: Option<i64>,
    /// When the deadlines were last read from the database.
    learned: Instant,
    /// What commands render JSON in.
    buffer: Vec<u8>,
}

/// Why a transaction did not commit.
enum Failure {
    /// The command at this place of the batch.
    Command(usize, StoreError),
    /// The transaction as a whole.
    Batch(StoreError),
}

impl Batcher {
    fn serve(
        mut self,
        runtime: &Runtime,
        mut queue: mpsc::Receiver<Message>,
    ) -> Result<(), StoreError> {
        let mut messages = Vec::with_capacity(BATCH_COMMANDS_MAX);
        let mut jobs = Vec::with_capacity(BATCH_COMMANDS_MAX);
        self.learn_deadline();
        loop {
            let wake = self.sleep();
            let received = runtime.block_on(async {
                let receive = queue.recv_many(&mut messages, BATCH_COMMANDS_MAX);
                match wake {
                    Some(wake) => tokio::time::timeout(wake, receive).await.ok(),
                    None => Some(receive.await),
                }
            });
            self.expire();
            match received {
                // The queue is closed and empty.
                Some(0) => break,
                Some(_) => {}
                None => continue,
            }
            for message in messages.drain(..) {
                self.metrics.command_unqueued();
                match message {
                    Message::Run(job) => jobs.push(job),
                    Message::Stop => queue.close(),
                }
            }
            if !jobs.is_empty() {
                self.commit(&mut jobs);
                if let Err(error) = self.connection.maintain() {
                    tracing::error!(%error, "the log could not be moved");
                }
            }
        }
        Ok(self.connection.close()?)
    }

    /// How long to wait for a command at most.
    fn sleep(&self) -> Option<Duration> {
        let due = self.deadline_ms.map(|deadline| {
            let left = deadline.saturating_sub(unix_time_ms());
            Duration::from_millis(u64::try_from(left).unwrap_or(0))
        });
        match self.connection.backend() {
            Backend::Sqlite => due,
            Backend::Postgres => {
                Some(due.map_or(FOREIGN_DEADLINES, |due| due.min(FOREIGN_DEADLINES)))
            }
        }
    }

    /// Ends every reservation whose deadline has come.
    fn expire(&mut self) {
        if self.connection.backend() == Backend::Postgres
            && self.learned.elapsed() >= FOREIGN_DEADLINES
        {
            self.learn_deadline();
        }
        if self
            .deadline_ms
            .is_none_or(|deadline| deadline > unix_time_ms())
        {
            return;
        }
        loop {
            let (caller, mut answered) = oneshot::channel();
            let mut jobs: Vec<Box<dyn Job>> = vec![Box::new(Called {
                command: Expire,
                output: None,
                caller,
            })];
            self.deadline_ms = None;
            self.commit(&mut jobs);
            match answered.try_recv() {
                Ok(Ok(0)) => break,
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => {
                    // Logged already. Not at once again: the disk may be full for a while.
                    self.deadline_ms = Some(unix_time_ms().saturating_add(1000));
                    return;
                }
            }
        }
        self.learn_deadline();
    }

    fn learn_deadline(&mut self) {
        self.learned = Instant::now();
        if let Err(error) = self.connection.recover() {
            tracing::error!(%error, "the database cannot be reached");
        }
        match expire::next_deadline_ms(self.connection.as_mut()) {
            Ok(deadline) => self.deadline_ms = deadline,
            Err(error) => {
                tracing::error!(%error, "the next deadline could not be read");
                self.deadline_ms = Some(unix_time_ms().saturating_add(1000));
            }
        }
    }

    /// Runs the jobs in one transaction and answers them. When one of them fails, it alone
    /// is disappointed and the others run again.
    fn commit(&mut self, jobs: &mut Vec<Box<dyn Job>>) {
        let mut attempts = 1;
        while !jobs.is_empty() {
            let mut effects = Effects::default();
            match self.attempt(jobs, &mut effects) {
                Ok(commit) => {
                    self.metrics.batch_committed(jobs.len(), commit);
                    if let Some(deadline) = effects.deadline_ms {
                        let earliest = self
                            .deadline_ms
                            .map_or(deadline, |known| known.min(deadline));
                        self.deadline_ms = Some(earliest);
                    }
                    for job in jobs.drain(..) {
                        job.answer(&self.metrics);
                    }
                    if effects.events > 0 {
                        self.events
                            .send_modify(|count| *count = count.wrapping_add(effects.events));
                    }
                }
                Err(failure) => {
                    if let Err(error) = self.connection.rollback() {
                        tracing::error!(%error, "the failed transaction could not be taken back");
                    }
                    if let Err(error) = self.connection.recover() {
                        tracing::error!(%error, "the database cannot be reached");
                    }
                    let (at, error) = match failure {
                        Failure::Command(at, error) => (Some(at), error),
                        Failure::Batch(error) => (None, error),
                    };
                    if error.is_worth_repeating() && attempts < ATTEMPTS_MAX {
                        attempts += 1;
                        continue;
                    }
                    self.metrics.batch_failed();
                    match at {
                        Some(at) => {
                            tracing::error!(%error, "a command failed");
                            jobs.remove(at).disappoint(error, &self.metrics);
                        }
                        None => {
                            tracing::error!(%error, commands = jobs.len(), "a batch was not committed");
                            let error = Arc::new(error);
                            for job in jobs.drain(..) {
                                job.disappoint(StoreError::Batch(error.clone()), &self.metrics);
                            }
                        }
                    }
                }
            }
        }
    }

    /// One transaction. Returns how long its COMMIT took.
    fn attempt(
        &mut self,
        jobs: &mut [Box<dyn Job>],
        effects: &mut Effects,
    ) -> Result<Duration, Failure> {
        let whole = |error: SqlError| Failure::Batch(error.into());
        let mut locks = Locks::default();
        if self.connection.backend() == Backend::Postgres {
            for job in jobs.iter() {
                job.locks(&mut locks);
            }
        }
        self.connection.begin().map_err(whole)?;
        locks.take(self.connection.as_mut()).map_err(whole)?;
        for (at, job) in jobs.iter_mut().enumerate() {
            let mut tx = Tx {
                connection: self.connection.as_mut(),
                now_ms: unix_time_ms(),
                effects,
                buffer: &mut self.buffer,
            };
            job.run(&mut tx)
                .map_err(|error| Failure::Command(at, error))?;
        }
        let started = Instant::now();
        self.connection.commit().map_err(whole)?;
        Ok(started.elapsed())
    }
}

/// Milliseconds since the Unix epoch; 0 on a clock set before it.
pub(crate) fn unix_time_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
