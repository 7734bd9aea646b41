//! The ABI between edgemeter's TC programs and its user space: every layout, map name and
//! cell number, in one place.
//!
//! The kernel side builds this crate for BPF, the gateway builds it with the `user` feature.
//! All types are `repr(C)`, fixed width, explicitly padded; sizes and offsets are asserted at
//! compile time in [`layout`]. A change to any of them raises [`SCHEMA`], which names the pin
//! directory: two schemas never share a map.
//!
//! # Who owns a byte
//!
//! Every frame is added once to its interface's [`cell::TOTAL`] and once either to a flow *and*
//! an account, or to another cell. So, per interface and direction, to the byte:
//!
//! ```text
//! total = Σ flows    + non_ip + icmp + other_l4 + fragment + unparsable + flows_full
//! total = Σ accounts + non_ip + icmp + other_l4 + fragment + unparsable + flows_full + accounts_full
//! ```
//!
//! [`Account`]s carry the bill: they are keyed by *owner* (a number the gateway interns for a
//! route, a listener's overhead, …) and only ever grow. [`FlowCounters`] carry the detail.
#![no_std]

pub mod account;
pub mod connection;
pub mod event;
pub mod flow;
pub mod interface;
mod layout;
pub mod slot;

pub use account::{Account, AccountKey, Cell, ClassKey, Direction, InterfaceCells, Tally, cell};
pub use connection::{Connection, KernelLayout, Process, via};
pub use event::{ConnectionEvent, DropCount, DropKey, EventHead, PacketEvent, kind};
pub use flow::{Endpoint, EndpointKey, FlowCounters, FlowKey, flow_flag, side};
pub use slot::{ARRIVALS, Arrival, RANGES, Range, Slot, SocketSlot, closed};

/// Version of every layout below. Part of the pin path.
pub const SCHEMA: u32 = 5;

/// The owner of frames that belong to no gateway connection.
pub const OWNER_FOREIGN: u32 = 0;

/// The class of remote addresses that no configured prefix holds.
pub const CLASS_DEFAULT: u32 = 0;

/// Names of the maps and programs in the object.
pub mod name {
    /// HASH [`crate::FlowKey`] → [`crate::FlowCounters`].
    pub const FLOWS: &str = "FLOWS";
    /// PERCPU_HASH [`crate::AccountKey`] → [`crate::Account`].
    pub const ACCOUNTS: &str = "ACCOUNTS";
    /// PERCPU_ARRAY of [`crate::Tally`]: what of accounts and totals needs no look-up.
    pub const TALLIES: &str = "TALLIES";
    /// PERCPU_HASH ifindex → [`crate::InterfaceCells`].
    pub const INTERFACES: &str = "INTERFACES";
    /// HASH [`crate::EndpointKey`] → [`crate::Endpoint`].
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// LPM_TRIE [`crate::ClassKey`] → class number: the class of a remote address.
    pub const CLASSES: &str = "CLASSES";
    /// ARRAY of one u32: generation of the class table. A flow that remembers another one asks
    /// again.
    pub const CLASS_GENERATION: &str = "CLASS_GENERATION";
    /// Memory-mapped ARRAY of [`crate::Slot`].
    pub const SLOTS: &str = "SLOTS";
    /// SK_STORAGE of [`crate::SocketSlot`].
    pub const SOCKET_SLOTS: &str = "SOCKET_SLOTS";
    /// PERCPU_ARRAY of [`crate::Cell`] by direction: frames of an interface that has no cells.
    pub const ORPHANS: &str = "ORPHANS";
    /// HASH socket cookie → [`crate::Connection`].
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// SK_STORAGE of [`crate::Process`], cloned from a listening socket to what it accepts.
    pub const PROCESSES: &str = "PROCESSES";
    /// HASH cookie of a network namespace → its number (0: the gateway's own), with
    /// [`crate::interface::OBSERVED`] while it is observed.
    pub const NAMESPACES: &str = "NAMESPACES";
    /// HASH interface number → 1: the gateway's flows are credited on another interface.
    pub const INNER: &str = "INNER";
    /// Read-only u32: the number of the network namespace the TC programs are attached in.
    pub const NAMESPACE: &str = "NAMESPACE";
    /// RINGBUF of [`crate::ConnectionEvent`] and [`crate::PacketEvent`].
    pub const EVENTS: &str = "EVENTS";
    /// ARRAY of one u32: not 0 while the ring's reader need not be woken.
    pub const EVENTS_AWAKE: &str = "EVENTS_AWAKE";
    /// PERCPU_ARRAY of u64 by [`crate::kind`]: events lost because the ring was full.
    pub const EVENTS_LOST: &str = "EVENTS_LOST";
    /// PERCPU_ARRAY of one u64: connections that found the table full.
    pub const CONNECTIONS_LOST: &str = "CONNECTIONS_LOST";
    /// HASH [`crate::DropKey`] → [`crate::DropCount`].
    pub const DROPS: &str = "DROPS";
    /// Read-only [`crate::KernelLayout`].
    pub const KERNEL_LAYOUT: &str = "KERNEL_LAYOUT";
    /// sock_ops program: a connection's life.
    pub const CONNECTION_LIFE: &str = "connection_life";
    /// cgroup program at socket(): whose it is.
    pub const SOCKET_MADE: &str = "socket_made";
    /// cgroup programs at connect(): whose it is.
    pub const CONNECT_V4: &str = "connect_v4";
    /// As [`CONNECT_V4`], for IPv6 sockets.
    pub const CONNECT_V6: &str = "connect_v6";
    /// Tracepoint program at `kfree_skb`.
    pub const FRAME_DROPPED: &str = "frame_dropped";
    /// Tracepoint program at `tcp_send_reset`.
    pub const RESET_SENT: &str = "reset_sent";
    /// Tracepoint program at `tcp_receive_reset`.
    pub const RESET_RECEIVED: &str = "reset_received";
    /// TC program for frames an interface receives.
    pub const INGRESS: &str = "meter_ingress";
    /// TC program for frames an interface sends.
    pub const EGRESS: &str = "meter_egress";
    /// As [`INGRESS`], for interfaces whose frames have no Ethernet header.
    pub const INGRESS_BARE: &str = "meter_ingress_bare";
    /// As [`EGRESS`], for interfaces whose frames have no Ethernet header.
    pub const EGRESS_BARE: &str = "meter_egress_bare";
}
