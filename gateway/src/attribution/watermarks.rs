//! Watermarks: up to where each cumulative counter has been posted. Stored in the same
//! transaction as the postings, so that a crash anywhere neither loses nor doubles a byte.

use std::collections::HashMap;

use flow_abi::{Account, AccountKey, Cell, InterfaceCells};

use super::Amount;

/// Posted values, by counter, of one lifetime of the kernel maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// Posted account values.
    pub accounts: HashMap<AccountKey, Account>,
    /// Posted cell values.
    pub interfaces: HashMap<u32, InterfaceCells>,
}

/// A counter that went backwards within one lifetime: impossible, so a defect or tampering. The
/// watermark stays, nothing is posted, and the operator is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel counter went backwards: {0}")]
pub struct Regression(pub String);

impl Watermarks {
    pub(super) fn advance_account(
        &mut self,
        key: AccountKey,
        now: &Account,
    ) -> Result<(Amount, Amount), Regression> {
        let mark = self.accounts.entry(key).or_default();
        let delta = |now: u64, before: u64| {
            now.checked_sub(before)
                .map(u64::cast_signed)
                .ok_or_else(|| Regression(format!("{key:?}: {before} → {now}")))
        };
        let rx = Amount {
            wire_bytes: delta(now.rx_bytes, mark.rx_bytes)?,
            frames: delta(now.rx_frames, mark.rx_frames)?,
            l4_payload_bytes: delta(now.rx_payload_bytes, mark.rx_payload_bytes)?,
            ..Amount::default()
        };
        let tx = Amount {
            wire_bytes: delta(now.tx_bytes, mark.tx_bytes)?,
            frames: delta(now.tx_frames, mark.tx_frames)?,
            l4_payload_bytes: delta(now.tx_payload_bytes, mark.tx_payload_bytes)?,
            retransmit_bytes: delta(now.tx_retransmit_bytes, mark.tx_retransmit_bytes)?,
            retransmit_frames: delta(now.tx_retransmit_frames, mark.tx_retransmit_frames)?,
            retransmit_payload_bytes: delta(
                now.tx_retransmit_payload_bytes,
                mark.tx_retransmit_payload_bytes,
            )?,
        };
        *mark = *now;
        Ok((rx, tx))
    }

    pub(super) fn advance_cells(
        &mut self,
        ifindex: u32,
        now: &InterfaceCells,
    ) -> Result<InterfaceCells, Regression> {
        let mark = self.interfaces.entry(ifindex).or_default();
        let mut delta = InterfaceCells::default();
        for (direction, cells) in now.cells.iter().enumerate() {
            for (number, cell) in cells.iter().enumerate() {
                let before = mark.cells[direction][number];
                let gained = cell
                    .bytes
                    .checked_sub(before.bytes)
                    .zip(cell.frames.checked_sub(before.frames));
                let Some((bytes, frames)) = gained else {
                    return Err(Regression(format!(
                        "interface {ifindex} direction {direction} cell {number}: {before:?} → {cell:?}"
                    )));
                };
                delta.cells[direction][number] = Cell { bytes, frames };
            }
        }
        *mark = *now;
        Ok(delta)
    }
}
