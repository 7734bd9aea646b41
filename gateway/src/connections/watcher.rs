//! The thread that listens to the kernel: counts events as they come, and collects connections
//! when they are over.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use flow_abi::{Connection, kind};

use super::{Connections, End};
use crate::{
    export::ConnectionMetrics,
    kernel::events::{Event, Ring, monotonic_ns},
};

/// How long a closed connection waits for the reset that close() sends after it.
const SETTLE_NS: u64 = 20_000_000;
/// The table is searched for connections whose close event was lost so often.
const SWEEP_NS: u64 = 5_000_000_000;
/// While there are events the next are looked for after so long, and nobody wakes the reader: at
/// thousands of connections a second a wake-up costs more than the event. Adds this to an event's
/// delay at most.
const PACE: Duration = Duration::from_micros(500);
/// Nothing happens for so long: look whether it is time to stop.
const IDLE: Duration = Duration::from_millis(250);

/// What the thread works on.
pub struct Watcher {
    connections: Arc<Connections>,
    metrics: ConnectionMetrics,
    ring: Ring,
    /// Over since, and which.
    ending: VecDeque<(u64, u64)>,
    swept_ns: u64,
}

/// The running thread.
pub struct WatcherThread {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// A watcher over the ring buffer.
    #[must_use]
    pub fn new(connections: Arc<Connections>, metrics: ConnectionMetrics, ring: Ring) -> Self {
        Self {
            connections,
            metrics,
            ring,
            ending: VecDeque::new(),
            swept_ns: monotonic_ns(),
        }
    }

    /// Runs until stopped.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(mut self) -> std::io::Result<WatcherThread> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kernel-events".into())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    self.round();
                }
            })?;
        Ok(WatcherThread { stop, thread })
    }

    fn round(&mut self) {
        let timeout = match self.ending.front() {
            None => IDLE,
            Some((since, _)) => {
                let left = (since + SETTLE_NS).saturating_sub(monotonic_ns());
                Duration::from_nanos(left).max(Duration::from_millis(1))
            }
        };
        if !self.take_events() {
            self.ring.wait(timeout);
            self.take_events();
        }
        self.collect();
    }

    /// Works on what is there, and rests for a moment if that was anything.
    fn take_events(&mut self) -> bool {
        let Self {
            connections,
            metrics,
            ring,
            ending,
            ..
        } = self;
        let mut found = false;
        ring.drain(|event| {
            found = true;
            let now = monotonic_ns();
            let head = event.head();
            let delay = now.saturating_sub(head.timestamp_ns);
            metrics.event(head.kind, delay);
            if let Event::Connection(event) = &event {
                let connection = &event.connection;
                if head.kind == kind::OPEN {
                    connections.meet(connection);
                    metrics.opened(&connections.place(connection));
                } else if head.last != 0 {
                    let place = connections.place(connection);
                    metrics.closed(&place, End::of(connection), connection);
                    connections.remember_closed(*connection);
                } else {
                    ending.push_back((now, connection.cookie));
                }
            }
            connections.remember_event(event, delay);
        });
        if found {
            ring.pace(PACE);
        }
        found
    }

    fn collect(&mut self) {
        let now = monotonic_ns();
        while let Some((since, cookie)) = self.ending.front().copied()
            && since + SETTLE_NS <= now
        {
            self.ending.pop_front();
            self.over(cookie);
        }
        if now.saturating_sub(self.swept_ns) > SWEEP_NS {
            self.swept_ns = now;
            self.sweep(now);
        }
    }

    /// A connection whose close event was lost is collected all the same, only later.
    fn sweep(&mut self, now: u64) {
        let mut left = Vec::new();
        self.connections.with_maps(|maps| {
            let _ = maps.each_connection(|connection| {
                if connection.closed_ns != 0 && connection.closed_ns + SWEEP_NS < now {
                    left.push(connection.cookie);
                }
            });
        });
        for cookie in left {
            self.over(cookie);
        }
    }

    fn over(&mut self, cookie: u64) {
        let taken = self.connections.with_maps(|maps| {
            let connection = maps.connection(cookie)?;
            // The socket may have connected again: that is another connection.
            if connection.closed_ns == 0 {
                return None;
            }
            maps.forget(cookie);
            Some(connection)
        });
        let Some(connection): Option<Connection> = taken.flatten() else {
            return;
        };
        let place = self.connections.place(&connection);
        self.metrics
            .closed(&place, End::of(&connection), &connection);
        self.connections.remember_closed(connection);
    }
}

impl WatcherThread {
    /// Ends the thread.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            log::error!("the kernel event reader panicked; events since then are lost");
        }
    }
}
