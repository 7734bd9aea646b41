//! What happens on a TCP stream besides requests in turn: a first request that comes with the TLS
//! handshake, pipelining, a tuple used again at once, resets, keep-alive probes, closed windows.
//! Each frame the far end captured is given its owner here, from what the client knows of its own
//! stream, and the ledger must say the same: bytes and frames, difference 0.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::fd::AsRawFd as _,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use flow_abi::Direction;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use xtask::{
    capture::{Capture, FarEnd},
    netns::GATEWAY_TO_CLIENT,
};

use crate::{
    harness::{PLAIN, Setup, Site, TLS},
    talk::{
        Heard, OVERHEAD, Talk, UNCLAIMED, by_capture, by_ledger, connect_from, frames, get,
        is_bare, of, option, post,
    },
};

fn address(port: u16) -> SocketAddr {
    (GATEWAY_TO_CLIENT.v4, port).into()
}

/// TLS without tickets that carry over: each handshake is a whole one.
fn tls(site: &Site, version: &'static rustls::SupportedProtocolVersion) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(site.certificate.root.clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Arc::new(config)
}

/// Runs clients at the far end of the cable, and returns what was captured there meanwhile.
fn captured(site: &Site, clients: impl FnOnce() -> Vec<Heard> + Send) -> (Capture, Vec<Heard>) {
    let capture = FarEnd::start(&site.hosts.client, GATEWAY_TO_CLIENT.far_device).unwrap();
    let heard = site.hosts.client.run(clients).unwrap();
    site.quiet();
    (capture.stop().unwrap(), heard)
}

/// Drops a share of what comes in on a port's connections, behind the gateway's programs.
fn lose_at_the_gateway(site: &Site, port: u16, percent: u32) {
    use std::io::Write as _;
    let rules = format!(
        "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
         tcp dport {port} tcp flags & (fin | syn | rst) == 0 \
         numgen random mod 100 < {percent} counter drop\n }}\n}}\n"
    );
    xtask::host::need(&[xtask::host::Tool::NFT]).unwrap();
    let mut nft = site.hosts.gateway.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin
        .take()
        .unwrap()
        .write_all(rules.as_bytes())
        .unwrap();
    assert!(nft.wait().unwrap().success());
}

/// How the end of the handshake and the first request go out.
#[derive(Clone, Copy)]
enum Way {
    Together,
    OneAfterTheOther,
    /// The flight and this much of what follows; the rest later.
    Cut(usize),
    /// In pieces of this much.
    Pieces(usize),
}

fn first_request(config: &Arc<ClientConfig>, way: Way, upload: usize) -> Heard {
    let mut talk = Talk::shaken(connect_from(0, address(TLS)), config);
    let flight = talk.pending.len();
    talk.ask("upload", &post("upload", 700, upload));
    match way {
        Way::Together => {}
        Way::OneAfterTheOther => talk.send_some(flight),
        Way::Cut(more) => {
            talk.send_some(flight + more);
            std::thread::sleep(Duration::from_millis(15));
        }
        Way::Pieces(bytes) => {
            while talk.pending.len() > bytes {
                talk.send_some(bytes);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    talk.send();
    talk.answer("upload", 700);
    // A second request: what is left over of the first would show here.
    talk.ask("small", &get("small", 5000));
    talk.send();
    talk.answer("small", 5000);
    talk.heard()
}

const WAYS: [(Way, usize); 8] = [
    (Way::Together, 0),
    (Way::Together, 900),
    (Way::Together, 9_000),
    (Way::OneAfterTheOther, 200),
    (Way::Cut(1), 300),
    (Way::Cut(40), 2_000),
    (Way::Pieces(50), 120),
    (Way::Pieces(33), 10),
];

#[test]
fn a_first_request_that_comes_with_the_handshake_is_not_overhead() {
    let site = Site::start("sh", &Setup::default());
    let configs = [&rustls::version::TLS13, &rustls::version::TLS12].map(|v| tls(&site, v));
    let (capture, heard) = captured(&site, || {
        let mut heard = Vec::new();
        for config in &configs {
            for (way, upload) in WAYS {
                heard.push(first_request(config, way, upload));
            }
        }
        heard
    });
    let expected = by_capture(&capture, TLS, &heard);
    assert!(expected[&(Direction::Rx, "upload".into())].0 > 20_000);
    assert_eq!(by_ledger(&site), expected);
    let page = site.scrape();
    assert_eq!(
        page.sum("edgemeter_handshakes_undivided_total", |_| true),
        0
    );
}

#[test]
fn a_lost_and_repeated_handshake_is_still_not_the_first_requests() {
    let site = Site::start("si", &Setup::default());
    lose_at_the_gateway(&site, TLS, 12);
    site.lose_at_the_client(3);
    let config = tls(&site, &rustls::version::TLS13);
    let (capture, heard) = captured(&site, || {
        let mut heard = Vec::new();
        for _ in 0..3 {
            for (way, upload) in WAYS {
                heard.push(first_request(&config, way, upload));
            }
        }
        heard
    });
    let expected = by_capture(&capture, TLS, &heard);
    let mut counted = by_ledger(&site);
    assert_eq!(of(&counted, Direction::Tx), of(&expected, Direction::Tx));
    // What is repeated after its request has been received whole has nobody to claim it, or the
    // next request does: the routes and the unclaimed together are what the capture says.
    let late = counted
        .remove(&(Direction::Rx, UNCLAIMED.into()))
        .unwrap_or_default();
    let sum = |owned: &crate::talk::Owned| {
        let routes = of(owned, Direction::Rx)
            .into_iter()
            .filter(|(owner, _)| *owner != OVERHEAD);
        routes.fold((0, 0), |sum, (_, one)| (sum.0 + one.0, sum.1 + one.1))
    };
    let routes = sum(&counted);
    let overhead = (Direction::Rx, OVERHEAD.to_owned());
    let (own, own_expected) = (counted[&overhead], expected[&overhead]);
    let all = (routes.0 + late.0 + own.0, routes.1 + late.1 + own.1);
    let all_expected = sum(&expected);
    assert_eq!(
        all,
        (
            all_expected.0 + own_expected.0,
            all_expected.1 + own_expected.1
        )
    );
    // A frame of the handshake that is repeated after it has ended counts with the requests.
    let mut seen = std::collections::BTreeSet::new();
    let repeated = capture.segments().iter().filter(|segment| {
        segment.flow.destination_port == TLS
            && segment.payload > 0
            && !seen.insert((segment.flow, segment.seq))
    });
    let repeated = i64::try_from(repeated.map(|segment| segment.bytes).sum::<u64>()).unwrap();
    let moved = own_expected.0 - own.0;
    assert!((0..=repeated).contains(&moved), "{moved} of {repeated}");
}

/// All requests at once, then all answers.
fn pipelined(mut talk: Talk, rounds: usize) -> Heard {
    let kinds = |round: usize| {
        [
            ("small", 100 + round),
            ("large", 60_000 + 977 * round),
            ("upload", 1),
        ]
    };
    for round in 0..rounds {
        for (route, body) in kinds(round) {
            let request = if route == "upload" {
                post(route, body, 500)
            } else {
                get(route, body)
            };
            talk.ask(route, &request);
        }
    }
    talk.send();
    for round in 0..rounds {
        for (route, body) in kinds(round) {
            talk.answer(route, body);
        }
    }
    talk.heard()
}

fn pipelining(name: &str, port: u16) {
    let site = Site::start(name, &Setup::default());
    site.lose_at_the_client(3);
    let config = tls(&site, &rustls::version::TLS13);
    let (capture, heard) = captured(&site, || {
        std::thread::scope(|scope| {
            // They inherit the namespace.
            let clients: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let stream = connect_from(0, address(port));
                        let talk = if port == TLS {
                            Talk::shaken(stream, &config)
                        } else {
                            Talk::plain(stream)
                        };
                        pipelined(talk, 5)
                    })
                })
                .collect();
            clients
                .into_iter()
                .map(|client| client.join().unwrap())
                .collect()
        })
    });
    let expected = by_capture(&capture, port, &heard);
    let counted = by_ledger(&site);
    assert_eq!(of(&counted, Direction::Tx), of(&expected, Direction::Tx));
    // Received, a pipelined request's bytes are whoever's is being served when they come; none is
    // lost, and the connection's own are told from them.
    let sums = |owned: &crate::talk::Owned| {
        let mut sums: BTreeMap<bool, (i64, i64)> = BTreeMap::new();
        for (owner, (bytes, frames)) in of(owned, Direction::Rx) {
            let sum = sums.entry(owner == OVERHEAD).or_default();
            *sum = (sum.0 + bytes, sum.1 + frames);
        }
        sums
    };
    assert_eq!(sums(&counted), sums(&expected));
    let (balances, _) = site.ledger();
    let retransmits: i64 = balances
        .amounts()
        .map(|(_, _, _, amount)| amount.retransmit_frames)
        .sum();
    assert!(retransmits > 0, "3 % loss and none repeated");
}

#[test]
fn pipelined_answers_are_their_routes_under_loss() {
    pipelining("sp", PLAIN);
}

#[test]
fn pipelined_answers_are_their_routes_over_tls_under_loss() {
    pipelining("sq", TLS);
}

#[test]
fn a_tuple_used_again_at_once_is_another_connection() {
    let site = Site::start("st", &Setup::default());
    let configs = tls(&site, &rustls::version::TLS13);
    for port in [PLAIN, TLS] {
        let already = by_ledger(&site);
        let (capture, heard) = captured(&site, || {
            let mut heard = Vec::new();
            for round in 0..24usize {
                let stream = connect_from(40_001, address(port));
                let mut talk = match port {
                    TLS => Talk::shaken(stream, &configs),
                    _ => Talk::plain(stream),
                };
                let route = ["small", "large", "upload"][round % 3];
                let body = 1000 * round;
                let reset = round % 2 == 0;
                let mut request = get(route, body);
                if !reset {
                    // The gateway ends it, and holds the tuple in TIME_WAIT.
                    request.truncate(request.len() - 2);
                    request.extend_from_slice(b"connection: close\r\n\r\n");
                }
                talk.ask(route, &request);
                talk.send();
                talk.answer(route, body);
                if reset {
                    let linger = libc::linger {
                        l_onoff: 1,
                        l_linger: 0,
                    };
                    option(
                        talk.stream.as_raw_fd(),
                        libc::SOL_SOCKET,
                        libc::SO_LINGER,
                        &linger,
                    );
                } else {
                    talk.end();
                }
                heard.push(talk.heard());
            }
            heard
        });
        let expected = by_capture(&capture, port, &heard);
        let mut counted = by_ledger(&site);
        for (key, (bytes, frames)) in already {
            let sum = counted.get_mut(&key).unwrap();
            *sum = (sum.0 - bytes, sum.1 - frames);
        }
        counted.retain(|_, sum| *sum != (0, 0));
        assert!(
            frames(&capture, |segment| segment.flags & 4 != 0) >= 12,
            "no resets"
        );
        assert_eq!(counted, expected, "port {port}");
    }
}

#[test]
fn probes_and_closed_windows_are_the_connections_own() {
    let site = Site::start("sz", &Setup::default());
    const BODY: usize = 12_000_000;
    let (capture, heard) = captured(&site, || {
        let mut talk = Talk::plain(connect_from(0, address(PLAIN)));
        let fd = talk.stream.as_raw_fd();
        for (level, name, value) in [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1),
        ] {
            option(fd, level, name, &value);
        }
        talk.ask("small", &get("small", 100));
        talk.send();
        talk.answer("small", 100);
        std::thread::sleep(Duration::from_millis(3500));
        talk.ask("large", &get("large", BODY));
        talk.send();
        // A reader that stops: its buffer fills, it closes its window, and is probed.
        std::thread::sleep(Duration::from_millis(2500));
        talk.answer("large", BODY);
        talk.ask("upload", &post("upload", 10, 2000));
        talk.send();
        talk.answer("upload", 10);
        vec![talk.heard()]
    });
    let closed = frames(&capture, |segment| {
        is_bare(segment, PLAIN) && segment.window == 0
    });
    assert!(closed >= 2, "the window was closed {closed} times");
    let mut next = None;
    let probes = frames_in_order(&capture, |segment| {
        let probe = is_bare(segment, PLAIN) && next == Some(segment.seq.wrapping_add(1));
        if segment.flow.destination_port == PLAIN && segment.payload > 0 {
            next = Some(
                segment
                    .seq
                    .wrapping_add(u32::try_from(segment.payload).unwrap()),
            );
        }
        probe
    });
    assert!(probes >= 2, "{probes} keep-alive probes");
    assert_eq!(by_ledger(&site), by_capture(&capture, PLAIN, &heard));
    // The connection's row says how often; its socket has to be told apart, then ended.
    let started = Instant::now();
    loop {
        let page = site.scrape();
        let told = page.sum("edgemeter_connection_zero_windows_total", |sample| {
            sample.label("sender") == "peer" && sample.label("endpoint") == "plain"
        });
        if told == i128::try_from(closed).unwrap() {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{told} closed windows told, {closed} captured"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn frames_in_order(
    capture: &Capture,
    mut of: impl FnMut(&xtask::capture::Segment) -> bool,
) -> usize {
    capture
        .segments()
        .iter()
        .filter(|segment| of(segment))
        .count()
}
