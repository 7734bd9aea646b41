//! A census of long-lived tasks: how many of each kind there are, and how old the oldest is.
//!
//! A task that is not counted cannot leak unseen, so everything that outlives a request is
//! spawned here. A kind that only grows, or whose oldest member outlives its purpose, is a
//! leak; the metrics and an alert show it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

/// What lives longer than a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A client that watches a group.
    Watcher,
    /// Reads a watched group.
    GroupReader,
    /// Ends groups, rotates keys.
    Upkeep,
    /// Reads the campaign file, assesses experiments.
    Campaign,
    /// Writes observations.
    Observations,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Watcher,
        Self::GroupReader,
        Self::Upkeep,
        Self::Campaign,
        Self::Observations,
    ];

    /// The label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Watcher => "watcher",
            Self::GroupReader => "group_reader",
            Self::Upkeep => "upkeep",
            Self::Campaign => "campaign",
            Self::Observations => "observations",
        }
    }
}

/// The tasks that live now.
#[derive(Clone)]
pub struct Census(Arc<Inner>);

struct Inner {
    living: Mutex<BTreeMap<u64, (Kind, Instant)>>,
    next: std::sync::atomic::AtomicU64,
    changed: watch::Sender<()>,
}

impl Default for Census {
    fn default() -> Self {
        Self(Arc::new(Inner {
            living: Mutex::default(),
            next: std::sync::atomic::AtomicU64::new(0),
            changed: watch::channel(()).0,
        }))
    }
}

impl Census {
    /// Spawns a task and counts it until it ends, panics or is cancelled.
    pub fn spawn(&self, kind: Kind, task: impl Future<Output = ()> + Send + 'static) {
        let entry = self.enter(kind);
        tokio::spawn(async move {
            task.await;
            drop(entry);
        });
    }

    /// Counts something until the entry is dropped.
    #[must_use]
    pub fn enter(&self, kind: Kind) -> Entry {
        let next = &self.0.next;
        let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.0.living().insert(number, (kind, Instant::now()));
        Entry {
            census: self.clone(),
            number,
        }
    }

    /// Tasks of a kind, and the age of the oldest in whole seconds.
    #[must_use]
    pub fn count(&self, kind: Kind) -> (u64, u64) {
        let living = self.0.living();
        let of_kind = living.values().filter(|(of, _)| *of == kind);
        let oldest = of_kind
            .clone()
            .map(|(_, since)| since.elapsed().as_secs())
            .max();
        (
            u64::try_from(of_kind.count()).unwrap_or(u64::MAX),
            oldest.unwrap_or(0),
        )
    }

    /// Waits until no task of a kind lives.
    pub async fn none_of(&self, kind: Kind) {
        let mut changed = self.0.changed.subscribe();
        while self.count(kind).0 > 0 {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Inner {
    fn living(&self) -> MutexGuard<'_, BTreeMap<u64, (Kind, Instant)>> {
        self.living.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One member of the census.
pub struct Entry {
    census: Census,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.census.0.living().remove(&self.number);
        self.census.0.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_is_counted_until_it_ends_also_by_a_panic() {
        let census = Census::default();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        census.spawn(Kind::Watcher, async {
            let _ = gone.await;
        });
        census.spawn(Kind::Upkeep, async { panic!("on purpose") });
        assert_eq!(census.count(Kind::Watcher).0, 1);
        census.none_of(Kind::Upkeep).await;
        drop(go);
        census.none_of(Kind::Watcher).await;
        assert_eq!(census.count(Kind::Watcher), (0, 0));
    }
}
