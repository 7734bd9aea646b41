//! The gateway's integration tests. They use the real kernel and need root: without it they
//! fail and say so; nothing is skipped.

mod kernel;
mod packets;

/// Fails, never skips: a privileged test that did not run has proved nothing.
fn require_root() {
    // SAFETY: no arguments, no failure.
    let uid = unsafe { libc::geteuid() };
    assert!(uid == 0, "this test loads BPF programs and makes namespaces: run it as root");
}
