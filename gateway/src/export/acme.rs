//! Certificates that the gateway orders itself.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ListenerLabel {
    listener: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OrderLabels {
    listener: String,
    result: &'static str,
}

/// Orders and what they brought.
#[derive(Clone, Debug, Default)]
pub struct AcmeMetrics {
    orders: Family<OrderLabels, Counter>,
    expiry: Family<ListenerLabel, Gauge>,
}

impl AcmeMetrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "edgemeter_acme_orders",
            "Certificates ordered, by listener and result",
            metrics.orders.clone(),
        );
        registry.register_with_unit(
            "edgemeter_acme_certificate_expiry",
            "When the certificate that is served expires, Unix time; 0 until one was issued",
            Unit::Seconds,
            metrics.expiry.clone(),
        );
        metrics
    }

    /// When what is served expires; 0 until one was issued.
    pub fn expires(&self, listener: &str, unix_seconds: i64) {
        let label = ListenerLabel {
            listener: listener.to_owned(),
        };
        self.expiry.get_or_create(&label).set(unix_seconds);
        for result in ["issued", "failed"] {
            let labels = OrderLabels {
                listener: listener.to_owned(),
                result,
            };
            let _ = self.orders.get_or_create(&labels);
        }
    }

    /// An order ended.
    pub fn ordered(&self, listener: &str, issued: bool) {
        let labels = OrderLabels {
            listener: listener.to_owned(),
            result: if issued { "issued" } else { "failed" },
        };
        self.orders.get_or_create(&labels).inc();
    }
}
