//! From wire bytes to a bill.
//!
//! ```text
//! ledger → usage ─┐
//!                 ├→ rate → bill → report (table, CSV, JSON) · focus · parquet · close
//! price book ─────┘            └→ reconcile (against a provider's bill)
//! ```
//!
//! `command` is the edge: files, clock, ledger. `compare` and `idle` are calculators with visible
//! inputs. Everything up to `bill` is pure and exact: bytes are integers, money is nanos, a pool is divided
//! once and shared out by largest remainder, and the same usage under the same book makes the same
//! bytes. Deliberately absent: floats, clocks, and prices that nobody wrote down.

pub mod bill;
pub mod book;
pub mod calendar;
pub mod close;
pub mod command;
pub mod compare;
pub mod exact;
pub mod focus;
pub mod idle;
pub mod parquet;
pub mod rate;
pub mod reconcile;
pub mod report;
#[cfg(test)]
mod tests;
pub mod usage;
