//! Usage for pricing: the one query that bills are made from.

use std::collections::BTreeMap;

use flow_abi::cell;

use super::{
    Grain, Ledger, LedgerError,
    sql::{SqlError, Statements, values},
    store::{direction, owner},
};
use crate::{
    cost::{
        calendar::Period,
        usage::{Account, Gap, Kind, Side, Usage, UsageRow, Way, is_estimated},
    },
    owner::{Owner, OwnerId, OwnerKind},
};

impl Ledger {
    /// Every row that begins in a range, of every gateway that posts here, the interface totals
    /// beside them, and where readings are missing: minutes in which an interface has no posting
    /// at all. What moved then, if anything, is in the minute after. Rows that have become
    /// coarser span an hour, a day or a month.
    ///
    /// # Errors
    /// The ledger cannot be read, or holds a word this program does not know.
    pub fn usage(&self, range: Period) -> Result<Usage, LedgerError> {
        self.read(|statements| {
            let mut usage = Usage::default();
            owned(statements, range, &mut usage)?;
            in_cells(statements, range, &mut usage)?;
            usage.canonical();
            Ok(usage)
        })
    }
}

fn owned(
    statements: &mut dyn Statements,
    range: Period,
    usage: &mut Usage,
) -> Result<(), SqlError> {
    // Number 0 is nobody's and in no table; a lost number is nobody's either.
    let mut owners: BTreeMap<(i64, OwnerId), Owner> = BTreeMap::new();
    for row in statements.query(
        "SELECT gateway, id, kind, leg, endpoint, route, service, tenant, quality FROM owner",
        &[],
    )? {
        owners.insert((row.int(0)?, OwnerId(row.small(1)?)), owner(&row, 2)?);
    }
    let nobody = Owner::foreign();
    let rows = statements.query(
        "SELECT p.gateway, p.grain, p.start, p.interface, p.direction, p.owner,
                COALESCE(c.name, ''), p.wire_bytes
         FROM posting p LEFT JOIN class c ON c.gateway = p.gateway AND c.id = p.class
         WHERE p.start >= ?1 AND p.start < ?2",
        values![range.start, range.end],
    )?;
    for row in rows {
        let key = (row.int(0)?, OwnerId(row.small(5)?));
        let owner = owners.get(&key).unwrap_or(&nobody);
        usage.rows.push(UsageRow {
            period: Grain::from_number(row.int(1)?).span(row.int(2)?),
            account: Account {
                interface: row.text(3)?.to_owned(),
                side: match owner.kind {
                    OwnerKind::Foreign => Side::None,
                    _ => owner.leg.into(),
                },
                way: direction(row.int(4)?).into(),
                class: row.text(6)?.to_owned(),
                kind: owner.kind.into(),
                endpoint: owner.endpoint.clone(),
                route: owner.route.clone(),
                service: owner.service.clone(),
                tenant: owner.tenant.clone(),
                estimated: is_estimated(owner.quality),
            },
            wire_bytes: row.int(7)?,
        });
    }
    Ok(())
}

fn in_cells(
    statements: &mut dyn Statements,
    range: Period,
    usage: &mut Usage,
) -> Result<(), SqlError> {
    let rows = statements.query(
        "SELECT gateway, grain, start, interface, direction, cell, bytes FROM cell_posting
         WHERE start >= ?1 AND start < ?2 ORDER BY gateway, interface, start",
        values![range.start, range.end],
    )?;
    let mut read: BTreeMap<(i64, String), i64> = BTreeMap::new();
    for row in rows {
        let period = Grain::from_number(row.int(1)?).span(row.int(2)?);
        let interface = row.text(3)?.to_owned();
        let before = read.insert((row.int(0)?, interface.clone()), period.end);
        if let Some(before) = before
            && period.start > before
        {
            usage.gaps.push(Gap {
                interface: interface.clone(),
                period: Period {
                    start: before,
                    end: period.end,
                },
            });
        }
        let way = Way::from(direction(row.int(4)?));
        let name = row.text(5)?;
        if name == cell::NAMES[cell::TOTAL] {
            let key = (interface, way);
            *usage.totals.entry(key).or_default() += i128::from(row.int(6)?);
            continue;
        }
        usage.rows.push(UsageRow {
            period,
            account: Account {
                interface,
                side: Side::None,
                way,
                class: String::new(),
                kind: Kind::Cell(name.to_owned()),
                endpoint: String::new(),
                route: String::new(),
                service: String::new(),
                tenant: String::new(),
                estimated: false,
            },
            wire_bytes: row.int(6)?,
        });
    }
    Ok(())
}
