//! How many durable orders a second a machine's disk and one processor take, without HTTP: the
//! writer's own limit. `commerce rehearse --database new.db`.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::catalogue::{self, SeedError};
use crate::command::place::{Place, Terms};
use crate::command::{Answer, Keyed, Verdict};
use crate::event::Origin;
use crate::idempotency::{Fingerprint, Key, KeyError, Reply, Scope};
use crate::metrics::Metrics;
use crate::order::{Draft, DraftError};
use crate::store::{Limits, Store, StoreError, Target};
use crate::trace::TraceId;

/// Commands that may wait for the writer; more than any sensible number of clients.
const QUEUE_CAPACITY: NonZeroUsize = NonZeroUsize::MIN.saturating_add(65_535);

/// What was measured.
#[derive(Debug)]
pub struct Rehearsal {
    clients: u32,
    took: Duration,
    /// Of each order, ascending.
    latencies: Vec<Duration>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// There is a file: it might be somebody's shop.
    #[error("{0} exists; name a file that does not: it is filled with orders")]
    Exists(String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The embedded catalogue is faulty.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// What is ordered is no order.
    #[error(transparent)]
    Draft(#[from] DraftError),
    /// What names it is no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An order was refused.
    #[error("an order was refused; the rehearsal's stock is used up")]
    Refused,
}

/// Orders one unit of one hot SKU, `clients` at a time, for so long.
///
/// # Errors
/// [`RehearsalError`]
pub async fn run(
    database: &Path,
    clients: u32,
    duration: Duration,
) -> Result<Rehearsal, RehearsalError> {
    if database.exists() {
        return Err(RehearsalError::Exists(database.display().to_string()));
    }
    let target = Target::Sqlite(database.to_owned());
    let limits = Limits {
        queue_capacity: QUEUE_CAPACITY,
        readers: NonZeroU32::MIN,
    };
    let seed = catalogue::seed()?;
    let opened =
        tokio::task::spawn_blocking(move || Store::open(&target, limits, &seed, &Metrics::new()));
    let opened = opened.await.map_err(std::io::Error::other);
    let (store, writer) = opened.map_err(StoreError::Thread)??;
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        tasks.spawn(order_until(store.clone(), client, began + duration));
    }
    let mut latencies = Vec::new();
    while let Some(done) = tasks.join_next().await {
        let done = done.map_err(std::io::Error::other);
        latencies.extend(done.map_err(StoreError::Thread)??);
    }
    let took = began.elapsed();
    writer.stop().await?;
    latencies.sort_unstable();
    Ok(Rehearsal {
        clients,
        took,
        latencies,
    })
}

async fn order_until(
    store: Store,
    client: u32,
    until: Instant,
) -> Result<Vec<Duration>, RehearsalError> {
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let key = format!("{client}-{}", latencies.len());
        let began = Instant::now();
        let keyed = Keyed {
            scope: Scope {
                principal: "rehearsal".to_owned(),
                route: "POST /api/v1/orders",
                key: Key::parse(key.as_bytes())?,
            },
            fingerprint: Fingerprint::of(key.as_bytes()),
            effect: Place {
                principal: "rehearsal".to_owned(),
                origin: Origin {
                    actor: "rehearsal".to_owned(),
                    trace: TraceId::generate(),
                },
                draft: Draft::new([("1001", 1)])?,
                terms: Terms::default(),
                hold: Duration::from_secs(900),
                is_sold_out: false,
                render,
            },
        };
        match store.run(keyed).await? {
            Answer::Done(reply, _) if reply.status == 201 => latencies.push(began.elapsed()),
            _ => return Err(RehearsalError::Refused),
        }
    }
    Ok(latencies)
}

fn render(verdict: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    let (status, body) = match verdict {
        Verdict::Placed(_, json) => (201, json.as_bytes().to_vec()),
        _ => (409, Vec::new()),
    };
    Ok(Reply {
        status,
        content_type: "application/json".to_owned(),
        location: None,
        etag: None,
        body,
    })
}

impl fmt::Display for Rehearsal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let orders = self.latencies.len();
        let count = u32::try_from(orders).unwrap_or(u32::MAX).max(1);
        let rate = u128::from(count) * 1_000 / self.took.as_millis().max(1);
        let mean = self.latencies.iter().sum::<Duration>() / count;
        let at = |per_mille: usize| {
            let last = orders.saturating_sub(1);
            let found = self.latencies.get(last.saturating_mul(per_mille) / 1_000);
            found.copied().unwrap_or_default()
        };
        write!(
            f,
            "{rate} orders/s, one hot SKU, {} at once, FULL: mean {mean:.1?}, p50 {:.1?}, p99 {:.1?}",
            self.clients,
            at(500),
            at(990)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_rehearsal_orders_and_spares_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("r.db");
        let rehearsal = run(&path, 4, Duration::from_millis(50)).await.unwrap();
        assert!(!rehearsal.latencies.is_empty());
        assert!(rehearsal.to_string().contains("orders/s"), "{rehearsal}");
        assert!(
            crate::audit::audit(&Target::Sqlite(path.clone()))
                .unwrap()
                .is_clean()
        );
        let again = run(&path, 4, Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(again, RehearsalError::Exists(_)), "{again}");
    }
}
