//! edgemeter's TC programs.
//!
//! Story of a frame: [`parse`] finds its 5-tuple and header length, [`account`] computes its wire
//! bytes and adds them to the interface's total, to a flow and to the account of whoever owns
//! them ([`ranges`] for sent TCP payload), or to a cell that says why not.
//!
//! Beside them, programs that know sockets: [`process`] remembers who made a socket, [`connection`]
//! follows a connection from SYN to CLOSE, [`drops`] says what this host threw away and why, and
//! [`event`] carries all three out at once. None of them is needed to count a byte; each loads and
//! fails alone.
//!
//! Observers never change a packet's fate: both TC programs return `TC_ACT_UNSPEC` on every path, the cgroup programs always allow, so
//! the next program in the chain, or the stack, decides.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod account;
mod connection;
mod drops;
mod event;
mod interface;
mod maps;
mod parse;
mod process;
mod ranges;

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};
use flow_abi::Direction;

#[classifier]
pub fn meter_ingress(ctx: TcContext) -> i32 {
    account::frame::<true>(&ctx, Direction::Rx);
    TC_ACT_UNSPEC
}

#[classifier]
pub fn meter_egress(ctx: TcContext) -> i32 {
    account::frame::<true>(&ctx, Direction::Tx);
    TC_ACT_UNSPEC
}

/// For interfaces whose frames have no Ethernet header: tun, WireGuard, IP in IP, GRE.
#[classifier]
pub fn meter_ingress_bare(ctx: TcContext) -> i32 {
    account::frame::<false>(&ctx, Direction::Rx);
    TC_ACT_UNSPEC
}

#[classifier]
pub fn meter_egress_bare(ctx: TcContext) -> i32 {
    account::frame::<false>(&ctx, Direction::Tx);
    TC_ACT_UNSPEC
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // The verifier proves that nothing reaches this.
    loop {}
}

// Socket lookup, bpf_tcp_sock and socket storage are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
