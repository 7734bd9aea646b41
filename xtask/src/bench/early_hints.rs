//! `cargo xtask bench early-hints`: the product page in a real browser, with its hints before the
//! answer (103), with the answer (`Link`), and without; in alternated rounds.
//!
//! Browser, gateway and order service share a network namespace. The slow network stands between
//! browser and gateway, the slow service between gateway and service: a relay each, which delays
//! what it passes on. Every sample begins with an empty cache and a new connection.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;

use super::relay::{self, Pace};
use super::site::Process;
use super::{machine, results};
use crate::browser::Browser;
use crate::host::{self, Tool};
use crate::netns::Namespace;
use crate::{certificate, exposition};

const PATIENCE: Duration = Duration::from_secs(30);

/// How thorough, and how slow.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Samples of each kind.
    #[arg(long, default_value_t = 15)]
    samples: usize,
    /// Round trip between browser and gateway, milliseconds.
    #[arg(long, default_value_t = 150)]
    rtt_ms: u64,
    /// Towards the browser, kilobits a second.
    #[arg(long, default_value_t = 1_600)]
    kbit: u64,
    /// What the service thinks about a page, milliseconds.
    #[arg(long, default_value_t = 400)]
    think_ms: u64,
    /// With the development build: the waits dominate.
    #[arg(long)]
    dev: bool,
}

/// One way to give hints; each has a host name of its own.
struct Kind {
    name: &'static str,
    host: &'static str,
}

const KINDS: [Kind; 3] = [
    Kind {
        name: "A: 103 before the answer",
        host: "early.example",
    },
    Kind {
        name: "B: Link with the answer",
        host: "final.example",
    },
    Kind {
        name: "C: none",
        host: "none.example",
    },
];

/// Runs it and prints the table.
///
/// # Errors
/// Something does not start, a page does not paint, or a hint came where none should.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench early-hints")?;
    host::need(&[Tool::IP, Tool::CHROMIUM])?;
    let profile = if options.dev { "debug" } else { "release" };
    let mut cargo = host::cargo();
    cargo.args(["build", "--locked", "-p", "commerce", "-p", "edgemeter"]);
    if !options.dev {
        cargo.arg("--release");
    }
    host::run(&mut cargo)?;
    let namespace = Namespace::create(&Namespace::unique_prefix("eh"))?;
    let times = namespace.run(|| measure(options, profile))??;
    let mut text = format!(
        "cargo xtask bench early-hints, {}\n{} samples each, alternated; round trip {} ms, {} kbit/s, \
         the service thinks {} ms; empty cache and new connection each time\n\n\
         | hints | first contentful paint, median ms | p90 ms | to C | to B |\n|-|-|-|-|-|\n",
        machine(),
        options.samples,
        options.rtt_ms,
        options.kbit,
        options.think_ms,
    );
    let median = |times: &[u64]| times[times.len() / 2];
    let [_, with_answer, none] = [0, 1, 2].map(|kind| median(&times[kind]));
    for (kind, times) in KINDS.iter().zip(&times) {
        let middle = median(times);
        let percent = |base: u64| {
            let change = i128::from(middle) - i128::from(base);
            format!("{:+} %", change * 100 / i128::from(base.max(1)))
        };
        writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            kind.name,
            middle / 1000,
            times[times.len() * 9 / 10] / 1000,
            percent(none),
            percent(with_answer),
        )?;
    }
    println!("\n{text}");
    println!("written to {}", results("early-hints.md", &text)?.display());
    Ok(())
}

/// First contentful paints of each kind, µs, sorted.
fn measure(options: &Options, profile: &str) -> Result<[Vec<u64>; 3]> {
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (browser_side, gateway, thinker, service, admin) = (
        local(443),
        local(8443),
        local(9100),
        local(9000),
        local(9901),
    );
    let directory = tempfile::tempdir().context("making a directory")?;
    let build = host::target_directory().join(profile);
    let mut command = Command::new(build.join("commerce"));
    command
        .args(["serve", "--log-level", "warn", "--listen"])
        .arg(service.to_string())
        .arg("--database")
        .arg(directory.path().join("commerce.db"));
    let shop = Process::start("commerce", &mut command, directory.path())?;
    wait_for(service, &shop)?;
    let think = Duration::from_millis(options.think_ms);
    relay::start(thinker, service, move |bytes| {
        let page = bytes.starts_with(b"GET /products/");
        Pace::delay(if page { think } else { Duration::ZERO })
    })?;
    let certificate = certificate::write(directory.path(), &[gateway.ip()])?;
    let path = directory.path().join("edgemeter.toml");
    std::fs::write(&path, configuration(gateway, thinker, admin))?;
    let mut command = Command::new(build.join("edgemeter"));
    command.args(["run", "--config"]).arg(&path);
    let process = Process::start("edgemeter", &mut command, directory.path())?;
    wait_for(admin, &process)?;
    let half = Duration::from_millis(options.rtt_ms) / 2;
    let bytes_per_second = options.kbit * 1000 / 8;
    relay::between(
        browser_side,
        gateway,
        move |_| Pace::delay(half),
        move |_| Pace {
            delay: half,
            bytes_per_second: Some(bytes_per_second),
        },
    )?;
    let mut browser = Browser::start(&[
        &format!(
            "--ignore-certificate-errors-spki-list={}",
            certificate.key_sha256
        ),
        "--host-resolver-rules=MAP *.example 127.0.0.1",
    ])?;
    // The gateway learns the page's hints from its first answer.
    for kind in &KINDS {
        sample(&mut browser, kind)?;
    }
    let mut times = [const { Vec::new() }; 3];
    for round in 0..options.samples {
        for (kind, times) in KINDS.iter().zip(&mut times) {
            let (painted, early) = sample(&mut browser, kind)?;
            let expected = kind.host == KINDS[0].host;
            ensure!(early == expected, "{}: 103 received: {early}", kind.name);
            times.push(painted);
        }
        println!("round {} of {}", round + 1, options.samples);
    }
    for times in &mut times {
        times.sort_unstable();
    }
    Ok(times)
}

/// When the page was painted first, µs, and whether its style sheet was hinted by a 103.
fn sample(browser: &mut Browser, kind: &Kind) -> Result<(u64, bool)> {
    let page = browser.open()?;
    browser.command(&page, "Network.enable", json!({}))?;
    let url = format!("https://{}/products/1001", kind.host);
    browser.go_to(&page, &url)?;
    let painted = browser.evaluate(
        &page,
        "new Promise(done => new PerformanceObserver(list => { \
             const paint = list.getEntriesByName('first-contentful-paint')[0]; \
             if (paint) done(Math.round(paint.startTime * 1000)); \
         }).observe({ type: 'paint', buffered: true }))",
    )?;
    let early = browser.evaluate(
        &page,
        "performance.getEntriesByType('resource').some(entry => \
             entry.name.includes('/assets/style-') && entry.initiatorType === 'early-hints')",
    )?;
    let heading = browser.evaluate(&page, "document.querySelector('h1').innerText.length")?;
    ensure!(heading.as_u64() > Some(0), "{url}: no heading was rendered");
    browser.close(page)?;
    let painted = painted.as_u64().context("no first contentful paint")?;
    Ok((painted, early == true))
}

fn configuration(listen: SocketAddr, upstream: SocketAddr, admin: SocketAddr) -> String {
    let route = |number: usize, more: &str| {
        let host = KINDS[number].host;
        let name = host.split('.').next().unwrap_or_default();
        format!(
            "[[routes]]\nname = \"{name}\"\nhosts = [\"{host}\"]\nupstream = \"commerce\"\n{more}\n"
        )
    };
    let routes = [
        route(0, "[routes.hints.early]\nlearn = true\n"),
        route(1, ""),
        route(2, "response_headers = { remove = [\"link\"] }\n"),
    ]
    .concat();
    format!(
        "[gateway]\nstate_dir = \"state\"\ngrace_seconds = 0\n\n[admin]\nlisten = \"{admin}\"\n\n\
         [[listeners]]\nname = \"shop\"\naddress = \"{listen}\"\nhttp2 = true\n\
         tls = {{ certificate = \"cert.pem\", key = \"key.pem\" }}\n\n\
         [[upstreams]]\nname = \"commerce\"\npeers = [\"{upstream}\"]\n\n{routes}"
    )
}

fn wait_for(address: SocketAddr, process: &Process) -> Result<()> {
    let began = Instant::now();
    while !matches!(exposition::get(address, "/readyz"), Ok((200, _))) {
        ensure!(began.elapsed() < PATIENCE, process.last_words());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
