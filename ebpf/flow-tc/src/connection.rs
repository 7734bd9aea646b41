//! A connection's life, told by its socket through sock_ops.

use aya_ebpf::{
    bindings::bpf_sock_ops,
    helpers::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_probe_read_kernel,
        bpf_skc_to_tcp_sock,
    },
    macros::{btf_tracepoint, map, sock_ops},
    maps::{HashMap, PerCpuArray},
    programs::{BtfTracePointContext, SockOpsContext},
};
use flow_abi::{
    Connection, Direction, KernelLayout, Process,
    connection::{STATE_CLOSE, STATE_ESTABLISHED, STATE_LAST_ACK, STATE_SYN_SENT, UNKNOWN},
    kind,
};

use crate::{event, process};

/// `AF_INET`.
const INET: u32 = 2;
/// Third word of `::ffff:0:0/96`, as it lies in memory.
const MAPPED: u32 = 0xffff_0000;

/// Operations, as in `enum` of `include/uapi/linux/bpf.h`.
const CONNECT: u32 = 3;
const ACTIVE_ESTABLISHED: u32 = 4;
const PASSIVE_ESTABLISHED: u32 = 5;
const RETRANSMIT: u32 = 9;
const STATE: u32 = 10;
const RTT: u32 = 12;

/// `BPF_SOCK_OPS_{RETRANS,STATE,RTT}_CB_FLAG`.
const CALL_BACKS: u32 = 2 | 4 | 8;

// Not preallocated: memory follows the connections there are.
#[map]
pub static CONNECTIONS: HashMap<u64, Connection> =
    HashMap::with_max_entries(1 << 18, aya_ebpf::bindings::BPF_F_NO_PREALLOC);

#[map]
pub static CONNECTIONS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static NAMESPACES: HashMap<u64, u32> = HashMap::with_max_entries(1 << 10, 0);

/// Set by the gateway before loading; the verifier then sees constants.
#[unsafe(no_mangle)]
pub static KERNEL_LAYOUT: KernelLayout = KernelLayout {
    tcp_out_of_order: 0,
    tcp_lost: 0,
    sock_namespace: 0,
    namespace_cookie: 0,
    device_namespace: 0,
    device_index: 0,
    skb_device: 0,
    skb_socket: 0,
    skb_len: 0,
    skb_head: 0,
    skb_network_header: 0,
    skb_protocol: 0,
    drop_names_socket: 0,
};

/// A field of [`KERNEL_LAYOUT`] as the gateway set it, not as it was compiled. Unsafe in name
/// only: it reads a static.
#[macro_export]
macro_rules! kernel_layout {
    ($field:ident) => {
        core::ptr::read_volatile(&raw const $crate::connection::KERNEL_LAYOUT.$field)
    };
}

/// In read-only data, not on the stack.
static NEW: Connection = Connection {
    cookie: 0,
    namespace: 0,
    opened_ns: 0,
    established_ns: 0,
    closed_ns: 0,
    bytes_acked: 0,
    bytes_received: 0,
    process: Process {
        cgroup: 0,
        pid: 0,
        via: 0,
        command: [0; 16],
    },
    local: [0; 16],
    remote: [0; 16],
    local_port: 0,
    remote_port: 0,
    active: 0,
    state: 0,
    last_state: 0,
    handshake_us: 0,
    srtt_us: 0,
    min_rtt_us: 0,
    retransmits: 0,
    segments_out: 0,
    segments_in: 0,
    lost: UNKNOWN,
    out_of_order: UNKNOWN,
    resets_sent: 0,
    resets_received: 0,
    zero_windows_sent: 0,
    zero_windows_received: 0,
    drops: 0,
    window_interface: 0,
};

/// One context field, read as the verifier wants it: whole and by itself.
macro_rules! field {
    ($ops:expr, $($path:tt)+) => {
        core::ptr::read_volatile(&raw const (*$ops).$($path)+)
    };
}

/// Whether a network namespace is observed, by its cookie.
#[inline(always)]
pub fn observed(namespace: u64) -> bool {
    // SAFETY: the value is copied out at once.
    match unsafe { NAMESPACES.get(&namespace) } {
        Some(number) => *number & flow_abi::interface::OBSERVED != 0,
        None => false,
    }
}

#[sock_ops]
pub fn connection_life(ctx: SockOpsContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { live(&ctx) };
    1
}

#[inline(always)]
unsafe fn live(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    unsafe {
        let op = field!(ops, op);
        // Of other operations none is ours, and on a request socket there is nothing to read.
        let ours = op >= CONNECT && op <= PASSIVE_ESTABLISHED
            || op == RETRANSMIT
            || op == STATE
            || op == RTT;
        if !ours || field!(ops, is_fullsock) == 0 {
            return;
        }
        let cookie = bpf_get_socket_cookie(ops.cast());
        if op == CONNECT || op == ACTIVE_ESTABLISHED || op == PASSIVE_ESTABLISHED {
            let namespace = bpf_get_netns_cookie(ops.cast());
            if !observed(namespace) {
                return;
            }
            // Another program's call-backs stay.
            let flags = field!(ops, bpf_sock_ops_cb_flags) | CALL_BACKS;
            let _ = ctx.set_cb_flags(flags as i32);
            begin(ctx, op, cookie, namespace);
            return;
        }
        let Some(connection) = CONNECTIONS.get_ptr_mut(&cookie) else {
            return;
        };
        refresh(ops, connection);
        if op == RETRANSMIT {
            // The third argument is what sending returned: an attempt that failed sent nothing.
            if field!(ops, __bindgen_anon_1.args[2]) == 0 {
                sent_again(connection, field!(ops, __bindgen_anon_1.args[1]));
            }
        } else if op == STATE {
            let state = field!(ops, __bindgen_anon_1.args[1]);
            if state == STATE_CLOSE {
                (*connection).last_state = field!(ops, __bindgen_anon_1.args[0]);
                (*connection).closed_ns = bpf_ktime_get_ns();
                (*connection).state = state;
                // The entry stays for the gateway to collect: a reset may still follow (close()
                // with unread data), and a lost event must not lose the connection. Not so where
                // the peer has acknowledged our FIN after its own, and the event is told.
                let last = (*connection).last_state == STATE_LAST_ACK;
                if event::connection(kind::CLOSE, connection, last) && last {
                    let _ = CONNECTIONS.remove(&cookie);
                }
            } else {
                (*connection).state = state;
            }
        }
    }
}

/// A connection begins (SYN, or accepted), or its handshake is done.
#[inline(always)]
unsafe fn begin(ctx: &SockOpsContext, op: u32, cookie: u64, namespace: u64) {
    let ops = ctx.ops;
    unsafe {
        let now = bpf_ktime_get_ns();
        // A socket may connect again after it failed: then this is another connection.
        let known = op == ACTIVE_ESTABLISHED && CONNECTIONS.get_ptr(&cookie).is_some();
        if !known && CONNECTIONS.insert(&cookie, &NEW, 0).is_err() {
            if let Some(lost) = CONNECTIONS_LOST.get_ptr_mut(0) {
                *lost += 1;
            }
            return;
        }
        let Some(connection) = CONNECTIONS.get_ptr_mut(&cookie) else {
            return;
        };
        if !known {
            (*connection).cookie = cookie;
            (*connection).namespace = namespace;
            (*connection).opened_ns = now;
            (*connection).active = (op != PASSIVE_ESTABLISHED) as u32;
            (*connection).state = STATE_SYN_SENT;
            addresses(ops, connection);
            let sk = (*ops).__bindgen_anon_2.sk;
            if !sk.is_null() {
                let process = process::of(sk, false);
                if !process.is_null() {
                    (*connection).process = *process;
                }
            }
        }
        if op == CONNECT {
            return;
        }
        refresh(ops, connection);
        (*connection).established_ns = now;
        (*connection).state = STATE_ESTABLISHED;
        (*connection).handshake_us = if op == PASSIVE_ESTABLISHED {
            // The kernel times SYN-ACK to ACK, and does not when it had to send it again.
            (*connection).srtt_us
        } else {
            ((now - (*connection).opened_ns) / 1000) as u32
        };
        event::connection(kind::OPEN, connection, false);
    }
}

#[inline(always)]
unsafe fn addresses(ops: *mut bpf_sock_ops, connection: *mut Connection) {
    unsafe {
        if field!(ops, family) == INET {
            addresses_v4(ops, connection);
        } else {
            addresses_v6(ops, connection);
        }
        (*connection).local_port = field!(ops, local_port) as u16;
        (*connection).remote_port = u32::from_be(field!(ops, remote_port)) as u16;
    }
}

/// A function of its own, as the next one: merged, the two would load from one computed address,
/// and the verifier wants each context field at its own.
#[inline(never)]
unsafe fn addresses_v4(ops: *mut bpf_sock_ops, connection: *mut Connection) {
    unsafe {
        let local = [0, 0, MAPPED, field!(ops, local_ip4)];
        let remote = [0, 0, MAPPED, field!(ops, remote_ip4)];
        (*connection).local = core::mem::transmute::<[u32; 4], [u8; 16]>(local);
        (*connection).remote = core::mem::transmute::<[u32; 4], [u8; 16]>(remote);
    }
}

#[inline(never)]
unsafe fn addresses_v6(ops: *mut bpf_sock_ops, connection: *mut Connection) {
    unsafe {
        let local = [
            field!(ops, local_ip6[0]),
            field!(ops, local_ip6[1]),
            field!(ops, local_ip6[2]),
            field!(ops, local_ip6[3]),
        ];
        let remote = [
            field!(ops, remote_ip6[0]),
            field!(ops, remote_ip6[1]),
            field!(ops, remote_ip6[2]),
            field!(ops, remote_ip6[3]),
        ];
        (*connection).local = core::mem::transmute::<[u32; 4], [u8; 16]>(local);
        (*connection).remote = core::mem::transmute::<[u32; 4], [u8; 16]>(remote);
    }
}

/// Copies the socket's own counters.
#[inline(always)]
unsafe fn refresh(ops: *mut bpf_sock_ops, connection: *mut Connection) {
    unsafe {
        (*connection).srtt_us = field!(ops, srtt_us) >> 3;
        let min = field!(ops, rtt_min);
        // The window's initial value means that nothing was measured.
        (*connection).min_rtt_us = if min == u32::MAX { 0 } else { min };
        (*connection).retransmits = field!(ops, total_retrans);
        (*connection).segments_out = field!(ops, segs_out);
        (*connection).segments_in = field!(ops, segs_in);
        (*connection).bytes_acked = field!(ops, bytes_acked);
        (*connection).bytes_received = field!(ops, bytes_received);
        let (out_of_order, lost) = (kernel_layout!(tcp_out_of_order), kernel_layout!(tcp_lost));
        let sk = (*ops).__bindgen_anon_2.sk;
        if sk.is_null() || out_of_order == 0 && lost == 0 {
            return;
        }
        let tcp = bpf_skc_to_tcp_sock(sk.cast()).cast::<u8>();
        if tcp.is_null() {
            return;
        }
        if out_of_order != 0
            && let Ok(value) = bpf_probe_read_kernel::<u32>(tcp.add(out_of_order as usize).cast())
        {
            (*connection).out_of_order = value;
        }
        if lost != 0
            && let Ok(value) = bpf_probe_read_kernel::<u32>(tcp.add(lost as usize).cast())
        {
            (*connection).lost = value;
        }
    }
}

#[inline(always)]
unsafe fn sent_again(connection: *const Connection, segments: u32) {
    event::packet(kind::RETRANSMIT, |out| unsafe {
        tuple(out, connection);
        (*out).detail = segments;
    });
}

#[inline(always)]
unsafe fn tuple(out: *mut flow_abi::PacketEvent, connection: *const Connection) {
    unsafe {
        (*out).namespace = (*connection).namespace;
        (*out).cookie = (*connection).cookie;
        (*out).local = (*connection).local;
        (*out).remote = (*connection).remote;
        (*out).local_port = (*connection).local_port;
        (*out).remote_port = (*connection).remote_port;
        (*out).protocol = 6;
        (*out).detail = 0;
        (*out).length = 0;
        (*out).ifindex = 0;
    }
}

#[btf_tracepoint(function = "tcp_send_reset")]
pub fn reset_sent(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's first argument.
    unsafe { reset(ctx.arg(0), true) };
    0
}

#[btf_tracepoint(function = "tcp_receive_reset")]
pub fn reset_received(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's first argument.
    unsafe { reset(ctx.arg(0), false) };
    0
}

#[inline(always)]
unsafe fn reset(sk: *mut core::ffi::c_void, sent: bool) {
    // A reset for a port nobody listens on has no socket.
    if sk.is_null() {
        return;
    }
    unsafe {
        let cookie = bpf_get_socket_cookie(sk);
        let Some(connection) = CONNECTIONS.get_ptr_mut(&cookie) else {
            return;
        };
        if sent {
            (*connection).resets_sent += 1;
        } else {
            (*connection).resets_received += 1;
        }
        event::packet(kind::RESET, |out| {
            tuple(out, connection);
            (*out).detail = sent as u32;
        });
    }
}

/// A frame that says: window 0. Rare, so that a look-up is affordable.
///
/// # Safety
/// None beyond a cookie that may be 0.
#[inline(always)]
pub unsafe fn zero_window(cookie: u64, interface: u32, direction: Direction) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(&cookie) else {
        return;
    };
    unsafe {
        if (*connection).window_interface == 0 {
            (*connection).window_interface = interface;
        }
        if (*connection).window_interface != interface {
            return;
        }
        match direction {
            Direction::Rx => (*connection).zero_windows_received += 1,
            Direction::Tx => (*connection).zero_windows_sent += 1,
        }
    }
}
