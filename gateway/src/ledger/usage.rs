//! Usage for pricing: the one query that bills are made from.

use std::collections::{BTreeMap, HashMap};

use flow_abi::cell;
use rusqlite::params;

use super::{Ledger, LedgerError, store::direction};
use crate::{
    cost::{
        calendar::Period,
        usage::{Account, Gap, Kind, Side, Usage, UsageRow, Way, is_estimated},
    },
    owner::{Owner, OwnerId, OwnerKind},
};

/// The ledger's grain, seconds.
const GRAIN: i64 = 60;

impl Ledger {
    /// Every row that begins in a range, the interface totals beside them, and where readings
    /// are missing: minutes in which an interface has no posting at all. What moved then, if
    /// anything, is in the minute after.
    ///
    /// # Errors
    /// The file cannot be read, or holds a word this program does not know.
    pub fn usage(&self, range: Period) -> Result<Usage, LedgerError> {
        let owners: HashMap<OwnerId, Owner> = self.owners()?.into_iter().collect();
        let connection = self.lock();
        let mut usage = Usage::default();
        let mut statement = self.ok(connection.prepare(
            "SELECT minute, interface, direction, owner, wire_bytes FROM posting
             WHERE minute >= ?1 AND minute < ?2",
        ))?;
        let rows = self.ok(statement.query_map(params![range.start, range.end], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, String>(1)?,
                direction(row.get(2)?),
                OwnerId(row.get(3)?),
                row.get::<_, i64>(4)?,
            ))
        }))?;
        let nobody = Owner::foreign();
        for row in rows {
            let (start, interface, direction, id, wire_bytes) = self.ok(row)?;
            // Number 0 is nobody's and in no table; a lost number is nobody's either.
            let owner = owners.get(&id).unwrap_or(&nobody);
            usage.rows.push(UsageRow {
                period: minute(start),
                account: Account {
                    interface,
                    side: match owner.kind {
                        OwnerKind::Foreign => Side::None,
                        _ => owner.leg.into(),
                    },
                    way: direction.into(),
                    class: String::new(),
                    kind: owner.kind.into(),
                    endpoint: owner.endpoint.clone(),
                    route: owner.route.clone(),
                    service: owner.service.clone(),
                    tenant: owner.tenant.clone(),
                    estimated: is_estimated(owner.quality),
                },
                wire_bytes,
            });
        }
        let mut statement = self.ok(connection.prepare(
            "SELECT minute, interface, direction, cell, bytes FROM cell_posting
             WHERE minute >= ?1 AND minute < ?2 ORDER BY interface, minute",
        ))?;
        let rows = self.ok(statement.query_map(params![range.start, range.end], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, String>(1)?,
                direction(row.get(2)?),
                row.get::<_, String>(3)?,
                row.get::<_, i64>(4)?,
            ))
        }))?;
        let mut read: BTreeMap<String, i64> = BTreeMap::new();
        for row in rows {
            let (start, interface, direction, name, bytes) = self.ok(row)?;
            let before = read.insert(interface.clone(), start);
            if let Some(before) = before
                && start - before > GRAIN
            {
                usage.gaps.push(Gap {
                    interface: interface.clone(),
                    period: Period {
                        start: before + GRAIN,
                        end: start + GRAIN,
                    },
                });
            }
            if name == cell::NAMES[cell::TOTAL] {
                let key = (interface, Way::from(direction));
                *usage.totals.entry(key).or_default() += i128::from(bytes);
                continue;
            }
            usage.rows.push(UsageRow {
                period: minute(start),
                account: Account {
                    interface,
                    side: Side::None,
                    way: direction.into(),
                    class: String::new(),
                    kind: Kind::Cell(name),
                    endpoint: String::new(),
                    route: String::new(),
                    service: String::new(),
                    tenant: String::new(),
                    estimated: false,
                },
                wire_bytes: bytes,
            });
        }
        usage.canonical();
        Ok(usage)
    }
}

fn minute(start: i64) -> Period {
    Period {
        start,
        end: start + GRAIN,
    }
}
