//! Tables far too small for what comes: what finds no room is in a cell, and every byte has its
//! place at every moment.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use xtask::netns::GATEWAY_TO_CLIENT;

use crate::{
    flows::{exact, listing},
    harness::{PLAIN, Setup, Site, assert_equal_to_far_ends},
};

/// Flows there is room for: the least the configuration allows.
const ROOM: usize = 1024;
const SINK: u16 = 9_900;

/// A connection of its own, of a tenant of its own.
fn ask(address: SocketAddr, tenant: usize) {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "GET /small/bytes/100 HTTP/1.1\r\nhost: x\r\nx-tenant: t{tenant}\r\n\
         connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        answer.escape_ascii()
    );
}

/// A flow a socket: ten times as many as there is room for.
fn datagrams() {
    let target: IpAddr = GATEWAY_TO_CLIENT.v4.into();
    for _ in 0..10 * ROOM {
        let socket = UdpSocket::bind((GATEWAY_TO_CLIENT.far_v4, 0)).unwrap();
        socket.send_to(&[0x5a; 100], (target, SINK)).unwrap();
    }
}

#[test]
fn ten_times_more_than_every_table_holds_leaves_every_byte_in_its_place() {
    let setup = Setup {
        flows_max: 1024,
        connections_max: 256,
        accounts_max: 64,
        ..Setup::default()
    };
    let site = Site::start("ch", &setup);
    let captures = site.captures();
    let target: IpAddr = GATEWAY_TO_CLIENT.v4.into();
    let sink = site
        .hosts
        .gateway
        .run(|| UdpSocket::bind((target, SINK)).unwrap())
        .unwrap();
    let address: SocketAddr = (target, PLAIN).into();
    let over = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        let client = &site.hosts.client;
        let load = scope.spawn(move || {
            let tenants = |some: std::ops::Range<usize>| {
                client.run(|| some.for_each(|n| ask(address, n))).unwrap();
            };
            // Accounts are full before flows are: what finds no flow asks for no account.
            tenants(0..320);
            let rest = scope.spawn(move || client.run(datagrams).unwrap());
            tenants(320..640);
            rest.join().unwrap();
        });
        let look = scope.spawn(|| {
            let mut looks = 0;
            while !over.load(Ordering::Relaxed) {
                let listing = listing(&site, "0");
                for identity in listing["identities"].as_array().unwrap() {
                    // Frames pass: held against the totals before and after the reading.
                    assert_eq!(identity["difference"], 0, "{identity}");
                }
                let page = site.scrape();
                assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
                // Beyond frames under way.
                assert_eq!(page.sum("edgemeter_ledger_breaches", |_| true), 0);
                looks += 1;
            }
            looks
        });
        let ended = load.join();
        over.store(true, Ordering::Relaxed);
        ended.unwrap();
        look.join().unwrap()
    });
    assert!(looks > 3, "looked {looks} times while it was going on");
    drop(sink);
    let page = site.quiet();
    assert_eq!(page.sum("edgemeter_ledger_difference_bytes", |_| true), 0);
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    // Each table was full, and says so.
    for cell in ["flows_full", "accounts_full"] {
        let bytes = page.sum("edgemeter_unattributed_bytes_total", |sample| {
            sample.label("cell") == cell
        });
        assert!(bytes > 0, "{cell}: {bytes}");
    }
    assert!(page.sum("edgemeter_slots_exhausted_total", |_| true) > 0);

    // What is over goes, its bytes stay, and there is room again.
    let started = Instant::now();
    loop {
        let listing = listing(&site, "0");
        exact(&listing);
        if listing["count"].as_u64().unwrap() < ROOM as u64 / 2 {
            let identities = listing["identities"].as_array().unwrap();
            let gone = identities.iter().map(|i| i["over"].as_u64().unwrap());
            assert!(gone.sum::<u64>() > ROOM as u64 / 2 * 142, "{listing}");
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{listing}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
