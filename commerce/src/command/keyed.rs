//! Once per key: the answer of the first request, stored in the transaction of its effect
//! and replayed unchanged.

use super::{Command, Locks, Tx};
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::metrics::{Metrics, RefusalReason};
use crate::order::OrderId;
use crate::store::StoreError;
use crate::store::sql::{Param, SqlError};

/// What a client asks for under an idempotency key.
pub trait Effect: Send + 'static {
    /// What the caller wants to know beside the answer.
    type Value: Send + 'static;

    /// As [`Command::locks`]; the key is locked already.
    fn locks(&self, _locks: &mut Locks) {}

    /// As [`Command::run`].
    ///
    /// # Errors
    /// [`StoreError`]
    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<Self::Value>, StoreError>;

    /// As [`Command::committed`]; not called for a replay.
    fn committed(&self, _value: &Self::Value, _metrics: &Metrics) {}

    /// As [`Command::failed`].
    fn failed(&self, _metrics: &Metrics) {}

    /// The key stands for another body.
    fn key_reused(&self, _metrics: &Metrics) {}
}

/// What an effect came to.
#[derive(Debug)]
pub struct Outcome<V> {
    /// The answer.
    pub reply: Reply,
    /// Whether the key keeps it: for success and business refusals, not for faulty input.
    pub remember: bool,
    /// The order it created, if any: at most one key may claim it.
    pub created: Option<OrderId>,
    /// For the caller.
    pub value: V,
}

/// An effect under its key.
#[derive(Debug)]
pub struct Keyed<E> {
    /// Where the key is unique.
    pub scope: Scope,
    /// What body the key stands for.
    pub fingerprint: Fingerprint,
    /// What to do.
    pub effect: E,
}

/// What the client gets.
#[derive(Debug)]
pub enum Answer<V> {
    /// It happened now, or was refused now.
    Done(Reply, V),
    /// The key's first answer, unchanged.
    Replayed(Reply),
    /// The key stands for another body. Nothing was done.
    KeyReused,
}

impl<E: Effect> Command for Keyed<E> {
    type Output = Answer<E::Value>;

    fn locks(&self, locks: &mut Locks) {
        let Scope {
            principal,
            route,
            key,
        } = &self.scope;
        locks.name("key", &format!("{principal} {route} {}", key.as_str()));
        self.effect.locks(locks);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Self::Output, StoreError> {
        if let Some((fingerprint, reply)) = find_reply(tx, &self.scope)? {
            return Ok(if fingerprint == self.fingerprint.0 {
                Answer::Replayed(reply)
            } else {
                Answer::KeyReused
            });
        }
        let outcome = self.effect.run(tx)?;
        if outcome.remember {
            self.remember(tx, &outcome.reply, outcome.created)?;
        }
        Ok(Answer::Done(outcome.reply, outcome.value))
    }

    fn committed(&self, output: &Self::Output, metrics: &Metrics) {
        match output {
            Answer::Done(_, value) => self.effect.committed(value, metrics),
            Answer::Replayed(_) => metrics.replayed(),
            Answer::KeyReused => {
                metrics.order_refused(RefusalReason::KeyReused);
                self.effect.key_reused(metrics);
            }
        }
    }

    fn failed(&self, metrics: &Metrics) {
        self.effect.failed(metrics);
    }
}

impl<E> Keyed<E> {
    fn remember(
        &self,
        tx: &mut Tx<'_>,
        reply: &Reply,
        created: Option<OrderId>,
    ) -> Result<(), SqlError> {
        let text = |text: &Option<String>| match text {
            Some(text) => Param::Text(text.clone().into()),
            None => Param::Null,
        };
        let now_ms = tx.now_ms;
        tx.write(
            "INSERT INTO idempotency (principal, route, key, fingerprint,
                 status, content_type, location, etag, body, order_id, at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            &[
                Param::Text(self.scope.principal.as_str().into()),
                Param::Text(self.scope.route.into()),
                Param::Text(self.scope.key.as_str().into()),
                Param::Blob(self.fingerprint.0.as_slice().into()),
                Param::Integer(i64::from(reply.status)),
                Param::Text(reply.content_type.as_str().into()),
                text(&reply.location),
                text(&reply.etag),
                Param::Blob(reply.body.as_slice().into()),
                created.map_or(Param::Null, OrderId::param),
                Param::Integer(now_ms),
            ],
        )
    }
}

/// The answer already given under this key.
fn find_reply(tx: &mut Tx<'_>, scope: &Scope) -> Result<Option<(Vec<u8>, Reply)>, SqlError> {
    let mut rows = tx.query(
        "SELECT fingerprint, status, content_type, location, etag, body
         FROM idempotency WHERE principal = ?1 AND route = ?2 AND key = ?3",
        &[
            Param::Text(scope.principal.as_str().into()),
            Param::Text(scope.route.into()),
            Param::Text(scope.key.as_str().into()),
        ],
    )?;
    let Some(mut row) = rows.pop() else {
        return Ok(None);
    };
    let fingerprint = row.take()?;
    let reply = Reply {
        status: row.take()?,
        content_type: row.take()?,
        location: row.take()?,
        etag: row.take()?,
        body: row.take()?,
    };
    Ok(Some((fingerprint, reply)))
}
