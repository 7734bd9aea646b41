//! edgemeter
pub mod attribution;
pub mod config;
pub mod kernel;
pub mod ledger;
pub mod money;
pub mod owner;
pub mod slots;
pub mod units;
