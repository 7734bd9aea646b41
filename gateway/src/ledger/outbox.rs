//! Usage events on their way out: made in the transaction that posts the bytes, kept until the
//! sink is known to have them.
//!
//! ```text
//! tick → usage_open ─ window over → usage_event: waiting → sent → acknowledged → summed up
//!                                                  ↑         │ ├→ refused   the sink will not have it
//!                                                  └─────────┘ └→ in doubt  it may have it
//! ```
//! Every byte is in exactly one place: open + events + acknowledged sums = posted since the sink
//! was named. Events are differences: bytes posted late into a closed window make a new event
//! for that window, with a number of its own; an event is never changed and never sent under
//! another id.
//!
//! A sink forgets what it has seen after a while. So what may have arrived is written down before
//! it is sent, and is not sent again once the sink may have forgotten it.

use std::collections::BTreeMap;

use flow_abi::Direction;

use super::{
    Ledger, LedgerError, Tick,
    sql::{Row, SqlError, Statements, values},
    store::{direction, owner},
};
use crate::owner::{Owner, OwnerId};

/// Windows closed in one transaction.
const WINDOWS_A_TICK: i64 = 500;
/// Acknowledged events summed up in one transaction.
const FOLD_EVENTS: i64 = 2_000;

const WAITING: i64 = 0;
const SENT: i64 = 1;
const REFUSED: i64 = 2;
const DOUBT: i64 = 3;
const ACKNOWLEDGED: i64 = 4;

/// Who gets usage events, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sink {
    /// Its name: what it has acknowledged is remembered under it.
    pub name: String,
    /// Length of a window, seconds.
    pub window_seconds: i64,
    /// Only these tenants' requests; None: all, and connection overhead.
    pub tenants: Option<Vec<String>>,
    /// Also bytes that are nobody's.
    pub unattributed: bool,
}

impl Sink {
    /// A condition on `owner w` and `usage_open o`; its tenants are parameters from `first` on.
    fn condition(&self, first: usize) -> String {
        match &self.tenants {
            Some(tenants) => {
                let places = (0..tenants.len()).map(|n| format!("?{}", first + n));
                let places = places.collect::<Vec<_>>().join(", ");
                format!("(w.kind = 'route' AND w.tenant IN ({places}))")
            }
            None if self.unattributed => "1 = 1".into(),
            None => "w.kind IN ('route', 'overhead')".into(),
        }
    }
}

/// One event: what an owner moved in a window, or what was posted for it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the closed window: unique for the sink.
    pub seq: i64,
    /// Owner's number, unique at the gateway.
    pub owner_id: OwnerId,
    /// Whose bytes.
    pub owner: Owner,
    /// Number of the class of the remote addresses.
    pub class: u32,
    /// Its name; empty when it has none.
    pub class_name: String,
    /// Direction.
    pub direction: Direction,
    /// Start of the window, Unix seconds.
    pub window_start: i64,
    /// Length of the window, seconds.
    pub window_seconds: i64,
    /// Lifetime of the kernel maps in which the window was closed.
    pub epoch: String,
    /// Difference, bytes on the wire.
    pub wire_bytes: i64,
}

/// Events that are sent together, every time under the same number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its number: unique for the sink.
    pub number: i64,
    /// From when on it may have arrived, Unix seconds; None: it has not.
    pub first_sent: Option<i64>,
    /// In the order of their windows.
    pub events: Vec<Event>,
}

/// How many events a sink has in each state, and the bytes in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Waiting to be sent.
    pub waiting: i64,
    /// Sent and not acknowledged.
    pub sent: i64,
    /// Refused by the sink for good.
    pub refused: i64,
    /// May have arrived, and the sink may have forgotten it.
    pub in_doubt: i64,
    /// Acknowledged.
    pub acknowledged: i64,
    /// Bytes in acknowledged events.
    pub acknowledged_bytes: i64,
    /// Bytes in all other events.
    pub outstanding_bytes: i64,
    /// Bytes not yet in an event.
    pub open_bytes: i64,
    /// Start of the oldest window that is not acknowledged, Unix seconds.
    pub oldest: Option<i64>,
}

/// Whether a window is over and not closed.
pub(super) fn is_due(
    statements: &mut dyn Statements,
    gateway: i64,
    sinks: &[Sink],
    now: i64,
) -> Result<bool, SqlError> {
    for sink in sinks {
        let due = statements.one(
            "SELECT COUNT(*) FROM usage_open
             WHERE gateway = ?1 AND sink = ?2 AND window_start + window_seconds <= ?3",
            values![gateway, &sink.name, now],
        )?;
        if due.map_or(Ok(0), |row| row.int(0))? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Adds a tick's postings to the open windows, and closes those that are over.
pub(super) fn collect(
    statements: &mut dyn Statements,
    gateway: i64,
    sinks: &[Sink],
    tick: &Tick<'_>,
) -> Result<(), SqlError> {
    if sinks.is_empty() {
        return Ok(());
    }
    let mut sums: BTreeMap<(OwnerId, u32, Direction), i64> = BTreeMap::new();
    for (key, amount) in &tick.postings.amounts {
        let class = key.class.0;
        *sums.entry((key.owner, class, key.direction)).or_default() += amount.wire_bytes;
    }
    for sink in sinks {
        let seconds = sink.window_seconds;
        let start = tick.unix_seconds - tick.unix_seconds.rem_euclid(seconds);
        for ((owner, class, direction), wire_bytes) in &sums {
            statements.execute(
                "INSERT INTO usage_open VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT (gateway, sink, window_start, window_seconds, owner, class, direction)
                 DO UPDATE SET wire_bytes = usage_open.wire_bytes + excluded.wire_bytes",
                values![
                    gateway,
                    &sink.name,
                    start,
                    seconds,
                    owner.0,
                    *class,
                    *direction as u32,
                    *wire_bytes,
                ],
            )?;
        }
        close(statements, gateway, sink, tick)?;
    }
    Ok(())
}

/// Turns what is in windows that are over into events.
fn close(
    statements: &mut dyn Statements,
    gateway: i64,
    sink: &Sink,
    tick: &Tick<'_>,
) -> Result<(), SqlError> {
    let known = statements.one(
        "SELECT seq, restored FROM usage_sink WHERE gateway = ?1 AND sink = ?2",
        values![gateway, &sink.name],
    )?;
    let (mut seq, restored) = match known {
        Some(row) => (row.int(0)?, row.int(1)? != 0),
        None => {
            // From the clock, so that a new ledger does not number as an older one did.
            statements.execute(
                "INSERT INTO usage_sink VALUES (?1, ?2, ?3, 0, 0)",
                values![gateway, &sink.name, tick.unix_seconds],
            )?;
            (tick.unix_seconds, false)
        }
    };
    // What a restored ledger posts first may have been pushed before it was lost.
    let (until, state) = if restored {
        (i64::MAX, DOUBT)
    } else {
        (tick.unix_seconds, WAITING)
    };
    let windows = statements.query(
        "SELECT DISTINCT window_start, window_seconds FROM usage_open
         WHERE gateway = ?1 AND sink = ?2 AND window_start <= ?3 - window_seconds
         ORDER BY window_start, window_seconds LIMIT ?4",
        values![gateway, &sink.name, until, WINDOWS_A_TICK],
    )?;
    if windows.is_empty() {
        return Ok(());
    }
    for window in &windows {
        seq += 1;
        let mut values = values![
            gateway,
            &sink.name,
            window.int(0)?,
            window.int(1)?,
            seq,
            tick.epoch,
            state,
            if restored { tick.unix_seconds } else { 0 },
            if restored {
                "posted first after a restore: may have been pushed before"
            } else {
                ""
            },
        ]
        .to_vec();
        values.extend(sink.tenants.iter().flatten().map(super::sql::Value::from));
        let events = format!(
            "INSERT INTO usage_event
             SELECT o.gateway, o.sink, CAST(?5 AS BIGINT), o.owner, o.class, o.direction,
                    o.window_start, o.window_seconds, CAST(?6 AS TEXT), o.wire_bytes,
                    CAST(?7 AS BIGINT), 0, CAST(?8 AS BIGINT), CAST(?9 AS TEXT)
             FROM usage_open o LEFT JOIN owner w ON w.gateway = o.gateway AND w.id = o.owner
             WHERE o.gateway = ?1 AND o.sink = ?2 AND o.window_start = ?3
               AND o.window_seconds = ?4 AND o.wire_bytes <> 0 AND {}",
            sink.condition(10)
        );
        statements.execute(&events, &values)?;
        statements.execute(
            "DELETE FROM usage_open WHERE gateway = ?1 AND sink = ?2 AND window_start = ?3
               AND window_seconds = ?4",
            &values[..4],
        )?;
    }
    statements.execute(
        "UPDATE usage_sink SET seq = ?3, restored = 0 WHERE gateway = ?1 AND sink = ?2",
        values![gateway, &sink.name, seq],
    )?;
    Ok(())
}

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

    /// What a sink has and has not.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn backlog(&self, sink: &str) -> Result<Backlog, LedgerError> {
        let gateway = self.gateway_id();
        self.read(|statements| {
            let mut backlog = Backlog::default();
            let rows = statements.query(
                "SELECT state, COUNT(*), CAST(SUM(wire_bytes) AS BIGINT), MIN(window_start)
                 FROM usage_event WHERE gateway = ?1 AND sink = ?2 GROUP BY state",
                values![gateway, sink],
            )?;
            for row in rows {
                let (count, bytes) = (row.int(1)?, row.sum(2)?);
                if row.int(0)? == ACKNOWLEDGED {
                    backlog.acknowledged = count;
                    backlog.acknowledged_bytes = bytes;
                    continue;
                }
                backlog.outstanding_bytes += bytes;
                let oldest = row.int(3)?;
                backlog.oldest = Some(backlog.oldest.map_or(oldest, |at| at.min(oldest)));
                match row.int(0)? {
                    WAITING => backlog.waiting = count,
                    SENT => backlog.sent = count,
                    REFUSED => backlog.refused = count,
                    _ => backlog.in_doubt = count,
                }
            }
            let folded = statements.one(
                "SELECT CAST(SUM(events) AS BIGINT), CAST(SUM(wire_bytes) AS BIGINT)
                 FROM usage_acknowledged WHERE gateway = ?1 AND sink = ?2",
                values![gateway, sink],
            )?;
            if let Some(row) = folded {
                backlog.acknowledged += row.sum(0)?;
                backlog.acknowledged_bytes += row.sum(1)?;
            }
            let open = statements.one(
                "SELECT CAST(SUM(wire_bytes) AS BIGINT) FROM usage_open
                 WHERE gateway = ?1 AND sink = ?2",
                values![gateway, sink],
            )?;
            if let Some(row) = open {
                backlog.open_bytes = row.sum(0)?;
            }
            Ok(backlog)
        })
    }

    /// Sums up acknowledged events of windows that ended before `before`, in one bounded
    /// transaction; how many. Call until 0.
    ///
    /// # Errors
    /// The ledger cannot be written; nothing was summed up.
    pub fn fold_acknowledged(&self, sink: &str, before: i64) -> Result<i64, LedgerError> {
        let gateway = self.gateway_id();
        self.write(|statements| {
            let rows = statements.query(
                "SELECT seq, owner, class, direction, wire_bytes FROM usage_event
                 WHERE gateway = ?1 AND sink = ?2 AND state = ?3
                   AND window_start + window_seconds <= ?4 ORDER BY seq LIMIT ?5",
                values![gateway, sink, ACKNOWLEDGED, before, FOLD_EVENTS],
            )?;
            for row in &rows {
                let key = values![gateway, sink, row.int(1)?, row.int(2)?, row.int(3)?];
                let mut sums = key.to_vec();
                sums.push(row.int(4)?.into());
                statements.execute(
                    "INSERT INTO usage_acknowledged VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6)
                     ON CONFLICT (gateway, sink, owner, class, direction) DO UPDATE SET
                        events = usage_acknowledged.events + 1,
                        wire_bytes = usage_acknowledged.wire_bytes + excluded.wire_bytes",
                    &sums,
                )?;
                let mut event = key.to_vec();
                event.push(row.int(0)?.into());
                statements.execute(
                    "DELETE FROM usage_event WHERE gateway = ?1 AND sink = ?2 AND owner = ?3
                       AND class = ?4 AND direction = ?5 AND seq = ?6",
                    &event,
                )?;
            }
            Ok(i64::try_from(rows.len()).unwrap_or(i64::MAX))
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
