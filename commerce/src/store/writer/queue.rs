//! The queue before the writer: commands with their callers, in and out.

use std::thread::JoinHandle;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::{Command, Tx};
use crate::metrics::Metrics;
use crate::store::StoreError;
use crate::store::locks::Locks;

/// A command with its caller, and its output until the commit.
pub(super) trait Job: Send {
    fn locks(&self, locks: &mut Locks);
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<(), StoreError>;
    fn answer(self: Box<Self>, metrics: &Metrics);
    fn disappoint(self: Box<Self>, error: StoreError, metrics: &Metrics);
}

pub(super) struct Called<C: Command> {
    pub(super) command: C,
    pub(super) output: Option<C::Output>,
    pub(super) caller: oneshot::Sender<Result<C::Output, StoreError>>,
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

pub(super) enum Message {
    Run(Box<dyn Job>),
    /// Take no further commands; finish those queued, close the database, end.
    Stop,
}

/// The sending end of the queue.
#[derive(Clone)]
pub(in crate::store) struct Writer {
    pub(super) messages: mpsc::Sender<Message>,
    pub(super) metrics: Metrics,
}

impl Writer {
    /// Queues a command, or says at once that there is no room.
    pub(in crate::store) async fn run<C: Command>(
        &self,
        command: C,
    ) -> Result<C::Output, StoreError> {
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
    pub(in crate::store) async fn run_patiently<C: Command>(
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
    pub(super) messages: mpsc::Sender<Message>,
    pub(super) thread: JoinHandle<Result<(), StoreError>>,
    pub(super) metrics: Metrics,
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
