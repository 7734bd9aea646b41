//! `cargo xtask bench commerce`: durable orders a second, direct and through the gateway, on
//! one machine with the load generator.
//!
//! Client, gateway and service run in namespaces of their own, so that the gateway meters real
//! frames. The database is on the disk of the target directory with `synchronous=FULL`.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::open_loop::{self, Arrivals, Outcome, Plan};
use super::site::Process;
use super::{edgemeter, machine, results};
use crate::exposition::{self, Exposition};
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Namespace, Topology};
use crate::server::{Postgres, Redis};

const PREFIX: &str = "em-shop";
const SERVICE_PORT: u16 = 9000;
const GATEWAY_PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(30);
/// The rate to beat, orders a second.
const TARGET_RATE: u64 = 8_600;
/// Connections of the open loop: enough that none is the bottleneck at the rates we reach.
const CONNECTIONS: u32 = 256;
/// Clients of the closed loop.
const CONCURRENCIES: [u32; 3] = [100, 500, 1_000];

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seconds of load a case.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Orders a second of the open loop.
    #[arg(long, default_value_t = TARGET_RATE)]
    rate: u64,
    /// Only the cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
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
}

/// Runs it all and prints the tables.
///
/// # Errors
/// Something does not start, an answer was wrong, or an acknowledged order is missing.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench commerce")?;
    host::need(&[Tool::CC, Tool::CMAKE, Tool::IP, Tool::TC, Tool::ETHTOOL])?;
    host::mount_bpffs()?;
    let build = Build::make(options.dev)?;
    let shop = Shop::open(build)?;
    let mut report = format!("cargo xtask bench commerce, {}\n", machine());
    let wanted = |name: &str| {
        options
            .only
            .as_deref()
            .is_none_or(|only| name.contains(only))
    };
    let duration = Duration::from_secs(options.seconds);

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
            "\nstorage alone, no HTTP (commerce/benches/storage.rs):\n{}",
            storage(options)?
        );
    }
    let mut rows = Vec::new();
    let open = Arrivals::Rate {
        per_second: options.rate,
        connections: CONNECTIONS,
    };
    for through in [Through::Direct, Through::Gateway] {
        let name = format!(
            "open loop {}/s, one hot SKU, {}",
            options.rate,
            through.name()
        );
        if wanted(&name) {
            rows.push(shop.case(&name, through, Ledger::Sqlite, open, duration, 1)?);
        }
        for clients in CONCURRENCIES {
            let name = format!("{clients} clients, {}", through.name());
            if wanted(&name) {
                rows.push(shop.case(
                    &name,
                    through,
                    Ledger::Sqlite,
                    Arrivals::Clients(clients),
                    duration,
                    48,
                )?);
            }
        }
    }
    let name = "500 clients, direct, PostgreSQL and Redis";
    if wanted(name) {
        rows.push(shop.case(
            name,
            Through::Direct,
            Ledger::Distributed,
            Arrivals::Clients(500),
            duration,
            48,
        )?);
    }
    table(&mut report, &rows);
    if wanted("kill") {
        let _ = writeln!(report, "\n{}", shop.kill_under_load(options.rate)?);
    }
    println!("\n{report}");
    let path = results("commerce.txt", &report)?;
    println!("in {}", path.display());
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
        "open loop: latency from when an order should have been sent; closed loop: from when it was"
    );
}

/// Prints what the storage bench of the package says.
fn storage(options: &Options) -> Result<String> {
    let mut cargo = host::cargo();
    cargo.args([
        "bench",
        "--quiet",
        "--locked",
        "--package",
        "commerce",
        "--bench",
        "storage",
    ]);
    if options.dev {
        cargo.args(["--profile", "dev"]);
    }
    let seconds = options.seconds.to_string();
    host::output(cargo.args(["--", "--seconds", &seconds]))
}

/// Where the executables are.
struct Build {
    commerce: PathBuf,
    edgemeter: PathBuf,
}

impl Build {
    fn make(dev: bool) -> Result<Self> {
        let mut cargo = host::cargo();
        cargo.args([
            "build",
            "--locked",
            "--package",
            "commerce",
            "--package",
            "edgemeter",
        ]);
        let directory = if dev {
            "debug"
        } else {
            cargo.arg("--release");
            "release"
        };
        host::run(&mut cargo)?;
        let directory = host::target_directory().join(directory);
        Ok(Self {
            commerce: directory.join("commerce"),
            edgemeter: directory.join("edgemeter"),
        })
    }
}

/// Which way orders take.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Through {
    Direct,
    Gateway,
}

impl Through {
    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Gateway => "through the gateway",
        }
    }
}

/// Where orders are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ledger {
    Sqlite,
    Distributed,
}

/// The hosts, and a directory on a real disk for databases.
struct Shop {
    hosts: Topology,
    directory: tempfile::TempDir,
    build: Build,
}

impl Shop {
    fn open(build: Build) -> Result<Self> {
        Namespace::sweep(PREFIX)?;
        let hosts = Topology::three_hosts(&Namespace::unique_prefix(PREFIX))?;
        // Not in memory: the disk's synchronous write is what is measured.
        let target = host::target_directory();
        let directory = tempfile::Builder::new()
            .prefix("bench-commerce-")
            .tempdir_in(&target)
            .with_context(|| format!("making a directory in {}", target.display()))?;
        Ok(Self {
            hosts,
            directory,
            build,
        })
    }

    fn service_address() -> SocketAddr {
        (GATEWAY_TO_SERVICE.far_v4, SERVICE_PORT).into()
    }

    /// One case on a fresh database, audited afterwards.
    fn case(
        &self,
        name: &str,
        through: Through,
        ledger: Ledger,
        arrivals: Arrivals,
        duration: Duration,
        skus: u32,
    ) -> Result<Row> {
        println!("{name} …");
        let directory = tempfile::tempdir_in(self.directory.path())?;
        let database = directory.path().join("commerce.db");
        let mut servers = None;
        let service = match ledger {
            Ledger::Sqlite => self.serve(directory.path(), &[])?,
            Ledger::Distributed => {
                let (postgres, redis) = (Postgres::start()?, Redis::start()?);
                let store = postgres.create_database()?;
                // Both listen on this namespace's loopback: the service runs here as well.
                let service = self.serve_here(
                    directory.path(),
                    &["--store", &store, "--gate", &redis.url()],
                )?;
                servers = Some((postgres, redis));
                service
            }
        };
        let gateway = match through {
            Through::Gateway => Some(self.gateway(directory.path())?),
            Through::Direct => None,
        };
        let plan = Plan {
            address: match (through, ledger) {
                (Through::Gateway, _) => (GATEWAY_TO_CLIENT.v4, GATEWAY_PORT).into(),
                (Through::Direct, Ledger::Sqlite) => Self::service_address(),
                (Through::Direct, Ledger::Distributed) => service.address,
            },
            arrivals,
            duration,
            run: format!("b{}", std::process::id()),
            skus: (1001..1001 + skus).map(|sku| sku.to_string()).collect(),
            may_die: false,
        };
        let before = self.revenue_minor(&service)?;
        let outcome = match (through, ledger) {
            (Through::Gateway, _) => self.hosts.client.run(|| open_loop::run(&plan))??,
            // The cable between gateway and service, without the gateway.
            (Through::Direct, Ledger::Sqlite) => {
                self.hosts.gateway.run(|| open_loop::run(&plan))??
            }
            (Through::Direct, Ledger::Distributed) => open_loop::run(&plan)?,
        };
        let revenue_minor = self.revenue_minor(&service)?.saturating_sub(before);
        drop(gateway);
        if gateway_is(through) {
            edgemeter::detach();
        }
        drop(service);
        drop(servers);
        if ledger == Ledger::Sqlite {
            let orders = self.audit(&database)?;
            ensure!(
                orders == outcome.created,
                "{name}: {orders} orders in the database, {} acknowledged",
                outcome.created
            );
        }
        Ok(Row {
            case: name.to_owned(),
            outcome,
            revenue_minor,
        })
    }

    fn serve(&self, directory: &Path, extra: &[&str]) -> Result<Service<'_>> {
        let mut command = self.hosts.service.command(&self.build.commerce)?;
        command.args([
            "serve",
            "--log-level",
            "warn",
            "--queue-capacity",
            "4096",
            "--listen",
        ]);
        command.arg(Self::service_address().to_string());
        command
            .arg("--database")
            .arg(directory.join("commerce.db"))
            .args(extra);
        let process = Process::start("commerce", &mut command, directory)?;
        let service = Service {
            process,
            host: Some(&self.hosts.service),
            address: Self::service_address(),
        };
        service.wait_until_ready()?;
        Ok(service)
    }

    fn serve_here(&self, directory: &Path, extra: &[&str]) -> Result<Service<'_>> {
        let address: SocketAddr = {
            let free = std::net::TcpListener::bind("127.0.0.1:0")?;
            free.local_addr()?
        };
        let mut command = Command::new(&self.build.commerce);
        command.args([
            "serve",
            "--log-level",
            "warn",
            "--queue-capacity",
            "4096",
            "--listen",
        ]);
        command.arg(address.to_string()).args(extra);
        let process = Process::start("commerce", &mut command, directory)?;
        let service = Service {
            process,
            host: None,
            address,
        };
        service.wait_until_ready()?;
        Ok(service)
    }

    fn gateway(&self, directory: &Path) -> Result<Process> {
        let state = directory.display();
        let configuration = format!(
            "[gateway]\nstate_dir = \"{state}/state\"\ngrace_seconds = 1\n\n\
             [observe]\ninterfaces = [\"{}\", \"{}\"]\nbpffs = \"{}\"\nrequired = true\n\n\
             [[listeners]]\nname = \"shop\"\naddress = \"0.0.0.0:{GATEWAY_PORT}\"\n\n\
             [[upstreams]]\nname = \"commerce\"\npeers = [\"{}\"]\n\n\
             [[routes]]\nname = \"all\"\npath = {{ prefix = \"/\" }}\nupstream = \"commerce\"\n",
            GATEWAY_TO_CLIENT.device,
            GATEWAY_TO_SERVICE.device,
            edgemeter::bpffs().display(),
            Self::service_address(),
        );
        let path = directory.join("edgemeter.toml");
        std::fs::write(&path, configuration)?;
        let mut command = self.hosts.gateway.command(&self.build.edgemeter)?;
        command.args(["run", "--config"]).arg(&path);
        let process = Process::start("edgemeter", &mut command, directory)?;
        let address = (GATEWAY_TO_CLIENT.v4, GATEWAY_PORT).into();
        let ready = self.hosts.client.run(|| wait_for(address, "/readyz"))?;
        ready.with_context(|| process.last_words())?;
        Ok(process)
    }

    fn revenue_minor(&self, service: &Service<'_>) -> Result<u64> {
        let scraped = service.scrape()?;
        let sum = scraped.sum("commerce_revenue_minor_units_total", |_| true);
        Ok(u64::try_from(sum)?)
    }

    /// Proves the database with the product's own command, and returns how many orders it has.
    fn audit(&self, database: &Path) -> Result<u64> {
        let mut command = Command::new(&self.build.commerce);
        let report = host::output(command.args(["audit", "--database"]).arg(database))?;
        report
            .lines()
            .find(|line| line.contains("order_totals"))
            .and_then(|line| line.rsplit_once('('))
            .and_then(|(_, count)| count.split(' ').next()?.parse().ok())
            .with_context(|| format!("the audit counts no orders:\n{report}"))
    }

    /// Milliseconds from the start of the process to its first order's 201, median of five.
    fn start_to_first_order(&self) -> Result<u128> {
        let mut times = Vec::new();
        for round in 0..5 {
            let directory = tempfile::tempdir_in(self.directory.path())?;
            let database = directory.path().join("commerce.db");
            let listen = Self::service_address();
            let mut command = self.hosts.service.command(&self.build.commerce)?;
            command
                .args(["serve", "--listen", &listen.to_string(), "--database"])
                .arg(&database);
            let began = Instant::now();
            let process = Process::start("commerce", &mut command, directory.path())?;
            let plan = Plan {
                address: listen,
                arrivals: Arrivals::Clients(1),
                duration: Duration::from_nanos(1),
                run: format!("s{round}"),
                skus: vec!["1001".to_owned()],
                may_die: false,
            };
            let first = self.hosts.service.run(|| {
                loop {
                    match open_loop::first_order(&plan) {
                        Ok(()) => return Ok(began.elapsed()),
                        Err(error) if began.elapsed() > PATIENCE => return Err(error),
                        Err(_) => std::thread::sleep(Duration::from_micros(500)),
                    }
                }
            })?;
            times.push(first.with_context(|| process.last_words())?);
        }
        times.sort_unstable();
        Ok(times[times.len() / 2].as_millis())
    }

    /// SIGKILL in the middle of the load; then every acknowledged order must be there, and the
    /// audit must be clean.
    fn kill_under_load(&self, rate: u64) -> Result<String> {
        println!("kill -9 under load …");
        let directory = tempfile::tempdir_in(self.directory.path())?;
        let service = self.serve(directory.path(), &[])?;
        let plan = Plan {
            address: Self::service_address(),
            arrivals: Arrivals::Rate {
                per_second: rate,
                connections: CONNECTIONS,
            },
            duration: Duration::from_secs(5),
            run: "k".to_owned(),
            skus: vec!["1001".to_owned()],
            may_die: true,
        };
        let pid = i32::try_from(service.process.pid())?;
        let outcome = std::thread::scope(|scope| {
            let load = scope.spawn(|| self.hosts.gateway.run(|| open_loop::run(&plan)));
            std::thread::sleep(Duration::from_secs(2));
            // SAFETY: two integers; the process is our child and has not been waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            load.join()
        });
        let outcome = outcome.map_err(|_| anyhow::anyhow!("the load panicked"))???;
        drop(service);
        let orders = self.audit(&directory.path().join("commerce.db"))?;
        ensure!(outcome.created > 0, "nothing was ordered before the kill");
        ensure!(
            orders >= outcome.created,
            "{} orders acknowledged, {orders} in the database",
            outcome.created
        );
        Ok(format!(
            "kill -9 after 2 s of load: {} orders acknowledged, {orders} in the database, audit clean",
            outcome.created
        ))
    }
}

fn gateway_is(through: Through) -> bool {
    through == Through::Gateway
}

/// A running order service.
struct Service<'h> {
    process: Process,
    /// The host it runs on; none for this one.
    host: Option<&'h Namespace>,
    address: SocketAddr,
}

impl Service<'_> {
    fn wait_until_ready(&self) -> Result<()> {
        let ready = match self.host {
            Some(host) => host.run(|| wait_for(self.address, "/readyz"))?,
            None => wait_for(self.address, "/readyz"),
        };
        ready.with_context(|| self.process.last_words())
    }

    fn scrape(&self) -> Result<Exposition> {
        match self.host {
            Some(host) => host.run(|| exposition::scrape(self.address))?,
            None => exposition::scrape(self.address),
        }
    }
}

fn wait_for(address: SocketAddr, path: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        match exposition::get(address, path) {
            Ok((200, _)) => return Ok(()),
            outcome if began.elapsed() > PATIENCE => {
                let (status, body) = outcome?;
                anyhow::bail!("{path} answered {status}: {body}");
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
