//! Out to user space at once: reserve, fill, submit; a full ring counts what it lost.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use flow_abi::{Connection, ConnectionEvent, EventHead, PacketEvent, kind};

/// 4,096 connection events or so: a burst of a thousand connections, twice over.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

#[map]
pub static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT as u32, 0);

/// Not 0 while the reader comes back by itself in a moment, and need not be woken.
#[map]
pub static EVENTS_AWAKE: Array<u32> = Array::with_max_entries(1, 0);

/// `BPF_RB_NO_WAKEUP`.
const NO_WAKEUP: u64 = 1;

/// How to submit. A wake-up is an interrupt this processor sends itself, and leaves a virtual
/// machine for: dearer than the event. Who falls asleep looks once more a moment later.
#[inline(always)]
fn wake_up() -> u64 {
    match EVENTS_AWAKE.get(0) {
        // SAFETY: a map value; the gateway writes it, hence volatile.
        Some(awake) if unsafe { core::ptr::read_volatile(awake) } != 0 => NO_WAKEUP,
        _ => 0,
    }
}

/// Says that a connection opened or closed; `last`, that nothing more is to be known of it. False
/// when the ring was full.
///
/// # Safety
/// `connection` must be a live map value.
#[inline(always)]
pub unsafe fn connection(number: u32, connection: *const Connection, last: bool) -> bool {
    let Some(mut record) = EVENTS.reserve::<ConnectionEvent>(0) else {
        lost(number);
        return false;
    };
    let out = record.as_mut_ptr();
    unsafe {
        (*out).head = head(number);
        (*out).head.last = last as u32;
        core::ptr::copy_nonoverlapping(connection, &raw mut (*out).connection, 1);
    }
    record.submit(wake_up());
    true
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
    record.submit(wake_up());
}

#[inline(always)]
fn head(number: u32) -> EventHead {
    EventHead {
        // SAFETY: a helper without arguments.
        timestamp_ns: unsafe { bpf_ktime_get_ns() },
        kind: number,
        last: 0,
    }
}

#[inline(always)]
fn lost(number: u32) {
    if let Some(count) = EVENTS_LOST.get_ptr_mut(number) {
        // SAFETY: a live map value, per CPU.
        unsafe { *count += 1 };
    }
}
