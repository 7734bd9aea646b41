//! Ground truth: what tcpdump saw at the far ends, against what the ledger holds. Difference 0.

use std::net::{IpAddr, UdpSocket};

use edgemeter::owner::OwnerKind;
use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends, bytes_of_kind};

/// GSO on egress and GRO on ingress are on at the gateway's ends (see the topology).
fn mixed_traffic(name: &str, setup: &Setup, client: IpAddr) {
    let site = Site::start(name, setup);
    let captures = site.captures();
    for (tls, protocol) in [
        (false, Protocol::Http1),
        (true, Protocol::Http1),
        (false, Protocol::Http2),
        (true, Protocol::Http2),
    ] {
        let plan = site.plan(client, tls, protocol, 90);
        let summary = load::run(&site.hosts.client, &plan).unwrap();
        assert_eq!(summary["small"].requests, 30);
        assert_eq!(summary["large"].received_bytes, 30 * 300_000);
    }
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(
        page.sum("edgemeter_requests_total", |s| s.label("status_class")
            == "2xx"),
        360
    );
    assert_eq!(
        bytes_of_kind(&site, OwnerKind::Foreign),
        0,
        "all of it was the gateway's"
    );
    let large = page.sum("edgemeter_wire_bytes_total", |s| {
        let exact = s.label("quality") == "exact" && s.label("leg") == "client";
        exact && s.label("route") == "large" && s.label("direction") == "tx"
    });
    let bodies = 60 * 300_000;
    assert!(
        large > bodies && large < bodies + bodies / 10,
        "{large} wire bytes for {bodies}"
    );
}

#[test]
fn every_byte_on_ipv4() {
    mixed_traffic("w4", &Setup::default(), GATEWAY_TO_CLIENT.v4.into());
}

#[test]
fn every_byte_on_ipv6_to_an_ipv6_upstream() {
    let setup = Setup {
        upstream_v6: true,
        ..Setup::default()
    };
    mixed_traffic("w6", &setup, GATEWAY_TO_CLIENT.v6.into());
}

#[test]
fn every_byte_with_clsact_and_an_http2_upstream() {
    let setup = Setup {
        attach: "clsact",
        upstream_http2: true,
        ..Setup::default()
    };
    mixed_traffic("wc", &setup, GATEWAY_TO_CLIENT.v4.into());
}

#[test]
fn traffic_that_is_not_the_gateways_is_visible_and_not_attributed() {
    let site = Site::start("wf", &Setup::default());
    let captures = site.captures();
    let target: IpAddr = GATEWAY_TO_CLIENT.v4.into();
    let sent = site
        .hosts
        .client
        .run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            // Closed port: each datagram is answered by ICMP; the large ones are fragmented.
            for size in [10, 1400, 5000, 20_000] {
                let _ = socket.send_to(&vec![0; size], (target, 9));
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            4
        })
        .unwrap();
    assert_eq!(sent, 4);
    // The service's side needs some traffic for its capture to compare.
    load::run(
        &site.hosts.client,
        &site.plan(target, false, Protocol::Http1, 3),
    )
    .unwrap();
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    let cell = |name: &str| {
        page.sum("edgemeter_unattributed_bytes_total", |sample| {
            sample.label("cell") == name
        })
    };
    assert!(cell("fragment") > 25_000, "fragments: {}", cell("fragment"));
    assert!(cell("icmp") > 0, "ICMP answers");
    assert_eq!(
        bytes_of_kind(&site, OwnerKind::Foreign),
        (14 + 20 + 8) * 2 + 10 + 1400,
        "the two whole datagrams"
    );
}

#[test]
fn connections_without_a_slot_are_overhead_not_lost() {
    let setup = Setup {
        connections_max: 64,
        ..Setup::default()
    };
    let site = Site::start("ws", &setup);
    let captures = site.captures();
    let mut plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 300);
    // A new connection for each request: 64 slots, each quarantined for seconds.
    plan.per_connection = 1;
    load::run(&site.hosts.client, &plan).unwrap();
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    let exhausted = page.sum("edgemeter_slots_exhausted_total", |_| true);
    assert!(exhausted > 0, "every connection found a slot");
    // How many do depends on how long the load takes. Each that did not has its handshake, its
    // message and its end here: 500 B at the very least.
    let nobodys =
        bytes_of_kind(&site, OwnerKind::Overhead) + bytes_of_kind(&site, OwnerKind::Unclaimed);
    assert!(
        i128::from(nobodys) > exhausted * 500,
        "{nobodys} B for {exhausted}"
    );
}
