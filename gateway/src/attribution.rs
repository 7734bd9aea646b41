//! Attribution, the pure core: kernel counters and request claims in, postings out. No sockets,
//! no clock, no async.
//!
//! The kernel already credits sent bytes, and received bytes of a known request, to their owner.
//! Left for here: turning cumulative counters into deltas exactly once ([`Watermarks`]), and
//! moving the head of each request, received before its route was known, from *unclaimed* to the
//! request's owner ([`Claim`]).

mod claims;
mod input;
mod watermarks;

#[cfg(test)]
mod tests;

pub use claims::Claims;
pub use input::{Claim, ClaimKey, Counters};
pub use watermarks::{Regression, Watermarks};

use std::collections::BTreeMap;

use flow_abi::{Direction, InterfaceCells, cell};

use crate::{class::ClassId, owner::OwnerId};

/// One line of the ledger: what an owner moved on an interface, in one direction. Signed, because
/// claiming takes from *unclaimed* what an earlier posting gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Wire bytes.
    pub wire_bytes: i64,
    /// Frames.
    pub frames: i64,
    /// Layer-4 payload bytes (TLS records included).
    pub l4_payload_bytes: i64,
    /// Wire bytes of retransmitted frames, part of `wire_bytes`; sent direction only.
    pub retransmit_bytes: i64,
    /// Retransmitted frames.
    pub retransmit_frames: i64,
    /// Layer-4 payload of retransmitted frames, part of `l4_payload_bytes`.
    pub retransmit_payload_bytes: i64,
}

impl Amount {
    /// Adds another amount.
    pub fn add(&mut self, other: &Self) {
        self.wire_bytes += other.wire_bytes;
        self.frames += other.frames;
        self.l4_payload_bytes += other.l4_payload_bytes;
        self.retransmit_bytes += other.retransmit_bytes;
        self.retransmit_frames += other.retransmit_frames;
        self.retransmit_payload_bytes += other.retransmit_payload_bytes;
    }

    /// True when it changes nothing.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a posting goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PostingKey {
    /// Interface index.
    pub ifindex: u32,
    /// Direction.
    pub direction: Direction,
    /// Owner.
    pub owner: OwnerId,
    /// Class of the remote addresses.
    pub class: ClassId,
}

/// Where bytes outside every account go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellKey {
    /// Interface index.
    pub ifindex: u32,
    /// Direction.
    pub direction: Direction,
    /// [`flow_abi::cell`] number; the total is one of them.
    pub cell: usize,
}

/// Everything one tick adds to the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postings {
    /// By owner.
    pub amounts: BTreeMap<PostingKey, Amount>,
    /// By cell: `(bytes, frames)`.
    pub cells: BTreeMap<CellKey, (i64, i64)>,
}

impl Postings {
    /// Σ owners + Σ cells without an account − total, per interface and direction, bytes: 0 when
    /// the tick's parts are its whole. Under load a tick's total and parts are read microseconds
    /// apart; over time the differences cancel, to exactly 0 at rest.
    #[must_use]
    pub fn imbalance(&self) -> BTreeMap<(u32, Direction), i64> {
        let mut imbalance = BTreeMap::new();
        for (key, amount) in &self.amounts {
            *imbalance.entry((key.ifindex, key.direction)).or_default() += amount.wire_bytes;
        }
        for (key, (bytes, _)) in &self.cells {
            let sign = if key.cell == cell::TOTAL { -1 } else { 1 };
            *imbalance.entry((key.ifindex, key.direction)).or_default() += sign * bytes;
        }
        imbalance
    }
}

/// Attributes one tick: what the counters gained since the watermarks, with the claims applied.
///
/// The claims must have been taken before the counters were read: then every claimed byte is
/// already in its unclaimed account.
#[must_use]
pub fn attribute(
    watermarks: &mut Watermarks,
    counters: &Counters,
    claims: &[Claim],
) -> (Postings, Vec<Regression>) {
    let mut postings = Postings::default();
    let mut regressions = Vec::new();
    for (key, account) in &counters.accounts {
        match watermarks.advance_account(*key, account) {
            Ok((rx, tx)) => {
                for (direction, amount) in [(Direction::Rx, rx), (Direction::Tx, tx)] {
                    let key = PostingKey {
                        ifindex: key.ifindex,
                        direction,
                        owner: OwnerId(key.owner),
                        class: ClassId(key.class),
                    };
                    post(&mut postings, key, &amount);
                }
            }
            Err(regression) => regressions.push(regression),
        }
    }
    for (ifindex, cells) in &counters.interfaces {
        match watermarks.advance_cells(*ifindex, cells) {
            Ok(delta) => post_cells(&mut postings, *ifindex, &delta),
            Err(regression) => regressions.push(regression),
        }
    }
    for claim in claims {
        let amount = claim.amount();
        let negative = Amount {
            wire_bytes: -amount.wire_bytes,
            frames: -amount.frames,
            l4_payload_bytes: -amount.l4_payload_bytes,
            ..Amount::default()
        };
        for (owner, amount) in [(claim.key.to, &amount), (claim.key.from, &negative)] {
            let key = PostingKey {
                ifindex: claim.key.ifindex,
                direction: Direction::Rx,
                owner,
                class: claim.key.class,
            };
            post(&mut postings, key, amount);
        }
    }
    (postings, regressions)
}

/// An amount that a claim takes away again stays, as a line of zeros: its account has moved, and
/// the ledger keeps marks of the accounts it has lines of.
fn post(postings: &mut Postings, key: PostingKey, amount: &Amount) {
    if amount.is_zero() {
        return;
    }
    postings.amounts.entry(key).or_default().add(amount);
}

fn post_cells(postings: &mut Postings, ifindex: u32, delta: &InterfaceCells) {
    for direction in [Direction::Rx, Direction::Tx] {
        for (number, value) in delta.cells[direction as usize].iter().enumerate() {
            if value.bytes != 0 || value.frames != 0 {
                let key = CellKey {
                    ifindex,
                    direction,
                    cell: number,
                };
                let entry = postings.cells.entry(key).or_default();
                entry.0 += value.bytes.cast_signed();
                entry.1 += value.frames.cast_signed();
            }
        }
    }
}
