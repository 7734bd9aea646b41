//! `BPF_MAP_LOOKUP_BATCH` over `bpf(2)`: aya 0.14 has no batch calls, and its iterator makes two system
//! calls an entry (a million flows: 8.6 s instead of 0.5 s). And single entries, as plain values.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::syscall::{bpf, command};

/// Entries asked for at once. A bucket's entries come together or not at all, so the buffer
/// doubles when one does not fit.
const FIRST_COUNT: usize = 4096;

/// `union bpf_attr`, the batch arm.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The element arm.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Reads a whole hash map without changing it, calling `visit` with each key and its value's raw
/// bytes (for per-CPU maps: one 8-byte-aligned value per possible CPU).
///
/// An entry inserted or deleted while the walk runs may or may not be seen; every entry that
/// exists throughout is seen at least once, and cumulative counters make a second sight harmless
/// as long as the visitor overwrites by key.
///
/// # Errors
/// What the kernel answered; `EINVAL` means a kernel without batch lookups (before 5.6).
pub fn for_each(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    Walk::new(key_size, value_size)
        .step(map, usize::MAX, visit)
        .map(drop)
}

/// A walk through a hash map that can be interrupted: its place is a bucket, which stays valid
/// whatever is inserted or deleted meanwhile. Keeps its buffers.
#[derive(Debug)]
pub struct Walk {
    key_size: usize,
    value_size: usize,
    /// Where to go on; None at the beginning.
    cursor: Option<[u8; 64]>,
    /// Entries the buffers hold.
    count: usize,
    // u64 elements keep every value aligned for the caller's casts.
    keys: Vec<u64>,
    values: Vec<u64>,
}

impl Walk {
    /// At the beginning of a map with keys and values of these sizes.
    pub fn new(key_size: usize, value_size: usize) -> Self {
        let mut walk = Self {
            key_size,
            value_size,
            cursor: None,
            count: 0,
            keys: Vec::new(),
            values: Vec::new(),
        };
        walk.make_room(FIRST_COUNT);
        walk
    }

    /// Goes on for at least `entries`, or to the end: true then, and the next step begins anew.
    ///
    /// # Errors
    /// As for [`for_each`]; the walk keeps its place.
    pub fn step(
        &mut self,
        map: BorrowedFd<'_>,
        entries: usize,
        mut visit: impl FnMut(&[u8], &[u8]),
    ) -> io::Result<bool> {
        let mut seen = 0;
        while seen < entries {
            let (found, last) = match self.read(map) {
                Ok(read) => read,
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.make_room(self.count * 2);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let keys = as_bytes(&self.keys).chunks_exact(self.key_size);
            let values = as_bytes(&self.values).chunks_exact(self.value_size);
            for (key, value) in keys.zip(values).take(found) {
                visit(key, value);
            }
            seen += found;
            if last {
                self.cursor = None;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One system call: how many entries are in the buffers, and whether they are the last.
    fn read(&mut self, map: BorrowedFd<'_>) -> io::Result<(usize, bool)> {
        let mut next = [0u8; 64];
        let mut attr = BatchAttr {
            in_batch: self.cursor.as_ref().map_or(0, |at| at.as_ptr() as u64),
            out_batch: next.as_mut_ptr() as u64,
            keys: self.keys.as_mut_ptr() as u64,
            values: self.values.as_mut_ptr() as u64,
            count: u32::try_from(self.count).unwrap_or(u32::MAX),
            ..BatchAttr::of(map)
        };
        // SAFETY: keys and values have room for `count` entries of the map's sizes, both cursors
        // are larger than any the kernel writes.
        let last = match unsafe { bpf(command::MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        self.cursor = Some(next);
        Ok((attr.count as usize, last))
    }

    fn make_room(&mut self, count: usize) {
        self.count = count;
        self.keys = vec![0; (count * self.key_size).div_ceil(8)];
        self.values = vec![0; (count * self.value_size).div_ceil(8)];
    }
}

/// The value at a key, if there is one.
///
/// # Errors
/// What the kernel answered.
pub fn look_up<K: aya::Pod, V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    read_one(command::MAP_LOOKUP_ELEM, map, key)
}

/// The same, and the entry is gone: what is added to it until then is in the value.
///
/// # Errors
/// What the kernel answered; `EINVAL` means a kernel that cannot (before 5.14).
pub fn take<K: aya::Pod, V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    read_one(command::MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

/// Makes or replaces an entry.
///
/// # Errors
/// What the kernel answered; `E2BIG` means that there is no room.
pub fn put<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = ElementAttr::of(map, key, std::ptr::from_ref(value) as u64);
    // SAFETY: the caller names the map's own types; the kernel reads both.
    unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

fn read_one<K: aya::Pod, V: aya::Pod + Default>(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = ElementAttr::of(map, key, std::ptr::from_mut(&mut value) as u64);
    // SAFETY: the caller names the map's own types.
    match unsafe { bpf(command, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

impl ElementAttr {
    fn of<K: aya::Pod>(map: BorrowedFd<'_>, key: &K, value: u64) -> Self {
        Self {
            map_fd: map.as_raw_fd().unsigned_abs(),
            key: std::ptr::from_ref(key) as u64,
            value,
            ..Self::default()
        }
    }
}

impl BatchAttr {
    fn of(map: BorrowedFd<'_>) -> Self {
        Self {
            map_fd: map.as_raw_fd().unsigned_abs(),
            ..Self::default()
        }
    }
}

fn as_bytes(words: &[u64]) -> &[u8] {
    // SAFETY: any u64 is eight valid bytes; length and lifetime are those of `words`.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}
