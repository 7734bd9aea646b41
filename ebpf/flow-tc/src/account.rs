//! Count every frame once: into its flow and its owner's account, or into the cell that says why
//! not, and into its interface's total.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::{
        bpf_get_socket_cookie, bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_sock,
        generated::bpf_ktime_get_coarse_ns,
    },
    programs::TcContext,
};
use aya_log_ebpf::debug;
use flow_abi::{
    ARRIVALS, Account, AccountKey, ClassKey, Direction, Endpoint, EndpointKey, FlowCounters,
    FlowKey, Slot, Tally, cell, closed, flow_flag, side,
};

use crate::{
    connection, interface,
    maps::{
        ACCOUNTS, CLASS_GENERATION, CLASSES, ENDPOINTS, FLOWS, INTERFACES, ORPHANS, TALLIES, add,
        live_slot, socket_slot, swap, take,
    },
    parse::{self, Parsed, TCP, UDP},
    ranges,
};

/// `BPF_NOEXIST`: a racing creator must not be overwritten.
const NOEXIST: u64 = 1;
/// In read-only data, not on the stack: 512 bytes are all there is for a chain of calls.
static ZERO: Account = Account {
    tx_bytes: 0,
    tx_frames: 0,
    tx_payload_bytes: 0,
    tx_retransmit_bytes: 0,
    tx_retransmit_frames: 0,
    tx_retransmit_payload_bytes: 0,
    rx_bytes: 0,
    rx_frames: 0,
    rx_payload_bytes: 0,
};
/// Not the gateway's.
const NOBODY: Endpoint = Endpoint {
    overhead_owner: 0,
    unclaimed_owner: 0,
};
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

/// A frame (or a segmentation-offloaded run of frames) as the wire carries it.
pub struct Wire {
    pub bytes: u64,
    pub frames: u64,
    pub payload: u64,
    /// Payload bytes per frame, the last one excepted.
    pub segment: u64,
    pub header_len: u64,
    pub retransmit: u64,
    pub ifindex: u32,
    /// Class of the remote address.
    pub class: u32,
}

/// `u64::div_ceil` without its panic: a reachable panic leaves the program without an exit, which
/// the verifier refuses. Zero when the divisor is zero.
#[inline(always)]
pub fn ceil_div(dividend: u64, divisor: u64) -> u64 {
    if divisor == 0 {
        0
    } else {
        (dividend + divisor - 1) / divisor
    }
}

/// `ETHERNET`: the interface's frames begin with an Ethernet header.
#[inline(always)]
pub fn frame<const ETHERNET: bool>(ctx: &TcContext, direction: Direction) {
    let skb = ctx.skb.skb;
    // SAFETY: skb is the program's context.
    let (len, gso_size, vlan_present, ifindex) = unsafe {
        (
            (*skb).len,
            (*skb).gso_size,
            (*skb).vlan_present,
            interface::number((*skb).ifindex),
        )
    };
    let mut parsed = MaybeUninit::uninit();
    let mut has_tuple = parse::parse::<ETHERNET>(ctx, direction, &mut parsed);
    // SAFETY: filled, whatever the frame is.
    let parsed: &mut Parsed = unsafe { parsed.assume_init_mut() };
    // A header that does not fit the frame, or lies in its Ethernet padding, is none.
    let end = parsed.ip_end;
    if has_tuple && (parsed.header_len > len || end != 0 && parsed.header_len > end) {
        has_tuple = false;
        parsed.cell = cell::UNPARSABLE as u32;
    }

    let mut wire = Wire {
        bytes: len as u64,
        frames: 1,
        payload: 0,
        segment: 1,
        header_len: parsed.header_len as u64,
        retransmit: 0,
        ifindex,
        class: 0,
    };
    if has_tuple && len > parsed.header_len {
        let after_header = (len - parsed.header_len) as u64;
        if gso_size != 0 {
            // gso_segs can be 0 on virtio and tap: derive it.
            wire.segment = gso_size as u64;
            wire.payload = after_header;
            wire.frames = ceil_div(after_header, wire.segment);
            wire.bytes += (wire.frames - 1) * wire.header_len;
        } else {
            let end = if parsed.ip_end == 0 {
                len
            } else {
                parsed.ip_end
            };
            let payload = (end - parsed.header_len) as u64;
            // A length field that promises more than the frame holds is a lie: count what is here.
            wire.payload = if payload > after_header {
                after_header
            } else {
                payload
            };
            wire.segment = wire.payload | 1;
        }
    }
    if vlan_present != 0 {
        // An accelerated tag is not in the data but is on the wire, in every frame's header.
        wire.bytes += 4 * wire.frames;
        wire.header_len += 4;
    }
    let (bytes, frames) = (wire.bytes, wire.frames);

    if !has_tuple {
        add_cell(ifindex, direction, parsed.cell, bytes, frames);
    } else {
        match flow(&parsed.key) {
            None => {
                add_cell(ifindex, direction, cell::FLOWS_FULL as u32, bytes, frames);
            }
            Some(flow) => {
                // SAFETY: a live map value.
                let failed = unsafe { count(ctx, direction, parsed, &mut wire, flow) };
                if failed != 0 {
                    debug!(ctx, "account table full on ifindex {}", ifindex);
                    let number = cell::ACCOUNTS_FULL as u32;
                    add_cell(ifindex, direction, number, wire.bytes, wire.frames);
                }
            }
        }
    }
    // Last, so that a reader who takes the total first never sees more total than parts.
    add_total(ifindex, direction, bytes, frames);
}

/// The few frames without flow or account. One without cells is an orphan, and counted as one
/// with the total.
#[inline(never)]
fn add_cell(ifindex: u32, direction: Direction, number: u32, bytes: u64, frames: u64) -> u32 {
    let Some(cells) = INTERFACES.get_ptr_mut(&ifindex) else {
        return 1;
    };
    // SAFETY: both indices are in range; per CPU, so a plain addition suffices.
    unsafe {
        let cell =
            &raw mut (*cells).cells[direction as usize & 1][number as usize & (cell::COUNT - 1)];
        (*cell).bytes += bytes;
        (*cell).frames += frames;
    }
    0
}

#[inline(always)]
fn add_total(ifindex: u32, direction: Direction, bytes: u64, frames: u64) {
    match tally(Tally::TOTAL, ifindex, 0) {
        // SAFETY: a live map value, per CPU.
        Some(total) => unsafe {
            match direction {
                Direction::Rx => {
                    (*total).rx_bytes += bytes;
                    (*total).rx_frames += frames;
                }
                Direction::Tx => {
                    (*total).tx_bytes += bytes;
                    (*total).tx_frames += frames;
                }
            }
        },
        None => {
            first_total(ifindex, direction, bytes, frames);
        }
    }
}

/// The first frame of an interface on this processor, and the frames of one that got no place.
/// The gateway makes the entry before it attaches; an object attached by hand has orphans.
#[inline(never)]
fn first_total(ifindex: u32, direction: Direction, bytes: u64, frames: u64) -> u32 {
    if INTERFACES.get_ptr_mut(&ifindex).is_some() {
        // This frame is the table's, the ones after it are the tally's.
        claim(Tally::TOTAL, ifindex, 0);
        return add_cell(ifindex, direction, cell::TOTAL as u32, bytes, frames);
    }
    if let Some(orphans) = ORPHANS.get_ptr_mut(direction as u32) {
        // SAFETY: a live map value, per CPU.
        unsafe {
            (*orphans).bytes += bytes;
            (*orphans).frames += frames;
        }
    }
    0
}

/// This processor's counters of a key, if it has a place.
#[inline(always)]
fn tally(owner: u32, ifindex: u32, class: u32) -> Option<*mut Account> {
    let tally = TALLIES.get_ptr_mut(Tally::place(owner, ifindex, class))?;
    // SAFETY: a live map value, per CPU.
    unsafe {
        let found =
            (*tally).owner == owner && (*tally).ifindex == ifindex && (*tally).class == class;
        found.then_some(&raw mut (*tally).account)
    }
}

/// Takes the key's place, if it is free.
#[inline(always)]
fn claim(owner: u32, ifindex: u32, class: u32) {
    let Some(tally) = TALLIES.get_ptr_mut(Tally::place(owner, ifindex, class)) else {
        return;
    };
    // SAFETY: a live map value, per CPU. Readers see the owner and the interface at once, and no
    // counts before.
    unsafe {
        if (*tally).ifindex == 0 && (*tally).owner == 0 {
            core::ptr::write_volatile(&raw mut (*tally).class, class);
            let head = owner as u64 | (ifindex as u64) << 32;
            core::ptr::write_volatile(tally.cast::<u64>(), head);
        }
    }
}

#[inline(always)]
fn flow(key: &FlowKey) -> Option<*mut FlowCounters> {
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        return Some(flow);
    }
    create(key);
    FLOWS.get_ptr_mut(key)
}

/// A function of its own: its stack frame is then not the caller's.
#[inline(never)]
fn create(key: &FlowKey) -> u32 {
    let owners = endpoint(key);
    let fresh = FlowCounters {
        rx_unbound_payload_bytes: 0,
        class: 0,
        class_generation: 0,
        rx_bytes: 0,
        rx_frames: 0,
        tx_bytes: 0,
        tx_frames: 0,
        tx_retransmit_bytes: 0,
        tx_retransmit_frames: 0,
        rx_unbound_bytes: 0,
        rx_unbound_frames: 0,
        // SAFETY: a helper without arguments.
        first_ns: unsafe { bpf_ktime_get_coarse_ns() },
        last_ns: 0,
        cookie: 0,
        slot_generation: 0,
        slot: 0,
        flags: 0,
        overhead_owner: owners.overhead_owner,
        unclaimed_owner: owners.unclaimed_owner,
        srtt_us: 0,
        min_rtt_us: 0,
    };
    FLOWS.insert(key, &fresh, NOEXIST).is_err() as u32
}

/// Whose flow this is, by its listener or its upstream peer. Asked once per connection.
#[inline(always)]
fn endpoint(key: &FlowKey) -> Endpoint {
    if interface::is_inner(key.ifindex) {
        return NOBODY;
    }
    let mut lookup = EndpointKey {
        address: [0; 16],
        port: key.local_port,
        side: side::LISTENER,
    };
    // SAFETY: values are copied out at once.
    unsafe {
        if let Some(found) = ENDPOINTS.get(&lookup) {
            return *found;
        }
        lookup.address = key.local;
        if let Some(found) = ENDPOINTS.get(&lookup) {
            return *found;
        }
        lookup = EndpointKey {
            address: key.remote,
            port: key.remote_port,
            side: side::PEER,
        };
        if let Some(found) = ENDPOINTS.get(&lookup) {
            return *found;
        }
    }
    NOBODY
}

/// The class of the flow's remote address: asked once, and once more when the table has changed.
/// The gateway makes the table's generation 1 before it attaches, so 0 is never asked.
#[inline(always)]
unsafe fn class(flow: *mut FlowCounters, key: &FlowKey) -> u32 {
    let generation = match CLASS_GENERATION.get(0) {
        // SAFETY: a map value; the gateway writes it, hence volatile.
        Some(generation) => unsafe { core::ptr::read_volatile(generation) },
        None => 0,
    };
    // SAFETY: a live map value. Two CPUs that ask at once store the same answer.
    unsafe {
        // A gateway connection keeps its class to its end: what has been received and is claimed
        // later must be found where it was put.
        let asked = (*flow).class_generation;
        if asked != generation && (asked == 0 || (*flow).overhead_owner == 0) {
            (*flow).class = ask_class(key);
            core::ptr::write_volatile(&raw mut (*flow).class_generation, generation);
        }
        (*flow).class
    }
}

#[inline(never)]
fn ask_class(key: &FlowKey) -> u32 {
    let lookup = ClassKey {
        prefix_len: 128,
        address: key.remote,
    };
    // SAFETY: both are four bytes of length and sixteen of address, without padding.
    let lookup = unsafe {
        core::mem::transmute::<ClassKey, aya_ebpf::maps::lpm_trie::Key<[u8; 16]>>(lookup)
    };
    match CLASSES.get(&lookup) {
        Some(class) => *class,
        None => flow_abi::CLASS_DEFAULT,
    }
}

/// Adds the frame to its flow, its slot and its account. Returns non-zero when an account could
/// not be had; `wire` then holds what found no account.
///
/// # Safety
/// `flow` must be a live map value.
#[inline(always)]
unsafe fn count(
    ctx: &TcContext,
    direction: Direction,
    parsed: &Parsed,
    wire: &mut Wire,
    flow: *mut FlowCounters,
) -> u32 {
    let is_tcp = parsed.key.protocol == TCP;
    unsafe {
        let now = bpf_ktime_get_coarse_ns();
        // Of a coarse clock, and written where it has moved: another CPU may want the line.
        if (*flow).last_ns != now {
            (*flow).last_ns = now;
        }
        let flags = (parsed.tcp_flags & 0x07) as u32;
        if is_tcp && flags != 0 {
            if parsed.tcp_flags & 0x12 == flow_flag::SYN as u8 {
                // SYN without ACK: a new connection, perhaps on an old tuple and under another
                // configuration. On a new tuple this changes nothing.
                begin(flow, &parsed.key);
            }
            let shift = if matches!(direction, Direction::Tx) {
                flow_flag::TX_SHIFT
            } else {
                0
            };
            if (*flow).flags & flags << shift != flags << shift {
                (*flow).flags |= flags << shift;
            }
        }
        if parsed.key.protocol == UDP && (*flow).flags == 0 {
            (*flow).flags = look_at_datagram(ctx, parsed);
        }
        wire.class = class(flow, &parsed.key);
        // A closed window; a SYN or a reset may say 0 and mean nothing by it.
        if is_tcp && parsed.window == 0 && flags & (flow_flag::SYN | flow_flag::RST) == 0 {
            connection::zero_window((*flow).cookie, parsed.key.ifindex, direction);
        }
        match direction {
            Direction::Rx => received(ctx, parsed, wire, flow, now),
            Direction::Tx => sent(ctx, parsed, wire, flow, now),
        }
    }
}

/// What a UDP flow's first datagram says of it: QUIC begins with a long header, whose two highest
/// bits are set, and a version other than 0. Once a flow.
#[inline(never)]
fn look_at_datagram(ctx: &TcContext, parsed: &Parsed) -> u32 {
    const PORT: u16 = 443;
    if parsed.key.local_port != PORT && parsed.key.remote_port != PORT {
        return flow_flag::LOOKED;
    }
    match ctx.load::<[u8; 5]>(parsed.header_len as usize) {
        Ok([first, a, b, c, d]) if first & 0xc0 == 0xc0 && (a | b | c | d) != 0 => {
            flow_flag::LOOKED | flow_flag::QUIC
        }
        _ => flow_flag::LOOKED,
    }
}

/// A connection begins on this flow.
#[inline(never)]
unsafe fn begin(flow: *mut FlowCounters, key: &FlowKey) -> u32 {
    let owners = endpoint(key);
    unsafe {
        (*flow).overhead_owner = owners.overhead_owner;
        (*flow).unclaimed_owner = owners.unclaimed_owner;
        (*flow).slot_generation = 0;
        (*flow).class_generation = 0;
        (*flow).rx_unbound_bytes = 0;
        (*flow).rx_unbound_frames = 0;
        (*flow).rx_unbound_payload_bytes = 0;
        (*flow).cookie = 0;
        (*flow).flags = 0;
    }
    0
}

/// Credits the payload's owner, then tells the slot (or, before there is one, the flow): a claim
/// never moves bytes that no account has yet.
#[inline(always)]
unsafe fn received(
    ctx: &TcContext,
    parsed: &Parsed,
    wire: &Wire,
    flow: *mut FlowCounters,
    now: u64,
) -> u32 {
    unsafe {
        add(&raw mut (*flow).rx_bytes, wire.bytes);
        add(&raw mut (*flow).rx_frames, wire.frames);
        // Nobody's flow, or a frame that carries nothing (ACK, SYN, FIN): the overhead's.
        let overhead = (*flow).overhead_owner;
        let gateways = parsed.key.protocol == TCP && overhead != 0;
        if !gateways {
            return credit_rx(overhead, wire);
        }
        let mut slot = live_slot((*flow).slot, (*flow).slot_generation);
        let ends = parsed.tcp_flags as u32 & (flow_flag::FIN | flow_flag::RST) != 0;
        if slot.is_none() && (wire.payload != 0 || ends) {
            slot = bind_by_lookup(ctx, &parsed.key, flow, wire);
        }
        if let Some(slot) = slot {
            note(slot, parsed, flow_flag::FIN, closed::FIN_RX, now);
        }
        if wire.payload == 0 {
            return credit_rx(overhead, wire);
        }
        let Some(slot) = slot else {
            if credit_rx((*flow).unclaimed_owner, wire) != 0 {
                return 1;
            }
            add(&raw mut (*flow).rx_unbound_payload_bytes, wire.payload);
            add(&raw mut (*flow).rx_unbound_frames, wire.frames);
            add(&raw mut (*flow).rx_unbound_bytes, wire.bytes);
            // Another CPU may have bound the flow since, and found less than this.
            let generation = core::ptr::read_volatile(&raw const (*flow).slot_generation);
            if let Some(slot) = live_slot((*flow).slot, generation) {
                hand_over(flow, slot);
            }
            return 0;
        };
        let claimed = core::ptr::read_volatile(&raw const (*slot).rx_owner);
        if claimed != 0 {
            if credit_rx(claimed, wire) != 0 {
                return 1;
            }
            add(&raw mut (*slot).rx_owned_frames, wire.frames);
            add(&raw mut (*slot).rx_owned_bytes, wire.bytes);
        } else {
            if credit_rx((*flow).unclaimed_owner, wire) != 0 {
                return 1;
            }
            if !remember(slot, parsed.seq, wire) {
                add(&raw mut (*slot).rx_unclaimed_payload_bytes, wire.payload);
                add(&raw mut (*slot).rx_unclaimed_frames, wire.frames);
                add(&raw mut (*slot).rx_unclaimed_bytes, wire.bytes);
            }
        }
        0
    }
}

/// During a TLS handshake: writes down what came, for the gateway to divide once it knows where
/// the first request begins. False when none is under way, or there is no room.
#[inline(always)]
unsafe fn remember(slot: *mut Slot, seq: u32, wire: &Wire) -> bool {
    unsafe {
        if core::ptr::read_volatile(&raw const (*slot).handshaking) == 0 {
            return false;
        }
        let mut place = 0;
        let arrival = loop {
            if place == ARRIVALS {
                return false;
            }
            let arrival = &raw mut (*slot).early[place & (ARRIVALS - 1)];
            // Two CPUs never get the same place.
            if swap(&raw mut (*arrival).taken, 1) == 0 {
                break arrival;
            }
            place += 1;
        };
        core::ptr::write_volatile(&raw mut (*arrival).seq, seq);
        core::ptr::write_volatile(&raw mut (*arrival).payload, wire.payload as u32);
        core::ptr::write_volatile(&raw mut (*arrival).segment, wire.segment as u16);
        core::ptr::write_volatile(&raw mut (*arrival).header, wire.header_len as u16);
        // Last: who sees it sees the others.
        core::ptr::write_volatile(&raw mut (*arrival).bytes, wire.bytes as u32);
    }
    true
}

#[inline(always)]
unsafe fn sent(
    ctx: &TcContext,
    parsed: &Parsed,
    wire: &mut Wire,
    flow: *mut FlowCounters,
    now: u64,
) -> u32 {
    let skb = ctx.skb.skb;
    unsafe {
        if (*flow).cookie == 0 {
            (*flow).cookie = bpf_get_socket_cookie(skb.cast());
        }
        let mut slot = None;
        let mut offset = 0u64;
        if parsed.key.protocol == TCP {
            let sk = (*skb).__bindgen_anon_2.sk;
            if !sk.is_null() {
                if (*flow).overhead_owner != 0 {
                    slot = live_slot((*flow).slot, (*flow).slot_generation);
                    if slot.is_none()
                        && let Some(given) = socket_slot(sk)
                    {
                        slot = bind(flow, wire, given.slot, given.generation);
                    }
                }
                // An acknowledgement of nobody's flow tells nothing new once a round trip is known.
                if wire.payload != 0 || slot.is_some() || (*flow).srtt_us == 0 {
                    // Request and time-wait sockets are none: their frames carry no payload.
                    let tcp = bpf_tcp_sock(sk);
                    if tcp.is_null() {
                        slot = None;
                    } else {
                        if wire.payload != 0 && (parsed.seq.wrapping_sub((*tcp).snd_nxt) as i32) < 0
                        {
                            wire.retransmit = 1;
                        }
                        // Written where they have changed: another CPU may want the line.
                        let (srtt, min) = ((*tcp).srtt_us >> 3, (*tcp).rtt_min);
                        if (*flow).srtt_us != srtt {
                            (*flow).srtt_us = srtt;
                        }
                        if (*flow).min_rtt_us != min {
                            (*flow).min_rtt_us = min;
                        }
                        if let Some(slot) = slot {
                            if (*slot).srtt_us != srtt {
                                (*slot).srtt_us = srtt;
                            }
                            if (*slot).min_rtt_us != min {
                                (*slot).min_rtt_us = min;
                            }
                            // bytes_acked counts the SYN of a connection the host opened.
                            let acked =
                                (*tcp).bytes_acked.saturating_sub((*slot).active as u64 & 1);
                            if (*slot).acked_offset != acked {
                                (*slot).acked_offset = acked;
                            }
                            if (*slot).handshaking != 0 && (*slot).rx_first_known == 0 {
                                (*slot).rx_first_seq =
                                    (*tcp).rcv_nxt.wrapping_sub((*tcp).bytes_received as u32);
                                core::ptr::write_volatile(&raw mut (*slot).rx_first_known, 1);
                            }
                            let ahead = parsed.seq.wrapping_sub((*tcp).snd_una) as i32 as i64;
                            offset = acked.wrapping_add(ahead as u64);
                        }
                    }
                }
            }
        }
        add(&raw mut (*flow).tx_bytes, wire.bytes);
        add(&raw mut (*flow).tx_frames, wire.frames);
        if wire.retransmit != 0 {
            add(&raw mut (*flow).tx_retransmit_bytes, wire.bytes);
            add(&raw mut (*flow).tx_retransmit_frames, wire.frames);
        }
        let mut owner = (*flow).overhead_owner;
        if let Some(slot) = slot {
            note(slot, parsed, flow_flag::FIN, closed::FIN_TX, now);
            if wire.payload != 0 {
                let Some(found) = ranges::within_newest(slot, offset, wire) else {
                    return ranges::split(slot, offset, wire);
                };
                owner = found;
            }
        }
        credit_tx_here(owner, wire)
    }
}

/// Remembers a slot's last activity and how its connection ended, for the gateway's reuse of it.
#[inline(always)]
unsafe fn note(slot: *mut Slot, parsed: &Parsed, fin: u32, bit: u32, now: u64) {
    let flags = parsed.tcp_flags as u32;
    unsafe {
        if (*slot).last_ns != now {
            (*slot).last_ns = now;
        }
        let mut bits = 0;
        if flags & fin != 0 {
            bits |= bit;
        }
        if flags & flow_flag::RST != 0 {
            bits |= closed::RST;
        }
        if bits != 0 {
            (*slot).closed |= bits;
        }
    }
}

/// Ties the flow to its connection's slot, and hands the slot what was received before. Once a
/// connection: out of the way of the frames after it.
#[inline(never)]
unsafe fn bind(
    flow: *mut FlowCounters,
    wire: &Wire,
    index: u32,
    generation: u64,
) -> Option<*mut Slot> {
    let slot = live_slot(index, generation)?;
    unsafe {
        // The index first: a reader that sees the generation finds its slot.
        core::ptr::write_volatile(&raw mut (*flow).slot, index);
        if swap(&raw mut (*flow).slot_generation, generation) == generation {
            // Another CPU has bound it, or is about to have.
            return Some(slot);
        }
        hand_over(flow, slot);
        // How the connection ended, should it have done so before anybody saw its slot.
        let flags = (*flow).flags;
        let mut ends = 0;
        if flags & flow_flag::FIN != 0 {
            ends |= closed::FIN_RX;
        }
        if flags & flow_flag::FIN << flow_flag::TX_SHIFT != 0 {
            ends |= closed::FIN_TX;
        }
        if flags & (flow_flag::RST | flow_flag::RST << flow_flag::TX_SHIFT) != 0 {
            ends |= closed::RST;
        }
        if ends != 0 {
            (*slot).closed |= ends;
        }
        (*slot).class = wire.class;
        // Last: tells the gateway that the counters above now hold what came before binding.
        core::ptr::write_volatile(&raw mut (*slot).ifindex, wire.ifindex);
    }
    Some(slot)
}

/// Moves what was received before binding into the slot, each byte once however many CPUs try.
#[inline(never)]
unsafe fn hand_over(flow: *mut FlowCounters, slot: *mut Slot) {
    unsafe {
        let bytes = take(&raw mut (*flow).rx_unbound_bytes);
        let frames = take(&raw mut (*flow).rx_unbound_frames);
        let payload = take(&raw mut (*flow).rx_unbound_payload_bytes);
        if (*slot).claims_unbound != 0 {
            add(&raw mut (*slot).rx_unclaimed_payload_bytes, payload);
            add(&raw mut (*slot).rx_unclaimed_frames, frames);
            add(&raw mut (*slot).rx_unclaimed_bytes, bytes);
        } else {
            add(&raw mut (*slot).rx_handshake_payload_bytes, payload);
            add(&raw mut (*slot).rx_handshake_frames, frames);
            add(&raw mut (*slot).rx_handshake_bytes, bytes);
        }
    }
}

/// At ingress a frame has no socket yet: look it up, for the few frames that come between accept
/// and the first frame sent.
#[inline(never)]
unsafe fn bind_by_lookup(
    ctx: &TcContext,
    key: &FlowKey,
    flow: *mut FlowCounters,
    wire: &Wire,
) -> Option<*mut Slot> {
    // SAFETY: plain data; the mapped prefix tells the families apart.
    unsafe {
        let remote = core::mem::transmute::<[u8; 16], [u32; 4]>(key.remote);
        let local = core::mem::transmute::<[u8; 16], [u32; 4]>(key.local);
        let mut tuple: bpf_sock_tuple = core::mem::zeroed();
        let size = if remote[0] == 0 && remote[1] == 0 && remote[2] == 0xffff_0000 {
            tuple.__bindgen_anon_1.ipv4.saddr = remote[3];
            tuple.__bindgen_anon_1.ipv4.daddr = local[3];
            tuple.__bindgen_anon_1.ipv4.sport = key.remote_port.to_be();
            tuple.__bindgen_anon_1.ipv4.dport = key.local_port.to_be();
            12
        } else {
            tuple.__bindgen_anon_1.ipv6.saddr = remote;
            tuple.__bindgen_anon_1.ipv6.daddr = local;
            tuple.__bindgen_anon_1.ipv6.sport = key.remote_port.to_be();
            tuple.__bindgen_anon_1.ipv6.dport = key.local_port.to_be();
            36
        };
        let sk = bpf_skc_lookup_tcp(ctx.skb.skb.cast(), &mut tuple, size, CURRENT_NETNS, 0);
        if sk.is_null() {
            return None;
        }
        let given = socket_slot(sk.cast());
        bpf_sk_release(sk.cast());
        let given = given?;
        bind(flow, wire, given.slot, given.generation)
    }
}

#[inline(always)]
fn account(owner: u32, wire: &Wire) -> Option<*mut Account> {
    match tally(owner, wire.ifindex, wire.class) {
        Some(account) => Some(account),
        None => first_account(owner, wire.ifindex, wire.class),
    }
}

/// The first frame of an owner on this processor, and the frames of one that got no place. Only
/// what is in the table gets one: a full table is full.
#[inline(never)]
fn first_account(owner: u32, ifindex: u32, class: u32) -> Option<*mut Account> {
    let key = AccountKey {
        owner,
        ifindex,
        class,
    };
    if ACCOUNTS.get_ptr_mut(&key).is_none() {
        let _ = ACCOUNTS.insert(&key, &ZERO, NOEXIST);
    }
    // This frame is the table's, the ones after it are the tally's.
    let account = ACCOUNTS.get_ptr_mut(&key)?;
    claim(owner, ifindex, class);
    Some(account)
}

#[inline(always)]
fn credit_rx(owner: u32, wire: &Wire) -> u32 {
    let Some(account) = account(owner, wire) else {
        return 1;
    };
    // SAFETY: per CPU, so plain additions suffice.
    unsafe {
        (*account).rx_bytes += wire.bytes;
        (*account).rx_frames += wire.frames;
        (*account).rx_payload_bytes += wire.payload;
    }
    0
}

/// One body, called from every range of a segment: inlining it sixteen times would not verify.
#[inline(never)]
pub fn credit_tx(owner: u32, wire: &Wire) -> u32 {
    credit_tx_here(owner, wire)
}

#[inline(always)]
fn credit_tx_here(owner: u32, wire: &Wire) -> u32 {
    let Some(account) = account(owner, wire) else {
        return 1;
    };
    // SAFETY: per CPU, so plain additions suffice.
    unsafe {
        (*account).tx_bytes += wire.bytes;
        (*account).tx_frames += wire.frames;
        (*account).tx_payload_bytes += wire.payload;
        if wire.retransmit != 0 {
            (*account).tx_retransmit_bytes += wire.bytes;
            (*account).tx_retransmit_frames += wire.frames;
            (*account).tx_retransmit_payload_bytes += wire.payload;
        }
    }
    0
}
