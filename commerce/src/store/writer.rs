//! The one thread that writes: takes what is queued, commits it once, then answers.
//!
//! Batching needs no timer. While a COMMIT waits for the disk the queue fills, and the
//! next batch is what gathered: alone, an order waits for nobody; under load, up to
//! [`BATCH_COMMANDS_MAX`] share one disk write.
//!
//! Nobody is told of success before COMMIT returned. A caller that went away changes
//! nothing: its order is committed, and its key replays the answer.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::StoreError;
use super::place::{self, Moment, PlaceOrder, Placement};
use crate::metrics::{Metrics, RefusalReason};

/// Most commands in one transaction: beyond it latency grows faster than throughput.
const BATCH_COMMANDS_MAX: usize = 128;

type Answer<T> = Result<T, StoreError>;

/// What the thread is asked to do.
enum Command {
    Place(PlaceOrder, oneshot::Sender<Answer<Placement>>),
    /// Answered after a COMMIT like any other, which is what makes it a check.
    Ping(oneshot::Sender<Answer<()>>),
    /// Take no further commands; finish those queued, checkpoint, end.
    Stop,
}

/// A command that has run and waits for its batch to commit.
enum Pending {
    Place(Answer<Placement>, oneshot::Sender<Answer<Placement>>),
    Ping(oneshot::Sender<Answer<()>>),
}

/// The sending end of the queue.
#[derive(Clone)]
pub(super) struct Writer {
    commands: mpsc::Sender<Command>,
    metrics: Metrics,
}

impl Writer {
    pub(super) async fn place(&self, order: PlaceOrder) -> Answer<Placement> {
        let (answer, answered) = oneshot::channel();
        // Counted before it is sent, or the thread could count it out before it was in.
        self.metrics.command_queued();
        self.commands
            .try_send(Command::Place(order, answer))
            .map_err(|refused| {
                self.metrics.command_unqueued();
                match refused {
                    TrySendError::Full(_) => StoreError::QueueFull,
                    TrySendError::Closed(_) => StoreError::Closed,
                }
            })?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// Waits for room, unlike an order: a full queue is busy, not broken.
    pub(super) async fn ping(&self) -> Answer<()> {
        let (answer, answered) = oneshot::channel();
        let room = self
            .commands
            .reserve()
            .await
            .map_err(|_| StoreError::Closed)?;
        self.metrics.command_queued();
        room.send(Command::Ping(answer));
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

/// The thread itself, owned by whoever stops it.
pub struct WriterThread {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<Answer<()>>,
    metrics: Metrics,
}

impl WriterThread {
    /// Commits what is queued, moves the log into the database file, and ends the thread.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] if the checkpoint failed; the log then stays beside the file
    /// and the next start reads it, so nothing is lost. [`StoreError::Closed`] if the thread
    /// had died.
    pub async fn stop(self) -> Result<(), StoreError> {
        self.metrics.command_queued();
        if self.commands.send(Command::Stop).await.is_err() {
            self.metrics.command_unqueued();
        }
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await;
        joined
            .map_err(|error| StoreError::Thread(error.into()))?
            .map_err(|_| StoreError::Closed)?
    }
}

/// Starts the thread on the only connection that writes.
pub(super) fn start(
    connection: Connection,
    queue_capacity: NonZeroUsize,
    metrics: Metrics,
) -> Result<(Writer, WriterThread), StoreError> {
    let (commands, queue) = mpsc::channel(queue_capacity.get());
    let for_thread = metrics.clone();
    let thread = std::thread::Builder::new()
        .name("commerce-writer".to_owned())
        .spawn(move || run(&connection, queue, &for_thread))?;
    let writer = Writer {
        commands: commands.clone(),
        metrics: metrics.clone(),
    };
    Ok((
        writer,
        WriterThread {
            commands,
            thread,
            metrics,
        },
    ))
}

fn run(
    connection: &Connection,
    mut queue: mpsc::Receiver<Command>,
    metrics: &Metrics,
) -> Answer<()> {
    let mut batch = Vec::with_capacity(BATCH_COMMANDS_MAX);
    // Zero commands: the queue is closed and empty.
    while queue.blocking_recv_many(&mut batch, BATCH_COMMANDS_MAX) > 0 {
        for command in &batch {
            metrics.command_unqueued();
            if matches!(command, Command::Stop) {
                queue.close();
            }
        }
        commit(connection, &mut batch, metrics);
    }
    checkpoint(connection)
}

/// Runs the batch in one transaction and answers it.
fn commit(connection: &Connection, batch: &mut Vec<Command>, metrics: &Metrics) {
    let size = batch.len();
    let mut commands = batch.drain(..);
    let mut pending = Vec::with_capacity(size);
    match execute(connection, &mut commands, &mut pending) {
        Ok(commit) => {
            metrics.batch_committed(size, commit);
            for done in pending {
                answer(done, metrics);
            }
        }
        Err(error) => {
            metrics.batch_failed();
            tracing::error!(%error, commands = size, "a batch was not committed");
            if !connection.is_autocommit()
                && let Err(error) = connection.execute_batch("ROLLBACK")
            {
                tracing::error!(%error, "the failed batch could not be rolled back");
            }
            let error = Arc::new(error);
            for done in pending.into_iter().chain(commands.filter_map(unexecuted)) {
                disappoint(done, &error, metrics);
            }
        }
    }
}

/// The transaction. Returns how long its COMMIT took. On failure, commands not yet run are
/// still in `commands` and the others in `pending`; every one of them gets an answer.
fn execute(
    connection: &Connection,
    commands: &mut impl Iterator<Item = Command>,
    pending: &mut Vec<Pending>,
) -> rusqlite::Result<Duration> {
    connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    for command in commands {
        match command {
            Command::Place(order, caller) => {
                let moment = Moment::new(unix_time_ms());
                match in_savepoint(connection, |savepoint| {
                    place::place(savepoint, &order, &moment)
                }) {
                    Ok(answer) => pending.push(Pending::Place(answer, caller)),
                    Err(broken) => {
                        // Only holds the caller's place: the batch's error replaces it.
                        pending.push(Pending::Place(Err(StoreError::Closed), caller));
                        return Err(broken);
                    }
                }
            }
            Command::Ping(caller) => pending.push(Pending::Ping(caller)),
            Command::Stop => {}
        }
    }
    let started = Instant::now();
    connection.prepare_cached("COMMIT")?.execute([])?;
    Ok(started.elapsed())
}

/// Runs one command so that its failure leaves the rest of the batch as it was.
///
/// The outer error means the transaction itself is gone: SQLite rolls back on its own when
/// the disk is full or fails, and then no savepoint is left to return to.
fn in_savepoint<T>(
    connection: &Connection,
    command: impl FnOnce(&Savepoint<'_>) -> Answer<T>,
) -> rusqlite::Result<Answer<T>> {
    connection
        .prepare_cached("SAVEPOINT command")?
        .execute([])?;
    let savepoint = Savepoint { connection };
    let answer = command(&savepoint);
    if answer.is_err() {
        savepoint.undo()?;
    }
    connection.prepare_cached("RELEASE command")?.execute([])?;
    Ok(answer)
}

/// The open savepoint of one command.
pub(super) struct Savepoint<'c> {
    pub(super) connection: &'c Connection,
}

impl Savepoint<'_> {
    /// Takes back what the command did so far; the savepoint stays open.
    pub(super) fn undo(&self) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("ROLLBACK TO command")?
            .execute([])?;
        Ok(())
    }
}

/// Counts and sends an answer that is true now. The caller may be gone; that is no error.
fn answer(done: Pending, metrics: &Metrics) {
    match done {
        Pending::Place(answer, caller) => {
            count(&answer, metrics);
            let _ = caller.send(answer);
        }
        Pending::Ping(caller) => {
            let _ = caller.send(Ok(()));
        }
    }
}

/// Tells a caller that its batch failed.
fn disappoint(done: Pending, error: &Arc<rusqlite::Error>, metrics: &Metrics) {
    match done {
        Pending::Place(_, caller) => {
            metrics.order_refused(RefusalReason::Storage);
            let _ = caller.send(Err(StoreError::Batch(error.clone())));
        }
        Pending::Ping(caller) => {
            let _ = caller.send(Err(StoreError::Batch(error.clone())));
        }
    }
}

fn unexecuted(command: Command) -> Option<Pending> {
    match command {
        Command::Place(_, caller) => Some(Pending::Place(Err(StoreError::Closed), caller)),
        Command::Ping(caller) => Some(Pending::Ping(caller)),
        Command::Stop => None,
    }
}

fn count(answer: &Answer<Placement>, metrics: &Metrics) {
    match answer {
        Ok(Placement::Placed { total, units, .. }) => {
            // Totals are sums of positive prices: never negative.
            let minor = u64::try_from(total.minor()).unwrap_or(0);
            metrics.order_created(minor, total.currency().to_string(), *units);
        }
        Ok(Placement::Refused { reason, .. }) => metrics.order_refused(*reason),
        Ok(Placement::Replayed(_)) => metrics.replayed(),
        Ok(Placement::KeyReused) => metrics.order_refused(RefusalReason::KeyReused),
        Err(_) => metrics.order_refused(RefusalReason::Storage),
    }
}

/// Moves the whole log into the database file and empties it.
fn checkpoint(connection: &Connection) -> Answer<()> {
    let (busy, pages): (bool, i64) =
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    if busy {
        tracing::warn!(pages, "another connection kept the log from being emptied");
    } else {
        tracing::info!("the log is in the database file");
    }
    Ok(())
}

/// Milliseconds since the Unix epoch; 0 on a clock set before it.
fn unix_time_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
