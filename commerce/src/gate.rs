//! The Redis gate: turns orders away before they reach the hot rows of PostgreSQL.
//!
//! It admits; it never decides. The ledger is PostgreSQL: an order that the gate calls sold
//! out is checked against the ledger without taking the row's lock, and where they disagree
//! the gate is loaded anew. So a gate that was flushed, failed over, or is gone costs speed
//! and nothing else.

mod lock;

use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{RedisError, Script};
use tokio::sync::watch;

use crate::catalogue::Sku;
use crate::idempotency::Scope;
use crate::metrics::Metrics;
use crate::order::Draft;
use crate::store::sql::SqlError;
use crate::store::{Store, unix_time_ms};
pub use lock::Lock;

/// How long a reservation outlives a process that does not settle it, in milliseconds.
const LEASE_MS: i64 = 30_000;
/// Longest wait for Redis: beyond it the ledger alone is faster.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long a loading process keeps others from loading.
const LOADING: Duration = Duration::from_secs(5);
/// Pause after a load that failed.
const RELOAD: Duration = Duration::from_secs(1);

/// What the gate says about an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Its units are set aside until it is settled.
    Admitted,
    /// This SKU ran out, as far as the gate knows.
    SoldOut(Sku),
    /// The gate knows nothing: it is gone, or has not been loaded.
    Unknown,
}

/// A connection to Redis, made anew when it breaks.
#[derive(Clone)]
pub struct Gate {
    redis: ConnectionManager,
    shard: String,
    metrics: Metrics,
    /// Asks for a load.
    stale: watch::Sender<u64>,
    reserve: Script,
    release: Script,
}

impl Gate {
    /// Connects. `shard` names the hash tag, so that a shard's keys live on one node.
    ///
    /// # Errors
    /// [`RedisError`] when the address is unusable; an absent server is no error.
    pub fn connect(url: &str, shard: &str, metrics: Metrics) -> Result<Self, RedisError> {
        let client = redis::Client::open(url)?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(PATIENCE))
            .set_connection_timeout(Some(PATIENCE))
            .set_number_of_retries(1);
        let redis = ConnectionManager::new_lazy_with_config(client, config)?;
        Ok(Self {
            redis,
            shard: shard.to_owned(),
            metrics,
            stale: watch::channel(0).0,
            reserve: Script::new(include_str!("gate/reserve.lua")),
            release: Script::new(include_str!("gate/release.lua")),
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{{{}}}:{name}", self.shard)
    }

    /// The reservation of a request: the same for every repetition.
    #[must_use]
    pub fn reservation(scope: &Scope) -> String {
        use sha2::{Digest as _, Sha256};
        let mut digest = Sha256::new();
        for part in [&*scope.principal, scope.route, scope.key.as_str()] {
            digest.update(part.as_bytes());
            digest.update([0]);
        }
        let mut text = String::with_capacity(32);
        for byte in digest.finalize().iter().take(16) {
            use std::fmt::Write as _;
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// Sets the order's units aside, all or none.
    pub async fn admit(&self, reservation: &str, draft: &Draft) -> Admission {
        let mut call = self.reserve.prepare_invoke();
        call.key(self.key("stock"))
            .key(self.key("pending"))
            .arg(reservation)
            .arg(unix_time_ms())
            .arg(LEASE_MS);
        for (sku, units) in draft.lines() {
            call.arg(sku.as_str()).arg(units);
        }
        let mut redis = self.redis.clone();
        let answer: Result<(i64, String), _> = call.invoke_async(&mut redis).await;
        let admission = match answer {
            Ok((1, _)) => Admission::Admitted,
            Ok((0, sku)) => Sku::parse(&sku).map_or(Admission::Unknown, Admission::SoldOut),
            Ok(_) => {
                self.mark_stale();
                Admission::Unknown
            }
            Err(error) => {
                tracing::debug!(%error, "the gate does not answer");
                Admission::Unknown
            }
        };
        self.metrics.admission(match admission {
            Admission::Admitted => "admitted",
            Admission::SoldOut(_) => "sold_out",
            Admission::Unknown => "unknown",
        });
        admission
    }

    /// The ledger has decided: the units are taken, or they come back.
    pub async fn settle(&self, reservation: &str, taken: bool) {
        let mut redis = self.redis.clone();
        let mut call = self.release.prepare_invoke();
        call.key(self.key("stock"))
            .key(self.key("pending"))
            .arg(reservation)
            .arg(if taken { "0" } else { "1" });
        let settled: Result<i64, _> = call.invoke_async(&mut redis).await;
        if let Err(error) = settled {
            // Its lease gives the units back; the ledger refuses what is not there.
            tracing::debug!(%error, "a reservation was not settled");
        }
    }

    /// The ledger disagrees: load it anew.
    pub fn mark_stale(&self) {
        self.stale
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Loads the gate whenever it is stale, until `stop` closes.
    pub async fn keep_loaded(self, store: Store, mut stop: watch::Receiver<bool>) {
        let mut stale = self.stale.subscribe();
        let work = async {
            loop {
                stale.mark_unchanged();
                match self.load(&store).await {
                    Ok(()) => {}
                    Err(error) => {
                        tracing::warn!(error, "the gate could not be loaded and is tried again");
                        tokio::time::sleep(RELOAD).await;
                        continue;
                    }
                }
                // Not more often: every refusal of a sold-out SKU may ask for it.
                tokio::time::sleep(Duration::from_millis(100)).await;
                if stale.changed().await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = work => {}
            _ = stop.wait_for(|stopped| *stopped) => {}
        }
    }

    /// Writes the ledger's stock into the gate. One process at a time.
    async fn load(&self, store: &Store) -> Result<(), String> {
        let mut redis = self.redis.clone();
        let name = self.key("loading");
        let lock = Lock::acquire(&mut redis, &name, LOADING).await;
        let Some(lock) = lock.map_err(|error| error.to_string())? else {
            return Ok(());
        };
        let loaded = self.load_locked(store, &mut redis).await;
        lock.release(&mut redis)
            .await
            .map_err(|error| error.to_string())?;
        loaded
    }

    async fn load_locked(
        &self,
        store: &Store,
        redis: &mut ConnectionManager,
    ) -> Result<(), String> {
        let stock = store.read(|connection| {
            let rows = connection.query("SELECT sku, available FROM stock", &[])?;
            rows.into_iter()
                .map(|mut row| Ok((row.take()?, row.take()?)))
                .collect::<Result<Vec<(String, i64)>, SqlError>>()
        });
        let stock = stock.await.map_err(|error| error.to_string())?;
        if stock.is_empty() {
            return Ok(());
        }
        redis::pipe()
            .atomic()
            .hset_multiple(self.key("stock"), &stock)
            .ignore()
            .exec_async(redis)
            .await
            .map_err(|error| error.to_string())
    }
}
