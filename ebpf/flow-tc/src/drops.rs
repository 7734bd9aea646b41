//! Frames this host threw away, and the kernel's reason, from the `kfree_skb` tracepoint.
//!
//! Kernel structures are read at the offsets the gateway found in the running kernel's BTF
//! ([`flow_abi::KernelLayout`]): Rust has no relocations for them.

use aya_ebpf::{
    helpers::{bpf_get_socket_cookie, bpf_probe_read_kernel},
    macros::{btf_tracepoint, map},
    maps::HashMap,
    programs::BtfTracePointContext,
};
use flow_abi::{DropCount, DropKey, PacketEvent, kind};

use crate::{
    connection::{CONNECTIONS, observed},
    event, kernel_layout,
    maps::add,
};

/// Below this are "not dropped" and "consumed".
const FIRST_REASON: u32 = 2;
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

#[map]
pub static DROPS: HashMap<DropKey, DropCount> = HashMap::with_max_entries(1 << 12, 0);

static ZERO: DropCount = DropCount {
    frames: 0,
    bytes: 0,
};

#[btf_tracepoint(function = "kfree_skb")]
pub fn frame_dropped(ctx: BtfTracePointContext) -> i32 {
    let reason: u32 = ctx.arg(2);
    if reason >= FIRST_REASON {
        // SAFETY: the tracepoint's arguments, read with checks.
        unsafe { dropped(&ctx, reason) };
    }
    0
}

#[inline(always)]
unsafe fn read<T: Copy>(base: *const u8, offset: u32) -> Option<T> {
    if base.is_null() || offset == 0 {
        return None;
    }
    unsafe { bpf_probe_read_kernel::<T>(base.add(offset as usize).cast()) }.ok()
}

#[inline(always)]
unsafe fn dropped(ctx: &BtfTracePointContext, reason: u32) {
    unsafe {
        let skb: *const u8 = ctx.arg(0);
        let mut socket: *const u8 =
            read(skb, kernel_layout!(skb_socket)).unwrap_or(core::ptr::null());
        let mut cookie = 0;
        if kernel_layout!(drop_names_socket) != 0 {
            let receiver: *mut core::ffi::c_void = ctx.arg(3);
            if !receiver.is_null() {
                cookie = bpf_get_socket_cookie(receiver);
                socket = receiver.cast();
            }
        }
        // A queued buffer keeps other things where its device was: whatever comes out of there
        // must hold up as a device of a known namespace, or it is none.
        let device: *const u8 = read(skb, kernel_layout!(skb_device)).unwrap_or(core::ptr::null());
        let mut of_device = namespace(device, kernel_layout!(device_namespace));
        let ifindex: u32 = read(device, kernel_layout!(device_index)).unwrap_or(0);
        if !observed(of_device) && ifindex > 0xffff {
            of_device = 0;
        }
        let of_socket = namespace(socket, kernel_layout!(sock_namespace));
        let place = if of_socket != 0 { of_socket } else { of_device };
        if place != 0 && !observed(place) {
            return;
        }
        let length: u32 = read(skb, kernel_layout!(skb_len)).unwrap_or(0);
        // A consumed FIN that a closed socket's queue still held is no frame lost.
        if length == 0 {
            return;
        }
        let key = DropKey {
            namespace: place,
            reason,
            ifindex: if of_device == place && place != 0 {
                ifindex
            } else {
                0
            },
        };
        if DROPS.get_ptr(&key).is_none() {
            let _ = DROPS.insert(&key, &ZERO, 1);
        }
        if let Some(count) = DROPS.get_ptr_mut(&key) {
            add(&raw mut (*count).frames, 1);
            add(&raw mut (*count).bytes, length as u64);
        }
        if place == 0 {
            return;
        }
        if cookie != 0
            && let Some(connection) = CONNECTIONS.get_ptr_mut(&cookie)
        {
            (*connection).drops += 1;
        }
        event::packet(kind::DROP, |out| {
            (*out).namespace = place;
            (*out).cookie = cookie;
            (*out).detail = reason;
            (*out).length = length;
            (*out).ifindex = key.ifindex;
            tuple(skb, out);
        });
    }
}

#[inline(always)]
unsafe fn namespace(holder: *const u8, offset: u32) -> u64 {
    unsafe {
        match read::<*const u8>(holder, offset) {
            Some(net) => read::<u64>(net, kernel_layout!(namespace_cookie)).unwrap_or(0),
            None => 0,
        }
    }
}

/// Addresses and ports, as far as the headers are still there.
#[inline(always)]
unsafe fn tuple(skb: *const u8, out: *mut PacketEvent) {
    unsafe {
        (*out).local = [0; 16];
        (*out).remote = [0; 16];
        (*out).local_port = 0;
        (*out).remote_port = 0;
        (*out).protocol = 0;
        let Some(head) = read::<*const u8>(skb, kernel_layout!(skb_head)) else {
            return;
        };
        let Some(network) = read::<u16>(skb, kernel_layout!(skb_network_header)) else {
            return;
        };
        let ethertype = u16::from_be(read(skb, kernel_layout!(skb_protocol)).unwrap_or(0));
        let header = head.add(network as usize);
        let (protocol, ports);
        if ethertype == ETH_IPV4 {
            let Ok(ip) = bpf_probe_read_kernel::<[u8; 20]>(header.cast()) else {
                return;
            };
            if ip[0] >> 4 != 4 {
                return;
            }
            protocol = ip[9];
            (*out).local[10] = 0xff;
            (*out).local[11] = 0xff;
            (*out).remote[10] = 0xff;
            (*out).remote[11] = 0xff;
            (*out).local[12] = ip[12];
            (*out).local[13] = ip[13];
            (*out).local[14] = ip[14];
            (*out).local[15] = ip[15];
            (*out).remote[12] = ip[16];
            (*out).remote[13] = ip[17];
            (*out).remote[14] = ip[18];
            (*out).remote[15] = ip[19];
            // A later fragment has no ports where the first has them.
            let fragment = (ip[6] & 0x1f) | ip[7] != 0;
            ports = if fragment {
                core::ptr::null()
            } else {
                header.add(((ip[0] & 15) as usize) * 4)
            };
        } else if ethertype == ETH_IPV6 {
            let Ok(ip) = bpf_probe_read_kernel::<[u8; 40]>(header.cast()) else {
                return;
            };
            if ip[0] >> 4 != 6 {
                return;
            }
            protocol = ip[6];
            let mut at = 0;
            while at < 16 {
                (*out).local[at] = ip[8 + at];
                (*out).remote[at] = ip[24 + at];
                at += 1;
            }
            ports = header.add(40);
        } else {
            return;
        }
        (*out).protocol = protocol as u32;
        if !ports.is_null()
            && (protocol == TCP || protocol == UDP || protocol == SCTP)
            && let Ok(pair) = bpf_probe_read_kernel::<[u8; 4]>(ports.cast())
        {
            (*out).local_port = u16::from_be_bytes([pair[0], pair[1]]);
            (*out).remote_port = u16::from_be_bytes([pair[2], pair[3]]);
        }
    }
}
