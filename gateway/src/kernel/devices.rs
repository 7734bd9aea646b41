//! The network devices of a network namespace, and when they change: rtnetlink.
//!
//! Notifications only wake: what there is, is asked for anew each time. So none can be missed,
//! also when the socket overflowed.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

/// Larger than any message of a dump, which the kernel keeps below 32 KiB.
const BUFFER: usize = 1 << 16;
const HEADER: usize = 16;
/// `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINK_NETNSID: u16 = 37;
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;

/// What precedes the IP header in a device's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// An Ethernet header, and every frame is both sent and received.
    Loopback,
    /// Nothing: tun, WireGuard, IP in IP, GRE. With the link type, `ARPHRD_*`.
    Bare(u16),
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Interface index, unique in its namespace as long as the namespace lives.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What its frames begin with.
    pub framing: Framing,
    /// The bridge, bond, team or VRF it is a port of.
    pub master: Option<u32>,
    /// The device it is stacked on and shares frames with (VLAN, macvlan, ipvlan, macsec).
    pub lower: Option<u32>,
}

/// A netlink socket in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Subscribes to changes of links.
    ///
    /// # Errors
    /// The kernel has no rtnetlink, or no descriptor is left.
    pub fn open() -> io::Result<Self> {
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, flags, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor the kernel has just given us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain data, valid when zeroed.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or(0);
        address.nl_groups = u32::try_from(libc::RTMGRP_LINK).unwrap_or(0);
        let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or(0);
        // SAFETY: an open socket and an address of the given length.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Waits for a change, for at most `timeout`. True when there was one.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd with an open descriptor.
        match unsafe { libc::poll(&raw mut poll, 1, milliseconds) } {
            0 => return Ok(false),
            result if result < 0 => {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::Interrupted => Ok(false),
                    _ => Err(error),
                };
            }
            _ => {}
        }
        let mut buffer = vec![0; BUFFER];
        // Empty it: one look at the devices answers all of them. ENOBUFS is a change as well.
        while self.receive(&mut buffer, libc::MSG_DONTWAIT).is_ok() {}
        Ok(true)
    }

    fn receive(&self, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
        // SAFETY: a buffer of the given length.
        let got = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                flags,
            )
        };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

/// The devices of the calling thread's network namespace.
///
/// # Errors
/// The kernel did not answer.
pub fn devices() -> io::Result<Vec<Device>> {
    let netlink = Netlink::open()?;
    // struct nlmsghdr, struct ifinfomsg.
    let mut request = Vec::with_capacity(HEADER + LINK_HEADER);
    request.extend(32u32.to_ne_bytes());
    request.extend(libc::RTM_GETLINK.to_ne_bytes());
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).unwrap_or(0);
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8 + LINK_HEADER]);
    // SAFETY: a buffer of the given length.
    let sent = unsafe {
        libc::send(
            netlink.0.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut devices = Vec::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let got = netlink.receive(&mut buffer, 0)?;
        if read_messages(&buffer[..got], &mut devices)? {
            devices.sort_by_key(|device: &Device| device.index);
            devices.dedup_by_key(|device| device.index);
            return Ok(devices);
        }
    }
}

/// True at the end of the dump.
fn read_messages(mut bytes: &[u8], devices: &mut Vec<Device>) -> io::Result<bool> {
    const DONE: u16 = 3;
    const ERROR: u16 = 2;
    while bytes.len() >= HEADER {
        let length = usize::try_from(u32_at(bytes, 0)).unwrap_or(0);
        if length < HEADER || length > bytes.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match u16_at(bytes, 4) {
            DONE => return Ok(true),
            ERROR => {
                let code = i32::from_ne_bytes(u32_at(bytes, HEADER).to_ne_bytes());
                return Err(io::Error::from_raw_os_error(-code));
            }
            libc::RTM_NEWLINK => devices.extend(device(&bytes[HEADER..length])),
            _ => {}
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(false)
}

fn device(message: &[u8]) -> Option<Device> {
    let attributes = message.get(LINK_HEADER..)?;
    let (mut name, mut link, mut master, mut elsewhere, mut kind) = (None, None, None, false, "");
    for (number, value) in attributes_of(attributes) {
        match number {
            IFLA_IFNAME => name = text(value),
            IFLA_LINK if value.len() >= 4 => link = Some(u32_at(value, 0)),
            IFLA_MASTER if value.len() >= 4 => master = Some(u32_at(value, 0)),
            IFLA_LINK_NETNSID => elsewhere = true,
            IFLA_LINKINFO => {
                kind = attributes_of(value)
                    .find(|(number, _)| *number == IFLA_INFO_KIND)
                    .and_then(|(_, value)| text(value))
                    .unwrap_or("");
            }
            _ => {}
        }
    }
    // A veth's link is its other end, a tunnel's is what carries it inside other frames: only
    // these send their own frames through the lower device.
    let shares_frames = matches!(kind, "vlan" | "macvlan" | "ipvlan" | "macsec") && !elsewhere;
    Some(Device {
        index: u32_at(message, 4),
        name: name?.to_owned(),
        framing: match u16_at(message, 2) {
            libc::ARPHRD_ETHER => Framing::Ethernet,
            libc::ARPHRD_LOOPBACK => Framing::Loopback,
            other => Framing::Bare(other),
        },
        master: master.filter(|index| *index != 0),
        lower: link.filter(|index| shares_frames && *index != 0),
    })
}

fn attributes_of(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes.get(..4)?, 0));
        let value = bytes.get(4..length)?;
        let number = u16_at(bytes, 2) & TYPE_MASK;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((number, value))
    })
}

fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value)
        .ok()
        .map(|text| text.trim_end_matches('\0'))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there_and_told_from_the_rest() {
        let devices = devices().unwrap();
        let loopback = devices.iter().find(|device| device.name == "lo").unwrap();
        assert_eq!((loopback.index, loopback.framing), (1, Framing::Loopback));
    }

    #[test]
    fn a_damaged_answer_is_an_error_or_ignored() {
        let mut devices = Vec::new();
        assert!(read_messages(&[0; 16], &mut devices).is_err());
        assert!(read_messages(&[255; 16], &mut devices).is_err());
        assert!(!read_messages(&[], &mut devices).unwrap());
        assert_eq!(device(&[0; 16]), None, "no name");
        assert_eq!(
            attributes_of(&[3, 0, 1, 0]).count(),
            0,
            "shorter than its head"
        );
    }
}
