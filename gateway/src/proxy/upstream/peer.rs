//! One server: what it has under way, and what is known about its health.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::feed::{PeerHealth, SHARE_WHOLE};

/// One server, for as long as its address stays in the pool.
#[derive(Debug)]
pub struct Peer {
    /// Where to connect.
    pub address: SocketAddr,
    pub(super) weight: u64,
    /// Requests under way.
    pub(super) active: AtomicU32,
    /// The kernel's verdict, of [`SHARE_WHOLE`].
    pub(super) share: AtomicU32,
    pub(super) health: Mutex<Health>,
    /// What it counts.
    pub counts: PeerCounts,
}

/// Cumulative, for metrics.
#[derive(Debug, Default)]
pub struct PeerCounts {
    /// Times it was picked.
    pub picks: AtomicU64,
    /// Ejections by [`Cause`].
    pub ejections: [AtomicU64; Cause::ALL.len()],
    /// Active checks: good, bad.
    pub checks: [AtomicU64; 2],
}

/// Why a peer was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It could not be connected to, or connections broke.
    Connect,
    /// It answered 500 or above.
    ServerError,
    /// The kernel saw resets or loss beyond use.
    Kernel,
}

impl Cause {
    /// All of them, in the order of [`PeerCounts::ejections`].
    pub const ALL: [Self; 3] = [Self::Connect, Self::ServerError, Self::Kernel];

    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ServerError => "server_error",
            Self::Kernel => "kernel",
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) connect_failures: u32,
    pub(super) server_errors: u32,
    /// How long the last ejection lasted; zero after a success.
    pub(super) ejection: Duration,
    pub(super) ejected_until: Option<Instant>,
    /// Active checks in a row: good ones positive, bad ones negative.
    pub(super) checks: i64,
    /// By active check.
    pub(super) down: bool,
    pub(super) kernel: PeerHealth,
}

/// A peer as operators see it.
#[derive(Clone, Copy, Debug)]
pub struct PeerState {
    /// Requests under way.
    pub active: u32,
    /// Neither ejected nor down.
    pub available: bool,
    /// The kernel's verdict, of [`SHARE_WHOLE`].
    pub share: u32,
    /// What it is based on.
    pub kernel: PeerHealth,
}

impl Peer {
    pub(super) fn new(address: SocketAddr, weight: u64) -> Self {
        Self {
            address,
            weight,
            active: AtomicU32::new(0),
            share: AtomicU32::new(SHARE_WHOLE),
            health: Mutex::default(),
            counts: PeerCounts::default(),
        }
    }

    pub(super) fn effective_weight(&self) -> u64 {
        (self.weight * u64::from(self.share.load(Ordering::Relaxed))).max(1)
    }

    pub(super) fn is_available(&self, now: Instant) -> bool {
        let health = self.lock();
        !health.down && !health.is_ejected(now)
    }

    /// Every step leaves it consistent, so a poisoned lock is as good as any.
    pub(super) fn lock(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }
}
