//! `cargo xtask bench proxy`: the same work through every peer, in alternated rounds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;

use super::peers::Peer;
use super::site::Site;
use super::{accounting, edgemeter, load, machine, results};
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE};

const PATIENCE: Duration = Duration::from_secs(30);
/// Idle connections at the first look and at the second.
/// What any network card does. Without it, as the tests have it so that a capture shows frames, a large
/// body costs every proxy the cutting into frames and little else.
const AS_A_NIC: &str = "tso on gso on gro on";
const IDLE_PLAIN: [u32; 2] = [1000, 5000];
const IDLE_TLS: [u32; 2] = [500, 3500];

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Five longer rounds instead of three short ones (25 minutes instead of 5).
    #[arg(long)]
    full: bool,
    /// Only the cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Only peers whose name contains one of these (nginx is always there: ratios are to it).
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Measure this edgemeter instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Congestion control of all three hosts, for all peers.
    #[arg(long, default_value = Site::CONGESTION_CONTROL)]
    congestion_control: String,
}

/// One kind of work.
struct Case {
    name: &'static str,
    run: fn(&Site, u64) -> Result<load::Outcome>,
}

const CASES: [Case; 9] = [
    Case {
        name: "1 KiB, HTTP/1.1, 64 connections",
        run: |site, seconds| load::wrk(site, false, "1k", 64, seconds),
    },
    Case {
        name: "64 KiB",
        run: |site, seconds| load::wrk(site, false, "64k", 64, seconds),
    },
    Case {
        name: "1 MiB",
        run: |site, seconds| load::wrk(site, false, "1m", 16, seconds),
    },
    Case {
        name: "TLS 1.3, 1 KiB",
        run: |site, seconds| load::wrk(site, true, "1k", 64, seconds),
    },
    Case {
        name: "TLS 1.3, 1 MiB",
        run: |site, seconds| load::wrk(site, true, "1m", 16, seconds),
    },
    Case {
        name: "new connection, 1 GET",
        run: |site, seconds| load::fresh_connections(site, false, 32, seconds),
    },
    Case {
        name: "new TLS connection, 1 GET",
        run: |site, seconds| load::fresh_connections(site, true, 16, seconds),
    },
    Case {
        name: "h2c, 8x32 streams, 1 KiB",
        run: |site, seconds| load::h2load(site, false, "1k", seconds),
    },
    Case {
        name: "h2 over TLS, 8x32 streams, 1 KiB",
        run: |site, seconds| load::h2load(site, true, "1k", seconds),
    },
];

const PEERS: [Peer; 7] = [
    Peer::Nginx,
    Peer::NginxBigBuffers,
    Peer::Haproxy,
    Peer::HaproxyBigBuffers,
    Peer::Envoy,
    Peer::Edgemeter,
    Peer::EdgemeterBare,
];

/// One peer on one case in one round.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// The proxy's own CPU time a request, nanoseconds.
    cpu_ns: u64,
    /// All processors' busy time a request: client, proxy, origin and the kernel between them.
    machine_ns: u64,
    outcome: load::Outcome,
}

/// What does not depend on a case.
#[derive(Clone, Copy, Debug)]
struct Standing {
    start: Duration,
    idle_plain_bytes: u64,
    idle_tls_bytes: u64,
}

/// Runs it all and prints the tables.
///
/// # Errors
/// A peer is missing or does not start, or an answer was wrong.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench proxy")?;
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::TC,
        Tool::ETHTOOL,
        Tool::NGINX,
        Tool::HAPROXY,
        Tool::WRK,
        Tool::H2LOAD,
    ])?;
    host::mount_bpffs()?;
    let binary = edgemeter::build_or(options.binary.as_deref())?;
    let peers: Vec<Peer> = PEERS
        .into_iter()
        .filter(|peer| {
            let named = |wanted: &String| peer.name().contains(wanted.as_str());
            *peer == Peer::Nginx || options.peers.is_empty() || options.peers.iter().any(named)
        })
        .collect();
    let (rounds, seconds) = if options.full { (5, 5) } else { (3, 1) };
    let cases: Vec<&Case> = CASES
        .iter()
        .filter(|case| {
            options
                .only
                .as_ref()
                .is_none_or(|only| case.name.contains(only))
        })
        .collect();
    let heading = format!(
        "{}; {rounds} rounds of {seconds} s; congestion control {}",
        machine(),
        options.congestion_control,
    );
    println!("{heading}\n");
    let site = Site::start(binary, Some(&options.congestion_control))?;
    for (link, far) in [
        (GATEWAY_TO_CLIENT, &site.hosts.client),
        (GATEWAY_TO_SERVICE, &site.hosts.service),
    ] {
        site.hosts.gateway.offloads(link.device, AS_A_NIC)?;
        far.offloads(link.far_device, AS_A_NIC)?;
    }
    let mut samples: BTreeMap<(usize, usize), Vec<Sample>> = BTreeMap::new();
    let mut standing: Vec<Vec<Standing>> = vec![Vec::new(); peers.len()];
    for round in 0..rounds {
        for (peer_index, peer) in peers.iter().enumerate() {
            let spawned = Instant::now();
            let process = peer.start(&site)?;
            let outcome = measure(&site, &process, spawned, &cases, seconds, options.full);
            let (of_cases, start) =
                outcome.with_context(|| format!("{}: {}", peer.name(), process.last_words()))?;
            drop(process);
            edgemeter::detach();
            // Once, when it is to be quick: thousands of connections are made for it.
            let stands = match standing[peer_index].first() {
                Some(first) if !options.full => Standing { start, ..*first },
                _ => Standing {
                    start,
                    idle_plain_bytes: idle(&site, *peer, false, IDLE_PLAIN)?,
                    idle_tls_bytes: idle(&site, *peer, true, IDLE_TLS)?,
                },
            };
            standing[peer_index].push(stands);
            for (case_index, sample) in of_cases.into_iter().enumerate() {
                samples
                    .entry((case_index, peer_index))
                    .or_default()
                    .push(sample);
            }
            println!("round {} of {rounds}: {}", round + 1, peer.name());
        }
    }
    let text = render(&heading, &peers, &cases, &samples, &standing)?;
    println!("\n{text}");
    println!("written to {}", results("proxy.md", &text)?.display());
    Ok(())
}

fn measure(
    site: &Site,
    process: &super::site::Process,
    spawned: Instant,
    cases: &[&Case],
    seconds: u64,
    full: bool,
) -> Result<(Vec<Sample>, Duration)> {
    let start = load::first_answer(site, spawned, PATIENCE).context("it does not answer")?;
    let pid = process.pid();
    let mut samples = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        // Connections to the origin exist and code is paged in.
        if full || number == 0 {
            (case.run)(site, 1).with_context(|| format!("{}, warming up", case.name))?;
        }
        let mut sample = measure_case(site, pid, case, seconds)?;
        if sample.is_none() {
            // All of the time went into the first connections.
            sample = measure_case(site, pid, case, seconds + 2)?;
        }
        samples.push(sample.with_context(|| format!("{}: no request was answered", case.name))?);
    }
    Ok((samples, start))
}

/// Resident bytes that one idle connection more takes. In a new process: memory that other work
/// needed and gave back would serve these too, and cost nothing. Between two numbers of connections:
/// tables and buffers that are filled once are not the connections'.
fn idle(site: &Site, peer: Peer, tls: bool, counts: [u32; 2]) -> Result<u64> {
    let process = peer.start(site)?;
    let measured = grown_by(site, process.pid(), tls, counts);
    let measured = measured.with_context(|| format!("{}: {}", peer.name(), process.last_words()));
    drop(process);
    edgemeter::detach();
    measured
}

fn grown_by(site: &Site, pid: u32, tls: bool, counts: [u32; 2]) -> Result<u64> {
    load::first_answer(site, Instant::now(), PATIENCE)?;
    let [fewer, more] = load::while_idle(site, tls, counts, || accounting::resident_kib(pid))?;
    let connections = u64::from(counts[1] - counts[0]);
    Ok(more.saturating_sub(fewer) * 1024 / connections)
}

/// None when no request was answered in the time.
fn measure_case(site: &Site, pid: u32, case: &Case, seconds: u64) -> Result<Option<Sample>> {
    let before = (accounting::cpu_ns(pid)?, accounting::machine_ns()?);
    let outcome = (case.run)(site, seconds).context(case.name)?;
    let after = (accounting::cpu_ns(pid)?, accounting::machine_ns()?);
    if outcome.requests == 0 {
        return Ok(None);
    }
    Ok(Some(Sample {
        cpu_ns: (after.0 - before.0) / outcome.requests,
        machine_ns: (after.1 - before.1) / outcome.requests,
        outcome,
    }))
}

fn render(
    heading: &str,
    peers: &[Peer],
    cases: &[&Case],
    samples: &BTreeMap<(usize, usize), Vec<Sample>>,
    standing: &[Vec<Standing>],
) -> Result<String> {
    let mut text = format!("{heading}\n\n");
    for (number, peer) in peers.iter().enumerate() {
        let separator = if number == 0 { "" } else { ", " };
        write!(text, "{separator}{} {}", peer.name(), peer.version()?)?;
    }
    let names: Vec<&str> = peers.iter().map(|peer| peer.name()).collect();
    let names = names.join(" | ");
    let rule = "-|".repeat(peers.len() + 1);
    let of = |case: usize, peer: usize, value: fn(&Sample) -> u64| -> Vec<u64> {
        samples[&(case, peer)].iter().map(value).collect()
    };
    write!(
        text,
        "\n\nCPU of the proxy a request, medians of per-round ratios to nginx (nginx: µs)\n\n\
         | work | {names} |\n|{rule}\n"
    )?;
    for (index, case) in cases.iter().enumerate() {
        write!(text, "| {} |", case.name)?;
        let base = of(index, 0, |sample| sample.cpu_ns);
        write!(text, " {} µs |", thousandths(median(base.clone())))?;
        for peer in 1..peers.len() {
            let ratios = of(index, peer, |sample| sample.cpu_ns)
                .iter()
                .zip(&base)
                .map(|(mine, base)| mine * 100 / (*base).max(1))
                .collect();
            write!(text, " {} |", hundredths(median(ratios)))?;
        }
        text.push('\n');
    }
    write!(
        text,
        "\nBusy time of the whole machine a request, µs (client, proxy, origin, kernel)\n\n\
         | work | {names} |\n|{rule}\n"
    )?;
    for (index, case) in cases.iter().enumerate() {
        write!(text, "| {} |", case.name)?;
        for peer in 0..peers.len() {
            let busy = median(of(index, peer, |sample| sample.machine_ns));
            write!(text, " {} |", thousandths(busy))?;
        }
        text.push('\n');
    }
    write!(
        text,
        "\nRequests a second; p50 / p99 µs, closed loop\n\n| work | {names} |\n|{rule}\n"
    )?;
    for (index, case) in cases.iter().enumerate() {
        write!(text, "| {} |", case.name)?;
        for peer in 0..peers.len() {
            let value = |value: fn(&Sample) -> u64| median(of(index, peer, value));
            let rate = value(|sample| sample.outcome.rate);
            let (p50, p99) = (
                value(|sample| sample.outcome.p50_us),
                value(|sample| sample.outcome.p99_us),
            );
            if p50 == 0 {
                write!(text, " {rate} |")?;
            } else {
                write!(text, " {rate}; {p50} / {p99} |")?;
            }
        }
        text.push('\n');
    }
    write!(text, "\nStanding\n\n| | {names} |\n|{rule}\n")?;
    let mut row = |name: &str, value: fn(&Standing) -> u64| -> Result<()> {
        write!(text, "| {name} |")?;
        for of_peer in standing {
            let middle = median(of_peer.iter().map(value).collect());
            write!(text, " {} |", thousandths(middle))?;
        }
        text.push('\n');
        Ok(())
    };
    row("start to first 200, ms", |standing| {
        u64::try_from(standing.start.as_micros()).unwrap_or(u64::MAX)
    })?;
    row("KiB an idle connection", |standing| {
        standing.idle_plain_bytes * 1000 / 1024
    })?;
    row("KiB an idle TLS connection", |standing| {
        standing.idle_tls_bytes * 1000 / 1024
    })?;
    Ok(text)
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// 1234 as 1.23: what thousandths of a unit are to a reader.
fn thousandths(value: u64) -> String {
    format!("{}.{:02}", value / 1000, value % 1000 / 10)
}

/// 123 as 1.23.
fn hundredths(value: u64) -> String {
    format!("{}.{:02}", value / 100, value % 100)
}
