//! Whose a socket is, asked where the answer is known: in the system calls that make and connect
//! it. On an accepted connection the running task is whatever the network interrupt disturbed, so
//! nobody asks there: the storage is cloned from the listening socket instead.

use core::marker::PhantomData;

use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type, bpf_sock,
    },
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid,
        generated::{bpf_get_current_cgroup_id, bpf_sk_storage_get},
    },
    macros::{btf_map, cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use flow_abi::{Process, via};

/// `BPF_MAP_TYPE_SK_STORAGE` with `BPF_F_CLONE`, which aya's own type does not offer. A definition
/// in BTF: the loader reads the pointers' types, nobody follows them.
#[repr(C)]
pub struct ClonedStorage<T> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
    _value: PhantomData<T>,
}

// SAFETY: never dereferenced, see above.
unsafe impl<T> Sync for ClonedStorage<T> {}

#[btf_map]
pub static PROCESSES: ClonedStorage<Process> = ClonedStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
    _value: PhantomData,
};

/// The storage of a socket, made if asked for.
///
/// # Safety
/// `sk` must be a non-null socket pointer the verifier knows.
#[inline(always)]
pub unsafe fn of(sk: *mut bpf_sock, create: bool) -> *mut Process {
    let flags = if create {
        BPF_SK_STORAGE_GET_F_CREATE.into()
    } else {
        0
    };
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&PROCESSES).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            flags,
        )
    }
    .cast()
}

#[cgroup_sock(sock_create)]
pub fn socket_made(ctx: SockContext) -> i32 {
    // SAFETY: the context is the socket.
    unsafe { remember(ctx.sock, via::SOCKET) };
    1
}

#[cgroup_sock_addr(connect4)]
pub fn connect_v4(ctx: SockAddrContext) -> i32 {
    connecting(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect_v6(ctx: SockAddrContext) -> i32 {
    connecting(&ctx)
}

#[inline(always)]
fn connecting(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if !sk.is_null() {
            remember(sk, via::CONNECT);
        }
    }
    1
}

/// # Safety
/// As for [`of`].
#[inline(always)]
unsafe fn remember(sk: *mut bpf_sock, how: u32) {
    unsafe {
        let process = of(sk, true);
        if process.is_null() {
            return;
        }
        (*process).cgroup = bpf_get_current_cgroup_id();
        (*process).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*process).via = how;
        if let Ok(command) = bpf_get_current_comm() {
            (*process).command = command;
        }
    }
}
