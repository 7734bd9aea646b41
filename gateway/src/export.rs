//! Out to operators: the metric vocabulary, request metrics, and the ledger's view of the wire.

mod config;
mod connections;
mod metrics;
mod push;
mod wire;

pub use config::ConfigMetrics;
pub use connections::{ConnectionMetrics, KernelTables};
pub use metrics::{RequestLabels, RequestMetrics};
pub use push::PushMetrics;
pub use wire::{WireMetrics, WireView};
