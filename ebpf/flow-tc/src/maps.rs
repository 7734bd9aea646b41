//! Map declarations. Sizes are defaults: the gateway sets them from its configuration at load.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, PerCpuArray, PerCpuHashMap},
};
use flow_abi::{
    Account, AccountKey, Cell, Endpoint, EndpointKey, FlowCounters, FlowKey, InterfaceCells, Slot,
    SocketSlot, Tally,
};

// Preallocated, so that a full table fails countably instead of evicting silently.
#[map]
pub static FLOWS: HashMap<FlowKey, FlowCounters> = HashMap::with_max_entries(1 << 18, 0);

// Not preallocated: memory follows the owners in use, not maximum times CPUs.
#[map]
pub static ACCOUNTS: PerCpuHashMap<AccountKey, Account> =
    PerCpuHashMap::with_max_entries(1 << 14, BPF_F_NO_PREALLOC);

// In front of accounts and interfaces: most frames' counters are found here by index.
#[map]
pub static TALLIES: PerCpuArray<Tally> = PerCpuArray::with_max_entries(Tally::COUNT, 0);

#[map]
pub static INTERFACES: PerCpuHashMap<u32, InterfaceCells> =
    PerCpuHashMap::with_max_entries(1 << 10, BPF_F_NO_PREALLOC);

#[map]
pub static ENDPOINTS: HashMap<EndpointKey, Endpoint> = HashMap::with_max_entries(1 << 12, 0);

// The trie is never preallocated: this many prefixes at most.
#[map]
pub static CLASSES: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(1 << 16, 0);

#[map]
pub static CLASS_GENERATION: Array<u32> = Array::with_max_entries(1, 0);

#[map]
pub static SLOTS: Array<Slot> = Array::with_max_entries(1 << 14, BPF_F_MMAPABLE);

#[map]
pub static ORPHANS: PerCpuArray<Cell> = PerCpuArray::with_max_entries(2, 0);

#[btf_map]
pub static SOCKET_SLOTS: SkStorage<SocketSlot> = SkStorage::new();

/// The slot the gateway gave this socket, if any.
///
/// # Safety
/// `sk` must be a non-null socket pointer the verifier knows.
#[inline(always)]
pub unsafe fn socket_slot(sk: *mut bpf_sock) -> Option<SocketSlot> {
    // aya 0.2 offers this helper for sock_addr contexts only.
    let value = unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&SOCKET_SLOTS).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            0,
        )
    } as *const SocketSlot;
    if value.is_null() {
        None
    } else {
        Some(unsafe { *value })
    }
}

/// The slot, if it still serves the connection that was given `generation`.
#[inline(always)]
pub fn live_slot(index: u32, generation: u64) -> Option<*mut Slot> {
    let slot = SLOTS.get_ptr_mut(index)?;
    // SAFETY: a checked array element; the gateway writes it concurrently, hence volatile.
    let current = unsafe { core::ptr::read_volatile(&raw const (*slot).generation) };
    (generation != 0 && current == generation).then_some(slot)
}

/// Takes the whole of a counter that several CPUs may hold: two takers never get the same bytes.
///
/// # Safety
/// `counter` must point into a map value.
#[inline(always)]
pub unsafe fn take(counter: *mut u64) -> u64 {
    unsafe { swap(counter, 0) }
}

/// Stores a value and returns the one before, in one step.
///
/// # Safety
/// `place` must point into a map value.
#[inline(always)]
pub unsafe fn swap(place: *mut u64, value: u64) -> u64 {
    unsafe {
        core::intrinsics::atomic_xchg::<u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
            place, value,
        )
    }
}

/// Adds to a counter that several CPUs may hold.
///
/// # Safety
/// `counter` must point into a map value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, value: u64) {
    // No AtomicU64::fetch_add on bpfel in core: the intrinsic becomes one BPF atomic.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(
            counter, value,
        );
    }
}
