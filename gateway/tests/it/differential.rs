//! The kernel's parser against another one: tens of thousands of generated and mutated frames go
//! through the TC programs and through etherparse, and both must say the same.
//!
//! For each frame [`expect`] works out, from what etherparse found, the one place that must grow
//! and by how much. Where the two parsers differ on purpose, a [`Rule`] says so and why.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
};

use aya::{
    Ebpf,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use edgemeter::kernel::{self, Maps, Options, Reading};
use etherparse::{
    EtherType, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6RawExtHeaderSlice,
    LaxIpv6Slice, LaxLinkExtSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice, TcpSlice, UdpSlice,
    ether_type::{
        IPV4, IPV6, MACSEC, PROVIDER_BRIDGING, VLAN_DOUBLE_TAGGED_FRAME, VLAN_TAGGED_FRAME,
    },
    ip_number::{
        AUTH, ICMP, IPV6_DEST_OPTIONS, IPV6_FRAG, IPV6_HOP_BY_HOP, IPV6_ICMP as ICMP6, IPV6_ROUTE,
        TCP, UDP,
    },
};
use flow_abi::{
    Account, AccountKey, CLASS_DEFAULT, Cell, FlowKey, InterfaceCells, OWNER_FOREIGN, cell, name,
};

/// Frame `n` is made from `SEED + n` alone.
const SEED: u64 = 0x0edb_e7e5_2026_0001;
const FRAMES: u64 = 40_000;
/// Frames on one load of the programs: small enough for its flows to be read as a whole.
const BATCH: u64 = 2_000;
/// `TC_ACT_UNSPEC`: the next program, or the stack, decides.
const UNSPEC: u32 = u32::MAX;
/// The interface of a test run.
const LOOPBACK: u32 = 1;
/// A test run takes less than a page, headroom and tailroom included.
const LONGEST: usize = 3400;
const DIRECTIONS: [(usize, &str); 2] = [(0, name::INGRESS), (1, name::EGRESS)];

// ---------------------------------------------------------------------------------------------
// The reference: what must grow.

/// Where the kernel program and etherparse differ, by design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    /// At most two tags are looked behind (QinQ); etherparse takes three off.
    ThirdTag,
    /// 0x9100 is no standard's, and Linux makes no VLAN device of it: a tag to etherparse only.
    Tag9100,
    /// A MACsec frame is not for this interface's flows: the MACsec device above has them.
    Macsec,
    /// The ethertype decides the IP version, as in the stack; etherparse believes the nibble.
    VersionMismatch,
    /// An authenticated packet is another protocol (ESP is, too); etherparse looks behind it.
    Authentication,
    /// Hop-by-hop options in the wrong place are read all the same: the ports behind are real.
    LateHopByHop,
    /// At most six extension headers are looked behind, for the verifier wants a bound: a seventh
    /// is "another protocol".
    SevenExtensions,
    /// An IPv4 total length below the header's own is malformed (zero is a jumbo's); etherparse
    /// takes the frame's end instead.
    TotalBelowHeader,
    /// IPv4 options or an IPv6 extension are cut off, but the part that is there names a better
    /// reason (fragment, other protocol) than "unparsable".
    CutBehindReason,
    /// Payload goes to the end of the IP packet; etherparse ends it at the UDP length.
    UdpLength,
    /// A run of segments is payload to its end: the length field is one segment's, or zero.
    SegmentedLength,
}

/// Source and destination as on the wire, before they become local and remote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    source: [u8; 16],
    destination: [u8; 16],
    ports: [u16; 2],
    protocol: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Cell(usize),
    Flow { tuple: Tuple, header_len: usize },
}

#[derive(Clone, Debug)]
struct Headers {
    found: Found,
    rules: Vec<Rule>,
}

impl Headers {
    fn cell(number: usize) -> Self {
        Self {
            found: Found::Cell(number),
            rules: Vec::new(),
        }
    }

    fn by(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }
}

/// What one frame adds in one direction.
#[derive(Clone, Debug)]
struct Expected {
    place: Place,
    bytes: u64,
    frames: u64,
    payload: u64,
    rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Cell(usize),
    Flow(FlowKey),
}

fn expect(frame: &Frame, direction: usize) -> Expected {
    let bytes = &frame.bytes;
    let packet = LaxSlicedPacket::from_ethernet(bytes).unwrap();
    let tagged = link(&packet);
    let Headers { found, rules } = headers(bytes);

    let len = bytes.len();
    let mut expected = Expected {
        place: Place::Cell(0),
        bytes: number(len),
        frames: 1,
        payload: 0,
        rules,
    };
    let (tuple, header_len) = match found {
        Found::Cell(number) => {
            expected.place = Place::Cell(number);
            return expected;
        }
        Found::Flow { tuple, header_len } => (tuple, header_len),
    };
    let (source, destination) = (
        (tuple.source, tuple.ports[0]),
        (tuple.destination, tuple.ports[1]),
    );
    let (local, remote) = if direction == 0 {
        (destination, source)
    } else {
        (source, destination)
    };
    expected.place = Place::Flow(FlowKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        ifindex: LOOPBACK,
        protocol: tuple.protocol,
        reserved: [0; 3],
    });
    let end = tagged.map_or(len, |(_, offset)| {
        packet_end(&packet, offset).unwrap_or(len)
    });
    let by_length = end.min(len).saturating_sub(header_len);
    let behind = len.saturating_sub(header_len);
    if frame.gso_size != 0 && behind != 0 {
        // The kernel hands over a run of segments; the wire carries the headers of each.
        if by_length != behind {
            expected.rules.push(Rule::SegmentedLength);
        }
        expected.payload = number(behind);
        expected.frames = number(behind).div_ceil(u64::from(frame.gso_size));
        expected.bytes += (expected.frames - 1) * number(header_len);
    } else {
        expected.payload = number(by_length);
        if let Some(etherparse::TransportSlice::Udp(udp)) = &packet.transport
            && udp.payload().len() != by_length
        {
            expected.rules.push(Rule::UdpLength);
        }
    }
    expected
}

/// The IP ethertype behind the tags and where its packet begins, or why there is none.
fn link(packet: &LaxSlicedPacket<'_>) -> Result<(EtherType, usize), Headers> {
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
        panic!("fourteen bytes are an Ethernet header");
    };
    let mut ethertype = ethernet.ether_type();
    let mut tags = 0;
    for extension in &packet.link_exts {
        match extension {
            LaxLinkExtSlice::Vlan(tag) if ethertype != VLAN_DOUBLE_TAGGED_FRAME && tags < 2 => {
                ethertype = tag.ether_type();
                tags += 1;
            }
            LaxLinkExtSlice::Vlan(_) | LaxLinkExtSlice::Macsec(_) => break,
        }
    }
    let non_ip = Headers::cell(cell::NON_IP);
    match ethertype {
        VLAN_TAGGED_FRAME | PROVIDER_BRIDGING if tags == 2 => Err(non_ip.by(Rule::ThirdTag)),
        // Not taken off above: it is cut short.
        VLAN_TAGGED_FRAME | PROVIDER_BRIDGING => Err(Headers::cell(cell::UNPARSABLE)),
        VLAN_DOUBLE_TAGGED_FRAME => Err(non_ip.by(Rule::Tag9100)),
        MACSEC => Err(non_ip.by(Rule::Macsec)),
        IPV4 | IPV6 => Ok((ethertype, 14 + 4 * tags)),
        _ => Err(non_ip),
    }
}

/// Everything up to the layer-4 payload.
fn headers(frame: &[u8]) -> Headers {
    let packet = LaxSlicedPacket::from_ethernet(frame).unwrap();
    let (ethertype, offset) = match link(&packet) {
        Ok(found) => found,
        Err(why) => return why,
    };
    match (&packet.net, ethertype) {
        (Some(LaxNetSlice::Ipv4(ip)), IPV4) => {
            let header = ip.header();
            let options = header.slice().len();
            if let Some(cell) = ipv4_cell(header) {
                return cell;
            }
            layer4(
                mapped(header.source()),
                mapped(header.destination()),
                header.protocol(),
                ip.payload().payload,
                offset + options,
            )
        }
        (Some(LaxNetSlice::Ipv6(ip)), IPV6) => ipv6(ip, frame, offset),
        (Some(_), _) => Headers::cell(cell::UNPARSABLE).by(Rule::VersionMismatch),
        (None, IPV4) => {
            // Cut off. The fixed header may be there all the same, and say why it does not matter.
            let mut whole = frame[offset..].to_vec();
            let fixed = whole.len() >= 20;
            whole.resize(60, 0);
            match Ipv4HeaderSlice::from_slice(&whole) {
                Ok(header) if fixed => match ipv4_cell(header) {
                    Some(cell) if cell.found == Found::Cell(cell::UNPARSABLE) => cell,
                    Some(cell) => cell.by(Rule::CutBehindReason),
                    None => Headers::cell(cell::UNPARSABLE),
                },
                _ => Headers::cell(cell::UNPARSABLE),
            }
        }
        (None, _) => Headers::cell(cell::UNPARSABLE),
    }
}

/// The cell an IPv4 header alone is reason for.
fn ipv4_cell(header: Ipv4HeaderSlice<'_>) -> Option<Headers> {
    let total = usize::from(header.total_len());
    if total != 0 && total < header.slice().len() {
        Some(Headers::cell(cell::UNPARSABLE).by(Rule::TotalBelowHeader))
    } else if header.is_fragmenting_payload() {
        Some(Headers::cell(cell::FRAGMENT))
    } else if header.protocol() == AUTH {
        Some(Headers::cell(cell::OTHER_L4).by(Rule::Authentication))
    } else if matches!(header.protocol(), ICMP | ICMP6) {
        Some(Headers::cell(cell::ICMP))
    } else if !matches!(header.protocol(), TCP | UDP) {
        Some(Headers::cell(cell::OTHER_L4))
    } else {
        None
    }
}

fn ipv6(ip: &LaxIpv6Slice<'_>, frame: &[u8], offset: usize) -> Headers {
    // etherparse's own chain may stop early, and its iterator is then out of bounds: take the
    // headers one by one from what it takes for the IP packet.
    let extensions = ip.extensions().slice();
    let start = offset + 40;
    let end = start + extensions.len() + ip.payload().payload.len();
    let mut at = start;
    let mut next = ip.header().next_header();
    let mut walked = 0;
    let mut late = None;
    while is_extension(next) {
        let rest = &frame[at..end];
        if walked == 6 {
            return Headers::cell(cell::OTHER_L4).by(Rule::SevenExtensions);
        }
        if next == IPV6_HOP_BY_HOP && walked > 0 {
            late = Some(Rule::LateHopByHop);
        }
        if next == IPV6_FRAG {
            let Ok(head) = Ipv6FragmentHeaderSlice::from_slice(rest) else {
                return cut_extension(next, rest, walked);
            };
            if head.is_fragmenting_payload() {
                return Headers::cell(cell::FRAGMENT);
            }
            next = head.next_header();
            at += head.slice().len();
        } else {
            let Ok(head) = Ipv6RawExtHeaderSlice::from_slice(rest) else {
                return cut_extension(next, rest, walked);
            };
            next = head.next_header();
            at += head.slice().len();
        }
        walked += 1;
    }
    let mut found = match next {
        TCP | UDP => {
            if late.is_none() {
                // Then etherparse has come as far.
                assert_eq!(
                    (ip.payload().ip_number, extensions.len()),
                    (next, at - start)
                );
            }
            layer4(
                ip.header().source(),
                ip.header().destination(),
                next,
                &frame[at..end],
                at,
            )
        }
        AUTH => Headers::cell(cell::OTHER_L4).by(Rule::Authentication),
        ICMP | ICMP6 => Headers::cell(cell::ICMP),
        _ => Headers::cell(cell::OTHER_L4),
    };
    found.rules.extend(late);
    found
}

/// An extension header that does not fit: nothing follows it, but its first bytes may already be
/// reason for a cell.
fn cut_extension(kind: IpNumber, rest: &[u8], walked: usize) -> Headers {
    let mut whole = rest.to_vec();
    whole.resize(8 * 256, 0);
    let next = if kind == IPV6_FRAG {
        if rest.len() < 4 {
            return Headers::cell(cell::UNPARSABLE);
        }
        let head = Ipv6FragmentHeaderSlice::from_slice(&whole).unwrap();
        if head.is_fragmenting_payload() {
            return Headers::cell(cell::FRAGMENT).by(Rule::CutBehindReason);
        }
        head.next_header()
    } else {
        if rest.len() < 2 {
            return Headers::cell(cell::UNPARSABLE);
        }
        Ipv6RawExtHeaderSlice::from_slice(&whole)
            .unwrap()
            .next_header()
    };
    if matches!(next, TCP | UDP) || (is_extension(next) && walked + 1 < 6) {
        Headers::cell(cell::UNPARSABLE)
    } else if matches!(next, ICMP | ICMP6) {
        Headers::cell(cell::ICMP).by(Rule::CutBehindReason)
    } else {
        Headers::cell(cell::OTHER_L4).by(Rule::CutBehindReason)
    }
}

fn is_extension(number: IpNumber) -> bool {
    matches!(
        number,
        IPV6_HOP_BY_HOP | IPV6_DEST_OPTIONS | IPV6_ROUTE | IPV6_FRAG
    )
}

/// TCP or UDP at `offset` of the frame, with `rest` of the packet there.
fn layer4(
    source: [u8; 16],
    destination: [u8; 16],
    protocol: IpNumber,
    rest: &[u8],
    offset: usize,
) -> Headers {
    let flow = |ports, length| Headers {
        found: Found::Flow {
            tuple: Tuple {
                source,
                destination,
                ports,
                protocol: protocol.0,
            },
            header_len: offset + length,
        },
        rules: Vec::new(),
    };
    let tcp = |tcp: &TcpSlice<'_>| {
        flow(
            [tcp.source_port(), tcp.destination_port()],
            tcp.header_len(),
        )
    };
    if protocol == UDP {
        return UdpSlice::from_slice_lax(rest).map_or_else(
            |_| Headers::cell(cell::UNPARSABLE),
            |udp| flow([udp.source_port(), udp.destination_port()], 8),
        );
    }
    match TcpSlice::from_slice(rest) {
        Ok(found) => tcp(&found),
        Err(_) => Headers::cell(cell::UNPARSABLE),
    }
}

fn mapped(address: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets()
}

/// Where the IP packet ends within the frame by its own length field; None when that is zero.
fn packet_end(packet: &LaxSlicedPacket<'_>, offset: usize) -> Option<usize> {
    let length = match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => usize::from(ip.header().total_len()),
        LaxNetSlice::Ipv6(ip) => match ip.header().payload_length() {
            0 => 0,
            length => 40 + usize::from(length),
        },
        LaxNetSlice::Arp(_) => 0,
    };
    (length != 0).then_some(offset + length)
}

// ---------------------------------------------------------------------------------------------
// The frames.

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds must not make neighbouring states.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self((state ^ (state >> 32)).max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[2]
    }

    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from((self.next() >> 16) % number(bound)).unwrap()
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }
}

#[derive(Clone, Debug)]
struct Frame {
    bytes: Vec<u8>,
    gso_size: u32,
    gso_segs: u32,
}

/// Ethertypes and tag protocol ids a swap puts in place of another.
const ETHERTYPES: [u16; 10] = [
    0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x88e5, 0x0806, 0x88cc, 0x0040, 0x8847,
];
/// Neither TCP nor UDP: ICMP, IGMP, IP in IP, IPv6 in IP, GRE, ESP, AH, ICMPv6, none, SCTP, UDP-Lite.
const OTHERS: [u8; 11] = [1, 2, 4, 41, 47, 50, 51, 58, 59, 132, 136];

fn generate(seed: u64) -> Frame {
    let random = &mut Random::new(seed);
    let mut bytes = random.bytes(12);
    let tags = random.pick(&[0, 0, 0, 0, 1, 1, 2]);
    for tag in 0..tags {
        let id: u16 = if tag == 0 && tags == 2 {
            0x88a8
        } else {
            0x8100
        };
        bytes.extend(id.to_be_bytes());
        bytes.extend(random.short().to_be_bytes());
    }
    let offset = bytes.len() + 2;
    let mut is_udp_or_tcp = false;
    match random.below(100) {
        0..5 => arp(random, &mut bytes),
        5..50 => is_udp_or_tcp = ipv4_packet(random, &mut bytes),
        50..97 => is_udp_or_tcp = ipv6_packet(random, &mut bytes),
        _ => {
            bytes.extend(random.pick(&ETHERTYPES).to_be_bytes());
            let count = random.below(80);
            bytes.extend(random.bytes(count));
        }
    }
    // Ethernet padding: mostly zeros, sometimes what was in the memory before.
    if random.percent(10) {
        let count = 1 + random.below(46);
        let padding = if random.percent(50) {
            vec![0; count]
        } else {
            random.bytes(count)
        };
        bytes.extend(padding);
    }
    let mut frame = Frame {
        bytes,
        gso_size: 0,
        gso_segs: 0,
    };
    if random.percent(if is_udp_or_tcp { 20 } else { 2 }) {
        segment(random, &mut frame);
    }
    let mutations = random.pick(&[0, 0, 0, 0, 1, 1, 1, 2, 3, 4]);
    for _ in 0..mutations {
        mutate(random, &mut frame, offset);
    }
    frame.bytes.truncate(LONGEST);
    frame
}

fn segment(random: &mut Random, frame: &mut Frame) {
    let any = u32::from(random.short().max(1));
    frame.gso_size = random.pick(&[1, 8, 100, 536, 1200, 1428, 1448, any]);
    // Zero on virtio, and never to be trusted.
    frame.gso_segs = random.pick(&[0, 1, 3, any]);
}

fn arp(random: &mut Random, bytes: &mut Vec<u8>) {
    bytes.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.extend(random.bytes(20));
}

/// Layer 4 and its protocol number.
fn body(random: &mut Random) -> (u8, Vec<u8>) {
    let payload = match random.below(10) {
        0..3 => 0,
        3..8 => random.below(64),
        8 => random.below(1400),
        _ => random.below(2800),
    };
    let payload = random.bytes(payload);
    let ports = random.bytes(4);
    match random.below(100) {
        0..45 => {
            let options = random.pick(&[0, 0, 0, 12, 4, 8, 20, 36, 40]);
            let mut body = ports;
            body.extend(random.bytes(8));
            body.push(u8::try_from((20 + options) / 4).unwrap() << 4);
            body.extend(random.bytes(7));
            body.extend(vec![1; options]);
            body.extend(payload);
            (6, body)
        }
        45..80 => {
            let mut body = ports;
            body.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
            body.extend(random.bytes(2));
            body.extend(payload);
            (17, body)
        }
        // An authentication header before UDP: one that a parser could look behind.
        80..84 => {
            let mut body = vec![17, 4, 0, 0];
            body.extend(random.bytes(20));
            body.extend(ports);
            body.extend([0, 8, 0, 0]);
            (51, body)
        }
        84..98 => (random.pick(&OTHERS), [ports, payload].concat()),
        _ => (random.byte(), [ports, payload].concat()),
    }
}

/// Addresses of a small network, so that flows meet again, or any.
fn address<const N: usize>(random: &mut Random) -> [u8; N] {
    let mut address = [0x0a; N];
    if random.percent(50) {
        address[N - 1] = random.pick(&[1, 2]);
    } else {
        address.copy_from_slice(&random.bytes(N));
    }
    address
}

fn ipv4_packet(random: &mut Random, bytes: &mut Vec<u8>) -> bool {
    let (protocol, body) = body(random);
    let options = random.pick(&[0, 0, 0, 0, 4, 8, 24, 40]);
    let total = u16::try_from(20 + options + body.len()).unwrap();
    let fragment: u16 = match random.below(100) {
        // More fragments, an offset, both.
        0..4 => 0x2000,
        4..7 => 1 + random.short() % 0x1fff,
        7..9 => 0x2001 + random.short() % 0x1fff,
        // The reserved bit is none of them.
        9..12 => 0x8000,
        12..50 => 0x4000,
        _ => 0,
    };
    bytes.extend([0x08, 0x00]);
    bytes.push(0x40 | u8::try_from((20 + options) / 4).unwrap());
    bytes.push(random.byte());
    bytes.extend(if random.percent(4) { 0 } else { total }.to_be_bytes());
    bytes.extend(random.short().to_be_bytes());
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, protocol]);
    bytes.extend(random.short().to_be_bytes());
    bytes.extend(address::<4>(random));
    bytes.extend(address::<4>(random));
    bytes.extend(vec![1; options]);
    bytes.extend(body);
    matches!(protocol, 6 | 17)
}

fn ipv6_packet(random: &mut Random, bytes: &mut Vec<u8>) -> bool {
    let (protocol, body) = body(random);
    let count = match random.below(10) {
        0..5 => 0,
        5..7 => 1,
        7 => 2,
        8 => random.below(5),
        _ => 4 + random.below(5),
    };
    let mut kinds = Vec::new();
    for index in 0..count {
        let first = index == 0 && random.percent(50);
        kinds.push(if first {
            0
        } else {
            random.pick(&[43, 44, 44, 60, 60, 60, 0])
        });
    }
    let mut extensions = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let next = kinds.get(index + 1).copied().unwrap_or(protocol);
        if *kind == 44 {
            let field: u16 = match random.below(10) {
                0 => 1,
                1 => 8 + random.short() % 0xfff0,
                // Reserved bits, of an atomic fragment.
                2 => random.pick(&[2, 4, 6]),
                _ => 0,
            };
            extensions.extend([next, random.byte()]);
            extensions.extend(field.to_be_bytes());
            extensions.extend(random.bytes(4));
        } else {
            let more = random.pick(&[0, 0, 0, 1, 2, 7]);
            extensions.extend([next, more]);
            extensions.extend(random.bytes(6 + 8 * usize::from(more)));
        }
    }
    let length = u16::try_from(extensions.len() + body.len()).unwrap();
    bytes.extend([0x86, 0xdd]);
    bytes.push(0x60 | random.byte() >> 4);
    bytes.extend(random.bytes(3));
    bytes.extend(if random.percent(4) { 0 } else { length }.to_be_bytes());
    bytes.extend([kinds.first().copied().unwrap_or(protocol), 64]);
    bytes.extend(address::<16>(random));
    bytes.extend(address::<16>(random));
    bytes.extend(extensions);
    bytes.extend(body);
    matches!(protocol, 6 | 17)
}

/// One thing wrong. `offset` is where the packet began before any mutation.
fn mutate(random: &mut Random, frame: &mut Frame, offset: usize) {
    let bytes = &mut frame.bytes;
    // Mostly in the headers.
    let reach = if random.percent(80) {
        bytes.len().min(offset + 80)
    } else {
        bytes.len()
    };
    let at = 12 + random.below(reach - 12);
    match random.below(100) {
        0..25 => bytes[at] ^= 1 << random.below(8),
        25..40 => bytes[at] = random.byte(),
        40..60 => bytes.truncate(at.max(14)),
        // Length-field lies: one of them is IPv4's, the other IPv6's.
        60..80 => {
            let field = offset + random.pick(&[2, 4]);
            if let Some(length) = bytes.get_mut(field..field + 2) {
                let truth = u16::from_be_bytes([length[0], length[1]]);
                let by = random.short() % 48;
                let any = random.short();
                let lie = random.pick(&[
                    0,
                    by,
                    20 + by,
                    truth.wrapping_add(by),
                    truth.saturating_sub(by),
                    any,
                ]);
                length.copy_from_slice(&lie.to_be_bytes());
            }
        }
        80..90 => {
            let field = random.pick(&[12, offset - 2, 16]);
            if let Some(ethertype) = bytes.get_mut(field..field + 2) {
                ethertype.copy_from_slice(&random.pick(&ETHERTYPES).to_be_bytes());
            }
        }
        90..96 => {
            let id = random
                .pick(&[0x8100u16, 0x88a8, 0x9100, 0x88e5])
                .to_be_bytes();
            let tag = [id[0], id[1], random.byte(), random.byte()];
            bytes.splice(12..12, tag);
        }
        _ => segment(random, frame),
    }
}

// ---------------------------------------------------------------------------------------------
// The comparison.

/// `(bytes, frames)` of a flow by direction.
type FlowSums = HashMap<FlowKey, [(u64, u64); 2]>;

/// The loaded programs, and what their maps must hold.
struct Meter {
    ebpf: Ebpf,
    maps: Maps,
    cells: InterfaceCells,
    accounts: HashMap<AccountKey, Account>,
    flows: FlowSums,
}

impl Meter {
    fn load() -> Self {
        let options = Options {
            flows_max: 8192,
            ..crate::kernel::options()
        };
        let (ebpf, maps) = kernel::load_for_test(&options).expect("the object loads");
        maps.make_cells(LOOPBACK).unwrap();
        Self {
            ebpf,
            maps,
            cells: InterfaceCells::default(),
            accounts: HashMap::new(),
            flows: HashMap::new(),
        }
    }

    /// False when the kernel refuses to run this frame, which it must only do to short ones.
    fn run(&self, program: &str, frame: &Frame) -> Result<bool, String> {
        let program: &SchedClassifier = self.ebpf.program(program).unwrap().try_into().unwrap();
        // `__sk_buff` takes gso_segs at 164 and gso_size at 176.
        let mut context = [0u8; 192];
        context[164..168].copy_from_slice(&frame.gso_segs.to_ne_bytes());
        context[176..180].copy_from_slice(&frame.gso_size.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame.bytes);
        if frame.gso_size != 0 {
            options.ctx_in = Some(&context);
        }
        let needed = match frame.bytes[12..14] {
            [0x08, 0x00] => 14 + 20,
            [0x86, 0xdd] => 14 + 40,
            _ => 14 + 1,
        };
        match program.test_run(options) {
            Ok(result) if result.return_value == UNSPEC => Ok(true),
            Ok(result) => Err(format!("the verdict was {}", result.return_value)),
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EINVAL)
                    && frame.bytes.len() < needed =>
            {
                Ok(false)
            }
            Err(error) => Err(format!("the kernel refused it: {error}")),
        }
    }

    fn add(&mut self, direction: usize, expected: &Expected) {
        let cells = &mut self.cells.cells[direction];
        let mut grow = |number: usize| {
            cells[number].bytes += expected.bytes;
            cells[number].frames += expected.frames;
        };
        grow(cell::TOTAL);
        let key = match expected.place {
            Place::Cell(number) => return grow(number),
            Place::Flow(key) => key,
        };
        let flow = &mut self.flows.entry(key).or_default()[direction];
        flow.0 += expected.bytes;
        flow.1 += expected.frames;
        let account = self
            .accounts
            .entry(AccountKey {
                owner: OWNER_FOREIGN,
                ifindex: LOOPBACK,
                class: CLASS_DEFAULT,
            })
            .or_default();
        let (bytes, frames, payload) = if direction == 0 {
            (
                &mut account.rx_bytes,
                &mut account.rx_frames,
                &mut account.rx_payload_bytes,
            )
        } else {
            (
                &mut account.tx_bytes,
                &mut account.tx_frames,
                &mut account.tx_payload_bytes,
            )
        };
        *bytes += expected.bytes;
        *frames += expected.frames;
        *payload += expected.payload;
    }

    /// Cells and accounts: few enough to be read after each frame.
    fn check_sums(&self) -> Result<(), String> {
        let reading: Reading = self.maps.read().unwrap();
        let cells = reading.interfaces[&LOOPBACK];
        if reading.gap_bytes() != 0 {
            return Err(format!("{} bytes are nowhere", reading.gap_bytes()));
        }
        if reading.orphans != [Cell::default(); 2] {
            return Err(format!("orphans: {:?}", reading.orphans));
        }
        if cells == self.cells && reading.accounts == self.accounts {
            return Ok(());
        }
        let mut text = String::new();
        for direction in 0..2 {
            for (number, name) in cell::NAMES.iter().enumerate() {
                let (want, got) = (
                    self.cells.cells[direction][number],
                    cells.cells[direction][number],
                );
                if want != got {
                    let _ = writeln!(text, "  {name}[{direction}]: want {want:?}, got {got:?}");
                }
            }
        }
        if reading.accounts != self.accounts {
            let (want, got) = (&self.accounts, &reading.accounts);
            let _ = writeln!(text, "  accounts: want {want:?}\n            got  {got:?}");
        }
        Err(text)
    }

    /// Every flow there is: none more, none less, none other.
    fn check_flows(&self) -> Result<(), String> {
        let mut found = FlowSums::new();
        self.maps
            .read_flows(|key, flow| {
                let sums = [
                    (flow.rx_bytes, flow.rx_frames),
                    (flow.tx_bytes, flow.tx_frames),
                ];
                found.insert(key, sums);
            })
            .unwrap();
        if found == self.flows {
            return Ok(());
        }
        let mut text = String::new();
        for (key, sums) in &self.flows {
            if found.get(key) != Some(sums) {
                let _ = writeln!(text, "  want {key:?} {sums:?}, got {:?}", found.get(key));
            }
        }
        for (key, sums) in &found {
            if !self.flows.contains_key(key) {
                let _ = writeln!(text, "  want nothing, got {key:?} {sums:?}");
            }
        }
        Err(text)
    }

    /// One frame in one direction. None when the kernel would not run it.
    fn meter(&mut self, seed: u64, direction: usize, frame: &Frame) -> Option<Expected> {
        let expected = expect(frame, direction);
        let ran = self.run(DIRECTIONS[direction].1, frame);
        if ran == Ok(true) {
            self.add(direction, &expected);
        }
        let outcome = ran.and_then(|ran| self.check_sums().map(|()| ran));
        match outcome {
            Ok(ran) => ran.then_some(expected),
            Err(text) => panic!("{}", report(seed, direction, frame, &text)),
        }
    }
}

fn report(seed: u64, direction: usize, frame: &Frame, text: &str) -> String {
    let expected = expect(frame, direction);
    format!(
        "seed {seed:#x}, {}, gso_size {}, gso_segs {}, {} bytes:\n{}\nexpected {expected:?}\n{text}",
        DIRECTIONS[direction].1,
        frame.gso_size,
        frame.gso_segs,
        frame.bytes.len(),
        hex(&frame.bytes),
    )
}

/// A batch's flows were not as expected: the frame to blame, found one by one.
fn blame(seeds: std::ops::Range<u64>, whole: &str) -> ! {
    let mut meter = Meter::load();
    for seed in seeds {
        let frame = generate(seed);
        for (direction, _) in DIRECTIONS {
            meter.meter(seed, direction, &frame);
            if let Err(text) = meter.check_flows() {
                panic!("{}", report(seed, direction, &frame, &text));
            }
        }
    }
    panic!("flows differed after the batch, but after no single frame of it:\n{whole}");
}

fn number(length: usize) -> u64 {
    u64::try_from(length).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[test]
fn the_kernels_parser_agrees_with_another() {
    crate::require_root();
    let started = std::time::Instant::now();
    let mut places = BTreeMap::<&str, u64>::new();
    let mut rules = BTreeMap::<Rule, u64>::new();
    let (mut refused, mut segmented) = (0, 0);
    for first in (SEED..SEED + FRAMES).step_by(usize::try_from(BATCH).unwrap()) {
        let mut meter = Meter::load();
        for seed in first..first + BATCH {
            let frame = generate(seed);
            for (direction, _) in DIRECTIONS {
                let Some(expected) = meter.meter(seed, direction, &frame) else {
                    refused += 1;
                    continue;
                };
                let place = match expected.place {
                    Place::Cell(number) => cell::NAMES[number],
                    Place::Flow(_) => "flow",
                };
                *places.entry(place).or_default() += 1;
                segmented += u64::from(expected.frames > 1);
                for rule in expected.rules {
                    *rules.entry(rule).or_default() += 1;
                }
            }
        }
        if let Err(text) = meter.check_flows() {
            blame(first..first + BATCH, &text);
        }
    }
    println!(
        "{} runs in {:?}: {places:?}, {segmented} in segments, {refused} refused; {rules:?}",
        2 * FRAMES,
        started.elapsed(),
    );
    assert!(refused * 10 < 2 * FRAMES, "{refused} frames were not run");
    // A generator that no longer makes a kind of frame proves nothing about it.
    for place in [
        "flow",
        "non_ip",
        "icmp",
        "other_l4",
        "fragment",
        "unparsable",
    ] {
        assert!(
            places.get(place).is_some_and(|runs| *runs > 1000),
            "{place}"
        );
    }
    assert!(segmented > 1000, "{segmented} runs in segments");
    assert_eq!(rules.len(), 11, "a rule nothing needs: {rules:?}");
}
