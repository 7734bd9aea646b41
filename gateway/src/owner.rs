//! Owners: the small numbers the kernel credits bytes to, and what each of them means.
//!
//! A number is given once and never means anything else, across restarts and configurations,
//! because kernel counters outlive both. So a new owner is kept before its number is used: in a
//! [`Journal`] that lives as long as the kernel's counters do, which costs a request no wait for a
//! disk, and from there in the store, before anything is posted under the number.

mod journal;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, OnceLock, PoisonError, RwLock},
};

use flow_abi::OWNER_FOREIGN;

/// Distinct owners; past that, tenants share [`TENANT_OVERFLOW`]. Bounds kernel memory and metric
/// cardinality against clients that invent tenant names.
pub const OWNERS_MAX: usize = 8192;
/// The tenant of requests that came after [`OWNERS_MAX`].
pub const TENANT_OVERFLOW: &str = "(overflow)";

/// An owner's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(pub u32);

impl OwnerId {
    /// Nobody: traffic of no gateway connection.
    pub const FOREIGN: Self = Self(OWNER_FOREIGN);
}

/// Which side of the gateway a connection is on. A proxied byte crosses the host on both, and is
/// never priced twice under one rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Leg {
    /// Between a client and the gateway.
    Client,
    /// Between the gateway and an upstream peer.
    Upstream,
}

/// Why an owner owns bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OwnerKind {
    /// A request on a route.
    Route,
    /// A gateway connection itself: handshakes, acknowledgements, TLS set-up, FIN and RST.
    Overhead,
    /// Payload received on a gateway connection that no request has claimed: in flight, or a scan,
    /// a failed handshake, an unparsable request.
    Unclaimed,
    /// Not the gateway's traffic.
    Foreign,
}

/// How sure the split of a connection's bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Quality {
    /// By TCP sequence range: each byte's request is known.
    Exact,
    /// HTTP/2 streams share frames: bytes go to the stream that last handed data to the
    /// connection.
    Estimated,
}

macro_rules! words {
    ($type:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        impl $type {
            /// The word used in metrics, logs and the ledger.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The value of a word.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}
words!(Leg { Client => "client", Upstream => "upstream" });
words!(OwnerKind {
    Route => "route", Overhead => "overhead", Unclaimed => "unclaimed", Foreign => "foreign",
});
words!(Quality { Exact => "exact", Estimated => "estimated" });

/// What a number stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Why it owns bytes.
    pub kind: OwnerKind,
    /// Side of the gateway; meaningless for foreign traffic.
    pub leg: Leg,
    /// Listener (client leg) or upstream (upstream leg) name; empty for foreign traffic.
    pub endpoint: String,
    /// Route name; empty unless `kind` is a route.
    pub route: String,
    /// Service name; empty unless `kind` is a route.
    pub service: String,
    /// Tenant; empty unless `kind` is a route.
    pub tenant: String,
    /// How sure the split is.
    pub quality: Quality,
}

impl Owner {
    /// The owner of traffic that is not the gateway's.
    #[must_use]
    pub fn foreign() -> Self {
        Self {
            kind: OwnerKind::Foreign,
            leg: Leg::Client,
            endpoint: String::new(),
            route: String::new(),
            service: String::new(),
            tenant: String::new(),
            quality: Quality::Exact,
        }
    }

    /// A connection-level owner at a listener or upstream.
    #[must_use]
    pub fn connection(kind: OwnerKind, leg: Leg, endpoint: &str) -> Self {
        Self {
            kind,
            leg,
            endpoint: endpoint.into(),
            ..Self::foreign()
        }
    }
}

pub use journal::{Entry, Journal};

/// Where numbers are kept for good.
pub trait OwnerStore: Send + Sync {
    /// Stores new owners durably, all or none; returns only then. One that is stored already is
    /// left as it is.
    ///
    /// # Errors
    /// The store cannot be written, or a number has another meaning there.
    fn store(&self, owners: &[(OwnerId, Owner)]) -> Result<(), StoreError>;

    /// All that is stored.
    ///
    /// # Errors
    /// The store cannot be read.
    fn stored(&self) -> Result<Vec<(OwnerId, Owner)>, StoreError>;
}

/// The owner store cannot be written.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot store a new owner: {0}")]
pub struct StoreError(pub String);

/// All owners, both ways.
pub struct Owners {
    inner: RwLock<Inner>,
    store: Box<dyn OwnerStore>,
    journal: OnceLock<Box<dyn Journal>>,
    /// Held while names go from the journal to the store.
    writing: Mutex<()>,
}

#[derive(Default)]
struct Inner {
    numbers: HashMap<Owner, OwnerId>,
    owners: HashMap<OwnerId, Owner>,
    next: u32,
    /// In the journal and not in the store yet, with their places there.
    waiting: BTreeMap<OwnerId, u32>,
    /// Free places of the journal; none before there is one.
    places: Vec<u32>,
    /// Another process gives numbers too: an upgrade is under way.
    shared: bool,
}

impl Inner {
    fn learn(&mut self, known: Vec<(OwnerId, Owner)>) {
        for (id, owner) in known {
            self.next = self.next.max(id.0 + 1);
            // Where two have the same meaning, the one in use stays in use.
            self.numbers.entry(owner.clone()).or_insert(id);
            self.owners.insert(id, owner);
        }
    }
}

impl Owners {
    /// Starts from the owners stored earlier.
    #[must_use]
    pub fn new(known: Vec<(OwnerId, Owner)>, store: Box<dyn OwnerStore>) -> Self {
        let mut inner = Inner {
            next: 1,
            ..Inner::default()
        };
        inner.owners.insert(OwnerId::FOREIGN, Owner::foreign());
        inner.numbers.insert(Owner::foreign(), OwnerId::FOREIGN);
        inner.learn(known);
        Self {
            inner: RwLock::new(inner),
            store,
            journal: OnceLock::new(),
            writing: Mutex::default(),
        }
    }

    /// From now on new owners wait in this journal until [`Self::write_out`]. What an earlier
    /// process left in it is stored now; with `discard` it was another ledger's, and is not.
    ///
    /// # Errors
    /// The store cannot be written, or the journal not be read.
    pub fn keep_in(&self, journal: Box<dyn Journal>, discard: bool) -> Result<(), StoreError> {
        let left = journal.left()?;
        if !discard && !left.is_empty() {
            self.store.store(&left)?;
            self.write().learn(left);
        }
        for place in 0..journal.places() {
            journal.clear(place)?;
        }
        let places = (0..journal.places()).rev().collect();
        if self.journal.set(journal).is_ok() {
            self.write().places = places;
        }
        Ok(())
    }

    /// Stores what waits in the journal: before anything is posted under those numbers. Blocks on
    /// the store when something does.
    ///
    /// # Errors
    /// The store cannot be written; everything waits on.
    pub fn write_out(&self) -> Result<(), StoreError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting: Vec<(OwnerId, u32)> = {
            let inner = self.read();
            inner.waiting.iter().map(|(id, at)| (*id, *at)).collect()
        };
        if waiting.is_empty() {
            return Ok(());
        }
        let named = |(id, _): &(OwnerId, u32)| Some((*id, self.get(*id)?));
        let owners: Vec<_> = waiting.iter().filter_map(named).collect();
        self.store.store(&owners)?;
        if let Some(journal) = self.journal.get() {
            // A place that cannot be cleared is stored a second time after a crash, and is then
            // left as it is.
            for (_, place) in &waiting {
                let _ = journal.clear(*place);
            }
        }
        let mut inner = self.write();
        for (id, place) in waiting {
            inner.waiting.remove(&id);
            inner.places.push(place);
        }
        Ok(())
    }

    /// Whether another process gives numbers too: the store then decides about each, at once.
    pub fn share(&self, shared: bool) {
        self.write().shared = shared;
    }

    /// Learns what another process has stored.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn refresh(&self) -> Result<(), StoreError> {
        let stored = self.store.stored()?;
        self.write().learn(stored);
        Ok(())
    }

    /// The owner's number, given and kept now when it has none. Blocks on the store where there is
    /// no journal, and while another process gives numbers too.
    ///
    /// # Errors
    /// The owner cannot be kept: the caller leaves the bytes to the connection's overhead.
    pub fn intern(&self, owner: &Owner) -> Result<OwnerId, StoreError> {
        self.number(owner, true)
    }

    /// As [`Self::intern`], for a tenant a client named: past [`OWNERS_MAX`] it shares a number,
    /// so that invented tenants take none from those the configuration names.
    ///
    /// # Errors
    /// As [`Self::intern`].
    pub fn intern_claimed(&self, owner: &Owner) -> Result<OwnerId, StoreError> {
        self.number(owner, false)
    }

    fn number(&self, owner: &Owner, configured: bool) -> Result<OwnerId, StoreError> {
        if let Some(id) = self.read().numbers.get(owner) {
            return Ok(*id);
        }
        let mut inner = self.write();
        if inner.shared {
            let stored = self.store.stored()?;
            inner.learn(stored);
        }
        if let Some(id) = inner.numbers.get(owner) {
            return Ok(*id);
        }
        let mut owner = owner.clone();
        if inner.owners.len() >= OWNERS_MAX && !configured {
            owner.tenant = TENANT_OVERFLOW.into();
            if let Some(id) = inner.numbers.get(&owner) {
                return Ok(*id);
            }
        }
        match self.journal.get() {
            Some(journal) if !inner.shared => give_by_journal(&mut inner, journal.as_ref(), owner),
            _ => self.give_by_store(&mut inner, owner),
        }
    }

    fn give_by_store(&self, inner: &mut Inner, owner: Owner) -> Result<OwnerId, StoreError> {
        let id = OwnerId(inner.next);
        let stored = self.store.store(&[(id, owner.clone())]);
        let id = match stored {
            Ok(()) => id,
            Err(error) if !inner.shared => return Err(error),
            Err(_) => {
                // The other process may have stored the same number just before.
                inner.learn(self.store.stored()?);
                if let Some(id) = inner.numbers.get(&owner) {
                    return Ok(*id);
                }
                let id = OwnerId(inner.next);
                self.store.store(&[(id, owner.clone())])?;
                id
            }
        };
        inner.learn(vec![(id, owner)]);
        Ok(id)
    }

    /// Gives no number up to this one any more: kernel counters of a lost ledger bear them.
    pub fn start_above(&self, highest: u32) {
        let mut inner = self.write();
        inner.next = inner.next.max(highest.saturating_add(1));
    }

    /// What a number stands for; None for a number of a lost store.
    #[must_use]
    pub fn get(&self, id: OwnerId) -> Option<Owner> {
        self.read().owners.get(&id).cloned()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Never waits: a request's worker calls this.
fn give_by_journal(
    inner: &mut Inner,
    journal: &dyn Journal,
    owner: Owner,
) -> Result<OwnerId, StoreError> {
    let id = OwnerId(inner.next);
    let Some(place) = inner.places.last().copied() else {
        return Err(StoreError(
            "the journal of new owners is full: the ledger has not been written for a while".into(),
        ));
    };
    let entry = Entry::of(id, &owner)
        .ok_or_else(|| StoreError(format!("its names are longer than {} bytes", Entry::BYTES)))?;
    journal.write(place, &entry)?;
    inner.places.pop();
    inner.waiting.insert(id, place);
    inner.learn(vec![(id, owner)]);
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    };

    /// What is stored, and whether the disk is full.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<(OwnerId, Owner)>>>, Arc<AtomicBool>);

    /// Outlives a process, as a map of the kernel does.
    #[derive(Clone)]
    struct Kept(Arc<Mutex<Vec<Entry>>>);
    impl Kept {
        fn of(places: usize) -> Self {
            Self(Arc::new(Mutex::new(vec![Entry::default(); places])))
        }
    }
    impl Journal for Kept {
        fn places(&self) -> u32 {
            u32::try_from(self.0.lock().unwrap().len()).unwrap()
        }
        fn write(&self, place: u32, entry: &Entry) -> Result<(), StoreError> {
            self.0.lock().unwrap()[place as usize] = *entry;
            Ok(())
        }
        fn read(&self, place: u32) -> Result<Entry, StoreError> {
            Ok(self.0.lock().unwrap()[place as usize])
        }
    }
    impl OwnerStore for Memory {
        fn store(&self, owners: &[(OwnerId, Owner)]) -> Result<(), StoreError> {
            if self.1.load(Relaxed) {
                return Err(StoreError("disk full".into()));
            }
            let mut stored = self.0.lock().unwrap();
            for (id, owner) in owners {
                match stored.iter().find(|(known, _)| known == id) {
                    Some((_, known)) if known != owner => {
                        return Err(StoreError("the number is taken".into()));
                    }
                    Some(_) => {}
                    None => stored.push((*id, owner.clone())),
                }
            }
            Ok(())
        }
        fn stored(&self) -> Result<Vec<(OwnerId, Owner)>, StoreError> {
            Ok(self.0.lock().unwrap().clone())
        }
    }

    fn route(tenant: &str) -> Owner {
        Owner {
            kind: OwnerKind::Route,
            tenant: tenant.into(),
            ..Owner::connection(OwnerKind::Route, Leg::Client, "public")
        }
    }

    #[test]
    fn a_number_keeps_its_meaning_over_a_restart() {
        let memory = Memory::default();
        let owners = Owners::new(Vec::new(), Box::new(memory.clone()));
        let a = owners.intern(&route("a")).unwrap();
        let b = owners.intern(&route("b")).unwrap();
        assert_eq!(owners.intern(&route("a")).unwrap(), a);
        assert_ne!(a, b);
        let stored = memory.0.lock().unwrap().clone();
        let again = Owners::new(stored, Box::new(memory));
        assert_eq!(again.intern(&route("b")).unwrap(), b);
        let c = again.intern(&route("c")).unwrap();
        assert!(c > b, "a new owner never gets an old number");
        assert_eq!(again.get(a), Some(route("a")));
    }

    #[test]
    fn two_processes_never_give_a_number_two_meanings() {
        let memory = Memory::default();
        let old = Owners::new(Vec::new(), Box::new(memory.clone()));
        old.intern(&route("a")).unwrap();
        let known = memory.0.lock().unwrap().clone();
        let new = Owners::new(known, Box::new(memory.clone()));
        old.share(true);
        new.share(true);
        let b = new.intern(&route("b")).unwrap();
        let c = old.intern(&route("c")).unwrap();
        assert_ne!(b, c);
        assert_eq!(old.intern(&route("b")).unwrap(), b, "it asks the store");
        assert_eq!(new.get(c), None);
        new.refresh().unwrap();
        assert_eq!(new.get(c), Some(route("c")));
        assert_eq!(memory.0.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_number_that_could_not_be_stored_is_not_used() {
        let memory = Memory::default();
        memory.1.store(true, Relaxed);
        let owners = Owners::new(Vec::new(), Box::new(memory));
        assert!(owners.intern(&route("a")).is_err());
        assert_eq!(owners.get(OwnerId(1)), None);
    }

    #[test]
    fn a_killed_process_leaves_its_new_owners_to_the_next_one() {
        let (memory, kept) = (Memory::default(), Kept::of(4));
        let owners = Owners::new(Vec::new(), Box::new(memory.clone()));
        owners.keep_in(Box::new(kept.clone()), false).unwrap();
        let a = owners.intern_claimed(&route("a")).unwrap();
        let b = owners.intern(&route("b")).unwrap();
        assert_eq!(
            memory.0.lock().unwrap().len(),
            0,
            "nobody waited for a disk"
        );
        // Killed here.
        drop(owners);
        let next = Owners::new(Vec::new(), Box::new(memory.clone()));
        next.keep_in(Box::new(kept.clone()), false).unwrap();
        assert_eq!(memory.0.lock().unwrap().len(), 2);
        assert_eq!(next.get(a), Some(route("a")));
        assert_eq!(next.intern(&route("b")).unwrap(), b);
        assert!(next.intern(&route("c")).unwrap() > b);
        // Another ledger's numbers mean nothing here.
        let other = Memory::default();
        let stranger = Owners::new(Vec::new(), Box::new(other.clone()));
        stranger.keep_in(Box::new(kept), true).unwrap();
        stranger.write_out().unwrap();
        assert_eq!(other.0.lock().unwrap().len(), 0);
    }

    #[test]
    fn names_wait_while_the_disk_is_full_and_no_longer_than_there_is_room() {
        let (memory, kept) = (Memory::default(), Kept::of(2));
        let owners = Owners::new(Vec::new(), Box::new(memory.clone()));
        owners.keep_in(Box::new(kept.clone()), false).unwrap();
        memory.1.store(true, Relaxed);
        let a = owners.intern(&route("a")).unwrap();
        owners.intern(&route("b")).unwrap();
        assert!(owners.write_out().is_err());
        assert!(owners.intern(&route("c")).is_err(), "no place is left");
        assert_eq!(owners.intern(&route("a")).unwrap(), a);
        memory.1.store(false, Relaxed);
        owners.write_out().unwrap();
        assert_eq!(memory.0.lock().unwrap().len(), 2);
        assert_eq!(kept.left().unwrap(), [], "what is stored waits no more");
        owners.intern(&route("c")).unwrap();
        owners.write_out().unwrap();
        assert_eq!(memory.0.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_name_that_does_not_fit_is_not_cut() {
        let owners = Owners::new(Vec::new(), Box::new(Memory::default()));
        owners.keep_in(Box::new(Kept::of(2)), false).unwrap();
        assert!(owners.intern(&route(&"a".repeat(Entry::BYTES))).is_err());
    }

    #[test]
    fn invented_tenants_cannot_exhaust_the_numbers() {
        let owners = Owners::new(Vec::new(), Box::new(Memory::default()));
        for tenant in 0..OWNERS_MAX + 100 {
            owners.intern_claimed(&route(&tenant.to_string())).unwrap();
        }
        let late = owners.intern_claimed(&route("late")).unwrap();
        assert_eq!(owners.get(late).unwrap().tenant, TENANT_OVERFLOW);
        assert!(owners.read().owners.len() <= OWNERS_MAX + 1);
        // The configuration's own are not theirs to take.
        let fixed = owners.intern(&route("fixed")).unwrap();
        assert_eq!(owners.get(fixed).unwrap().tenant, "fixed");
    }
}
