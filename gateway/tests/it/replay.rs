//! A capture of many kinds of frame, replayed through a tap device with our programs on it, against
//! Wireshark's dissector: every conversation's frames and bytes, and what is in none.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::IpAddr,
    os::fd::AsRawFd as _,
    process::Command,
};

use edgemeter::kernel::{AttachMode, Kernel, Options, Selection};
use flow_abi::cell;
use xtask::netns::Namespace;

use crate::packets::{ethernet, ipv4, ipv6, tcp, udp};

const FRAMES: u64 = 4000;
/// Sender, receiver, protocol.
type Conversation = (String, String, u8);

/// A generator of numbers that a failure can be repeated with.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

/// Hop-by-hop and destination options of eight bytes, segment routing with its one segment done:
/// chained.
fn extensions(dice: &mut Dice, last: u8) -> (u8, Vec<u8>) {
    let mut kinds = Vec::new();
    for kind in [0u8, 43, 60] {
        if dice.roll(3) == 0 {
            kinds.push(kind);
        }
    }
    let mut bytes = Vec::new();
    for (place, kind) in kinds.iter().enumerate() {
        let next = kinds.get(place + 1).copied().unwrap_or(last);
        match kind {
            43 => {
                bytes.extend([next, 2, 4, 0, 0, 0, 0, 0]);
                bytes.extend([0xfd; 16]);
            }
            // Padding of six bytes.
            _ => bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]),
        }
    }
    (kinds.first().copied().unwrap_or(last), bytes)
}

fn frame(dice: &mut Dice) -> Vec<u8> {
    let tags: &[u16] = [&[][..], &[], &[0x8100], &[0x88a8, 0x8100]][dice.roll(4)];
    let payload = [0, 1, 17, 300, 1200][dice.roll(5)];
    let (protocol, mut segment) = if dice.roll(2) == 0 {
        (
            6,
            tcp(
                [0, 12, 40][dice.roll(3)],
                [0x02, 0x10, 0x18, 0x11, 0x04][dice.roll(5)],
                payload,
            ),
        )
    } else {
        (17, udp(payload))
    };
    let port = u16::try_from(20_000 + dice.roll(25)).unwrap();
    segment[0..2].copy_from_slice(&port.to_be_bytes());
    let (kind, packet) = match dice.roll(12) {
        0..=4 => (
            0x0800,
            ipv4(protocol, [0, 4, 40][dice.roll(3)], 0x4000, &segment),
        ),
        5..=8 => {
            let (next, extensions) = extensions(dice, protocol);
            (0x86dd, ipv6(next, &extensions, &segment))
        }
        // A first and a later fragment.
        9 => (
            0x0800,
            ipv4(17, 0, [0x2000, 0x2001, 0x0009][dice.roll(3)], &segment),
        ),
        // Echo, GRE around IPv4, OSPF.
        10 => match dice.roll(3) {
            0 => (0x0800, ipv4(1, 0, 0, &[8, 0, 0, 0, 0, 1, 0, 1, 5, 5])),
            1 => {
                let mut tunnel = vec![0, 0, 8, 0];
                tunnel.extend(ipv4(17, 0, 0, &segment));
                (0x0800, ipv4(47, 0, 0, &tunnel))
            }
            _ => (0x0800, ipv4(89, 0, 0, &[2; 44])),
        },
        _ => (0x0806, [&[0, 1, 8, 0, 6, 4, 0, 1][..], &[9; 20]].concat()),
    };
    let mut frame = ethernet(tags, kind);
    frame.extend(packet);
    frame
}

/// A tap device without an address: nobody here answers.
fn tap(namespace: &Namespace) -> std::fs::File {
    /// `_IOW('T', 202, int)`.
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: plain data, valid when zeroed.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
        // SAFETY: an open descriptor and a filled request.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        file
    };
    let file = namespace.run(open).unwrap();
    for (what, how) in [("addrgenmode", "none"), ("mtu", "9000")] {
        namespace.ip(&["link", "set", "tap0", what, how]).unwrap();
    }
    namespace.ip(&["link", "set", "tap0", "up"]).unwrap();
    file
}

fn write_capture(path: &std::path::Path, frames: &[Vec<u8>]) {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65535, 1] {
        file.extend(word.to_ne_bytes());
    }
    for (number, frame) in frames.iter().enumerate() {
        let length = u32::try_from(frame.len()).unwrap();
        for word in [1, u32::try_from(number).unwrap(), length, length] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(frame);
    }
    std::fs::write(path, file).unwrap();
}

/// Conversations as Wireshark dissects them, with their frames and bytes, and the bytes of the rest.
fn dissected(capture: &std::path::Path) -> (BTreeMap<Conversation, (u64, u64)>, u64) {
    let fields = [
        "frame.len",
        "ip.src",
        "ip.dst",
        "ipv6.src",
        "ipv6.dst",
        "tcp.srcport",
        "tcp.dstport",
        "udp.srcport",
        "udp.dstport",
        "ip.proto",
        "ip.flags.mf",
        "ip.frag_offset",
    ];
    let mut tshark = Command::new("tshark");
    tshark
        .arg("-r")
        .arg(capture)
        .args(["-T", "fields", "-E", "separator=;", "-E", "occurrence=f"]);
    for name in [
        "ip.defragment",
        "ipv6.defragment",
        "tcp.desegment_tcp_streams",
    ] {
        tshark.args(["-o", &format!("{name}:FALSE")]);
    }
    for field in fields {
        tshark.args(["-e", field]);
    }
    let output = tshark.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count() as u64, FRAMES);
    let (mut conversations, mut rest) = (BTreeMap::new(), 0);
    for line in text.lines() {
        let field: Vec<&str> = line.split(';').collect();
        let bytes: u64 = field[0].parse().unwrap();
        let ports = |at: usize| (!field[at].is_empty()).then(|| (field[at], field[at + 1]));
        let fragment = matches!(field[10], "1" | "True") || !matches!(field[11], "" | "0");
        let known = match (ports(5), ports(7)) {
            (Some(ports), _) => Some((ports, 6)),
            (None, Some(ports)) => Some((ports, 17)),
            (None, None) => None,
        };
        let plain = matches!(field[9], "" | "6" | "17") && !fragment;
        let Some(((from, to), protocol)) = known.filter(|_| plain) else {
            rest += bytes;
            continue;
        };
        let address = |v4: usize, v6: usize| {
            let text = if field[v4].is_empty() {
                field[v6]
            } else {
                field[v4]
            };
            text.parse::<IpAddr>().unwrap()
        };
        let end = |ip: IpAddr, port: &str| format!("{ip} {port}");
        let key = (end(address(1, 3), from), end(address(2, 4), to), protocol);
        let sum: &mut (u64, u64) = conversations.entry(key).or_default();
        *sum = (sum.0 + 1, sum.1 + bytes);
    }
    (conversations, rest)
}

#[test]
fn a_replayed_capture_has_wiresharks_conversations() {
    crate::require_root();
    xtask::host::need(&[xtask::host::Tool::TSHARK]).unwrap();
    let mut dice = Dice(0x5eed);
    let frames: Vec<Vec<u8>> = (0..FRAMES).map(|_| frame(&mut dice)).collect();
    let directory = tempfile::tempdir().unwrap();
    let capture = directory.path().join("generated.pcap");
    write_capture(&capture, &frames);
    let (expected, rest) = dissected(&capture);
    assert!(expected.len() > 80, "{} conversations", expected.len());
    assert!(rest > 20_000);

    let namespace = Namespace::create(&Namespace::unique_prefix("rp")).unwrap();
    let mut tap = tap(&namespace);
    let (counted, cells) = namespace
        .run(|| {
            let mut kernel = Kernel::load(&Options {
                bpffs: None,
                ..crate::kernel::options()
            })
            .unwrap();
            let selection = Selection {
                include: vec!["tap0".into()],
                ..Selection::default()
            };
            let mut observer = kernel.observer(selection, AttachMode::Auto).unwrap();
            observer.begin().unwrap();
            for frame in &frames {
                assert_eq!(tap.write(frame).unwrap(), frame.len());
            }
            let mut counted = BTreeMap::new();
            kernel
                .maps
                .read_flows(|key, flow| {
                    let end = |address: [u8; 16], port: u16| {
                        format!("{} {port}", IpAddr::from(address).to_canonical())
                    };
                    let conversation = (
                        end(key.remote, key.remote_port),
                        end(key.local, key.local_port),
                        key.protocol,
                    );
                    assert_eq!(flow.tx_frames, 0);
                    counted.insert(conversation, (flow.rx_frames, flow.rx_bytes));
                })
                .unwrap();
            let reading = kernel.maps.read().unwrap();
            let cells: Vec<_> = reading
                .interfaces
                .values()
                .map(|cells| cells.cells[0])
                .collect();
            (counted, cells)
        })
        .unwrap();
    assert_eq!(counted, expected);
    assert_eq!(cells.len(), 1);
    let all: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
    let total = cells[0][cell::TOTAL];
    assert_eq!((total.frames, total.bytes), (FRAMES, all));
    let unattributed: u64 = cells[0].iter().map(|cell| cell.bytes).sum::<u64>() - total.bytes;
    assert_eq!(unattributed, rest);
    assert_eq!(cells[0][cell::UNPARSABLE].frames, 0);
    // Nothing was sent back.
    let mut space = [0; 2048];
    // SAFETY: a descriptor of ours.
    unsafe { libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    assert!(tap.read(&mut space).is_err());
}
