//! Classes of remote addresses ("internet", "zone-b", …): the small numbers the kernel counts by,
//! and their names.
//!
//! As with owners, a number is given once and never means anything else: kernel counters and
//! postings outlive configurations. So a new class is stored before its number is used.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use flow_abi::CLASS_DEFAULT;

use crate::{config::Cidr, owner::StoreError};

/// Name of [`ClassId::DEFAULT`].
pub const DEFAULT_NAME: &str = "default";

/// A class's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u32);

impl ClassId {
    /// Addresses that no configured prefix holds.
    pub const DEFAULT: Self = Self(CLASS_DEFAULT);
}

/// Where numbers are kept for good.
pub trait ClassStore: Send + Sync {
    /// Stores a new class durably; returns only then.
    ///
    /// # Errors
    /// The store cannot be written; the number must not be used.
    fn store_class(&self, id: ClassId, name: &str) -> Result<(), StoreError>;
}

/// All classes ever numbered.
pub struct Classes {
    inner: RwLock<Inner>,
    store: Box<dyn ClassStore>,
}

struct Inner {
    names: BTreeMap<ClassId, String>,
    next: u32,
}

impl Classes {
    /// Starts from the classes stored earlier.
    #[must_use]
    pub fn new(known: Vec<(ClassId, String)>, store: Box<dyn ClassStore>) -> Self {
        let mut names = BTreeMap::from([(ClassId::DEFAULT, DEFAULT_NAME.to_owned())]);
        names.extend(known);
        let next = names.keys().next_back().map_or(1, |last| last.0 + 1);
        Self {
            inner: RwLock::new(Inner { names, next }),
            store,
        }
    }

    /// The class's number, given and stored now when it has none.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn intern(&self, name: &str) -> Result<ClassId, StoreError> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((id, _)) = inner.names.iter().find(|(_, known)| *known == name) {
            return Ok(*id);
        }
        let id = ClassId(inner.next);
        self.store.store_class(id, name)?;
        inner.next += 1;
        inner.names.insert(id, name.to_owned());
        Ok(id)
    }

    /// Gives no number up to this one any more: kernel counters of a lost ledger bear them.
    pub fn start_above(&self, highest: ClassId) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.next = inner.next.max(highest.0.saturating_add(1));
    }

    /// What a number is called. A number of a lost ledger says so.
    #[must_use]
    pub fn name(&self, id: ClassId) -> String {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner
            .names
            .get(&id)
            .cloned()
            .unwrap_or_else(|| format!("(class {} lost)", id.0))
    }
}

/// The prefixes in force, shared by whoever changes them and whoever has to tell the kernel again.
#[derive(Clone, Debug, Default)]
pub struct ClassesInForce(Arc<Mutex<Vec<(Cidr, ClassId)>>>);

impl ClassesInForce {
    /// Begins with these.
    #[must_use]
    pub fn new(prefixes: Vec<(Cidr, ClassId)>) -> Self {
        Self(Arc::new(Mutex::new(prefixes)))
    }

    /// As of now.
    #[must_use]
    pub fn get(&self) -> Vec<(Cidr, ClassId)> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// From now on.
    pub fn set(&self, prefixes: Vec<(Cidr, ClassId)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = prefixes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<(ClassId, String)>>>);
    impl ClassStore for Memory {
        fn store_class(&self, id: ClassId, name: &str) -> Result<(), StoreError> {
            self.0.lock().unwrap().push((id, name.to_owned()));
            Ok(())
        }
    }

    #[test]
    fn a_number_keeps_its_name_over_restarts_and_renamings() {
        let memory = Memory::default();
        let classes = Classes::new(Vec::new(), Box::new(memory.clone()));
        assert_eq!(classes.intern(DEFAULT_NAME).unwrap(), ClassId::DEFAULT);
        let internet = classes.intern("internet").unwrap();
        assert_eq!(internet, ClassId(1));
        let stored = memory.0.lock().unwrap().clone();
        let again = Classes::new(stored, Box::new(memory));
        let zone = again.intern("zone-b").unwrap();
        assert_eq!(zone, ClassId(2));
        assert_eq!(again.intern("internet").unwrap(), internet);
        again.start_above(ClassId(7));
        assert_eq!(again.intern("later").unwrap(), ClassId(8));
        assert_eq!(again.name(ClassId(5)), "(class 5 lost)");
        assert_eq!(again.name(zone), "zone-b");
    }
}
