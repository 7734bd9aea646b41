//! Batches of events on their way to the sink, and what became of each.

use super::{ACKNOWLEDGED, Batch, DOUBT, Event, REFUSED, SENT, WAITING};
use crate::ledger::sql::{Row, SqlError, Statements, values};
use crate::ledger::store::{direction, owner};
use crate::ledger::{Ledger, LedgerError};
use crate::owner::{Owner, OwnerId};

const EVENT: &str = "SELECT e.seq, e.owner, e.class, e.direction, e.window_start,
    e.window_seconds, e.epoch, e.wire_bytes, e.first_sent, w.kind, w.leg, w.endpoint, w.route,
    w.service, w.tenant, w.quality, COALESCE(c.name, '')
 FROM usage_event e LEFT JOIN owner w ON w.gateway = e.gateway AND w.id = e.owner
      LEFT JOIN class c ON c.gateway = e.gateway AND c.id = e.class";

fn event(row: &Row) -> Result<Event, SqlError> {
    let owner_id = OwnerId(row.small(1)?);
    Ok(Event {
        seq: row.int(0)?,
        owner_id,
        // Number 0 is nobody's and in no table.
        owner: if owner_id == OwnerId::FOREIGN {
            Owner::foreign()
        } else {
            owner(row, 9)?
        },
        class: row.small(2)?,
        class_name: row.text(16)?.to_owned(),
        direction: direction(row.int(3)?),
        window_start: row.int(4)?,
        window_seconds: row.int(5)?,
        epoch: row.text(6)?.to_owned(),
        wire_bytes: row.int(7)?,
    })
}

impl Ledger {
    /// The batch to send next: the one that is not acknowledged, else a new one of at most
    /// `limit` events. What it says about arrival is durable when this returns, so call it
    /// before every attempt.
    ///
    /// # Errors
    /// The ledger cannot be written: nothing may be sent.
    pub fn next_batch(
        &self,
        sink: &str,
        limit: i64,
        now: i64,
    ) -> Result<Option<Batch>, LedgerError> {
        let gateway = self.gateway_id();
        let waiting = self.read(|statements| {
            let sql = "SELECT seq FROM usage_event
                       WHERE gateway = ?1 AND sink = ?2 AND state IN (0, 1) LIMIT 1";
            Ok(statements.one(sql, values![gateway, sink])?.is_some())
        })?;
        if !waiting {
            return Ok(None);
        }
        self.write(|statements| {
            let under_way = statements.one(
                "SELECT MIN(batch) FROM usage_event
                 WHERE gateway = ?1 AND sink = ?2 AND state = ?3",
                values![gateway, sink, SENT],
            )?;
            let number = match under_way.map_or(Ok(None), |row| row.optional(0))? {
                Some(number) => number,
                None => gather(statements, gateway, sink, limit)?,
            };
            let rows = statements.query(
                &format!(
                    "{EVENT} WHERE e.gateway = ?1 AND e.sink = ?2 AND e.state = ?3
                       AND e.batch = ?4 ORDER BY e.seq, e.owner, e.class, e.direction"
                ),
                values![gateway, sink, SENT, number],
            )?;
            let sent_before = rows
                .iter()
                .map(|row| row.int(8))
                .collect::<Result<Vec<_>, _>>()?;
            let first_sent = sent_before.into_iter().filter(|&at| at > 0).min();
            if first_sent.is_none() {
                statements.execute(
                    "UPDATE usage_event SET first_sent = ?5 WHERE gateway = ?1 AND sink = ?2
                       AND state = ?3 AND batch = ?4",
                    values![gateway, sink, SENT, number, now.max(1)],
                )?;
            }
            let events = rows.iter().map(event).collect::<Result<Vec<_>, _>>()?;
            Ok(Some(Batch {
                number,
                first_sent,
                events,
            }))
        })
    }

    /// The sink has a batch.
    ///
    /// # Errors
    /// The ledger cannot be written: it will be sent again.
    pub fn acknowledge(&self, sink: &str, batch: i64) -> Result<(), LedgerError> {
        self.settle(sink, batch, ACKNOWLEDGED, "")
    }

    /// The sink certainly has nothing of a batch: it never got it, or said it did not take it.
    ///
    /// # Errors
    /// The ledger cannot be written: the batch counts as possibly arrived.
    pub fn not_arrived(&self, sink: &str, batch: i64) -> Result<(), LedgerError> {
        let gateway = self.gateway_id();
        self.write(|statements| {
            statements.execute(
                "UPDATE usage_event SET first_sent = 0 WHERE gateway = ?1 AND sink = ?2
                   AND state = ?3 AND batch = ?4",
                values![gateway, sink, SENT, batch],
            )
        })
        .map(|_| ())
    }

    /// The sink refused a batch as a whole: the events go out one by one, to find the culprit.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn split(&self, sink: &str, batch: &Batch) -> Result<(), LedgerError> {
        let gateway = self.gateway_id();
        self.write(|statements| {
            let mut number = last_batch(statements, gateway, sink)?;
            for event in &batch.events {
                number += 1;
                statements.execute(
                    "UPDATE usage_event SET batch = ?7, first_sent = 0
                     WHERE gateway = ?1 AND sink = ?2 AND seq = ?3 AND owner = ?4 AND class = ?5
                       AND direction = ?6",
                    values![
                        gateway,
                        sink,
                        event.seq,
                        event.owner_id.0,
                        event.class,
                        event.direction as u32,
                        number,
                    ],
                )?;
            }
            set_last_batch(statements, gateway, sink, number)
        })
    }

    /// The sink refused a batch for good; a person must look.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn refuse(&self, sink: &str, batch: i64, why: &str) -> Result<(), LedgerError> {
        self.settle(sink, batch, REFUSED, why)
    }

    /// A batch may have arrived, and the sink may have forgotten: sending it again could count it
    /// twice, giving it up could lose it. A person, or a sink that can be asked, decides.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn doubt(&self, sink: &str, batch: i64, why: &str) -> Result<(), LedgerError> {
        self.settle(sink, batch, DOUBT, why)
    }

    /// One event of a batch is known to have arrived.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn acknowledge_event(&self, sink: &str, event: &Event) -> Result<(), LedgerError> {
        let gateway = self.gateway_id();
        self.write(|statements| {
            statements.execute(
                "UPDATE usage_event SET state = ?7, note = '' WHERE gateway = ?1 AND sink = ?2
                   AND seq = ?3 AND owner = ?4 AND class = ?5 AND direction = ?6",
                values![
                    gateway,
                    sink,
                    event.seq,
                    event.owner_id.0,
                    event.class,
                    event.direction as u32,
                    ACKNOWLEDGED,
                ],
            )
        })
        .map(|_| ())
    }

    /// Decides about what is in doubt or refused: the sink has it, or it is sent (again). The
    /// number of events decided about.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn decide(&self, sink: &str, arrived: bool) -> Result<u64, LedgerError> {
        let gateway = self.gateway_id();
        let state = if arrived { ACKNOWLEDGED } else { WAITING };
        self.write(|statements| {
            statements.execute(
                "UPDATE usage_event SET state = ?3, batch = 0, first_sent = 0, note = ''
                 WHERE gateway = ?1 AND sink = ?2 AND state IN (2, 3)",
                values![gateway, sink, state],
            )
        })
    }

    fn settle(&self, sink: &str, batch: i64, state: i64, note: &str) -> Result<(), LedgerError> {
        let gateway = self.gateway_id();
        self.write(|statements| {
            statements.execute(
                "UPDATE usage_event SET state = ?5, note = ?6 WHERE gateway = ?1 AND sink = ?2
                   AND state = ?3 AND batch = ?4",
                values![gateway, sink, SENT, batch, state, note],
            )
        })
        .map(|_| ())
    }
}

/// Puts the oldest waiting events into a new batch; its number.
fn gather(
    statements: &mut dyn Statements,
    gateway: i64,
    sink: &str,
    limit: i64,
) -> Result<i64, SqlError> {
    let number = last_batch(statements, gateway, sink)? + 1;
    let rows = statements.query(
        "SELECT seq, owner, class, direction FROM usage_event
         WHERE gateway = ?1 AND sink = ?2 AND state = ?3
         ORDER BY seq, owner, class, direction LIMIT ?4",
        values![gateway, sink, WAITING, limit],
    )?;
    for row in rows {
        statements.execute(
            "UPDATE usage_event SET state = ?7, batch = ?8, first_sent = 0
             WHERE gateway = ?1 AND sink = ?2 AND seq = ?3 AND owner = ?4 AND class = ?5
               AND direction = ?6",
            values![
                gateway,
                sink,
                row.int(0)?,
                row.int(1)?,
                row.int(2)?,
                row.int(3)?,
                SENT,
                number,
            ],
        )?;
    }
    set_last_batch(statements, gateway, sink, number)?;
    Ok(number)
}

fn last_batch(statements: &mut dyn Statements, gateway: i64, sink: &str) -> Result<i64, SqlError> {
    let row = statements.one(
        "SELECT batch FROM usage_sink WHERE gateway = ?1 AND sink = ?2",
        values![gateway, sink],
    )?;
    row.map_or(Ok(0), |row| row.int(0))
}

fn set_last_batch(
    statements: &mut dyn Statements,
    gateway: i64,
    sink: &str,
    number: i64,
) -> Result<(), SqlError> {
    statements
        .execute(
            "UPDATE usage_sink SET batch = ?3 WHERE gateway = ?1 AND sink = ?2",
            values![gateway, sink, number],
        )
        .map(|_| ())
}
