//! The payment provider, seen from here: what its messages look like, and asking again when a
//! callback does not come.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use crate::command::callback::{Applied, Callback};
use crate::command::pay::Provider;
use crate::command::{Command, Tx};
use crate::metrics::Metrics;
use crate::order::OrderId;
use crate::payment::Kind;
use crate::store::sql::{Param, SqlError};
use crate::store::{Store, StoreError, unix_time_ms};

/// How often payments that are due for a question are looked for.
const ROUND: Duration = Duration::from_millis(500);
/// Payments asked about in one round.
const QUESTIONS_MAX: i64 = 64;

/// One event, as the provider calls back with it and lists it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// The provider's identity of the event; `refund:<id>` for a refund.
    pub event_id: String,
    /// About which payment.
    pub payment_id: Uuid,
    /// The provider's order of a payment's events, from 1.
    pub sequence: i64,
    /// What happened.
    pub kind: Kind,
    /// How much, in minor units.
    pub amount_minor: i64,
}

/// What the provider lists for one payment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Statement {
    /// Every event so far.
    pub events: Vec<Notice>,
}

/// Applies one event. `None` when no payment of ours is meant.
///
/// # Errors
/// [`StoreError`]
pub async fn apply(
    store: &Store,
    notice: Notice,
    provider: Provider,
) -> Result<Option<Applied>, StoreError> {
    let payment = notice.payment_id;
    let order = store.read(move |connection| {
        let rows = connection.query(
            "SELECT order_id FROM payment WHERE id = ?1",
            &[Param::Uuid(payment)],
        )?;
        let found: Option<Result<OrderId, SqlError>> =
            rows.into_iter().next().map(|mut row| row.take());
        found.transpose()
    });
    let Some(order) = order.await? else {
        return Ok(None);
    };
    let callback = Callback {
        order,
        payment,
        event_id: notice.event_id,
        sequence: notice.sequence,
        kind: notice.kind,
        amount_minor: notice.amount_minor,
        provider,
    };
    store.run_patiently(callback).await.map(Some)
}

/// Asks the provider about payments whose callbacks are overdue, until `stop` closes.
pub async fn reconcile(
    store: Store,
    metrics: Metrics,
    http: reqwest::Client,
    url: String,
    provider: Provider,
    mut stop: watch::Receiver<bool>,
) {
    let work = async {
        loop {
            tokio::time::sleep(ROUND).await;
            if let Err(error) = round(&store, &metrics, &http, &url, provider).await {
                tracing::warn!(%error, "payments could not be reconciled");
            }
        }
    };
    tokio::select! {
        () = work => {}
        _ = stop.wait_for(|stopped| *stopped) => {}
    }
}

async fn round(
    store: &Store,
    metrics: &Metrics,
    http: &reqwest::Client,
    url: &str,
    provider: Provider,
) -> Result<(), StoreError> {
    let now_ms = unix_time_ms();
    let due = store.read(move |connection| {
        let rows = connection.query(
            "SELECT id FROM payment WHERE check_at_ms IS NOT NULL AND check_at_ms <= ?1
             ORDER BY check_at_ms LIMIT ?2",
            &[Param::Integer(now_ms), Param::Integer(QUESTIONS_MAX)],
        )?;
        rows.into_iter()
            .map(|mut row| row.take::<Uuid>())
            .collect::<Result<Vec<_>, _>>()
    });
    for payment in due.await? {
        // Before the question: an answer that settles the payment clears it again.
        store.run_patiently(Postpone { payment, provider }).await?;
        let statement = async {
            let address = format!("{}/v1/charges/{payment}", url.trim_end_matches('/'));
            let response = http.get(address).send().await?.error_for_status()?;
            response.json::<Statement>().await
        };
        match statement.await {
            Ok(statement) => {
                for notice in statement.events {
                    if notice.payment_id == payment
                        && let Some(applied) = apply(store, notice, provider).await?
                        && applied != Applied::Repeated
                    {
                        metrics.callback_recovered();
                    }
                }
            }
            Err(error) => tracing::warn!(%error, %payment, "the provider did not answer"),
        }
    }
    Ok(())
}

/// The next question about a payment is later.
struct Postpone {
    payment: Uuid,
    provider: Provider,
}

impl Command for Postpone {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        let Provider::External { check_after_ms } = self.provider else {
            return Ok(());
        };
        let next = tx.now_ms.saturating_add(check_after_ms);
        tx.write(
            "UPDATE payment SET check_at_ms = ?2 WHERE id = ?1 AND check_at_ms IS NOT NULL",
            &[Param::Uuid(self.payment), Param::Integer(next)],
        )?;
        Ok(())
    }
}
