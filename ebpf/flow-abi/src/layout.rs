//! Compile-time proof that both sides see the same bytes, and the `Pod` claims that follow.

use core::mem::{align_of, offset_of, size_of};

use crate::*;

const _: () = {
    assert!(size_of::<AccountKey>() == 12);
    assert!(size_of::<Account>() == 72);
    // Owner and interface are one aligned word.
    assert!(size_of::<Tally>() == 88 && offset_of!(Tally, account) == 16);
    assert!(align_of::<Tally>() == 8 && offset_of!(Tally, ifindex) == 4);
    // aya's packed LPM key over sixteen bytes.
    assert!(size_of::<ClassKey>() == 20 && offset_of!(ClassKey, address) == 4);
    assert!(size_of::<Cell>() == 16);
    assert!(size_of::<InterfaceCells>() == 256);

    assert!(size_of::<FlowKey>() == 44 && align_of::<FlowKey>() == 4);
    assert!(offset_of!(FlowKey, local_port) == 32);
    assert!(offset_of!(FlowKey, ifindex) == 36);
    assert!(offset_of!(FlowKey, protocol) == 40);

    assert!(size_of::<FlowCounters>() == 136 && align_of::<FlowCounters>() == 8);
    assert!(offset_of!(FlowCounters, slot) == 104);

    assert!(size_of::<EndpointKey>() == 20);
    assert!(size_of::<Endpoint>() == 8);

    assert!(size_of::<SocketSlot>() == 16);
    assert!(size_of::<Range>() == 56);
    assert!(offset_of!(Slot, rx_owner) == 16);
    assert!(offset_of!(Slot, srtt_us) == 32);
    assert!(offset_of!(Slot, last_ns) == 48);
    assert!(size_of::<Arrival>() == 24);
    assert!(offset_of!(Slot, rx_first_seq) == 144);
    assert!(offset_of!(Slot, ranges) == 192);
    // Whole cache lines: two connections never share one.
    assert!(size_of::<Slot>() == 20 * 64);
};

#[cfg(feature = "user")]
mod pod {
    use crate::*;

    // SAFETY: each type is repr(C), has no padding (the sizes above are the sums of the fields)
    // and is valid for every bit pattern.
    unsafe impl aya::Pod for AccountKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ClassKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Account {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tally {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Cell {}
    // SAFETY: as above.
    unsafe impl aya::Pod for InterfaceCells {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowCounters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for EndpointKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SocketSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Slot {}
}
