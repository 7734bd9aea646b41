//! Watching groups: one reader for each watched group, however many watch it.
//!
//! What watchers get are hints with a version. The truth is the row: the reader looks at it
//! when this process committed events, and every second for what other machines did. A
//! watcher that is slow misses versions, never the newest one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use uuid::Uuid;

use crate::census::{Census, Kind};
use crate::command::group;
use crate::group::Group;
use crate::store::{Store, StoreError};

/// Clients that may watch at once, over all groups.
pub const WATCHERS_MAX: usize = 10_000;
/// Longest time until another machine's change is seen.
const POLL: Duration = Duration::from_secs(1);
/// Shortest time between two reads of a group.
const PACE: Duration = Duration::from_millis(50);

type Channel = watch::Sender<Group>;

/// The watched groups. Cloning shares them.
#[derive(Clone)]
pub struct Hub {
    store: Store,
    census: Census,
    groups: Arc<Mutex<HashMap<Uuid, Weak<Channel>>>>,
}

/// A subscription: the newest known state of a group. The reader ends with the last one.
pub struct Watch {
    /// Changes when the group does.
    pub group: watch::Receiver<Group>,
    _channel: Arc<Channel>,
}

impl Hub {
    /// A hub without watchers.
    #[must_use]
    pub fn new(store: Store, census: Census) -> Self {
        Self {
            store,
            census,
            groups: Arc::default(),
        }
    }

    /// Watches a group; `None` when there is none of that id.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    pub async fn watch(&self, id: Uuid) -> Result<Option<Watch>, StoreError> {
        let read = self
            .store
            .read(move |connection| group::find(connection, id));
        let Some(now) = read.await? else {
            return Ok(None);
        };
        let known = self.groups().get(&id).and_then(Weak::upgrade);
        let channel = known.unwrap_or_else(|| self.begin(id, now));
        Ok(Some(Watch {
            group: channel.subscribe(),
            _channel: channel,
        }))
    }

    fn begin(&self, id: Uuid, now: Group) -> Arc<Channel> {
        let channel = Arc::new(watch::channel(now).0);
        self.groups().insert(id, Arc::downgrade(&channel));
        let (hub, weak) = (self.clone(), Arc::downgrade(&channel));
        self.census.spawn(Kind::GroupReader, async move {
            hub.keep(id, weak.clone()).await;
            let mut groups = hub.groups();
            if groups.get(&id).is_some_and(|of| Weak::ptr_eq(of, &weak)) {
                groups.remove(&id);
            }
        });
        channel
    }

    /// Reads the group while somebody watches it.
    async fn keep(&self, id: Uuid, channel: Weak<Channel>) {
        let mut events = self.store.events();
        loop {
            tokio::time::sleep(PACE).await;
            let _ = tokio::time::timeout(POLL, events.changed()).await;
            let Some(channel) = channel.upgrade() else {
                return;
            };
            match self
                .store
                .read(move |connection| group::find(connection, id))
                .await
            {
                Ok(Some(now)) => {
                    channel.send_if_modified(|known| {
                        let is_newer = now.version > known.version;
                        if is_newer {
                            *known = now;
                        }
                        is_newer
                    });
                }
                Ok(None) | Err(StoreError::Closed) => return,
                Err(error) => tracing::debug!(%error, "a watched group could not be read"),
            }
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<Uuid, Weak<Channel>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
