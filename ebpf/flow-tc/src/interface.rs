//! Which interface a frame crossed: interface indices are unique in one network namespace only.

use aya_ebpf::{macros::map, maps::HashMap};
use flow_abi::interface;

/// Number of the network namespace these programs are attached in; 0 is the gateway's own. Set by
/// the gateway before loading.
#[unsafe(no_mangle)]
pub static NAMESPACE: u32 = 0;

/// Interfaces whose frames the gateway's sockets also send through another observed interface.
#[map]
pub static INNER: HashMap<u32, u32> = HashMap::with_max_entries(1 << 10, 0);

/// The interface's number in every map.
#[inline(always)]
pub fn number(ifindex: u32) -> u32 {
    // SAFETY: a static.
    let namespace = unsafe { core::ptr::read_volatile(&raw const NAMESPACE) };
    namespace << interface::NAMESPACE_SHIFT | ifindex & interface::INDEX_MASK
}

/// True where no flow is the gateway's: another network namespace, where the same address may be
/// somebody else's, or an interface whose frames are credited on another one.
#[inline(always)]
pub fn is_inner(number: u32) -> bool {
    // SAFETY: the value is not looked at.
    number >> interface::NAMESPACE_SHIFT != 0 || unsafe { INNER.get(&number) }.is_some()
}
