//! The desync alarm: bytes that arrived and belong to no request — scans, failed handshakes,
//! requests refused for their framing, what followed one — by who sent them.
//!
//! Bounded: as many peers as [`PEERS_MAX`]; a further one takes the place of the one with the
//! fewest bytes, and that loss is counted. Pure, except for the lock.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Peers that are told apart.
pub const PEERS_MAX: usize = 1024;

/// What was wrong; the label of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Desync {
    /// No PROXY header where one must be.
    ProxyHeader,
    /// A TLS handshake that failed or did not end.
    Handshake,
    /// A connection that closed without a request.
    NoRequest,
    /// A request that was refused for its framing.
    Refused,
    /// Bytes after the last request that are none.
    Leftover,
}

impl Desync {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::ProxyHeader,
        Self::Handshake,
        Self::NoRequest,
        Self::Refused,
        Self::Leftover,
    ];

    /// The metric label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::ProxyHeader => "proxy_header",
            Self::Handshake => "handshake",
            Self::NoRequest => "no_request",
            Self::Refused => "refused",
            Self::Leftover => "leftover",
        }
    }
}

/// One peer's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes in no request.
    pub bytes: u64,
    /// Connections they came on.
    pub connections: u64,
    /// At how many bytes it is logged again.
    log_at: u64,
}

/// Who sent what.
#[derive(Debug, Default)]
pub struct Alarm {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    peers: HashMap<IpAddr, Share>,
    lost: u64,
}

impl Alarm {
    /// Counts; returns the peer's share when it is time to log it: at first, then each time it has
    /// grown tenfold.
    pub fn note(&self, peer: IpAddr, bytes: u64) -> Option<Share> {
        let mut inner = self.lock();
        if inner.peers.len() >= PEERS_MAX && !inner.peers.contains_key(&peer) {
            let least = inner.peers.iter().min_by_key(|(_, share)| share.bytes);
            if let Some(least) = least.map(|(peer, _)| *peer) {
                inner.peers.remove(&least);
                inner.lost += 1;
            }
        }
        let share = inner.peers.entry(peer).or_default();
        share.bytes += bytes;
        share.connections += 1;
        if share.bytes < share.log_at {
            return None;
        }
        share.log_at = share.bytes.max(1).saturating_mul(10);
        Some(*share)
    }

    /// Those with the most bytes, most first, and how many peers were lost for room.
    #[must_use]
    pub fn top(&self, count: usize) -> (Vec<(IpAddr, Share)>, u64) {
        let inner = self.lock();
        let mut all: Vec<_> = inner
            .peers
            .iter()
            .map(|(peer, share)| (*peer, *share))
            .collect();
        let lost = inner.lost;
        drop(inner);
        all.sort_unstable_by_key(|(peer, share)| (std::cmp::Reverse(share.bytes), *peer));
        all.truncate(count);
        (all, lost)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn it_logs_at_first_and_at_each_tenfold() {
        let alarm = Alarm::default();
        let logged: Vec<u64> = (0..1000)
            .filter_map(|_| alarm.note(peer(1), 10))
            .map(|share| share.bytes)
            .collect();
        assert_eq!(logged, [10, 100, 1000, 10_000]);
        assert!(alarm.note(peer(2), 0).is_some());
    }

    #[test]
    fn peers_are_bounded_and_the_loud_ones_stay() {
        let alarm = Alarm::default();
        alarm.note(peer(0), 1_000_000);
        let many = u32::try_from(PEERS_MAX).unwrap() * 3;
        for n in 1..many {
            alarm.note(peer(n), 10);
        }
        let (top, lost) = alarm.top(usize::MAX);
        assert_eq!(top.len(), PEERS_MAX);
        assert_eq!(lost, u64::from(many) - PEERS_MAX as u64);
        assert_eq!((top[0].0, top[0].1.bytes), (peer(0), 1_000_000));
    }
}
