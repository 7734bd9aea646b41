//! The ledger: postings and watermarks in one transaction a tick.
//!
//! What makes the bill survive kill -9: the kernel's counters are pinned and cumulative, and the
//! watermark up to which they have been posted is committed with the postings. Whatever happens
//! between two commits, the next tick posts exactly the difference.
//!
//! ```text
//! collector → poster ──→ store ──→ sql ──→ sqlite (a file) or postgres (several gateways)
//!                          ├→ outbox   closed windows, for push
//!                          ├→ retention  minute → hour → day → month, sums conserved
//!                          ├→ sums     what each owner moved in a period
//!                          └→ usage    the same by row, for bills
//! ```
//! [`invariants`] says what must hold, for tests, for the run-time counter and for
//! `edgemeter ledger check` alike.

mod balances;
mod grain;
pub mod invariants;
pub mod outbox;
mod place;
mod poster;
mod postgres;
mod retention;
mod schema;
pub(crate) mod sql;
mod sqlite;
mod store;
mod sums;
mod upkeep;
mod usage;

#[cfg(test)]
pub(crate) mod tests;

pub use balances::{Balances, InterfaceBalance, RouteBalance};
pub use grain::Grain;
pub use place::Place;
pub use poster::{Posted, Poster};
pub use retention::{Retention, RolledUp};
pub use sql::Fault;
pub use store::{Ledger, LedgerError, Taken, Tick};
pub use sums::Sum;
pub use upkeep::{check, export, restore};
