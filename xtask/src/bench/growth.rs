//! `cargo xtask bench growth`: what a request costs as the gateway grows — routes, peers,
//! connections, tenants — and what a scrape of its metrics costs.
//!
//! One worker, all telemetry on, the same 1 KiB requests on 64 connections at every step. A cost
//! that follows the size shows as a line that rises.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use plotters::prelude::*;

use super::site::{Process, Site};
use super::{accounting, edgemeter, load, machine, peers, results};
use crate::exposition;
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE};

const ADMIN: &str = "127.0.0.1:9901";
const CONNECTIONS: u32 = 64;
/// A configuration of 100,000 routes is read and arranged first.
const PATIENCE: Duration = Duration::from_secs(120);
/// Descriptors that are not connections.
const OTHER_DESCRIPTORS: u64 = 2_000;

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Three rounds of 3 s instead of one of 2 s.
    #[arg(long)]
    full: bool,
    /// Only the axes whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Measure this edgemeter instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    Routes,
    Peers,
    IdleConnections,
    Tenants,
}

impl Axis {
    const ALL: [Self; 4] = [
        Self::Routes,
        Self::Peers,
        Self::IdleConnections,
        Self::Tenants,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Routes => "routes",
            Self::Peers => "peers of one upstream",
            Self::IdleConnections => "idle connections",
            Self::Tenants => "tenants",
        }
    }

    fn steps(self) -> &'static [u32] {
        match self {
            Self::Routes => &[10, 100, 1_000, 10_000, 100_000],
            Self::Peers => &[1, 10, 100, 1_000],
            Self::IdleConnections => &[100, 1_000, 10_000, 50_000],
            Self::Tenants => &[1, 10, 100, 1_000, 4_000],
        }
    }
}

/// One size.
#[derive(Clone, Copy, Debug)]
struct Point {
    size: u32,
    /// The gateway's CPU time a request.
    cpu_ns: u64,
    p99_us: u64,
    /// From its start to its first answer.
    start: Duration,
    resident_kib: u64,
    scrape: Duration,
    scrape_bytes: usize,
}

/// Runs it, prints the tables and draws the plot.
///
/// # Errors
/// The gateway does not start, or an answer was wrong.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench growth")?;
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::TC,
        Tool::ETHTOOL,
        Tool::NGINX,
        Tool::WRK,
    ])?;
    host::mount_bpffs()?;
    let binary = edgemeter::build_or(options.binary.as_deref())?;
    let (rounds, seconds) = if options.full { (3, 3) } else { (1, 2) };
    let own = edgemeter::version()?;
    let heading = format!(
        "{}; edgemeter {own}, one worker, all telemetry on; {rounds} rounds of {seconds} s, 1 KiB on \
         {CONNECTIONS} connections",
        machine()
    );
    println!("{heading}\n");
    let site = Site::start(binary, Some(Site::CONGESTION_CONTROL))?;
    // Every address of this network is the origin's.
    let origin = GATEWAY_TO_SERVICE.far_v4.to_string();
    let service = &site.hosts.service;
    service.ip(&["route", "add", "local", "10.98.0.0/16", "dev", "lo"])?;
    let gateway = &site.hosts.gateway;
    gateway.ip(&["route", "add", "10.98.0.0/16", "via", &origin])?;
    // A client port for each idle connection.
    let ports = "/proc/sys/net/ipv4/ip_local_port_range";
    let client = &site.hosts.client;
    client
        .run(|| fs::write(ports, "1024 65535"))?
        .context(ports)?;
    let wanted = |axis: &Axis| {
        let only = options.only.as_deref();
        only.is_none_or(|only| axis.name().contains(only))
    };
    let mut axes = Vec::new();
    for axis in Axis::ALL.into_iter().filter(wanted) {
        let mut points = Vec::new();
        for &size in axis.steps() {
            let size = if axis == Axis::IdleConnections {
                size.min(connections_max()?)
            } else {
                size
            };
            let measured = measure(&site, axis, size, rounds, seconds);
            edgemeter::detach();
            let point = measured.with_context(|| format!("{size} {}", axis.name()))?;
            println!("{size} {}: {} ns a request", axis.name(), point.cpu_ns);
            points.push(point);
        }
        axes.push((axis, points));
    }
    let text = render(&heading, &axes)?;
    println!("\n{text}");
    println!("written to {}", results("growth.md", &text)?.display());
    let plot = draw(&axes)?;
    println!("written to {}", results("growth.svg", &plot)?.display());
    Ok(())
}

/// As many as client and gateway may have descriptors for: a request of the idle clients' takes
/// one connection to the origin at a time.
fn connections_max() -> Result<u32> {
    let limits = fs::read_to_string("/proc/self/limits").context("reading /proc/self/limits")?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let most: u64 = line
        .and_then(|line| line.split_whitespace().nth(4)?.parse().ok())
        .context("how many files may be open")?;
    Ok(u32::try_from(most.saturating_sub(OTHER_DESCRIPTORS)).unwrap_or(u32::MAX))
}

fn measure(site: &Site, axis: Axis, size: u32, rounds: usize, seconds: u64) -> Result<Point> {
    let directory = site.directory.path();
    let file = directory.join("growth.toml");
    fs::write(&file, configuration(site, axis, size)?)?;
    let mut command = site.hosts.gateway.command("taskset")?;
    command.args(["-c", "0"]).arg(&site.edgemeter);
    command.args(["run", "--config"]).arg(&file);
    let spawned = Instant::now();
    let process = Process::start("edgemeter-growth", &mut command, directory)?;
    let admin: SocketAddr = ADMIN.parse()?;
    let ready = || site.hosts.gateway.run(|| exposition::get(admin, "/readyz"));
    while !matches!(ready()?, Ok((200, _))) {
        anyhow::ensure!(spawned.elapsed() < PATIENCE, "{}", process.last_words());
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = spawned.elapsed();
    // The last one in the file.
    let last = (axis == Axis::Routes).then(|| format!("Host: h{}.example", size - 1));
    let lines: Vec<String> = match axis {
        Axis::Routes => last.into_iter().collect(),
        Axis::Tenants => vec![format!("X-Tenant: t{}", size - 1)],
        Axis::Peers | Axis::IdleConnections => Vec::new(),
    };
    if axis == Axis::Tenants {
        load::each_tenant(site, size).context("asking for every tenant")?;
    }
    let work = || -> Result<Point> {
        load::wrk_with(site, &lines, "1k", CONNECTIONS, seconds)?;
        let mut samples = Vec::new();
        for _ in 0..rounds {
            let before = accounting::cpu_ns(process.pid())?;
            let outcome = load::wrk_with(site, &lines, "1k", CONNECTIONS, seconds)?;
            let spent = accounting::cpu_ns(process.pid())? - before;
            anyhow::ensure!(outcome.requests > 0, "no request was answered");
            samples.push((spent / outcome.requests, outcome.p99_us));
        }
        samples.sort_unstable();
        let (cpu_ns, p99_us) = samples[samples.len() / 2];
        let asked = Instant::now();
        let (status, page) = site
            .hosts
            .gateway
            .run(|| exposition::get_within(PATIENCE, admin, "/metrics"))??;
        anyhow::ensure!(status == 200, "/metrics answered {status}");
        Ok(Point {
            size,
            cpu_ns,
            p99_us,
            start,
            resident_kib: accounting::resident_kib(process.pid()),
            scrape: asked.elapsed(),
            scrape_bytes: page.len(),
        })
    };
    let measured = if axis == Axis::IdleConnections {
        let [measured] = load::while_idle(site, false, [size], work)?;
        measured
    } else {
        work()
    };
    measured.with_context(|| process.last_words())
}

fn configuration(site: &Site, axis: Axis, size: u32) -> Result<String> {
    let state = site.directory.path().join(format!("growth-{size}"));
    let mut text = format!(
        "[gateway]\nstate_dir = \"{}\"\nthreads = 1\ngrace_seconds = 1\n\n\
         [admin]\nlisten = \"{ADMIN}\"\n\n\
         [observe]\ninterfaces = [\"{}\", \"{}\"]\nbpffs = \"{}\"\nrequired = true\n\
         connections_max = 65536\naccounts_max = 1048576\n\n\
         [access_log]\npath = \"{}\"\n\n\
         [[listeners]]\nname = \"plain\"\naddress = \"0.0.0.0:{}\"\n\
         limits = {{ idle_timeout_ms = 600000, connections_max = 65536 }}\n\n\
         [[upstreams]]\nname = \"origin\"\npeers = [",
        state.display(),
        GATEWAY_TO_CLIENT.device,
        GATEWAY_TO_SERVICE.device,
        edgemeter::bpffs().display(),
        state.with_extension("jsonl").display(),
        peers::port::PLAIN,
    );
    let port = Site::origin().port();
    if axis == Axis::Peers {
        for peer in 0..size {
            write!(text, "\"10.98.{}.{}:{port}\", ", peer / 250, peer % 250 + 1)?;
        }
    } else {
        write!(text, "\"{}\"", Site::origin())?;
    }
    text.push_str("]\n\n");
    let routes = if axis == Axis::Routes { size } else { 1 };
    for route in 0..routes {
        write!(
            text,
            "[[routes]]\nname = \"r{route}\"\nupstream = \"origin\"\n"
        )?;
        match axis {
            // Half by host, half by host and path: each is a look-up of its own.
            Axis::Routes if route % 2 == 1 => {
                write!(text, "hosts = [\"h{route}.example\"]\npath = {{ prefix = \"/\" }}\n\n")?;
            }
            Axis::Routes => {
                write!(text, "path = {{ prefix = \"/p{route}/items\" }}\n\n")?;
            }
            Axis::Tenants => text.push_str(
                "path = { prefix = \"/\" }\ntenant = { header = \"x-tenant\", default = \"none\" }\n\n",
            ),
            Axis::Peers | Axis::IdleConnections => text.push_str("path = { prefix = \"/\" }\n\n"),
        }
    }
    Ok(text)
}

fn render(heading: &str, axes: &[(Axis, Vec<Point>)]) -> Result<String> {
    let mut text = format!("{heading}\n");
    for (axis, points) in axes {
        write!(
            text,
            "\n| {} | CPU a request, µs | p99, µs | start, ms | resident, MiB | scrape, ms | scrape, KiB |\n\
             |-|-|-|-|-|-|-|\n",
            axis.name()
        )?;
        for point in points {
            writeln!(
                text,
                "| {} | {}.{:02} | {} | {} | {} | {}.{} | {} |",
                point.size,
                point.cpu_ns / 1000,
                point.cpu_ns % 1000 / 10,
                point.p99_us,
                point.start.as_millis(),
                point.resident_kib / 1024,
                point.scrape.as_micros() / 1000,
                point.scrape.as_micros() % 1000 / 100,
                point.scrape_bytes / 1024,
            )?;
        }
    }
    Ok(text)
}

/// CPU a request over size, both axes logarithmic: a cost that follows the size is a slope.
fn draw(axes: &[(Axis, Vec<Point>)]) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (760, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("CPU a request, by what grows", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(60)
            .build_cartesian_2d(
                (1_u64..200_000).log_scale(),
                (1_000_u64..1_000_000).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc("how many")
            .y_desc("µs")
            .y_label_formatter(&|ns| format!("{}", ns / 1000))
            .draw()?;
        for ((axis, points), color) in axes.iter().zip([BLUE, RED, GREEN, MAGENTA]) {
            let line = points
                .iter()
                .map(|point| (u64::from(point.size), point.cpu_ns));
            chart
                .draw_series(LineSeries::new(line.clone(), color.stroke_width(2)).point_size(3))?
                .label(axis.name())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE)
            .border_style(BLACK)
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}
