//! Arrays of the gateway's own, which no program reads: what must outlive a kill of this process, and
//! no longer than the counters it is about.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd},
};

use aya::maps::{MapData, MapType};

use super::{
    KernelError, PinDirectory, map_error,
    syscall::{bpf, command},
};

/// The pinned array, made when there is none; one that nobody pins ends with this process.
pub(super) fn open<V: aya::Pod>(
    pins: Option<&PinDirectory>,
    name: &'static str,
    entries: u32,
) -> Result<MapData, KernelError> {
    let pin = pins.map(|pins| pins.map(name));
    if let Some(pin) = pin.as_ref().filter(|pin| pin.exists()) {
        return MapData::from_pin(pin).map_err(|error| map_error(name, error));
    }
    let made = create(name, size_of::<V>(), entries).map_err(|error| map_error(name, error))?;
    let data = MapData::from_fd(made).map_err(|error| map_error(name, error))?;
    if let Some(pin) = pin {
        data.pin(pin).map_err(|error| map_error(name, error))?;
    }
    Ok(data)
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

fn create(name: &str, value_size: usize, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = CreateAttr {
        map_type: MapType::Array as u32,
        key_size: 4,
        value_size: u32::try_from(value_size).map_err(io::Error::other)?,
        max_entries: entries,
        ..CreateAttr::default()
    };
    // The last byte stays zero.
    for (to, from) in attr.map_name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: this is the creation arm of bpf_attr, and the rest of the union is absent.
    let made = unsafe { bpf(command::MAP_CREATE, &mut attr) }?;
    // SAFETY: a descriptor the kernel has just given us.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}
