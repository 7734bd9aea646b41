//! The names of the families and what a scrape says about them.

use prometheus_client::registry::{Registry, Unit};

use super::Metrics;

/// The families of this file as a scrape names them; a test compares this list and that of
/// [`growth`](super::growth) with the real output.
pub const NAMES: &[&str] = &[
    "commerce_requests_total",
    "commerce_requests_in_flight",
    "commerce_request_duration_seconds",
    "commerce_orders_created_total",
    "commerce_orders_refused_total",
    "commerce_order_changes_total",
    "commerce_revenue_minor_units_total",
    "commerce_idempotent_replays_total",
    "commerce_stock_units_deducted_total",
    "commerce_reads_refused_total",
    "commerce_writer_queue_commands",
    "commerce_writer_batch_commands",
    "commerce_writer_commit_duration_seconds",
    "commerce_writer_failed_batches_total",
    "commerce_outbox_waiting_events",
    "commerce_outbox_oldest_event_age_seconds",
    "commerce_events_delivered_total",
    "commerce_event_delivery_failures_total",
    "commerce_dead_letters_total",
    "commerce_callbacks_recovered_total",
    "commerce_gate_admissions_total",
];

impl Metrics {
    pub(super) fn register(&self) -> Registry {
        let mut registry = Registry::default();
        registry.register(
            "commerce_requests",
            "Requests answered or cancelled, by route template, method and status class",
            self.requests.clone(),
        );
        registry.register(
            "commerce_requests_in_flight",
            "Requests being answered now, this scrape included",
            self.requests_in_flight.clone(),
        );
        registry.register_with_unit(
            "commerce_request_duration",
            "Time from a request's head to its answer, by route template",
            Unit::Seconds,
            self.request_duration.clone(),
        );
        registry.register(
            "commerce_orders_created",
            "Orders committed; replays are not counted again",
            self.orders_created.clone(),
        );
        registry.register(
            "commerce_orders_refused",
            "Order requests that created nothing, by reason; replays are not counted again",
            self.orders_refused.clone(),
        );
        registry.register(
            "commerce_order_changes",
            "Changes of committed orders, by the event they caused",
            self.order_changes.clone(),
        );
        registry.register(
            "commerce_revenue_minor_units",
            "Sum of committed order totals in minor units, by currency",
            self.revenue.clone(),
        );
        registry.register(
            "commerce_idempotent_replays",
            "Answers replayed for a known idempotency key",
            self.replays.clone(),
        );
        registry.register(
            "commerce_stock_units_deducted",
            "Units of stock taken by committed orders",
            self.units_deducted.clone(),
        );
        registry.register(
            "commerce_reads_refused",
            "Reads refused because too many already waited for a connection",
            self.reads_refused.clone(),
        );
        registry.register(
            "commerce_writer_queue_commands",
            "Commands waiting for the writer now",
            self.queue_commands.clone(),
        );
        registry.register(
            "commerce_writer_batch_commands",
            "Commands per transaction of the writer",
            self.batch_commands.clone(),
        );
        registry.register_with_unit(
            "commerce_writer_commit_duration",
            "Time of one COMMIT, the synchronous write to the disk included",
            Unit::Seconds,
            self.commit_duration.clone(),
        );
        registry.register(
            "commerce_writer_failed_batches",
            "Transactions of the writer that failed as a whole",
            self.failed_batches.clone(),
        );
        registry.register(
            "commerce_outbox_waiting_events",
            "Events of the next batch that a sink was not sent yet, counted up to a batch",
            self.waiting_events.clone(),
        );
        registry.register_with_unit(
            "commerce_outbox_oldest_event_age",
            "Age of the oldest event that a sink has not acknowledged, the furthest behind of its kind; 0 without one",
            Unit::Seconds,
            self.outbox_lag.clone(),
        );
        registry.register(
            "commerce_events_delivered",
            "Events that a sink acknowledged; one sent twice counts twice",
            self.delivered_events.clone(),
        );
        registry.register(
            "commerce_event_delivery_failures",
            "Requests to a sink that it refused or did not answer",
            self.failed_deliveries.clone(),
        );
        registry.register(
            "commerce_dead_letters",
            "Events put aside because a working sink refused them",
            self.dead_letters.clone(),
        );
        registry.register(
            "commerce_callbacks_recovered",
            "Payment events found by asking the provider, their callback lost or late",
            self.callbacks_recovered.clone(),
        );
        registry.register(
            "commerce_gate_admissions",
            "Orders the Redis gate was asked about, by its answer",
            self.admissions.clone(),
        );
        self.growth.register(&mut registry);
        registry
    }
}
