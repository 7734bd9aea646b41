//! Frame bytes → 5-tuple, header length, payload.
//!
//! Two paths with one meaning: [`fast`] reads untagged IPv4 without options and IPv6 without
//! extension headers straight from the packet; everything else, and frames whose headers are not
//! in the linear part, goes through [`general`], which copies with bounds checks.

use core::mem::MaybeUninit;

use aya_ebpf::programs::TcContext;
use flow_abi::{Direction, FlowKey, cell};

use crate::interface;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

const ICMP: u8 = 1;
const ICMP6: u8 = 58;

const ETH_VLAN: u16 = 0x8100;
const ETH_QINQ: u16 = 0x88a8;
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
/// Third word of `::ffff:0:0/96`, as it lies in memory.
const MAPPED: u32 = 0xffff_0000u32;

/// What one frame says about itself. Filled in place: BPF functions return scalars only.
pub struct Parsed {
    pub key: FlowKey,
    /// Bytes before the layer-4 payload, in-band VLAN tags included.
    pub header_len: u32,
    /// End of the IP packet within the frame by its own length field; 0 when that field is 0
    /// (jumbo GSO). Bytes after it are Ethernet padding.
    pub ip_end: u32,
    pub seq: u32,
    pub tcp_flags: u8,
    /// TCP's, unscaled.
    pub window: u16,
    /// Where the frame is counted when it has no 5-tuple.
    pub cell: u32,
}

impl Parsed {
    #[inline(always)]
    pub fn empty() -> Self {
        Self {
            key: FlowKey {
                local: [0; 16],
                remote: [0; 16],
                local_port: 0,
                remote_port: 0,
                ifindex: 0,
                protocol: 0,
                reserved: [0; 3],
            },
            header_len: 0,
            ip_end: 0,
            seq: 0,
            tcp_flags: 0,
            window: 0,
            cell: cell::UNPARSABLE as u32,
        }
    }
}

/// True when the frame has a 5-tuple; otherwise `out.cell` says where it belongs. Fills `out` either
/// way, and not beforehand: zeroing it is a call that writes byte by byte, for every frame.
#[inline(always)]
pub fn parse<const ETHERNET: bool>(
    ctx: &TcContext,
    direction: Direction,
    out: &mut MaybeUninit<Parsed>,
) -> bool {
    // SAFETY: `fast` checks every access against data_end, and fills `out` when it is the one.
    if ETHERNET && unsafe { fast(ctx, direction, out.as_mut_ptr()) }.is_some() {
        return true;
    }
    general::<ETHERNET>(ctx, direction, out) == 0
}

type Addr = [u32; 4];

#[inline(always)]
fn set_key(
    ctx: &TcContext,
    direction: Direction,
    (source, source_port): (Addr, u16),
    (destination, destination_port): (Addr, u16),
    protocol: u8,
    key: &mut FlowKey,
) {
    let (local, remote, local_port, remote_port) = match direction {
        Direction::Tx => (source, destination, source_port, destination_port),
        Direction::Rx => (destination, source, destination_port, source_port),
    };
    // SAFETY: [u32; 4] and [u8; 16] have the same size and no invalid values.
    unsafe {
        key.local = core::mem::transmute::<Addr, [u8; 16]>(local);
        key.remote = core::mem::transmute::<Addr, [u8; 16]>(remote);
        key.ifindex = interface::number((*ctx.skb.skb).ifindex);
    }
    key.local_port = local_port;
    key.remote_port = remote_port;
    // With the reserved bytes: three zeros by themselves would be a call.
    // SAFETY: the key's last word, which its type aligns.
    unsafe {
        let last = (&raw mut key.protocol).cast::<u32>();
        core::ptr::write_volatile(last, u32::from_ne_bytes([protocol, 0, 0, 0]));
    }
}

/// Whole words, in one load each. The IP header lies on a word boundary where the processor asks for
/// it (`NET_IP_ALIGN`), and everywhere else it need not; told that it is unaligned, the compiler
/// would put every word together from bytes.
///
/// # Safety
/// `start` and `end` must be the skb's data and data_end.
#[inline(always)]
unsafe fn words<const N: usize>(start: usize, end: usize, offset: usize) -> Option<[u32; N]> {
    if start + offset + N * 4 > end {
        return None;
    }
    let at = (start + offset) as *const u32;
    Some(core::array::from_fn(|index| unsafe {
        core::ptr::read_volatile(at.add(index))
    }))
}

/// # Safety
/// Reads packet memory; every read is bounds checked. Writes every field of `out`, or returns none.
#[inline(always)]
unsafe fn fast(ctx: &TcContext, direction: Direction, out: *mut Parsed) -> Option<()> {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + 14 > end {
        return None;
    }
    let ethertype = u16::from_be(unsafe { core::ptr::read_volatile((start + 12) as *const u16) });
    let (source, destination, l4_offset, protocol, ip_end);
    if ethertype == ETH_IPV4 {
        let words: [u32; 5] = unsafe { words(start, end, 14) }?;
        // Version 4, no options; neither "more fragments" nor an offset.
        if words[0] as u8 != 0x45 || (words[1] >> 16) as u16 & 0xff3f != 0 {
            return None;
        }
        protocol = (words[2] >> 8) as u8;
        let total_len = u16::from_be((words[0] >> 16) as u16) as u32;
        if total_len != 0 && total_len < 20 {
            return None;
        }
        ip_end = if total_len == 0 { 0 } else { 14 + total_len };
        source = [0, 0, MAPPED, words[3]];
        destination = [0, 0, MAPPED, words[4]];
        l4_offset = 34;
    } else if ethertype == ETH_IPV6 {
        let words: [u32; 10] = unsafe { words(start, end, 14) }?;
        if words[0] as u8 >> 4 != 6 {
            return None;
        }
        protocol = (words[1] >> 16) as u8;
        let payload_len = u16::from_be(words[1] as u16) as u32;
        ip_end = if payload_len == 0 {
            0
        } else {
            54 + payload_len
        };
        source = [words[2], words[3], words[4], words[5]];
        destination = [words[6], words[7], words[8], words[9]];
        l4_offset = 54;
    } else {
        return None;
    }
    let (source_port, destination_port, seq, tcp_flags, window, header_len);
    if protocol == TCP {
        let words: [u32; 4] = unsafe { words(start, end, l4_offset) }?;
        let header = ((words[3] & 0xf0) >> 4) * 4;
        if header < 20 {
            return None;
        }
        source_port = u16::from_be(words[0] as u16);
        destination_port = u16::from_be((words[0] >> 16) as u16);
        seq = u32::from_be(words[1]);
        tcp_flags = (words[3] >> 8) as u8;
        window = (words[3] >> 16) as u16;
        header_len = l4_offset as u32 + header;
    } else if protocol == UDP {
        let words: [u32; 2] = unsafe { words(start, end, l4_offset) }?;
        source_port = u16::from_be(words[0] as u16);
        destination_port = u16::from_be((words[0] >> 16) as u16);
        header_len = l4_offset as u32 + 8;
        (seq, tcp_flags, window) = (0, 0, 0);
    } else {
        return None;
    }
    unsafe {
        (*out).header_len = header_len;
        (*out).ip_end = ip_end;
        (*out).seq = seq;
        (*out).tcp_flags = tcp_flags;
        (*out).window = window;
        (*out).cell = cell::UNPARSABLE as u32;
        set_key(
            ctx,
            direction,
            (source, source_port),
            (destination, destination_port),
            protocol,
            &mut (*out).key,
        );
    }
    Some(())
}

/// The rare frames, away from the code that runs for every other one. Returns 0 when the frame has
/// a 5-tuple.
#[inline(never)]
fn general<const ETHERNET: bool>(
    ctx: &TcContext,
    direction: Direction,
    out: &mut MaybeUninit<Parsed>,
) -> u32 {
    let out = out.write(Parsed::empty());
    copied::<ETHERNET>(ctx, direction, out).is_err() as u32
}

#[inline(always)]
fn copied<const ETHERNET: bool>(
    ctx: &TcContext,
    direction: Direction,
    out: &mut Parsed,
) -> Result<(), i64> {
    out.cell = cell::UNPARSABLE as u32;
    let (mut offset, mut ethertype) = if ETHERNET {
        (14usize, u16::from_be(ctx.load::<u16>(12)?))
    } else {
        // SAFETY: skb is the program's context; the kernel keeps the field in network order.
        (0, u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16))
    };
    // Up to two in-band tags: QinQ, or an inner tag under an accelerated outer one.
    let mut tag = 0;
    while tag < 2 {
        if ethertype != ETH_VLAN && ethertype != ETH_QINQ {
            break;
        }
        ethertype = u16::from_be(ctx.load::<u16>(offset + 2)?);
        offset += 4;
        tag += 1;
    }
    let (source, destination, mut protocol);
    if ethertype == ETH_IPV4 {
        let header: [u8; 20] = ctx.load(offset)?;
        let header_len = ((header[0] & 15) as usize) * 4;
        let total_len = u16::from_be_bytes([header[2], header[3]]) as usize;
        if header[0] >> 4 != 4 || header_len < 20 || (total_len != 0 && total_len < header_len) {
            return Err(0);
        }
        out.ip_end = if total_len == 0 {
            0
        } else {
            (offset + total_len) as u32
        };
        if (header[6] & 0x3f) | header[7] != 0 {
            out.cell = cell::FRAGMENT as u32;
            return Err(0);
        }
        protocol = header[9];
        source = [0, 0, MAPPED, word(&header, 12)];
        destination = [0, 0, MAPPED, word(&header, 16)];
        offset += header_len;
    } else if ethertype == ETH_IPV6 {
        let words: [u32; 10] = ctx.load(offset)?;
        if words[0] as u8 >> 4 != 6 {
            return Err(0);
        }
        let payload_len = u16::from_be(words[1] as u16) as usize;
        out.ip_end = if payload_len == 0 {
            0
        } else {
            (offset + 40 + payload_len) as u32
        };
        protocol = (words[1] >> 16) as u8;
        source = [words[2], words[3], words[4], words[5]];
        destination = [words[6], words[7], words[8], words[9]];
        offset += 40;
        let mut extension = 0;
        while extension < 6 {
            // Hop-by-hop, routing, destination options: a length in units of 8 after the first.
            // Each must lie in its IP packet, not in the padding behind it.
            if protocol == 0 || protocol == 43 || protocol == 60 {
                if out.ip_end != 0 && offset + 2 > out.ip_end as usize {
                    return Err(0);
                }
                let head: [u8; 2] = ctx.load(offset)?;
                protocol = head[0];
                offset += 8 + (head[1] as usize) * 8;
            } else if protocol == 44 {
                if out.ip_end != 0 && offset + 4 > out.ip_end as usize {
                    return Err(0);
                }
                let head: [u8; 4] = ctx.load(offset)?;
                // An atomic fragment (offset 0, no more) is a whole packet: RFC 6946.
                if u16::from_be_bytes([head[2], head[3]]) & 0xfff9 != 0 {
                    out.cell = cell::FRAGMENT as u32;
                    return Err(0);
                }
                protocol = head[0];
                offset += 8;
            } else {
                break;
            }
            extension += 1;
        }
    } else {
        out.cell = cell::NON_IP as u32;
        return Err(0);
    }
    let ports: [u8; 4];
    if protocol == TCP {
        let header: [u8; 16] = ctx.load(offset)?;
        let header_len = ((header[12] >> 4) as u32) * 4;
        if header_len < 20 {
            return Err(0);
        }
        ports = [header[0], header[1], header[2], header[3]];
        out.seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        out.tcp_flags = header[13];
        out.window = u16::from_be_bytes([header[14], header[15]]);
        out.header_len = offset as u32 + header_len;
    } else if protocol == UDP {
        let header: [u8; 8] = ctx.load(offset)?;
        ports = [header[0], header[1], header[2], header[3]];
        out.header_len = offset as u32 + 8;
    } else if protocol == ICMP || protocol == ICMP6 {
        out.cell = cell::ICMP as u32;
        return Err(0);
    } else {
        out.cell = cell::OTHER_L4 as u32;
        return Err(0);
    }
    let source_port = u16::from_be_bytes([ports[0], ports[1]]);
    let destination_port = u16::from_be_bytes([ports[2], ports[3]]);
    set_key(
        ctx,
        direction,
        (source, source_port),
        (destination, destination_port),
        protocol,
        &mut out.key,
    );
    Ok(())
}

#[inline(always)]
fn word(bytes: &[u8; 20], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
