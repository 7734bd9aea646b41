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

mod backlog;
mod delivery;

use std::collections::BTreeMap;

use flow_abi::Direction;

use super::Tick;
use super::sql::{SqlError, Statements, values};
use crate::owner::{Owner, OwnerId};

pub use backlog::Backlog;

/// Windows closed in one transaction.
const WINDOWS_A_TICK: i64 = 500;

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
