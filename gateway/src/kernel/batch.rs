//! `BPF_MAP_LOOKUP_BATCH` over `bpf(2)`: aya 0.14 has no batch calls, and its iterator makes two
//! system calls an entry (a million flows: 8.6 s instead of 0.5 s).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

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
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut count = FIRST_COUNT;
    let mut cursor = [0u8; 64];
    let mut started = false;
    // u64 elements keep every value aligned for the caller's casts.
    let mut keys = vec![0u64; (count * key_size).div_ceil(8)];
    let mut values = vec![0u64; (count * value_size).div_ceil(8)];
    loop {
        let mut next_cursor = [0u8; 64];
        let mut attr = BatchAttr {
            in_batch: if started { cursor.as_ptr() as u64 } else { 0 },
            out_batch: next_cursor.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().unsigned_abs(),
            ..BatchAttr::default()
        };
        // SAFETY: `attr` is the batch arm of bpf_attr; keys and values have room for `count`
        // entries of the map's sizes, both cursors are larger than any the kernel writes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                &raw mut attr,
                size_of::<BatchAttr>(),
            )
        };
        let last = match result {
            0 => false,
            _ => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ENOENT) => true,
                    Some(libc::ENOSPC) => {
                        count *= 2;
                        keys = vec![0u64; (count * key_size).div_ceil(8)];
                        values = vec![0u64; (count * value_size).div_ceil(8)];
                        continue;
                    }
                    Some(libc::EINTR) => continue,
                    _ => return Err(error),
                }
            }
        };
        let found = attr.count as usize;
        let key_bytes = as_bytes(&keys);
        let value_bytes = as_bytes(&values);
        for index in 0..found {
            visit(
                &key_bytes[index * key_size..][..key_size],
                &value_bytes[index * value_size..][..value_size],
            );
        }
        if last {
            return Ok(());
        }
        cursor = next_cursor;
        started = true;
    }
}

fn as_bytes(words: &[u64]) -> &[u8] {
    // SAFETY: any u64 is eight valid bytes; length and lifetime are those of `words`.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}
