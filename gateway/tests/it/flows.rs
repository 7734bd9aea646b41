//! `edgemeter flows`: every byte of an interface is in a flow or in a named cell, also after the
//! gateway has been killed, and also when there are more flows than room.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use edgemeter::kernel::{Maps, PinDirectory};
use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site};

/// In the directory that the command runs in.
const CONFIG: &str = "edgemeter.toml";

pub fn listing(site: &Site, top: &str) -> serde_json::Value {
    let (ok, said) = site.edgemeter(&["flows", "--json", "--top", top, "--config", CONFIG]);
    assert!(ok, "{said}");
    serde_json::from_str(&said).unwrap()
}

/// Asserts the identity and returns, over interfaces and directions, the bytes in flows and in
/// the cell for flows that found no room.
pub fn exact(listing: &serde_json::Value) -> (u64, u64) {
    let mut sums = (0, 0);
    for identity in listing["identities"].as_array().unwrap() {
        let cells = identity["cells"].as_object().unwrap();
        let outside: u64 = cells.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        let flows = identity["flows"].as_u64().unwrap();
        assert_eq!(
            identity["total"].as_u64().unwrap(),
            flows + outside,
            "{identity}"
        );
        assert_eq!(identity["difference"], 0, "{identity}");
        sums.0 += flows;
        sums.1 += cells
            .get("flows_full")
            .map_or(0, |bytes| bytes.as_u64().unwrap());
    }
    sums
}

#[test]
fn flows_and_cells_are_what_the_interfaces_moved_with_and_without_a_gateway() {
    let mut site = Site::start("fl", &Setup::default());
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 200);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let serving = listing(&site, "3");
    let (bytes, full) = exact(&serving);
    assert!(bytes > 0 && full == 0, "{serving}");
    let shown = serving["flows"].as_array().unwrap();
    assert_eq!(shown.len(), 3);
    let moved = |row: &serde_json::Value| {
        row["rx_bytes"].as_u64().unwrap() + row["tx_bytes"].as_u64().unwrap()
    };
    assert!(shown.is_sorted_by(|a, b| moved(a) >= moved(b)), "{serving}");
    site.end(libc::SIGKILL);
    let dead = listing(&site, "0");
    assert!(exact(&dead).0 >= bytes);
    let (ok, text) = site.edgemeter(&["flows", "--config", CONFIG]);
    assert!(ok && text.contains("difference 0 B"), "{text}");
}

#[test]
fn datagrams_are_rows_and_quic_is_told_by_its_first_one() {
    let site = Site::start("fq", &Setup::default());
    let target: IpAddr = GATEWAY_TO_CLIENT.v4.into();
    // An Initial packet's first bytes; a later packet's; the same elsewhere than at port 443.
    let (long, short) = ([0xc3, 0, 0, 0, 1, 8], [0x43, 0, 0, 0, 1, 8]);
    for (port, first) in [(443, long), (443, short), (4433, long)] {
        let sink = site
            .hosts
            .gateway
            .run(|| UdpSocket::bind((target, port)).unwrap())
            .unwrap();
        site.hosts
            .client
            .run(|| {
                let socket = UdpSocket::bind((GATEWAY_TO_CLIENT.far_v4, 0)).unwrap();
                for datagram in [first, short, long] {
                    socket.send_to(&datagram, (target, port)).unwrap();
                }
            })
            .unwrap();
        drop(sink);
    }
    site.quiet();
    let listing = listing(&site, "100");
    exact(&listing);
    let rows = listing["flows"].as_array().unwrap();
    let of = |protocol: &str, port: &str| {
        let row = |row: &&serde_json::Value| {
            row["protocol"] == protocol && row["local"].as_str().unwrap().ends_with(port)
        };
        rows.iter().filter(row).count()
    };
    assert_eq!(of("quic", ":443"), 1, "{listing}");
    assert_eq!(of("udp", ":443"), 1, "{listing}");
    assert_eq!(
        (of("quic", ":4433"), of("udp", ":4433")),
        (0, 1),
        "{listing}"
    );
    // The walk through the table comes once a second.
    let started = Instant::now();
    let counted = |protocol: &str| {
        site.scrape().sum("edgemeter_flows_by_protocol", |sample| {
            sample.label("protocol") == protocol
        })
    };
    while (counted("quic"), counted("udp")) != (1, 2) {
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs(20), "{}", counted("udp"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Whoever sends many flows sends them to this one.
const SINK: (Ipv4Addr, u16) = (GATEWAY_TO_CLIENT.v4, 9_900);

fn sink(site: &Site) -> UdpSocket {
    let bound = site.hosts.gateway.run(|| UdpSocket::bind(SINK).unwrap());
    bound.unwrap()
}

/// A datagram of 100 bytes each.
fn send_flows(site: &Site, flows: u64) {
    let sent = site.hosts.client.run(|| {
        // A flow a socket.
        for _ in 0..flows {
            let socket = UdpSocket::bind((GATEWAY_TO_CLIENT.far_v4, 0)).unwrap();
            socket.send_to(&[0x5a; 100], SINK).unwrap();
        }
    });
    sent.unwrap();
}

#[test]
fn more_flows_than_room_are_in_a_cell_to_the_byte() {
    const ROOM: u64 = 1024;
    let setup = Setup {
        flows_max: 1024,
        ..Setup::default()
    };
    let site = Site::start("ff", &setup);
    let sink = sink(&site);
    send_flows(&site, 3 * ROOM);
    site.quiet();
    drop(sink);
    let listing = listing(&site, "0");
    let (flows, full) = exact(&listing);
    assert!(listing["count"].as_u64().unwrap() <= ROOM, "{listing}");
    assert!(flows > 0 && full >= ROOM * 142, "{listing}");
}

/// Waits until flows are taken away and kills the gateway then. Whether it was in the midst of it:
/// the count of how often is left odd.
fn kill_while_flows_are_taken_away(site: &mut Site, maps: &Maps) -> bool {
    let (began, before) = (Instant::now(), maps.flows_taken_away().unwrap());
    while maps.flows_taken_away().unwrap() == before {
        let waited = began.elapsed();
        assert!(
            waited < Duration::from_secs(60),
            "no flow goes: {}",
            site.log()
        );
    }
    site.end(libc::SIGKILL);
    maps.flows_taken_away().unwrap() % 2 == 1
}

#[test]
fn a_kill_while_flows_that_are_over_are_taken_away_loses_none() {
    const ROOM: u64 = 1024;
    let setup = Setup {
        flows_max: 1024,
        ..Setup::default()
    };
    let mut site = Site::start("fk", &setup);
    let sink = sink(&site);
    let mut in_the_midst = 0;
    for _ in 0..4 {
        send_flows(&site, ROOM);
        let pins = PinDirectory::open(&site.bpffs().to_path_buf()).unwrap();
        let maps = Maps::pinned(&pins).unwrap();
        in_the_midst += u32::from(kill_while_flows_are_taken_away(&mut site, &maps));
        site.launch();
        let before = maps.flows_taken_away().unwrap();
        let listing = listing(&site, "0");
        exact(&listing);
        assert_eq!(before % 2, 0, "{listing}");
    }
    drop(sink);
    assert!(in_the_midst > 0, "never killed in the midst of it");
}
