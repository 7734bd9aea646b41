//! Where a relay finds its events, and how it remembers what is acknowledged.
//!
//! SQLite has one writer, so an event's number is its commit order: a cursor moves over the
//! outbox, and only over events that are acknowledged without a gap. PostgreSQL's numbers
//! commit out of order, and several machines relay: rows are claimed, with a lease.

use std::collections::BTreeMap;

use super::deliver::{Delivered, LEASE_MS};
use super::flush::{BATCH_EVENTS_MAX, Waiting};
use super::sink::{Sink, WANTED};
use crate::command::{Command, Tx};
use crate::event::Event;
use crate::store::sql::{Backend, Connection, Param, Record as _, SqlError, Statements};
use crate::store::{Store, StoreError, unix_time_ms};

/// Events that are sent together.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    /// Place in the queue and event, in order.
    pub(super) events: Vec<(i64, Event)>,
}

impl Batch {
    fn span(&self) -> Option<(i64, i64)> {
        Some((self.events.first()?.0, self.events.last()?.0))
    }
}

#[derive(Clone)]
pub(super) struct Source {
    sink: Sink,
    backend: Backend,
    /// SQLite: the last event taken.
    position: i64,
    /// SQLite: batches taken and not settled: first place → last place, and whether it is
    /// acknowledged.
    taken: BTreeMap<i64, (i64, bool)>,
}

impl Source {
    /// Begins after what is acknowledged.
    pub(super) async fn start(store: &Store, sink: &Sink) -> Result<Self, StoreError> {
        let id = sink.id.clone();
        let cursor = store
            .read(move |connection| cursor(connection, &id))
            .await?;
        Ok(Self {
            sink: sink.clone(),
            backend: store.backend(),
            position: cursor,
            taken: BTreeMap::new(),
        })
    }

    fn filter(&self) -> [Param<'static>; 2] {
        let principal = self.sink.principal.clone();
        [
            Param::Text(self.sink.kind.as_str().into()),
            principal.map_or(Param::Null, |principal| Param::Text(principal.into())),
        ]
    }

    /// What the next batch would be.
    pub(super) async fn waiting(&self, store: &Store) -> Result<Waiting, StoreError> {
        let [kind, principal] = self.filter();
        let (sql, params) = match self.backend {
            Backend::Sqlite => (
                format!(
                    "SELECT count(*), coalesce(min(at_ms), 0) FROM
                         (SELECT o.at_ms AS at_ms FROM outbox AS o
                          WHERE o.seq > ?3 AND {WANTED} ORDER BY o.seq LIMIT {BATCH_EVENTS_MAX}) AS next"
                ),
                vec![kind, principal, Param::Integer(self.position)],
            ),
            Backend::Postgres => (
                format!(
                    "SELECT count(*), coalesce(min(at_ms), 0) FROM
                         (SELECT o.at_ms AS at_ms FROM delivery AS d JOIN outbox AS o USING (event_id)
                          WHERE d.sink = ?1 AND d.delivered_at_ms IS NULL AND d.leased_until_ms <= ?2
                          ORDER BY d.seq LIMIT {BATCH_EVENTS_MAX}) AS next"
                ),
                vec![
                    Param::Text(self.sink.id.clone().into()),
                    Param::Integer(unix_time_ms()),
                ],
            ),
        };
        store
            .read(move |connection| {
                let rows = connection.query(&sql, &params)?;
                let Some(mut row) = rows.into_iter().next() else {
                    return Ok(Waiting::default());
                };
                Ok(Waiting {
                    count: row.take()?,
                    oldest_ms: row.take()?,
                })
            })
            .await
    }

    /// Takes the next batch.
    pub(super) async fn take(&mut self, store: &Store) -> Result<Batch, StoreError> {
        let batch = match self.backend {
            Backend::Sqlite => {
                let [kind, principal] = self.filter();
                let params = vec![kind, principal, Param::Integer(self.position)];
                let sql = format!(
                    "SELECT o.seq, {} FROM outbox AS o WHERE o.seq > ?3 AND {WANTED}
                     ORDER BY o.seq LIMIT {BATCH_EVENTS_MAX}",
                    Statements::columns::<Event>("o")
                );
                store
                    .read(move |connection| events(connection, &sql, &params))
                    .await?
            }
            Backend::Postgres => {
                let claim = Claim {
                    sink: self.sink.id.clone(),
                };
                store.run_patiently(claim).await?
            }
        };
        if let (Backend::Sqlite, Some((first, last))) = (self.backend, batch.span()) {
            self.position = last;
            self.taken.insert(first, (last, false));
        }
        Ok(batch)
    }

    /// What has to be written after a delivery.
    pub(super) fn acknowledge(&mut self, batch: &Batch, delivered: Delivered) -> Settle {
        let Delivered { dead, abandoned } = delivered;
        let mut settle = Settle {
            sink: self.sink.id.clone(),
            cursor: None,
            delivered: Vec::new(),
            dead,
        };
        match self.backend {
            Backend::Sqlite => {
                if let Some((first, _)) = batch.span()
                    && let Some(taken) = self.taken.get_mut(&first)
                {
                    taken.1 = true;
                }
                settle.cursor = advance(&mut self.taken);
            }
            Backend::Postgres if abandoned => {}
            Backend::Postgres => {
                settle.delivered = batch.events.iter().map(|(place, _)| *place).collect();
            }
        }
        settle
    }
}

/// Removes the batches that are acknowledged without a gap before them; the place of the last.
fn advance(taken: &mut BTreeMap<i64, (i64, bool)>) -> Option<i64> {
    let mut cursor = None;
    while let Some(entry) = taken.first_entry() {
        let (last, acknowledged) = *entry.get();
        if !acknowledged {
            break;
        }
        cursor = Some(last);
        entry.remove();
    }
    cursor
}

fn cursor(connection: &mut dyn Connection, id: &str) -> Result<i64, SqlError> {
    let rows = connection.query(
        "SELECT cursor FROM sink WHERE id = ?1",
        &[Param::Text(id.into())],
    )?;
    rows.into_iter().next().map_or(Ok(0), |mut row| row.take())
}

fn events(
    connection: &mut dyn Connection,
    sql: &str,
    params: &[Param<'_>],
) -> Result<Batch, SqlError> {
    let rows = connection.query(sql, params)?;
    let events = rows
        .into_iter()
        .map(|mut row| Ok((row.take()?, Event::load(&mut row)?)))
        .collect::<Result<_, SqlError>>()?;
    Ok(Batch { events })
}

/// PostgreSQL: takes rows that nobody else has.
struct Claim {
    sink: String,
}

impl Command for Claim {
    type Output = Batch;

    fn run(&self, tx: &mut Tx<'_>) -> Result<Batch, StoreError> {
        let sql = format!(
            "WITH claimed AS (
                 UPDATE delivery SET leased_until_ms = ?3 WHERE seq IN (
                     SELECT seq FROM delivery
                     WHERE sink = ?1 AND delivered_at_ms IS NULL AND leased_until_ms <= ?2
                     ORDER BY seq LIMIT {BATCH_EVENTS_MAX} FOR UPDATE SKIP LOCKED)
                 RETURNING delivery.seq AS place, delivery.event_id AS event_id)
             SELECT claimed.place, {} FROM claimed JOIN outbox AS o ON o.event_id = claimed.event_id
             ORDER BY claimed.place",
            Statements::columns::<Event>("o")
        );
        let params = [
            Param::Text(self.sink.as_str().into()),
            Param::Integer(tx.now_ms),
            Param::Integer(tx.now_ms.saturating_add(LEASE_MS)),
        ];
        Ok(events(tx.connection(), &sql, &params)?)
    }
}

/// Writes what is acknowledged, and what nobody wants.
#[derive(Debug)]
pub(super) struct Settle {
    sink: String,
    pub(super) cursor: Option<i64>,
    pub(super) delivered: Vec<i64>,
    pub(super) dead: Vec<super::deliver::Dead>,
}

impl Command for Settle {
    type Output = ();

    fn run(&self, tx: &mut Tx<'_>) -> Result<(), StoreError> {
        let now = Param::Integer(tx.now_ms);
        let sink = || Param::Text(self.sink.as_str().into());
        // A dead letter is on the disk before the queue moves past it.
        for dead in &self.dead {
            tx.write(
                "INSERT INTO dead_letter (sink, event_id, attempts, reason, at_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
                &[
                    sink(),
                    Param::Uuid(dead.event),
                    Param::Integer(i64::from(dead.attempts)),
                    Param::Text(dead.reason.as_str().into()),
                    now.clone(),
                ],
            )?;
        }
        if let Some(cursor) = self.cursor {
            tx.write(
                "UPDATE sink SET cursor = ?2 WHERE id = ?1 AND cursor < ?2",
                &[sink(), Param::Integer(cursor)],
            )?;
        }
        if !self.delivered.is_empty() {
            let places: Vec<String> = self.delivered.iter().map(ToString::to_string).collect();
            tx.write(
                "UPDATE delivery SET delivered_at_ms = ?2
                 WHERE sink = ?1 AND CAST(seq AS TEXT) = ANY (string_to_array(?3, E'\\n'))",
                &[sink(), now, Param::Text(places.join("\n").into())],
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_moves_only_over_what_is_acknowledged_without_a_gap() {
        let mut taken = BTreeMap::from([(1, (50, false)), (51, (100, false)), (101, (120, false))]);
        taken.insert(51, (100, true));
        assert_eq!(advance(&mut taken), None);
        taken.insert(1, (50, true));
        assert_eq!(advance(&mut taken), Some(100));
        assert_eq!(advance(&mut taken), None);
        taken.insert(101, (120, true));
        assert_eq!(advance(&mut taken), Some(120));
        assert!(taken.is_empty());
    }
}
