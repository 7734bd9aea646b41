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

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::runtime::Runtime;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};

use super::StoreError;
use super::locks::Locks;
use super::sql::{Backend, Connection, Param, Record, Row, SqlError};
use crate::command::expire::{self, Expire};
use crate::metrics::Metrics;

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

/// A command's view of the transaction.
pub struct Tx<'c> {
    connection: &'c mut dyn Connection,
    /// Milliseconds since the Unix epoch; the same for the whole command.
    pub now_ms: i64,
    effects: &'c mut Effects,
    buffer: &'c mut Vec<u8>,
}

/// What a committed batch means to the rest of the process.
#[derive(Default)]
struct Effects {
    deadline_ms: Option<i64>,
    events: u64,
}

impl Tx<'_> {
    /// The rows of a statement.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn query(&mut self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, SqlError> {
        self.connection.query(sql, params)
    }

    /// How many rows a statement changed.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn execute(&mut self, sql: &str, params: &[Param<'_>]) -> Result<u64, SqlError> {
        self.connection.execute(sql, params)
    }

    /// A statement whose success shows at the commit.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn write(&mut self, sql: &str, params: &[Param<'_>]) -> Result<(), SqlError> {
        self.connection.write(sql, params)
    }

    /// Inserts a row.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn insert(&mut self, record: &impl Record) -> Result<(), SqlError> {
        record.insert(self.connection)
    }

    /// Rows that `rest` selects.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn select<R: Record>(
        &mut self,
        rest: &str,
        params: &[Param<'_>],
    ) -> Result<Vec<R>, SqlError> {
        R::select(self.connection, rest, params)
    }

    /// A value as JSON. The writer's buffer has grown to the size of what it renders, so this
    /// is one allocation, however large the value.
    ///
    /// # Errors
    /// [`StoreError::Render`]
    pub fn json(&mut self, value: &impl serde::Serialize) -> Result<String, StoreError> {
        // What the last request left must not show in this one's.
        if !crate::mutant::Mutant::PooledBuffer.is_on() {
            self.buffer.clear();
        }
        serde_json::to_writer(&mut *self.buffer, value)?;
        let json = std::str::from_utf8(self.buffer);
        Ok(json
            .map_err(|_| StoreError::Inconsistent("JSON is UTF-8"))?
            .to_owned())
    }

    /// The connection, for functions that reads and commands share.
    pub fn connection(&mut self) -> &mut dyn Connection {
        self.connection
    }

    /// Something is due then: the writer wakes for it.
    pub fn wake_at(&mut self, deadline_ms: i64) {
        let earliest = self
            .effects
            .deadline_ms
            .map_or(deadline_ms, |known| known.min(deadline_ms));
        self.effects.deadline_ms = Some(earliest);
    }

    /// An event was written: the relays look once it is committed.
    pub(crate) fn wrote_event(&mut self) {
        self.effects.events = self.effects.events.saturating_add(1);
    }
}

/// A command with its caller, and its output until the commit.
trait Job: Send {
    fn locks(&self, locks: &mut Locks);
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), StoreError>;
    fn answer(self: Box<Self>, metrics: &Metrics);
    fn disappoint(self: Box<Self>, error: StoreError, metrics: &Metrics);
}

struct Called<C: Command> {
    command: C,
    output: Option<C::Output>,
    caller: oneshot::Sender<Result<C::Output, StoreError>>,
}

impl<C: Command> Job for Called<C> {
    fn locks(&self, locks: &mut Locks) {
        self.command.locks(locks);
    }

    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        self.output = Some(self.command.run(tx)?);
        Ok(())
    }

    fn answer(self: Box<Self>, metrics: &Metrics) {
        // The caller may be gone; that is no error.
        if let Some(output) = self.output {
            self.command.committed(&output, metrics);
            let _ = self.caller.send(Ok(output));
        } else {
            let _ = self.caller.send(Err(StoreError::Closed));
        }
    }

    fn disappoint(self: Box<Self>, error: StoreError, metrics: &Metrics) {
        self.command.failed(metrics);
        let _ = self.caller.send(Err(error));
    }
}

enum Message {
    Run(Box<dyn Job>),
    /// Take no further commands; finish those queued, close the database, end.
    Stop,
}

/// The sending end of the queue.
#[derive(Clone)]
pub(super) struct Writer {
    messages: mpsc::Sender<Message>,
    metrics: Metrics,
}

impl Writer {
    /// Queues a command, or says at once that there is no room.
    pub(super) async fn run<C: Command>(&self, command: C) -> Result<C::Output, StoreError> {
        let (caller, answered) = oneshot::channel();
        // Counted before it is sent, or the thread could count it out before it was in.
        self.metrics.command_queued();
        self.messages
            .try_send(Message::Run(Box::new(Called {
                command,
                output: None,
                caller,
            })))
            .map_err(|refused| {
                self.metrics.command_unqueued();
                match refused {
                    TrySendError::Full(_) => StoreError::QueueFull,
                    TrySendError::Closed(_) => StoreError::Closed,
                }
            })?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// As [`Writer::run`], but waits for room: for relays and checks, to whom a full queue
    /// is busy and not broken.
    pub(super) async fn run_patiently<C: Command>(
        &self,
        command: C,
    ) -> Result<C::Output, StoreError> {
        let (caller, answered) = oneshot::channel();
        let room = self
            .messages
            .reserve()
            .await
            .map_err(|_| StoreError::Closed)?;
        self.metrics.command_queued();
        room.send(Message::Run(Box::new(Called {
            command,
            output: None,
            caller,
        })));
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

/// The thread itself, owned by whoever stops it.
pub struct WriterThread {
    messages: mpsc::Sender<Message>,
    thread: JoinHandle<Result<(), StoreError>>,
    metrics: Metrics,
}

impl WriterThread {
    /// Commits what is queued, moves the log into the database file, and ends the thread.
    ///
    /// # Errors
    /// [`StoreError::Sql`] if the checkpoint failed; the log then stays beside the file
    /// and the next start reads it, so nothing is lost. [`StoreError::Closed`] if the thread
    /// had died.
    pub async fn stop(self) -> Result<(), StoreError> {
        self.metrics.command_queued();
        if self.messages.send(Message::Stop).await.is_err() {
            self.metrics.command_unqueued();
        }
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await;
        joined
            .map_err(|error| StoreError::Thread(error.into()))?
            .map_err(|_| StoreError::Closed)?
    }
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
