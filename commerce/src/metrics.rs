//! Every metric this service exposes, and the only place that names one.
//!
//! All names start with `commerce_` and carry their unit. The encoder adds `_total` to
//! counters and the unit to what is registered with one; [`NAMES`] lists the families as a
//! scrape shows them. Every label value comes from a closed set (route templates, methods,
//! reasons) or from the catalogue (currencies), so no client can add time series.

mod growth;
mod refusal;
mod registry;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::event::Topic;

pub use growth::StockTotals;
pub use refusal::RefusalReason;
pub use registry::NAMES;

/// The media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds: from a cached read to a request that waited for a busy disk.
const REQUEST_SECONDS: [f64; 13] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];
/// Seconds: from a commit to a memory-backed disk to a stalled one.
const COMMIT_SECONDS: [f64; 11] = [
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0,
];
/// Commands: the powers of two up to the largest batch.
const BATCH_COMMANDS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

/// Labels of `commerce_requests_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    status_class: &'static str,
}

/// Label of `commerce_request_duration_seconds`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabel {
    route: &'static str,
}

/// Label of `commerce_orders_refused_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Label of `commerce_order_changes_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabel {
    event: &'static str,
}

/// Label of the relays' metrics.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SinkLabel {
    sink: &'static str,
}

/// Label of `commerce_gate_admissions_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Label of `commerce_revenue_minor_units_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CurrencyLabel {
    currency: String,
}

/// Handles to the counters. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    requests_in_flight: Gauge,
    request_duration: Family<RouteLabel, Histogram, fn() -> Histogram>,
    orders_created: Counter,
    orders_refused: Family<ReasonLabel, Counter>,
    order_changes: Family<ChangeLabel, Counter>,
    revenue: Family<CurrencyLabel, Counter>,
    replays: Counter,
    units_deducted: Counter,
    reads_refused: Counter,
    queue_commands: Gauge,
    batch_commands: Histogram,
    commit_duration: Histogram,
    failed_batches: Counter,
    waiting_events: Family<SinkLabel, Gauge>,
    outbox_lag: Family<SinkLabel, Gauge<f64, AtomicU64>>,
    delivered_events: Family<SinkLabel, Counter>,
    failed_deliveries: Family<SinkLabel, Counter>,
    dead_letters: Family<SinkLabel, Counter>,
    callbacks_recovered: Counter,
    admissions: Family<OutcomeLabel, Counter>,
    growth: growth::Growth,
    registry: std::sync::Arc<Registry>,
}

impl Metrics {
    /// Fresh counters in a registry of their own.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            requests: Family::default(),
            requests_in_flight: Gauge::default(),
            request_duration: Family::new_with_constructor(|| Histogram::new(REQUEST_SECONDS)),
            orders_created: Counter::default(),
            orders_refused: Family::default(),
            order_changes: Family::default(),
            revenue: Family::default(),
            replays: Counter::default(),
            units_deducted: Counter::default(),
            reads_refused: Counter::default(),
            queue_commands: Gauge::default(),
            batch_commands: Histogram::new(BATCH_COMMANDS),
            commit_duration: Histogram::new(COMMIT_SECONDS),
            failed_batches: Counter::default(),
            waiting_events: Family::default(),
            outbox_lag: Family::default(),
            delivered_events: Family::default(),
            failed_deliveries: Family::default(),
            dead_letters: Family::default(),
            callbacks_recovered: Counter::default(),
            admissions: Family::default(),
            growth: growth::Growth::new(),
            registry: std::sync::Arc::default(),
        };
        // From zero: an increase from nothing is invisible to a rate.
        for reason in RefusalReason::ALL {
            metrics.refused(reason);
        }
        // A sink that is not configured has nothing waiting and nothing delivered.
        for sink in ["risk", "provider", "webhook"] {
            metrics.outbox_waiting(sink, 0);
            metrics.outbox_lag(sink, Duration::ZERO);
            metrics.events_delivered(sink, 0);
            let label = SinkLabel { sink };
            metrics.failed_deliveries.get_or_create_owned(&label);
            metrics.dead_letters.get_or_create_owned(&label);
        }
        for outcome in ["admitted", "sold_out", "unknown"] {
            let label = OutcomeLabel { outcome };
            metrics.admissions.get_or_create_owned(&label);
        }
        for topic in [
            Topic::OrderPaid,
            Topic::OrderCancelled,
            Topic::OrderExpired,
            Topic::OrderRefunded,
        ] {
            metrics.changes(topic);
        }
        metrics.registry = std::sync::Arc::new(metrics.register());
        metrics
    }

    /// The OpenMetrics text of all families.
    ///
    /// # Errors
    /// Only what the formatter reports; writing to memory does not fail.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// A request's head has arrived.
    pub fn request_began(&self) {
        self.requests_in_flight.inc();
    }

    /// A request that began ended with this status class: `2xx` and so on, or `cancelled`.
    pub fn request_ended(
        &self,
        route: &'static str,
        method: &'static str,
        status_class: &'static str,
        duration: Duration,
    ) {
        self.requests_in_flight.dec();
        self.requests
            .get_or_create(&RequestLabels {
                route,
                method,
                status_class,
            })
            .inc();
        self.request_duration
            .get_or_create(&RouteLabel { route })
            .observe(duration.as_secs_f64());
    }

    /// An order was committed.
    pub fn order_created(&self, total_minor: u64, currency: String, units: u64) {
        self.orders_created.inc();
        self.revenue
            .get_or_create(&CurrencyLabel { currency })
            .inc_by(total_minor);
        self.units_deducted.inc_by(units);
    }

    /// An order was refused.
    pub fn order_refused(&self, reason: RefusalReason) {
        self.refused(reason).inc();
    }

    fn refused(&self, reason: RefusalReason) -> Counter {
        let reason = reason.as_str();
        self.orders_refused
            .get_or_create_owned(&ReasonLabel { reason })
    }

    /// An order changed; `topic` says how.
    pub fn order_changed(&self, topic: Topic) {
        self.changes(topic).inc();
    }

    /// Reservations ended at their deadline.
    pub fn orders_expired(&self, orders: u64) {
        self.changes(Topic::OrderExpired).inc_by(orders);
    }

    fn changes(&self, topic: Topic) -> Counter {
        let event = topic.as_str();
        self.order_changes
            .get_or_create_owned(&ChangeLabel { event })
    }

    /// A stored answer was replayed.
    pub fn replayed(&self) {
        self.replays.inc();
    }

    /// A read found the pool and its queue full.
    pub fn read_refused(&self) {
        self.reads_refused.inc();
    }

    /// A command entered the writer's queue.
    pub fn command_queued(&self) {
        self.queue_commands.inc();
    }

    /// A command left the writer's queue, or could not enter it.
    pub fn command_unqueued(&self) {
        self.queue_commands.dec();
    }

    /// The writer committed a batch.
    pub fn batch_committed(&self, commands: usize, commit: Duration) {
        self.batch_commands
            .observe(f64::from(u32::try_from(commands).unwrap_or(u32::MAX)));
        self.commit_duration.observe(commit.as_secs_f64());
    }

    /// What of its next batch a sink was not sent yet.
    pub fn outbox_waiting(&self, sink: &'static str, events: u32) {
        self.waiting_events
            .get_or_create_owned(&SinkLabel { sink })
            .set(i64::from(events));
    }

    /// How old the oldest event is that a sink of this kind has not acknowledged.
    pub fn outbox_lag(&self, sink: &'static str, age: Duration) {
        self.outbox_lag
            .get_or_create_owned(&SinkLabel { sink })
            .set(age.as_secs_f64());
    }

    /// A sink acknowledged events.
    pub fn events_delivered(&self, sink: &'static str, events: u64) {
        self.delivered_events
            .get_or_create_owned(&SinkLabel { sink })
            .inc_by(events);
    }

    /// A request to a sink failed.
    pub fn delivery_failed(&self, sink: &'static str) {
        self.failed_deliveries
            .get_or_create_owned(&SinkLabel { sink })
            .inc();
    }

    /// An event was put aside.
    pub fn dead_letter(&self, sink: &'static str) {
        self.dead_letters
            .get_or_create_owned(&SinkLabel { sink })
            .inc();
    }

    /// The provider's statement had an event that no callback had brought.
    pub fn callback_recovered(&self) {
        self.callbacks_recovered.inc();
    }

    /// The gate answered about an order.
    pub fn admission(&self, outcome: &'static str) {
        self.admissions
            .get_or_create_owned(&OutcomeLabel { outcome })
            .inc();
    }

    /// The writer lost a batch as a whole.
    pub fn batch_failed(&self) {
        self.failed_batches.inc();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
