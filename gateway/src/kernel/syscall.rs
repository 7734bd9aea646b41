//! `bpf(2)`, for what aya has no call for.

use std::io;

/// Commands, as `linux/bpf.h` numbers them.
pub(super) mod command {
    pub const MAP_CREATE: libc::c_int = 0;
    pub const MAP_LOOKUP_ELEM: libc::c_int = 1;
    pub const MAP_UPDATE_ELEM: libc::c_int = 2;
    pub const OBJ_GET: libc::c_int = 7;
    pub const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    pub const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
    pub const MAP_LOOKUP_BATCH: libc::c_int = 24;
    pub const LINK_DETACH: libc::c_int = 34;
}

/// The kernel's answer: 0, or a descriptor where the command makes one.
///
/// # Errors
/// What the kernel answered.
///
/// # Safety
/// `attr` must be the command's arm of `union bpf_attr`, and its pointers what the command reads and
/// writes.
pub(super) unsafe fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    match i32::try_from(answer) {
        Ok(answer) if answer >= 0 => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}
