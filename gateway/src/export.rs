//! Out to operators: the metric vocabulary, request metrics, and the ledger's view of the wire.

mod budget;
mod config;
mod connections;
mod edge;
mod levels;
mod metrics;
mod push;
mod upstreams;
mod wire;

pub use budget::BudgetMetrics;
pub use config::ConfigMetrics;
pub use connections::{ConnectionMetrics, KernelTables};
pub use edge::EdgeMetrics;
pub use levels::LevelMetrics;
pub use metrics::{RequestMetrics, RouteSeries, UpstreamSeries};
pub use push::PushMetrics;
pub use upstreams::UpstreamMetrics;
pub use wire::{WireMetrics, WireView};
