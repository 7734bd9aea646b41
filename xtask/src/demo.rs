//! `cargo xtask demo`: the product working, on this machine, in one command.
//!
//! Three namespaces in a row — client, gateway, service — with the order service, the gateway and
//! its TC programs, and real traffic: HTTP/1.1 plain and over TLS, HTTP/2 over TLS, connections
//! that stay and connections that do not, with a little loss towards the client so that there
//! are retransmits to see. tcpdump at both far ends is the ground truth.

mod site;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::capture::{Capture, FarEnd};
use crate::exposition::Exposition;
use crate::host::{self, Tool};
use crate::load::{self, Plan, Protocol, Template};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Link};

use site::{Site, TLS_PORT};

/// How the demo is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long traffic flows.
    pub seconds: u64,
    /// Leave everything running at the end.
    pub keep: bool,
    /// Only remove what an earlier `--keep` left.
    pub clean: bool,
}

/// Runs the demonstration and checks its numbers.
///
/// # Errors
/// Something is missing, did not start, answered wrongly, or a byte is not where it belongs.
pub fn run(options: Options) -> Result<()> {
    host::require_root("cargo xtask demo")?;
    site::clean()?;
    if options.clean {
        println!("nothing of an earlier demo is left");
        return Ok(());
    }
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::ETHTOOL,
        Tool::TCPDUMP,
        Tool::NFT,
    ])?;
    host::mount_bpffs()?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("watching for Ctrl-C")?;
    }
    println!("building the gateway and the order service …");
    site::build()?;
    let site = Site::start()?;
    let outcome = show(&site, options, &stop);
    if outcome.is_ok() && options.keep && !stop.load(Ordering::Relaxed) {
        site.keep();
        return Ok(());
    }
    let report = outcome.and_then(|()| site.stop());
    if stop.load(Ordering::Relaxed) {
        println!("stopped early; nothing is left behind");
        return Ok(());
    }
    println!(
        "\nthe ledger, after the gateway has stopped (edgemeter report):\n{}",
        report?
    );
    println!("nothing is left behind: namespaces, programs and pins are gone");
    Ok(())
}

fn show(site: &Site, options: Options, stop: &Arc<AtomicBool>) -> Result<()> {
    let client_side = FarEnd::start(&site.hosts.client, GATEWAY_TO_CLIENT.far_device)?;
    let service_side = FarEnd::start(&site.hosts.service, GATEWAY_TO_SERVICE.far_device)?;
    site.lose_two_percent_at_the_client()?;
    println!(
        "traffic for {} s: HTTP/1.1 plain, HTTP/1.1 and HTTP/2 over TLS, 2 % loss at the client\n",
        options.seconds
    );
    traffic(site, options.seconds, stop)?;
    if stop.load(Ordering::Relaxed) {
        return Ok(());
    }
    let page = quiet(site)?;
    let far = [client_side.stop()?, service_side.stop()?];
    println!("\n{}", table::routes(&page));
    println!("{}", table::conservation(&page)?);
    for (link, capture) in [GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE].iter().zip(&far) {
        println!("{}", far_end(&page, link, capture)?);
    }
    Ok(())
}

/// Sends the mix from four loads at once, and prints a line a second.
fn traffic(site: &Site, seconds: u64, stop: &Arc<AtomicBool>) -> Result<()> {
    let deadline = Duration::from_secs(seconds);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let loads: Vec<_> = plans(site, deadline, stop)
            .into_iter()
            .map(|plan| scope.spawn(move || load::run(&site.hosts.client, &plan)))
            .collect();
        let mut last = Exposition::default();
        while started.elapsed() < deadline && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
            let page = site.scrape()?;
            println!("{}", table::live(started.elapsed(), &last, &page));
            last = page;
        }
        for load in loads {
            load.join()
                .map_err(|_| anyhow::anyhow!("a load panicked"))??;
        }
        Ok(())
    })
}

fn plans(site: &Site, deadline: Duration, stop: &Arc<AtomicBool>) -> Vec<Plan> {
    let order = |run: &str, tenant: &str| {
        Template::post(
            "order",
            "/api/v1/orders",
            r#"{"lines":[{"sku":"1001","quantity":1},{"sku":"1007","quantity":2}]}"#,
            201,
        )
        .header("content-type", "application/json")
        .header("idempotency-key", format!("demo-{run}-{{n}}"))
        .header("x-tenant", tenant)
    };
    let browse = || {
        vec![
            Template::get("products", "/api/v1/products?limit=48"),
            Template::get("page", "/products/1003"),
            Template::get("product", "/api/v1/products/1005"),
        ]
    };
    let base = Plan {
        address: (GATEWAY_TO_CLIENT.v4, site::PLAIN_PORT).into(),
        protocol: Protocol::Http1,
        root: None,
        connections: 2,
        requests: u64::MAX,
        deadline,
        per_connection: 200,
        templates: vec![],
        stop: Arc::clone(stop),
    };
    let tls = Plan {
        address: (GATEWAY_TO_CLIENT.v4, TLS_PORT).into(),
        root: Some(site.certificate.root.clone()),
        ..base.clone()
    };
    let mut mixed = browse();
    mixed.push(order("plain", "acme"));
    let mut secure = browse();
    secure.push(order("tls", "globex"));
    vec![
        Plan {
            templates: mixed,
            ..base.clone()
        },
        Plan {
            templates: secure,
            per_connection: 20,
            ..tls.clone()
        },
        // A new connection for every request: all overhead shows.
        Plan {
            templates: browse(),
            per_connection: 1,
            connections: 1,
            ..base
        },
        Plan {
            templates: browse(),
            protocol: Protocol::Http2,
            connections: 1,
            ..tls
        },
    ]
}

/// Waits until nothing moves, and returns what is then known.
fn quiet(site: &Site) -> Result<Exposition> {
    let moved = |page: &Exposition| page.sum("edgemeter_interface_bytes_total", |_| true);
    let mut before = -1;
    for _ in 0..60 {
        std::thread::sleep(Duration::from_millis(500));
        let page = site.scrape()?;
        let now = moved(&page);
        if now == before {
            return Ok(page);
        }
        before = now;
    }
    anyhow::bail!("the wire does not become quiet")
}

/// The interface's total against what tcpdump saw at the other end of the cable.
fn far_end(page: &Exposition, link: &Link, capture: &Capture) -> Result<String> {
    let total = |direction: &str| {
        page.sum("edgemeter_interface_bytes_total", |sample| {
            sample.label("interface") == link.device && sample.label("direction") == direction
        })
    };
    let seen = [
        ("tx", capture.sent_by(link.mac)),
        ("rx", capture.sent_by(link.far_mac)),
    ];
    let mut line = format!("far end of {}:", link.device);
    for (direction, count) in seen {
        let counted = total(direction);
        let difference = counted - i128::from(count.bytes);
        line += &format!(
            " {direction} {counted} B counted, {} B captured, difference {difference} B;",
            count.bytes
        );
        ensure!(
            difference == 0,
            "{} {direction}: {counted} B counted, but {} B in {} frames at the far end",
            link.device,
            count.bytes,
            count.frames
        );
    }
    Ok(line)
}
