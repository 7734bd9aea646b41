//! Out to operators: the metric vocabulary, request metrics, and the ledger's view of the wire.

mod acme;
mod budget;
mod census;
mod config;
mod connections;
mod edge;
mod levels;
mod metrics;
mod otlp;
mod profile;
mod push;
mod upstreams;
mod wire;

pub use acme::AcmeMetrics;
pub use budget::BudgetMetrics;
pub use census::CensusMetrics;
pub use config::ConfigMetrics;
pub use connections::{ConnectionMetrics, KernelTables};
pub use edge::EdgeMetrics;
pub use levels::LevelMetrics;
pub use metrics::{RequestMetrics, RouteSeries, UpstreamSeries};
pub use otlp::OtlpMetrics;
pub use profile::ProfileMetrics;
pub use push::PushMetrics;
pub use upstreams::UpstreamMetrics;
pub use wire::{WireMetrics, WireView};
