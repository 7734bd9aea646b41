//! A map with a bound in bytes that forgets what was used longest ago. Pure.

use std::collections::{BTreeMap, HashMap};

/// Values by key.
#[derive(Debug)]
pub struct Lru<V> {
    entries: HashMap<String, Entry<V>>,
    /// Last use → key.
    order: BTreeMap<u64, String>,
    uses: u64,
    bytes: u64,
    bytes_max: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    size: u64,
    used: u64,
}

impl<V> Lru<V> {
    /// Empty.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            entries: HashMap::new(),
            order: BTreeMap::new(),
            uses: 0,
            bytes: 0,
            bytes_max,
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// What they take.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A value, which is used by this.
    pub fn get(&mut self, key: &str) -> Option<&V> {
        let entry = self.entries.get_mut(key)?;
        let key = self.order.remove(&entry.used)?;
        self.uses += 1;
        entry.used = self.uses;
        self.order.insert(entry.used, key);
        Some(&entry.value)
    }

    /// Puts a value in; returns how many others were forgotten for it. One larger than the whole
    /// is not kept.
    pub fn insert(&mut self, key: String, value: V, size: u64) -> usize {
        self.evicting(key, value, size).len()
    }

    /// As [`Lru::insert`], with the keys of what was forgotten.
    pub fn evicting(&mut self, key: String, value: V, size: u64) -> Vec<String> {
        self.remove(&key);
        if size > self.bytes_max {
            return Vec::new();
        }
        self.uses += 1;
        self.bytes += size;
        self.order.insert(self.uses, key.clone());
        let used = self.uses;
        self.entries.insert(key, Entry { value, size, used });
        let mut evicted = Vec::new();
        while self.bytes > self.bytes_max
            && let Some((_, key)) = self.order.pop_first()
        {
            if let Some(entry) = self.entries.remove(&key) {
                self.bytes -= entry.size;
            }
            evicted.push(key);
        }
        evicted
    }

    /// Whether there was one.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        self.order.remove(&entry.used);
        self.bytes -= entry.size;
        true
    }

    /// Whether there is one; this is no use of it.
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Removes all that match; returns their keys.
    pub fn remove_where(&mut self, condition: impl Fn(&V) -> bool) -> Vec<String> {
        let matching = self
            .entries
            .iter()
            .filter(|(_, entry)| condition(&entry.value));
        let keys: Vec<String> = matching.map(|(key, _)| key.clone()).collect();
        for key in &keys {
            self.remove(key);
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut lru = Lru::new(30);
        for key in ["a", "b", "c"] {
            assert_eq!(lru.insert(key.to_owned(), key, 10), 0);
        }
        assert_eq!(lru.get("a"), Some(&"a"));
        assert_eq!(lru.evicting("d".to_owned(), "d", 15), ["b", "c"]);
        assert_eq!((lru.len(), lru.bytes()), (2, 25));
        assert_eq!(lru.get("b"), None);
        // The same key again takes its place, not another one.
        assert_eq!(lru.insert("d".to_owned(), "e", 20), 0);
        assert_eq!(lru.bytes(), 30);
        assert_eq!(lru.insert("huge".to_owned(), "x", 31), 0);
        assert_eq!(lru.get("huge"), None);
        assert_eq!(lru.remove_where(|value| *value == "e"), ["d"]);
        assert_eq!((lru.len(), lru.bytes()), (1, 10));
    }
}
