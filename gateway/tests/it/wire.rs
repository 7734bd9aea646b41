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

/// Datagrams that the kernel cuts (UDP_SEGMENT) and merges (UDP_GRO), both ways.
#[test]
fn cut_and_merged_datagrams_are_counted_as_the_wire_has_them() {
    use std::os::fd::AsRawFd as _;
    const UDP_SEGMENT: i32 = 103;
    const UDP_GRO: i32 = 104;
    const SEGMENT: i32 = 1200;
    /// 40 whole ones and a short one.
    const RUN: usize = 40 * 1200 + 77;
    const RUNS: usize = 60;
    let site = Site::start("wu", &Setup::default());
    let captures = site.captures();
    let bound = |namespace: &xtask::netns::Namespace, ip: IpAddr| {
        let socket = namespace
            .run(|| UdpSocket::bind((ip, 7443)).unwrap())
            .unwrap();
        let fd = socket.as_raw_fd();
        crate::talk::option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &(1 << 22));
        crate::talk::option(fd, libc::SOL_UDP, UDP_SEGMENT, &SEGMENT);
        crate::talk::option(fd, libc::SOL_UDP, UDP_GRO, &1);
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        socket
    };
    let near = bound(&site.hosts.gateway, GATEWAY_TO_CLIENT.v4.into());
    let far = bound(&site.hosts.client, GATEWAY_TO_CLIENT.far_v4.into());
    let mut merged = 0;
    for (from, to, merges) in [(&near, &far, false), (&far, &near, true)] {
        let mut space = vec![0; 65536];
        for _ in 0..RUNS {
            let run = vec![7; RUN];
            let address = to.local_addr().unwrap();
            assert_eq!(from.send_to(&run, address).unwrap(), RUN);
            let mut received = 0;
            while received < RUN {
                let (length, _) = to.recv_from(&mut space).unwrap();
                merged += usize::from(merges && length > 1200);
                received += length;
            }
        }
    }
    assert!(merged > 0, "nothing came merged: the test proves nothing");
    // The service's side needs some traffic for its capture to compare.
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 3);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let datagrams: u64 = captures[0]
        .flows()
        .iter()
        .filter(|(flow, _)| flow.protocol == 17)
        .map(|(_, count)| count.frames)
        .sum();
    assert_eq!(datagrams, 2 * 60 * 41, "on the wire each is one frame");
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    let headers = 14 + 20 + 8;
    assert_eq!(
        bytes_of_kind(&site, OwnerKind::Foreign),
        i64::try_from(2 * RUNS * (RUN + 41 * headers)).unwrap()
    );
}
