//! A client that does not take its answer. Socket buffers hide a trickle: a write can wait for
//! minutes on a slow but honest client, and an attacker's window opens by a few bytes at a time
//! for ever. The kernel knows what the client's host has acknowledged, so that is asked.

use std::{
    io,
    os::fd::RawFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Sleep;

use crate::slots::bytes_acked;

/// The rate is measured over this.
const WINDOW: Duration = Duration::from_secs(10);

/// Watches writes that have to wait.
#[derive(Default)]
pub struct SlowReader {
    blocked: Option<Blocked>,
}

struct Blocked {
    /// Acknowledged when this window began, bytes.
    acked: u64,
    until: Pin<Box<Sleep>>,
}

impl SlowReader {
    /// A write went through.
    pub fn wrote(&mut self) {
        self.blocked = None;
    }

    /// A write waits; Ready: for a client that has acknowledged fewer than `least_per_second` bytes
    /// a second over the last window, on a socket that closing will now reset. 0 waits for ever.
    ///
    /// # Errors
    /// The socket cannot be asked.
    pub fn poll_wait(
        &mut self,
        cx: &mut Context<'_>,
        socket: RawFd,
        least_per_second: u64,
    ) -> Poll<io::Result<()>> {
        if least_per_second == 0 {
            return Poll::Pending;
        }
        loop {
            let blocked = match &mut self.blocked {
                Some(blocked) => blocked,
                none => none.insert(Blocked {
                    acked: bytes_acked(socket)?,
                    until: Box::pin(tokio::time::sleep(WINDOW)),
                }),
            };
            ready!(blocked.until.as_mut().poll(cx));
            let taken = bytes_acked(socket)?.saturating_sub(blocked.acked);
            self.blocked = None;
            if taken < WINDOW.as_secs() * least_per_second {
                abort_on_close(socket)?;
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// What such a client has not taken goes away with the socket: an orderly close would leave
/// megabytes of it in the kernel, with nobody to pay for them, until the client has read it all.
fn abort_on_close(socket: RawFd) -> io::Result<()> {
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let length = libc::socklen_t::try_from(size_of::<libc::linger>()).map_err(io::Error::other)?;
    // SAFETY: the value is readable for the length given and copied before the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            std::ptr::from_ref(&at_once).cast(),
            length,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
