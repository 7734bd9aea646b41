//! What the interfaces moved and what is in no account: the other side of the identity.

use flow_abi::cell;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::{WireMetrics, WireView, word};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CellLabels {
    interface: String,
    direction: &'static str,
    cell: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InterfaceLabels {
    interface: String,
    direction: &'static str,
}

impl WireMetrics {
    pub(super) fn encode_cells(
        &self,
        out: &mut DescriptorEncoder<'_>,
        view: &WireView,
    ) -> Result<(), std::fmt::Error> {
        let counter = prometheus_client::metrics::MetricType::Counter;
        let mut totals = out.encode_descriptor(
            "edgemeter_interface",
            "Layer-2 bytes the interface moved: the whole of which owners and cells are the parts",
            Some(&Unit::Bytes),
            counter,
        )?;
        for (interface, direction, number, bytes, _) in view.balances.cells() {
            if number == cell::TOTAL {
                let labels = InterfaceLabels {
                    interface: interface.into(),
                    direction: word(direction),
                };
                ConstCounter::new(bytes.max(0).unsigned_abs())
                    .encode(totals.encode_family(&labels)?)?;
            }
        }
        let mut cells = out.encode_descriptor(
            "edgemeter_unattributed",
            "Layer-2 bytes in no account, by the reason",
            Some(&Unit::Bytes),
            counter,
        )?;
        for (interface, direction, number, bytes, _) in view.balances.cells() {
            if number != cell::TOTAL {
                let labels = CellLabels {
                    interface: interface.into(),
                    direction: word(direction),
                    cell: cell::NAMES[number],
                };
                ConstCounter::new(bytes.max(0).unsigned_abs())
                    .encode(cells.encode_family(&labels)?)?;
            }
        }
        let mut gap = out.encode_descriptor(
            "edgemeter_ledger_difference",
            "Owners and cells minus the interface's whole, in the ledger; frames under way while a tick reads cancel out, at rest it is 0",
            Some(&Unit::Bytes),
            prometheus_client::metrics::MetricType::Gauge,
        )?;
        for (interface, balance) in view.balances.by_interface() {
            ConstGauge::new(balance.difference())
                .encode(gap.encode_family(&[("interface", interface)])?)?;
        }
        Ok(())
    }
}
