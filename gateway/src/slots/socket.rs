//! What is asked of the kernel about one socket or one flow.

use std::{io, net::IpAddr, os::fd::RawFd};

/// Payload bytes written to a TCP socket so far: what the peer has acknowledged plus what has not
/// been acknowledged yet. The program counts the same way (`bytes_acked + seq − snd_una`), so a
/// segment dropped on this host and sent again as new moves neither; `bytes_sent` would drift.
///
/// Two calls, between which an acknowledgement may come: repeated until none did. Nobody else
/// writes meanwhile, so the sum is then the offset.
pub(super) fn stream_offset(fd: RawFd, active: bool) -> io::Result<u64> {
    /// More acknowledgements than this in a row only on a socket that somebody else writes to.
    const TRIES: usize = 64;
    let mut acked = bytes_acked(fd)?;
    for _ in 0..TRIES {
        let mut unacknowledged: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the name TIOCOUTQ has for sockets) writes one int.
        if unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut unacknowledged) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let again = bytes_acked(fd)?;
        if again == acked {
            // The SYN of a connection the host opened is acknowledged too.
            let written = acked + u64::from(unacknowledged.unsigned_abs());
            return Ok(written.saturating_sub(u64::from(active)));
        }
        acked = again;
    }
    Err(io::Error::other("the socket does not hold still"))
}

/// `SO_COOKIE`; 0 when the kernel would not tell.
pub(super) fn socket_cookie(fd: RawFd) -> u64 {
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes of plain data.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { cookie } else { 0 }
}

/// The head of `struct tcp_info` (linux/tcp.h) up to the last field used.
#[repr(C)]
struct TcpInfo {
    before: [u32; 17],
    rtt_us: u32,
    between: [u32; 12],
    bytes_acked: u64,
}
const _: () = assert!(std::mem::offset_of!(TcpInfo, rtt_us) == 68);
const _: () = assert!(std::mem::offset_of!(TcpInfo, bytes_acked) == 120);

fn tcp_info(fd: RawFd) -> io::Result<TcpInfo> {
    let mut info = std::mem::MaybeUninit::<TcpInfo>::zeroed();
    let mut len = libc::socklen_t::try_from(size_of::<TcpInfo>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes of plain data.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, plain data.
    Ok(unsafe { info.assume_init() })
}

/// `tcpi_bytes_acked`: what the peer has acknowledged, the SYN of an opened connection included.
pub(crate) fn bytes_acked(fd: RawFd) -> io::Result<u64> {
    tcp_info(fd).map(|info| info.bytes_acked)
}

/// The smoothed round-trip time, microseconds: the handshake's until data has been acknowledged. 0
/// when it was not measured (a SYN or SYN-ACK had to be sent again).
pub(super) fn round_trip_us(fd: RawFd) -> u32 {
    tcp_info(fd).map_or(0, |info| info.rtt_us)
}

pub(super) fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
