//! The compiled TC programs: committed, embedded, replaceable for tests.

use std::{borrow::Cow, io};

/// The committed object, built by `cargo xtask build-ebpf`.
static EMBEDDED: &[u8] = aya::include_bytes_aligned!("../../../ebpf/flow-tc.bpf.o");

/// Names a file to load instead of the embedded object: how CI tests an object that was rebuilt
/// with another compiler.
pub const OBJECT_VARIABLE: &str = "EDGEMETER_BPF_OBJECT";

/// The object's bytes.
///
/// # Errors
/// [`OBJECT_VARIABLE`] is set and its file cannot be read.
pub fn bytes() -> io::Result<Cow<'static, [u8]>> {
    match std::env::var_os(OBJECT_VARIABLE) {
        None => Ok(Cow::Borrowed(EMBEDDED)),
        Some(path) => std::fs::read(path).map(Cow::Owned),
    }
}
