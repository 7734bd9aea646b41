//! `cargo xtask bench upstreams`: what one bad backend among three costs clients.
//!
//! Three nginx behind one edgemeter, all in namespaces, under calls at a fixed rate:
//!
//! - *one loses packets*, both ways: least request alone, and with what the kernel sees of each
//!   backend, in turns;
//! - *one dies*: its process is killed, or every packet to and from it vanishes;
//! - *a weighted shift* from 5 to 100 % by a reload.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::net::TcpStream;

use super::load::get_1k;
use super::site::{Process, Site, origin};
use super::{edgemeter, machine, peers, results};
use crate::exposition::{self, Exposition};
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Namespace};

/// Calls a second, over so many connections: a call that waits for a retransmit delays few others.
const RATE: u64 = 1_500;
const CONNECTIONS: u32 = 300;
/// The backends' ports; the first is the bad one.
const PORTS: [u16; 3] = [9100, 9101, 9102];
/// Of the packets to and from the bad one, in a thousand.
const LOST_PER_MILLE: u32 = 30;
/// Where the gateway is asked.
const ADMIN: &str = "127.0.0.1:9901";

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Five rounds of 20 s instead of three of 8 s.
    #[arg(long)]
    full: bool,
    /// Measure this edgemeter instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// Runs it and prints the tables.
///
/// # Errors
/// Something does not start, or a call that could have been answered was not.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench upstreams")?;
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::ETHTOOL,
        Tool::NGINX,
        Tool::NFT,
    ])?;
    host::mount_bpffs()?;
    let binary = edgemeter::build_or(options.binary.as_deref())?;
    let (rounds, seconds) = if options.full { (5, 20) } else { (3, 8) };
    let heading = format!(
        "cargo xtask bench upstreams{}: {}; {RATE} calls/s on {CONNECTIONS} connections, 1 KiB answers, edgemeter {}",
        if options.full { " --full" } else { "" },
        machine(),
        edgemeter::version()?,
    );
    println!("{heading}\n");
    let site = Site::start(binary, None)?;
    let mut backends: Vec<Process> = PORTS
        .iter()
        .map(|&port| backend(&site, port))
        .collect::<Result<_>>()?;
    let mut text = format!("{heading}\n\n");
    text += &lossy(&site, rounds, Duration::from_secs(seconds))?;
    text += &dead(&site, &mut backends)?;
    text += &shift(&site)?;
    println!("\n{text}");
    println!("written to {}", results("upstreams.md", &text)?.display());
    Ok(())
}

fn backend(site: &Site, port: u16) -> Result<Process> {
    let name = format!("backend-{port}");
    let file = site.directory.path().join(format!("{name}.conf"));
    fs::write(&file, origin(site.directory.path(), port))?;
    let mut nginx = site.hosts.service.command("taskset")?;
    nginx.args(["-c", "1", "nginx", "-c"]).arg(&file);
    Process::start(&name, &mut nginx, site.directory.path())
}

/// One backend loses packets: the same load with and without the kernel's view, in turns.
fn lossy(site: &Site, rounds: usize, duration: Duration) -> Result<String> {
    let mut all: [Calls; 2] = Default::default();
    let mut shares: [Vec<u64>; 2] = Default::default();
    for round in 1..=rounds {
        for (index, informed) in [false, true].into_iter().enumerate() {
            let gateway = Gateway::start(site, &one_upstream(informed))?;
            let loss = Loss::start(site, PORTS[0], LOST_PER_MILLE)?;
            // The verdict needs a few looks; both have the same time to settle.
            calls(&site.hosts.client, duration / 2)?;
            let before = gateway.picks(site)?;
            let mut measured = calls(&site.hosts.client, duration)?;
            let after = gateway.picks(site)?;
            drop(loss);
            ensure!(measured.failed.is_empty(), "{:?}", measured.failed);
            all[index].times_us.append(&mut measured.times_us);
            shares[index].push(share_of_bad(&before, &after));
            println!(
                "round {round} of {rounds}: kernel_informed = {informed}, {} in a thousand to the lossy backend",
                shares[index][round - 1]
            );
        }
    }
    let mut text = format!(
        "One of three backends loses {}.{} % of its packets both ways; {rounds} alternated rounds of {} s:\n\n\
         | balance | calls | p50, µs | p99, µs | p99.9, µs | worst, µs | share of the lossy backend |\n|-|-|-|-|-|-|-|\n",
        LOST_PER_MILLE / 10,
        LOST_PER_MILLE % 10,
        duration.as_secs(),
    );
    for (index, name) in ["least request", "kernel-informed"].into_iter().enumerate() {
        let calls = &mut all[index];
        calls.times_us.sort_unstable();
        let share = shares[index].iter().sum::<u64>() / u64::try_from(rounds)?;
        writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} | {}.{} % |",
            calls.times_us.len(),
            calls.at(500),
            calls.at(990),
            calls.at(999),
            calls.at(1000),
            share / 10,
            share % 10,
        )?;
    }
    text.push('\n');
    Ok(text)
}

/// One backend dies in two ways; what clients see of it, and for how long.
fn dead(site: &Site, backends: &mut Vec<Process>) -> Result<String> {
    let mut text = String::from(
        "One of three backends dies under load:\n\n\
         | death | calls | 5xx or broken | window of them, ms | calls slower than 500 ms | window of them, ms | worst, ms |\n|-|-|-|-|-|-|-|\n",
    );
    for vanishes in [false, true] {
        let gateway = Gateway::start(site, &one_upstream(true))?;
        let (measured, loss) = std::thread::scope(|scope| {
            let load = scope.spawn(|| calls(&site.hosts.client, Duration::from_secs(16)));
            std::thread::sleep(Duration::from_secs(4));
            let loss = if vanishes {
                Some(Loss::start(site, PORTS[0], 1000)?)
            } else {
                drop(backends.remove(0));
                None
            };
            let measured = load
                .join()
                .map_err(|_| anyhow::anyhow!("the load panicked"))??;
            anyhow::Ok((measured, loss))
        })?;
        drop(loss);
        drop(gateway);
        if !vanishes {
            backends.insert(0, backend(site, PORTS[0])?);
        }
        let slow: Vec<u64> = measured.slow.iter().map(|&(at, _)| at).collect();
        let failed: Vec<u64> = measured.failed.iter().map(|(at, _)| *at).collect();
        let worst = measured.times_us.iter().max().copied().unwrap_or_default();
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            if vanishes {
                "every packet vanishes"
            } else {
                "the process is killed"
            },
            measured.times_us.len() + failed.len(),
            failed.len(),
            window_ms(&failed),
            slow.len(),
            window_ms(&slow),
            worst / 1000,
        )?;
        println!("{}", text.lines().last().unwrap_or_default());
        if let Some((_, why)) = measured.failed.first() {
            println!("the first failure: {why}");
        }
    }
    text.push('\n');
    Ok(text)
}

/// From 5 % to everything, by a reload under load.
fn shift(site: &Site) -> Result<String> {
    let configuration = |old: u32, new: u32| {
        let mut text = head();
        for (name, port) in [("old", PORTS[1]), ("new", PORTS[2])] {
            text += &upstream(name, &[port], true);
        }
        text + &format!(
            "[[routes]]\nname = \"all\"\npath = {{ prefix = \"/\" }}\n\
             backends = [{{ upstream = \"old\", weight = {old} }}, {{ upstream = \"new\", weight = {new} }}]\n"
        )
    };
    let gateway = Gateway::start(site, &configuration(95, 5))?;
    let (took, late, measured) = std::thread::scope(|scope| {
        let load = scope.spawn(|| calls(&site.hosts.client, Duration::from_secs(6)));
        std::thread::sleep(Duration::from_secs(3));
        fs::write(&gateway.file, configuration(0, 100))?;
        let began = Instant::now();
        let mut reload = site.hosts.gateway.command(&site.edgemeter)?;
        host::run(reload.args(["reload", "--config"]).arg(&gateway.file))?;
        // Requests already under way end where they are.
        let mut before = gateway.picks(site)?;
        let took = loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = gateway.picks(site)?;
            let at = began.elapsed();
            if now.get(&PORTS[1]) == before.get(&PORTS[1]) {
                break at;
            }
            before = now;
        };
        std::thread::sleep(Duration::from_secs(1));
        let after = gateway.picks(site)?;
        let of = |picks: &BTreeMap<u16, u64>| picks.get(&PORTS[1]).copied().unwrap_or_default();
        let measured = load
            .join()
            .map_err(|_| anyhow::anyhow!("the load panicked"))??;
        anyhow::Ok((took, of(&after) - of(&before), measured))
    })?;
    ensure!(late == 0, "{late} requests still went to the old backend");
    Ok(format!(
        "A weighted shift from 5 to 100 % by a reload under load: the last request went to the old backend less than {} ms\n\
         after the reload was asked for; of {} calls {} failed.\n",
        took.as_millis(),
        measured.times_us.len() + measured.failed.len(),
        measured.failed.len(),
    ))
}

fn head() -> String {
    format!(
        "[gateway]\nstate_dir = \"state\"\nthreads = 1\ngrace_seconds = 1\n\n\
         [admin]\nlisten = \"{ADMIN}\"\n\n\
         [observe]\ninterfaces = [\"{}\", \"{}\"]\nbpffs = \"{}\"\nrequired = true\n\n\
         [[listeners]]\nname = \"plain\"\naddress = \"0.0.0.0:{}\"\n\n",
        GATEWAY_TO_CLIENT.device,
        GATEWAY_TO_SERVICE.device,
        edgemeter::bpffs().display(),
        peers::port::PLAIN,
    )
}

fn upstream(name: &str, ports: &[u16], informed: bool) -> String {
    let addresses: Vec<String> = ports
        .iter()
        .map(|port| format!("\"{}:{port}\"", GATEWAY_TO_SERVICE.far_v4))
        .collect();
    format!(
        "[[upstreams]]\nname = \"{name}\"\npeers = [{}]\nkernel_informed = {informed}\nretries = 2\n\
         connect_timeout_ms = 500\ncheck = {{ path = \"/1k\", interval_ms = 500, timeout_ms = 500 }}\n\n",
        addresses.join(", ")
    )
}

fn one_upstream(informed: bool) -> String {
    head()
        + &upstream("three", &PORTS, informed)
        + "[[routes]]\nname = \"all\"\npath = { prefix = \"/\" }\nupstream = \"three\"\ntry_timeout_ms = 1000\n"
}

/// edgemeter with a configuration of this bench.
struct Gateway {
    process: Process,
    file: PathBuf,
}

impl Gateway {
    fn start(site: &Site, configuration: &str) -> Result<Self> {
        let directory = site.directory.path().join("edgemeter");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        let file = directory.join("edgemeter.toml");
        fs::write(&file, configuration)?;
        let mut command = site.hosts.gateway.command("taskset")?;
        command.args(["-c", "0"]).arg(&site.edgemeter);
        command.args(["run", "--config"]).arg(&file);
        let process = Process::start("edgemeter", &mut command, &directory)?;
        let address = (GATEWAY_TO_CLIENT.v4, peers::port::PLAIN).into();
        super::load::await_answer(&site.hosts.client, address, Duration::from_secs(30))
            .with_context(|| process.last_words())?;
        Ok(Self { process, file })
    }

    /// Requests each backend was picked for, by port.
    fn picks(&self, site: &Site) -> Result<BTreeMap<u16, u64>> {
        let admin: SocketAddr = ADMIN.parse()?;
        let (_, text) = site
            .hosts
            .gateway
            .run(|| exposition::get(admin, "/metrics"))?
            .with_context(|| self.process.last_words())?;
        let page = Exposition::parse(&text)?;
        let picks = PORTS.map(|port| {
            let suffix = format!(":{port}");
            let sum = page.sum("edgemeter_peer_picks_total", |sample| {
                sample.label("peer").ends_with(&suffix)
            });
            (port, u64::try_from(sum).unwrap_or_default())
        });
        Ok(picks.into())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        edgemeter::detach();
    }
}

/// In a thousand.
fn share_of_bad(before: &BTreeMap<u16, u64>, after: &BTreeMap<u16, u64>) -> u64 {
    let made = |port: &u16| after.get(port).unwrap_or(&0) - before.get(port).unwrap_or(&0);
    let all: u64 = PORTS.iter().map(made).sum();
    made(&PORTS[0]) * 1000 / all.max(1)
}

/// Packets to and from a port of the service vanish at random, until dropped.
struct Loss<'s> {
    site: &'s Site,
}

impl<'s> Loss<'s> {
    fn start(site: &'s Site, port: u16, per_mille: u32) -> Result<Self> {
        let loss = Self { site };
        // At the receiving ends, so that neither sender's kernel knows of it.
        nft(&site.hosts.service, &rule("dport", port, per_mille))?;
        nft(&site.hosts.gateway, &rule("sport", port, per_mille))?;
        Ok(loss)
    }
}

impl Drop for Loss<'_> {
    fn drop(&mut self) {
        for host in [&self.site.hosts.service, &self.site.hosts.gateway] {
            let _ = nft(host, "delete table inet loss\n");
        }
    }
}

fn rule(side: &str, port: u16, per_mille: u32) -> String {
    // nft refuses a comparison that always holds.
    let which = if per_mille < 1000 {
        format!("numgen random mod 1000 < {per_mille}")
    } else {
        String::new()
    };
    format!(
        "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
         tcp {side} {port} {which} drop\n }}\n}}\n"
    )
}

fn nft(host: &Namespace, rules: &str) -> Result<()> {
    let mut nft = host.command("nft")?;
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    nft.stdin
        .take()
        .context("nft has no input")?
        .write_all(rules.as_bytes())?;
    ensure!(nft.wait()?.success(), "nft refused {rules}");
    Ok(())
}

/// What clients saw. Times count from when a call was due.
#[derive(Debug, Default)]
struct Calls {
    times_us: Vec<u64>,
    /// Slower than half a second: when it was due, ms since the start, and how slow, µs.
    slow: Vec<(u64, u64)>,
    /// Not answered with 200: when it was due, ms since the start, and why.
    failed: Vec<(u64, String)>,
}

impl Calls {
    /// Of sorted times.
    fn at(&self, per_mille: usize) -> u64 {
        let last = self.times_us.len().saturating_sub(1);
        self.times_us
            .get(last * per_mille / 1000)
            .copied()
            .unwrap_or_default()
    }
}

fn window_ms(at: &[u64]) -> u64 {
    at.iter().max().unwrap_or(&0) - at.iter().min().unwrap_or(&0)
}

/// Calls at a fixed rate whatever the answers do; a broken connection is made anew.
fn calls(host: &Namespace, duration: Duration) -> Result<Calls> {
    let address: SocketAddr = (GATEWAY_TO_CLIENT.v4, peers::port::PLAIN).into();
    host.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async move {
            let period = Duration::from_nanos(1_000_000_000 * u64::from(CONNECTIONS) / RATE);
            let began = Instant::now();
            let mut workers = tokio::task::JoinSet::new();
            for number in 0..CONNECTIONS {
                workers.spawn(async move {
                    let mut due = began + period * number / CONNECTIONS;
                    let mut seen = Calls::default();
                    let mut kept: Option<TcpStream> = None;
                    let mut answer = Vec::with_capacity(4096);
                    while due < began + duration {
                        tokio::time::sleep_until(due.into()).await;
                        let asked = async {
                            let mut stream = match kept.take() {
                                Some(stream) => stream,
                                None => TcpStream::connect(address).await?,
                            };
                            stream.set_nodelay(true)?;
                            get_1k(&mut stream, &mut answer, "keep-alive").await?;
                            anyhow::Ok(stream)
                        };
                        let at = u64::try_from((due - began).as_millis())?;
                        match asked.await {
                            Ok(stream) => {
                                kept = Some(stream);
                                let took = u64::try_from(due.elapsed().as_micros())?;
                                seen.times_us.push(took);
                                if took > 500_000 {
                                    seen.slow.push((at, took));
                                }
                            }
                            Err(error) => seen.failed.push((at, format!("{error:#}"))),
                        }
                        due += period;
                    }
                    anyhow::Ok(seen)
                });
            }
            let mut all = Calls::default();
            while let Some(worker) = workers.join_next().await {
                let mut seen = worker??;
                all.times_us.append(&mut seen.times_us);
                all.slow.append(&mut seen.slow);
                all.failed.append(&mut seen.failed);
            }
            ensure!(!all.times_us.is_empty(), "no call was answered");
            Ok(all)
        })
    })?
}
