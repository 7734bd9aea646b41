//! Frames made by hand, many flows of them, sent through the far end of the cable.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::netns::{GATEWAY_TO_CLIENT, Namespace};

/// Addresses for benchmarks (RFC 2544): 198.18.0.0/15.
pub(super) const SOURCES: &str = "198.18.0.0/15";
const SOURCE_BITS: u32 = 17;
const FIRST_PORT: u16 = 10_000;
/// Ethernet's minimum without the check sequence.
pub(super) const LENGTH: usize = 60;
const BATCH: u32 = 128;
const IP: usize = 14;
const L4: usize = 34;
/// UDP's header and what fills the frame.
const DATAGRAM: u16 = 26;

/// What the frames are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A UDP datagram of 18 bytes.
    Datagram,
    /// The first segment of a TCP connection.
    Syn,
}

/// One flow a number: 131,072 addresses a source port.
pub(super) fn frame(kind: Kind, number: u32, port: u16) -> [u8; LENGTH] {
    let source = u32::from(Ipv4Addr::new(198, 18, 0, 0)) | number & ((1 << SOURCE_BITS) - 1);
    let source_port = FIRST_PORT + u16::try_from(number >> SOURCE_BITS).unwrap_or(u16::MAX);
    let mut frame = [0u8; LENGTH];
    frame[..6].copy_from_slice(&GATEWAY_TO_CLIENT.mac);
    frame[6..12].copy_from_slice(&GATEWAY_TO_CLIENT.far_mac);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let (protocol, l4_len) = match kind {
        Kind::Datagram => (17u8, DATAGRAM),
        Kind::Syn => (6, 20),
    };
    let total = 20 + l4_len;
    frame[IP] = 0x45;
    frame[IP + 2..][..2].copy_from_slice(&total.to_be_bytes());
    frame[IP + 8] = 64;
    frame[IP + 9] = protocol;
    frame[IP + 12..][..4].copy_from_slice(&source.to_be_bytes());
    frame[IP + 16..][..4].copy_from_slice(&GATEWAY_TO_CLIENT.v4.octets());
    let sum = checksum(0, &frame[IP..L4]);
    frame[IP + 10..][..2].copy_from_slice(&sum.to_be_bytes());
    frame[L4..][..2].copy_from_slice(&source_port.to_be_bytes());
    frame[L4 + 2..][..2].copy_from_slice(&port.to_be_bytes());
    match kind {
        // Without a checksum, which IPv4 allows.
        Kind::Datagram => frame[L4 + 4..][..2].copy_from_slice(&l4_len.to_be_bytes()),
        Kind::Syn => {
            frame[L4 + 4..][..4].copy_from_slice(&number.to_be_bytes());
            frame[L4 + 12] = 5 << 4;
            frame[L4 + 13] = 2;
            frame[L4 + 14..][..2].copy_from_slice(&u16::MAX.to_be_bytes());
            let pseudo = u32::from(protocol) + u32::from(l4_len) + words(&frame[IP + 12..L4]);
            let sum = checksum(pseudo, &frame[L4..L4 + 20]);
            frame[L4 + 16..][..2].copy_from_slice(&sum.to_be_bytes());
        }
    }
    frame
}

fn words(bytes: &[u8]) -> u32 {
    bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum()
}

/// RFC 1071.
fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = start + words(bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

/// Sends one frame of each flow in the range from the client's end, at most so many a second;
/// returns how long it took.
pub(super) fn send(
    client: &Namespace,
    kind: Kind,
    flows: std::ops::Range<u32>,
    port: u16,
    a_second: Option<u32>,
) -> Result<Duration> {
    client.run(|| {
        let socket = packet_socket(GATEWAY_TO_CLIENT.far_device)?;
        let began = Instant::now();
        let mut sent = 0u32;
        let mut batch: Vec<[u8; LENGTH]> = Vec::new();
        for number in flows {
            batch.push(frame(kind, number, port));
            if batch.len() == BATCH as usize {
                send_batch(&socket, &batch)?;
                sent += BATCH;
                batch.clear();
                if let Some(rate) = a_second {
                    let due = Duration::from_micros(u64::from(sent) * 1_000_000 / u64::from(rate));
                    std::thread::sleep(due.saturating_sub(began.elapsed()));
                }
            }
        }
        send_batch(&socket, &batch)?;
        Ok(began.elapsed())
    })?
}

fn packet_socket(device: &str) -> Result<OwnedFd> {
    let name = std::ffi::CString::new(device)?;
    // SAFETY: socket takes integers; the descriptor is ours if it is one.
    let socket = unsafe {
        let raw = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        ensure!(raw >= 0, "a packet socket: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(raw)
    };
    // SAFETY: a zeroed sockaddr_ll is valid; the name is NUL-terminated.
    let (mut address, index) = unsafe {
        let address: libc::sockaddr_ll = std::mem::zeroed();
        (address, libc::if_nametoindex(name.as_ptr()))
    };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_ifindex = libc::c_int::try_from(index)?;
    ensure!(index != 0, "{device}: {}", io::Error::last_os_error());
    // SAFETY: the address is a sockaddr_ll of the length given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            u32::try_from(size_of_val(&address))?,
        )
    };
    ensure!(bound == 0, "binding: {}", io::Error::last_os_error());
    Ok(socket)
}

fn send_batch(socket: &OwnedFd, frames: &[[u8; LENGTH]]) -> Result<()> {
    let mut parts: Vec<libc::iovec> = frames
        .iter()
        .map(|frame| libc::iovec {
            iov_base: frame.as_ptr().cast_mut().cast(),
            iov_len: LENGTH,
        })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: a zeroed mmsghdr is valid.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    let mut done = 0;
    while done < messages.len() {
        let rest = &mut messages[done..];
        // SAFETY: the messages and the frames they point to outlive the call.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                rest.as_mut_ptr(),
                u32::try_from(rest.len())?,
                0,
            )
        };
        if sent < 0 {
            let error = io::Error::last_os_error();
            // The interface's queue is full: what is in it goes first.
            ensure!(
                error.raw_os_error() == Some(libc::ENOBUFS),
                "sending frames: {error}"
            );
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        done += usize::try_from(sent).context("a count")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_a_flow_of_its_own_with_right_checksums() {
        let mut tuples = std::collections::HashSet::new();
        for number in [0, 1, 131_071, 131_072, 1_000_000] {
            for kind in [Kind::Datagram, Kind::Syn] {
                let frame = frame(kind, number, 9);
                assert_eq!(checksum(0, &frame[IP..L4]), 0);
                assert!(tuples.insert(frame[23..38].to_vec()));
            }
            let syn = frame(Kind::Syn, number, 9);
            assert_eq!(
                checksum(6 + 20 + words(&syn[IP + 12..L4]), &syn[L4..L4 + 20]),
                0
            );
        }
    }
}
