//! What attribution is told, by the kernel side and by the proxy. Both import this; neither
//! imports the other.

use std::collections::HashMap;

use flow_abi::{Account, AccountKey, InterfaceCells};

use super::Amount;
use crate::{class::ClassId, owner::OwnerId};

/// Cumulative kernel counters.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// By owner and interface.
    pub accounts: HashMap<AccountKey, Account>,
    /// By interface.
    pub interfaces: HashMap<u32, InterfaceCells>,
}

/// Between which owners, on which interface, received bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimKey {
    /// The unclaimed owner the kernel credited.
    pub from: OwnerId,
    /// The request's owner.
    pub to: OwnerId,
    /// Interface index.
    pub ifindex: u32,
    /// Class of the connection's remote address.
    pub class: ClassId,
}

/// Received bytes whose owner became known after they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Between whom.
    pub key: ClaimKey,
    /// Wire bytes.
    pub bytes: u64,
    /// Frames.
    pub frames: u64,
    /// Layer-4 payload bytes.
    pub payload_bytes: u64,
}

impl Claim {
    pub(super) fn amount(&self) -> Amount {
        Amount {
            wire_bytes: self.bytes.cast_signed(),
            frames: self.frames.cast_signed(),
            l4_payload_bytes: self.payload_bytes.cast_signed(),
            ..Amount::default()
        }
    }
}
