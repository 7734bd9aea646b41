//! `cargo xtask bench sidecar`: what observation and a hop cost a call, against two sidecars.
//!
//! The same calls over the same cable, in alternated rounds: nothing between client and service;
//! nothing but edgemeter's kernel programs at both ends; one edgemeter hop; two Envoys, in plain
//! text and with mutual TLS. Each costs CPU, latency and wire bytes beyond the direct call.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::site::{Process, Site};
use super::{accounting, edgemeter, load, machine, peers, results};
use crate::capture::FarEnd;
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, Namespace};

/// Where the client's sidecar listens, and where the service's does.
const OUTWARD: u16 = 15_001;
const INWARD: u16 = 15_006;
/// Calls a second at which latency and CPU are compared.
const RATE: u64 = 2_000;
const CONNECTIONS: u32 = 16;
/// Calls whose wire bytes are captured.
const CAPTURED: u64 = 2_000;

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Five rounds of 10 s instead of three of 3 s.
    #[arg(long)]
    full: bool,
    /// Measure this edgemeter instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
}

/// What stands between the client and the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    Nothing,
    KernelOnly,
    OneHop,
    TwoEnvoys,
    TwoEnvoysMutualTls,
}

impl Between {
    const ALL: [Self; 5] = [
        Self::Nothing,
        Self::KernelOnly,
        Self::OneHop,
        Self::TwoEnvoys,
        Self::TwoEnvoysMutualTls,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "direct",
            Self::KernelOnly => "direct, edgemeter observes both ends",
            Self::OneHop => "one edgemeter hop, all telemetry",
            Self::TwoEnvoys => "two Envoys",
            Self::TwoEnvoysMutualTls => "two Envoys, mutual TLS",
        }
    }

    /// Where the client calls.
    fn address(self) -> SocketAddr {
        match self {
            Self::Nothing | Self::KernelOnly => {
                (GATEWAY_TO_CLIENT.v4, Site::LOCAL_ORIGIN_PORT).into()
            }
            Self::OneHop => (GATEWAY_TO_CLIENT.v4, peers::port::PLAIN).into(),
            Self::TwoEnvoys | Self::TwoEnvoysMutualTls => ([127, 0, 0, 1], OUTWARD).into(),
        }
    }

    /// Starts it.
    fn start(self, site: &Site) -> Result<Vec<Process>> {
        match self {
            Self::Nothing => Ok(Vec::new()),
            Self::OneHop => Ok(vec![peers::Peer::Edgemeter.start(site)?]),
            Self::KernelOnly => Ok(vec![
                observer(site, &site.hosts.gateway, GATEWAY_TO_CLIENT.device)?,
                observer(site, &site.hosts.client, GATEWAY_TO_CLIENT.far_device)?,
            ]),
            Self::TwoEnvoys => sidecars(site, false),
            Self::TwoEnvoysMutualTls => sidecars(site, true),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// All processors' busy time a call, nanoseconds.
    busy_ns: u64,
    /// The proxies' and observers' own CPU a call, nanoseconds.
    cpu_ns: u64,
    p50_us: u64,
    p99_us: u64,
    /// On the client's cable, both directions, a call.
    wire_bytes: u64,
}

/// Runs it and prints the table.
///
/// # Errors
/// Something does not start, or an answer was wrong.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench sidecar")?;
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::TC,
        Tool::ETHTOOL,
        Tool::TCPDUMP,
        Tool::NGINX,
    ])?;
    host::mount_bpffs()?;
    let binary = edgemeter::build_or(options.binary.as_deref())?;
    let (rounds, seconds) = if options.full { (5, 10) } else { (3, 3) };
    let heading = format!(
        "{}; {rounds} rounds of {seconds} s at {RATE} calls/s on {CONNECTIONS} connections, 1 KiB answers",
        machine()
    );
    println!("{heading}\n");
    let site = Site::start(binary, Some(Site::CONGESTION_CONTROL))?;
    let mut samples: [Vec<Sample>; Between::ALL.len()] = Default::default();
    for round in 1..=rounds {
        for (index, between) in Between::ALL.into_iter().enumerate() {
            let measured = measure(&site, between, seconds);
            edgemeter::detach();
            samples[index].push(measured.with_context(|| between.name().to_owned())?);
            println!("round {round} of {rounds}: {}", between.name());
        }
    }
    let text = render(&site.edgemeter, &heading, &samples)?;
    println!("\n{text}");
    println!("written to {}", results("sidecar.md", &text)?.display());
    Ok(())
}

fn measure(site: &Site, between: Between, seconds: u64) -> Result<Sample> {
    let processes = between.start(site)?;
    let address = between.address();
    let said = || {
        processes
            .iter()
            .map(Process::last_words)
            .collect::<Vec<_>>()
    };
    load::await_answer(&site.hosts.client, address, Duration::from_secs(30))
        .with_context(|| said().join("\n"))?;
    load::steady(
        &site.hosts.client,
        address,
        RATE,
        CONNECTIONS,
        Duration::from_secs(1),
    )?;
    let cpu = || -> Result<u64> {
        processes.iter().try_fold(0, |sum, process| {
            Ok(sum + accounting::cpu_ns(process.pid())?)
        })
    };
    let before = (cpu()?, accounting::machine_ns()?);
    let duration = Duration::from_secs(seconds);
    let outcome = load::steady(&site.hosts.client, address, RATE, CONNECTIONS, duration)?;
    let after = (cpu()?, accounting::machine_ns()?);
    let capture = FarEnd::start(&site.hosts.client, GATEWAY_TO_CLIENT.far_device)?;
    let captured = load::steady(
        &site.hosts.client,
        address,
        RATE,
        CONNECTIONS,
        Duration::from_millis(CAPTURED * 1000 / RATE),
    )?;
    let wire = capture.stop()?.total().bytes;
    ensure!(captured.requests > 0, "no call was captured");
    Ok(Sample {
        busy_ns: (after.1 - before.1) / outcome.requests,
        cpu_ns: (after.0 - before.0) / outcome.requests,
        p50_us: outcome.p50_us,
        p99_us: outcome.p99_us,
        wire_bytes: wire / captured.requests,
    })
}

fn render(program: &Path, heading: &str, samples: &[Vec<Sample>]) -> Result<String> {
    let envoy = peers::Peer::Envoy.version()?;
    let own = edgemeter::version()?;
    let middle = |of: usize, value: fn(&Sample) -> u64| {
        let mut values: Vec<u64> = samples[of].iter().map(value).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    let mut text = format!(
        "{heading}\n\nEnvoy {envoy}, edgemeter {own}; medians; \"added\" is beyond the direct call\n\n\
         | between client and service | added CPU, µs a call (whole machine) | own CPU, µs a call | \
         p50 / p99, µs | added p50, µs | wire bytes a call | added |\n|-|-|-|-|-|-|-|\n"
    );
    for (index, between) in Between::ALL.into_iter().enumerate() {
        let added = |value: fn(&Sample) -> u64| {
            i128::from(middle(index, value)) - i128::from(middle(0, value))
        };
        writeln!(
            text,
            "| {} | {} | {} | {} / {} | {} | {} | {} |",
            between.name(),
            added(|sample| sample.busy_ns) / 1000,
            middle(index, |sample| sample.cpu_ns) / 1000,
            middle(index, |sample| sample.p50_us),
            middle(index, |sample| sample.p99_us),
            added(|sample| sample.p50_us),
            middle(index, |sample| sample.wire_bytes),
            added(|sample| sample.wire_bytes),
        )?;
    }
    let beyond =
        |of: usize, value: fn(&Sample) -> u64| middle(of, value).saturating_sub(middle(0, value));
    // What the processes were charged: it holds on a machine that does other work as well. What the
    // kernel programs add is in nobody's account but the machine's.
    let (hop, sidecars) = (
        middle(2, |sample| sample.cpu_ns),
        middle(4, |sample| sample.cpu_ns).max(1),
    );
    let percent = |part: u64, whole: u64| {
        let tenths = part * 1000 / whole.max(1);
        format!("{}.{}", tenths / 10, tenths % 10)
    };
    writeln!(
        text,
        "\nOne hop costs {} % of the CPU of two Envoys with mutual TLS ({} % by the machine's busy \
         time). Observation at both ends adds {} ns a call to the machine's busy time.",
        percent(hop, sidecars),
        percent(
            beyond(2, |sample| sample.busy_ns),
            beyond(4, |sample| sample.busy_ns)
        ),
        beyond(1, |sample| sample.busy_ns),
    )?;
    let wire = |of: usize| beyond(of, |sample| sample.wire_bytes).to_string();
    let money = host::output(
        std::process::Command::new(program)
            .args(["cost", "compare", "--gateway-cpu-us"])
            .arg((hop / 1000).to_string())
            .arg("--sidecar-cpu-us")
            .arg((sidecars / 1000).to_string())
            .args([
                "--gateway-wire-bytes",
                &wire(2),
                "--sidecar-wire-bytes",
                &wire(4),
            ]),
    )?;
    writeln!(
        text,
        "\nA month, by `edgemeter cost compare` with these figures:\n\n```\n{}\n```",
        money.trim_end()
    )?;
    Ok(text)
}

/// edgemeter without traffic of its own, observing one interface of a host.
fn observer(site: &Site, host: &Namespace, device: &str) -> Result<Process> {
    let directory = site.directory.path().join(device);
    fs::create_dir_all(&directory)?;
    let text = format!(
        "[gateway]\nstate_dir = \"state\"\nthreads = 1\ngrace_seconds = 0\n\n\
         [admin]\nlisten = \"127.0.0.1:9911\"\n\n\
         [observe]\ninterfaces = [\"{device}\"]\nbpffs = \"{}\"\nrequired = true\n\n\
         [[listeners]]\nname = \"unused\"\naddress = \"127.0.0.1:9912\"\n\n\
         [[upstreams]]\nname = \"unused\"\npeers = [\"127.0.0.1:9913\"]\n\n\
         [[routes]]\nname = \"unused\"\npath = {{ prefix = \"/\" }}\nupstream = \"unused\"\n",
        edgemeter::bpffs().join(device).display(),
    );
    let file = directory.join("edgemeter.toml");
    fs::write(&file, text)?;
    let mut command = host.command(&site.edgemeter)?;
    command.args(["run", "--config"]).arg(file);
    Process::start(&format!("observer of {device}"), &mut command, &directory)
}

/// One Envoy beside the client and one beside the service.
fn sidecars(site: &Site, tls: bool) -> Result<Vec<Process>> {
    let directory = site.directory.path();
    let certificate = fs::canonicalize(&site.certificate.certificate)?;
    let key = fs::canonicalize(&site.certificate.key)?;
    let (certificate, key) = (certificate.display(), key.display());
    let common = format!(
        "common_tls_context: {{ tls_certificates: [{{ certificate_chain: {{ filename: {certificate} }}, \
         private_key: {{ filename: {key} }} }}], validation_context: {{ trusted_ca: {{ filename: {certificate} }} }} }}"
    );
    let context = |kind: &str, more: &str| {
        if !tls {
            return String::new();
        }
        format!(
            "transport_socket: {{ name: envoy.transport_sockets.tls, typed_config: {{ \"@type\": \
             type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}, {more}{common} }} }}"
        )
    };
    let outward = sidecar(
        ("127.0.0.1", OUTWARD, ""),
        (
            &GATEWAY_TO_CLIENT.v4.to_string(),
            INWARD,
            &context("UpstreamTlsContext", ""),
        ),
    );
    let inward = sidecar(
        (
            "0.0.0.0",
            INWARD,
            &context("DownstreamTlsContext", "require_client_certificate: true, "),
        ),
        ("127.0.0.1", Site::LOCAL_ORIGIN_PORT, ""),
    );
    let mut processes = Vec::new();
    for (name, host, text) in [
        ("sidecar-out", &site.hosts.client, outward),
        ("sidecar-in", &site.hosts.gateway, inward),
    ] {
        let file = directory.join(format!("{name}.yaml"));
        fs::write(&file, text)?;
        let mut command = host.command(peers::envoy()?)?;
        command
            .args(["--concurrency", "1", "--log-level", "error"])
            .args(["--use-dynamic-base-id", "-c"])
            .arg(file);
        processes.push(Process::start(name, &mut command, directory)?);
    }
    Ok(processes)
}

/// An Envoy that listens at one place and forwards to another: `(address, port, TLS)`.
fn sidecar(listen: (&str, u16, &str), forward: (&str, u16, &str)) -> String {
    let (address, port, down_tls) = listen;
    let (peer, peer_port, up_tls) = forward;
    format!(
        r#"static_resources:
  listeners:
  - address: {{ socket_address: {{ address: {address}, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: s
          route_config:
            virtual_hosts:
            - {{ name: all, domains: ["*"], routes: [{{ match: {{ prefix: "/" }}, route: {{ cluster: next }} }}] }}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
      {down_tls}
  clusters:
  - name: next
    connect_timeout: 5s
    type: STATIC
    load_assignment:
      cluster_name: next
      endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: {peer}, port_value: {peer_port} }} }} }} }}] }}]
    {up_tls}
"#
    )
}
