//! Group buys, pure: several customers together get a price that one does not.
//!
//! ```text
//!            last place paid ──► succeeded
//!  forming ──┤
//!            deadline        ──► failed: what was paid goes back
//! ```
//!
//! Joining holds a place until the order's deadline; paying keeps it, and a place that was
//! not paid in time is free again. A payment that comes after the place or the group is gone
//! is refunded, once. No clock here: time is an argument.

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::catalogue::Sku;
use crate::money::Money;
use crate::row;
use crate::store::sql::{Field, Param, Row, SqlError};

/// Smallest group.
pub const SIZE_MIN: u32 = 2;
/// Largest group.
pub const SIZE_MAX: u32 = 100;

/// What a group of a size gets, from the campaign file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What is bought.
    pub sku: Sku,
    /// Members needed.
    pub size: u32,
    /// What each pays for one unit.
    pub unit_price: Money,
    /// Milliseconds a group may take to fill.
    pub forming_ms: i64,
    /// Milliseconds a place is held for its payment.
    pub hold_ms: i64,
}

/// Where a group is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Places are left or unpaid.
    Forming,
    /// Every place was paid.
    Succeeded,
    /// The deadline came first.
    Failed,
}

impl State {
    /// The name stored and shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forming => "forming",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }

    /// The state of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Forming, Self::Succeeded, Self::Failed]
            .into_iter()
            .find(|state| state.as_str() == name)
    }
}

impl Field for State {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(self.as_str().into()));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::parse(&String::load(row)?).ok_or(SqlError::Column("a group's state"))
    }
}

row! {
    /// A group that buys together.
    pub struct Group in "buying_group" {
        /// Its identity.
        pub id: Uuid ["id"],
        /// What is bought.
        pub sku: Sku ["sku"],
        /// Members needed.
        pub size: u32 ["size"],
        /// What each pays for one unit.
        pub unit_price: Money ["unit_price_minor", "currency"],
        /// Its state.
        pub state: State ["state"],
        /// Places held or paid.
        pub taken: u32 ["taken"],
        /// Places paid.
        pub paid: u32 ["paid"],
        /// Counts changes, from 1; the entity tag.
        pub version: i64 ["version"],
        /// Milliseconds since the Unix epoch.
        pub opened_at_ms: i64 ["opened_at_ms"],
        /// When it fails unless it has succeeded.
        pub deadline_ms: i64 ["deadline_ms"],
    }
}

impl Group {
    /// A new group of an offer, without members.
    #[must_use]
    pub fn open(offer: &Offer, id: Uuid, now_ms: i64) -> Self {
        let counts = Counts::open(offer.size, now_ms.saturating_add(offer.forming_ms));
        Self {
            id,
            sku: offer.sku.clone(),
            size: counts.size,
            unit_price: offer.unit_price,
            state: counts.state,
            taken: counts.taken,
            paid: counts.paid,
            version: counts.version,
            opened_at_ms: now_ms,
            deadline_ms: counts.deadline_ms,
        }
    }

    /// Its counts.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        Counts {
            size: self.size,
            taken: self.taken,
            paid: self.paid,
            state: self.state,
            version: self.version,
            deadline_ms: self.deadline_ms,
        }
    }
}

/// A group's counts. Every change raises the version, which orders what watchers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Members needed.
    pub size: u32,
    /// Places held or paid.
    pub taken: u32,
    /// Places paid.
    pub paid: u32,
    /// Its state.
    pub state: State,
    /// Counts changes, from 1.
    pub version: i64,
    /// When it fails unless it has succeeded.
    pub deadline_ms: i64,
}

/// Why nobody can join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// Every place is held or paid.
    Full,
    /// It is over, or its deadline has come.
    Over,
}

/// What a payment did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paid {
    /// The place is kept.
    Kept,
    /// It was the last: the group has succeeded.
    Completed,
    /// Too late: the money goes back.
    Late,
}

impl Counts {
    /// A new group.
    #[must_use]
    pub const fn open(size: u32, deadline_ms: i64) -> Self {
        Self {
            size,
            taken: 0,
            paid: 0,
            state: State::Forming,
            version: 1,
            deadline_ms,
        }
    }

    /// Places nobody holds; none when it is over.
    #[must_use]
    pub const fn places_left(&self, now_ms: i64) -> u32 {
        if matches!(self.state, State::Forming) && now_ms < self.deadline_ms {
            self.size.saturating_sub(self.taken)
        } else {
            0
        }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// [`Full`], and nothing has changed.
    pub fn join(&mut self, now_ms: i64) -> Result<(), Full> {
        if self.state != State::Forming || now_ms >= self.deadline_ms {
            return Err(Full::Over);
        }
        if self.taken >= self.size {
            return Err(Full::Full);
        }
        self.taken += 1;
        self.version += 1;
        Ok(())
    }

    /// A held place was paid. `held` says whether it still was.
    pub fn pay(&mut self, held: bool) -> Paid {
        if !held || self.state != State::Forming {
            return Paid::Late;
        }
        self.paid += 1;
        self.version += 1;
        if self.paid < self.size {
            return Paid::Kept;
        }
        self.state = State::Succeeded;
        Paid::Completed
    }

    /// A held place was given up or its time ran out.
    pub fn release(&mut self) {
        if self.state == State::Forming {
            self.taken = self.taken.saturating_sub(1);
            self.version += 1;
        }
    }

    /// The deadline's effect; whether there was one.
    pub fn expire(&mut self, now_ms: i64) -> bool {
        let due = self.state == State::Forming && now_ms >= self.deadline_ms;
        if due {
            self.state = State::Failed;
            self.version += 1;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn the_last_payment_completes_the_group() {
        let mut group = Counts::open(2, 100);
        group.join(0).unwrap();
        group.join(0).unwrap();
        assert_eq!(group.join(0), Err(Full::Full));
        assert_eq!(group.pay(true), Paid::Kept);
        assert_eq!(group.pay(true), Paid::Completed);
        assert_eq!(group.state, State::Succeeded);
        assert!(!group.expire(1_000), "success is final");
    }

    #[test]
    fn a_place_not_paid_is_free_again() {
        let mut group = Counts::open(2, 100);
        group.join(0).unwrap();
        group.join(0).unwrap();
        group.release();
        assert_eq!(group.places_left(0), 1);
        assert_eq!(group.join(0), Ok(()));
    }

    #[test]
    fn the_deadline_is_exact_and_what_comes_later_goes_back() {
        let mut group = Counts::open(2, 100);
        group.join(99).unwrap();
        assert_eq!(group.join(100), Err(Full::Over));
        assert_eq!(group.places_left(100), 0);
        assert!(!group.expire(99));
        assert!(group.expire(100));
        assert_eq!(group.state, State::Failed);
        assert_eq!(group.pay(true), Paid::Late);
        assert_eq!(Counts::open(2, 1).pay(false), Paid::Late);
    }

    proptest! {
        /// Any sequence of events: places are never oversold, what is over stays over, and
        /// every change has a version of its own.
        #[test]
        fn no_sequence_oversells_a_place(size in SIZE_MIN..6, steps in proptest::collection::vec((0_u8..4, any::<bool>()), 0..60)) {
            let mut group = Counts::open(size, 50);
            let mut held = 0_u32;
            for (at, (step, late)) in steps.into_iter().enumerate() {
                let now = i64::try_from(at).unwrap();
                let before = group;
                match step {
                    0 => if group.join(now).is_ok() { held += 1; },
                    1 => {
                        let outcome = group.pay(held > 0 && !late);
                        if outcome != Paid::Late { held -= 1; }
                    }
                    2 => if held > 0 && group.state == State::Forming { group.release(); held -= 1; },
                    _ => { group.expire(now); }
                }
                prop_assert!(group.paid <= group.taken && group.taken <= group.size);
                if group.state == State::Forming {
                    prop_assert_eq!(group.taken, group.paid + held);
                }
                prop_assert_eq!(group != before, group.version > before.version);
                if before.state != State::Forming {
                    prop_assert_eq!(group, before);
                }
            }
        }
    }
}
