//! `edgemeter report`: the ledger as a table, with the line that proves it.

use std::{collections::BTreeMap, fmt::Write as _};

use flow_abi::Direction;

use crate::{
    attribution::Amount,
    class::Classes,
    config::{Config, Prices},
    ledger::{Balances, Ledger},
    money::Nanos,
    owner::{Leg, Owner, OwnerId, OwnerKind},
};

/// One line of the report.
#[derive(Default)]
struct Line {
    legs: [[Amount; 2]; 2],
    cost: Nanos,
    estimated: bool,
}

/// Renders the ledger of a configuration's state directory.
///
/// # Errors
/// The ledger cannot be read, or a sum of money does not fit 128 bits.
pub fn render(config: &Config) -> anyhow::Result<String> {
    let ledger = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?;
    let owners: BTreeMap<OwnerId, Owner> = ledger.owners()?.into_iter().collect();
    let balances = ledger.balances()?;
    let lines = lines(&owners, &balances, config.prices.as_ref())?;
    let currency = config
        .prices
        .as_ref()
        .map_or_else(String::new, |p| p.currency.to_string());
    let mut out = String::new();
    writeln!(
        out,
        "{:<26} {:<12} {:>14} {:>14} {:>14} {:>14} {:>8} {:>16}",
        "route",
        "tenant",
        "client rx B",
        "client tx B",
        "upstream tx B",
        "upstream rx B",
        "retrans",
        format!("cost {currency}")
    )?;
    let (mut attributed, mut money) = (0, Nanos::default());
    for ((name, tenant), line) in &lines {
        let [[client_rx, client_tx], [upstream_rx, upstream_tx]] = &line.legs;
        let mark = if line.estimated { " ~" } else { "" };
        writeln!(
            out,
            "{:<26} {:<12} {:>14} {:>14} {:>14} {:>14} {:>8} {:>16}",
            format!("{name}{mark}"),
            tenant,
            client_rx.wire_bytes,
            client_tx.wire_bytes,
            upstream_tx.wire_bytes,
            upstream_rx.wire_bytes,
            client_tx.retransmit_frames + upstream_tx.retransmit_frames,
            line.cost.to_string(),
        )?;
        attributed += line
            .legs
            .iter()
            .flatten()
            .map(|amount| amount.wire_bytes)
            .sum::<i64>();
        money = money.checked_add(line.cost)?;
    }
    writeln!(
        out,
        "total cost {money} {currency}; ~ marks HTTP/2, whose split is estimated"
    )?;
    if config
        .prices
        .as_ref()
        .is_some_and(|prices| !prices.is_flat())
    {
        writeln!(
            out,
            "cost is at each price's first tier that costs something; `edgemeter cost report` has \
             tiers, allowances and percentiles"
        )?;
    }
    let known = Classes::new(ledger.classes()?, Box::new(ledger.clone()));
    classes(&mut out, &known, &balances)?;
    conservation(&mut out, &owners, &balances, attributed)?;
    Ok(out)
}

/// What went to which class of remote addresses; nothing while there is only one.
fn classes(out: &mut String, known: &Classes, balances: &Balances) -> std::fmt::Result {
    let mut sums: BTreeMap<String, [i64; 2]> = BTreeMap::new();
    for (_, direction, _, class, amount) in balances.by_class() {
        sums.entry(known.name(class)).or_default()[direction as usize] += amount.wire_bytes;
    }
    if sums.len() > 1 {
        for (class, [rx, tx]) in &sums {
            writeln!(out, "class {class}: received {rx} B, sent {tx} B")?;
        }
    }
    Ok(())
}

fn lines(
    owners: &BTreeMap<OwnerId, Owner>,
    balances: &Balances,
    prices: Option<&Prices>,
) -> anyhow::Result<BTreeMap<(String, String), Line>> {
    let mut lines: BTreeMap<(String, String), Line> = BTreeMap::new();
    // Products first, one division per rate: rounding each owner would not add up.
    let mut products: BTreeMap<(String, String), Vec<(crate::money::Rate, i128)>> = BTreeMap::new();
    for (id, amounts) in balances.by_owner() {
        let Some(owner) = owners.get(&id) else {
            continue;
        };
        let key = match owner.kind {
            OwnerKind::Route => (owner.route.clone(), owner.tenant.clone()),
            OwnerKind::Overhead => (format!("(overhead {})", owner.endpoint), String::new()),
            OwnerKind::Unclaimed | OwnerKind::Foreign => continue,
        };
        let line = lines.entry(key.clone()).or_default();
        line.estimated |= owner.quality == crate::owner::Quality::Estimated;
        for direction in [Direction::Rx, Direction::Tx] {
            let amount = &amounts[direction as usize];
            line.legs[usize::from(owner.leg == Leg::Upstream)][direction as usize].add(amount);
            let price = prices.and_then(|prices| prices.find(owner.leg, direction));
            if let Some(price) = price {
                let product = price.rate.exact(amount.wire_bytes.max(0).unsigned_abs());
                products
                    .entry(key.clone())
                    .or_default()
                    .push((price.rate, product));
            }
        }
    }
    for (key, products) in products {
        let line = lines.entry(key).or_default();
        for (rate, product) in products {
            line.cost = line.cost.checked_add(rate.settle(product))?;
        }
    }
    Ok(lines)
}

/// attributed + unattributed = bytes on the interfaces.
fn conservation(
    out: &mut String,
    owners: &BTreeMap<OwnerId, Owner>,
    balances: &Balances,
    attributed: i64,
) -> std::fmt::Result {
    let (mut unclaimed, mut foreign) = (0, 0);
    for (id, amounts) in balances.by_owner() {
        let bytes: i64 = amounts.iter().map(|amount| amount.wire_bytes).sum();
        match owners.get(&id).map(|owner| owner.kind) {
            Some(OwnerKind::Unclaimed) => unclaimed += bytes,
            // Number 0 is nobody's and in no table; a lost number is nobody's either.
            Some(OwnerKind::Foreign) | None => foreign += bytes,
            Some(OwnerKind::Route | OwnerKind::Overhead) => {}
        }
    }
    let interfaces = balances.by_interface();
    let cells: i64 = interfaces.values().map(|balance| balance.cells).sum();
    let total: i64 = interfaces.values().map(|balance| balance.total).sum();
    let names: Vec<&str> = interfaces.keys().map(String::as_str).collect();
    let unattributed = unclaimed + foreign + cells;
    writeln!(
        out,
        "unattributed: unclaimed {unclaimed} B, not the gateway's {foreign} B, in no flow {cells} B"
    )?;
    writeln!(
        out,
        "conservation on {}: attributed {attributed} B + unattributed {unattributed} B = {} B; \
         interfaces moved {total} B; difference {} B",
        names.join(", "),
        attributed + unattributed,
        attributed + unattributed - total
    )
}
