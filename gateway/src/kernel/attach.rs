//! Programs onto interfaces: TCX links, pinned, replaced in place; clsact filters where the
//! kernel has no TCX.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
};
use flow_abi::name;

use super::{
    KernelError, PinDirectory, chain,
    devices::{Device, Framing},
    load_program, program_mut,
    syscall::{bpf, command},
};

/// Fixed, so that a later process finds and replaces our filter instead of adding one.
const CLSACT_PRIORITY: u16 = 50;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// How programs are put on interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX, or clsact where the kernel has no TCX (before 6.6).
    Auto,
    /// TCX only.
    Tcx,
    /// clsact only.
    Clsact,
}

/// One direction of one interface.
#[derive(Clone, Debug)]
pub struct AttachedLink {
    /// Interface name.
    pub interface: String,
    /// Its number in the maps: its index, in the gateway's own network namespace.
    pub ifindex: u32,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// `tcx` or `clsact`.
    pub mechanism: &'static str,
    /// True when an earlier process's program was replaced in place.
    pub replaced: bool,
}

pub(super) fn no_interface(interface: &str) -> KernelError {
    let known = interface_names().join(", ");
    KernelError::Attach {
        interface: interface.into(),
        reason: format!("there is no such interface (known: {known}); fix observe.interfaces"),
    }
}

/// Interfaces of the current network namespace (sysfs shows those of the mount's).
fn interface_names() -> Vec<String> {
    let mut names = Vec::new();
    // SAFETY: the array ends with a zero index and lives until it is freed below.
    unsafe {
        let first = libc::if_nameindex();
        let mut entry = first;
        while !entry.is_null() && (*entry).if_index != 0 {
            let name = std::ffi::CStr::from_ptr((*entry).if_name);
            names.push(name.to_string_lossy().into_owned());
            entry = entry.add(1);
        }
        if !first.is_null() {
            libc::if_freenameindex(first);
        }
    }
    names
}

/// Puts the programs on a device of the calling thread's network namespace. `pinned` is the
/// interface's name among the pins, `number` its number in the maps.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    device: &Device,
    pinned: &str,
    number: u32,
    mode: AttachMode,
    pins: Option<&PinDirectory>,
) -> Result<Vec<AttachedLink>, KernelError> {
    let (interface, index) = (device.name.as_str(), device.index);
    // What an earlier run under another `attach` left would count every frame a second time.
    match mode {
        AttachMode::Clsact => {
            for direction in ["ingress", "egress"] {
                if let Some(pins) = pins {
                    take_off(&pins.link(pinned, direction));
                }
            }
        }
        AttachMode::Tcx | AttachMode::Auto => {
            remove_clsact(interface);
            if let Some(pins) = pins {
                pins.unmark_clsact(pinned);
            }
        }
    }
    let mut links = Vec::new();
    let both = [TcAttachType::Ingress, TcAttachType::Egress];
    // On loopback what is sent is received: counted when it is sent, and never again.
    let wanted = match device.framing {
        Framing::Loopback => &both[1..],
        Framing::Ethernet | Framing::Bare(_) => &both[..],
    };
    if device.framing == Framing::Loopback
        && let Some(pins) = pins
    {
        take_off(&pins.link(pinned, "ingress"));
    }
    for attach_type in wanted.iter().copied() {
        let (direction, ethernet, bare) = match attach_type {
            TcAttachType::Ingress => ("ingress", name::INGRESS, name::INGRESS_BARE),
            _ => ("egress", name::EGRESS, name::EGRESS_BARE),
        };
        let program = match device.framing {
            Framing::Bare(_) => bare,
            Framing::Ethernet | Framing::Loopback => ethernet,
        };
        load_program(ebpf, program)?;
        let program = program_mut(ebpf, program)?;
        let pin = pins.map(|pins| pins.link(pinned, direction));
        let pin = pin.as_deref();
        let attached = match mode {
            AttachMode::Clsact => clsact(program, interface, attach_type, pinned, pins),
            AttachMode::Tcx => tcx(program, interface, index, direction, attach_type, pin),
            AttachMode::Auto => tcx(program, interface, index, direction, attach_type, pin)
                .or_else(|_| clsact(program, interface, attach_type, pinned, pins)),
        };
        let (mechanism, replaced) = attached.map_err(|reason| KernelError::Attach {
            interface: interface.into(),
            reason,
        })?;
        links.push(AttachedLink {
            interface: interface.into(),
            ifindex: number,
            direction,
            mechanism,
            replaced,
        });
    }
    Ok(links)
}

fn tcx(
    program: &mut SchedClassifier,
    interface: &str,
    ifindex: u32,
    direction: &str,
    attach_type: TcAttachType,
    pin: Option<&Path>,
) -> Result<(&'static str, bool), String> {
    if let Some(pin) = pin
        && pin.exists()
    {
        match replace(program, pin, ifindex) {
            Ok(()) => return Ok(("tcx", true)),
            Err(error) => {
                // The device was deleted and made again: its link is severed, the pin remains.
                log::warn!(
                    "{interface} {direction}: the pinned link is dead ({error}); attaching anew"
                );
                std::fs::remove_file(pin).map_err(|e| format!("{}: {e}", pin.display()))?;
            }
        }
    }
    // First: a program that ends the chain would hide every packet from those behind it.
    let id = program
        .attach_with_options(
            interface,
            attach_type,
            TcAttachOptions::TcxOrder(LinkOrder::first()),
        )
        .map_err(|error| chain(&error))?;
    if let Some(pin) = pin {
        let link = program.take_link(id).map_err(|error| chain(&error))?;
        let link: FdLink = link.try_into().map_err(|error| chain(&error))?;
        link.pin(pin).map_err(|error| chain(&error))?;
    }
    Ok(("tcx", false))
}

/// Swaps our program into an earlier process's link: no frame passes uncounted.
fn replace(program: &mut SchedClassifier, pin: &Path, ifindex: u32) -> Result<(), String> {
    let at = link_ifindex(pin).map_err(|error| error.to_string())?;
    if at != ifindex {
        return Err(format!("it is on interface number {at}, not {ifindex}"));
    }
    let old = PinnedLink::from_pin(pin).map_err(|error| chain(&error))?;
    let link = FdLink::from(old)
        .try_into()
        .map_err(|error: aya::programs::links::LinkError| chain(&error))?;
    let id = program
        .attach_to_link(link)
        .map_err(|error| chain(&error))?;
    // Keep the link out of the program's hands: dropping it would not detach a pinned link, but
    // holding its descriptor would let a later compromise of this process detach it.
    let _link = program.take_link(id).map_err(|error| chain(&error))?;
    Ok(())
}

/// Takes a pinned TCX link off its interface, if there is one, and its pin away. Without the pin alone
/// the kernel lets go of the link when it finds the time, and frames would be counted twice until then.
fn take_off(pin: &Path) {
    match pinned_link(pin) {
        Ok(link) => {
            if let Err(error) = detach(&link) {
                log::warn!("{}: cannot be detached at once: {error}", pin.display());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => log::warn!("{}: {error}", pin.display()),
    }
    let _ = std::fs::remove_file(pin);
}

/// The arm of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
    path_fd: u32,
    padding: u32,
}

/// The arm for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// `struct bpf_link_info`, its TCX arm.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    padding: u32,
    ifindex: u32,
    attach_type: u32,
}

fn pinned_link(pin: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
        path_fd: 0,
        padding: 0,
    };
    // SAFETY: the object arm of bpf_attr with a NUL-terminated path.
    let fd = unsafe { bpf(command::OBJ_GET, &mut attr) }?;
    // SAFETY: a descriptor the kernel has just given us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The interface a pinned TCX link is on; 0 when its device is gone. aya does not tell.
fn link_ifindex(pin: &Path) -> io::Result<u32> {
    let link = pinned_link(pin)?;
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        fd: link.as_raw_fd().unsigned_abs(),
        len: u32::try_from(size_of::<LinkInfo>()).unwrap_or(0),
        info: (&raw mut info) as u64,
    };
    // SAFETY: the info arm of bpf_attr; the kernel writes at most `len` bytes.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info.ifindex)
}

/// The link is off its interface when this returns.
fn detach(link: &OwnedFd) -> io::Result<()> {
    let mut link = link.as_raw_fd();
    // SAFETY: this arm of bpf_attr is the descriptor alone.
    unsafe { bpf(command::LINK_DETACH, &mut link) }.map(drop)
}

fn clsact(
    program: &mut SchedClassifier,
    interface: &str,
    attach_type: TcAttachType,
    pinned: &str,
    pins: Option<&PinDirectory>,
) -> Result<(&'static str, bool), String> {
    if let Some(pins) = pins {
        pins.mark_clsact(pinned)
            .map_err(|error| format!("cannot remember its clsact filters: {error}"))?;
    }
    match tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(chain(&error)),
    }
    let existing =
        SchedClassifierLink::attached(interface, attach_type, CLSACT_PRIORITY, CLSACT_HANDLE, None)
            .map_err(|error: io::Error| error.to_string())?;
    let (id, replaced) = match program.attach_to_link(existing) {
        Ok(id) => (id, true),
        Err(_) => {
            let options = NlOptions {
                priority: CLSACT_PRIORITY,
                handle: CLSACT_HANDLE,
                ..NlOptions::default()
            };
            let id = program
                .attach_with_options(interface, attach_type, TcAttachOptions::Netlink(options))
                .map_err(|error| chain(&error))?;
            (id, false)
        }
    };
    let link = program.take_link(id).map_err(|error| chain(&error))?;
    // Dropping it would remove the filter: it must outlive the process, as a pinned link does.
    std::mem::forget(link);
    Ok(("clsact", replaced))
}

/// Removes our clsact filters from an interface, for `edgemeter detach`.
pub fn remove_clsact(interface: &str) {
    for attach_type in [TcAttachType::Ingress, TcAttachType::Egress] {
        if let Ok(link) = SchedClassifierLink::attached(
            interface,
            attach_type,
            CLSACT_PRIORITY,
            CLSACT_HANDLE,
            None,
        ) {
            // Its Drop deletes the filter.
            drop(link);
        }
    }
}
