//! Old rows become coarser: second → minute → hour → day → month. What they add up to never changes.
//!
//! One step moves one coarser span of one gateway, in one transaction that first proves that what
//! it writes is what it takes away. A crash between any two statements leaves the step undone.

use std::time::Duration;

use super::{
    Grain, Ledger, LedgerError,
    sql::{Fault, SqlError, Statements, values},
};
use crate::cost::calendar::Period;

/// For how long each grain is kept before it becomes the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Rows by second; zero: there are none, and rows begin by minute.
    pub seconds: Duration,
    /// Rows by minute.
    pub minutes: Duration,
    /// Rows by hour.
    pub hours: Duration,
    /// Rows by day; those by month are kept for ever.
    pub days: Duration,
}

impl Default for Retention {
    /// Minutes for the month being billed and the one before, which 95th percentiles are computed
    /// from; hours for a year and the month after it, so that a day of any time zone can be told.
    fn default() -> Self {
        let days = |days: u64| Duration::from_secs(days * 86_400);
        Self {
            seconds: Duration::ZERO,
            minutes: days(62),
            hours: days(400),
            days: days(5 * 366),
        }
    }
}

impl Retention {
    fn age(&self, grain: Grain) -> Option<i64> {
        let age = match grain {
            Grain::Second => self.seconds,
            Grain::Minute => self.minutes,
            Grain::Hour => self.hours,
            Grain::Day => self.days,
            Grain::Month => return None,
        };
        Some(i64::try_from(age.as_secs()).unwrap_or(i64::MAX))
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RolledUp {
    /// Into which grain.
    pub grain: Grain,
    /// Which span of it.
    pub period: Period,
    /// Rows taken away.
    pub rows: u64,
}

/// Columns that are added up.
const SUMS: [(&str, &[&str], &str); 2] = [
    (
        "posting",
        &[
            "wire_bytes",
            "frames",
            "l4_payload_bytes",
            "retransmit_bytes",
            "retransmit_frames",
            "retransmit_payload_bytes",
        ],
        "interface, direction, owner, class",
    ),
    (
        "cell_posting",
        &["bytes", "frames"],
        "interface, direction, cell",
    ),
];

impl Ledger {
    /// Makes one span coarser whose rows are all old enough; None when there is none. Bounded:
    /// call until None, with pauses where other work waits.
    ///
    /// # Errors
    /// The ledger cannot be written; the step has not happened.
    pub fn roll_up(
        &self,
        retention: &Retention,
        now: i64,
    ) -> Result<Option<RolledUp>, LedgerError> {
        let gateway = self.gateway_id();
        let found = self.read(|statements| find(statements, gateway, retention, now))?;
        let Some((from, to, period)) = found else {
            return Ok(None);
        };
        let rows = self.write(|statements| step(statements, gateway, from, to, period))?;
        Ok(Some(RolledUp {
            grain: to,
            period,
            rows,
        }))
    }
}

/// The oldest span that is over, and over for long enough.
fn find(
    statements: &mut dyn Statements,
    gateway: i64,
    retention: &Retention,
    now: i64,
) -> Result<Option<(Grain, Grain, Period)>, SqlError> {
    for (from, to) in [
        (Grain::Second, Grain::Minute),
        (Grain::Minute, Grain::Hour),
        (Grain::Hour, Grain::Day),
        (Grain::Day, Grain::Month),
    ] {
        let Some(age) = retention.age(from) else {
            continue;
        };
        for (table, _, _) in SUMS {
            let oldest = statements.one(
                &format!("SELECT MIN(start) FROM {table} WHERE gateway = ?1 AND grain = ?2"),
                values![gateway, from.number()],
            )?;
            let Some(oldest) = oldest.map_or(Ok(None), |row| row.optional(0))? else {
                continue;
            };
            let period = to.span(oldest);
            if period.end.saturating_add(age) <= now {
                return Ok(Some((from, to, period)));
            }
        }
    }
    Ok(None)
}

fn step(
    statements: &mut dyn Statements,
    gateway: i64,
    from: Grain,
    to: Grain,
    period: Period,
) -> Result<u64, SqlError> {
    let mut taken = 0;
    for (table, columns, key) in SUMS {
        let totals = columns
            .iter()
            .map(|column| format!("CAST(SUM({column}) AS BIGINT)"));
        let totals = totals.collect::<Vec<_>>().join(", ");
        let concerned = format!(
            "SELECT {totals} FROM {table} WHERE gateway = ?1
               AND ((grain = ?2 AND start >= ?3 AND start < ?4) OR (grain = ?5 AND start = ?3))"
        );
        let spans = values![
            gateway,
            from.number(),
            period.start,
            period.end,
            to.number()
        ];
        let before = statements.one(&concerned, spans)?;
        let added = columns
            .iter()
            .map(|c| format!("{c} = {table}.{c} + excluded.{c}"));
        let added = added.collect::<Vec<_>>().join(", ");
        statements.execute(
            &format!(
                "INSERT INTO {table}
                 SELECT gateway, CAST(?5 AS BIGINT), CAST(?6 AS BIGINT), {key}, {totals}
                 FROM {table} WHERE gateway = ?1 AND grain = ?2 AND start >= ?3 AND start < ?4
                 GROUP BY gateway, {key}
                 ON CONFLICT (gateway, grain, start, {key}) DO UPDATE SET {added}"
            ),
            values![
                gateway,
                from.number(),
                period.start,
                period.end,
                to.number(),
                period.start,
            ],
        )?;
        taken += statements.execute(
            &format!(
                "DELETE FROM {table}
                 WHERE gateway = ?1 AND grain = ?2 AND start >= ?3 AND start < ?4"
            ),
            values![gateway, from.number(), period.start, period.end],
        )?;
        let after = statements.one(&concerned, spans)?;
        if before != after {
            return Err(SqlError::new(
                Fault::Other,
                format!("rolling up {table} would change its sums: not done"),
            ));
        }
    }
    Ok(taken)
}
