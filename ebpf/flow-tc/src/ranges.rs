//! Which request owns which byte of a sent segment.

use flow_abi::{RANGES, Slot};

use crate::{
    account::{Wire, ceil_div, credit_tx},
    maps::add,
};

/// Splits a segment that starts at stream offset `start` over the slot's ranges, newest first.
/// Each frame's header goes to the owner of its first payload byte; bytes below the oldest range
/// (a TLS handshake, or an overwritten range) and Ethernet padding go to the connection's
/// overhead. Returns non-zero when an account could not be had; `wire` then holds what found none.
///
/// # Safety
/// `slot` must be a live map value.
#[inline(never)]
pub unsafe fn split(slot: *mut Slot, start: u64, wire: &mut Wire) -> u32 {
    let head = unsafe { core::ptr::read_volatile(&raw const (*slot).head) };
    let overhead = unsafe { (*slot).overhead_owner };
    // Frames that start before payload byte n of the segment: ceil(n / segment).
    let segment = wire.segment;
    let (mut lost_bytes, mut lost_frames) = (0u64, 0u64);
    let mut rest_bytes = wire.bytes;
    let mut high = start + wire.payload;
    let mut high_frames = wire.frames;
    // One part, filled again for each range: the stack has room for no more.
    let mut part = Wire {
        bytes: 0,
        frames: 0,
        payload: 0,
        segment,
        header_len: wire.header_len,
        retransmit: wire.retransmit,
        ifindex: wire.ifindex,
        class: wire.class,
    };
    let mut back = 0u64;
    while back < RANGES as u64 {
        if back >= head || high == start {
            break;
        }
        let range = unsafe {
            &raw mut (*slot).ranges[(head - 1).wrapping_sub(back) as usize & (RANGES - 1)]
        };
        back += 1;
        let offset = unsafe { core::ptr::read_volatile(&raw const (*range).offset) };
        if offset >= high {
            continue;
        }
        let low = if offset > start { offset } else { start };
        let low_frames = ceil_div(low - start, segment);
        part.payload = high - low;
        part.frames = high_frames - low_frames;
        part.bytes = part.payload + part.frames * part.header_len;
        let owner = unsafe {
            add(&raw mut (*range).wire_bytes, part.bytes);
            add(&raw mut (*range).payload_bytes, part.payload);
            add(&raw mut (*range).frames, part.frames);
            if part.retransmit != 0 {
                add(&raw mut (*range).retransmit_payload_bytes, part.payload);
                add(&raw mut (*range).retransmit_frames, part.frames);
            }
            core::ptr::read_volatile(&raw const (*range).owner)
        };
        rest_bytes -= part.bytes;
        if credit_tx(owner, &part) != 0 {
            lost_bytes += part.bytes;
            lost_frames += part.frames;
        }
        high = low;
        high_frames = low_frames;
    }
    if rest_bytes != 0 {
        part.payload = high - start;
        part.frames = high_frames;
        part.bytes = rest_bytes;
        if part.payload != 0 && head > RANGES as u64 {
            unsafe { add(&raw mut (*slot).tx_lost_range_bytes, part.payload) };
        }
        if credit_tx(overhead, &part) != 0 {
            lost_bytes += part.bytes;
            lost_frames += part.frames;
        }
    }
    if lost_bytes == 0 {
        return 0;
    }
    wire.bytes = lost_bytes;
    wire.frames = lost_frames;
    1
}
