//! `edgemeter cost …`: files, the clock and the ledger around the pure parts.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::{
    bill::{Bill, Charge},
    book::Book,
    calendar::{Date, Month, Period},
    close::{self, Outcome},
    compare::{self, Input},
    focus, idle, parquet,
    rate::rate_month,
    reconcile,
    report::{Field, Report},
    usage::hex,
};
use crate::{
    admin,
    config::{Config, Prices},
    ledger::Ledger,
    money::UnitPrice,
};

/// What to do with costs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// What bytes cost, by route, service, tenant, class, day, …
    Report(ReportArguments),
    /// Write a month's bill once and for all; later, what has changed since as corrections.
    Close(CloseArguments),
    /// Compare a month with a provider's bill: for each SKU the difference and its cause.
    Reconcile(ReconcileArguments),
    /// A fleet of sidecars against this gateway: a calculator with visible inputs.
    Compare(CompareArguments),
    /// Peers, connections and tasks that cost and do nothing.
    Idle(IdleArguments),
}

/// `cost report`.
#[derive(Debug, clap::Args)]
pub struct ReportArguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What to group rows by, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "route,service,tenant")]
    by: Vec<Field>,
    /// First day, in the price book's zone; the first of this month unless given.
    #[arg(long, value_name = "DAY")]
    from: Option<Date>,
    /// First day no more; tomorrow unless given.
    #[arg(long, value_name = "DAY")]
    to: Option<Date>,
    /// How to write it. `focus` and `parquet` are FOCUS 1.4 rows, not grouped.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write here instead of to standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// How to write a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Table,
    Csv,
    Json,
    Focus,
    Parquet,
}

/// `cost close`.
#[derive(Debug, clap::Args)]
pub struct CloseArguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Such as 2026-11.
    #[arg(long)]
    month: Month,
}

/// `cost reconcile`.
#[derive(Debug, clap::Args)]
pub struct ReconcileArguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The provider's bill: FOCUS, an export of AWS, GCP or Azure, or `sku,quantity,cost`.
    #[arg(long, value_name = "CSV")]
    bill: PathBuf,
    /// Such as 2026-11.
    #[arg(long)]
    month: Month,
    /// Differences below this many millionths are rounding.
    #[arg(long, default_value_t = 100)]
    tolerance_ppm: u32,
}

/// `cost compare`.
#[derive(Debug, clap::Args)]
pub struct CompareArguments {
    /// Configuration file, for the machine prices of its book.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Calls between services a second.
    #[arg(long)]
    calls_per_second: Option<u64>,
    /// Pods with a sidecar each.
    #[arg(long)]
    pods: Option<u64>,
    /// CPU of the sidecars that a call passes.
    #[arg(long)]
    sidecar_cpu_us: Option<u64>,
    /// CPU of the gateway and its observation.
    #[arg(long)]
    gateway_cpu_us: Option<u64>,
    /// Memory of one sidecar.
    #[arg(long)]
    sidecar_memory_mib: Option<u64>,
    /// Memory of the gateway.
    #[arg(long)]
    gateway_memory_mib: Option<u64>,
    /// Wire bytes the sidecars add to a call.
    #[arg(long)]
    sidecar_wire_bytes: Option<u64>,
    /// Wire bytes the gateway adds to a call.
    #[arg(long)]
    gateway_wire_bytes: Option<u64>,
    /// Price of a core for an hour.
    #[arg(long)]
    core_hour: Option<UnitPrice>,
    /// Price of a GiB of memory for an hour.
    #[arg(long)]
    gib_hour: Option<UnitPrice>,
    /// Price of 10^9 wire bytes.
    #[arg(long)]
    gb_price: Option<UnitPrice>,
}

/// `cost idle`.
#[derive(Debug, clap::Args)]
pub struct IdleArguments {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How far back to look for the busiest minute.
    #[arg(long, default_value_t = 168)]
    hours: u32,
    /// A saved metrics page; else the one of the gateway at `admin.listen`.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// What one peer can carry in both directions.
    #[arg(long)]
    peer_mbps: Option<u64>,
    /// Below this share of it at the busiest minute a peer is not needed.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    busy_pct: Option<u64>,
    /// Peers kept in any case.
    #[arg(long)]
    keep: Option<u64>,
    /// Thousandths of a core that a peer is given.
    #[arg(long)]
    peer_millicores: Option<u64>,
    /// Memory that a peer is given.
    #[arg(long)]
    peer_memory_mib: Option<u64>,
    /// Memory of an idle connection.
    #[arg(long)]
    connection_kib: Option<u64>,
    /// Thousandths of a core that a leaked task burns.
    #[arg(long)]
    task_millicores: Option<u64>,
    /// Price of a core for an hour.
    #[arg(long)]
    core_hour: Option<UnitPrice>,
    /// Price of a GiB of memory for an hour.
    #[arg(long)]
    gib_hour: Option<UnitPrice>,
}

/// Runs a command; its text goes to standard output.
///
/// # Errors
/// The configuration, the ledger or a file is not as needed.
pub fn run(command: &Command) -> Result<()> {
    let text = match command {
        Command::Report(arguments) => return report(arguments),
        Command::Close(arguments) => close_month(arguments)?,
        Command::Reconcile(arguments) => reconcile_month(arguments)?,
        Command::Compare(arguments) => compare_fleets(arguments)?,
        Command::Idle(arguments) => find_idle(arguments)?,
    };
    print!("{text}");
    Ok(())
}

fn prices(config: &Config) -> Result<&Prices> {
    config.prices.as_ref().context(
        "prices is absent from the configuration; fix: add `[prices]` with `book = \"prices.toml\"`",
    )
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs().cast_signed())
}

/// Bills of the months that a window of whole days touches, and by how much the interfaces moved
/// more than the rows say: from one reading each, so that a gateway that posts meanwhile makes no
/// difference.
fn bills(
    book: &Book,
    ledger: &Ledger,
    classes: &str,
    from: Date,
    to: Date,
) -> Result<(Vec<Bill>, i128)> {
    let window = Period {
        start: book.zone.midnight(from),
        end: book.zone.midnight(to),
    };
    let (mut bills, mut imbalance) = (Vec::new(), BTreeMap::new());
    let mut month = Month::of(from);
    while month.first() < to {
        let period = book.zone.month(month);
        let mut usage = ledger.usage(period, book.grain())?;
        usage.class_hash = classes.to_owned();
        imbalance.extend(usage.imbalance(window));
        let bill = rate_month(book, &usage, month, now().min(period.end))?;
        bills.push(bill.with_standing_rows());
        month = month.next();
    }
    Ok((bills, imbalance.values().sum()))
}

/// SHA-256 of a configuration's classes of remote addresses, however they are laid out in the
/// file; empty when there are none.
fn classes_hash(text: &str) -> String {
    let table: toml::Table = text.parse().unwrap_or_default();
    table.get("classes").map_or_else(String::new, |classes| {
        hex(&Sha256::digest(classes.to_string()))
    })
}

fn report(arguments: &ReportArguments) -> Result<()> {
    let config = Config::load(&arguments.config)?;
    let prices = prices(&config)?;
    let book = prices.book.as_ref();
    let today = book.zone.date(now());
    let from = arguments.from.unwrap_or_else(|| Month::of(today).first());
    let to = arguments
        .to
        .unwrap_or_else(|| today.succ_opt().unwrap_or(today));
    ensure!(
        from < to,
        "--to {to} is not after --from {from}; it is the first day no more in the report"
    );
    let ledger = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?;
    let classes = classes_hash(&fs::read_to_string(&arguments.config)?);
    let (bills, imbalance) = bills(book, &ledger, &classes, from, to)?;
    let window = Period {
        start: book.zone.midnight(from),
        end: book.zone.midnight(to),
    };
    let inside =
        |charge: &Charge| window.start <= charge.period.start && charge.period.start < window.end;
    let bytes = match arguments.format {
        Format::Table | Format::Csv | Format::Json => {
            let report = Report::new(book, &bills, imbalance, &arguments.by, inside)?;
            match arguments.format {
                Format::Csv => report.csv()?.into_bytes(),
                Format::Json => report.json().into_bytes(),
                _ => report.table().into_bytes(),
            }
        }
        Format::Focus | Format::Parquet => {
            let mut records = Vec::new();
            for bill in &bills {
                let charges: Vec<Charge> = bill
                    .charges
                    .iter()
                    .filter(|charge| inside(charge))
                    .cloned()
                    .collect();
                let rows = focus::records(book, bill.period, &charges, &bill.provenance, false)?;
                records.extend(rows);
            }
            match arguments.format {
                Format::Parquet => parquet::write(&records)?,
                _ => focus::csv(&records)?,
            }
        }
    };
    match &arguments.output {
        Some(path) => fs::write(path, bytes).with_context(|| format!("writing {}", path.display())),
        None => {
            let mut out = std::io::stdout().lock();
            match out.write_all(&bytes).and_then(|()| out.flush()) {
                // The reader has seen enough.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
                other => other.context("writing to standard output"),
            }
        }
    }
}

fn close_month(arguments: &CloseArguments) -> Result<String> {
    let config = Config::load(&arguments.config)?;
    let book = prices(&config)?.book.as_ref();
    let ledger = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?;
    let period = book.zone.month(arguments.month);
    let mut usage = ledger.usage(period, book.grain())?;
    usage.class_hash = classes_hash(&fs::read_to_string(&arguments.config)?);
    let bill = rate_month(book, &usage, arguments.month, period.end)?.with_standing_rows();
    let bills = config.gateway.state_dir.join("bills");
    let currency = book.currency;
    Ok(match close::close(book, &bill, now(), &bills)? {
        Outcome::Closed(folder, cost) => {
            format!(
                "closed {}: {cost} {currency} in {}\n",
                bill.month,
                folder.display()
            )
        }
        Outcome::Unchanged(folder) => {
            format!(
                "{} is closed, and nothing has changed since: {}\n",
                bill.month,
                folder.display()
            )
        }
        Outcome::Corrected(folder, cost, rows) => format!(
            "{} is closed; {rows} correction rows of {cost} {currency} in {}\n",
            bill.month,
            folder.display()
        ),
    })
}

fn reconcile_month(arguments: &ReconcileArguments) -> Result<String> {
    let config = Config::load(&arguments.config)?;
    let book = prices(&config)?.book.as_ref();
    let path = &arguments.bill;
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let lines = reconcile::read(&text).with_context(|| format!("{}", path.display()))?;
    if lines.is_empty() {
        bail!("{} has no lines", path.display());
    }
    let ledger = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?;
    let period = book.zone.month(arguments.month);
    // Other zones' months begin up to a day earlier and end up to a day later.
    let around = Period {
        start: period.start - 86_400,
        end: period.end + 86_400,
    };
    let usage = ledger.usage(around, book.grain())?;
    let tolerance = i128::from(arguments.tolerance_ppm);
    let findings = reconcile::reconcile(book, &usage, arguments.month, &lines, tolerance)?;
    Ok(reconcile::table(&findings, &book.currency.to_string()))
}

fn compare_fleets(arguments: &CompareArguments) -> Result<String> {
    let book = match &arguments.config {
        Some(path) => {
            let config = Config::load(path)?;
            Some(prices(&config)?.book.clone())
        }
        None => None,
    };
    let (core, gib, currency) = machine(book.as_deref(), arguments.core_hour, arguments.gib_hour);
    const MEASURED: &str = "our bench, 2 cores, 2,000 calls/s: two Envoys, mTLS, HTTP/1.1";
    const HOP: &str = "our bench, 2 cores, 2,000 calls/s: one pingora hop";
    let inputs = compare::Inputs {
        calls_per_second: Input::or(arguments.calls_per_second, 10_000, "example"),
        pods: Input::or(arguments.pods, 100, "example"),
        sidecar_cpu_us: Input::or(arguments.sidecar_cpu_us, 375, MEASURED),
        gateway_cpu_us: Input::or(arguments.gateway_cpu_us, 100, HOP),
        sidecar_memory_mib: Input::or(arguments.sidecar_memory_mib, 50, "assumption"),
        gateway_memory_mib: Input::or(arguments.gateway_memory_mib, 256, "assumption"),
        sidecar_wire_bytes: Input::or(arguments.sidecar_wire_bytes, 203, MEASURED),
        gateway_wire_bytes: Input::or(arguments.gateway_wire_bytes, 62, HOP),
        core_hour: core,
        gib_hour: gib,
        gb_price: Input::or(
            arguments.gb_price,
            "0.01".parse()?,
            "example: between zones, one direction",
        ),
        currency,
    };
    Ok(inputs.table()?)
}

fn find_idle(arguments: &IdleArguments) -> Result<String> {
    let config = Config::load(&arguments.config)?;
    let book = config.prices.as_ref().map(|prices| prices.book.as_ref());
    let (core_hour, gib_hour, currency) = machine(book, arguments.core_hour, arguments.gib_hour);
    let window = Period {
        start: now() - i64::from(arguments.hours) * 3_600,
        end: now() + 60,
    };
    let usage = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?.usage(window, 60)?;
    let upstreams: Vec<idle::Upstream> = config
        .upstreams
        .iter()
        .map(|upstream| idle::Upstream {
            name: upstream.name.to_string(),
            peers: upstream.peers.len() as u64,
        })
        .collect();
    let page = match &arguments.metrics {
        Some(path) => {
            Ok(fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?)
        }
        None => admin::client::ask(&config.admin, "GET", "/metrics").map(|(_, page)| page),
    };
    let (connections, missing) = match page {
        Ok(page) => match idle::connections(&page) {
            Some(found) => (Some(found), None),
            None => (None, Some("the gateway observes no connections".to_owned())),
        },
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let inputs = idle::Inputs {
        peer_mbps: Input::or(arguments.peer_mbps, 1_000, "assumption"),
        busy_pct: Input::or(arguments.busy_pct, 50, "assumption"),
        keep: Input::or(arguments.keep, 2, "one may fail"),
        peer_millicores: Input::or(arguments.peer_millicores, 1_000, "assumption"),
        peer_memory_mib: Input::or(arguments.peer_memory_mib, 1_024, "assumption"),
        connection_kib: Input::or(
            arguments.connection_kib,
            90,
            "our bench: an idle plain connection in pingora with its read buffer",
        ),
        task_millicores: Input::or(arguments.task_millicores, 0, "waiting, not spinning"),
        core_hour,
        gib_hour,
        currency,
    };
    let findings = idle::find(&inputs, &upstreams, &usage, window, connections)?;
    Ok(inputs.table(&findings, missing.as_deref())?)
}

/// Machine prices: given, else the book's, else examples.
fn machine(
    book: Option<&Book>,
    core: Option<UnitPrice>,
    gib: Option<UnitPrice>,
) -> (Input<UnitPrice>, Input<UnitPrice>, String) {
    const EXAMPLE: &str = "example price, read in 2026: AWS Fargate, us-east-1";
    let listed = |text: &str| text.parse().unwrap_or(UnitPrice::ZERO);
    let (book_core, book_gib, source) = match book.and_then(compare::machine) {
        Some((core, gib, source)) => (core, gib, source),
        None => (listed("0.04048"), Some(listed("0.004445")), EXAMPLE.into()),
    };
    let gib_source = if book_gib.is_some() {
        source.clone()
    } else {
        "the book has no gib_hour".into()
    };
    let currency = book.map_or_else(|| "USD".into(), |book| book.currency.to_string());
    (
        Input::or(core, book_core, &source),
        Input::or(gib, book_gib.unwrap_or(UnitPrice::ZERO), &gib_source),
        currency,
    )
}

#[cfg(test)]
mod tests {
    use super::classes_hash;

    #[test]
    fn classes_are_known_by_what_they_say_not_by_their_layout() {
        let one = "[[classes]]\nname = \"zone\"\ncidrs = [\"10.0.0.0/8\"]\n";
        let same = "# a word\n[[classes]]\ncidrs = [ \"10.0.0.0/8\" ]\nname = \"zone\"\n";
        assert_eq!(classes_hash(one), classes_hash(same));
        assert_eq!(classes_hash(one).len(), 64);
        assert_ne!(classes_hash(one), classes_hash(&one.replace("/8", "/9")));
        assert_eq!(classes_hash("[gateway]\n"), "");
    }
}
