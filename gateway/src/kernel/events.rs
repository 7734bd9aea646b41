//! The ring buffer's reader: waits in poll(2), so that an event is seen when it happens and not
//! when a tick comes.

use std::{
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use aya::maps::{Array, MapData, RingBuf};
use flow_abi::{ConnectionEvent, EventHead, PacketEvent, kind};

use super::maps::read_pod;

/// One record of the ring.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Opened or closed.
    Connection(ConnectionEvent),
    /// Sent again, dropped or reset.
    Packet(PacketEvent),
}

impl Event {
    /// When and what.
    #[must_use]
    pub fn head(&self) -> EventHead {
        match self {
            Self::Connection(event) => event.head,
            Self::Packet(event) => event.head,
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < size_of::<EventHead>() {
            return None;
        }
        let head: EventHead = read_pod(bytes);
        match head.kind {
            kind::OPEN | kind::CLOSE if bytes.len() >= size_of::<ConnectionEvent>() => {
                Some(Self::Connection(read_pod(bytes)))
            }
            kind::RETRANSMIT | kind::DROP | kind::RESET
                if bytes.len() >= size_of::<PacketEvent>() =>
            {
                Some(Self::Packet(read_pod(bytes)))
            }
            _ => None,
        }
    }
}

/// The ring buffer, and how its reader is woken.
pub struct Ring {
    ring: RingBuf<MapData>,
    /// Tells the programs that the reader comes back by itself.
    awake: Array<MapData, u32>,
    is_awake: bool,
}

impl Ring {
    /// A record committed while the reader falls asleep may have taken it for awake: so it looks
    /// once more after this.
    const DOZE: Duration = Duration::from_millis(1);

    pub(super) fn new(ring: RingBuf<MapData>, awake: Array<MapData, u32>) -> Self {
        Self {
            ring,
            awake,
            is_awake: false,
        }
    }

    /// Waits until there is an event, for at most `timeout`.
    pub fn wait(&mut self, timeout: Duration) {
        if self.is_awake {
            self.set_awake(false);
            if self.poll(timeout.min(Self::DOZE)) || timeout <= Self::DOZE {
                return;
            }
        }
        self.poll(timeout);
    }

    /// The reader sleeps for so long and then looks by itself: nobody needs to wake it.
    pub fn pace(&mut self, time: Duration) {
        if !self.is_awake {
            self.set_awake(true);
        }
        std::thread::sleep(time);
    }

    fn set_awake(&mut self, awake: bool) {
        // Where it cannot be told, the reader is woken for every event.
        self.is_awake = self.awake.set(0, u32::from(awake), 0).is_ok() && awake;
    }

    /// True when there is an event.
    fn poll(&self, timeout: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.ring.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        let started = Instant::now();
        // SAFETY: one pollfd with an open descriptor.
        let result = unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        if result < 0 && started.elapsed() < Duration::from_millis(1) {
            // Interrupted, or worse; either way not in a busy loop.
            std::thread::sleep(Duration::from_millis(1));
        }
        result > 0
    }

    /// Takes what is there, oldest first.
    pub fn drain(&mut self, mut visit: impl FnMut(Event)) {
        while let Some(item) = self.ring.next() {
            let event = Event::decode(&item);
            // The kernel gets the space back before the event is worked on.
            drop(item);
            if let Some(event) = event {
                visit(event);
            }
        }
    }
}

/// Monotonic nanoseconds, the clock of [`EventHead::timestamp_ns`].
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
