//! New owners on their way to the ledger, in a map of the kernel's: it lives as long as the counters
//! that bear their numbers do, and a write to it waits for nothing. No program reads it.

use std::{io, os::fd::AsFd as _};

use aya::maps::MapData;

use super::{KernelError, PinDirectory, array, batch};
use crate::owner::{Entry, Journal, StoreError};

/// The map's name, also that of its pin.
pub(super) const NAME: &str = "NEW_OWNERS";

/// Owners that can be new between two ticks, or while the ledger cannot be written.
const PLACES: u32 = 1024;

// SAFETY: bytes, of any value.
unsafe impl aya::Pod for Entry {}

/// The open map.
pub struct OwnerJournal(MapData);

impl OwnerJournal {
    /// The pinned map, made when there is none; one that nobody pins ends with this process.
    pub(super) fn open(pins: Option<&PinDirectory>) -> Result<Self, KernelError> {
        array::open::<Entry>(pins, NAME, PLACES).map(Self)
    }
}

impl Journal for OwnerJournal {
    fn places(&self) -> u32 {
        PLACES
    }

    fn write(&self, place: u32, entry: &Entry) -> Result<(), StoreError> {
        batch::put(self.0.fd().as_fd(), &place, entry).map_err(|error| refused(&error))
    }

    fn read(&self, place: u32) -> Result<Entry, StoreError> {
        let found = batch::look_up(self.0.fd().as_fd(), &place).map_err(|error| refused(&error))?;
        Ok(found.unwrap_or_default())
    }
}

fn refused(error: &io::Error) -> StoreError {
    StoreError(format!("BPF map {NAME}: {error}"))
}
