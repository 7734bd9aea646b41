//! edgemeter as a peer among peers: the release build, and its configuration for the bench.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::peers::port;
use super::site::Site;
use crate::host;
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE};

/// Builds what users run, unless there is a program to measure already.
pub(super) fn build_or(binary: Option<&Path>) -> Result<PathBuf> {
    if let Some(binary) = binary {
        return std::fs::canonicalize(binary).with_context(|| binary.display().to_string());
    }
    host::run(host::cargo().args(["build", "--locked", "--release", "--package", "edgemeter"]))?;
    Ok(host::target_directory().join("release/edgemeter"))
}

/// The package's version and the commit it was built from.
pub(super) fn version() -> Result<String> {
    let commit = host::output(
        std::process::Command::new("git")
            .args(["describe", "--always", "--dirty"])
            .current_dir(host::workspace_root()),
    )
    .unwrap_or_default();
    Ok(format!("{} {}", env!("CARGO_PKG_VERSION"), commit.trim()))
}

/// The configuration for one worker, with everything observed or with nothing.
pub(super) fn configuration(directory: &Path, telemetry: bool) -> String {
    let state = directory.display();
    let origin = Site::origin();
    let (plain, h2c, tls, h2) = (port::PLAIN, port::H2C, port::TLS, port::H2);
    let observed = if telemetry {
        format!(
            "[observe]\ninterfaces = [\"{}\", \"{}\"]\nbpffs = \"{}\"\nrequired = true\n\
             connections_max = 16384\n\n[access_log]\npath = \"{state}/access.jsonl\"\n\n",
            GATEWAY_TO_CLIENT.device,
            GATEWAY_TO_SERVICE.device,
            bpffs().display(),
        )
    } else {
        String::new()
    };
    format!(
        r#"[gateway]
state_dir = "{state}/state"
threads = 1
grace_seconds = 1

{observed}[[listeners]]
name = "plain"
address = "0.0.0.0:{plain}"

[[listeners]]
name = "h2c"
address = "0.0.0.0:{h2c}"
http2 = true

[[listeners]]
name = "tls"
address = "0.0.0.0:{tls}"
http2 = false
tls = {{ certificate = "cert.pem", key = "key.pem" }}

[[listeners]]
name = "h2"
address = "0.0.0.0:{h2}"
http2 = true
tls = {{ certificate = "cert.pem", key = "key.pem" }}

[[upstreams]]
name = "origin"
peers = ["{origin}"]

[[routes]]
name = "all"
path = {{ prefix = "/" }}
upstream = "origin"
"#
    )
}

/// Where the bench pins; taken away after each run.
pub(super) fn bpffs() -> PathBuf {
    PathBuf::from("/sys/fs/bpf/edgemeter-bench")
}

/// Takes the pins away, so that the programs detach and no peer pays for them.
pub(super) fn detach() {
    let _ = std::fs::remove_dir_all(bpffs());
}
