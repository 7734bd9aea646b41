//! Claims on their way from requests to the next tick: summed by owner, so that neither a queue
//! nor a loss is possible. Bounded by owners times interfaces.

use std::sync::{Mutex, PoisonError};

use ahash::HashMap;

use super::{Claim, ClaimKey};

/// The claims since the last tick.
#[derive(Debug, Default)]
pub struct Claims {
    sums: Mutex<HashMap<ClaimKey, [u64; 3]>>,
}

impl Claims {
    /// Adds a claim.
    pub fn add(&self, claim: Claim) {
        if claim.bytes == 0 {
            return;
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = sums.entry(claim.key).or_default();
        for (sum, more) in sum
            .iter_mut()
            .zip([claim.bytes, claim.frames, claim.payload_bytes])
        {
            *sum += more;
        }
    }

    /// Takes all claims; call before reading the counters.
    #[must_use]
    pub fn take(&self) -> Vec<Claim> {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.drain()
            .map(|(key, [bytes, frames, payload_bytes])| Claim {
                key,
                bytes,
                frames,
                payload_bytes,
            })
            .collect()
    }

    /// Puts back claims of a tick that could not be written.
    pub fn put_back(&self, claims: &[Claim]) {
        for claim in claims {
            self.add(*claim);
        }
    }
}
