//! Whether the kernel side and the ledger work, and what they have lost.

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Unit;

use super::WireView;
use crate::kernel::PROTOCOLS;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabels {
    protocol: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SilenceLabels {
    longer_than: &'static str,
}

pub(super) fn encode_health(
    out: &mut DescriptorEncoder<'_>,
    view: &WireView,
) -> Result<(), std::fmt::Error> {
    let signed = |value: u64| value.cast_signed();
    for (name, help, unit, value) in [
        (
            "edgemeter_observer_up",
            "1 when the kernel programs count, 0 when the gateway runs degraded",
            None,
            i64::from(view.degraded.is_none()),
        ),
        (
            "edgemeter_ledger_up",
            "1 when the last tick was committed, 0 when the ledger cannot be written: the kernel keeps counting",
            None,
            i64::from(view.ledger_error.is_none()),
        ),
        (
            "edgemeter_ledger_breaches",
            "Invariants that do not hold in the ledger's balances, beyond frames under way; anything but 0 is a defect",
            None,
            i64::try_from(view.breaches.len()).unwrap_or(i64::MAX),
        ),
        (
            "edgemeter_conservation_gap",
            "Bytes by which the kernel's parts lie outside its totals before and after the reading; anything but 0 is a defect",
            Some(&Unit::Bytes),
            signed(view.gap_bytes),
        ),
        (
            "edgemeter_flows",
            "Flows in the kernel's table",
            None,
            signed(view.flows),
        ),
    ] {
        ConstGauge::new(value).encode(out.encode_descriptor(
            name,
            help,
            unit,
            prometheus_client::metrics::MetricType::Gauge,
        )?)?;
    }
    let mut flows = out.encode_descriptor(
        "edgemeter_flows_by_protocol",
        "Flows as of the last whole walk through the kernel's table; quic: port 443, and the first datagram seen had a long header",
        None,
        prometheus_client::metrics::MetricType::Gauge,
    )?;
    for (protocol, count) in PROTOCOLS.into_iter().zip(view.flows_by_protocol) {
        let labels = ProtocolLabels { protocol };
        ConstGauge::new(signed(count)).encode(flows.encode_family(&labels)?)?;
    }
    let mut slots = out.encode_descriptor(
        "edgemeter_connection_slots",
        "Slots shared with the kernel, by state",
        None,
        prometheus_client::metrics::MetricType::Gauge,
    )?;
    for (state, value) in [("used", view.slots.0), ("free", view.slots.1)] {
        ConstGauge::new(signed(value)).encode(slots.encode_family(&StateLabels { state })?)?;
    }
    let mut silent = out.encode_descriptor(
        "edgemeter_silent_connections",
        "Open connections without a frame for this long; an hour is longer than any timeout: a leaked task",
        None,
        prometheus_client::metrics::MetricType::Gauge,
    )?;
    for (longer_than, value) in [("1m", view.silent.0), ("1h", view.silent.1)] {
        let labels = SilenceLabels { longer_than };
        ConstGauge::new(signed(value)).encode(silent.encode_family(&labels)?)?;
    }
    for (name, help, unit, value) in [
        (
            "edgemeter_orphan",
            "Layer-2 bytes on interfaces without cells",
            Some(&Unit::Bytes),
            view.orphan_bytes,
        ),
        (
            "edgemeter_ledger_ticks",
            "Ticks committed to the ledger since start",
            None,
            view.ticks,
        ),
        (
            "edgemeter_ledger_commit_failures",
            "Ticks that could not be committed since start; a later tick posts their bytes",
            None,
            view.commit_failures,
        ),
        (
            "edgemeter_ledger_rolled_up_rows",
            "Rows of the ledger that were added up into coarser ones since start",
            None,
            view.rolled_up_rows,
        ),
        (
            "edgemeter_counter_regressions",
            "Kernel counters that went backwards; anything but 0 is a defect",
            None,
            view.regressions,
        ),
        (
            "edgemeter_slots_exhausted",
            "Connections that found no free slot: their bytes are overhead",
            None,
            view.slots_exhausted,
        ),
        (
            "edgemeter_ranges_overwritten",
            "Ranges overwritten before their bytes were acknowledged",
            None,
            view.ranges_overwritten,
        ),
        (
            "edgemeter_handshakes_undivided",
            "TLS handshakes of more frames than are remembered: the rest is the first request's",
            None,
            view.handshakes_undivided,
        ),
        (
            "edgemeter_owner_store_failures",
            "Requests whose owner could not be stored: their bytes are overhead",
            None,
            view.owner_failures,
        ),
        (
            "edgemeter_access_log_lost_lines",
            "Access log lines lost to a full queue or disk",
            None,
            view.access_log_lost,
        ),
    ] {
        ConstCounter::new(value).encode(out.encode_descriptor(
            name,
            help,
            unit,
            prometheus_client::metrics::MetricType::Counter,
        )?)?;
    }
    let info = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    info.encode(out.encode_descriptor(
        "edgemeter_build",
        "The running program",
        None,
        prometheus_client::metrics::MetricType::Info,
    )?)
}
