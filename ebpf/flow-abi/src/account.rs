//! Accounts (who owns the bytes) and interface cells (bytes in no flow).

/// Key of an account: an owner on an interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountKey {
    /// Owner number, interned by the gateway; [`crate::OWNER_FOREIGN`] is nobody's.
    pub owner: u32,
    /// Interface index the frames crossed.
    pub ifindex: u32,
    /// Class of the remote address: what [`ClassKey`] said of it; [`crate::CLASS_DEFAULT`] is
    /// in no class.
    pub class: u32,
}

/// Key of the class table, a longest-prefix-match trie over remote addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassKey {
    /// Leading bits of `address` that count.
    pub prefix_len: u32,
    /// Network byte order; IPv4 is mapped, its prefix lengths 96 more.
    pub address: [u8; 16],
}

/// Cumulative counters of one owner on one interface. Per CPU: plain additions suffice.
///
/// Wire bytes are layer-2 bytes without the frame check sequence, headers and retransmits
/// included; payload bytes are layer-4 payload, retransmitted payload included.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Wire bytes sent.
    pub tx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Layer-4 payload bytes sent.
    pub tx_payload_bytes: u64,
    /// Wire bytes of retransmitted frames, part of `tx_bytes`.
    pub tx_retransmit_bytes: u64,
    /// Retransmitted frames, part of `tx_frames`.
    pub tx_retransmit_frames: u64,
    /// Layer-4 payload bytes of retransmitted frames, part of `tx_payload_bytes`: what is left
    /// without them is goodput.
    pub tx_retransmit_payload_bytes: u64,
    /// Wire bytes received.
    pub rx_bytes: u64,
    /// Frames received.
    pub rx_frames: u64,
    /// Layer-4 payload bytes received.
    pub rx_payload_bytes: u64,
}

/// Counters where a processor finds them without a look-up: key and counters side by side, at a
/// place that follows from the key ([`Tally::place`]). Per CPU, and each CPU's keys are its own:
/// the first key there keeps the place, what else falls on it is counted in the hash tables. So a
/// counter's value is the sum of its tallies and of its entry there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// [`AccountKey::owner`], or [`Tally::TOTAL`]. Written at once with `ifindex`, after `class`.
    pub owner: u32,
    /// [`AccountKey::ifindex`]; all of key and counters is zero while the place is free.
    pub ifindex: u32,
    /// [`AccountKey::class`]; 0 of a total.
    pub class: u32,
    /// Zero.
    pub reserved: u32,
    /// Since the place was taken. Of a total: bytes and frames of either direction.
    pub account: Account,
}

impl Tally {
    /// Places there are. A power of two.
    pub const COUNT: u32 = 1024;
    /// "Owner" of an interface's total, [`cell::TOTAL`].
    pub const TOTAL: u32 = u32::MAX;

    /// Where a key's tally is. Numbers are small and follow one another: so do places, and
    /// owners of one interface are never on each other's up to [`Self::COUNT`].
    #[inline(always)]
    #[must_use]
    pub const fn place(owner: u32, ifindex: u32, class: u32) -> u32 {
        // The namespace's number is in the upper bits.
        let interface = ifindex ^ ifindex >> 15;
        let sum = owner.wrapping_add(interface.wrapping_mul(389));
        sum.wrapping_add(class.wrapping_mul(613)) & (Self::COUNT - 1)
    }
}

/// Direction as seen from the observed interface.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Received by the host.
    Rx = 0,
    /// Sent by the host.
    Tx = 1,
}

/// A counter pair outside the flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Wire bytes.
    pub bytes: u64,
    /// Frames.
    pub frames: u64,
}

/// Cell numbers within a direction.
pub mod cell {
    /// Everything the interface moved.
    pub const TOTAL: usize = 0;
    /// Neither IPv4 nor IPv6 (ARP, LLDP, …).
    pub const NON_IP: usize = 1;
    /// IP, but neither TCP nor UDP nor ICMP (ESP, GRE, SCTP, …).
    pub const OTHER_L4: usize = 2;
    /// IP fragments: only the first has ports, so none is guessed into a flow.
    pub const FRAGMENT: usize = 3;
    /// Truncated or malformed headers.
    pub const UNPARSABLE: usize = 4;
    /// The flow table was full: in no flow and in no account.
    pub const FLOWS_FULL: usize = 5;
    /// The account table was full: in a flow, but in no account.
    pub const ACCOUNTS_FULL: usize = 6;
    /// ICMP and ICMPv6.
    pub const ICMP: usize = 7;
    /// Number of cells.
    pub const COUNT: usize = 8;
    /// Names, by number, as they appear in metrics and reports.
    pub const NAMES: [&str; COUNT] = [
        "total",
        "non_ip",
        "other_l4",
        "fragment",
        "unparsable",
        "flows_full",
        "accounts_full",
        "icmp",
    ];
}

/// Both directions of an interface's cells, indexed by [`Direction`] and [`cell`]. Per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCells {
    /// `[direction][cell]`.
    pub cells: [[Cell; cell::COUNT]; 2],
}
