//! Rating against vendors' own examples, against a big-integer oracle, and around the edges of
//! months, days and price changes.

mod books;
mod closing;
mod golden;
mod properties;
mod reconciling;
mod time;

use std::path::Path;

use super::{
    bill::{Bill, Part},
    book::Book,
    calendar::{Month, Period},
    rate::rate_month,
    usage::{Account, Gap, Kind, Side, Usage, UsageRow, Way},
};
use crate::money::Nanos;

/// A book, or what is wrong with it.
pub(crate) fn book(text: &str) -> Book {
    match Book::parse(text, Path::new("prices.toml")) {
        Ok(book) => book,
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn account(route: &str, side: Side, way: Way) -> Account {
    Account {
        interface: "eth0".into(),
        side,
        way,
        class: "internet".into(),
        kind: Kind::Route,
        endpoint: "public".into(),
        route: route.into(),
        service: format!("{route}-service"),
        tenant: "acme".into(),
        estimated: false,
    }
}

/// A minute's row of a route's sent bytes on the client leg.
pub(crate) fn sent(route: &str, start: i64, wire_bytes: i64) -> UsageRow {
    UsageRow {
        period: Period {
            start,
            end: start + 60,
        },
        account: account(route, Side::Client, Way::Tx),
        wire_bytes,
    }
}

/// Usage whose interface totals are the rows' sums.
pub(crate) fn usage(rows: Vec<UsageRow>) -> Usage {
    let mut usage = Usage {
        rows,
        ..Usage::default()
    };
    usage.totals = usage.sums();
    usage
}

pub(crate) fn month(text: &str) -> Month {
    text.parse().unwrap()
}

/// A whole month, rated after its end.
pub(crate) fn rated(book: &Book, usage: &Usage, text: &str) -> Bill {
    let month = month(text);
    rate_month(book, usage, month, book.zone.month(month).end).unwrap()
}

pub(crate) fn cost(bill: &Bill) -> Nanos {
    Nanos(bill.charges.iter().map(|charge| charge.cost).sum())
}

pub(crate) fn start(book: &Book, date: &str) -> i64 {
    book.zone.midnight(date.parse().unwrap())
}

/// What holds for every bill, whatever went in.
pub(crate) fn check(bill: &Bill, usage: &Usage) {
    // Each pool's rows add up to it, to the nano.
    let pools: i128 = bill.pools.iter().map(|pool| pool.cost.0).sum();
    assert_eq!(cost(bill).0, pools, "rows and pools differ");
    // Every byte that was moved is in one row.
    let mut moved = std::collections::BTreeMap::new();
    for charge in &bill.charges {
        let key = (charge.account.interface.clone(), charge.account.way);
        *moved.entry(key).or_insert(0) += charge.wire_bytes;
    }
    moved.retain(|_, bytes| *bytes != 0);
    let mut totals = std::collections::BTreeMap::new();
    for ((_, interface, way), bytes) in &usage.totals {
        *totals.entry((interface.clone(), *way)).or_insert(0) += bytes;
    }
    totals.retain(|_, bytes| *bytes != 0);
    assert_eq!(
        moved, totals,
        "bytes on the bill and on the interfaces differ"
    );
    let identities: std::collections::BTreeSet<_> = bill
        .charges
        .iter()
        .map(super::bill::Charge::identity)
        .collect();
    assert_eq!(identities.len(), bill.charges.len(), "two rows are one");
    for charge in &bill.charges {
        let quantity: String = charge.quantity();
        assert!(charge.list_cost().is_some(), "{quantity}");
    }
    let priced: std::collections::BTreeSet<&Part> =
        bill.charges.iter().map(|charge| &charge.part).collect();
    assert!(!priced.contains(&Part::Unpriced) || cost_of(bill, &Part::Unpriced) == 0);
}

fn cost_of(bill: &Bill, part: &Part) -> i128 {
    let of_part = bill.charges.iter().filter(|charge| charge.part == *part);
    of_part.map(|charge| charge.cost).sum()
}
