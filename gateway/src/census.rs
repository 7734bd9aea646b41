//! The census: what is alive now, by kind and age. Everything counted is held by a guard and
//! leaves when that is dropped, so a count that does not go back to zero is a leak, and says of
//! what kind it is and how old.

use std::{
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::config::Name;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A client connection, from its acceptance to its end.
    Connection,
    /// A request, from its header to its end.
    Request,
    /// A copy of a request on its way to a mirror.
    Mirror,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Connection, Self::Request, Self::Mirror];

    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Request => "request",
            Self::Mirror => "mirror",
        }
    }
}

/// Upper bounds of the age classes; the last one has none.
pub const AGES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(600),
    Duration::from_secs(3600),
];

/// More than there are workers: the hash of a worker's thread rarely meets another's.
const SHARDS: usize = 16;

thread_local! {
    static SHARD: usize = {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(std::thread::current().id());
        usize::try_from(hash % SHARDS as u64).unwrap_or(0)
    };
}

/// Counts what lives.
#[derive(Debug, Default)]
pub struct Census {
    shards: [Mutex<Shard>; SHARDS],
}

/// What began on the threads of this shard. As many places as lived at once.
#[derive(Debug, Default)]
struct Shard {
    places: Vec<Option<Entry>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Entry {
    kind: Kind,
    since: Instant,
    what: Name,
}

/// One living thing; gone when dropped.
#[derive(Debug)]
pub struct Alive {
    census: Arc<Census>,
    shard: usize,
    place: usize,
}

/// How many of a kind live, by age.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Which kind.
    pub kind: Kind,
    /// All of them.
    pub alive: usize,
    /// How many are younger than each of [`AGES`], and at the end those that are older than all.
    pub by_age: [usize; AGES.len() + 1],
    /// Age of the oldest, milliseconds.
    pub oldest_ms: u128,
}

/// One that is old.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Old {
    /// Which kind.
    pub kind: Kind,
    /// Listener, route or upstream.
    pub what: String,
    /// Milliseconds.
    pub age_ms: u128,
}

impl Census {
    /// Since then, until the guard is dropped. `what` is the listener or upstream it belongs to.
    #[must_use]
    pub fn enter(self: &Arc<Self>, kind: Kind, what: Name, since: Instant) -> Alive {
        let shard = SHARD.with(|at| *at);
        let place = lock(&self.shards[shard]).put(Entry { kind, since, what });
        Alive {
            census: Arc::clone(self),
            shard,
            place,
        }
    }

    /// How many of a kind live.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        let shards = self.shards.iter();
        shards
            .map(|shard| lock(shard).living().filter(|e| e.kind == kind).count())
            .sum()
    }

    /// Every kind by age.
    #[must_use]
    pub fn counts(&self) -> Vec<Count> {
        let now = Instant::now();
        let mut counts = Kind::ALL.map(|kind| Count {
            kind,
            alive: 0,
            by_age: [0; AGES.len() + 1],
            oldest_ms: 0,
        });
        for shard in &self.shards {
            for entry in lock(shard).living() {
                let age = now.saturating_duration_since(entry.since);
                let class = AGES.iter().position(|bound| age < *bound);
                let count = &mut counts[entry.kind as usize];
                count.alive += 1;
                count.by_age[class.unwrap_or(AGES.len())] += 1;
                count.oldest_ms = count.oldest_ms.max(age.as_millis());
            }
        }
        counts.into()
    }

    /// The oldest, oldest first.
    #[must_use]
    pub fn oldest(&self, limit: usize) -> Vec<Old> {
        let now = Instant::now();
        let mut all: Vec<Old> = Vec::new();
        for shard in &self.shards {
            all.extend(lock(shard).living().map(|entry| Old {
                kind: entry.kind,
                what: entry.what.to_string(),
                age_ms: now.saturating_duration_since(entry.since).as_millis(),
            }));
        }
        all.sort_by_key(|old| std::cmp::Reverse(old.age_ms));
        all.truncate(limit);
        all
    }
}

impl Shard {
    fn living(&self) -> impl Iterator<Item = &Entry> {
        self.places.iter().flatten()
    }

    fn put(&mut self, entry: Entry) -> usize {
        if let Some(place) = self.free.pop() {
            self.places[place] = Some(entry);
            return place;
        }
        self.places.push(Some(entry));
        self.places.len() - 1
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let mut shard = lock(&self.census.shards[self.shard]);
        shard.places[self.place] = None;
        shard.free.push(self.place);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn what_lives_is_counted_until_it_is_dropped() {
        let census = Arc::new(Census::default());
        let now = Instant::now();
        let before = now.checked_sub(Duration::from_secs(70)).unwrap();
        let request = census.enter(Kind::Request, name("orders"), before);
        let _connection = census.enter(Kind::Connection, name("public"), now);
        assert_eq!(census.count(Kind::Request), 1);
        let counts = census.counts();
        assert_eq!(counts[Kind::Request as usize].by_age, [0, 0, 0, 1, 0, 0]);
        assert_eq!(census.oldest(1)[0].what, "orders");
        drop(request);
        assert_eq!(census.count(Kind::Request), 0);
        assert_eq!(census.count(Kind::Connection), 1);
    }

    #[test]
    fn places_are_used_again_also_from_another_thread() {
        let census = Arc::new(Census::default());
        for _ in 0..3 {
            let now = Instant::now();
            let alive: Vec<_> = (0..100)
                .map(|_| census.enter(Kind::Mirror, name("copy"), now))
                .collect();
            assert_eq!(census.count(Kind::Mirror), 100);
            std::thread::spawn(move || drop(alive)).join().unwrap();
            assert_eq!(census.count(Kind::Mirror), 0);
        }
        let places: usize = census.shards.iter().map(|s| lock(s).places.len()).sum();
        assert_eq!(places, 100);
    }
}
