//! Who is told: the risk service, the payment provider, subscribers' webhooks.

use crate::command::{Command, Effect, Locks, Outcome, Tx};
use crate::idempotency::Reply;
use crate::row;
use crate::store::sql::{Backend, Connection, Field, Param, Record as _, Row, SqlError};
use crate::store::{StoreError, unix_time_ms};

/// What a sink expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Batches of all events.
    Risk,
    /// `payment.requested` and `refund.requested`, one a request.
    Provider,
    /// One tenant's events, one a request.
    Webhook,
}

impl Kind {
    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Risk => "risk",
            Self::Provider => "provider",
            Self::Webhook => "webhook",
        }
    }
}

impl Field for Kind {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match String::load(row)?.as_str() {
            "risk" => Ok(Self::Risk),
            "provider" => Ok(Self::Provider),
            "webhook" => Ok(Self::Webhook),
            _ => Err(SqlError::Column("a sink's kind")),
        }
    }
}

row! {
    /// A subscription to events.
    pub struct Sink in "sink" {
        /// Its identity.
        pub id: String ["id"],
        /// What it expects.
        #[serde(skip)]
        pub kind: Kind ["kind"],
        /// Only this principal's events.
        #[serde(skip)]
        pub principal: Option<String> ["principal"],
        /// Where events are sent.
        pub url: String ["url"],
        /// What signs them: Standard Webhooks.
        #[serde(skip)]
        pub secret: String ["secret"],
        /// SQLite: the last event before which everything is acknowledged.
        #[serde(skip)]
        pub cursor: i64 ["cursor"],
        /// Milliseconds since the Unix epoch.
        pub created_at_ms: i64 ["created_at_ms"],
    }
}

/// Which events of the outbox (alias `o`) a sink gets: ?1 is its kind, ?2 its principal.
pub(super) const WANTED: &str = "(?2 IS NULL OR o.principal = ?2)
    AND (?1 <> 'provider' OR o.topic IN ('payment.requested', 'refund.requested'))";

/// The sinks that are told now.
pub(super) fn list(connection: &mut dyn Connection) -> Result<Vec<Sink>, SqlError> {
    Sink::select(connection, "WHERE deleted_at_ms IS NULL ORDER BY id", &[])
}

/// Of each kind of sink, when the oldest event came that one of them has not acknowledged,
/// milliseconds since the Unix epoch. What is in flight is not acknowledged.
///
/// # Errors
/// [`SqlError`]
pub(crate) fn oldest_waiting_ms(
    connection: &mut dyn Connection,
) -> Result<Vec<(Kind, Option<i64>)>, SqlError> {
    let oldest = match connection.backend() {
        Backend::Sqlite => {
            "SELECT o.at_ms FROM outbox AS o
             WHERE o.seq > s.cursor AND (s.principal IS NULL OR o.principal = s.principal)
               AND (s.kind <> 'provider' OR o.topic IN ('payment.requested', 'refund.requested'))
             ORDER BY o.seq LIMIT 1"
        }
        Backend::Postgres => {
            "SELECT o.at_ms FROM delivery AS d JOIN outbox AS o USING (event_id)
             WHERE d.sink = s.id AND d.delivered_at_ms IS NULL ORDER BY d.seq LIMIT 1"
        }
    };
    let sql = format!(
        "SELECT kind, min(at_ms) FROM
             (SELECT s.kind AS kind, ({oldest}) AS at_ms FROM sink AS s
              WHERE s.deleted_at_ms IS NULL) AS each_sink GROUP BY kind"
    );
    let rows = connection.query(&sql, &[])?;
    rows.into_iter()
        .map(|mut row| Ok((row.take()?, row.take()?)))
        .collect()
}

/// The subscriptions of a principal.
///
/// # Errors
/// [`SqlError`]
pub fn of_principal(
    connection: &mut dyn Connection,
    principal: &str,
) -> Result<Vec<Sink>, SqlError> {
    Sink::select(
        connection,
        "WHERE deleted_at_ms IS NULL AND principal = ?1 ORDER BY created_at_ms, id",
        &[Param::Text(principal.into())],
    )
}

/// Makes sure that a sink of the operator's exists and has this address. It gets every event
/// there ever was.
#[derive(Debug)]
pub struct Configure {
    /// Which.
    pub kind: Kind,
    /// Where to.
    pub url: String,
    /// What signs.
    pub secret: String,
}

impl Command for Configure {
    type Output = ();

    fn locks(&self, locks: &mut Locks) {
        locks.name("sink", self.kind.as_str());
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        wait_for_events(tx)?;
        let text = |text: &str| Param::Text(text.to_owned().into());
        let id = self.kind.as_str();
        let updated = tx.execute(
            "UPDATE sink SET url = ?2, secret = ?3, deleted_at_ms = NULL WHERE id = ?1",
            &[text(id), text(&self.url), text(&self.secret)],
        )?;
        if updated > 0 {
            return Ok(());
        }
        let sink = Sink {
            id: id.to_owned(),
            kind: self.kind,
            principal: None,
            url: self.url.clone(),
            secret: self.secret.clone(),
            cursor: 0,
            created_at_ms: tx.now_ms,
        };
        tx.insert(&sink)?;
        if tx.connection().backend() == Backend::Postgres {
            tx.write(
                "INSERT INTO delivery (sink, event_id, leased_until_ms)
                 SELECT ?1, o.event_id, 0 FROM outbox AS o
                 WHERE ?1 <> 'provider' OR o.topic IN ('payment.requested', 'refund.requested')
                 ORDER BY o.seq ON CONFLICT DO NOTHING",
                &[text(id)],
            )?;
        }
        Ok(())
    }
}

/// PostgreSQL: no transaction that writes events is open after this, and none begins before
/// this one ends. SQLite has one writer.
fn wait_for_events(tx: &mut Tx<'_>) -> Result<(), StoreError> {
    if tx.connection().backend() == Backend::Postgres {
        tx.execute("LOCK TABLE sink IN EXCLUSIVE MODE", &[])?;
    }
    Ok(())
}

/// A tenant subscribes to its events from now on.
#[derive(Debug)]
pub struct Subscribe {
    /// Whose events.
    pub principal: String,
    /// Where to.
    pub url: String,
    /// Renders the answer; the secret is shown only there.
    pub render: fn(&Sink) -> Result<Reply, serde_json::Error>,
}

impl Effect for Subscribe {
    type Value = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<()>, StoreError> {
        wait_for_events(tx)?;
        let last = tx.query("SELECT coalesce(max(seq), 0) FROM outbox", &[])?;
        let cursor = last
            .into_iter()
            .next()
            .map_or(Ok(0), |mut row| row.take())?;
        let sink = Sink {
            id: uuid::Uuid::now_v7().to_string(),
            kind: Kind::Webhook,
            principal: Some(self.principal.clone()),
            url: self.url.clone(),
            secret: crate::webhook::Secret::generate(),
            cursor,
            // Not `tx.now_ms`: others may have committed events while this one waited.
            created_at_ms: unix_time_ms(),
        };
        tx.insert(&sink)?;
        Ok(Outcome {
            reply: (self.render)(&sink)?,
            remember: true,
            created: None,
            value: (),
        })
    }
}

/// A tenant ends a subscription. `false` when there is none of that name.
#[derive(Debug)]
pub struct Unsubscribe {
    /// Whose.
    pub principal: String,
    /// Which.
    pub id: String,
}

impl Command for Unsubscribe {
    type Output = bool;

    fn run(&self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        let now_ms = tx.now_ms;
        let ended = tx.execute(
            "UPDATE sink SET deleted_at_ms = ?3
             WHERE id = ?1 AND principal = ?2 AND deleted_at_ms IS NULL",
            &[
                Param::Text(self.id.as_str().into()),
                Param::Text(self.principal.as_str().into()),
                Param::Integer(now_ms),
            ],
        )?;
        Ok(ended > 0)
    }
}
