//! Out to user space at once: reserve, fill, submit; a full ring counts what it lost.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{PerCpuArray, RingBuf},
};
use flow_abi::{Connection, ConnectionEvent, EventHead, PacketEvent, kind};

/// 4,096 connection events or so: a burst of a thousand connections, twice over.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

#[map]
pub static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT as u32, 0);

/// Says that a connection opened or closed.
///
/// # Safety
/// `connection` must be a live map value.
#[inline(always)]
pub unsafe fn connection(number: u32, connection: *const Connection) {
    let Some(mut record) = EVENTS.reserve::<ConnectionEvent>(0) else {
        return lost(number);
    };
    let out = record.as_mut_ptr();
    unsafe {
        (*out).head = head(number);
        core::ptr::copy_nonoverlapping(connection, &raw mut (*out).connection, 1);
    }
    record.submit(0);
}

/// Says something about one frame; `fill` must set every field but the head.
#[inline(always)]
pub fn packet(number: u32, fill: impl FnOnce(*mut PacketEvent)) {
    let Some(mut record) = EVENTS.reserve::<PacketEvent>(0) else {
        return lost(number);
    };
    let out = record.as_mut_ptr();
    // SAFETY: reserved and not yet submitted.
    unsafe {
        (*out).head = head(number);
        (*out).reserved = 0;
    }
    fill(out);
    record.submit(0);
}

#[inline(always)]
fn head(number: u32) -> EventHead {
    EventHead {
        // SAFETY: a helper without arguments.
        timestamp_ns: unsafe { bpf_ktime_get_ns() },
        kind: number,
        reserved: 0,
    }
}

#[inline(always)]
fn lost(number: u32) {
    if let Some(count) = EVENTS_LOST.get_ptr_mut(number) {
        // SAFETY: a live map value, per CPU.
        unsafe { *count += 1 };
    }
}
