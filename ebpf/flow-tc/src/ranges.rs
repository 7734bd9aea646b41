//! Which request owns which byte of a sent segment.

use flow_abi::{RANGES, Range, Slot};

use crate::{
    account::{Wire, ceil_div, credit_tx},
    maps::add,
};

/// The owner of a segment that lies within the newest range, as all but the first of an answer do:
/// its bytes are added to the range. None: it has to be split.
///
/// # Safety
/// `slot` must be a live map value.
#[inline(always)]
pub unsafe fn within_newest(slot: *mut Slot, start: u64, wire: &Wire) -> Option<u32> {
    unsafe {
        let head = core::ptr::read_volatile(&raw const (*slot).head);
        if head == 0 {
            return None;
        }
        let range = &raw mut (*slot).ranges[(head - 1) as usize & (RANGES - 1)];
        // Ethernet padding is the overhead's.
        if core::ptr::read_volatile(&raw const (*range).offset) > start
            || wire.bytes != wire.payload + wire.frames * wire.header_len
        {
            return None;
        }
        Some(count(range, wire))
    }
}

/// Adds bytes to a range; returns whose they are.
///
/// # Safety
/// `range` must be in a live map value.
#[inline(always)]
unsafe fn count(range: *mut Range, wire: &Wire) -> u32 {
    unsafe {
        add(&raw mut (*range).wire_bytes, wire.bytes);
        add(&raw mut (*range).payload_bytes, wire.payload);
        add(&raw mut (*range).frames, wire.frames);
        if wire.retransmit != 0 {
            add(&raw mut (*range).retransmit_payload_bytes, wire.payload);
            add(&raw mut (*range).retransmit_frames, wire.frames);
        }
        core::ptr::read_volatile(&raw const (*range).owner)
    }
}

/// Splits a segment that starts at stream offset `start` over the slot's ranges, newest first.
/// Each frame's header goes to the owner of its first payload byte; bytes below the oldest range
/// (a TLS handshake, or an overwritten range) and Ethernet padding go to the connection's
/// overhead. Returns non-zero when an account could not be had; `wire` then holds what found none,
/// and nothing of use otherwise: it is filled again for each part, the stack has no room for more.
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
        wire.payload = high - low;
        wire.frames = high_frames - low_frames;
        wire.bytes = wire.payload + wire.frames * wire.header_len;
        let owner = unsafe { count(range, wire) };
        rest_bytes -= wire.bytes;
        if credit_tx(owner, wire) != 0 {
            lost_bytes += wire.bytes;
            lost_frames += wire.frames;
        }
        high = low;
        high_frames = low_frames;
    }
    if rest_bytes != 0 {
        wire.payload = high - start;
        wire.frames = high_frames;
        wire.bytes = rest_bytes;
        if wire.payload != 0 && head > RANGES as u64 {
            unsafe { add(&raw mut (*slot).tx_lost_range_bytes, wire.payload) };
        }
        if credit_tx(overhead, wire) != 0 {
            lost_bytes += wire.bytes;
            lost_frames += wire.frames;
        }
    }
    if lost_bytes == 0 {
        return 0;
    }
    wire.bytes = lost_bytes;
    wire.frames = lost_frames;
    1
}
