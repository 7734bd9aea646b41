//! The slots' memory, mapped: the kernel and the gateway both write to it.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use flow_abi::Slot;

/// The mapped array.
pub(super) struct Memory {
    base: *mut Slot,
    pub(super) len: u32,
}

// SAFETY: the mapping is shared memory by design; every access is volatile and disciplined by
// `Connection::state` and the slot book.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn map(fd: &OwnedFd, len: u32) -> io::Result<Self> {
        let bytes = len as usize * size_of::<Slot>();
        // SAFETY: a fresh shared mapping of a map made with BPF_F_MMAPABLE and `len` elements of
        // this size; the kernel refuses anything else.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    pub(super) fn slot(&self, index: u32) -> *mut Slot {
        assert!(index < self.len, "slot {index} of {}", self.len);
        // SAFETY: in range of the mapping.
        unsafe { self.base.add(index as usize) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped.
        unsafe { libc::munmap(self.base.cast(), self.len as usize * size_of::<Slot>()) };
    }
}
