//! Sums of postings: what reports and metrics are made of.

use std::collections::{BTreeMap, HashMap};

use flow_abi::{Direction, cell};

use crate::{
    attribution::{Amount, Postings},
    class::ClassId,
    owner::OwnerId,
};

/// All postings, summed by owner and by cell, per interface and direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balances {
    amounts: BTreeMap<(String, Direction, OwnerId, ClassId), Amount>,
    cells: BTreeMap<(String, Direction, usize), (i64, i64)>,
}

/// One owner's balance over all interfaces.
pub type RouteBalance = [Amount; 2];

/// One interface's bytes, both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceBalance {
    /// What the interface moved.
    pub total: i64,
    /// Posted to owners.
    pub owned: i64,
    /// In no account: non-IP, fragments, table full, …
    pub cells: i64,
}

impl InterfaceBalance {
    /// Parts minus whole: 0, always.
    #[must_use]
    pub fn difference(&self) -> i64 {
        self.owned + self.cells - self.total
    }
}

impl Balances {
    /// Adds a tick's postings.
    pub fn add(&mut self, postings: &Postings, interfaces: &HashMap<u32, String>) {
        let unnamed = String::from("(gone)");
        for (key, amount) in &postings.amounts {
            let name = interfaces.get(&key.ifindex).unwrap_or(&unnamed);
            self.add_amount(name, key.direction, key.owner, key.class, amount);
        }
        for (key, (bytes, frames)) in &postings.cells {
            let name = interfaces.get(&key.ifindex).unwrap_or(&unnamed);
            self.add_cell(name, key.direction, key.cell, *bytes, *frames);
        }
    }

    pub(super) fn add_amount(
        &mut self,
        interface: &str,
        direction: Direction,
        owner: OwnerId,
        class: ClassId,
        amount: &Amount,
    ) {
        self.amounts
            .entry((interface.to_owned(), direction, owner, class))
            .or_default()
            .add(amount);
    }

    pub(super) fn add_cell(
        &mut self,
        interface: &str,
        direction: Direction,
        number: usize,
        bytes: i64,
        frames: i64,
    ) {
        let sum = self
            .cells
            .entry((interface.to_owned(), direction, number))
            .or_default();
        sum.0 += bytes;
        sum.1 += frames;
    }

    /// Owners' balances: interface, direction, owner, amount. As many lines as an owner has
    /// classes.
    pub fn amounts(&self) -> impl Iterator<Item = (&str, Direction, OwnerId, &Amount)> {
        self.by_class()
            .map(|(interface, direction, owner, _, amount)| (interface, direction, owner, amount))
    }

    /// Owners' balances with the class of the remote addresses.
    pub fn by_class(&self) -> impl Iterator<Item = (&str, Direction, OwnerId, ClassId, &Amount)> {
        self.amounts
            .iter()
            .map(|((interface, direction, owner, class), amount)| {
                (interface.as_str(), *direction, *owner, *class, amount)
            })
    }

    /// Cells: interface, direction, cell number, bytes, frames.
    pub fn cells(&self) -> impl Iterator<Item = (&str, Direction, usize, i64, i64)> {
        self.cells
            .iter()
            .map(|((interface, direction, number), (bytes, frames))| {
                (interface.as_str(), *direction, *number, *bytes, *frames)
            })
    }

    /// Owners' balances over all interfaces, `[received, sent]`.
    #[must_use]
    pub fn by_owner(&self) -> BTreeMap<OwnerId, RouteBalance> {
        let mut sums: BTreeMap<OwnerId, RouteBalance> = BTreeMap::new();
        for (_, direction, owner, amount) in self.amounts() {
            sums.entry(owner).or_default()[direction as usize].add(amount);
        }
        sums
    }

    /// Owners and cells minus the total, per interface and direction: 0, always.
    #[must_use]
    pub fn differences(&self) -> BTreeMap<(String, Direction), i64> {
        let mut sums: BTreeMap<(String, Direction), i64> = BTreeMap::new();
        for (interface, direction, _, amount) in self.amounts() {
            *sums.entry((interface.to_owned(), direction)).or_default() += amount.wire_bytes;
        }
        for (interface, direction, number, bytes, _) in self.cells() {
            let sign = if number == cell::TOTAL { -1 } else { 1 };
            *sums.entry((interface.to_owned(), direction)).or_default() += sign * bytes;
        }
        sums
    }

    /// The conservation identity, per interface.
    #[must_use]
    pub fn by_interface(&self) -> BTreeMap<String, InterfaceBalance> {
        let mut sums: BTreeMap<String, InterfaceBalance> = BTreeMap::new();
        for (interface, _, _, amount) in self.amounts() {
            sums.entry(interface.to_owned()).or_default().owned += amount.wire_bytes;
        }
        for (interface, _, number, bytes, _) in self.cells() {
            let sum = sums.entry(interface.to_owned()).or_default();
            if number == cell::TOTAL {
                sum.total += bytes
            } else {
                sum.cells += bytes
            }
        }
        sums
    }
}
