//! The ledger: postings and watermarks in one SQLite transaction a tick.
//!
//! What makes the bill survive kill -9: the kernel's counters are pinned and cumulative, and the
//! watermark up to which they have been posted is committed with the postings. Whatever happens
//! between two commits, the next tick posts exactly the difference.

mod balances;
mod schema;
mod store;
mod usage;

#[cfg(test)]
mod tests;

pub use balances::{Balances, InterfaceBalance, RouteBalance};
pub use store::{Ledger, LedgerError, Tick};
