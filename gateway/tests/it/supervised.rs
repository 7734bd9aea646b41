//! What a service manager hears, by `examples/operations.toml`: over an upgrade it follows the
//! process that serves.

use std::{os::unix::net::UnixDatagram, time::Duration};

use crate::{echo::Echo, example::Example};

/// Ends a process that is nobody's child any more.
struct Successor(i32);

impl Drop for Successor {
    fn drop(&mut self) {
        // SAFETY: two integers; the process was started for this test and is not waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

#[test]
fn a_service_manager_hears_who_serves_and_that_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let heard = || {
        let mut bytes = [0; 256];
        let read = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    };
    let origin = Echo::start("origin");
    let example = xtask::host::workspace_root().join("gateway/examples/operations.toml");
    let text = std::fs::read_to_string(example).unwrap();
    let env = [("NOTIFY_SOCKET", path.as_path())];
    let mut gateway = Example::run_with(&text, &[origin.address], &env);
    let pid = gateway.pid();
    assert_eq!(heard(), format!("READY=1\nMAINPID={pid}"));

    let (done, said) = gateway.command("upgrade");
    assert!(done, "{said}: {}", gateway.log());
    let new = said.split(' ').nth(1).unwrap().parse().unwrap();
    let successor = Successor(new);
    assert_eq!(heard(), format!("READY=1\nMAINPID={new}"));
    assert!(gateway.wait_for_exit().success(), "{}", gateway.log());
    let answer = gateway.get("shop.example", "/after", &[]);
    assert_eq!(answer.status, 200, "the new process has the socket");

    // SAFETY: two integers; as above.
    assert_eq!(unsafe { libc::kill(successor.0, libc::SIGTERM) }, 0);
    assert_eq!(heard(), "STOPPING=1");
    gateway.wait_for("drained successor", || {
        gateway.log().matches("drained in").count() == 2
    });
}

#[test]
fn an_upgrade_that_fails_leaves_the_manager_with_the_process_that_serves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let origin = Echo::start("origin");
    let example = xtask::host::workspace_root().join("gateway/examples/operations.toml");
    let text = std::fs::read_to_string(example).unwrap();
    let env = [("NOTIFY_SOCKET", path.as_path())];
    let gateway = Example::run_with(&text, &[origin.address], &env);
    let mut bytes = [0; 256];
    socket.recv(&mut bytes).unwrap();
    let config = gateway.directory.path().join("edgemeter.toml");
    let written = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, written.replace("\"state\"", "\"other\"")).unwrap();
    let admin = edgemeter::config::Admin {
        listen: gateway.admin,
        token_file: gateway.directory.path().join("state/admin.token"),
    };
    let (status, said) = edgemeter::admin::client::ask(&admin, "POST", "/upgrade").unwrap();
    assert_eq!(status, 409, "{said}");
    assert!(said.contains("stop it and start this one"), "{said}");
    assert_eq!(gateway.get("shop.example", "/a", &[]).status, 200);
    socket.set_nonblocking(true).unwrap();
    assert!(
        socket.recv(&mut bytes).is_err(),
        "nothing was let go, so there is nothing to say"
    );
}
