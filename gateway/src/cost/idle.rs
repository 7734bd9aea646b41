//! Money that moves nothing: upstream peers that are not needed, connections that lie idle, tasks
//! that should have ended. Found from the ledger and the gateway's own metrics, priced with
//! visible inputs.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    calendar::Period,
    compare::Input,
    exact::divide_half_even,
    usage::{Side, Usage},
};
use crate::money::{Nanos, Overflow, UnitPrice};

/// Hours in a month, as providers count.
const HOURS: i128 = 730;

/// An upstream as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Its name: the endpoint of its bytes in the ledger.
    pub name: String,
    /// How many peers it has.
    pub peers: u64,
}

/// Connections of the gateway without a frame for some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// All that hold a slot.
    pub open: u64,
    /// Silent for longer than a minute.
    pub idle: u64,
    /// Silent for longer than an hour, which every timeout of the gateway forbids: the task that
    /// serves such a connection is leaked.
    pub leaked: u64,
}

/// Everything the result depends on.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// What one peer can carry, both directions, Mbps.
    pub peer_mbps: Input<u64>,
    /// A peer below this share of it, per cent, at the busiest minute is not needed.
    pub busy_pct: Input<u64>,
    /// Peers kept in any case, for when one fails.
    pub keep: Input<u64>,
    /// Thousandths of a core that a peer is given.
    pub peer_millicores: Input<u64>,
    /// Memory that a peer is given, MiB.
    pub peer_memory_mib: Input<u64>,
    /// Memory of an idle connection, KiB.
    pub connection_kib: Input<u64>,
    /// Thousandths of a core that a leaked task burns.
    pub task_millicores: Input<u64>,
    /// Price of a core for an hour.
    pub core_hour: Input<UnitPrice>,
    /// Price of a GiB of memory for an hour.
    pub gib_hour: Input<UnitPrice>,
    /// Of the prices.
    pub currency: String,
}

/// One thing that costs and does nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub what: String,
    /// How many of how many.
    pub count: (u64, u64),
    /// Why it was found.
    pub why: String,
    /// A month of it.
    pub cost: Nanos,
}

/// What is idle over a window of usage.
///
/// # Errors
/// A product does not fit.
pub fn find(
    inputs: &Inputs,
    upstreams: &[Upstream],
    usage: &Usage,
    window: Period,
    connections: Option<Connections>,
) -> Result<Vec<Finding>, Overflow> {
    let mut busiest: BTreeMap<&str, BTreeMap<i64, i128>> = BTreeMap::new();
    for row in &usage.rows {
        if row.account.side == Side::Upstream && row.period.meet(window).is_some() {
            let minutes = busiest.entry(&row.account.endpoint).or_default();
            *minutes.entry(row.period.start.div_euclid(60)).or_default() +=
                i128::from(row.wire_bytes);
        }
    }
    let mut findings = Vec::new();
    for upstream in upstreams {
        let minutes = busiest.get(upstream.name.as_str());
        let peak = minutes
            .and_then(|minutes| minutes.values().max())
            .copied()
            .unwrap_or(0);
        // Bits of the busiest minute; a peer is busy at a share of what it can carry.
        let bits = peak * 8;
        let capacity = i128::from(inputs.peer_mbps.value)
            .checked_mul(60 * 1_000_000 * i128::from(inputs.busy_pct.value))
            .ok_or(Overflow)?
            .max(1);
        let needed = (bits * 100 + capacity - 1) / capacity;
        let needed = u64::try_from(needed.max(i128::from(inputs.keep.value))).unwrap_or(u64::MAX);
        let spare = upstream.peers.saturating_sub(needed);
        if spare == 0 {
            continue;
        }
        let millicores = i128::from(inputs.peer_millicores.value) * i128::from(spare);
        let kib = i128::from(inputs.peer_memory_mib.value) * 1_024 * i128::from(spare);
        findings.push(Finding {
            what: format!("peers of upstream {}", upstream.name),
            count: (spare, upstream.peers),
            why: format!(
                "busiest minute {} Mbps; {needed} peers carry that below {} %",
                thousandths(divide_half_even(bits, 60_000)),
                inputs.busy_pct.value
            ),
            cost: inputs.month(millicores, kib)?,
        });
    }
    if let Some(found) = connections {
        let kib = |count: u64| i128::from(count) * i128::from(inputs.connection_kib.value);
        if found.idle > 0 {
            findings.push(Finding {
                what: "idle connections".into(),
                count: (found.idle, found.open),
                why: "no frame for a minute".into(),
                cost: inputs.month(0, kib(found.idle))?,
            });
        }
        if found.leaked > 0 {
            let millicores = i128::from(found.leaked) * i128::from(inputs.task_millicores.value);
            findings.push(Finding {
                what: "leaked tasks".into(),
                count: (found.leaked, found.open),
                why: "a connection is held and no frame came for an hour".into(),
                // Their memory is in the line above: who is silent for an hour is idle too.
                cost: inputs.month(millicores, 0)?,
            });
        }
    }
    Ok(findings)
}

impl Inputs {
    fn month(&self, millicores: i128, kib: i128) -> Result<Nanos, Overflow> {
        let price = |price: UnitPrice| i128::from(price.nanos());
        let cpu = millicores
            .checked_mul(HOURS * price(self.core_hour.value))
            .ok_or(Overflow)?;
        let memory = kib
            .checked_mul(HOURS * price(self.gib_hour.value))
            .ok_or(Overflow)?;
        Nanos(divide_half_even(cpu, 1_000)).checked_add(Nanos(divide_half_even(memory, 1 << 20)))
    }

    /// Inputs with their sources, findings, total.
    ///
    /// # Errors
    /// The total does not fit.
    pub fn table(&self, findings: &[Finding], metrics: Option<&str>) -> Result<String, Overflow> {
        let mut out = String::from("inputs (replace any of them by its flag):\n");
        let currency = &self.currency;
        for (name, input) in [
            ("--peer-mbps, both directions", &self.peer_mbps),
            ("--busy-pct", &self.busy_pct),
            ("--keep, peers in any case", &self.keep),
            ("--peer-millicores", &self.peer_millicores),
            ("--peer-memory-mib", &self.peer_memory_mib),
            ("--connection-kib", &self.connection_kib),
            ("--task-millicores", &self.task_millicores),
        ] {
            let _ = writeln!(out, "  {name:<30} {:>14}  {}", input.value, input.source);
        }
        for (name, input) in [
            ("--core-hour", &self.core_hour),
            ("--gib-hour", &self.gib_hour),
        ] {
            let value = format!("{} {currency}", input.value);
            let _ = writeln!(out, "  {name:<30} {value:>14}  {}", input.source);
        }
        if let Some(missing) = metrics {
            let _ = writeln!(out, "connections and tasks are not looked at: {missing}");
        }
        let month = format!("{currency} a month");
        let _ = writeln!(out, "\n{:<32} {:>12} {month:>18}  why", "idle", "of");
        let mut total = Nanos::default();
        for finding in findings {
            total = total.checked_add(finding.cost)?;
            let count = format!("{} of {}", finding.count.0, finding.count.1);
            let _ = writeln!(
                out,
                "{:<32} {count:>12} {:>18}  {}",
                finding.what, finding.cost, finding.why
            );
        }
        let _ = writeln!(out, "{:<32} {:>12} {total:>18}", "in all", "");
        Ok(out)
    }
}

/// The gateway's connections from its metrics page; None where it does not observe any.
#[must_use]
pub fn connections(metrics: &str) -> Option<Connections> {
    let value = |name: &str, label: &str| -> Option<u64> {
        metrics.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix('{')?;
            let (labels, value) = rest.split_once('}')?;
            labels
                .contains(label)
                .then(|| value.split_whitespace().next()?.parse().ok())?
        })
    };
    Some(Connections {
        open: value("edgemeter_connection_slots", "state=\"used\"")?,
        idle: value("edgemeter_silent_connections", "longer_than=\"1m\"")?,
        leaked: value("edgemeter_silent_connections", "longer_than=\"1h\"")?,
    })
}

fn thousandths(value: i128) -> String {
    format!("{}.{:03}", value / 1_000, value % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::tests::{sent, usage};

    fn inputs() -> Inputs {
        let given = |value: u64| Input {
            value,
            source: "test".into(),
        };
        let price = |text: &str| Input {
            value: text.parse().unwrap(),
            source: "test".into(),
        };
        Inputs {
            peer_mbps: given(100),
            busy_pct: given(50),
            keep: given(2),
            peer_millicores: given(2_000),
            peer_memory_mib: given(4_096),
            connection_kib: given(64),
            task_millicores: given(1_000),
            core_hour: price("0.04"),
            gib_hour: price("0.005"),
            currency: "USD".into(),
        }
    }

    fn upstream(peers: u64) -> Upstream {
        Upstream {
            name: "orders".into(),
            peers,
        }
    }

    fn at_mbps(mbps: i64) -> Usage {
        let mut row = sent("a", 0, mbps * 1_000_000 / 8 * 60);
        row.account.side = Side::Upstream;
        row.account.endpoint = "orders".into();
        usage(vec![row])
    }

    const WINDOW: Period = Period { start: 0, end: 600 };

    #[test]
    fn peers_above_what_the_busiest_minute_needs_are_priced() {
        // 149 Mbps at 50 Mbps a peer need three; two of five are spare.
        let found = find(&inputs(), &[upstream(5)], &at_mbps(149), WINDOW, None).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].count, (2, 5));
        // 2 peers x (2 cores x 0.04 + 4 GiB x 0.005) x 730 h.
        assert_eq!(found[0].cost.to_string(), "146.00");
        // At 151 Mbps the fourth is needed.
        let found = find(&inputs(), &[upstream(5)], &at_mbps(151), WINDOW, None).unwrap();
        assert_eq!(found[0].count, (1, 5));
        let busy = find(&inputs(), &[upstream(4)], &at_mbps(199), WINDOW, None).unwrap();
        assert!(busy.is_empty(), "{busy:?}");
    }

    #[test]
    fn an_upstream_without_traffic_keeps_what_failover_needs() {
        let found = find(&inputs(), &[upstream(3)], &Usage::default(), WINDOW, None).unwrap();
        assert_eq!(found[0].count, (1, 3));
    }

    #[test]
    fn idle_connections_cost_memory_and_leaked_tasks_cores() {
        let page = "edgemeter_connection_slots{state=\"used\"} 9000\n\
                    edgemeter_connection_slots{state=\"free\"} 1\n\
                    edgemeter_silent_connections{longer_than=\"1m\"} 8192\n\
                    edgemeter_silent_connections{longer_than=\"1h\"} 2\n";
        let connections = connections(page).unwrap();
        assert_eq!(
            (connections.open, connections.idle, connections.leaked),
            (9_000, 8_192, 2)
        );
        let found = find(&inputs(), &[], &Usage::default(), WINDOW, Some(connections)).unwrap();
        // 8192 x 64 KiB are half a GiB; two cores.
        assert_eq!(found[0].cost.to_string(), "1.825");
        assert_eq!(found[1].cost.to_string(), "58.40");
        assert!(super::connections("edgemeter_connection_slots{state=\"used\"} 1\n").is_none());
    }
}
