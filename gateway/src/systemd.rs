//! What a service manager wants to hear (`sd_notify(3)`): that the gateway serves, that it ends,
//! and which process it is after an upgrade. Without `NOTIFY_SOCKET` nobody listens.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// This process serves: the service is up, and this is its main process from now on.
pub fn serving() {
    send(&format!("READY=1\nMAINPID={}", std::process::id()));
}

/// This process still is the main one: the one that was to take over did not come to it.
pub fn serving_still() {
    send(&format!("MAINPID={}", std::process::id()));
}

/// The service is on its way out.
pub fn stopping() {
    send("STOPPING=1");
}

fn send(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = (|| -> io::Result<()> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not read is not waited for.
        socket.set_nonblocking(true)?;
        socket.send_to_addr(state.as_bytes(), &address)?;
        Ok(())
    })();
    if let Err(error) = sent {
        log::warn!("NOTIFY_SOCKET {}: {error}", path.to_string_lossy());
    }
}
