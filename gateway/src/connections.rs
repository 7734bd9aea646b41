//! Connections: what sockets lived through, whose they are, and what this host dropped.
//!
//! The kernel's table is the truth ([`flow_abi::Connection`]): an entry stays until it has been
//! collected here, so an event that the ring buffer lost loses no connection. Events make it
//! quick: [`watcher`] wakes when something happens, counts it, and measures how late it was told.
//!
//! Nothing here is billed from; bytes are the ledger's.

mod command;
mod ended;
mod owner;
mod view;
mod watcher;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flow_abi::{Connection, DropCount, DropKey, kind};

pub use command::print;
pub use ended::End;
pub use owner::Cgroups;
pub use view::{EventLine, Filter, FilterError, OwnerRow, Row, leg_word};
pub use watcher::{Watcher, WatcherThread};

use crate::{
    config::Config,
    kernel::{
        Feature, WatchMaps, diag,
        events::{Event, monotonic_ns},
        namespace_cookie,
    },
    owner::Leg,
};

/// Closed connections remembered for `/connections`.
const CLOSED_MAX: usize = 2048;
/// Events remembered for `/events`.
const EVENTS_MAX: usize = 4096;
/// The endpoint of connections that are not the gateway's.
pub const NO_ENDPOINT: &str = "(other)";

/// Where a connection belongs: leg and name of the listener or upstream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// None: not the gateway's.
    pub leg: Option<Leg>,
    /// Listener or upstream, or [`NO_ENDPOINT`].
    pub endpoint: Arc<str>,
}

/// Says where a connection belongs, by the configuration in force.
pub type Placing = Box<dyn Fn(&Connection) -> Place + Send + Sync>;

/// Everything known, shared between the watcher, the admin port and the metrics.
pub struct Connections {
    placing: Placing,
    /// Names of observed network namespaces by cookie; the gateway's own has none.
    namespaces: HashMap<u64, String>,
    /// What works here.
    pub features: Vec<Feature>,
    drop_reasons: HashMap<u32, String>,
    maps: Option<Mutex<WatchMaps>>,
    cgroups: Mutex<Cgroups>,
    memory: Mutex<Memory>,
    earlier: Mutex<Earlier>,
}

/// Connections that were there before our programs, which tell of new ones only: the kernel is
/// asked for them when they are looked at.
#[derive(Default)]
struct Earlier {
    cookies: HashSet<u64>,
    /// When they were met, monotonic nanoseconds.
    met_ns: u64,
    namespace: u64,
}

#[derive(Default)]
struct Memory {
    closed: VecDeque<Connection>,
    /// With their delays, nanoseconds; written out when somebody asks.
    events: VecDeque<(Event, u64)>,
}

impl Connections {
    /// Over the socket programs' maps; without them everything is empty, and [`Self::features`]
    /// says why.
    #[must_use]
    pub fn new(
        placing: Placing,
        namespaces: HashMap<u64, String>,
        features: Vec<Feature>,
        drop_reasons: HashMap<u32, String>,
        maps: Option<WatchMaps>,
    ) -> Self {
        Self {
            placing,
            namespaces,
            features,
            drop_reasons,
            maps: maps.map(Mutex::new),
            cgroups: Mutex::default(),
            memory: Mutex::default(),
            earlier: Mutex::default(),
        }
    }

    /// Takes note of the connections that are there now, of this network namespace. Call once the
    /// programs tell of new ones.
    pub fn meet_earlier(&self) {
        if self.maps.is_none() {
            return;
        }
        let there = diag::connections().and_then(|there| Ok((there, namespace_cookie()?)));
        match there {
            Ok((there, namespace)) => {
                let known = self.told();
                let known: HashSet<u64> = known.iter().map(|known| known.cookie).collect();
                let cookies = there.iter().map(|connection| connection.cookie);
                *self.earlier() = Earlier {
                    cookies: cookies.filter(|cookie| !known.contains(cookie)).collect(),
                    met_ns: monotonic_ns(),
                    namespace,
                };
            }
            Err(error) => log::warn!(
                "connections from before the start are not shown: the kernel does not list \
                 sockets ({error})"
            ),
        }
    }

    /// Whose connection this is.
    #[must_use]
    pub fn place(&self, connection: &Connection) -> Place {
        (self.placing)(connection)
    }

    /// A namespace's name; empty for the gateway's own.
    #[must_use]
    pub fn namespace(&self, cookie: u64) -> String {
        if cookie == 0 {
            return "(unknown)".into();
        }
        self.namespaces.get(&cookie).cloned().unwrap_or_default()
    }

    /// The kernel's word for why a frame was dropped.
    #[must_use]
    pub fn drop_reason(&self, number: u32) -> String {
        self.drop_reasons
            .get(&number)
            .cloned()
            .unwrap_or_else(|| format!("reason_{number}"))
    }

    /// Connections under way, closed ones not yet collected excepted. Those from before the start
    /// have [`Connection::established_ns`] 0 and began when they were met.
    #[must_use]
    pub fn open(&self) -> Vec<Connection> {
        let mut open = self.told();
        open.extend(self.still_there());
        open
    }

    /// Of the connections from before the start.
    fn still_there(&self) -> Vec<Connection> {
        let mut earlier = self.earlier();
        if earlier.cookies.is_empty() {
            return Vec::new();
        }
        let mut there = match diag::connections() {
            Ok(there) => there,
            Err(error) => {
                log::warn!("cannot list sockets: {error}");
                return Vec::new();
            }
        };
        there.retain(|connection| earlier.cookies.contains(&connection.cookie));
        for connection in &mut there {
            connection.opened_ns = earlier.met_ns;
            connection.namespace = earlier.namespace;
        }
        // What is over does not come back.
        earlier.cookies = there.iter().map(|connection| connection.cookie).collect();
        there
    }

    /// Whether a connection was there before the start.
    fn is_earlier(&self, cookie: u64) -> bool {
        self.earlier().cookies.contains(&cookie)
    }

    /// As the programs tell.
    fn told(&self) -> Vec<Connection> {
        let mut open = Vec::new();
        self.with_maps(|maps| {
            let read = maps.each_connection(|connection| {
                if connection.closed_ns == 0 {
                    open.push(connection);
                }
            });
            if let Err(error) = read {
                log::warn!("cannot read the connection table: {error}");
            }
        });
        open
    }

    /// Connections under way, by place.
    #[must_use]
    pub fn open_by_place(&self) -> HashMap<Place, u64> {
        let mut counts = HashMap::new();
        for connection in self.open() {
            *counts.entry(self.place(&connection)).or_insert(0) += 1;
        }
        counts
    }

    /// Frames dropped, by namespace, interface and reason.
    #[must_use]
    pub fn drops(&self) -> Vec<(DropKey, DropCount)> {
        self.with_maps(|maps| maps.drops()).unwrap_or_default()
    }

    /// Events lost, by kind.
    #[must_use]
    pub fn events_lost(&self) -> [u64; kind::COUNT] {
        self.with_maps(|maps| maps.events_lost())
            .unwrap_or_default()
    }

    /// Connections that found the kernel's table full.
    #[must_use]
    pub fn table_full(&self) -> u64 {
        self.with_maps(|maps| maps.connections_lost()).unwrap_or(0)
    }

    fn with_maps<T>(&self, work: impl FnOnce(&mut WatchMaps) -> T) -> Option<T> {
        let maps = self.maps.as_ref()?;
        Some(work(
            &mut maps.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    fn earlier(&self) -> MutexGuard<'_, Earlier> {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember_closed(&self, connection: Connection) {
        let mut memory = self.memory();
        if memory.closed.len() == CLOSED_MAX {
            memory.closed.pop_front();
        }
        memory.closed.push_back(connection);
    }

    fn remember_event(&self, event: Event, delay_ns: u64) {
        let mut memory = self.memory();
        if memory.events.len() == EVENTS_MAX {
            memory.events.pop_front();
        }
        memory.events.push_back((event, delay_ns));
    }
}

/// Where a connection belongs: accepted at a listener's address, or opened to an upstream's peer,
/// whose addresses `peers` tells by the upstream's index.
#[must_use]
pub fn place(
    config: &Config,
    peers: impl Fn(usize) -> Vec<SocketAddr>,
    connection: &Connection,
) -> Place {
    let found = if connection.active == 0 {
        let local = (address(&connection.local), connection.local_port);
        let mut listeners = config.listeners.iter();
        listeners
            .find(|listener| {
                let ip = listener.address.ip();
                listener.address.port() == local.1
                    && (ip.is_unspecified() || ip.to_canonical() == local.0)
            })
            .map(|listener| (Leg::Client, listener.name.as_str()))
    } else {
        let remote = (address(&connection.remote), connection.remote_port);
        let mut upstreams = config.upstreams.iter().enumerate();
        upstreams
            .find(|(index, _)| {
                let mut peers = peers(*index).into_iter();
                peers.any(|peer| (peer.ip().to_canonical(), peer.port()) == remote)
            })
            .map(|(_, upstream)| (Leg::Upstream, upstream.name.as_str()))
    };
    Place {
        leg: found.map(|(leg, _)| leg),
        endpoint: found.map_or(NO_ENDPOINT, |(_, name)| name).into(),
    }
}

/// An address as people write it.
fn address(bytes: &[u8; 16]) -> IpAddr {
    IpAddr::from(*bytes).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(text: &str) -> [u8; 16] {
        match text.parse::<IpAddr>().unwrap() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        }
    }

    #[test]
    fn a_connection_belongs_to_the_listener_that_accepted_it_or_the_upstream_it_went_to() {
        let text = "[[listeners]]\nname = \"any\"\naddress = \"[::]:80\"\n\
                    [[listeners]]\nname = \"one\"\naddress = \"10.0.0.1:81\"\n\
                    [[upstreams]]\nname = \"orders\"\npeers = [\"10.0.0.9:9000\"]\n\
                    [[routes]]\nname = \"all\"\nupstream = \"orders\"\n";
        let config = Config::parse(text, "test.toml").unwrap();
        let place = |active, local: &str, local_port, remote: &str, remote_port| {
            let connection = Connection {
                active,
                local: mapped(local),
                local_port,
                remote: mapped(remote),
                remote_port,
                ..Connection::default()
            };
            let peers = |_| vec!["10.0.0.9:9000".parse().unwrap()];
            let place = place(&config, peers, &connection);
            (place.leg, place.endpoint.to_string())
        };
        let client = |name: &str| (Some(Leg::Client), name.to_owned());
        let other = (None, NO_ENDPOINT.to_owned());
        assert_eq!(place(0, "10.0.0.1", 80, "10.0.0.7", 5000), client("any"));
        assert_eq!(place(0, "fd00::1", 80, "fd00::2", 5000), client("any"));
        assert_eq!(place(0, "10.0.0.1", 81, "10.0.0.7", 5000), client("one"));
        assert_eq!(place(0, "10.0.0.2", 81, "10.0.0.7", 5000), other);
        assert_eq!(
            place(1, "10.0.0.1", 41000, "10.0.0.9", 9000),
            (Some(Leg::Upstream), "orders".into())
        );
        // Somebody else on this host, talking to our own listener.
        assert_eq!(place(1, "10.0.0.1", 41000, "10.0.0.1", 80), other);
    }
}
