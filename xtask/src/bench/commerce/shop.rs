//! The shop that is measured: its hosts, its servers, and one case after the other.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::apart::Reading;
use super::{CONNECTIONS, Row};
use crate::bench::edgemeter;
use crate::bench::open_loop::{self, Arrivals, Plan};
use crate::bench::site::Process;
use crate::exposition::{self, Exposition};
use crate::host;
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Namespace, Topology};
use crate::server::{Postgres, Redis};

const PREFIX: &str = "em-shop";
const SERVICE_PORT: u16 = 9000;
const GATEWAY_PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the executables are.
pub(super) struct Build {
    commerce: PathBuf,
    edgemeter: PathBuf,
}

impl Build {
    /// Builds both in one go, so that they share their dependencies. With `built`, takes what an
    /// earlier run left.
    pub(super) fn make(dev: bool, built: bool) -> Result<Self> {
        let mut cargo = host::cargo();
        cargo.args(["build", "--locked", "--bins"]);
        cargo.args(["--package", "commerce", "--package", "edgemeter"]);
        let directory = if dev {
            "debug"
        } else {
            cargo.arg("--release");
            "release"
        };
        if !built {
            host::run(&mut cargo)?;
        }
        let directory = host::target_directory().join(directory);
        let build = Self {
            commerce: directory.join("commerce"),
            edgemeter: directory.join("edgemeter"),
        };
        for file in [&build.commerce, &build.edgemeter] {
            ensure!(file.exists(), "{} is not built", file.display());
        }
        Ok(build)
    }
}

/// Which way orders take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Through {
    Direct,
    Gateway,
}

impl Through {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Gateway => "through the gateway",
        }
    }
}

/// Where orders are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ledger {
    Sqlite,
    Distributed,
}

/// The hosts, and a directory on a real disk for databases.
pub(super) struct Shop {
    hosts: Topology,
    directory: tempfile::TempDir,
    build: Build,
}

impl Shop {
    pub(super) fn open(build: Build) -> Result<Self> {
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

    /// The store without HTTP, by the product's own command.
    pub(super) fn storage(&self, seconds: u64) -> Result<String> {
        let database = self.directory.path().join("rehearsal.db");
        let mut command = Command::new(&self.build.commerce);
        command.args(["rehearse", "--seconds", &seconds.to_string()]);
        host::output(command.arg("--database").arg(database))
    }

    /// One case on a fresh database, audited afterwards.
    pub(super) fn case(
        &self,
        name: &str,
        through: Through,
        ledger: Ledger,
        arrivals: Arrivals,
        (warm_up, duration): (Duration, Duration),
        skus: u32,
    ) -> Result<Row> {
        println!("{name} …");
        // The disk must not still be busy with the case before.
        host::run(&mut Command::new("sync"))?;
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
            duration: warm_up + duration,
            warm_up,
            run: format!("b{}", std::process::id()),
            skus: (1001..1001 + skus).map(|sku| sku.to_string()).collect(),
            may_die: false,
        };
        let pids = (service.process.pid(), gateway.as_ref().map(Process::pid));
        let read = || Reading::take(service.scrape()?, pids.0, pids.1);
        let load = || match (through, ledger) {
            (Through::Gateway, _) => self.hosts.client.run(|| open_loop::run(&plan))?,
            // The cable between gateway and service, without the gateway.
            (Through::Direct, Ledger::Sqlite) => {
                self.hosts.gateway.run(|| open_loop::run(&plan))?
            }
            (Through::Direct, Ledger::Distributed) => open_loop::run(&plan),
        };
        let (outcome, before) = std::thread::scope(|scope| {
            let warm = scope.spawn(|| {
                std::thread::sleep(warm_up);
                read()
            });
            (load(), warm.join())
        });
        let outcome = outcome?;
        let before = before.map_err(|_| anyhow::anyhow!("reading the counters panicked"))??;
        let after = read()?;
        let revenue_minor = after.revenue_minor().saturating_sub(before.revenue_minor());
        let apart = after.since(&before, outcome.took)?;
        drop(gateway);
        if through == Through::Gateway {
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
            apart,
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
    pub(super) fn start_to_first_order(&self) -> Result<u128> {
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
                warm_up: Duration::ZERO,
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
    pub(super) fn kill_under_load(&self, rate: u64) -> Result<String> {
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
            warm_up: Duration::ZERO,
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
