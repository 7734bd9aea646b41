//! The disk tier: a file for each object, written beside and renamed, so that a file is whole or
//! not there. The index is in memory and is made again from the files at start.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use super::{Level, Object, Selection, lru::Lru};

/// The first bytes of a file; the last one is the format's version.
const MAGIC: &[u8; 8] = b"EMCACHE1";
/// Of a part that is no body.
const PART_BYTES_MAX: u32 = 1 << 20;
/// Objects that may wait to be written; more are not written.
const QUEUE_MAX: u64 = 256;

/// One folder of objects.
pub struct Disk {
    folder: PathBuf,
    index: Mutex<Lru<Arc<str>>>,
    evictions: AtomicU64,
    waiting: AtomicU64,
    /// Objects not written because too many waited, or the disk refused.
    pub lost: AtomicU64,
}

impl Disk {
    /// Makes the folder, or finds what is in it. What is no whole object is deleted.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(folder: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut found: Vec<(std::time::SystemTime, String, Arc<str>, u64)> = Vec::new();
        for file in fs::read_dir(folder)? {
            let file = file?;
            let name = file.file_name().to_string_lossy().into_owned();
            let metadata = file.metadata()?;
            let whole = is_key(&name)
                .then(|| read_primary(&file.path()).ok())
                .flatten();
            match whole {
                Some(primary) => {
                    let used = metadata.modified().unwrap_or(std::time::UNIX_EPOCH);
                    found.push((used, name, primary, metadata.len()));
                }
                None => {
                    let _ = fs::remove_file(file.path());
                }
            }
        }
        found.sort_by_key(|(used, ..)| *used);
        let disk = Self {
            folder: folder.to_owned(),
            index: Mutex::new(Lru::new(bytes_max)),
            evictions: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        };
        for (_, key, primary, size) in found {
            disk.enter(key, primary, size);
        }
        Ok(disk)
    }

    /// What it holds.
    pub fn level(&self) -> Level {
        let index = self.index();
        Level {
            objects: index.len() as u64,
            bytes: index.bytes(),
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }

    /// Reads an object on a thread that may block.
    pub async fn read(self: Arc<Self>, key: String) -> Option<Object> {
        self.index().get(&key)?;
        let path = self.path(&key);
        let read = tokio::task::spawn_blocking(move || read_object(&path)).await;
        match read {
            Ok(Ok(object)) => Some(object),
            _ => {
                self.remove(key).await;
                None
            }
        }
    }

    /// Writes an object on a thread that may block.
    pub fn write_later(self: Arc<Self>, key: String, object: Object) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= QUEUE_MAX {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        tokio::task::spawn_blocking(move || {
            match self.write(&key, &object) {
                Ok(size) => self.enter(key, Arc::clone(&object.primary), size),
                Err(error) => {
                    if self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
                        log::warn!("cache: {}: {error}", self.folder.display());
                    }
                }
            }
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        });
    }

    fn write(&self, key: &str, object: &Object) -> io::Result<u64> {
        static TEMPORARY: AtomicU64 = AtomicU64::new(0);
        let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
        let temporary = self.folder.join(format!("{key}.{number}.tmp"));
        let written = (|| {
            let mut file = io::BufWriter::new(fs::File::create(&temporary)?);
            file.write_all(MAGIC)?;
            for part in [object.primary.as_bytes(), &object.meta.0, &object.meta.1] {
                let length = u32::try_from(part.len()).map_err(io::Error::other)?;
                file.write_all(&length.to_le_bytes())?;
                file.write_all(part)?;
            }
            file.write_all(&(object.body_length() as u64).to_le_bytes())?;
            for piece in object.body.iter() {
                file.write_all(piece)?;
            }
            file.into_inner()?.metadata().map(|metadata| metadata.len())
        })();
        let renamed = written.and_then(|size| {
            fs::rename(&temporary, self.path(key))?;
            Ok(size)
        });
        if renamed.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        renamed
    }

    fn enter(&self, key: String, primary: Arc<str>, size: u64) {
        let evicted = self.index().evicting(key, primary, size);
        self.evictions
            .fetch_add(evicted.len() as u64, Ordering::Relaxed);
        for key in evicted {
            let _ = fs::remove_file(self.path(&key));
        }
    }

    /// Whether there was one. The file goes on a thread that may block.
    pub async fn remove(self: Arc<Self>, key: String) -> bool {
        let known = self.index().remove(&key);
        if known {
            let path = self.path(&key);
            let _ = tokio::task::spawn_blocking(move || fs::remove_file(path)).await;
        }
        known
    }

    /// Removes what is selected; returns the keys.
    pub fn remove_where(&self, selection: &Selection) -> Vec<String> {
        let keys = self
            .index()
            .remove_where(|primary| selection.matches(primary));
        for key in &keys {
            let _ = fs::remove_file(self.path(key));
        }
        keys
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    fn index(&self) -> MutexGuard<'_, Lru<Arc<str>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_key(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn read_primary(path: &Path) -> io::Result<Arc<str>> {
    let mut file = io::BufReader::new(fs::File::open(path)?);
    let primary = read_head(&mut file)?;
    String::from_utf8(primary)
        .map(Into::into)
        .map_err(io::Error::other)
}

fn read_head(file: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut magic = [0; MAGIC.len()];
    file.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(io::Error::other("not a cached object"));
    }
    read_part(file)
}

fn read_part(file: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    file.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > PART_BYTES_MAX {
        return Err(io::Error::other("damaged object"));
    }
    let mut part = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact(&mut part)?;
    Ok(part)
}

fn read_object(path: &Path) -> io::Result<Object> {
    let mut file = io::BufReader::new(fs::File::open(path)?);
    let primary = String::from_utf8(read_head(&mut file)?).map_err(io::Error::other)?;
    let meta = (read_part(&mut file)?, read_part(&mut file)?);
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut body = Vec::new();
    file.read_to_end(&mut body)?;
    if body.len() as u64 != u64::from_le_bytes(length) {
        return Err(io::Error::other("truncated object"));
    }
    Ok(Object {
        primary: primary.into(),
        meta: Arc::new(meta),
        body: Arc::from([Bytes::from(body)]),
    })
}
