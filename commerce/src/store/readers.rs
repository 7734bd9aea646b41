//! Reads: a few connections, each used by one blocking thread at a time.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::sql::{Connection, SqlError};
use super::{StoreError, Target};
use crate::metrics::Metrics;

/// Reads that may wait for a connection, per connection.
const WAITING_PER_READER: usize = 256;

/// The connections, and how many may wait for one.
pub(super) struct Readers {
    idle: Mutex<Vec<Box<dyn Connection>>>,
    /// One permit per connection, so that a holder always finds one idle.
    connections: Arc<Semaphore>,
    /// One permit per read that runs or waits: the bound of the queue.
    admitted: Semaphore,
    metrics: Metrics,
}

impl Readers {
    pub(super) fn open(
        target: &Target,
        count: NonZeroU32,
        metrics: Metrics,
    ) -> Result<Self, StoreError> {
        let idle = (0..count.get())
            .map(|_| target.open_to_read())
            .collect::<Result<Vec<_>, _>>()?;
        let count = idle.len();
        Ok(Self {
            idle: Mutex::new(idle),
            connections: Arc::new(Semaphore::new(count)),
            admitted: Semaphore::new(count.saturating_mul(WAITING_PER_READER)),
            metrics,
        })
    }

    /// Runs `read` over one snapshot, on a thread that may block.
    ///
    /// A caller that goes away does not cancel a read that runs; its connection returns to
    /// the pool when it ends.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&mut dyn Connection) -> Result<T, SqlError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let Ok(_admitted) = self.admitted.try_acquire() else {
            self.metrics.read_refused();
            return Err(StoreError::ReadersBusy);
        };
        let permit = Arc::clone(&self.connections).acquire_owned().await;
        let mut lent = Lent {
            connection: self.idle().pop(),
            readers: Arc::clone(self),
            _permit: permit.map_err(|_| StoreError::Closed)?,
        };
        let task = tokio::task::spawn_blocking(move || {
            // As many permits as connections: a holder always finds one.
            let connection = lent.connection.as_mut().ok_or(StoreError::ReadersBusy)?;
            connection.recover()?;
            connection.begin_snapshot()?;
            let found = read(connection.as_mut());
            connection.rollback()?;
            Ok(found?)
        });
        task.await
            .map_err(|error| StoreError::Thread(error.into()))?
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Box<dyn Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection out of the pool. It goes back on drop, even when the read panicked.
struct Lent {
    /// Present until the drop.
    connection: Option<Box<dyn Connection>>,
    readers: Arc<Readers>,
    /// Dropped after the connection is back, so that the next holder finds it.
    _permit: OwnedSemaphorePermit,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            // After a panic a snapshot may still be open. A connection that cannot leave it
            // is made anew at its next use.
            let _ = connection.rollback();
            self.readers.idle().push(connection);
        }
    }
}
