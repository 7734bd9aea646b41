//! New owners on their way to the ledger, in a map of the kernel's: it lives as long as the counters
//! that bear their numbers do, and a write to it waits for nothing. No program reads it.

use std::{
    io,
    os::fd::{AsFd as _, FromRawFd as _, OwnedFd},
};

use aya::maps::{MapData, MapType};

use super::{KernelError, PinDirectory, batch, map_error};
use crate::owner::{Entry, Journal, StoreError};

/// The map's name, also that of its pin.
pub(super) const NAME: &str = "NEW_OWNERS";

/// Owners that can be new between two ticks, or while the ledger cannot be written.
const PLACES: u32 = 1024;

const BPF_MAP_CREATE: libc::c_int = 0;

// SAFETY: bytes, of any value.
unsafe impl aya::Pod for Entry {}

/// The open map.
pub struct OwnerJournal(MapData);

impl OwnerJournal {
    /// The pinned map, made when there is none; one that nobody pins ends with this process.
    pub(super) fn open(pins: Option<&PinDirectory>) -> Result<Self, KernelError> {
        let pin = pins.map(|pins| pins.map(NAME));
        if let Some(pin) = pin.as_ref().filter(|pin| pin.exists()) {
            let data = MapData::from_pin(pin).map_err(|error| map_error(NAME, error))?;
            return Ok(Self(data));
        }
        let made = create().map_err(|error| map_error(NAME, error))?;
        let data = MapData::from_fd(made).map_err(|error| map_error(NAME, error))?;
        if let Some(pin) = pin {
            data.pin(pin).map_err(|error| map_error(NAME, error))?;
        }
        Ok(Self(data))
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

/// `union bpf_attr`, the arm of map creation.
#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

fn create() -> io::Result<OwnedFd> {
    let mut attr = CreateAttr {
        map_type: MapType::Array as u32,
        key_size: 4,
        value_size: u32::try_from(size_of::<Entry>()).map_err(io::Error::other)?,
        max_entries: PLACES,
        ..CreateAttr::default()
    };
    attr.map_name[..NAME.len()].copy_from_slice(NAME.as_bytes());
    // SAFETY: this is the creation arm of bpf_attr, and the rest of the union is absent.
    let made = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_CREATE,
            &raw mut attr,
            size_of::<CreateAttr>(),
        )
    };
    let made = i32::try_from(made).map_err(io::Error::other)?;
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel has just given us.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}
