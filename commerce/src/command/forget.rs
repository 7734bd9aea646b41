//! Forgetting: idempotency keys nobody repeats any more, and the trails of orders that nothing
//! has happened to for a long time. A few hundred rows a transaction, between the orders.
//!
//! What may be gone is written down in the same transaction, so that the auditor can tell what
//! was forgotten from what was lost.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Command, Locks, Tx};
use crate::metrics::Metrics;
use crate::store::StoreError;
use crate::store::sql::{Backend, Connection, Param, SqlError};

/// Most rows looked at in one transaction.
const ROWS_MAX: i64 = 500;

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// Answers under their idempotency keys.
    pub keys: Duration,
    /// Events of an order, from its last one.
    pub events: Duration,
}

/// The row of `retention` that says what is gone.
#[derive(Clone, Copy, Debug)]
enum Subject {
    Keys,
    Events,
}

impl Subject {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Keys => "keys",
            Self::Events => "events",
        }
    }

    fn record(self, tx: &mut Tx<'_>, before_ms: i64, removed: u64) -> Result<(), StoreError> {
        tx.write(
            "INSERT INTO retention (subject, before_ms, removed) VALUES (?1, ?2, ?3)
             ON CONFLICT (subject) DO UPDATE SET
                 removed = retention.removed + excluded.removed,
                 before_ms = CASE WHEN excluded.before_ms > retention.before_ms
                             THEN excluded.before_ms ELSE retention.before_ms END",
            &[
                Param::Text(self.as_str().into()),
                Param::Integer(before_ms),
                Param::Integer(i64::try_from(removed).unwrap_or(i64::MAX)),
            ],
        )?;
        Ok(())
    }
}

/// When the oldest rows were written, milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug)]
pub struct Oldest {
    /// The oldest idempotency key.
    pub key_ms: Option<i64>,
    /// The oldest event.
    pub event_ms: Option<i64>,
}

/// Looks whether there may be something to forget, without asking the writer.
///
/// # Errors
/// [`SqlError`]
pub fn oldest(connection: &mut dyn Connection) -> Result<Oldest, SqlError> {
    let keys = match connection.backend() {
        Backend::Sqlite => "SELECT at_ms FROM idempotency ORDER BY rowid LIMIT 1",
        Backend::Postgres => "SELECT at_ms FROM idempotency ORDER BY at_ms LIMIT 1",
    };
    let mut first = |sql| -> Result<Option<i64>, SqlError> {
        let row = connection.query(sql, &[])?.into_iter().next();
        row.map(|mut row| row.take()).transpose()
    };
    Ok(Oldest {
        key_ms: first(keys)?,
        event_ms: first("SELECT at_ms FROM outbox ORDER BY seq LIMIT 1")?,
    })
}

/// Removes some keys that are older than `before_ms`.
pub struct ForgetKeys {
    /// Milliseconds since the Unix epoch.
    pub before_ms: i64,
}

impl Command for ForgetKeys {
    /// How many; 0 when there are no more.
    type Output = u64;

    fn locks(&self, locks: &mut Locks) {
        locks.name("retention", Subject::Keys.as_str());
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<u64, StoreError> {
        let sql = match tx.connection().backend() {
            Backend::Sqlite => {
                "DELETE FROM idempotency WHERE rowid IN (SELECT rowid FROM
                     (SELECT rowid, at_ms FROM idempotency ORDER BY rowid LIMIT ?2)
                 WHERE at_ms < ?1)"
            }
            Backend::Postgres => {
                "DELETE FROM idempotency WHERE (principal, route, key) IN
                     (SELECT principal, route, key FROM idempotency
                      WHERE at_ms < ?1 ORDER BY at_ms LIMIT ?2)"
            }
        };
        let params = [Param::Integer(self.before_ms), Param::Integer(ROWS_MAX)];
        let removed = tx.execute(sql, &params)?;
        if removed > 0 {
            Subject::Keys.record(tx, self.before_ms, removed)?;
        }
        Ok(removed)
    }

    fn committed(&self, removed: &u64, metrics: &Metrics) {
        metrics.forgotten(Subject::Keys.as_str(), *removed);
    }
}

/// Removes the events of some orders: of those whose every event is older than `before_ms` and
/// acknowledged by every sink. An order's trail goes as a whole.
pub struct ForgetEvents {
    /// Milliseconds since the Unix epoch.
    pub before_ms: i64,
    /// The place in the outbox to go on from.
    pub after: i64,
}

/// How far a look at the outbox came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgotten {
    /// Events removed.
    pub events: u64,
    /// Where to go on; none when the rest is too young.
    pub next: Option<i64>,
}

impl Command for ForgetEvents {
    type Output = Forgotten;

    fn locks(&self, locks: &mut Locks) {
        locks.name("retention", Subject::Events.as_str());
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Forgotten, StoreError> {
        let found = tx.query(
            "SELECT seq, order_id, at_ms FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?2",
            &[Param::Integer(self.after), Param::Integer(ROWS_MAX)],
        )?;
        let (mut next, mut orders) = (None, BTreeSet::new());
        for mut row in found {
            let (seq, order, at_ms): (i64, String, i64) = (row.take()?, row.take()?, row.take()?);
            if at_ms >= self.before_ms {
                next = None;
                break;
            }
            next = Some(seq);
            orders.insert(order);
        }
        let mut events = 0_u64;
        for order in orders {
            if !self.is_needed(tx, &order)? {
                events = events.saturating_add(remove(tx, &order)?);
            }
        }
        if events > 0 {
            Subject::Events.record(tx, self.before_ms, events)?;
        }
        Ok(Forgotten { events, next })
    }

    fn committed(&self, forgotten: &Forgotten, metrics: &Metrics) {
        metrics.forgotten(Subject::Events.as_str(), forgotten.events);
    }
}

impl ForgetEvents {
    /// Whether an event of the order is young, or a sink still waits for one.
    fn is_needed(&self, tx: &mut Tx<'_>, order: &str) -> Result<bool, StoreError> {
        let waiting = match tx.connection().backend() {
            Backend::Sqlite => {
                "SELECT 1 FROM outbox WHERE order_id = ?1 AND (at_ms >= ?2 OR EXISTS
                     (SELECT 1 FROM sink
                      WHERE sink.deleted_at_ms IS NULL AND sink.cursor < outbox.seq
                        AND (sink.principal IS NULL OR sink.principal = outbox.principal)
                        AND (sink.kind <> 'provider' OR
                             outbox.topic IN ('payment.requested', 'refund.requested')))) LIMIT 1"
            }
            Backend::Postgres => {
                "SELECT 1 FROM outbox WHERE order_id = ?1 AND (at_ms >= ?2 OR EXISTS
                     (SELECT 1 FROM delivery JOIN sink ON sink.id = delivery.sink
                      WHERE delivery.event_id = outbox.event_id AND sink.deleted_at_ms IS NULL
                        AND delivery.delivered_at_ms IS NULL)) LIMIT 1"
            }
        };
        let params = [Param::Text(order.into()), Param::Integer(self.before_ms)];
        Ok(!tx.query(waiting, &params)?.is_empty())
    }
}

fn remove(tx: &mut Tx<'_>, order: &str) -> Result<u64, StoreError> {
    let order = || Param::Text(order.to_owned().into());
    for table in ["dead_letter", "delivery"] {
        let sql = format!(
            "DELETE FROM {table} WHERE event_id IN
                 (SELECT event_id FROM outbox WHERE order_id = ?1)"
        );
        tx.write(&sql, &[order()])?;
    }
    Ok(tx.execute("DELETE FROM outbox WHERE order_id = ?1", &[order()])?)
}
