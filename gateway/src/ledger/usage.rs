//! Usage for pricing: the one query that bills are made from.

use std::collections::BTreeMap;

use flow_abi::cell;

use super::{
    Grain, Ledger, LedgerError,
    sql::{SqlError, Statements, values},
    store::{direction, owner},
};
use crate::{
    class::DEFAULT_NAME,
    cost::{
        calendar::Period,
        usage::{Account, Gap, Kind, Side, Usage, UsageRow, Way, is_estimated},
    },
    owner::{Owner, OwnerId, OwnerKind},
};

impl Ledger {
    /// Every row that touches a range, of every gateway that posts here, the interface totals
    /// beside them, and where readings are missing: minutes in which an interface has no posting
    /// at all. What moved then, if anything, is in the minute after. Minutes are added up to
    /// `grain` seconds (a multiple of 60 that divides an hour); rows that have become coarser in
    /// the ledger span an hour, a day or a month. All of one moment, also while a gateway posts.
    ///
    /// # Errors
    /// The ledger cannot be read, or holds a word this program does not know.
    pub fn usage(&self, range: Period, grain: i64) -> Result<Usage, LedgerError> {
        self.read(|statements| {
            let mut usage = Usage::default();
            owned(statements, range, grain, &mut usage)?;
            in_cells(statements, range, grain, &mut usage)?;
            gaps(statements, range, &mut usage)?;
            usage.canonical();
            Ok(usage)
        })
    }
}

fn owned(
    statements: &mut dyn Statements,
    range: Period,
    grain: i64,
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
        "SELECT p.gateway, p.grain,
                CASE WHEN p.grain <= 0 THEN p.start - p.start % ?3 ELSE p.start END,
                p.interface, p.direction, p.owner, COALESCE(c.name, ''),
                CAST(SUM(p.wire_bytes) AS BIGINT)
         FROM posting p LEFT JOIN class c ON c.gateway = p.gateway AND c.id = p.class
         WHERE p.start < ?2 AND (p.start >= ?1 OR (p.grain > 0 AND p.start >= ?1 - 2764800))
         GROUP BY 1, 2, 3, 4, 5, 6, 7",
        values![range.start, range.end, grain],
    )?;
    for row in rows {
        let period = span(row.int(1)?, row.int(2)?, grain);
        if period.meet(range).is_none() {
            continue;
        }
        let key = (row.int(0)?, OwnerId(row.small(5)?));
        let owner = owners.get(&key).unwrap_or(&nobody);
        usage.rows.push(UsageRow {
            period,
            account: Account {
                interface: row.text(3)?.to_owned(),
                side: match owner.kind {
                    OwnerKind::Foreign => Side::None,
                    _ => owner.leg.into(),
                },
                way: direction(row.int(4)?).into(),
                class: match row.text(6)? {
                    "" => DEFAULT_NAME.to_owned(),
                    name => name.to_owned(),
                },
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
    grain: i64,
    usage: &mut Usage,
) -> Result<(), SqlError> {
    let rows = statements.query(
        "SELECT grain, CASE WHEN grain <= 0 THEN start - start % ?3 ELSE start END,
                interface, direction, cell, CAST(SUM(bytes) AS BIGINT)
         FROM cell_posting
         WHERE start < ?2 AND (start >= ?1 OR (grain > 0 AND start >= ?1 - 2764800))
         GROUP BY 1, 2, 3, 4, 5",
        values![range.start, range.end, grain],
    )?;
    for row in rows {
        let period = span(row.int(0)?, row.int(1)?, grain);
        if period.meet(range).is_none() {
            continue;
        }
        let interface = row.text(2)?.to_owned();
        let way = Way::from(direction(row.int(3)?));
        let name = row.text(4)?;
        if name == cell::NAMES[cell::TOTAL] {
            let key = (period, interface, way);
            *usage.totals.entry(key).or_default() += i128::from(row.int(5)?);
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
            wire_bytes: row.int(5)?,
        });
    }
    Ok(())
}

/// Minutes without any posting of an interface, before the next one that has some.
fn gaps(statements: &mut dyn Statements, range: Period, usage: &mut Usage) -> Result<(), SqlError> {
    let rows = statements.query(
        "SELECT DISTINCT gateway, interface, start, grain FROM cell_posting
         WHERE start >= ?1 AND start < ?2 ORDER BY gateway, interface, start, grain",
        values![range.start, range.end],
    )?;
    let mut before: Option<(i64, String, i64)> = None;
    for row in rows {
        let (gateway, interface) = (row.int(0)?, row.text(1)?.to_owned());
        // A second without a frame is nothing to speak of.
        let grain = Grain::from_number(row.int(3)?).max(Grain::Minute);
        let period = grain.span(row.int(2)?);
        if let Some((same, name, end)) = &before
            && (*same, name) == (gateway, &interface)
            && period.start > *end
        {
            usage.gaps.push(Gap {
                interface: interface.clone(),
                period: Period {
                    start: *end,
                    end: period.end,
                },
            });
        }
        before = Some((gateway, interface, period.end));
    }
    Ok(())
}

/// The span of a row: seconds and minutes have been added up to `grain` seconds.
fn span(number: i64, start: i64, grain: i64) -> Period {
    match Grain::from_number(number) {
        Grain::Second | Grain::Minute => Period {
            start,
            end: start + grain,
        },
        coarser => coarser.span(start),
    }
}
