//! `edgemeter flows`: the kernel's flow table as it is now, and the line that proves it.
//!
//! Reads the pinned maps and changes nothing, so it works beside a running gateway and after one
//! that has died.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use flow_abi::{Direction, FlowCounters, FlowKey, InterfaceCells, cell, interface};

use crate::{
    config::Observe,
    kernel::{Maps, PinDirectory, devices, is_over_row, protocol},
};

/// Each direction's bytes in flows.
type Both = [u64; 2];

/// One interface and direction: where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Interface name, or its number when it is not of this network namespace.
    pub interface: String,
    /// Received or sent.
    pub direction: Direction,
    /// Wire bytes the interface moved, at the end of the reading.
    pub total: u64,
    /// Wire bytes in flows.
    pub flows: u64,
    /// Of these, in flows that are over and have left the table.
    pub over: u64,
    /// Wire bytes that are in no flow, by the cell's name.
    pub cells: BTreeMap<&'static str, u64>,
    /// Bytes by which flows and cells miss the total; between the totals before and after the
    /// reading there is no difference.
    pub difference: u64,
}

/// The table at one moment.
pub struct Listing {
    /// Flows there are.
    pub count: u64,
    /// How long reading all of them took, microseconds.
    pub read_us: u64,
    /// By bytes, most first.
    pub top: Vec<(FlowKey, FlowCounters)>,
    /// Per interface and direction.
    pub identities: Vec<Identity>,
}

/// How often the table is read again because the gateway was taking flows away meanwhile.
const TRIES: usize = 20;

/// Reads the flow table of a configuration's pins.
///
/// # Errors
/// Nothing is pinned there, or a map cannot be read.
pub fn read(observe: &Observe, limit: usize) -> anyhow::Result<Listing> {
    let pins = PinDirectory::open(&observe.bpffs)?;
    let maps = Maps::pinned(&pins)?;
    let mut tries = 1;
    loop {
        let before = maps.flows_taken_away()?;
        let listing = read_once(&maps, limit)?;
        let still = before % 2 == 0 && maps.flows_taken_away()? == before;
        // A gateway that was killed at it never ends: then the difference is what it lost.
        if still || tries == TRIES {
            return Ok(listing);
        }
        tries += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read_once(maps: &Maps, limit: usize) -> anyhow::Result<Listing> {
    let before = maps.read_cells()?;
    let mut sums: BTreeMap<u32, Both> = BTreeMap::new();
    let mut overs: BTreeMap<u32, Both> = BTreeMap::new();
    let mut top: Vec<(FlowKey, FlowCounters)> = Vec::new();
    // Fewer bytes than this are not among the largest.
    let mut least = if limit == 0 { u64::MAX } else { 0 };
    let mut count = 0;
    let began = Instant::now();
    maps.read_rows(|key, flow| {
        let bytes = [flow.rx_bytes, flow.tx_bytes];
        let sum = sums.entry(key.ifindex).or_default();
        *sum = [sum[0] + bytes[0], sum[1] + bytes[1]];
        if is_over_row(&key) {
            overs.insert(key.ifindex, bytes);
            return;
        }
        count += 1;
        if moved(&flow) < least {
            return;
        }
        top.push((key, flow));
        // Cut now and then: a million flows need not be kept to show twenty.
        if top.len() > 4 * limit.max(256) {
            keep_largest(&mut top, limit);
            least = top.last().map_or(0, |(_, flow)| moved(flow) + 1);
        }
    })?;
    let read_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    keep_largest(&mut top, limit);
    let after = maps.read_cells()?;
    let names = names();
    let mut identities = Vec::new();
    for (number, cells) in &after {
        let sum = sums.get(number).copied().unwrap_or_default();
        let first = before.get(number).copied().unwrap_or_default();
        for direction in [Direction::Rx, Direction::Tx] {
            let name = names.get(number).cloned();
            let name = name.unwrap_or_else(|| format!("interface {number:#x}"));
            let over = overs.get(number).copied().unwrap_or_default();
            identities.push(Identity {
                over: over[direction as usize],
                ..identity(name, direction, sum, &first, cells)
            });
        }
    }
    Ok(Listing {
        count,
        read_us,
        top,
        identities,
    })
}

fn identity(
    interface: String,
    direction: Direction,
    sum: Both,
    before: &InterfaceCells,
    after: &InterfaceCells,
) -> Identity {
    let at = direction as usize;
    // Of an account table that was full: these bytes are in a flow.
    let outside = |cells: &InterfaceCells| -> BTreeMap<&'static str, u64> {
        (1..cell::COUNT)
            .filter(|number| *number != cell::ACCOUNTS_FULL)
            .map(|number| (cell::NAMES[number], cells.cells[at][number].bytes))
            .filter(|(_, bytes)| *bytes != 0)
            .collect()
    };
    let flows = sum[at];
    let parts_low = flows + outside(before).values().sum::<u64>();
    let parts_high = flows + outside(after).values().sum::<u64>();
    let low = before.cells[at][cell::TOTAL].bytes;
    let high = after.cells[at][cell::TOTAL].bytes;
    Identity {
        interface,
        direction,
        total: high,
        flows,
        over: 0,
        cells: outside(after),
        difference: low.saturating_sub(parts_high) + parts_low.saturating_sub(high),
    }
}

fn moved(flow: &FlowCounters) -> u64 {
    flow.rx_bytes + flow.tx_bytes
}

fn keep_largest(top: &mut Vec<(FlowKey, FlowCounters)>, limit: usize) {
    top.sort_unstable_by_key(|(key, flow)| (std::cmp::Reverse(moved(flow)), *key));
    top.truncate(limit);
}

fn names() -> BTreeMap<u32, String> {
    let devices = devices().unwrap_or_default();
    let devices = devices
        .into_iter()
        .map(|device| (device.index, device.name));
    // The gateway's own network namespace has the number 0; of others only numbers are known.
    devices
        .filter(|(index, _)| *index <= interface::INDEX_MASK)
        .collect()
}

fn address(octets: [u8; 16], port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::from(octets).to_canonical(), port)
}

fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => "received",
        Direction::Tx => "sent",
    }
}

impl Listing {
    /// As a table.
    ///
    /// # Errors
    /// Never in practice: writing into memory.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        if !self.top.is_empty() {
            writeln!(
                out,
                "{:<5} {:<28} {:<28} {:>16} {:>16} {:>12} {:>9}",
                "", "local", "remote", "received B", "sent B", "sent again B", "RTT us"
            )?;
        }
        for (key, flow) in &self.top {
            writeln!(
                out,
                "{:<5} {:<28} {:<28} {:>16} {:>16} {:>12} {:>9}",
                protocol(key, flow),
                address(key.local, key.local_port).to_string(),
                address(key.remote, key.remote_port).to_string(),
                flow.rx_bytes,
                flow.tx_bytes,
                flow.tx_retransmit_bytes,
                flow.srtt_us,
            )?;
        }
        writeln!(
            out,
            "{} flows, read in {} us; {} shown",
            self.count,
            self.read_us,
            self.top.len()
        )?;
        for identity in &self.identities {
            let cells: u64 = identity.cells.values().sum();
            writeln!(
                out,
                "{} {}: flows {} B (over: {} B) + in no flow {} B; interface moved {} B; \
                 difference {} B",
                identity.interface,
                direction_name(identity.direction),
                identity.flows,
                identity.over,
                cells,
                identity.total,
                identity.difference,
            )?;
        }
        Ok(out)
    }

    /// As JSON, one object.
    #[must_use]
    pub fn json(&self) -> String {
        let rows = self.top.iter().map(|(key, flow)| {
            serde_json::json!({
                "protocol": protocol(key, flow),
                "local": address(key.local, key.local_port).to_string(),
                "remote": address(key.remote, key.remote_port).to_string(),
                "interface": key.ifindex,
                "rx_bytes": flow.rx_bytes,
                "rx_frames": flow.rx_frames,
                "tx_bytes": flow.tx_bytes,
                "tx_frames": flow.tx_frames,
                "tx_retransmit_bytes": flow.tx_retransmit_bytes,
                "srtt_us": flow.srtt_us,
            })
        });
        let identities = self.identities.iter().map(|identity| {
            serde_json::json!({
                "interface": identity.interface,
                "direction": direction_name(identity.direction),
                "total": identity.total,
                "flows": identity.flows,
                "over": identity.over,
                "cells": identity.cells,
                "difference": identity.difference,
            })
        });
        serde_json::json!({
            "count": self.count,
            "read_us": self.read_us,
            "flows": rows.collect::<Vec<_>>(),
            "identities": identities.collect::<Vec<_>>(),
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(total: u64, icmp: u64, accounts_full: u64) -> InterfaceCells {
        let mut cells = InterfaceCells::default();
        cells.cells[0][cell::TOTAL].bytes = total;
        cells.cells[0][cell::ICMP].bytes = icmp;
        cells.cells[0][cell::ACCOUNTS_FULL].bytes = accounts_full;
        cells
    }

    #[test]
    fn what_moves_while_reading_is_no_difference_and_what_is_missing_is() {
        let of = |flows, before: &InterfaceCells, after: &InterfaceCells| {
            identity("a".into(), Direction::Rx, [flows, 0], before, after).difference
        };
        let rest = cells(1000, 100, 50);
        // A full account table's bytes are in a flow.
        assert_eq!(of(900, &rest, &rest), 0);
        assert_eq!(of(899, &rest, &rest), 1);
        assert_eq!(of(901, &rest, &rest), 1);
        let later = cells(1500, 200, 50);
        for flows in [900, 1000, 1300, 1400] {
            assert_eq!(of(flows, &rest, &later), 0, "{flows}");
        }
        assert_eq!(of(1401, &rest, &later), 1);
        assert_eq!(of(799, &rest, &later), 1);
    }

    #[test]
    fn the_largest_are_kept() {
        let flow = |port, bytes| {
            let key = FlowKey {
                local_port: port,
                ..FlowKey::default()
            };
            let counters = FlowCounters {
                tx_bytes: bytes,
                ..FlowCounters::default()
            };
            (key, counters)
        };
        let mut top = vec![flow(1, 10), flow(2, 30), flow(3, 20)];
        keep_largest(&mut top, 2);
        let ports: Vec<u16> = top.iter().map(|(key, _)| key.local_port).collect();
        assert_eq!(ports, [2, 3]);
    }
}
