//! What a sink has and has not, and the sums of what it has acknowledged.

use super::{ACKNOWLEDGED, REFUSED, SENT, WAITING};
use crate::ledger::sql::values;
use crate::ledger::{Ledger, LedgerError};

/// Acknowledged events summed up in one transaction.
const FOLD_EVENTS: i64 = 2_000;

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

impl Ledger {
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
}
