//! The frames: generated from a seed, some of them cut, swapped or flipped.

use super::number;

/// A test run takes less than a page, headroom and tailroom included.
const LONGEST: usize = 3400;

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
pub(super) struct Frame {
    pub(super) bytes: Vec<u8>,
    pub(super) gso_size: u32,
    pub(super) gso_segs: u32,
}

/// Ethertypes and tag protocol ids a swap puts in place of another.
const ETHERTYPES: [u16; 10] = [
    0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x88e5, 0x0806, 0x88cc, 0x0040, 0x8847,
];
/// Neither TCP nor UDP: ICMP, IGMP, IP in IP, IPv6 in IP, GRE, ESP, AH, ICMPv6, none, SCTP, UDP-Lite.
const OTHERS: [u8; 11] = [1, 2, 4, 41, 47, 50, 51, 58, 59, 132, 136];

pub(super) fn generate(seed: u64) -> Frame {
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
