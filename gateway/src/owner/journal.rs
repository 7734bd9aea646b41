//! Owners that are numbered and not stored yet, kept where a kill of this process does not reach
//! them: in a map of the kernel's, beside the counters that bear the numbers.

use super::{Leg, Owner, OwnerId, OwnerKind, Quality, StoreError};

/// A place's bytes: the number, then words and names, each ended by a zero; all zero when free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Entry {
    bytes: [u8; Entry::BYTES],
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            bytes: [0; Self::BYTES],
        }
    }
}

impl Entry {
    /// Room for four names of the longest kind ([`crate::config::Name::LENGTH_MAX`]).
    pub const BYTES: usize = 384;

    /// None when its names do not fit.
    #[must_use]
    pub fn of(id: OwnerId, owner: &Owner) -> Option<Self> {
        let mut entry = Self::default();
        let (number, mut rest) = entry.bytes.split_at_mut(size_of::<u32>());
        number.copy_from_slice(&id.0.to_le_bytes());
        for word in [
            owner.kind.as_str(),
            owner.leg.as_str(),
            owner.quality.as_str(),
            &owner.endpoint,
            &owner.route,
            &owner.service,
            &owner.tenant,
        ] {
            // One more, for the zero.
            let (here, after) = rest.split_at_mut_checked(word.len() + 1)?;
            here[..word.len()].copy_from_slice(word.as_bytes());
            rest = after;
        }
        Some(entry)
    }

    /// What is in it, if anything is.
    #[must_use]
    pub fn owner(&self) -> Option<(OwnerId, Owner)> {
        let (number, rest) = self.bytes.split_first_chunk()?;
        let id = OwnerId(u32::from_le_bytes(*number));
        let mut words = rest.split(|byte| *byte == 0).map(str::from_utf8);
        let mut word = || words.next()?.ok();
        let owner = Owner {
            kind: OwnerKind::from_word(word()?)?,
            leg: Leg::from_word(word()?)?,
            quality: Quality::from_word(word()?)?,
            endpoint: word()?.to_owned(),
            route: word()?.to_owned(),
            service: word()?.to_owned(),
            tenant: word()?.to_owned(),
        };
        (id != OwnerId::FOREIGN).then_some((id, owner))
    }
}

/// Places for [`Entry`]s that live as long as the kernel's counters. Nothing here waits.
pub trait Journal: Send + Sync {
    /// How many.
    fn places(&self) -> u32;

    /// Whole, or not at all, also when this process is killed meanwhile.
    ///
    /// # Errors
    /// The kernel refused it.
    fn write(&self, place: u32, entry: &Entry) -> Result<(), StoreError>;

    /// What is there.
    ///
    /// # Errors
    /// The kernel refused it.
    fn read(&self, place: u32) -> Result<Entry, StoreError>;

    /// Frees a place.
    ///
    /// # Errors
    /// The kernel refused it.
    fn clear(&self, place: u32) -> Result<(), StoreError> {
        self.write(place, &Entry::default())
    }

    /// What an earlier process left.
    ///
    /// # Errors
    /// The kernel refused it.
    fn left(&self) -> Result<Vec<(OwnerId, Owner)>, StoreError> {
        let mut left = Vec::new();
        for place in 0..self.places() {
            left.extend(self.read(place)?.owner());
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_comes_back_as_it_was() {
        let name = "n".repeat(crate::config::Name::LENGTH_MAX);
        let owner = Owner {
            kind: OwnerKind::Overhead,
            leg: Leg::Upstream,
            quality: Quality::Estimated,
            endpoint: name.clone(),
            route: name.clone(),
            service: name.clone(),
            tenant: name,
        };
        let entry = Entry::of(OwnerId(7), &owner).unwrap();
        assert_eq!(entry.owner(), Some((OwnerId(7), owner)));
        assert_eq!(
            Entry::of(
                OwnerId(9),
                &Owner::connection(OwnerKind::Route, Leg::Client, "a")
            )
            .unwrap()
            .owner()
            .unwrap()
            .1
            .tenant,
            ""
        );
        assert_eq!(Entry::default().owner(), None);
    }
}
