//! A request's try at one peer, and what it tells about the peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Cause, Peer, Pool};

/// A request's try at one peer: under way until dropped.
#[derive(Debug)]
pub struct Attempt {
    pub(super) pool: Arc<Pool>,
    pub(super) peer: Arc<Peer>,
    /// For a connection.
    pub(super) waiting: bool,
}

impl Attempt {
    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.peer.address
    }

    /// Whether another peer could still be tried.
    pub fn others_left(&self, tried: &[SocketAddr]) -> bool {
        let peers = self.pool.peers.load();
        peers.list.iter().any(|peer| !tried.contains(&peer.address))
    }

    /// It has its connection. A connection taken from a pool says nothing about the peer.
    pub fn connected(&mut self, reused: bool) {
        if std::mem::take(&mut self.waiting) {
            self.pool.gate.connected();
        }
        if !reused {
            self.peer.lock().connect_failures = 0;
        }
    }

    /// It could not be connected to, or its connection broke before it had answered.
    pub fn broke(&self, now: Instant) {
        let mut health = self.peer.lock();
        // Attempts under way when the peer was ejected, or made in panic: known already.
        // Counting them would double the ejection once for each request in flight.
        if health.is_ejected(now) {
            return;
        }
        health.connect_failures = health.connect_failures.saturating_add(1);
        let most = self.pool.settings.ejection.connect_failures;
        if most > 0 && health.connect_failures >= most {
            self.pool
                .eject(&self.peer, &mut health, Cause::Connect, now);
        }
    }

    /// It answered.
    pub fn answered(&self, status: u16, now: Instant) {
        let mut health = self.peer.lock();
        health.connect_failures = 0;
        if status < 500 {
            health.server_errors = 0;
            health.ejection = Duration::ZERO;
            return;
        }
        if health.is_ejected(now) {
            return;
        }
        health.server_errors = health.server_errors.saturating_add(1);
        let most = self.pool.settings.ejection.server_errors;
        if most > 0 && health.server_errors >= most {
            health.server_errors = 0;
            self.pool
                .eject(&self.peer, &mut health, Cause::ServerError, now);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.waiting {
            self.pool.gate.connected();
        }
        self.peer.active.fetch_sub(1, Ordering::Relaxed);
    }
}
