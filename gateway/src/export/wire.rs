//! The ledger's balances as metrics: wire bytes, money, and the identity that proves them.
//!
//! A view, never the bill: the bill is the ledger.

mod cells;
mod health;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use flow_abi::Direction;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::class::{ClassId, Classes};
use crate::config::Prices;
use crate::kernel::PROTOCOLS;
use crate::ledger::Balances;
use crate::ledger::invariants::Breach;
use crate::owner::{Leg, Owner, OwnerKind, Owners};

use health::encode_health;

/// What the collector publishes after each tick.
#[derive(Clone, Debug, Default)]
pub struct WireView {
    /// Why the kernel side is not working; None when it is.
    pub degraded: Option<String>,
    /// The ledger's sums.
    pub balances: Balances,
    /// [`crate::kernel::Reading::gap_bytes`].
    pub gap_bytes: u64,
    /// Frames on interfaces without cells, bytes.
    pub orphan_bytes: u64,
    /// Why the last tick could not be committed; None when it was.
    pub ledger_error: Option<String>,
    /// Invariants that do not hold after the last tick.
    pub breaches: Vec<Breach>,
    /// Ticks posted, since start.
    pub ticks: u64,
    /// Rows that became coarser, since start.
    pub rolled_up_rows: u64,
    /// Ticks whose commit failed, since start; their bytes come with a later one.
    pub commit_failures: u64,
    /// Kernel counters that went backwards, since start.
    pub regressions: u64,
    /// Live flows at the last look.
    pub flows: u64,
    /// Of these, by protocol, as of the last whole walk through the table.
    pub flows_by_protocol: [u64; PROTOCOLS.len()],
    /// Slots in use and free.
    pub slots: (u64, u64),
    /// Connections without a frame for a minute, and for an hour.
    pub silent: (u64, u64),
    /// Connections that found no free slot.
    pub slots_exhausted: u64,
    /// Ranges overwritten before their bytes were acknowledged.
    pub ranges_overwritten: u64,
    /// TLS handshakes longer than a slot remembers.
    pub handshakes_undivided: u64,
    /// Requests whose owner could not be stored.
    pub owner_failures: u64,
    /// Access log lines lost.
    pub access_log_lost: u64,
}

/// Encodes the latest [`WireView`].
#[derive(Debug)]
pub struct WireMetrics {
    view: Arc<Mutex<WireView>>,
    owners: OwnersHandle,
    classes: ClassesHandle,
    prices: Option<Prices>,
}

/// [`Owners`] has a store inside, which has no use for `Debug`.
struct OwnersHandle(Arc<Owners>);

/// The same of [`Classes`].
struct ClassesHandle(Arc<Classes>);

impl std::fmt::Debug for ClassesHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Classes")
    }
}

impl std::fmt::Debug for OwnersHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owners")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct OwnerLabels {
    kind: &'static str,
    leg: &'static str,
    endpoint: String,
    route: String,
    service: String,
    tenant: String,
    quality: &'static str,
    interface: String,
    direction: &'static str,
    /// Of the remote address.
    class: String,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct CostLabels {
    route: String,
    service: String,
    tenant: String,
    leg: &'static str,
    direction: &'static str,
    rate: String,
    currency: String,
}

impl WireMetrics {
    /// A collector over the view.
    #[must_use]
    pub fn new(
        view: Arc<Mutex<WireView>>,
        owners: Arc<Owners>,
        classes: Arc<Classes>,
        prices: Option<Prices>,
    ) -> Self {
        Self {
            view,
            owners: OwnersHandle(owners),
            classes: ClassesHandle(classes),
            prices,
        }
    }

    fn labels(
        &self,
        owner: &Owner,
        interface: &str,
        direction: Direction,
        class: ClassId,
    ) -> OwnerLabels {
        OwnerLabels {
            kind: owner.kind.as_str(),
            leg: if owner.kind == OwnerKind::Foreign {
                ""
            } else {
                owner.leg.as_str()
            },
            endpoint: owner.endpoint.clone(),
            route: owner.route.clone(),
            service: owner.service.clone(),
            tenant: owner.tenant.clone(),
            quality: owner.quality.as_str(),
            interface: interface.to_owned(),
            direction: word(direction),
            class: self.classes.0.name(class),
        }
    }
}

impl Collector for WireMetrics {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = self
            .view
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let unknown = Owner {
            route: "(owner lost)".into(),
            ..Owner::foreign()
        };
        let mut wire = BTreeMap::new();
        let mut frames = BTreeMap::new();
        let mut retransmit_bytes = BTreeMap::new();
        let mut retransmit_frames = BTreeMap::new();
        let mut payload = BTreeMap::new();
        let mut goodput = BTreeMap::new();
        let mut unclaimed = BTreeMap::new();
        let mut cost: BTreeMap<CostLabels, (i128, crate::money::Rate)> = BTreeMap::new();
        for (interface, direction, id, class, amount) in view.balances.by_class() {
            let owner = self.owners.0.get(id).unwrap_or_else(|| unknown.clone());
            let labels = self.labels(&owner, interface, direction, class);
            if owner.kind == OwnerKind::Unclaimed {
                // Claiming takes from it: a gauge.
                *unclaimed.entry(labels).or_insert(0) += amount.wire_bytes;
                continue;
            }
            *wire.entry(labels.clone()).or_insert(0) += amount.wire_bytes;
            *frames.entry(labels.clone()).or_insert(0) += amount.frames;
            *payload.entry(labels.clone()).or_insert(0) += amount.l4_payload_bytes;
            *goodput.entry(labels.clone()).or_insert(0) +=
                amount.l4_payload_bytes - amount.retransmit_payload_bytes;
            if direction == Direction::Tx {
                *retransmit_bytes.entry(labels.clone()).or_insert(0) += amount.retransmit_bytes;
                *retransmit_frames.entry(labels).or_insert(0) += amount.retransmit_frames;
            }
            if let Some((labels, rate)) = self.price(&owner, direction) {
                let entry = cost.entry(labels).or_insert((0, rate));
                entry.0 += rate.exact(amount.wire_bytes.max(0).unsigned_abs());
            }
        }
        family(
            &mut out,
            "edgemeter_wire",
            "Layer-2 bytes (without FCS; headers, TLS and retransmits included) by owner",
            Some(&Unit::Bytes),
            &wire,
        )?;
        family(
            &mut out,
            "edgemeter_wire_frames",
            "Frames by owner",
            None,
            &frames,
        )?;
        family(
            &mut out,
            "edgemeter_wire_retransmit",
            "Wire bytes of retransmitted frames, part of edgemeter_wire",
            Some(&Unit::Bytes),
            &retransmit_bytes,
        )?;
        family(
            &mut out,
            "edgemeter_wire_retransmit_frames",
            "Retransmitted frames, part of edgemeter_wire_frames",
            None,
            &retransmit_frames,
        )?;
        family(
            &mut out,
            "edgemeter_l4_payload",
            "TCP and UDP payload bytes by owner, TLS records and retransmitted payload included",
            Some(&Unit::Bytes),
            &payload,
        )?;
        family(
            &mut out,
            "edgemeter_goodput",
            "TCP and UDP payload bytes by owner without what was retransmitted",
            Some(&Unit::Bytes),
            &goodput,
        )?;
        let mut gauges = out.encode_descriptor(
            "edgemeter_unclaimed",
            "Received on gateway connections and claimed by no request: in flight, scans, failed handshakes, unparsable requests",
            Some(&Unit::Bytes),
            prometheus_client::metrics::MetricType::Gauge,
        )?;
        for (labels, bytes) in &unclaimed {
            ConstGauge::new(*bytes).encode(gauges.encode_family(labels)?)?;
        }
        self.encode_cells(&mut out, &view)?;
        let mut counters = out.encode_descriptor(
            "edgemeter_cost_nanos",
            "Billionths of a currency unit for wire bytes by route, at the configured rate; a view of the ledger, not the bill",
            None,
            prometheus_client::metrics::MetricType::Counter,
        )?;
        for (labels, (exact, rate)) in &cost {
            let nanos = u64::try_from(rate.settle(*exact).0).unwrap_or(u64::MAX);
            ConstCounter::new(nanos).encode(counters.encode_family(labels)?)?;
        }
        encode_health(&mut out, &view)
    }
}

impl WireMetrics {
    fn price(
        &self,
        owner: &Owner,
        direction: Direction,
    ) -> Option<(CostLabels, crate::money::Rate)> {
        if !matches!(owner.kind, OwnerKind::Route | OwnerKind::Overhead) {
            return None;
        }
        let prices = self.prices.as_ref()?;
        let price = prices.find(owner.leg, direction)?;
        let overhead = owner.kind == OwnerKind::Overhead;
        let labels = CostLabels {
            route: if overhead {
                "(overhead)".into()
            } else {
                owner.route.clone()
            },
            service: if overhead {
                owner.endpoint.clone()
            } else {
                owner.service.clone()
            },
            tenant: owner.tenant.clone(),
            leg: match owner.leg {
                Leg::Client => "client",
                Leg::Upstream => "upstream",
            },
            direction: word(direction),
            rate: price.id.as_str().to_owned(),
            currency: prices.currency.to_string(),
        };
        Some((labels, price.rate))
    }
}

fn family(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    values: &BTreeMap<OwnerLabels, i64>,
) -> Result<(), std::fmt::Error> {
    let mut family = out.encode_descriptor(
        name,
        help,
        unit,
        prometheus_client::metrics::MetricType::Counter,
    )?;
    for (labels, value) in values {
        ConstCounter::new(value.max(&0).unsigned_abs()).encode(family.encode_family(labels)?)?;
    }
    Ok(())
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "rx",
        Direction::Tx => "tx",
    }
}
