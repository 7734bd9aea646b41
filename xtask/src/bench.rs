//! `cargo xtask bench`: peers side by side in one run, reported as ratios.
//!
//! A bench is run and read by a person. It asserts that every answer was right, never how long
//! one took: timings belong to the machine and the hour.

mod accounting;
mod commerce;
mod early_hints;
mod edgemeter;
mod growth;
mod kernel;
mod load;
mod open_loop;
mod peers;
mod proxy;
mod relay;
mod sidecar;
mod site;
mod upstreams;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Subcommand;

use crate::host;

/// What to measure.
#[derive(Clone, Debug, Subcommand)]
pub enum Bench {
    /// nginx, HAProxy, Envoy and edgemeter on the same work: CPU a request, latency, memory an
    /// idle connection, start time.
    Proxy(proxy::Options),
    /// A call between two services: direct, observed, through one edgemeter, through two Envoys.
    Sidecar(sidecar::Options),
    /// What a request costs as routes, peers, connections and tenants grow.
    Growth(growth::Options),
    /// What the kernel programs cost a packet, a flow and a second, beside conntrack, softflowd
    /// and pmacctd on the same traffic.
    Kernel(kernel::Options),
    /// The order service: durable orders a second, direct and through the gateway, and what a
    /// kill -9 leaves.
    Commerce(commerce::Options),
    /// The product page in Chromium: first contentful paint with 103 Early Hints, with `Link` on the
    /// answer, and without hints.
    EarlyHints(early_hints::Options),
    /// One bad backend among three: lossy, dead, and shifted away from.
    Upstreams(upstreams::Options),
}

/// Runs one bench.
///
/// # Errors
/// Something it needs is missing, a peer does not start, or an answer was wrong.
pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Proxy(options) => proxy::run(options),
        Bench::Sidecar(options) => sidecar::run(options),
        Bench::Growth(options) => growth::run(options),
        Bench::Kernel(options) => kernel::run(options),
        Bench::Commerce(options) => commerce::run(options),
        Bench::EarlyHints(options) => early_hints::run(options),
        Bench::Upstreams(options) => upstreams::run(options),
    }
}

/// Where results are left, for the README and the docs.
fn results(name: &str, text: &str) -> Result<PathBuf> {
    let directory = host::target_directory().join("bench");
    std::fs::create_dir_all(&directory).context("making target/bench")?;
    let path = directory.join(name);
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// One line on the machine and the hour: a figure without them means nothing.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let date =
        host::output(std::process::Command::new("date").arg("+%Y-%m-%d %H:%M")).unwrap_or_default();
    format!(
        "{cores} cores of {model}, Linux {}, {}, load before the run {}",
        kernel.trim(),
        date.trim(),
        load.split(' ').next().unwrap_or("unknown"),
    )
}
