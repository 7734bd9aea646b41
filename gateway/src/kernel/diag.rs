//! TCP sockets as the kernel lists them (`sock_diag`, what `ss` asks): connections that were there
//! before our programs, which tell of new ones only.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use flow_abi::{Connection, connection::UNKNOWN};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const FAMILIES: [u8; 2] = [2, 10];
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;
/// `1 << state`: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING.
const STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << LISTEN | 1 << 11;
/// `INET_DIAG_INFO`: an attribute with `struct tcp_info`.
const INFO: u16 = 2;
const HEADER: usize = 16;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;

/// Every TCP connection of the calling thread's network namespace, as of now. When one was opened
/// is not known: `opened_ns` and the handshake are 0. One at a port that is listened on was accepted.
///
/// # Errors
/// What the kernel answered; without `inet_diag` there is no answer.
pub fn connections() -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    let mut listening = HashSet::new();
    for family in FAMILIES {
        dump(family, |message| {
            if let Some(connection) = parse(message) {
                if message[1] == LISTEN {
                    listening.insert(connection.local_port);
                } else {
                    found.push(connection);
                }
            }
        })?;
    }
    for connection in &mut found {
        connection.active = u32::from(!listening.contains(&connection.local_port));
    }
    Ok(found)
}

fn dump(family: u8, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    const NETLINK_SOCK_DIAG: libc::c_int = 4;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: three integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel has just given us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // `struct nlmsghdr`, then `struct inet_diag_req_v2`.
    let mut request = Vec::new();
    request.extend(72u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    request.extend(u16::try_from(flags).unwrap_or(0).to_ne_bytes());
    request.extend([0; 8]);
    // TCP, and in the answer what bit INFO - 1 asks for.
    request.extend([family, 6, 0b10, 0]);
    request.extend(STATES.to_ne_bytes());
    request.resize(72, 0);
    // SAFETY: the request's own length.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut space = vec![0u8; 64 * 1024];
    loop {
        // SAFETY: the buffer's own length.
        let read = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                space.as_mut_ptr().cast(),
                space.len(),
                0,
            )
        };
        let Ok(read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        let mut rest = &space[..read];
        while let Some(length) = word(rest, 0).map(|length| length as usize) {
            if length < HEADER || length > rest.len() {
                break;
            }
            match u16_at(rest, 4).map(i32::from) {
                Some(libc::NLMSG_DONE) => return Ok(()),
                Some(libc::NLMSG_ERROR) => {
                    let code = word(rest, HEADER).unwrap_or(0).cast_signed();
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => visit(&rest[HEADER..length]),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn parse(message: &[u8]) -> Option<Connection> {
    if message.len() < MESSAGE {
        return None;
    }
    let address = |at: usize| -> Option<[u8; 16]> {
        let bytes: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
        if message[0] == FAMILIES[0] {
            let v4: [u8; 4] = bytes[..4].try_into().ok()?;
            return Some(std::net::Ipv4Addr::from(v4).to_ipv6_mapped().octets());
        }
        Some(bytes)
    };
    let port = |at: usize| {
        Some(u16::from_be_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let mut connection = Connection {
        cookie: u64::from(word(message, 44)?) | u64::from(word(message, 48)?) << 32,
        state: u32::from(message[1]),
        last_state: u32::from(message[1]),
        local_port: port(4)?,
        remote_port: port(6)?,
        local: address(8)?,
        remote: address(24)?,
        lost: UNKNOWN,
        out_of_order: UNKNOWN,
        ..Connection::default()
    };
    let mut rest = &message[MESSAGE..];
    while let Some(length) = u16_at(rest, 0).map(usize::from) {
        if length < 4 || length > rest.len() {
            break;
        }
        if u16_at(rest, 2) == Some(INFO) {
            measure(&mut connection, &rest[4..length]);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(connection)
}

/// `struct tcp_info`; an older kernel's is shorter.
fn measure(connection: &mut Connection, info: &[u8]) {
    let long = |at: usize| {
        let low = word(info, at).map(u64::from);
        let high = word(info, at + 4).map(u64::from);
        low.zip(high).map_or(0, |(low, high)| low | high << 32)
    };
    connection.srtt_us = word(info, 68).unwrap_or(0);
    connection.retransmits = word(info, 100).unwrap_or(0);
    connection.bytes_acked = long(120);
    connection.bytes_received = long(128);
    connection.segments_out = word(info, 136).unwrap_or(0);
    connection.segments_in = word(info, 140).unwrap_or(0);
    let min = word(info, 148).unwrap_or(u32::MAX);
    connection.min_rtt_us = if min == u32::MAX { 0 } else { min };
}

/// In the machine's byte order. A long's lower half comes first: the programs are built for
/// little-endian machines only.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
