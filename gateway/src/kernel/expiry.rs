//! Flows that are over leave the table, and their bytes stay in it: a row for each interface holds
//! what its flows held that are gone, so that flows and cells are always the interface's total.

use std::{collections::BTreeMap, io, os::fd::AsFd as _};

use flow_abi::{FlowCounters, FlowKey, flow_flag};

use super::{
    batch,
    going::{AT_ONCE, Leaving},
    maps::{Maps, read_pod},
};
use crate::slots::now_ns;

/// The row of an interface's flows that are over. No frame's: those are TCP or UDP.
#[must_use]
pub fn over_row(ifindex: u32) -> FlowKey {
    FlowKey {
        ifindex,
        ..FlowKey::default()
    }
}

/// Whether a row is of flows that are over, and no flow itself.
#[must_use]
pub fn is_over_row(key: &FlowKey) -> bool {
    key.protocol == 0
}

/// What flows are of, as told.
pub const PROTOCOLS: [&str; 3] = ["tcp", "udp", "quic"];

/// The word for a flow's protocol.
#[must_use]
pub fn protocol(key: &FlowKey, flow: &FlowCounters) -> &'static str {
    PROTOCOLS[protocol_index(key, flow)]
}

fn protocol_index(key: &FlowKey, flow: &FlowCounters) -> usize {
    const TCP: u8 = 6;
    match key.protocol {
        TCP => 0,
        _ if flow.flags & flow_flag::QUIC != 0 => 2,
        _ => 1,
    }
}

/// A place in the flow table. A small table is walked whole in one step, a large one in
/// [`Self::STEPS`]: a step costs what the table's size divided by that costs, and no more.
#[derive(Debug)]
pub struct FlowWalk {
    walk: batch::Walk,
    /// Met since the walk began.
    live: usize,
    /// Met on the last walk, or on this one if those are more.
    known: usize,
    /// The same by protocol, as of the last whole walk.
    live_by_protocol: [usize; PROTOCOLS.len()],
    known_by_protocol: [usize; PROTOCOLS.len()],
    over: Vec<Leaving>,
    /// The table fills, or has not become half empty since.
    pressed: bool,
    /// Taken away and not in their row yet, by interface.
    taken: BTreeMap<u32, FlowCounters>,
    /// Of what is taken: rises with every lot, from one process to the next.
    sequence: u64,
}

impl FlowWalk {
    /// Flows looked at in a step, at least.
    const STEP: usize = 4096;
    /// Steps through a large table. A step a second: a flow that is over goes within half a
    /// minute, and the shortest life is two minutes.
    const STEPS: usize = 30;

    /// Flows in the table, as of the last walk through it.
    #[must_use]
    pub fn known(&self) -> u64 {
        self.known as u64
    }

    /// By protocol, in the order of [`PROTOCOLS`], as of the last whole walk.
    #[must_use]
    pub fn known_by_protocol(&self) -> [u64; PROTOCOLS.len()] {
        self.known_by_protocol.map(|count| count as u64)
    }
}

impl Default for FlowWalk {
    fn default() -> Self {
        Self {
            walk: batch::Walk::new(size_of::<FlowKey>(), size_of::<FlowCounters>()),
            live: 0,
            known: 0,
            live_by_protocol: [0; PROTOCOLS.len()],
            known_by_protocol: [0; PROTOCOLS.len()],
            over: Vec::new(),
            pressed: false,
            taken: BTreeMap::new(),
            sequence: 0,
        }
    }
}

impl Maps {
    /// Goes on through the flow table, takes the flows that are over away and shows the others.
    /// Nothing is billed from flows: their bytes are in the accounts.
    ///
    /// A closed connection stays longer than TIME_WAIT, so that its last segments do not make a
    /// new flow; not so where the table fills.
    ///
    /// # Errors
    /// The map could not be read or changed.
    pub fn look_at_flows(
        &self,
        walk: &mut FlowWalk,
        mut visit: impl FnMut(&FlowKey, &FlowCounters),
    ) -> io::Result<()> {
        let now = now_ns();
        let room = self.flows_max as usize;
        let taken = walk.known.max(walk.live);
        walk.pressed = taken >= room - room / 4 || walk.pressed && taken >= room / 2;
        let pressed = walk.pressed;
        let (live, over) = (&mut walk.live, &mut walk.over);
        let by_protocol = &mut walk.live_by_protocol;
        let entries = FlowWalk::STEP.max(walk.known / FlowWalk::STEPS);
        let end = walk
            .walk
            .step(self.flows.fd().as_fd(), entries, |key, value| {
                let (key, flow): (FlowKey, FlowCounters) = (read_pod(key), read_pod(value));
                if is_over_row(&key) {
                } else if now.saturating_sub(flow.last_ns) > lifetime_ns(&key, &flow, pressed) {
                    over.push(Leaving {
                        key,
                        reserved: 0,
                        flow,
                    });
                } else {
                    *live += 1;
                    by_protocol[protocol_index(&key, &flow)] += 1;
                    visit(&key, &flow);
                }
            })?;
        self.take_away(walk)?;
        // A table that grows says so before the walk has come to its end.
        walk.known = walk.known.max(walk.live);
        if end {
            walk.known = std::mem::take(&mut walk.live);
            walk.known_by_protocol = std::mem::take(&mut walk.live_by_protocol);
        }
        Ok(())
    }

    /// How often flows have been taken away; odd while they are, and then the rows do not add up.
    ///
    /// # Errors
    /// The map could not be read.
    pub fn flows_taken_away(&self) -> io::Result<u64> {
        Ok(self.flow(&over_row(0))?.map_or(0, |row| row.cookie))
    }

    /// Makes the row that counts how often flows have been taken away. A full table of an earlier
    /// process has it already, or it is made when the first flow has gone.
    pub(super) fn make_over_rows(&self) -> io::Result<()> {
        if self.flow(&over_row(0))?.is_some() {
            return Ok(());
        }
        let made = batch::put(
            self.flows.fd().as_fd(),
            &over_row(0),
            &FlowCounters::default(),
        );
        match made {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(()),
            made => made,
        }
    }

    fn take_away(&self, walk: &mut FlowWalk) -> io::Result<()> {
        if walk.over.is_empty() && walk.taken.is_empty() {
            return Ok(());
        }
        let mut count = self.flow(&over_row(0))?.unwrap_or_default();
        // Of an earlier process that was killed here.
        count.cookie |= 1;
        let flows = self.flows.fd();
        let _ = batch::put(flows.as_fd(), &over_row(0), &count);
        let mut done = self.fill_rows(walk);
        while done.is_ok() && walk.taken.is_empty() && !walk.over.is_empty() {
            done = self.take_some(walk);
        }
        walk.over.clear();
        walk.over.shrink_to(FlowWalk::STEP);
        if walk.taken.is_empty() {
            count.cookie += 1;
            let _ = batch::put(flows.as_fd(), &over_row(0), &count);
        }
        done
    }

    /// The next few: written down, taken away, put into their rows.
    fn take_some(&self, walk: &mut FlowWalk) -> io::Result<()> {
        let some = walk.over.split_off(walk.over.len().saturating_sub(AT_ONCE));
        // The clock is the map's, and a process takes longer to start than it takes to tick.
        walk.sequence = now_ns().max(walk.sequence + 1);
        self.note_leaving(walk.sequence, &some)?;
        for Leaving { key, .. } in &some {
            if let Some(flow) = batch::take::<FlowKey, FlowCounters>(self.flows.fd().as_fd(), key)?
            {
                add(walk.taken.entry(key.ifindex).or_default(), &flow);
            }
        }
        self.fill_rows(walk)
    }

    /// What finds no room in a full table is kept for the next time.
    fn fill_rows(&self, walk: &mut FlowWalk) -> io::Result<()> {
        let mut failed = Ok(());
        let sequence = walk.sequence;
        walk.taken.retain(|ifindex, more| {
            let key = over_row(*ifindex);
            let filled = self.flow(&key).and_then(|row| {
                let mut row = row.unwrap_or_default();
                add(&mut row, more);
                row.cookie = sequence;
                batch::put(self.flows.fd().as_fd(), &key, &row)
            });
            match filled {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) => true,
                Err(error) => {
                    failed = Err(error);
                    true
                }
            }
        });
        failed
    }
}

pub(super) fn add(row: &mut FlowCounters, flow: &FlowCounters) {
    row.rx_bytes += flow.rx_bytes;
    row.rx_frames += flow.rx_frames;
    row.tx_bytes += flow.tx_bytes;
    row.tx_frames += flow.tx_frames;
    row.tx_retransmit_bytes += flow.tx_retransmit_bytes;
    row.tx_retransmit_frames += flow.tx_retransmit_frames;
}

/// Silence after which a flow is over, nanoseconds. A table that fills (three quarters are taken,
/// until half are) keeps what is over for a short while only; open connections it keeps all the same.
fn lifetime_ns(key: &FlowKey, flow: &FlowCounters, pressed: bool) -> u64 {
    const SECOND: u64 = 1_000_000_000;
    const TCP: u8 = 6;
    let either = |flag: u32| flow.flags & (flag | flag << flow_flag::TX_SHIFT) != 0;
    let closed = either(flow_flag::RST) || either(flow_flag::FIN);
    match (key.protocol, pressed) {
        (TCP, false) if closed => 120 * SECOND,
        (TCP, true) if closed => 5 * SECOND,
        (TCP, _) => 7200 * SECOND,
        (_, false) => 300 * SECOND,
        (_, true) => 10 * SECOND,
    }
}
