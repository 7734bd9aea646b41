//! The relays: one task per sink takes committed events from the outbox to it, at least once.
//!
//! ```text
//! outbox ─► source (SQLite: after the cursor; PostgreSQL: claimed rows)
//!            ─► flush: 50 events, or 200 ms since the oldest
//!                ─► up to 4 batches in flight ─► sink
//!                    ─► acknowledged: the cursor moves over what is acknowledged without a gap
//! ```
//!
//! The outbox is the queue: nothing is kept in memory that a crash could lose, and what was
//! sent but not acknowledged is sent again. Consumers drop the event ids they have seen.

pub mod deliver;
pub mod flush;
pub mod sink;
mod source;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::metrics::Metrics;
use crate::store::sql::Backend;
use crate::store::{Store, StoreError, unix_time_ms};
use deliver::{Client, Delivered};
use flush::Flush;
use sink::Sink;
use source::{Batch, Settle};

/// Batches to one sink at once.
const IN_FLIGHT_MAX: usize = 4;
/// How long a relay waits after the database failed it.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// PostgreSQL: how often events of other machines are looked for.
const FOREIGN_EVENTS: Duration = Duration::from_millis(200);

/// Runs a relay per sink until `stop` closes. New sinks are found when `sinks` changes.
pub async fn run(
    store: Store,
    metrics: Metrics,
    client: Client,
    mut sinks: watch::Receiver<u64>,
    mut stop: watch::Receiver<bool>,
) {
    let mut running: BTreeMap<String, tokio::task::AbortHandle> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        sinks.mark_unchanged();
        match store.read(sink::list).await {
            Ok(found) => {
                running.retain(|id, task| {
                    let stays = found.iter().any(|sink| sink.id == *id);
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                for sink in found {
                    if !running.contains_key(&sink.id) {
                        let id = sink.id.clone();
                        let relay = Relay {
                            sink,
                            store: store.clone(),
                            metrics: metrics.clone(),
                            client: client.clone(),
                        };
                        running.insert(id, tasks.spawn(relay.run()));
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the sinks could not be read"),
        }
        let patience = match store.backend() {
            Backend::Sqlite => Duration::from_secs(60),
            // Another machine may have added one.
            Backend::Postgres => Duration::from_secs(5),
        };
        tokio::select! {
            _ = stop.wait_for(|stopped| *stopped) => break,
            _ = sinks.changed() => {}
            () = tokio::time::sleep(patience) => {}
        }
    }
    // What was sent and not acknowledged is sent again by the next process.
    tasks.shutdown().await;
}

struct Relay {
    sink: Sink,
    store: Store,
    metrics: Metrics,
    client: Client,
}

impl Relay {
    async fn run(self) {
        loop {
            if let Err(error) = self.relay().await {
                tracing::warn!(sink = self.sink.id, %error, "a relay was interrupted");
            }
            tokio::time::sleep(STORE_RETRY).await;
        }
    }

    /// Reads and sends until the database fails.
    async fn relay(&self) -> Result<(), StoreError> {
        let mut committed = self.store.events();
        let mut source = source::Source::start(&self.store, &self.sink).await?;
        let mut in_flight: JoinSet<(Batch, Delivered)> = JoinSet::new();
        loop {
            committed.mark_unchanged();
            let mut wait = None;
            while in_flight.len() < IN_FLIGHT_MAX {
                let waiting = source.waiting(&self.store).await?;
                self.metrics
                    .outbox_waiting(self.sink.kind.as_str(), waiting.count);
                match flush::decide(waiting, unix_time_ms()) {
                    Flush::Now => {
                        let batch = source.take(&self.store).await?;
                        if batch.events.is_empty() {
                            break;
                        }
                        if crate::mutant::Mutant::ChannelEvents.is_on() {
                            // As if memory were the queue: what is taken counts as delivered.
                            let mut forgetful = source.clone();
                            let settle = forgetful.acknowledge(&batch, Delivered::default());
                            self.store.run_patiently(settle).await?;
                        }
                        let (client, sink) = (self.client.clone(), self.sink.clone());
                        let metrics = self.metrics.clone();
                        in_flight.spawn(async move {
                            let delivered = client.deliver(&sink, &batch.events, &metrics).await;
                            (batch, delivered)
                        });
                    }
                    Flush::Wait(duration) => {
                        wait = Some(duration);
                        break;
                    }
                    Flush::Idle => break,
                }
            }
            let idle = match self.store.backend() {
                Backend::Sqlite => wait,
                Backend::Postgres => Some(wait.unwrap_or(FOREIGN_EVENTS)),
            };
            let is_full = in_flight.len() >= IN_FLIGHT_MAX;
            tokio::select! {
                Some(done) = in_flight.join_next() => {
                    let Ok((batch, delivered)) = done else {
                        // A panic in a delivery: start again from what is acknowledged.
                        return Err(StoreError::Closed);
                    };
                    let settle = source.acknowledge(&batch, delivered);
                    if !settle.is_empty() {
                        self.store.run_patiently(settle).await?;
                    }
                }
                _ = committed.changed(), if !is_full => {}
                () = sleep_or_never(idle), if !is_full => {}
            }
        }
    }
}

async fn sleep_or_never(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}

impl Settle {
    /// Whether it changes nothing, so that no transaction is needed.
    fn is_empty(&self) -> bool {
        self.cursor.is_none() && self.delivered.is_empty() && self.dead.is_empty()
    }
}
