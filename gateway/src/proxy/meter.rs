//! What the proxy tells the kernel side: which socket is which connection, and whose bytes are
//! next. Where eBPF could not load there are no slots, every call does nothing, and the gateway
//! serves on.

use std::{
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use ahash::HashMap;
use pingora::protocols::SocketDigest;

use crate::{
    attribution::{Claim, ClaimKey, Claims},
    config::{ListenerIndex, RouteIndex, TenantRule, UpstreamIndex},
    owner::{Leg, Owner, OwnerId, OwnerKind, Owners, Quality},
    proxy::route::Route,
    slots::{Before, Claimed, Connection, Opening, Slots},
};

/// Route, service and tenant of requests no route matched.
pub const UNROUTED: &str = "(none)";

/// Locks for the connection table: by address, so that workers rarely meet.
const SHARDS: usize = 16;

/// A listener or an upstream: where a connection's overhead goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndpointId {
    /// Client leg.
    Listener(ListenerIndex),
    /// Upstream leg.
    Upstream(UpstreamIndex),
}

/// The owners of an endpoint's connections.
#[derive(Clone, Copy, Debug)]
pub struct EndpointOwners {
    /// Handshakes, acknowledgements, FIN.
    pub overhead: OwnerId,
    /// Received and not claimed by a request.
    pub unclaimed: OwnerId,
}

/// A connection the kernel knows.
#[derive(Clone)]
pub struct Tracked {
    /// Its slot.
    pub connection: Arc<Connection>,
    /// Its endpoint's owners.
    pub owners: EndpointOwners,
    /// Requests under way on it; more than one on HTTP/2 only.
    pub requests: Arc<AtomicUsize>,
}

/// The proxy's view of the kernel side.
pub struct Meter {
    slots: Option<Arc<Slots>>,
    owners: Arc<Owners>,
    claims: Arc<Claims>,
    // Keyed by the digest's address, which identifies the socket as long as the digest lives;
    // holding it weakly keeps the address from being given away.
    connections: [Mutex<HashMap<usize, Entry>>; SHARDS],
    /// Requests whose owner could not be stored: their bytes stay with the overhead.
    pub owner_failures: AtomicU64,
}

/// The owners of one configuration's endpoints and routes, by their places in it.
pub struct EndpointTable {
    endpoints: HashMap<EndpointId, (Arc<str>, EndpointOwners)>,
    routes: RwLock<HashMap<RouteKey, HashMap<Box<str>, OwnerId>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RouteKey {
    endpoint: EndpointId,
    route: Option<RouteIndex>,
    quality: Quality,
}

struct Entry {
    digest: Weak<SocketDigest>,
    tracked: Tracked,
}

impl Meter {
    /// Without slots it does nothing.
    pub fn new(slots: Option<Arc<Slots>>, owners: Arc<Owners>, claims: Arc<Claims>) -> Self {
        Self {
            slots,
            owners,
            claims,
            connections: Default::default(),
            owner_failures: AtomicU64::new(0),
        }
    }

    /// Numbers the owners of a configuration's endpoints. A name keeps its number from one
    /// configuration to the next.
    ///
    /// # Errors
    /// The owners cannot be stored.
    pub fn endpoints(
        &self,
        endpoints: impl IntoIterator<Item = (EndpointId, Arc<str>)>,
    ) -> Result<EndpointTable, crate::owner::StoreError> {
        let mut known = HashMap::default();
        for (id, name) in endpoints {
            let leg = leg(id);
            let pair = EndpointOwners {
                overhead: self.owners.intern(&Owner::connection(
                    OwnerKind::Overhead,
                    leg,
                    &name,
                ))?,
                unclaimed: self.owners.intern(&Owner::connection(
                    OwnerKind::Unclaimed,
                    leg,
                    &name,
                ))?,
            };
            known.insert(id, (name, pair));
        }
        Ok(EndpointTable {
            endpoints: known,
            routes: RwLock::default(),
        })
    }

    /// A connection was accepted or made. Does nothing when it is known already.
    pub fn open(
        &self,
        table: &EndpointTable,
        digest: &Arc<SocketDigest>,
        fd: RawFd,
        id: EndpointId,
        before: Before,
    ) {
        let Some(slots) = &self.slots else { return };
        let Some(owners) = table.owners(id) else {
            return;
        };
        let key = address(digest);
        let mut shard = self.shard(key);
        if shard.contains_key(&key) {
            return;
        }
        let active = matches!(id, EndpointId::Upstream(_));
        let inet = |address: Option<&pingora::protocols::l4::socket::SocketAddr>| {
            address.and_then(|address| address.as_inet().copied())
        };
        let opening = Opening {
            overhead: owners.overhead,
            active,
            before,
            // A connection the gateway opened has received nothing yet.
            addresses: inet(digest.local_addr())
                .zip(inet(digest.peer_addr()))
                .filter(|_| !active),
        };
        if let Some(connection) = slots.adopt(fd, opening) {
            let tracked = Tracked {
                connection,
                owners,
                requests: Arc::default(),
            };
            shard.insert(
                key,
                Entry {
                    digest: Arc::downgrade(digest),
                    tracked,
                },
            );
        }
    }

    /// The connection behind a digest.
    #[must_use]
    pub fn find(&self, digest: &Arc<SocketDigest>) -> Option<Tracked> {
        let key = address(digest);
        self.shard(key).get(&key).map(|entry| entry.tracked.clone())
    }

    /// A connection was closed.
    pub fn close(&self, digest: &Arc<SocketDigest>) {
        let key = address(digest);
        self.shard(key).remove(&key);
    }

    /// Forgets connections that are gone: pooled upstream connections close without a word.
    /// Returns how many remain.
    pub fn sweep(&self) -> usize {
        let mut open = 0;
        for shard in &self.connections {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.retain(|_, entry| entry.digest.strong_count() > 0);
            open += shard.len();
        }
        open
    }

    /// Stores the names of owners that are new since the last time: before their first bytes are
    /// posted. Blocks on the ledger.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub fn write_names(&self) -> Result<(), crate::owner::StoreError> {
        self.owners.write_out()
    }

    /// The owner of a request's bytes on one leg. A tenant seen for the first time is kept before
    /// its bytes are counted; None when it cannot be.
    pub fn route_owner(
        &self,
        table: &EndpointTable,
        endpoint: EndpointId,
        route: Option<&Route>,
        tenant: &str,
        quality: Quality,
    ) -> Option<OwnerId> {
        self.slots.as_ref()?;
        let key = RouteKey {
            endpoint,
            route: route.map(|route| route.index),
            quality,
        };
        {
            let routes = table.routes.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(id) = routes.get(&key).and_then(|tenants| tenants.get(tenant)) {
                return Some(*id);
            }
        }
        let (name, _) = table.endpoints.get(&endpoint)?;
        let owner = Owner {
            route: route
                .map_or(UNROUTED, |route| route.name.as_str())
                .to_owned(),
            service: route
                .map_or(UNROUTED, |route| route.service.as_str())
                .to_owned(),
            tenant: tenant.to_owned(),
            quality,
            ..Owner::connection(OwnerKind::Route, leg(endpoint), name)
        };
        let configured = match route.map(|route| &route.tenant) {
            None | Some(TenantRule::Fixed(_)) => true,
            Some(
                TenantRule::Header { default, .. }
                | TenantRule::Certificate { default, .. }
                | TenantRule::Claim { default, .. }
                | TenantRule::Host { default, .. }
                | TenantRule::Path { default, .. }
                | TenantRule::FirstOf { default, .. },
            ) => default.as_str() == tenant,
        };
        let number = if configured {
            self.owners.intern(&owner)
        } else {
            self.owners.intern_claimed(&owner)
        };
        match number {
            Ok(id) => {
                let mut routes = table.routes.write().unwrap_or_else(PoisonError::into_inner);
                let tenants = routes.entry(key).or_default();
                // Invented tenants share one number; do not remember each of their names.
                if tenants.len() < crate::owner::OWNERS_MAX {
                    tenants.insert(tenant.into(), id);
                }
                Some(id)
            }
            Err(error) => {
                if self.owner_failures.fetch_add(1, Ordering::Relaxed) == 0 {
                    log::error!("{error}; its bytes stay with the connection's overhead");
                }
                None
            }
        }
    }

    /// Moves claimed bytes from the connection's unclaimed owner.
    pub fn post_claim(&self, from: OwnerId, to: OwnerId, claimed: Claimed) {
        let key = ClaimKey {
            from,
            to,
            ifindex: claimed.ifindex,
            class: claimed.class,
        };
        self.claims.add(Claim {
            key,
            bytes: claimed.bytes,
            frames: claimed.frames,
            payload_bytes: claimed.payload_bytes,
        });
    }

    fn shard(&self, key: usize) -> MutexGuard<'_, HashMap<usize, Entry>> {
        // The low bits of an allocation's address are zero.
        self.connections[(key >> 6) % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl EndpointTable {
    /// The owners of an endpoint's connections.
    #[must_use]
    pub fn owners(&self, id: EndpointId) -> Option<EndpointOwners> {
        self.endpoints.get(&id).map(|(_, owners)| *owners)
    }
}

fn address(digest: &Arc<SocketDigest>) -> usize {
    Arc::as_ptr(digest) as usize
}

fn leg(id: EndpointId) -> Leg {
    match id {
        EndpointId::Listener(_) => Leg::Client,
        EndpointId::Upstream(_) => Leg::Upstream,
    }
}
