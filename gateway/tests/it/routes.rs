//! Which route owns which byte: against what a client read from its own socket, byte by byte.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use edgemeter::owner::{Leg, OwnerKind, Quality};
use flow_abi::Direction;
use xtask::{
    exposition::Exposition,
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{PLAIN, Setup, Site};

/// Asks for one route after another on one keep-alive connection, and counts stream bytes:
/// requests and responses, headers included.
fn alternate(address: SocketAddr, rounds: usize) -> BTreeMap<&'static str, (u64, u64)> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut counted: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    for round in 0..rounds {
        for (route, size, upload) in [
            ("small", 100 + round, 0),
            ("large", 200_000 + 977 * round, 0),
            ("upload", 10, 30_000),
        ] {
            let head = if upload == 0 {
                format!("GET /{route}/bytes/{size} HTTP/1.1\r\nhost: x\r\n\r\n")
            } else {
                format!(
                    "POST /{route}/bytes/{size} HTTP/1.1\r\nhost: x\r\ncontent-length: {upload}\r\n\r\n"
                )
            };
            let mut request = head.into_bytes();
            request.resize(request.len() + upload, b'u');
            stream.write_all(&request).unwrap();
            let answer = read_answer(&mut stream, size);
            let entry = counted.entry(route).or_default();
            entry.0 += request.len() as u64;
            entry.1 += answer;
        }
    }
    counted
}

/// Reads one response and returns its length on the stream.
fn read_answer(stream: &mut TcpStream, body: usize) -> u64 {
    let mut answer = Vec::new();
    let mut buffer = [0; 65536];
    loop {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the gateway closed");
        answer.extend_from_slice(&buffer[..read]);
        if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
            assert!(
                answer.starts_with(b"HTTP/1.1 200"),
                "{}",
                String::from_utf8_lossy(&answer[..end])
            );
            let whole = end + 4 + body;
            assert!(answer.len() <= whole, "more than was asked for");
            if answer.len() == whole {
                return whole as u64;
            }
        }
    }
}

fn payload_by_route(site: &Site) -> BTreeMap<String, (u64, u64, i64)> {
    let (balances, owners) = site.ledger();
    let mut routes: BTreeMap<String, (u64, u64, i64)> = BTreeMap::new();
    for (_, direction, id, amount) in balances.amounts() {
        let Some(owner) = owners.get(&id) else {
            continue;
        };
        if owner.kind != OwnerKind::Route || owner.leg != Leg::Client {
            continue;
        }
        assert_eq!(owner.quality, Quality::Exact);
        let goodput = amount.l4_payload_bytes - amount.retransmit_payload_bytes;
        let entry = routes.entry(owner.route.clone()).or_default();
        if direction == Direction::Rx {
            entry.0 += u64::try_from(amount.wire_bytes).unwrap();
        } else {
            entry.1 += u64::try_from(goodput).unwrap();
            entry.2 += amount.retransmit_frames;
        }
    }
    routes
}

fn exact_split(name: &str, loss_percent: u32) {
    let site = Site::start(name, &Setup::default());
    if loss_percent > 0 {
        site.lose_at_the_client(loss_percent);
    }
    let address: SocketAddr = (GATEWAY_TO_CLIENT.v4, PLAIN).into();
    let mut truth: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| site.hosts.client.run(|| alternate(address, 12)).unwrap()))
            .collect();
        for client in clients {
            for (route, (sent, received)) in client.join().unwrap() {
                let entry = truth.entry(route).or_default();
                entry.0 += sent;
                entry.1 += received;
            }
        }
    });
    let page = site.quiet();
    let routes = payload_by_route(&site);
    let mut retransmits = 0;
    for (route, (sent, received)) in &truth {
        let (wire_rx, goodput, retransmitted) = routes[*route];
        assert_eq!(
            goodput, *received,
            "{route}: stream bytes the gateway sent, without retransmits"
        );
        assert!(
            wire_rx > *sent,
            "{route}: {wire_rx} wire bytes carried {sent} request bytes"
        );
        // Without loss towards the gateway, a request's frames are its bytes and 66 a frame.
        assert!(
            wire_rx < sent + sent / 10 + 48 * 80,
            "{route}: {wire_rx} for {sent}: not its own"
        );
        retransmits += retransmitted;
    }
    // Without loss a tail probe may still be sent; with it there must be some.
    assert!(
        loss_percent == 0 || retransmits > 0,
        "no retransmits at {loss_percent} %"
    );
    assert_eq!(page.sum("edgemeter_ranges_overwritten_total", |_| true), 0);
    assert_eq!(page.sum("edgemeter_unclaimed_bytes", |_| true), 0);
    histograms_are_the_routes(&page, &routes);
}

/// Of 4 connections that begin with `small`, and 12 rounds on each.
fn histograms_are_the_routes(page: &Exposition, routes: &BTreeMap<String, (u64, u64, i64)>) {
    let of = |name: &str, route: &str| -> f64 {
        let samples = page
            .named(name)
            .filter(|sample| sample.label("leg") == "client" && sample.label("route") == route);
        samples
            .map(|sample| sample.value.parse::<f64>().unwrap())
            .sum()
    };
    for (route, (_, _, retransmitted)) in routes {
        let told = "edgemeter_route_retransmits";
        assert_eq!(of(&format!("{told}_count"), route), 48.0, "{route}");
        let expected = f64::from(i32::try_from(*retransmitted).unwrap());
        assert_eq!(of(&format!("{told}_sum"), route), expected, "{route}");
        let handshakes = of("edgemeter_route_handshake_seconds_count", route);
        assert_eq!(
            handshakes,
            if route == "small" { 4.0 } else { 0.0 },
            "{route}"
        );
    }
    let trip = of("edgemeter_route_handshake_seconds_sum", "small");
    assert!(
        trip > 0.0 && trip < 4.0,
        "{trip} s of four handshakes on one host"
    );
}

#[test]
fn each_route_owns_its_bytes_on_a_shared_connection() {
    exact_split("rx", 0);
}

/// Wire bytes counted as sent by an interface.
fn counted_as_sent(site: &Site, device: &str) -> i128 {
    site.scrape()
        .sum("edgemeter_interface_bytes_total", |sample| {
            sample.label("interface") == device && sample.label("direction") == "tx"
        })
}

/// Wire bytes that an interface's root qdisc let pass.
fn passed(namespace: &str, device: &str) -> i128 {
    let mut tc = std::process::Command::new("tc");
    tc.args(["-n", namespace, "-s", "-j", "qdisc", "show", "dev", device]);
    let said: serde_json::Value =
        serde_json::from_str(&xtask::host::output(&mut tc).unwrap()).unwrap();
    let root = said
        .as_array()
        .unwrap()
        .iter()
        .find(|qdisc| qdisc["root"] == true);
    root.unwrap()["bytes"].as_i64().unwrap().into()
}

#[test]
fn a_drop_on_this_host_does_not_shift_the_split() {
    let site = Site::start("rq", &Setup::default());
    let name = site.hosts.gateway.name();
    let device = GATEWAY_TO_CLIENT.device;
    let mut tc = std::process::Command::new("tc");
    tc.args(["-n", name, "qdisc", "replace", "dev", device, "root", "tbf"]);
    xtask::host::run(tc.args(["rate", "80mbit", "burst", "20k", "limit", "40k"])).unwrap();
    // From here on the qdisc counts what it lets pass.
    let before = counted_as_sent(&site, device);
    let address: SocketAddr = (GATEWAY_TO_CLIENT.v4, PLAIN).into();
    let truth = site.hosts.client.run(|| alternate(address, 12)).unwrap();
    site.quiet();
    let counted = counted_as_sent(&site, device) - before;
    let dropped = counted - passed(name, device);
    assert!(dropped > 0, "the qdisc let all of {counted} bytes pass");
    let routes = payload_by_route(&site);
    for (route, (_, received)) in &truth {
        let (_, sent, _) = routes[*route];
        // What the qdisc dropped was sent as new, so it is in the goodput once more.
        assert!(sent >= *received, "{route}: {sent} of {received}");
        let again = if *route == "large" { dropped } else { 60_000 };
        let most = received + u64::try_from(again).unwrap();
        assert!(
            sent <= most,
            "{route}: {sent} for {received}: another route's bytes"
        );
    }
}

#[test]
fn each_route_owns_its_bytes_under_loss() {
    exact_split("rl", 3);
}

fn access_log_against_ledger(name: &str, tls: bool) {
    let site = Site::start(name, &Setup::default());
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), tls, Protocol::Http1, 60);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let log = site.access_log(60);
    let (mut lines, mut sent, mut received) = (0, 0, 0);
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["status"], 200);
        assert_eq!(line["wire_settled"], true, "{line}");
        let number = |value: &serde_json::Value| value.as_u64().unwrap();
        let wire = &line["wire"];
        assert!(
            number(&wire["sent_bytes"]) > number(&line["response_body_bytes"]) + 66,
            "{line}"
        );
        // Over TLS a first request may have come with the handshake, which owns those frames.
        let least = if tls {
            0
        } else {
            number(&line["request_body_bytes"]) + 66
        };
        assert!(number(&wire["received_bytes"]) >= least, "{line}");
        sent += number(&wire["sent_bytes"]);
        received += number(&wire["received_bytes"]);
        lines += 1;
    }
    assert_eq!(lines, 60);
    let (balances, owners) = site.ledger();
    let is_client_route = |id: &edgemeter::owner::OwnerId| {
        owners
            .get(id)
            .is_some_and(|o| o.kind == OwnerKind::Route && o.leg == Leg::Client)
    };
    for (direction, logged) in [(Direction::Tx, sent), (Direction::Rx, received)] {
        let amounts = balances
            .amounts()
            .filter(|(_, d, id, _)| *d == direction && is_client_route(id));
        let (posted, retransmitted) = amounts.fold((0, 0), |sum, (_, _, _, amount)| {
            (sum.0 + amount.wire_bytes, sum.1 + amount.retransmit_bytes)
        });
        let logged = i64::try_from(logged).unwrap();
        // A retransmit (a tail probe) after the line was written is in the ledger only.
        assert!(
            logged <= posted && posted - logged <= retransmitted,
            "{direction:?}: lines {logged}, ledger {posted}, of it retransmitted {retransmitted}"
        );
    }
}

#[test]
fn the_access_log_adds_up_to_the_ledger() {
    access_log_against_ledger("ra", false);
}

#[test]
fn the_access_log_adds_up_to_the_ledger_over_tls() {
    access_log_against_ledger("rt", true);
}

/// A mirrored request's bytes are on the mirror's own leg, and the sum is still what the wire
/// carried.
#[test]
fn mirrored_bytes_have_an_owner_of_their_own() {
    use xtask::netns::GATEWAY_TO_SERVICE;
    let site = Site::start("rm", &Setup::default());
    let original = std::fs::read_to_string(site.config()).unwrap();
    let shadow = format!(
        "[{}]:{}",
        GATEWAY_TO_SERVICE.far_v6,
        crate::harness::SERVICE
    );
    let changed = original.replace(
        "name = \"upload\"\n",
        "name = \"upload\"\nmirror = { upstream = \"shadow\", body_max_bytes = 100000 }\n",
    );
    assert_ne!(changed, original);
    let text = format!("{changed}[[upstreams]]\nname = \"shadow\"\npeers = [\"{shadow}\"]\n");
    std::fs::write(site.config(), text).unwrap();
    let (applied, said) = site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
    assert!(applied, "{said}");
    let client = GATEWAY_TO_CLIENT.v4.into();
    load::run(
        &site.hosts.client,
        &site.plan(client, false, Protocol::Http1, 30),
    )
    .unwrap();
    let page = site.quiet();
    let copies = page.sum("edgemeter_mirror_copies_total", |s| {
        s.label("result") == "sent"
    });
    assert_eq!(copies, 10);
    let (balances, owners) = site.ledger();
    let sent = |endpoint: &str| -> i64 {
        let of = balances.amounts().filter(|(_, direction, id, _)| {
            *direction == Direction::Tx
                && owners.get(id).is_some_and(|owner| {
                    owner.kind == OwnerKind::Route
                        && owner.endpoint == endpoint
                        && owner.route == "upload"
                })
        });
        of.map(|(_, _, _, amount)| amount.wire_bytes).sum()
    };
    let bodies = 10 * 40_000;
    for endpoint in ["origin", "shadow"] {
        let bytes = sent(endpoint);
        assert!(
            bytes > bodies && bytes < bodies + bodies / 10,
            "{endpoint}: {bytes} B for {bodies}"
        );
    }
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(crate::harness::bytes_of_kind(&site, OwnerKind::Foreign), 0);
}
