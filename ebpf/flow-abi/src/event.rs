//! What the programs say at once, through a ring buffer: connections opened and closed, segments
//! sent again, frames dropped. A full ring loses events, and the loss is counted; nothing is
//! billed from them.

use core::mem::{offset_of, size_of};

use crate::Connection;

/// Starts every record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventHead {
    /// Monotonic nanoseconds, when it happened.
    pub timestamp_ns: u64,
    /// [`kind`].
    pub kind: u32,
    /// Of [`kind::CLOSE`]: 1 when the connection is not in the table any more, and the record has
    /// all there is to know. 0 otherwise.
    pub last: u32,
}

/// Kinds of event, and which record they come in.
pub mod kind {
    /// A handshake is done: [`super::ConnectionEvent`].
    pub const OPEN: u32 = 1;
    /// A connection is over, or could not be opened: [`super::ConnectionEvent`].
    pub const CLOSE: u32 = 2;
    /// Segments were sent again: [`super::PacketEvent`].
    pub const RETRANSMIT: u32 = 3;
    /// A frame was dropped on this host: [`super::PacketEvent`].
    pub const DROP: u32 = 4;
    /// The host or the peer reset a connection: [`super::PacketEvent`], `detail` is 1 when the
    /// host did.
    pub const RESET: u32 = 5;
    /// Number of kinds, 0 included.
    pub const COUNT: usize = 6;
    /// Names, by number, as they appear in metrics.
    pub const NAMES: [&str; COUNT] = ["", "open", "close", "retransmit", "drop", "reset"];
}

/// A connection at its beginning or end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionEvent {
    /// When and what.
    pub head: EventHead,
    /// The connection, as of then.
    pub connection: Connection,
}

/// One frame or one socket's segments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketEvent {
    /// When and what.
    pub head: EventHead,
    /// Cookie of the network namespace; 0 when the frame had neither socket nor device.
    pub namespace: u64,
    /// Socket cookie; 0 when no socket is known.
    pub cookie: u64,
    /// Host's address for a retransmit, source address for a drop; IPv4 mapped.
    pub local: [u8; 16],
    /// Peer's address, or destination address.
    pub remote: [u8; 16],
    /// Host byte order; 0 without ports.
    pub local_port: u16,
    /// Host byte order; 0 without ports.
    pub remote_port: u16,
    /// IP protocol number; 0 when not IP.
    pub protocol: u32,
    /// Retransmit: segments. Drop: the kernel's reason. Reset: 1 when the host sent it.
    pub detail: u32,
    /// Drop: bytes of the buffer.
    pub length: u32,
    /// Drop: interface index; 0 when unknown.
    pub ifindex: u32,
    /// Zero.
    pub reserved: u32,
}

/// Why, where and in which network namespace frames were dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DropKey {
    /// Cookie of the network namespace; 0 when the frame had neither socket nor device.
    pub namespace: u64,
    /// The kernel's `skb_drop_reason`.
    pub reason: u32,
    /// Interface index; 0 when unknown.
    pub ifindex: u32,
}

/// Frames dropped. Buffers, to be exact: one may hold a run of segments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCount {
    /// Buffers.
    pub frames: u64,
    /// Their bytes, as far as headers were still in front.
    pub bytes: u64,
}

const _: () = {
    assert!(size_of::<DropKey>() == 16);
    assert!(size_of::<DropCount>() == 16);
    assert!(size_of::<EventHead>() == 16);
    assert!(size_of::<ConnectionEvent>() == 208);
    assert!(size_of::<PacketEvent>() == 88);
    assert!(offset_of!(PacketEvent, local_port) == 64);
};

#[cfg(feature = "user")]
mod pod {
    use super::{ConnectionEvent, DropCount, DropKey, EventHead, PacketEvent};

    // SAFETY: each type is repr(C), has no padding (the sizes above are the sums of the fields)
    // and is valid for every bit pattern.
    unsafe impl aya::Pod for EventHead {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ConnectionEvent {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PacketEvent {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DropKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DropCount {}
}
