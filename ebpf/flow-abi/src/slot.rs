//! Slots: memory shared with the kernel in which the gateway says which stream bytes belong to
//! whom, without a system call.
//!
//! A slot serves one TCP connection of the gateway. Before the gateway writes a response (or,
//! upstream, a request) it appends a [`Range`]: *from this stream offset on, bytes belong to this
//! owner*. TC egress splits every segment by range, so retransmitted and pipelined bytes go to
//! the request that first wrote them. The kernel adds what it saw to the range, which is how the
//! access log knows a single request's wire bytes.

/// Ranges remembered per connection. Older ones are overwritten; bytes that still belong to an
/// overwritten range go to the connection's overhead and are counted.
pub const RANGES: usize = 16;

/// Frames remembered that came during a TLS handshake. A client sends two or three after its
/// first; with a certificate chain of its own a few more.
pub const ARRIVALS: usize = 8;

/// Value of the per-socket storage: which slot, and which use of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketSlot {
    /// Must equal [`Slot::generation`], else the slot has been given to another connection.
    pub generation: u64,
    /// Index into the slots.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

/// A half-open run of stream bytes, up to the next range's offset.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First payload byte of the stream that belongs to `owner`. Written by user space.
    pub offset: u64,
    /// Owner. Written by user space.
    pub owner: u32,
    /// Zero.
    pub reserved: u32,
    /// Wire bytes sent, retransmits included. Written by the kernel, like all below.
    pub wire_bytes: u64,
    /// Payload bytes sent, retransmits included.
    pub payload_bytes: u64,
    /// Payload bytes of retransmits, part of `payload_bytes`.
    pub retransmit_payload_bytes: u64,
    /// Frames sent, retransmits included.
    pub frames: u64,
    /// Retransmitted frames, part of `frames`.
    pub retransmit_frames: u64,
}

/// A frame, or a run of merged frames, that came while the TLS handshake was under way. Whose it
/// is is known only afterwards, when the gateway has counted where the handshake ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Not 0: the place is taken.
    pub taken: u64,
    /// Wire bytes of all its frames. Written last; 0 until then.
    pub bytes: u32,
    /// TCP sequence number of its first payload byte.
    pub seq: u32,
    /// Payload bytes.
    pub payload: u32,
    /// Payload bytes per frame, the last one excepted.
    pub segment: u16,
    /// Bytes of each frame that are not payload, padding excepted.
    pub header: u16,
}

/// One connection's shared memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// User space: which use of this slot; 0 when free.
    pub generation: u64,
    /// User space: ranges ever appended. The newest is `ranges[(head - 1) % RANGES]`.
    pub head: u64,
    /// User space: owner of received payload now; 0 while no request has claimed the stream.
    pub rx_owner: u32,
    /// User space: owner of sent bytes below the first range.
    pub overhead_owner: u32,
    /// User space: 1 when the host opened the connection (its SYN counts in `bytes_acked`).
    pub active: u32,
    /// User space: 1 when payload received before binding belongs to the first request
    /// (plain text), 0 when it is a TLS handshake.
    pub claims_unbound: u32,
    /// Kernel: smoothed round-trip time, microseconds.
    pub srtt_us: u32,
    /// Kernel: minimum round-trip time, microseconds.
    pub min_rtt_us: u32,
    /// Kernel: [`closed`] bits.
    pub closed: u32,
    /// Kernel: interface the connection was bound on; 0 until then.
    pub ifindex: u32,
    /// Kernel: coarse monotonic time of the last frame, nanoseconds.
    pub last_ns: u64,
    /// Kernel: stream bytes the peer has acknowledged.
    pub acked_offset: u64,
    /// Kernel: wire bytes received that no request had claimed when they came.
    pub rx_unclaimed_bytes: u64,
    /// Kernel: frames in `rx_unclaimed_bytes`.
    pub rx_unclaimed_frames: u64,
    /// Kernel: wire bytes received for `rx_owner`.
    pub rx_owned_bytes: u64,
    /// Kernel: frames in `rx_owned_bytes`.
    pub rx_owned_frames: u64,
    /// Kernel: payload bytes sent below the oldest remembered range (0 unless ranges overflow).
    pub tx_lost_range_bytes: u64,
    /// Kernel: wire bytes received before binding on a connection that does not claim them (its
    /// TLS handshake).
    pub rx_handshake_bytes: u64,
    /// Kernel: frames in `rx_handshake_bytes`.
    pub rx_handshake_frames: u64,
    /// Kernel: layer-4 payload bytes in `rx_unclaimed_bytes`.
    pub rx_unclaimed_payload_bytes: u64,
    /// Kernel: layer-4 payload bytes in `rx_handshake_bytes`.
    pub rx_handshake_payload_bytes: u64,
    /// Kernel: class of the remote address when the connection was bound.
    pub class: u32,
    /// User space: 1 while the TLS handshake is under way, and what comes is remembered.
    pub handshaking: u32,
    /// Kernel: TCP sequence number of the first stream byte received.
    pub rx_first_seq: u32,
    /// Kernel: 1 once `rx_first_seq` is known.
    pub rx_first_known: u32,
    /// Zero.
    pub reserved: [u32; 10],
    /// The ring of ranges.
    pub ranges: [Range; RANGES],
    /// Kernel: the first frames that came while `handshaking`; further ones are in
    /// `rx_unclaimed_bytes`.
    pub early: [Arrival; ARRIVALS],
}

/// Bits of [`Slot::closed`].
pub mod closed {
    /// The peer sent FIN.
    pub const FIN_RX: u32 = 1;
    /// The host sent FIN.
    pub const FIN_TX: u32 = 2;
    /// Either side sent RST.
    pub const RST: u32 = 4;
}
