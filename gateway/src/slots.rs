//! The slots: memory the gateway and the TC programs share, one slot per TCP connection.
//!
//! Here the gateway says whose bytes follow ([`Connection::begin_sending`]: the stream offset, then a
//! store. Who writes counts; for a socket that pingora writes to the kernel is asked) and whose bytes come ([`Connection::claim`], a store), and reads back what the
//! wire did with them. Layouts and the kernel's side: [`flow_abi::slot`].

mod arrivals;
mod memory;
mod socket;

use std::{
    collections::{HashSet, VecDeque},
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use flow_abi::{ARRIVALS, Arrival, FlowCounters, FlowKey, RANGES, Range, Slot, SocketSlot, closed};
use prometheus_client::metrics::histogram::Histogram;

pub(crate) use self::socket::bytes_acked;
use self::{
    arrivals::Divided,
    memory::Memory,
    socket::{mapped, round_trip_us, socket_cookie, stream_offset},
};
use crate::{class::ClassId, kernel::batch, owner::OwnerId};

/// A closed connection's slot is given away again after this much silence: its last
/// retransmits must still find their ranges.
const QUIET_NS: u64 = 3_000_000_000;
/// The same for a connection that never closed properly, or of an earlier process.
const SILENT_NS: u64 = 900_000_000_000;

/// The observed interfaces of the gateway's own network namespace; they come and go.
pub type Interfaces = Box<dyn Fn() -> Vec<u32> + Send + Sync>;

/// All slots.
pub struct Slots {
    memory: Memory,
    socket_slots: OwnedFd,
    flows: OwnedFd,
    interfaces: OnceLock<Interfaces>,
    book: Mutex<Book>,
    next_generation: AtomicU64,
    /// Connections that found no free slot: their bytes stay with their endpoint's overhead.
    pub exhausted: AtomicU64,
    /// Ranges overwritten while their bytes were unacknowledged.
    pub overwritten: AtomicU64,
    /// TLS handshakes with more frames than a slot remembers: what came beyond those is the first
    /// request's.
    pub undivided: AtomicU64,
}

#[derive(Default)]
struct Book {
    free: VecDeque<u32>,
    /// Closed here, or left by an earlier process; may still send. With the time it was closed.
    closing: Vec<(u32, u64)>,
    /// Another process's for as long as it lives: an upgrade is under way.
    withheld: HashSet<u32>,
}

/// What is received before the first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing but that request itself.
    Nothing,
    /// A TLS handshake that was over before the slot was given.
    Handshake,
    /// A TLS handshake that begins now; [`Connection::handshake_over`] says where it ended.
    HandshakeToCome,
}

/// What a new connection's slot starts with.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// Owner of bytes no request owns.
    pub overhead: OwnerId,
    /// True when the gateway opened the connection (upstream leg).
    pub active: bool,
    /// What comes before the first request.
    pub before: Before,
    /// Local and remote address.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
}

/// Wire bytes received and claimed from the unclaimed account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claimed {
    /// Interface they came by.
    pub ifindex: u32,
    /// Class of the remote address.
    pub class: ClassId,
    /// Wire bytes.
    pub bytes: u64,
    /// Frames.
    pub frames: u64,
    /// Layer-4 payload bytes.
    pub payload_bytes: u64,
}

impl Claimed {
    /// With more of the same interface and class.
    fn plus(self, more: Self) -> Self {
        Self {
            bytes: self.bytes + more.bytes,
            frames: self.frames + more.frames,
            payload_bytes: self.payload_bytes + more.payload_bytes,
            ..self
        }
    }

    /// What has come since an earlier reading.
    fn since(self, earlier: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(earlier.bytes),
            frames: self.frames.saturating_sub(earlier.frames),
            payload_bytes: self.payload_bytes.saturating_sub(earlier.payload_bytes),
            ..self
        }
    }
}

/// A request's hold on what its connection receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    sequence: u64,
    /// Wire bytes received for owners, this request's not among them.
    before: u64,
}

/// Holds whose end is remembered: a request may still ask after the next ones have begun.
const ENDS: usize = 4;

/// A range that was appended, to be read back.
#[derive(Clone, Copy, Debug)]
pub struct RangeTicket {
    sequence: u64,
    /// Stream offset of its first byte.
    pub offset: u64,
}

/// What the kernel saw of one range.
#[derive(Clone, Copy, Debug, Default)]
pub struct RangeReading {
    /// Wire bytes sent, retransmits included.
    pub wire_bytes: u64,
    /// Payload bytes sent for the first time.
    pub first_payload_bytes: u64,
    /// Retransmitted frames.
    pub retransmit_frames: u64,
}

/// One connection's hold on a slot. Dropping the last reference frees the slot once the
/// connection has gone quiet.
pub struct Connection {
    slots: Arc<Slots>,
    index: u32,
    fd: RawFd,
    cookie: u64,
    active: bool,
    /// Where whoever writes to the socket counts what it wrote; unset where nobody counts, and
    /// then the kernel is asked.
    sent: OnceLock<Arc<AtomicU64>>,
    /// Until its first request has taken it; 0 when not known.
    handshake_us: AtomicU32,
    /// What had been received before the slot was given; part of the slot's counters once bound.
    unbound: Claimed,
    /// The kernel was binding the flow when `unbound` was read: its counters are the slot's.
    binding: bool,
    state: Mutex<State>,
    overhead: OwnerId,
}

struct State {
    /// What of the slot's unclaimed bytes has been claimed.
    claimed: Claimed,
    /// What of the TLS handshake's bytes has been taken.
    handshake: Claimed,
    /// Offset of the first received stream byte after the TLS handshake, once it is over.
    application_from: Option<u64>,
    /// Holds ever taken, and where the last few ended because another one began.
    holds: u64,
    ends: [u64; ENDS],
    last_sender: Option<OwnerId>,
    last_ticket: RangeTicket,
    /// Ranges whose bytes may still be sent again, oldest first, and who is to be told how often
    /// they were. [`RANGES`] at most.
    counting: VecDeque<(RangeTicket, Histogram)>,
}

impl Slots {
    /// Maps the slots and takes over what an earlier process left.
    ///
    /// # Errors
    /// The map cannot be memory-mapped.
    pub fn open(
        slots: &OwnedFd,
        socket_slots: OwnedFd,
        flows: OwnedFd,
        len: u32,
    ) -> io::Result<Arc<Self>> {
        let memory = Memory::map(slots, len)?;
        let slots = Self::over(memory, socket_slots, flows);
        slots.receive(0..len);
        Ok(Arc::new(slots))
    }

    /// Maps the slots while another process has them all: none is given to a connection before
    /// [`Slots::receive`], and those it keeps are not touched before [`Slots::receive_rest`].
    ///
    /// # Errors
    /// The map cannot be memory-mapped.
    pub fn open_beside(
        slots: &OwnedFd,
        socket_slots: OwnedFd,
        flows: OwnedFd,
        len: u32,
    ) -> io::Result<Arc<Self>> {
        let memory = Memory::map(slots, len)?;
        let slots = Self::over(memory, socket_slots, flows);
        slots.book().withheld = (0..len).collect();
        Ok(Arc::new(slots))
    }

    fn over(memory: Memory, socket_slots: OwnedFd, flows: OwnedFd) -> Self {
        Self {
            memory,
            socket_slots,
            flows,
            interfaces: OnceLock::new(),
            book: Mutex::default(),
            // Monotonic within a boot, as the pinned map is.
            next_generation: AtomicU64::new(now_ns()),
            exhausted: AtomicU64::new(0),
            overwritten: AtomicU64::new(0),
            undivided: AtomicU64::new(0),
        }
    }

    /// Takes these slots over from a process that has let go of them: free ones may be given away
    /// at once, others when their connections are seen to be over.
    pub fn receive(&self, indices: impl IntoIterator<Item = u32>) {
        let mut book = self.book();
        for index in indices.into_iter().filter(|index| *index < self.memory.len) {
            book.withheld.remove(&index);
            // SAFETY: in range; the kernel writes other fields only.
            let generation =
                unsafe { (&raw const (*self.memory.slot(index)).generation).read_volatile() };
            if generation == 0 {
                book.free.push_back(index);
            } else {
                book.closing.push((index, now_ns()));
            }
        }
    }

    /// The other process has ended: what it kept is ours.
    pub fn receive_rest(&self) {
        let rest = std::mem::take(&mut self.book().withheld);
        self.receive(rest);
    }

    /// Lets go of free slots, for another process. A few stay: requests under way still make
    /// upstream connections.
    #[must_use]
    pub fn hand_over(&self) -> Vec<u32> {
        const KEPT_MIN: usize = 64;
        let mut book = self.book();
        let elsewhere = book.free.len() + book.closing.len() + book.withheld.len();
        let used = (self.memory.len as usize).saturating_sub(elsewhere);
        let kept = used.max(KEPT_MIN).min(book.free.len() / 2);
        let handed = book.free.split_off(kept);
        book.withheld.extend(&handed);
        handed.into()
    }

    /// Says where the observed interfaces' numbers are: there a new connection's flow is looked
    /// for.
    pub fn observe(&self, interfaces: Interfaces) {
        let _ = self.interfaces.set(interfaces);
    }

    /// Gives a connection a slot. None when there is none, or the socket is gone.
    pub fn adopt(self: &Arc<Self>, fd: RawFd, opening: Opening) -> Option<Arc<Connection>> {
        let Some(index) = self.book().free.pop_front() else {
            self.exhausted.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let generation = self.next_generation.fetch_add(1, Ordering::Relaxed);
        let slot = self.memory.slot(index);
        // SAFETY: the slot is ours alone until its generation is stored; the kernel looks at no
        // other field before that.
        unsafe {
            slot.write(Slot {
                generation: 0,
                head: 0,
                rx_owner: 0,
                overhead_owner: opening.overhead.0,
                active: u32::from(opening.active),
                claims_unbound: u32::from(opening.before == Before::Nothing),
                srtt_us: 0,
                min_rtt_us: 0,
                closed: 0,
                ifindex: 0,
                last_ns: now_ns(),
                acked_offset: 0,
                rx_unclaimed_bytes: 0,
                rx_unclaimed_frames: 0,
                rx_owned_bytes: 0,
                rx_owned_frames: 0,
                tx_lost_range_bytes: 0,
                rx_handshake_bytes: 0,
                rx_handshake_frames: 0,
                rx_unclaimed_payload_bytes: 0,
                rx_handshake_payload_bytes: 0,
                class: 0,
                handshaking: u32::from(opening.before == Before::HandshakeToCome),
                rx_first_seq: 0,
                rx_first_known: 0,
                reserved: [0; 10],
                ranges: [Range::default(); RANGES],
                early: [Arrival::default(); ARRIVALS],
            });
            fence(Ordering::Release);
            (&raw mut (*slot).generation).write_volatile(generation);
        }
        let value = SocketSlot {
            generation,
            slot: index,
            reserved: 0,
        };
        // The key of socket storage is a descriptor.
        if let Err(error) = batch::put(self.socket_slots.as_fd(), &fd, &value) {
            log::debug!("no socket storage for fd {fd}: {error}");
            self.retire(index);
            return None;
        }
        // From here on a frame that carries payload binds the flow to the slot. What came before
        // waits in the flow, and is final: read it now.
        let (unbound, binding) = if opening.before == Before::Nothing {
            self.unbound(&opening, generation)
        } else {
            (Claimed::default(), false)
        };
        Some(Arc::new(Connection {
            slots: Arc::clone(self),
            unbound,
            binding,
            index,
            fd,
            cookie: socket_cookie(fd),
            active: opening.active,
            sent: OnceLock::new(),
            handshake_us: AtomicU32::new(match opening.before {
                // Data has been acknowledged since.
                Before::Handshake => 0,
                Before::Nothing | Before::HandshakeToCome => round_trip_us(fd),
            }),
            overhead: opening.overhead,
            state: Mutex::new(State {
                claimed: Claimed::default(),
                handshake: Claimed::default(),
                application_from: None,
                holds: 0,
                ends: [0; ENDS],
                last_sender: None,
                last_ticket: RangeTicket {
                    sequence: 0,
                    offset: 0,
                },
                counting: VecDeque::new(),
            }),
        }))
    }

    /// Payload-carrying frames a flow received before it was bound, and whether binding it has
    /// begun.
    fn unbound(&self, opening: &Opening, generation: u64) -> (Claimed, bool) {
        let Some((local, remote)) = opening.addresses else {
            return (Claimed::default(), false);
        };
        let interfaces = self.interfaces.get().map(|numbers| numbers());
        for ifindex in interfaces.iter().flatten() {
            let key = FlowKey {
                local: mapped(local.ip()),
                remote: mapped(remote.ip()),
                local_port: local.port(),
                remote_port: remote.port(),
                ifindex: *ifindex,
                protocol: 6,
                reserved: [0; 3],
            };
            let found = batch::look_up::<FlowKey, FlowCounters>(self.flows.as_fd(), &key);
            if let Ok(Some(flow)) = found {
                let unbound = Claimed {
                    ifindex: *ifindex,
                    class: ClassId(flow.class),
                    bytes: flow.rx_unbound_bytes,
                    frames: flow.rx_unbound_frames,
                    payload_bytes: flow.rx_unbound_payload_bytes,
                };
                return (unbound, flow.slot_generation == generation);
            }
        }
        (Claimed::default(), false)
    }

    /// The highest owner number in any slot, for numbers a lost ledger gave.
    #[must_use]
    pub fn highest_owner(&self) -> u32 {
        let mut highest = 0;
        for index in 0..self.memory.len {
            // SAFETY: in range; plain data that others write, hence volatile.
            let slot = unsafe { self.memory.slot(index).read_volatile() };
            if slot.generation != 0 {
                let owners = slot.ranges.iter().map(|range| range.owner);
                let owners = owners.chain([slot.rx_owner, slot.overhead_owner]);
                highest = owners.fold(highest, u32::max);
            }
        }
        highest
    }

    /// Frees the slots of connections that have closed and gone quiet. Returns `(in use, free)`.
    pub fn reclaim(&self) -> (usize, usize) {
        let now = now_ns();
        // Looked at without the book: a worker that opens or closes a connection does not wait for
        // as long as this takes with a hundred thousand of them.
        let mut closing = std::mem::take(&mut self.book().closing);
        let mut freed = Vec::new();
        closing.retain(|(index, retired)| {
            let slot = self.memory.slot(*index);
            // SAFETY: in range; plain data the kernel also writes, hence volatile.
            let (ends, last, bound) = unsafe {
                (
                    (&raw const (*slot).closed).read_volatile(),
                    (&raw const (*slot).last_ns).read_volatile(),
                    (&raw const (*slot).ifindex).read_volatile() != 0,
                )
            };
            let both = closed::FIN_RX | closed::FIN_TX;
            // A connection that never met its flow has no retransmits to come: it is on an
            // interface nobody observes, or was closed before it carried a byte.
            let done = ends & closed::RST != 0 || ends & both == both || !bound;
            let quiet = now.saturating_sub(last.max(*retired));
            let free = quiet > if done { QUIET_NS } else { SILENT_NS };
            if free {
                freed.push(*index);
            }
            !free
        });
        for index in &freed {
            // SAFETY: in range; the generation is ours to write.
            unsafe { (&raw mut (*self.memory.slot(*index)).generation).write_volatile(0) };
        }
        let mut book = self.book();
        closing.append(&mut book.closing);
        book.closing = closing;
        book.free.extend(freed);
        (self.memory.len as usize - book.free.len(), book.free.len())
    }

    /// Connections held by a task of ours on which no frame came or went for longer than each of
    /// these times, nanoseconds. Looks at every slot: not for every tick.
    pub fn silent<const N: usize>(&self, longer_than_ns: [u64; N]) -> [usize; N] {
        let now = now_ns();
        let (closing, withheld) = {
            let book = self.book();
            (book.closing.clone(), book.withheld.clone())
        };
        let closing = closing.iter().map(|(index, _)| *index);
        let others: HashSet<u32> = closing.chain(withheld).collect();
        let mut counts = [0; N];
        for index in (0..self.memory.len).filter(|index| !others.contains(index)) {
            let slot = self.memory.slot(index);
            // SAFETY: in range; plain data the kernel also writes, hence volatile.
            let (generation, last) = unsafe {
                (
                    (&raw const (*slot).generation).read_volatile(),
                    (&raw const (*slot).last_ns).read_volatile(),
                )
            };
            // 0: free, or no frame seen yet.
            if generation == 0 || last == 0 {
                continue;
            }
            for (count, bound) in counts.iter_mut().zip(longer_than_ns) {
                *count += usize::from(now.saturating_sub(last) > bound);
            }
        }
        counts
    }

    fn retire(&self, index: u32) {
        self.book().closing.push((index, now_ns()));
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Whoever writes to the socket counts every byte that it takes, from the first one on.
    pub fn counts(&self, sent: Arc<AtomicU64>) {
        let _ = self.sent.set(sent);
    }

    /// From the next byte written on, sent bytes belong to `owner`. None when the kernel would
    /// not tell the stream offset (the socket is gone).
    pub fn begin_sending(&self, owner: OwnerId) -> Option<RangeTicket> {
        let mut state = self.state();
        let offset = self.written().ok()?;
        self.tell(&mut state, false);
        let slot = self.slot();
        // SAFETY: ours; `head` and the user fields of the ring are written under `state` only.
        unsafe {
            let head = (&raw const (*slot).head).read_volatile();
            let range = &raw mut (*slot).ranges[ring_index(head)];
            if head >= RANGES as u64 {
                let next = &raw const (*slot).ranges[ring_index(head + 1)];
                let end_of_oldest = (&raw const (*next).offset).read_volatile();
                let acked = (&raw const (*slot).acked_offset).read_volatile();
                if end_of_oldest > acked {
                    self.slots.overwritten.fetch_add(1, Ordering::Relaxed);
                }
            }
            range.write_volatile(Range {
                offset,
                owner: owner.0,
                ..Range::default()
            });
            fence(Ordering::Release);
            (&raw mut (*slot).head).write_volatile(head + 1);
            state.last_sender = Some(owner);
            state.last_ticket = RangeTicket {
                sequence: head,
                offset,
            };
        }
        Some(state.last_ticket)
    }

    /// As [`Self::begin_sending`], unless `owner` is already the one sending: for HTTP/2, where
    /// streams take turns.
    pub fn continue_sending(&self, owner: OwnerId) -> Option<RangeTicket> {
        {
            let state = self.state();
            if state.last_sender == Some(owner) {
                return Some(state.last_ticket);
            }
        }
        self.begin_sending(owner)
    }

    /// The TCP handshake's round trip, microseconds, to the first who asks: SYN-ACK to ACK, or SYN
    /// to SYN-ACK of a connection the gateway opened. None when it is not known.
    pub fn take_handshake_us(&self) -> Option<u32> {
        Some(self.handshake_us.swap(0, Ordering::Relaxed)).filter(|us| *us != 0)
    }

    /// Tells how many frames of this range were sent again, once that is final: all of it is
    /// acknowledged, or the connection has ended. Looked at when the next range begins.
    pub fn count_retransmits(&self, ticket: RangeTicket, histogram: Histogram) {
        let mut state = self.state();
        if state.counting.len() == RANGES {
            self.tell(&mut state, true);
        }
        state.counting.push_back((ticket, histogram));
    }

    /// Tells what is final, or everything.
    fn tell(&self, state: &mut State, everything: bool) {
        // SAFETY: in range; the kernel writes these, hence volatile.
        let (head, acked) = unsafe {
            (
                (&raw const (*self.slot()).head).read_volatile(),
                (&raw const (*self.slot()).acked_offset).read_volatile(),
            )
        };
        while let Some((ticket, histogram)) = state.counting.front() {
            // The newest range ends with what has been written, which nobody here knows.
            let acknowledged = self.end_of(*ticket).is_some_and(|end| end <= acked);
            let overwritten_next = head >= ticket.sequence + RANGES as u64;
            if !(everything || acknowledged || overwritten_next) {
                return;
            }
            if let Some(range) = self.read(*ticket) {
                let frames = u32::try_from(range.retransmit_frames).unwrap_or(u32::MAX);
                histogram.observe(frames.into());
            }
            state.counting.pop_front();
        }
    }

    /// From now on, received payload belongs to `owner`. Returns what came before and nobody had
    /// claimed: the head of this very request.
    pub fn claim(&self, owner: OwnerId) -> (Hold, Claimed) {
        let mut state = self.state();
        let before = self.received_for_owner();
        let ended = ring(state.holds);
        state.ends[ended] = before;
        state.holds += 1;
        let hold = Hold {
            sequence: state.holds,
            before,
        };
        // Before reading, so that a frame between the two is claimed by the next request at the
        // latest, and by nobody twice.
        // SAFETY: ours to write, under `state`.
        unsafe { (&raw mut (*self.slot()).rx_owner).write_volatile(owner.0) };
        (hold, self.take(&mut state))
    }

    /// Received payload is nobody's again, until the next claim; nothing happens when that one
    /// has been made: a pooled connection may go to the next request before this one has ended.
    pub fn release(&self, hold: Hold) {
        let state = self.state();
        if state.holds == hold.sequence {
            // SAFETY: ours to write, under `state`.
            unsafe { (&raw mut (*self.slot()).rx_owner).write_volatile(0) };
        }
    }

    /// Wire bytes received under a hold so far, or to its end.
    #[must_use]
    pub fn received_under(&self, hold: Hold) -> u64 {
        let state = self.state();
        let later = state.holds - hold.sequence;
        let end = if later == 0 {
            self.received_for_owner()
        } else if later <= ENDS as u64 {
            state.ends[ring(hold.sequence)]
        } else {
            // Too many since: what it received is known no more, and none is the safe answer.
            hold.before
        };
        end - hold.before
    }

    /// Takes what has been received and not claimed since the last time.
    pub fn take_unclaimed(&self) -> Claimed {
        self.take(&mut self.state())
    }

    fn take(&self, state: &mut State) -> Claimed {
        let slot = self.slot();
        if self.binding {
            // A matter of nanoseconds on another CPU; the bound is for a kernel that stops.
            for _ in 0..10_000 {
                // SAFETY: in range; the kernel writes it, hence volatile.
                if unsafe { (&raw const (*slot).ifindex).read_volatile() } != 0 {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        // SAFETY: in range; the kernel adds to these counters, hence volatile. The interface is
        // written last at binding, so once it is seen the counters hold the unbound bytes.
        let now = unsafe {
            match (&raw const (*slot).ifindex).read_volatile() {
                0 => self.unbound,
                ifindex => {
                    fence(Ordering::Acquire);
                    // Bytes first: the kernel adds them last, so the others are no less.
                    let bytes = (&raw const (*slot).rx_unclaimed_bytes).read_volatile();
                    fence(Ordering::Acquire);
                    Claimed {
                        ifindex,
                        class: ClassId((&raw const (*slot).class).read_volatile()),
                        bytes,
                        frames: (&raw const (*slot).rx_unclaimed_frames).read_volatile(),
                        payload_bytes: (&raw const (*slot).rx_unclaimed_payload_bytes)
                            .read_volatile(),
                    }
                }
            }
        };
        let now = now.plus(self.divided(state).application);
        let taken = now.since(state.claimed);
        state.claimed = now;
        taken
    }

    /// The TLS handshake is over: the received stream's bytes from this offset on are requests'.
    pub fn handshake_over(&self, application_from: u64) {
        let mut state = self.state();
        state.application_from = Some(application_from);
        let slot = self.slot();
        // SAFETY: ours to write, under `state`; what the kernel was about to write down when it
        // still read 1 is divided at the next look.
        let divided = unsafe {
            (&raw mut (*slot).handshaking).write_volatile(0);
            self.divided(&state)
        };
        if divided.cut_short {
            self.slots.undivided.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What came during the handshake, divided at its end; nothing before that is known.
    fn divided(&self, state: &State) -> Divided {
        let Some(application_from) = state.application_from else {
            return Divided::default();
        };
        let slot = self.slot();
        // SAFETY: in range; the kernel writes these, hence volatile. An arrival's `bytes` is
        // written last, so it is read first.
        unsafe {
            let first = ((&raw const (*slot).rx_first_known).read_volatile() != 0)
                .then(|| (&raw const (*slot).rx_first_seq).read_volatile());
            let arrivals = (0..ARRIVALS).filter_map(|place| {
                let arrival = &raw const (*slot).early[place];
                let written = (&raw const (*arrival).bytes).read_volatile() != 0;
                fence(Ordering::Acquire);
                written.then(|| arrival.read_volatile())
            });
            arrivals::divide(arrivals, first, application_from)
        }
    }

    /// Takes the TLS handshake's received bytes, once the kernel has bound the connection.
    pub fn take_handshake(&self) -> Claimed {
        let mut state = self.state();
        let slot = self.slot();
        // SAFETY: as above.
        let before = unsafe {
            Claimed {
                ifindex: (&raw const (*slot).ifindex).read_volatile(),
                class: ClassId((&raw const (*slot).class).read_volatile()),
                bytes: (&raw const (*slot).rx_handshake_bytes).read_volatile(),
                frames: (&raw const (*slot).rx_handshake_frames).read_volatile(),
                payload_bytes: (&raw const (*slot).rx_handshake_payload_bytes).read_volatile(),
            }
        };
        if before.ifindex == 0 {
            return Claimed::default();
        }
        let now = before.plus(self.divided(&state).handshake);
        let taken = now.since(state.handshake);
        state.handshake = now;
        taken
    }

    /// Wire bytes received so far for whoever had claimed them.
    #[must_use]
    pub fn received_for_owner(&self) -> u64 {
        // SAFETY: in range; the kernel adds to it, hence volatile.
        unsafe { (&raw const (*self.slot()).rx_owned_bytes).read_volatile() }
    }

    /// Smoothed round-trip time, microseconds; 0 when unknown.
    #[must_use]
    pub fn srtt_us(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.slot()).srtt_us).read_volatile() }
    }

    /// What the wire did with a range; None once it has been overwritten.
    #[must_use]
    pub fn read(&self, ticket: RangeTicket) -> Option<RangeReading> {
        let slot = self.slot();
        // SAFETY: as above.
        unsafe {
            let head = (&raw const (*slot).head).read_volatile();
            if head > ticket.sequence + RANGES as u64 {
                return None;
            }
            let range = (&raw const (*slot).ranges[ring_index(ticket.sequence)]).read_volatile();
            Some(RangeReading {
                wire_bytes: range.wire_bytes,
                first_payload_bytes: range
                    .payload_bytes
                    .saturating_sub(range.retransmit_payload_bytes),
                retransmit_frames: range.retransmit_frames,
            })
        }
    }

    /// Where a range ends because another one begins; None while it is the newest, or when the
    /// next one has been overwritten.
    #[must_use]
    pub fn end_of(&self, ticket: RangeTicket) -> Option<u64> {
        let slot = self.slot();
        let next = ticket.sequence + 1;
        // SAFETY: as above.
        unsafe {
            let head = (&raw const (*slot).head).read_volatile();
            let known = head > next && head <= next + RANGES as u64;
            known.then(|| (&raw const (*slot).ranges[ring_index(next)].offset).read_volatile())
        }
    }

    /// Stream offset of the next byte to be written: what has been written so far.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn written(&self) -> io::Result<u64> {
        match self.sent.get() {
            Some(sent) => Ok(sent.load(Ordering::Relaxed)),
            None => stream_offset(self.fd, self.active),
        }
    }

    /// The kernel's number of the connection, which `/connections` lists it by; 0 when it would not
    /// tell.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Owner of bytes no request owns.
    #[must_use]
    pub fn overhead(&self) -> OwnerId {
        self.overhead
    }

    fn slot(&self) -> *mut Slot {
        self.slots.memory.slot(self.index)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tell(&mut self.state(), true);
        self.slots.retire(self.index);
    }
}

/// Where a hold's end is remembered.
fn ring(sequence: u64) -> usize {
    usize::try_from(sequence % ENDS as u64).unwrap_or(0)
}

fn ring_index(sequence: u64) -> usize {
    usize::try_from(sequence % RANGES as u64).unwrap_or(0)
}

/// Monotonic time in nanoseconds, the clock the programs stamp with (theirs is its coarse form).
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
