//! Counters and claims in, committed postings out: exactly once, over failed commits, lost
//! answers, crashes and other writers.
//!
//! A commit can fail in three ways. It did not happen: the next tick posts from the old
//! watermarks. Nobody knows: before anything else is posted, the ledger is asked. The ledger is
//! not where we thought: its watermarks are read again, and they are right.

use std::collections::{BTreeMap, HashMap};

use super::{Fault, Ledger, LedgerError, Tick};
use crate::attribution::{Claim, ClaimKey, Counters, Postings, Regression, Watermarks, attribute};

/// Posts for one lifetime of the kernel maps.
pub struct Poster {
    ledger: Ledger,
    epoch: String,
    watermarks: Watermarks,
    /// Ticks committed.
    number: i64,
    /// Claims that no committed tick holds. Sums: bounded by owners times interfaces.
    claims: BTreeMap<ClaimKey, Claim>,
    uncertain: Option<Sent>,
    stale: bool,
}

/// A tick whose commit was not answered.
struct Sent {
    postings: Postings,
    claims: BTreeMap<ClaimKey, Claim>,
}

/// What a call did.
#[derive(Debug, Default)]
pub struct Posted {
    /// Committed, or learned to have been committed, in that order.
    pub postings: Vec<Postings>,
    /// Counters that went backwards.
    pub regressions: Vec<Regression>,
    /// What became of an unanswered commit before: whether it had happened.
    pub settled: Option<bool>,
    /// Why not all is posted; a later call makes up for it.
    pub failure: Option<LedgerError>,
}

impl Poster {
    /// Continues where the ledger stopped.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn resume(ledger: Ledger, epoch: &str) -> Result<Self, LedgerError> {
        let (number, watermarks) = ledger.resume(epoch)?;
        Ok(Self {
            ledger,
            epoch: epoch.to_owned(),
            watermarks,
            number,
            claims: BTreeMap::new(),
            uncertain: None,
            stale: false,
        })
    }

    /// Posts one tick. The claims must have been taken before the counters were read; they are
    /// kept here until they are committed, also when this fails.
    pub fn post(
        &mut self,
        counters: &Counters,
        claims: &[Claim],
        unix_seconds: i64,
        interfaces: &HashMap<u32, String>,
    ) -> Posted {
        for claim in claims {
            add(&mut self.claims, claim);
        }
        let mut posted = Posted::default();
        posted.failure = self
            .settle(&mut posted)
            .and_then(|()| self.append(counters, unix_seconds, interfaces, &mut posted))
            .err();
        posted
    }

    /// Another process may have posted: the ledger says where it stopped, before the next tick.
    pub fn look_again(&mut self) {
        self.stale = true;
    }

    fn append(
        &mut self,
        counters: &Counters,
        unix_seconds: i64,
        interfaces: &HashMap<u32, String>,
        posted: &mut Posted,
    ) -> Result<(), LedgerError> {
        let mut watermarks = self.watermarks.clone();
        let claims: Vec<Claim> = self.claims.values().copied().collect();
        let (postings, regressions) = attribute(&mut watermarks, counters, &claims);
        posted.regressions = regressions;
        let appended = self.ledger.append(&Tick {
            unix_seconds,
            epoch: &self.epoch,
            number: self.number,
            before: &self.watermarks,
            postings: &postings,
            watermarks: &watermarks,
            interfaces,
        });
        match appended {
            Ok(advanced) => {
                self.claims.clear();
                self.watermarks = watermarks;
                self.number += i64::from(advanced);
                posted.postings.push(postings);
                Ok(())
            }
            Err(error) => {
                match error.fault {
                    Fault::Uncertain => {
                        let claims = std::mem::take(&mut self.claims);
                        self.uncertain = Some(Sent { postings, claims });
                    }
                    Fault::Stale => self.stale = true,
                    _ => {}
                }
                Err(error)
            }
        }
    }

    /// Finds out what became of an unanswered commit, and reads a ledger that moved.
    fn settle(&mut self, posted: &mut Posted) -> Result<(), LedgerError> {
        if self.uncertain.is_none() && !self.stale {
            return Ok(());
        }
        let (number, watermarks) = self.ledger.resume(&self.epoch)?;
        let happened = number == self.number + 1;
        self.stale = false;
        self.number = number;
        self.watermarks = watermarks;
        let Some(sent) = self.uncertain.take() else {
            return Ok(());
        };
        posted.settled = Some(happened);
        if happened {
            posted.postings.push(sent.postings);
        } else {
            for claim in sent.claims.values() {
                add(&mut self.claims, claim);
            }
        }
        Ok(())
    }
}

fn add(claims: &mut BTreeMap<ClaimKey, Claim>, claim: &Claim) {
    let sum = claims.entry(claim.key).or_insert(Claim {
        bytes: 0,
        frames: 0,
        payload_bytes: 0,
        ..*claim
    });
    sum.bytes += claim.bytes;
    sum.frames += claim.frames;
    sum.payload_bytes += claim.payload_bytes;
}
