//! Which configuration is active, and which one to fall back to.
//!
//! Every accepted configuration is a revision. It begins as a candidate and becomes good by
//! serving without harm; a harmful one is rolled back to the newest good one before it, and
//! its content is not accepted again. Revision 0 is the empty configuration: always good.

use std::collections::BTreeMap;

/// A configuration's number; they only rise.
pub type Number = u64;

/// SHA-256 of a configuration's text.
pub type Digest = [u8; 32];

/// What became of a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Serving or superseded, not yet proved.
    Candidate,
    /// Served without harm.
    Good,
    /// Did harm.
    RolledBack,
}

impl Standing {
    /// The name stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Candidate => "candidate",
            Self::Good => "good",
            Self::RolledBack => "rolled_back",
        }
    }

    /// The standing of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Candidate, Self::Good, Self::RolledBack]
            .into_iter()
            .find(|standing| standing.as_str() == name)
    }
}

/// All revisions and the active one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    revisions: BTreeMap<Number, (Digest, Standing)>,
    active: Number,
}

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Rejected {
    /// It is the active one already.
    #[error("it is already active as revision {0}")]
    Active(Number),
    /// It did harm before.
    #[error("it is what revision {0} was, which did harm and was rolled back; change it")]
    Harmful(Number),
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

impl History {
    /// Only the empty revision 0.
    #[must_use]
    pub fn new() -> Self {
        Self {
            revisions: BTreeMap::from([(0, ([0; 32], Standing::Good))]),
            active: 0,
        }
    }

    /// As it was stored; what is missing is taken as rolled back to revision 0.
    #[must_use]
    pub fn restore(
        stored: impl IntoIterator<Item = (Number, Digest, Standing)>,
        active: Number,
    ) -> Self {
        let mut history = Self::new();
        history.revisions.extend(
            stored
                .into_iter()
                .map(|(number, digest, standing)| (number, (digest, standing))),
        );
        if history.revisions.contains_key(&active) {
            history.active = active;
        }
        history
    }

    /// The active revision.
    #[must_use]
    pub const fn active(&self) -> Number {
        self.active
    }

    /// What became of a revision.
    #[must_use]
    pub fn standing(&self, number: Number) -> Option<Standing> {
        self.revisions.get(&number).map(|(_, standing)| *standing)
    }

    /// Makes a configuration the active revision and returns its number.
    ///
    /// # Errors
    /// [`Rejected`], and nothing has changed.
    pub fn publish(&mut self, digest: Digest) -> Result<Number, Rejected> {
        let known = |standing| {
            self.revisions
                .iter()
                .find(|(_, (of, is))| *of == digest && *is == standing)
                .map(|(number, _)| *number)
        };
        if let Some(harmful) = known(Standing::RolledBack) {
            return Err(Rejected::Harmful(harmful));
        }
        if self
            .revisions
            .get(&self.active)
            .is_some_and(|(of, _)| *of == digest)
        {
            return Err(Rejected::Active(self.active));
        }
        let number = self.revisions.keys().next_back().map_or(1, |last| last + 1);
        self.revisions.insert(number, (digest, Standing::Candidate));
        self.active = number;
        Ok(number)
    }

    /// The active revision has proved itself.
    pub fn approve(&mut self) {
        if let Some((_, standing)) = self.revisions.get_mut(&self.active) {
            *standing = Standing::Good;
        }
    }

    /// Marks the active revision as harmful and falls back to the newest good one before
    /// it, whose number is returned. Revision 0 does no harm and stays.
    pub fn roll_back(&mut self) -> Number {
        if self.active != 0 {
            if let Some((_, standing)) = self.revisions.get_mut(&self.active) {
                *standing = Standing::RolledBack;
            }
            self.active = self
                .revisions
                .range(..self.active)
                .rev()
                .find(|(_, (_, standing))| *standing == Standing::Good)
                .map_or(0, |(number, _)| *number);
        }
        self.active
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harm_falls_back_over_candidates_to_the_last_good_one() {
        let mut history = History::new();
        assert_eq!(history.publish([1; 32]), Ok(1));
        history.approve();
        assert_eq!(history.publish([2; 32]), Ok(2));
        assert_eq!(history.publish([3; 32]), Ok(3));
        assert_eq!(history.roll_back(), 1, "2 was never proved");
        assert_eq!(history.standing(3), Some(Standing::RolledBack));
        assert_eq!(history.publish([3; 32]), Err(Rejected::Harmful(3)));
        assert_eq!(history.publish([1; 32]), Err(Rejected::Active(1)));
        assert_eq!(history.publish([4; 32]), Ok(4));
        assert_eq!(history.roll_back(), 1);
    }

    #[test]
    fn without_a_good_one_nothing_is_in_force() {
        let mut history = History::new();
        history.publish([1; 32]).unwrap();
        assert_eq!(history.roll_back(), 0);
        assert_eq!(history.roll_back(), 0, "and the empty one stays");
        assert_eq!(history.standing(0), Some(Standing::Good));
    }

    #[test]
    fn a_history_survives_storage() {
        let mut history = History::new();
        history.publish([1; 32]).unwrap();
        history.approve();
        history.publish([2; 32]).unwrap();
        history.roll_back();
        let stored: Vec<_> = history
            .revisions
            .iter()
            .map(|(&number, &(digest, standing))| (number, digest, standing))
            .collect();
        assert_eq!(History::restore(stored, history.active()), history);
        for standing in [Standing::Candidate, Standing::Good, Standing::RolledBack] {
            assert_eq!(Standing::parse(standing.as_str()), Some(standing));
        }
    }
}
