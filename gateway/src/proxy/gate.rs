//! Who may connect, and how many at once: access lists and connection caps, before a byte is read.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::config::{Access, Limits, ListenerIndex};

const SHARDS: usize = 16;

/// Why a connection was closed before its first request; the label of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Turned {
    /// The listener's access list.
    AccessList,
    /// The listener has as many connections as it may.
    Full,
    /// The client has as many connections as it may.
    FullForClient,
    /// No, or a malformed, PROXY header where one must be.
    ProxyHeader,
    /// The handshake failed.
    TlsHandshake,
    /// The handshake did not end in time.
    TlsTimeout,
}

impl Turned {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AccessList,
        Self::Full,
        Self::FullForClient,
        Self::ProxyHeader,
        Self::TlsHandshake,
        Self::TlsTimeout,
    ];

    /// The metric label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::AccessList => "access_list",
            Self::Full => "full",
            Self::FullForClient => "full_for_client",
            Self::ProxyHeader => "proxy_header",
            Self::TlsHandshake => "tls_handshake",
            Self::TlsTimeout => "tls_timeout",
        }
    }
}

/// Counts the connections of every listener and client. Bounded by the connections themselves.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<HashMap<ListenerIndex, Arc<AtomicUsize>>>,
    clients: [Mutex<HashMap<(ListenerIndex, IpAddr), usize>>; SHARDS],
}

/// A connection that was let in; counts until dropped.
#[derive(Debug)]
pub struct Admitted {
    gate: Arc<Gate>,
    open: Arc<AtomicUsize>,
    key: (ListenerIndex, IpAddr),
}

impl Gate {
    /// Lets a client in, or says why not.
    ///
    /// # Errors
    /// Which rule it was.
    pub fn admit(
        self: &Arc<Self>,
        listener: ListenerIndex,
        client: IpAddr,
        access: &Access,
        limits: &Limits,
    ) -> Result<Admitted, Turned> {
        if !access.permits(client) {
            return Err(Turned::AccessList);
        }
        let open = Arc::clone(lock(&self.open).entry(listener).or_default());
        let key = (listener, network_of(client));
        if open.fetch_add(1, Ordering::Relaxed) >= limits.connections_max {
            open.fetch_sub(1, Ordering::Relaxed);
            return Err(Turned::Full);
        }
        let mut clients = lock(self.shard(&key));
        let count = clients.entry(key).or_insert(0);
        if limits
            .connections_per_client_max
            .is_some_and(|max| *count >= max)
        {
            open.fetch_sub(1, Ordering::Relaxed);
            return Err(Turned::FullForClient);
        }
        *count += 1;
        drop(clients);
        Ok(Admitted {
            gate: Arc::clone(self),
            open,
            key,
        })
    }

    /// Connections of a listener now.
    #[must_use]
    pub fn open(&self, listener: ListenerIndex) -> usize {
        lock(&self.open)
            .get(&listener)
            .map_or(0, |open| open.load(Ordering::Relaxed))
    }

    fn shard(
        &self,
        key: &(ListenerIndex, IpAddr),
    ) -> &Mutex<HashMap<(ListenerIndex, IpAddr), usize>> {
        let byte = match key.1 {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[7],
        };
        &self.clients[usize::from(byte) % SHARDS]
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        let mut clients = lock(self.gate.shard(&self.key));
        if let Some(count) = clients.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.key);
            }
        }
    }
}

/// One household has a whole IPv6 /64: it is one client.
#[must_use]
pub fn network_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn caps_count_and_give_back() {
        let gate = Arc::new(Gate::default());
        let limits = Limits {
            connections_max: 3,
            connections_per_client_max: Some(2),
            ..Limits::default()
        };
        let open = Access::default();
        let admit = |client| gate.admit(ListenerIndex(0), ip(client), &open, &limits);
        let first = admit("2001:db8::1").unwrap();
        let _second = admit("2001:db8::2").unwrap();
        assert_eq!(admit("2001:db8::3").unwrap_err(), Turned::FullForClient);
        let _third = admit("192.0.2.1").unwrap();
        assert_eq!(admit("192.0.2.2").unwrap_err(), Turned::Full);
        assert_eq!(gate.open(ListenerIndex(0)), 3);
        drop(first);
        let fourth = admit("2001:db8::4").unwrap();
        drop(fourth);
        assert_eq!(gate.open(ListenerIndex(0)), 2);
        drop((_second, _third));
        assert!(gate.clients.iter().all(|shard| lock(shard).is_empty()));
    }
}
