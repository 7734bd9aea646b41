//! What the demo prints, from nothing but `/metrics`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::exposition::{Exposition, Sample};

const WIRE: &str = "edgemeter_wire_bytes_total";

#[derive(Default)]
struct Row {
    requests: i128,
    payload: i128,
    client_wire: i128,
    upstream_wire: i128,
    retransmits: i128,
    cost_nanos: i128,
    rtt_us: Option<u128>,
}

/// One line: what happened since the last page.
pub fn live(elapsed: Duration, before: &Exposition, now: &Exposition) -> String {
    let gained = |name: &str, condition: &dyn Fn(&Sample) -> bool| {
        now.sum(name, condition) - before.sum(name, condition)
    };
    let route =
        |sample: &Sample| sample.label("kind") == "route" && sample.label("leg") == "client";
    let payload = gained("edgemeter_response_body_bytes_total", &|_| true)
        + gained("edgemeter_request_body_bytes_total", &|_| true);
    format!(
        "{:>3} s  {:>6} requests  {:>10} payload B  {:>10} wire B on routes  {:>5} retransmits  \
         {:>12} B on the interfaces  gap {} B",
        elapsed.as_secs(),
        gained("edgemeter_requests_total", &|_| true),
        payload,
        gained(WIRE, &route),
        gained("edgemeter_wire_retransmit_frames_total", &|_| true),
        gained("edgemeter_interface_bytes_total", &|_| true),
        now.sum("edgemeter_conservation_gap_bytes", |_| true),
    )
}

/// The table by route.
pub fn routes(page: &Exposition) -> String {
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    let mut add = |name: &str, put: &dyn Fn(&mut Row, &Sample)| {
        for sample in page.named(name) {
            let route = match sample.label("kind") {
                "overhead" => format!("({} overhead)", sample.label("endpoint")),
                "foreign" => continue,
                _ => sample.label("route").to_owned(),
            };
            if route != "(overhead)" {
                put(rows.entry(route).or_default(), sample);
            }
        }
    };
    add("edgemeter_requests_total", &|row, sample| {
        row.requests += sample.integer()
    });
    for name in [
        "edgemeter_request_body_bytes_total",
        "edgemeter_response_body_bytes_total",
    ] {
        add(name, &|row, sample| row.payload += sample.integer());
    }
    add(WIRE, &|row, sample| match sample.label("leg") {
        "client" => row.client_wire += sample.integer(),
        _ => row.upstream_wire += sample.integer(),
    });
    add("edgemeter_wire_retransmit_frames_total", &|row, sample| {
        row.retransmits += sample.integer()
    });
    add("edgemeter_cost_nanos_total", &|row, sample| {
        row.cost_nanos += sample.integer()
    });
    for (route, row) in &mut rows {
        row.rtt_us = mean_us(page, "edgemeter_client_rtt_seconds", route);
    }
    let mut out = format!(
        "{:<22} {:>9} {:>13} {:>15} {:>10} {:>17} {:>8} {:>8} {:>13}\n",
        "route",
        "requests",
        "payload B",
        "client wire B",
        "wire/load",
        "upstream wire B",
        "retrans",
        "RTT ms",
        "cost USD"
    );
    for (route, row) in &rows {
        let _ = writeln!(
            out,
            "{:<22} {:>9} {:>13} {:>15} {:>10} {:>17} {:>8} {:>8} {:>13}",
            route,
            row.requests,
            row.payload,
            row.client_wire,
            ratio(row.client_wire, row.payload),
            row.upstream_wire,
            row.retransmits,
            row.rtt_us.map_or_else(
                || "-".into(),
                |us| format!("{}.{:03}", us / 1000, us % 1000)
            ),
            money(row.cost_nanos),
        );
    }
    let overhead_cost = page.sum("edgemeter_cost_nanos_total", |sample| {
        sample.label("route") == "(overhead)"
    });
    let cost = page.sum("edgemeter_cost_nanos_total", |_| true);
    let _ = write!(
        out,
        "cost in all {} USD, of which connection overhead {} USD",
        money(cost),
        money(overhead_cost)
    );
    out
}

/// attributed + unattributed = bytes on the interfaces.
///
/// # Errors
/// They differ, or the kernel's own identity does not hold.
pub fn conservation(page: &Exposition) -> Result<String> {
    let attributed = page.sum(WIRE, |sample| sample.label("kind") != "foreign");
    let foreign = page.sum(WIRE, |sample| sample.label("kind") == "foreign");
    let unclaimed = page.sum("edgemeter_unclaimed_bytes", |_| true);
    let cells = page.sum("edgemeter_unattributed_bytes_total", |_| true);
    let total = page.sum("edgemeter_interface_bytes_total", |_| true);
    let unattributed = foreign + unclaimed + cells;
    let difference = attributed + unattributed - total;
    let gap = page.sum("edgemeter_conservation_gap_bytes", |_| true);
    let line = format!(
        "conservation: attributed {attributed} B + unattributed {unattributed} B = {} B; \
         bytes on the interfaces {total} B; difference {difference} B",
        attributed + unattributed
    );
    ensure!(difference == 0 && gap == 0, "{line}; kernel gap {gap} B");
    Ok(line)
}

fn mean_us(page: &Exposition, histogram: &str, route: &str) -> Option<u128> {
    let of_route = |sample: &&Sample| sample.label("route") == route;
    let sum = format!("{histogram}_sum");
    let count = format!("{histogram}_count");
    let seconds = page.named(&sum).find(of_route)?.value.parse().ok()?;
    let total = Duration::try_from_secs_f64(seconds).ok()?;
    let count = u128::try_from(page.named(&count).find(of_route)?.integer()).ok()?;
    total.as_micros().checked_div(count)
}

/// Two decimals, in integers.
fn ratio(a: i128, b: i128) -> String {
    match (a * 100).checked_div(b) {
        None => "-".into(),
        Some(hundredths) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
    }
}

fn money(nanos: i128) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}
