//! What must hold in every ledger at every moment. Tests, the run-time counter and
//! `edgemeter ledger check` all ask here.
//!
//! 1. observed = attributed + unattributed + cells, per interface, direction and grain span:
//!    exactly at rest; a tick reads a total and its parts microseconds apart, and the next one
//!    makes up for it.
//! 2. No part is negative: a claim never takes more than there was.
//! 3. Rows of a grain start where its spans start, so that no two spans overlap.
//! 4. What a sink was told, is to be told and has acknowledged never exceeds what was posted.

use std::{collections::HashMap, fmt};

use flow_abi::Direction;

use super::{
    Balances, Grain, Ledger, LedgerError,
    sql::{SqlError, Statements, values},
};
use crate::attribution::Postings;

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Breach {
    /// Parts and whole differ.
    Difference {
        /// Interface.
        interface: String,
        /// Direction.
        direction: Direction,
        /// Parts minus whole.
        bytes: i64,
    },
    /// An owner has moved less than nothing.
    Negative {
        /// Interface.
        interface: String,
        /// Direction.
        direction: Direction,
        /// Owner number.
        owner: u32,
        /// Its balance.
        bytes: i64,
    },
    /// A row does not start where a span of its grain does.
    Misplaced {
        /// Table.
        table: &'static str,
        /// Grain.
        grain: Grain,
        /// Start, Unix seconds.
        start: i64,
    },
    /// More was put into events than was posted.
    Oversold {
        /// Sink.
        sink: String,
        /// Owner number.
        owner: u32,
        /// In events, acknowledged or open, minus posted.
        bytes: i64,
    },
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Difference {
                interface,
                direction,
                bytes,
            } => write!(
                f,
                "{interface} {}: owners and cells differ from the total by {bytes} B",
                word(*direction)
            ),
            Self::Negative {
                interface,
                direction,
                owner,
                bytes,
            } => write!(
                f,
                "{interface} {}: owner {owner} has {bytes} B",
                word(*direction)
            ),
            Self::Misplaced {
                table,
                grain,
                start,
            } => write!(f, "{table}: no {} starts at {start}", grain.as_str()),
            Self::Oversold { sink, owner, bytes } => write!(
                f,
                "sink {sink}: owner {owner} has {bytes} B more in events than were posted"
            ),
        }
    }
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "rx",
        Direction::Tx => "tx",
    }
}

/// The invariants that balances alone show: 1 over all time, and 2.
#[must_use]
pub fn of_balances(balances: &Balances) -> Vec<Breach> {
    let mut breaches: Vec<Breach> = balances
        .differences()
        .into_iter()
        .filter(|(_, bytes)| *bytes != 0)
        .map(|((interface, direction), bytes)| Breach::Difference {
            interface,
            direction,
            bytes,
        })
        .collect();
    breaches.extend(
        balances
            .amounts()
            .filter(|(_, _, _, amount)| amount.wire_bytes < 0)
            .map(|(interface, direction, owner, amount)| Breach::Negative {
                interface: interface.to_owned(),
                direction,
                owner: owner.0,
                bytes: amount.wire_bytes,
            }),
    );
    breaches
}

/// [`of_balances`] while traffic moves: a total and its parts are read microseconds apart, so
/// they may differ by what the last tick moved, and by nothing more.
#[must_use]
pub fn at_run_time(
    balances: &Balances,
    last: &[Postings],
    interfaces: &HashMap<u32, String>,
) -> Vec<Breach> {
    let mut moved: HashMap<(&str, Direction), i64> = HashMap::new();
    for postings in last {
        let amounts = postings
            .amounts
            .iter()
            .map(|(key, amount)| (key.ifindex, key.direction, amount.wire_bytes));
        let cells = postings
            .cells
            .iter()
            .map(|(key, (bytes, _))| (key.ifindex, key.direction, *bytes));
        for (ifindex, direction, bytes) in amounts.chain(cells) {
            if let Some(name) = interfaces.get(&ifindex) {
                *moved.entry((name, direction)).or_default() += bytes.abs();
            }
        }
    }
    let mut breaches = of_balances(balances);
    breaches.retain(|breach| match breach {
        Breach::Difference {
            interface,
            direction,
            bytes,
        } => {
            let moved = moved.get(&(interface.as_str(), *direction));
            bytes.abs() > moved.copied().unwrap_or(0)
        }
        _ => true,
    });
    breaches
}

impl Ledger {
    /// Every invariant, over the whole ledger of this gateway.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn breaches(&self) -> Result<Vec<Breach>, LedgerError> {
        let gateway = self.gateway_id();
        self.read(|statements| {
            let mut breaches = of_balances(&super::store::balances(statements, gateway)?);
            misplaced(statements, gateway, &mut breaches)?;
            oversold(statements, gateway, &mut breaches)?;
            Ok(breaches)
        })
    }
}

fn misplaced(
    statements: &mut dyn Statements,
    gateway: i64,
    breaches: &mut Vec<Breach>,
) -> Result<(), SqlError> {
    for table in ["posting", "cell_posting"] {
        let rows = statements.query(
            &format!("SELECT DISTINCT grain, start FROM {table} WHERE gateway = ?1"),
            values![gateway],
        )?;
        for row in rows {
            let (grain, start) = (Grain::from_number(row.int(0)?), row.int(1)?);
            if grain.span(start).start != start {
                breaches.push(Breach::Misplaced {
                    table,
                    grain,
                    start,
                });
            }
        }
    }
    Ok(())
}

fn oversold(
    statements: &mut dyn Statements,
    gateway: i64,
    breaches: &mut Vec<Breach>,
) -> Result<(), SqlError> {
    let rows = statements.query(
        "SELECT s.sink, s.owner, CAST(SUM(s.wire_bytes) AS BIGINT) - (
             SELECT COALESCE(CAST(SUM(p.wire_bytes) AS BIGINT), 0) FROM posting p
             WHERE p.gateway = ?1 AND p.owner = s.owner)
         FROM (SELECT sink, owner, wire_bytes FROM usage_event WHERE gateway = ?1
               UNION ALL SELECT sink, owner, wire_bytes FROM usage_acknowledged WHERE gateway = ?1
               UNION ALL SELECT sink, owner, wire_bytes FROM usage_open WHERE gateway = ?1) s
         GROUP BY s.sink, s.owner ORDER BY s.sink, s.owner",
        values![gateway],
    )?;
    for row in rows {
        // Amounts of all grains are in `posting` for ever, so the sum is over all time.
        if row.int(2)? > 0 {
            breaches.push(Breach::Oversold {
                sink: row.text(0)?.to_owned(),
                owner: row.small(1)?,
                bytes: row.int(2)?,
            });
        }
    }
    Ok(())
}
