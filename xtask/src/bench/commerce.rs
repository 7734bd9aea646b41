//! `cargo xtask bench commerce`: durable orders a second, direct and through the gateway, on
//! one machine with the load generator.
//!
//! Client, gateway and service run in namespaces of their own, so that the gateway meters real
//! frames. The database is on the disk of the target directory with `synchronous=FULL`.

mod apart;
mod shop;

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use super::open_loop::{Arrivals, Outcome};
use super::{machine, results};
use crate::host::{self, Tool};
use apart::Apart;
use shop::{Build, Ledger, Shop, Through};

/// The rate to beat, orders a second.
const TARGET_RATE: u64 = 8_600;
/// Connections of the open loop: enough that none is the bottleneck at the rates we reach.
const CONNECTIONS: u32 = 256;
/// Clients of the closed loop.
const CONCURRENCIES: [u32; 3] = [100, 500, 1_000];

/// Of each case, sent and not measured.
const WARM_UP: Duration = Duration::from_secs(2);

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seconds of load a case: 10, or 4 when quick.
    #[arg(long)]
    seconds: Option<u64>,
    /// Orders a second of the open loop.
    #[arg(long, default_value_t = TARGET_RATE)]
    rate: u64,
    /// Only the cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// A few seconds a case: all of it in two minutes, once it is built.
    #[arg(long)]
    quick: bool,
    /// Measure what an earlier run has built.
    #[arg(long)]
    built: bool,
    /// Bench the development build, to try the bench itself. Its figures mean nothing.
    #[arg(long)]
    dev: bool,
}

/// One row of the results.
struct Row {
    case: String,
    outcome: Outcome,
    /// Minor units the service took in, by its own counter.
    revenue_minor: u64,
    apart: Apart,
}

/// Runs it all and prints the tables.
///
/// # Errors
/// Something does not start, an answer was wrong, or an acknowledged order is missing.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench commerce")?;
    host::need(&[Tool::CC, Tool::CMAKE, Tool::IP, Tool::TC, Tool::ETHTOOL])?;
    host::mount_bpffs()?;
    let build = Build::make(options.dev, options.built)?;
    let shop = Shop::open(build)?;
    let mut report = format!("cargo xtask bench commerce, {}\n", machine());
    let wanted = |name: &str| {
        options
            .only
            .as_deref()
            .is_none_or(|only| name.contains(only))
    };
    let seconds = options
        .seconds
        .unwrap_or(if options.quick { 4 } else { 10 });
    let duration = Duration::from_secs(seconds);

    if wanted("start") {
        let _ = writeln!(
            report,
            "\nstart to first order, new database, median of 5: {} ms",
            shop.start_to_first_order()?
        );
    }
    if wanted("storage") {
        let _ = writeln!(
            report,
            "\nstorage alone, no HTTP (commerce rehearse):\n{}",
            shop.storage(seconds)?
        );
    }
    let open = Arrivals::Rate {
        per_second: options.rate,
        connections: CONNECTIONS,
    };
    let mut cases = Vec::new();
    for through in [Through::Direct, Through::Gateway] {
        let way = through.name();
        let name = format!("open loop {}/s, one hot SKU, {way}", options.rate);
        cases.push((name, through, Ledger::Sqlite, open, 1));
        for clients in CONCURRENCIES {
            let name = format!("{clients} clients, {way}");
            let arrivals = Arrivals::Clients(clients);
            cases.push((name, through, Ledger::Sqlite, arrivals, 48));
        }
    }
    let (name, arrivals) = (
        "500 clients, direct, PostgreSQL and Redis",
        Arrivals::Clients(500),
    );
    cases.push((
        name.to_owned(),
        Through::Direct,
        Ledger::Distributed,
        arrivals,
        48,
    ));
    // One that fails must not take the others' figures with it.
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for (name, through, ledger, arrivals, skus) in cases {
        if !wanted(&name) {
            continue;
        }
        match shop.case(&name, through, ledger, arrivals, (WARM_UP, duration), skus) {
            Ok(row) => rows.push(row),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    table(&mut report, &rows);
    if wanted("kill") {
        let _ = writeln!(report, "\n{}", shop.kill_under_load(options.rate)?);
    }
    for failure in &failures {
        let _ = writeln!(report, "\nFAILED {failure}");
    }
    println!("\n{report}");
    let path = results("commerce.txt", &report)?;
    println!("in {}", path.display());
    ensure!(failures.is_empty(), "{} cases failed", failures.len());
    Ok(())
}

fn table(report: &mut String, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(
        report,
        "\n{:<48} {:>9} {:>8} {:>8} {:>8} {:>8} {:>7} {:>14}",
        "durable orders (FULL)",
        "orders/s",
        "mean ms",
        "p50 ms",
        "p99 ms",
        "p99.9",
        "503",
        "revenue CNY/s"
    );
    let ms = |us: u64| format!("{}.{:02}", us / 1000, us % 1000 / 10);
    for Row {
        case,
        outcome,
        revenue_minor,
        ..
    } in rows
    {
        let millis = u64::try_from(outcome.took.as_millis().max(1)).unwrap_or(u64::MAX);
        let revenue = revenue_minor.saturating_mul(1000) / millis;
        let _ = writeln!(
            report,
            "{case:<48} {:>9} {:>8} {:>8} {:>8} {:>8} {:>7} {:>11}.{:02}",
            outcome.per_second(),
            ms(outcome.mean_us()),
            ms(outcome.at_us(500)),
            ms(outcome.at_us(990)),
            ms(outcome.at_us(999)),
            outcome.overloaded,
            revenue / 100,
            revenue % 100,
        );
    }
    let _ = writeln!(
        report,
        "open loop: latency from when an order should have been sent; closed loop: from when it was; the \
         first {} s of a case are not measured",
        WARM_UP.as_secs(),
    );
    let _ = writeln!(report, "\n{:<48} {}", "apart", Apart::HEADING);
    for Row { case, apart, .. } in rows {
        let _ = writeln!(report, "{case:<48} {}", apart.row());
    }
    let _ = writeln!(
        report,
        "processor time in percent of one; deduct: in the service, from the request to its committed \
         answer, queue included; commit: write and sync of the log"
    );
}
