//! Interfaces that come and go, other namespaces, loopback, tunnels, stacks: each byte once, where
//! it crossed.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use edgemeter::{
    ledger::Balances,
    owner::{OwnerId, OwnerKind},
};
use flow_abi::{Direction, cell};
use xtask::{
    capture::FarEnd,
    load::{self, Protocol},
    netns::{End, GATEWAY_TO_CLIENT, Namespace, Veth},
};

use crate::harness::{PLAIN, Setup, Site};

const DEADLINE: Duration = Duration::from_secs(20);
const SELECTED: &str = "interfaces = [\"edge0\", \"svc0\"]";

/// Starts again with other lines in `[observe]`.
fn observing(name: &str, lines: &str) -> Site {
    let mut site = Site::start(name, &Setup::default());
    site.end(libc::SIGTERM);
    let text = std::fs::read_to_string(site.config()).unwrap();
    assert!(text.contains(SELECTED));
    std::fs::write(site.config(), text.replace(SELECTED, lines)).unwrap();
    site.launch();
    site
}

/// Waits until the log says it that often.
fn said(site: &Site, words: &str, times: usize) {
    let started = Instant::now();
    while site.log().matches(words).count() < times {
        assert!(
            started.elapsed() < DEADLINE,
            "never said {words:?}: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The ledger, once these interfaces' counts stand still.
fn settled(site: &Site, interfaces: &[&str]) -> Balances {
    let read = || {
        let balances = site.ledger().0;
        let counts: Vec<_> = interfaces
            .iter()
            .map(|name| totals(&balances, name))
            .collect();
        (counts, balances)
    };
    let (mut before, _) = read();
    for _ in 0..60 {
        std::thread::sleep(Duration::from_millis(400));
        let (now, balances) = read();
        if now == before {
            return balances;
        }
        before = now;
    }
    panic!("{interfaces:?} do not become quiet: {}", site.log());
}

/// `[rx, tx]` bytes of a cell.
fn cells(balances: &Balances, interface: &str, number: usize) -> [u64; 2] {
    [Direction::Rx, Direction::Tx].map(|direction| {
        balances
            .cells()
            .find(|(name, d, n, _, _)| *name == interface && *d == direction && *n == number)
            .map_or(0, |(_, _, _, bytes, _)| u64::try_from(bytes).unwrap())
    })
}

fn totals(balances: &Balances, interface: &str) -> [u64; 2] {
    cells(balances, interface, cell::TOTAL)
}

fn assert_conserved(balances: &Balances, interface: &str) {
    let balance = balances.by_interface()[interface];
    assert_eq!(balance.difference(), 0, "{interface}: {balance:?}");
}

#[test]
fn an_interface_that_comes_goes_and_comes_back_is_counted_each_time() {
    let site = observing(
        "if",
        "interfaces = [\"edge0\", \"svc0\", \"dyn*\"]\nexclude = [\"dyn9\"]",
    );
    let near_mac = [2, 0, 0, 0x77, 9, 1];
    let far_mac = [2, 0, 0, 0x77, 9, 2];
    let (near, far) = (Ipv4Addr::new(10, 77, 9, 1), Ipv4Addr::new(10, 77, 9, 2));
    let mut truth = [0, 0];
    for round in 1..=2 {
        let end = |namespace, device, mac| End {
            namespace,
            device,
            mac,
        };
        Veth::pair(
            end(&site.hosts.gateway, "dyn0", near_mac),
            end(&site.hosts.client, "far0", far_mac),
        )
        .unwrap();
        said(&site, "attached dyn0 egress", round);
        let capture = FarEnd::start(&site.hosts.client, "far0").unwrap();
        for (host, device, address, other, mac) in [
            (&site.hosts.gateway, "dyn0", near, far, far_mac),
            (&site.hosts.client, "far0", far, near, near_mac),
        ] {
            host.add_address(device, address.into(), 24).unwrap();
            host.add_neighbour(device, other.into(), mac).unwrap();
        }
        let bound = |host: &Namespace, address: Ipv4Addr| {
            host.run(|| UdpSocket::bind((address, 7009)).unwrap())
                .unwrap()
        };
        let (here, there) = (
            bound(&site.hosts.gateway, near),
            bound(&site.hosts.client, far),
        );
        for number in 0..200 {
            here.send_to(&vec![b'h'; number], (far, 7009)).unwrap();
            there
                .send_to(&vec![b't'; 2 * number], (near, 7009))
                .unwrap();
        }
        // Ticks every 100 ms: what it moved is posted while it is there, and stays posted.
        settled(&site, &["dyn0"]);
        let seen = capture.stop().unwrap();
        truth[0] += seen.sent_by(far_mac).bytes;
        truth[1] += seen.sent_by(near_mac).bytes;
        site.hosts.gateway.ip(&["link", "del", "dyn0"]).unwrap();
        said(&site, "dyn0: gone", round);
    }
    let balances = settled(&site, &["dyn0"]);
    assert!(truth[0] > 40_000 && truth[1] > 20_000, "{truth:?}");
    assert_eq!(totals(&balances, "dyn0"), truth);
    assert_conserved(&balances, "dyn0");
    // Excluded, though the pattern matches it.
    site.hosts
        .gateway
        .ip(&["link", "add", "dyn9", "type", "bridge"])
        .unwrap();
    site.hosts
        .gateway
        .ip(&["link", "add", "dyn8", "type", "bridge"])
        .unwrap();
    said(&site, "attached dyn8 egress", 1);
    assert!(!site.log().contains("attached dyn9"));
}

#[test]
fn another_namespaces_loopback_is_counted_once_and_apart() {
    const BYTES: usize = 300_000;
    let blue = Namespace::create(&Namespace::unique_prefix("ib")).unwrap();
    let name = blue.name().to_owned();
    let lines = format!("interfaces = [\"edge0\", \"svc0\", \"lo\"]\nnamespaces = [\"{name}\"]");
    blue.offloads("lo", "tso off gso off gro off").unwrap();
    let site = observing("in", &lines);
    said(&site, &format!("attached {name}/lo egress"), 1);
    let capture = FarEnd::start(&blue, "lo").unwrap();
    // The port of the gateway's listener, and not the gateway.
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PLAIN));
    blue.run(|| {
        let listener = TcpListener::bind(address).unwrap();
        let writer = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(&vec![b'x'; BYTES]).unwrap();
            });
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            writer.join().unwrap();
            all.len()
        });
        assert_eq!(writer, BYTES);
    })
    .unwrap();
    let place = format!("{name}/lo");
    let balances = settled(&site, &[&place]);
    let truth = capture.stop().unwrap().total();
    assert!(truth.bytes > BYTES as u64);
    assert_eq!(totals(&balances, &place), [0, truth.bytes]);
    assert_conserved(&balances, &place);
    let foreign = balances
        .amounts()
        .filter(|(interface, ..)| *interface == place)
        .all(|(_, _, owner, _)| owner == OwnerId::FOREIGN);
    assert!(foreign, "another namespace's port 8080 is not our listener");
    // Loopback of the gateway's own namespace has the same index, and a name of its own.
    assert!(totals(&balances, "lo")[1] > 0 && totals(&balances, "lo")[0] == 0);
    let mut edgemeter = site
        .hosts
        .gateway
        .command(env!("CARGO_BIN_EXE_edgemeter"))
        .unwrap();
    let output = edgemeter
        .args([
            "connections",
            "--state",
            "all",
            "--port",
            "8080",
            "--config",
        ])
        .arg(site.config())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("{name}/127.0.0.1")), "{text}");
}

/// A tun device: frames without an Ethernet header, and we are the other end of it.
fn tun(namespace: &Namespace, device: &str) -> std::fs::File {
    /// `_IOW('T', 202, int)`.
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let open = || {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        // SAFETY: plain data, valid when zeroed.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
        // SAFETY: an open descriptor and a filled request.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        file
    };
    namespace.run(open).unwrap()
}

fn ipv4(protocol: u8, source: Ipv4Addr, destination: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + body.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let checksum = ones_complement(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(body);
    packet
}

fn ones_complement(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

#[test]
fn a_tunnels_packets_are_parsed_without_an_ethernet_header() {
    let site = observing("it", "interfaces = [\"edge0\", \"svc0\", \"tun*\"]");
    let mut wire = tun(&site.hosts.gateway, "tun0");
    let (near, far) = (Ipv4Addr::new(10, 77, 8, 1), Ipv4Addr::new(10, 77, 8, 2));
    site.hosts
        .gateway
        .ip(&["link", "set", "tun0", "addrgenmode", "none"])
        .unwrap();
    site.hosts
        .gateway
        .ip(&["link", "set", "tun0", "up"])
        .unwrap();
    site.hosts
        .gateway
        .ip(&["addr", "add", &format!("{near}/24"), "dev", "tun0"])
        .unwrap();
    said(&site, "attached tun0 egress", 1);
    let socket = site
        .hosts
        .gateway
        .run(|| UdpSocket::bind((near, 7010)).unwrap())
        .unwrap();
    // In: UDP and echo requests; out: UDP, and the kernel's echo replies.
    let (mut received, mut icmp) = (0u64, 0u64);
    for size in [0usize, 1, 700, 1400] {
        let mut datagram = vec![0x1b, 0x63, 0x1b, 0x62, 0, 0, 0, 0];
        datagram[4..6].copy_from_slice(&u16::try_from(8 + size).unwrap().to_be_bytes());
        datagram.extend(vec![b'u'; size]);
        let packet = ipv4(17, far, near, &datagram);
        wire.write_all(&packet).unwrap();
        received += packet.len() as u64;
        let mut echo = vec![8, 0, 0, 0, 0, 7, 0, 1];
        echo.extend(vec![b'e'; size]);
        let checksum = ones_complement(&echo);
        echo[2..4].copy_from_slice(&checksum.to_be_bytes());
        let packet = ipv4(1, far, near, &echo);
        wire.write_all(&packet).unwrap();
        icmp += packet.len() as u64;
        socket.send_to(&vec![b'o'; size], (far, 7011)).unwrap();
    }
    let (mut sent, mut replies) = (0u64, 0u64);
    let mut buffer = [0; 4096];
    for _ in 0..8 {
        let len = wire.read(&mut buffer).unwrap();
        match buffer[9] {
            1 => replies += len as u64,
            17 => sent += len as u64,
            other => panic!("protocol {other}"),
        }
    }
    let balances = settled(&site, &["tun0"]);
    assert_eq!(totals(&balances, "tun0"), [received + icmp, sent + replies]);
    assert_eq!(cells(&balances, "tun0", cell::ICMP), [icmp, replies]);
    assert_eq!(cells(&balances, "tun0", cell::UNPARSABLE), [0, 0]);
    assert_eq!(cells(&balances, "tun0", cell::NON_IP), [0, 0]);
    let owned: i64 = balances
        .amounts()
        .filter(|(interface, ..)| *interface == "tun0")
        .map(|(_, _, _, amount)| amount.wire_bytes)
        .sum();
    assert_eq!(u64::try_from(owned).unwrap(), received + sent);
    assert_conserved(&balances, "tun0");
}

#[test]
fn a_frame_on_a_bridge_and_its_port_is_two_interfaces_and_one_routes() {
    let site = observing("ir", "interfaces = [\"*\"]\nexclude = [\"lo\"]");
    let gateway = &site.hosts.gateway;
    let link = GATEWAY_TO_CLIENT;
    let mac = link.mac.map(|byte| format!("{byte:02x}")).join(":");
    gateway
        .ip(&[
            "link",
            "add",
            "br0",
            "address",
            &mac,
            "type",
            "bridge",
            "mcast_snooping",
            "0",
        ])
        .unwrap();
    gateway
        .ip(&["link", "set", "br0", "addrgenmode", "none"])
        .unwrap();
    gateway.ip(&["link", "set", "br0", "up"]).unwrap();
    gateway
        .ip(&["link", "set", "edge0", "master", "br0"])
        .unwrap();
    said(&site, "br0: inner now", 1);
    // The address moves to the bridge, as it does on real hosts.
    gateway.ip(&["addr", "flush", "dev", "edge0"]).unwrap();
    gateway.add_address("br0", link.v4.into(), 24).unwrap();
    gateway
        .add_neighbour("br0", link.far_v4.into(), link.far_mac)
        .unwrap();
    let far = FarEnd::start(&site.hosts.client, link.far_device).unwrap();
    let before = settled(&site, &["edge0", "br0"]);
    let plan = site.plan(link.v4.into(), false, Protocol::Http1, 60);
    load::run(&site.hosts.client, &plan).unwrap();
    let after = settled(&site, &["edge0", "br0"]);
    let seen = far.stop().unwrap();
    let moved = |interface: &str| {
        let (before, after) = (totals(&before, interface), totals(&after, interface));
        [after[0] - before[0], after[1] - before[1]]
    };
    let truth = [
        seen.sent_by(link.far_mac).bytes,
        seen.sent_by(link.mac).bytes,
    ];
    assert_eq!(moved("edge0"), truth, "the cable");
    assert_eq!(moved("br0"), truth, "the same frames, on the bridge");
    for interface in ["edge0", "br0"] {
        assert_conserved(&after, interface);
    }
    let (_, owners) = site.ledger();
    let of_routes = |interface: &str| -> i64 {
        after
            .amounts()
            .filter(|(name, _, id, _)| {
                *name == interface
                    && owners
                        .get(id)
                        .is_some_and(|owner| owner.kind == OwnerKind::Route)
            })
            .map(|(_, _, _, amount)| amount.wire_bytes)
            .sum()
    };
    assert!(of_routes("edge0") > 0);
    assert_eq!(of_routes("br0"), 0, "a route pays for a frame once");
}
