//! The store of cached responses: a memory tier and a disk tier behind it, each with a bound.
//! What expires when, and what may be stored at all, is decided in [`crate::proxy`]; here objects
//! are kept, found, forgotten by least recent use, and purged by what their URLs say.
//!
//! A write goes to memory and, in the background, to disk. What memory forgets, disk still has;
//! what is read from disk goes to memory again. Disk survives restarts.

mod disk;
mod handlers;
mod lru;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use pingora::{
    Result,
    cache::{
        CacheKey, CacheMeta,
        key::CacheHashKey as _,
        storage::{HitHandler, MissHandler, PurgeOutcome, PurgeTarget, PurgeType, Storage},
        trace::SpanHandle,
    },
};

pub use disk::Disk;
use handlers::{Hit, Miss};
use lru::Lru;

/// What separates the parts of a primary key; no part can hold it.
pub const SEPARATOR: char = '\u{1}';

/// A stored response.
#[derive(Clone, Debug)]
pub struct Object {
    /// What it is, in words: tenant, route and URL. See [`primary`].
    pub primary: Arc<str>,
    /// pingora's own two parts: freshness, and the response header.
    pub meta: Arc<(Vec<u8>, Vec<u8>)>,
    /// In the pieces it came in.
    pub body: Arc<[Bytes]>,
}

impl Object {
    /// Bytes it takes, roughly.
    #[must_use]
    pub fn size(&self) -> u64 {
        let body: usize = self.body.iter().map(Bytes::len).sum();
        (self.primary.len() + self.meta.0.len() + self.meta.1.len() + body + 256) as u64
    }

    /// Length of the body.
    #[must_use]
    pub fn body_length(&self) -> usize {
        self.body.iter().map(Bytes::len).sum()
    }
}

/// A primary key: tenants never share an object, nor do routes.
#[must_use]
pub fn primary(tenant: &str, route: &str, url: &str) -> String {
    format!("{tenant}{SEPARATOR}{route}{SEPARATOR}{url}")
}

/// Which objects to purge. All that is given must match; nothing given: everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Of this tenant.
    pub tenant: Option<String>,
    /// Of this route.
    pub route: Option<String>,
    /// With exactly this URL, such as `https://shop.example/a?b=c`.
    pub url: Option<String>,
    /// With a URL that starts so.
    pub url_prefix: Option<String>,
}

impl Selection {
    /// Whether an object is meant.
    #[must_use]
    pub fn matches(&self, primary: &str) -> bool {
        let mut parts = primary.splitn(3, SEPARATOR);
        let (tenant, route, url) = (parts.next(), parts.next(), parts.next());
        let is = |wanted: &Option<String>, part: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| part == Some(wanted))
        };
        is(&self.tenant, tenant)
            && is(&self.route, route)
            && is(&self.url, url)
            && self
                .url_prefix
                .as_deref()
                .is_none_or(|prefix| url.is_some_and(|url| url.starts_with(prefix)))
    }
}

/// Bounds of a store.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Of the memory tier, in bytes.
    pub memory_bytes_max: u64,
    /// Of the disk tier: its folder and its bytes; None: there is none.
    pub disk: Option<(PathBuf, u64)>,
}

/// Both tiers.
pub struct Store {
    memory: Mutex<Lru<Object>>,
    disk: Option<Arc<Disk>>,
    memory_evictions: AtomicU64,
}

/// What a tier holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// Objects.
    pub objects: u64,
    /// Bytes.
    pub bytes: u64,
    /// Forgotten for room since the start.
    pub evictions: u64,
}

impl Store {
    /// Opens it; what the disk holds from before is found again.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(bounds: &Bounds) -> std::io::Result<Self> {
        let disk = match &bounds.disk {
            None => None,
            Some((folder, most)) => Some(Arc::new(Disk::open(folder, *most)?)),
        };
        Ok(Self {
            memory: Mutex::new(Lru::new(bounds.memory_bytes_max)),
            disk,
            memory_evictions: AtomicU64::new(0),
        })
    }

    /// What memory and disk hold.
    #[must_use]
    pub fn levels(&self) -> (Level, Option<Level>) {
        let memory = self.memory();
        let level = Level {
            objects: memory.len() as u64,
            bytes: memory.bytes(),
            evictions: self.memory_evictions.load(Ordering::Relaxed),
        };
        drop(memory);
        (level, self.disk.as_ref().map(|disk| disk.level()))
    }

    /// Forgets what is selected; returns how many objects that were.
    pub fn purge(&self, selection: &Selection) -> usize {
        let mut keys = self
            .memory()
            .remove_where(|object| selection.matches(&object.primary));
        if let Some(disk) = &self.disk {
            keys.extend(disk.remove_where(selection));
        }
        keys.sort_unstable();
        keys.dedup();
        keys.len()
    }

    /// Whether memory holds an object; disk is not asked. This is no use of it.
    #[must_use]
    pub fn holds(&self, key: &str) -> bool {
        self.memory().contains(key)
    }

    async fn find(&self, key: &str) -> Option<Object> {
        if let Some(object) = self.memory().get(key) {
            return Some(object.clone());
        }
        let disk = self.disk.as_ref()?;
        let object = Arc::clone(disk).read(key.to_owned()).await?;
        self.remember(key.to_owned(), object.clone());
        Some(object)
    }

    fn remember(&self, key: String, object: Object) {
        let size = object.size();
        let evicted = self.memory().insert(key, object, size);
        self.memory_evictions
            .fetch_add(evicted as u64, Ordering::Relaxed);
    }

    /// Into both tiers.
    pub(crate) fn put(&self, key: String, object: Object) {
        if let Some(disk) = &self.disk {
            Arc::clone(disk).write_later(key.clone(), object.clone());
        }
        self.remember(key, object);
    }

    async fn remove(&self, key: &str) -> bool {
        let in_memory = self.memory().remove(key);
        let on_disk = match &self.disk {
            Some(disk) => Arc::clone(disk).remove(key.to_owned()).await,
            None => false,
        };
        in_memory || on_disk
    }

    fn memory(&self) -> MutexGuard<'_, Lru<Object>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Storage for Store {
    async fn lookup(
        &'static self,
        key: &CacheKey,
        _: &SpanHandle,
    ) -> Result<Option<(CacheMeta, HitHandler)>> {
        let Some(object) = self.find(&key.combined()).await else {
            return Ok(None);
        };
        // Sixteen bytes of hash decide the place; the words decide whether it is the same thing.
        if object.primary.as_bytes() != key.primary_key() {
            return Ok(None);
        }
        let meta = CacheMeta::deserialize(&object.meta.0, &object.meta.1)?;
        Ok(Some((meta, Box::new(Hit::new(&object)))))
    }

    async fn get_miss_handler(
        &'static self,
        key: &CacheKey,
        meta: &CacheMeta,
        _: &SpanHandle,
    ) -> Result<MissHandler> {
        let primary = String::from_utf8_lossy(key.primary_key()).into();
        let meta = Arc::new(meta.serialize()?);
        Ok(Box::new(Miss::new(self, key.combined(), primary, meta)))
    }

    async fn purge(
        &'static self,
        target: PurgeTarget<'_>,
        _: PurgeType,
        _: &SpanHandle,
    ) -> Result<PurgeOutcome> {
        if self.remove(&target.key().combined()).await {
            return Ok(PurgeOutcome::Purged(None));
        }
        Ok(PurgeOutcome::NotFound)
    }

    async fn update_meta(
        &'static self,
        key: &CacheKey,
        meta: &CacheMeta,
        _: &SpanHandle,
    ) -> Result<bool> {
        let key = key.combined();
        let Some(mut object) = self.find(&key).await else {
            return Ok(false);
        };
        object.meta = Arc::new(meta.serialize()?);
        self.put(key, object);
        Ok(true)
    }

    fn as_any(&self) -> &(dyn std::any::Any + Send + Sync + 'static) {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(url: &str, body: &[u8]) -> Object {
        Object {
            primary: primary("acme", "shop", url).into(),
            meta: Arc::new((b"meta".to_vec(), b"header".to_vec())),
            body: Arc::from([Bytes::copy_from_slice(body)]),
        }
    }

    fn bytes(object: &Object) -> Vec<u8> {
        object.body.concat()
    }

    #[tokio::test]
    async fn disk_has_what_memory_forgot_and_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let bounds = Bounds {
            memory_bytes_max: 3_000,
            disk: Some((folder.path().join("cache"), 100_000)),
        };
        let store = Store::open(&bounds).unwrap();
        for n in 0..20 {
            store.put(
                format!("{n:032x}"),
                object(&format!("https://a/{n}"), &[n; 500]),
            );
        }
        while store.levels().1.unwrap().objects < 20 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let (memory, _) = store.levels();
        assert!(
            memory.bytes <= 3_000 && memory.evictions >= 15,
            "{memory:?}"
        );
        let first = store.find(&format!("{:032x}", 0)).await.unwrap();
        assert_eq!(bytes(&first), [0; 500]);
        drop(store);
        let again = Store::open(&bounds).unwrap();
        assert_eq!(again.levels().1.unwrap().objects, 20);
        let last = again.find(&format!("{:032x}", 19)).await.unwrap();
        assert_eq!(
            (&*last.primary, bytes(&last)),
            ("acme\u{1}shop\u{1}https://a/19", vec![19; 500])
        );
        let purged = again.purge(&Selection {
            url_prefix: Some("https://a/1".to_owned()),
            ..Selection::default()
        });
        assert_eq!(purged, 11, "1 and 10 to 19");
        assert!(again.find(&format!("{:032x}", 19)).await.is_none());
        assert_eq!(again.purge(&Selection::default()), 9);
        assert_eq!(again.levels().1.unwrap().bytes, 0);
    }

    #[test]
    fn selections_match_what_they_say() {
        let key = primary("acme", "shop", "https://a/x?y=z");
        let select = |change: &dyn Fn(&mut Selection)| {
            let mut selection = Selection::default();
            change(&mut selection);
            selection.matches(&key)
        };
        assert!(select(&|_| {}));
        assert!(select(&|s| s.tenant = Some("acme".into())));
        assert!(!select(&|s| s.tenant = Some("other".into())));
        assert!(select(&|s| s.url = Some("https://a/x?y=z".into())));
        assert!(!select(&|s| s.url = Some("https://a/x".into())));
        assert!(select(&|s| s.url_prefix = Some("https://a/x".into())));
        assert!(!select(&|s| s.route = Some("sho".into())));
    }
}
