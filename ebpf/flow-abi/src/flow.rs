//! Flows (one 5-tuple on one interface) and the endpoints that make a flow the gateway's.

/// One TCP or UDP 5-tuple on one interface, from the host's point of view.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Address on the host's side of the interface; IPv4 is mapped (`::ffff:a.b.c.d`).
    pub local: [u8; 16],
    /// Address of the other side.
    pub remote: [u8; 16],
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// Interface index.
    pub ifindex: u32,
    /// IP protocol number: 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Cumulative counters and state of a flow. Shared by all CPUs: counters are added atomically.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCounters {
    /// Wire bytes received.
    pub rx_bytes: u64,
    /// Frames received.
    pub rx_frames: u64,
    /// Wire bytes sent.
    pub tx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Wire bytes of retransmitted frames, part of `tx_bytes`.
    pub tx_retransmit_bytes: u64,
    /// Retransmitted frames, part of `tx_frames`.
    pub tx_retransmit_frames: u64,
    /// Wire bytes of payload-carrying frames received before the flow was bound to a slot.
    pub rx_unbound_bytes: u64,
    /// Frames counted in `rx_unbound_bytes`.
    pub rx_unbound_frames: u64,
    /// Layer-4 payload bytes counted in `rx_unbound_bytes`.
    pub rx_unbound_payload_bytes: u64,
    /// Coarse monotonic time of the first frame, nanoseconds.
    pub first_ns: u64,
    /// Coarse monotonic time of the last frame, nanoseconds.
    pub last_ns: u64,
    /// Socket cookie, 0 until a local socket sent a frame.
    pub cookie: u64,
    /// Generation of the slot in `slot`; 0 while unbound.
    pub slot_generation: u64,
    /// Index into the slots.
    pub slot: u32,
    /// [`flow_flag`] bits.
    pub flags: u32,
    /// Owner of frames no request owns (handshake, ACK, FIN).
    pub overhead_owner: u32,
    /// Owner of received payload until a request claims it.
    pub unclaimed_owner: u32,
    /// Smoothed round-trip time of the local socket, microseconds; 0 when unknown.
    pub srtt_us: u32,
    /// Windowed minimum round-trip time, microseconds; 0 when unknown.
    pub min_rtt_us: u32,
    /// Class of the remote address, valid while `class_generation` is the table's.
    pub class: u32,
    /// Generation of the class table that `class` was asked of.
    pub class_generation: u32,
}

/// TCP flags seen on a flow: the low byte received, the next byte sent.
pub mod flow_flag {
    /// FIN, in either byte.
    pub const FIN: u32 = 0x01;
    /// SYN, in either byte.
    pub const SYN: u32 = 0x02;
    /// RST, in either byte.
    pub const RST: u32 = 0x04;
    /// Shift of the sent byte.
    pub const TX_SHIFT: u32 = 8;
    /// Of UDP: its first datagram has been looked at.
    pub const LOOKED: u32 = 1 << 16;
    /// Of UDP: either port is 443 and the first datagram seen begins with a QUIC long header.
    pub const QUIC: u32 = 1 << 17;
}

/// Which end of a flow an [`EndpointKey`] describes.
pub mod side {
    /// A listener of the gateway: the local end. The address may be all zero (any).
    pub const LISTENER: u16 = 0;
    /// A peer of an upstream: the remote end.
    pub const PEER: u16 = 1;
}

/// An address and port that make a flow the gateway's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointKey {
    /// Address, IPv4 mapped; all zero stands for every local address of a listener.
    pub address: [u8; 16],
    /// Host byte order.
    pub port: u16,
    /// [`side`].
    pub side: u16,
}

/// Owners of a flow at an endpoint, for frames no request owns.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// See [`FlowCounters::overhead_owner`].
    pub overhead_owner: u32,
    /// See [`FlowCounters::unclaimed_owner`].
    pub unclaimed_owner: u32,
}
