//! Another process of the same gateway takes over while this one serves: for a new binary, or a
//! configuration that cannot change in a running process. Nothing is given away before the new
//! process has proved that it works, and until it serves every step can be taken back.
//!
//! ```text
//! old                                              new (started by old)
//! ── offer, sockets, locks ──────────────────────→ configuration checked, programs loaded,
//!                                                  sockets bound, certificates read
//! ←───────────────────────────────────── ready ──
//! posts a last time, stops posting and pushing
//! ── free slots, go ─────────────────────────────→ classes, endpoints, programs attached in
//!                                                  place, posts on, listens
//! ←─────────────────────────────────── serving ──
//! accepts no more, drains
//! ── claims, each tick ──────────────────────────→ posts them
//! ends ──────────────────────────────────────────→ takes the remaining slots
//! ```
//!
//! Why no byte is lost or doubled: the kernel's counters are pinned and the ledger's watermarks are
//! the only truth about what was posted, so it does not matter who posts, only that one does. A
//! slot belongs to one process at a time, so no process frees or rewrites another's. Numbers of
//! owners are given by both, and the ledger refuses a number twice ([`crate::owner::Owners::share`]).
//!
//! The new process is a child of the old one, started with one end of a socket pair as its standard
//! input: nobody else can offer sockets or ask for them. If it fails, hangs or is killed before it
//! serves, it is killed, and the old process goes on as before.

mod channel;
mod give;
mod take;

pub use give::{Giver, GiverParts, UpgradeError, watch};
pub use take::{Predecessor, Taken};

use std::time::Duration;

/// From its go to its first accepted connection. Nobody posts meanwhile; the kernel counts on.
const SERVING_LIMIT: Duration = Duration::from_secs(20);
