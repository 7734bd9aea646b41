//! What has to be done from time to time: groups whose deadline has come are ended, signing
//! keys are rotated, what is too old is forgotten, and what only the database knows is counted.

use std::sync::Arc;
use std::time::Duration;

use crate::command::forget::{self, ForgetEvents, ForgetKeys, Keep};
use crate::command::group::{self, EndGroups};
use crate::command::member::{self, RotateKeys};
use crate::command::pay::Provider;
use crate::http::member::Issuer;
use crate::membership::token::Ring;
use crate::metrics::{Metrics, StockTotals};
use crate::relay::sink;
use crate::store::sql::{Connection, SqlError};
use crate::store::{Store, StoreError, unix_time_ms};

/// Between two looks at the deadlines. Joining and paying look at them on their own.
const LOOK: Duration = Duration::from_millis(250);
/// Looks between two counts and looks at the keys: every 5 seconds.
const LOOKS_PER_COUNT: u32 = 20;
/// Looks between two times of forgetting: every minute.
const LOOKS_PER_FORGETTING: u32 = 240;

/// The task.
pub(crate) struct Upkeep {
    pub(crate) store: Store,
    pub(crate) provider: Provider,
    pub(crate) keep: Keep,
    pub(crate) issuer: Arc<Issuer>,
    pub(crate) metrics: Metrics,
}

impl Upkeep {
    /// Looks after things until the store closes.
    pub(crate) async fn run(self) {
        let mut looks = 0_u32;
        loop {
            let outcome = async {
                if looks.is_multiple_of(LOOKS_PER_COUNT) {
                    self.count().await?;
                    self.issuer.replace(keys(&self.store).await?);
                }
                if looks.is_multiple_of(LOOKS_PER_FORGETTING) {
                    self.forget().await?;
                }
                self.end_groups().await
            };
            match outcome.await {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "upkeep has failed and is tried again"),
            }
            looks = looks.wrapping_add(1);
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn end_groups(&self) -> Result<(), StoreError> {
        let any = self
            .store
            .read(|connection| group::any_ending(connection, unix_time_ms()));
        if any.await? {
            let provider = self.provider;
            self.store.run_patiently(EndGroups { provider }).await?;
        }
        Ok(())
    }

    /// Everything that is too old, one small transaction after the other.
    async fn forget(&self) -> Result<(), StoreError> {
        let before = |keep: Duration| {
            let keep_ms = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
            unix_time_ms().saturating_sub(keep_ms)
        };
        let oldest = self.store.read(forget::oldest).await?;
        let is_due = |oldest: Option<i64>, before_ms| oldest.is_some_and(|ms| ms < before_ms);
        let before_ms = before(self.keep.keys);
        if is_due(oldest.key_ms, before_ms) {
            while self.store.run_patiently(ForgetKeys { before_ms }).await? > 0 {}
        }
        let before_ms = before(self.keep.events);
        let mut after = is_due(oldest.event_ms, before_ms).then_some(0);
        while let Some(place) = after {
            let look = ForgetEvents {
                before_ms,
                after: place,
            };
            after = self.store.run_patiently(look).await?.next;
        }
        Ok(())
    }

    async fn count(&self) -> Result<(), StoreError> {
        let counted = self.store.read(|connection| {
            Ok((
                stock(connection)?,
                group::by_state(connection)?,
                sink::oldest_waiting_ms(connection)?,
            ))
        });
        let (stock, groups, waiting) = counted.await?;
        self.metrics.stock(stock);
        self.metrics.groups(&groups);
        let now_ms = unix_time_ms();
        for (kind, oldest_ms) in waiting {
            let age_ms = oldest_ms.map_or(0, |oldest| now_ms.saturating_sub(oldest));
            let age = Duration::from_millis(u64::try_from(age_ms).unwrap_or(0));
            self.metrics.outbox_lag(kind.as_str(), age);
        }
        Ok(())
    }
}

fn stock(connection: &mut dyn Connection) -> Result<StockTotals, SqlError> {
    let rows = connection.query(
        "SELECT CAST(coalesce(sum(available), 0) AS BIGINT),
                CAST(coalesce(sum(reserved), 0) AS BIGINT),
                CAST(coalesce(sum(sold), 0) AS BIGINT),
                CAST(coalesce(sum(CASE WHEN available < 0 OR reserved < 0 OR sold < 0
                    OR initial <> available + reserved + sold THEN 1 ELSE 0 END), 0) AS BIGINT)
         FROM stock",
        &[],
    )?;
    let Some(mut row) = rows.into_iter().next() else {
        return Ok(StockTotals::default());
    };
    Ok(StockTotals {
        available: row.take()?,
        reserved: row.take()?,
        sold: row.take()?,
        oversold_skus: row.take()?,
    })
}

/// The signing keys, a new one among them if one was due.
///
/// # Errors
/// [`StoreError`]
pub(crate) async fn keys(store: &Store) -> Result<Ring, StoreError> {
    let ring = store.read(|connection| member::keys(connection)).await?;
    if !ring.wants_key(unix_time_ms()) {
        return Ok(ring);
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| {
        StoreError::Thread(std::io::Error::other(format!("no random bytes: {error}")))
    })?;
    store.run_patiently(RotateKeys { seed }).await
}
