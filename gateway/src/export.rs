//! Out to operators: the metric vocabulary, request metrics, and the ledger's view of the wire.

mod metrics;
mod wire;

pub use metrics::{RequestLabels, RequestMetrics};
pub use wire::{WireMetrics, WireView};
