//! edgemeter: a reverse proxy that knows, to the byte, what the wire carried for each request.
//!
//! Two flows meet in [`attribution`]:
//!
//! ```text
//! packet → TC programs (ebpf/flow-tc) → maps → kernel::maps → collector ─┐
//!                                         ↑                              ├→ attribution → ledger → export
//! request → proxy::route → proxy::upstream → proxy::record → slots ──────┘
//! ```
//!
//! [`slots`] is the seam: memory in which the proxy tells the kernel whose bytes come next.
//! `proxy` and `kernel` never import each other; `attribution`, `ledger` and `owner` know neither
//! pingora nor aya nor tokio. Only [`app`] sees everything.

pub mod access_log;
pub mod acme;
pub mod admin;
pub mod app;
pub mod attribution;
pub mod budget;
pub mod cache;
pub mod census;
pub mod class;
pub mod collector;
pub mod config;
pub mod connections;
pub mod cost;
pub mod descriptors;
pub mod doctor;
pub mod duties;
pub mod export;
pub mod flows;
pub mod kernel;
pub mod ledger;
pub mod money;
pub mod otlp;
pub mod owner;
pub mod profile;
pub mod proxy;
pub mod push;
pub mod reload;
pub mod report;
pub mod retention;
pub mod serve;
pub mod slots;
pub mod socket_filter;
pub mod systemd;
pub mod trace;
pub mod units;
pub mod upgrade;
pub mod written;
