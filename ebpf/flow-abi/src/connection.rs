//! One TCP connection as its socket lived it, and whose it is.
//!
//! The programs on the cgroup hooks keep one [`Connection`] per socket of an observed network
//! namespace, from the SYN (host opened it) or the handshake's end (host accepted it) to CLOSE.
//! Counters are copies of the kernel's own, taken when the state changes, a round trip was
//! measured or a segment was sent again; whoever needs the present value asks the socket.

use core::mem::{offset_of, size_of};

/// Who called the system call that made a socket, or that connected it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// cgroup v2 id: the inode number of its directory.
    pub cgroup: u64,
    /// Process id (thread group) in the initial pid namespace; 0 when unknown.
    pub pid: u32,
    /// [`via`].
    pub via: u32,
    /// Command name of the calling thread, NUL padded.
    pub command: [u8; 16],
}

/// How a [`Process`] is known.
pub mod via {
    /// Not at all: the socket is older than the programs.
    pub const UNKNOWN: u32 = 0;
    /// It made the socket; on an accepted connection: it made the listening socket.
    pub const SOCKET: u32 = 1;
    /// It called connect().
    pub const CONNECT: u32 = 2;
}

/// A connection. Field by field the kernel's `tcp_sock`, unless it says otherwise.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Socket cookie: unique per boot, never 0.
    pub cookie: u64,
    /// Cookie of its network namespace.
    pub namespace: u64,
    /// Monotonic nanoseconds of the first SYN (active) or of the handshake's end (passive).
    pub opened_ns: u64,
    /// Monotonic nanoseconds of the handshake's end; 0 until then.
    pub established_ns: u64,
    /// Monotonic nanoseconds of CLOSE; 0 until then.
    pub closed_ns: u64,
    /// Stream bytes the peer has acknowledged, SYN and FIN included where they were.
    pub bytes_acked: u64,
    /// Stream bytes received in order.
    pub bytes_received: u64,
    /// Whose it is.
    pub process: Process,
    /// Host's address, IPv4 mapped.
    pub local: [u8; 16],
    /// Peer's address, IPv4 mapped.
    pub remote: [u8; 16],
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// 1 when the host opened the connection.
    pub active: u32,
    /// `TCP_ESTABLISHED` (1) … `TCP_CLOSE` (7) …, as in `include/net/tcp_states.h`.
    pub state: u32,
    /// State before CLOSE; 0 until then.
    pub last_state: u32,
    /// Handshake, microseconds: SYN to SYN-ACK (active; sent-again SYNs included), SYN-ACK to ACK
    /// (passive; 0 when the SYN-ACK had to be sent again).
    pub handshake_us: u32,
    /// Smoothed round-trip time, microseconds; 0 when never measured.
    pub srtt_us: u32,
    /// Windowed minimum round-trip time, microseconds; 0 when never measured.
    pub min_rtt_us: u32,
    /// Segments sent again (`total_retrans`).
    pub retransmits: u32,
    /// Segments sent.
    pub segments_out: u32,
    /// Segments received.
    pub segments_in: u32,
    /// Segments marked lost over the connection's life (`lost`); [`UNKNOWN`] where the running
    /// kernel's BTF has no such field.
    pub lost: u32,
    /// Segments received out of order (`rcv_ooopack`); [`UNKNOWN`] likewise.
    pub out_of_order: u32,
    /// Resets the host sent.
    pub resets_sent: u32,
    /// Resets the peer sent.
    pub resets_received: u32,
    /// Frames in which the host said: window 0.
    pub zero_windows_sent: u32,
    /// Frames in which the peer said: window 0.
    pub zero_windows_received: u32,
    /// Frames of the connection dropped on this host, either way.
    pub drops: u32,
    /// Interface number that counts zero windows: the first that saw one. A frame that crosses
    /// several is counted once.
    pub window_interface: u32,
}

/// A value the running kernel does not offer.
pub const UNKNOWN: u32 = u32::MAX;

/// `TCP_CLOSE`.
pub const STATE_CLOSE: u32 = 7;
/// `TCP_SYN_SENT`.
pub const STATE_SYN_SENT: u32 = 2;
/// `TCP_LAST_ACK`.
pub const STATE_LAST_ACK: u32 = 9;
/// `TCP_ESTABLISHED`.
pub const STATE_ESTABLISHED: u32 = 1;

/// Offsets of kernel structure members, from the running kernel's BTF. 0 means not found (the
/// first member is never one of these) and turns the feature off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelLayout {
    /// `tcp_sock.rcv_ooopack`, u32.
    pub tcp_out_of_order: u32,
    /// `tcp_sock.lost`, u32.
    pub tcp_lost: u32,
    /// `sock_common.skc_net`, pointer to `net`.
    pub sock_namespace: u32,
    /// `net.net_cookie`, u64.
    pub namespace_cookie: u32,
    /// `net_device.nd_net`, pointer to `net`.
    pub device_namespace: u32,
    /// `net_device.ifindex`, int.
    pub device_index: u32,
    /// `sk_buff.dev`, pointer to `net_device`.
    pub skb_device: u32,
    /// `sk_buff.sk`, pointer to `sock`.
    pub skb_socket: u32,
    /// `sk_buff.len`, u32.
    pub skb_len: u32,
    /// `sk_buff.head`, pointer.
    pub skb_head: u32,
    /// `sk_buff.network_header`, u16.
    pub skb_network_header: u32,
    /// `sk_buff.protocol`, be16.
    pub skb_protocol: u32,
    /// 1 when `kfree_skb` names the receiving socket as its fourth argument (Linux 6.11).
    pub drop_names_socket: u32,
}

const _: () = {
    assert!(size_of::<Process>() == 32);
    assert!(size_of::<Connection>() == 192);
    assert!(offset_of!(Connection, process) == 56);
    assert!(offset_of!(Connection, local) == 88);
    assert!(offset_of!(Connection, active) == 124);
    assert!(size_of::<KernelLayout>() == 52);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Connection, KernelLayout, Process};

    // SAFETY: each type is repr(C), has no padding (the sizes above are the sums of the fields)
    // and is valid for every bit pattern.
    unsafe impl aya::Pod for Process {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Connection {}
    // SAFETY: as above.
    unsafe impl aya::Pod for KernelLayout {}
}
