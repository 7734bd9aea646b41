//! Flows that are being taken out of the table, written down before they are: a process that is
//! killed between taking them and putting their bytes into the row of those that are over leaves
//! them to the next one.

use std::{collections::BTreeMap, io, os::fd::AsFd as _};

use aya::maps::MapData;
use flow_abi::{FlowCounters, FlowKey};

use super::{
    KernelError, PinDirectory, array, batch,
    expiry::{add, over_row},
    maps::Maps,
};

/// The map's name, also that of its pin.
pub(super) const NAME: &str = "FLOWS_GOING";

/// Flows taken away before their bytes are put into the row.
pub(super) const AT_ONCE: usize = 64;

/// A flow as it was when it was seen to be over.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Leaving {
    pub(super) key: FlowKey,
    pub(super) reserved: u32,
    pub(super) flow: FlowCounters,
}

/// The map's only entry.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Going {
    /// Later ones have higher numbers. A row bears the number of those that are in it.
    sequence: u64,
    count: u64,
    flows: [Leaving; AT_ONCE],
}

impl Default for Going {
    fn default() -> Self {
        Self {
            sequence: 0,
            count: 0,
            flows: [Leaving::default(); AT_ONCE],
        }
    }
}

// SAFETY: numbers and structures of numbers without gaps, of any value.
unsafe impl aya::Pod for Going {}

/// The pinned map, made when there is none.
pub(super) fn open(pins: Option<&PinDirectory>) -> Result<MapData, KernelError> {
    array::open::<Going>(pins, NAME, 1)
}

impl Maps {
    /// These flows are about to be taken away.
    pub(super) fn note_leaving(&self, sequence: u64, leaving: &[Leaving]) -> io::Result<()> {
        let Some(map) = &self.going else {
            return Ok(());
        };
        let mut going = Going {
            sequence,
            count: leaving.len() as u64,
            ..Going::default()
        };
        for (to, from) in going.flows.iter_mut().zip(leaving) {
            *to = *from;
        }
        batch::put(map.fd().as_fd(), &0_u32, &going)
    }

    /// Puts into their rows what an earlier process took away and could not put there. No other
    /// process may be at it.
    ///
    /// # Errors
    /// A map could not be read or changed.
    pub(super) fn finish_leaving(&self) -> io::Result<()> {
        let Some(map) = &self.going else {
            return Ok(());
        };
        let going: Going = batch::look_up(map.fd().as_fd(), &0_u32)?.unwrap_or_default();
        let count = AT_ONCE.min(usize::try_from(going.count).unwrap_or(AT_ONCE));
        let mut missing: BTreeMap<u32, FlowCounters> = BTreeMap::new();
        for leaving in &going.flows[..count] {
            // One that has come back is another flow.
            let stays = self
                .flow(&leaving.key)?
                .is_some_and(|flow| flow.first_ns == leaving.flow.first_ns);
            if !stays {
                add(
                    missing.entry(leaving.key.ifindex).or_default(),
                    &leaving.flow,
                );
            }
        }
        for (ifindex, more) in missing {
            let key = over_row(ifindex);
            let mut row = self.flow(&key)?.unwrap_or_default();
            if row.cookie < going.sequence {
                add(&mut row, &more);
                row.cookie = going.sequence;
                batch::put(self.flows.fd().as_fd(), &key, &row)?;
                log::info!(
                    "{} frames of flows that a killed process was about to take away are in \
                     their row",
                    more.rx_frames + more.tx_frames
                );
            }
        }
        let count = over_row(0);
        if let Some(mut row) = self.flow(&count)?
            && row.cookie % 2 == 1
        {
            row.cookie += 1;
            batch::put(self.flows.fd().as_fd(), &count, &row)?;
        }
        batch::put(map.fd().as_fd(), &0_u32, &Going::default())
    }
}
