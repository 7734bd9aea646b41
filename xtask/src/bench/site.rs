//! Where a bench runs: client, proxy and origin in namespaces of their own, so that wire bytes
//! and kernel programs are real. The proxy has processor 0 for itself; client and origin share 1.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

use crate::certificate::{self, Certificate};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Namespace, Topology};

const PREFIX: &str = "em-bench";
const ORIGIN_PORT: u16 = 9000;
/// Bodies the origin serves: path and size.
pub(super) const BODIES: [(&str, usize); 3] = [("1k", 1024), ("64k", 65_536), ("1m", 1_048_576)];

/// The three hosts, the origin and a directory for everybody's files.
pub(super) struct Site {
    _origins: [Process; 2],
    pub(super) hosts: Topology,
    pub(super) certificate: Certificate,
    pub(super) directory: tempfile::TempDir,
    /// The edgemeter to measure.
    pub(super) edgemeter: PathBuf,
}

impl Site {
    /// Makes the hosts and starts the origin. `congestion_control` is all hosts'; None: what the
    /// machine's administrator chose.
    pub(super) fn start(edgemeter: PathBuf, congestion_control: Option<&str>) -> Result<Self> {
        Namespace::sweep(PREFIX)?;
        let hosts = Topology::three_hosts(&Namespace::unique_prefix(PREFIX))?;
        if let Some(algorithm) = congestion_control {
            for host in [&hosts.client, &hosts.gateway, &hosts.service] {
                host.set_congestion_control(algorithm)?;
            }
        }
        // In memory: no peer may wait for a disk.
        let directory = tempfile::Builder::new()
            .prefix("edgemeter-bench-")
            .tempdir_in("/dev/shm")
            .context("making a directory in /dev/shm")?;
        let certificate = certificate::write(directory.path(), &[GATEWAY_TO_CLIENT.v4.into()])?;
        let pages = directory.path().join("pages");
        fs::create_dir_all(&pages)?;
        for (name, size) in BODIES {
            fs::write(pages.join(name), vec![b'x'; size])?;
        }
        let start = |name: &str, host: &Namespace, port: u16| {
            let configuration = directory.path().join(format!("{name}.conf"));
            fs::write(&configuration, origin(directory.path(), port))?;
            let mut nginx = host.command("taskset")?;
            nginx.args(["-c", "1", "nginx", "-c"]).arg(&configuration);
            Process::start(name, &mut nginx, directory.path())
        };
        Ok(Self {
            _origins: [
                start("origin", &hosts.service, ORIGIN_PORT)?,
                start("local-origin", &hosts.gateway, Self::LOCAL_ORIGIN_PORT)?,
            ],
            hosts,
            certificate,
            directory,
            edgemeter,
        })
    }

    /// Does not pace. A cable has no queue that congestion control could manage, and bbr, where a
    /// host has it, sets a timer for each burst that it paces, which is more than what a proxy does
    /// with a large answer.
    pub(super) const CONGESTION_CONTROL: &str = "reno";

    /// The same origin on the gateway's host, for calls without a hop.
    pub(super) const LOCAL_ORIGIN_PORT: u16 = 9001;

    /// Where proxies find the origin.
    pub(super) fn origin() -> SocketAddr {
        (GATEWAY_TO_SERVICE.far_v4, ORIGIN_PORT).into()
    }
}

/// nginx's configuration for an origin.
pub(super) fn origin(directory: &Path, port: u16) -> String {
    // nginx removes its pid file when it ends: never name one that is somebody else's.
    let directory = directory.display();
    format!(
        "worker_processes 1; daemon off; pid {directory}/origin-{port}.pid; error_log stderr error;\n\
         events {{ worker_connections 16384; }}\n\
         http {{\n access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;\n \
         keepalive_timeout 600s; open_file_cache max=16;\n \
         server {{ listen {port} backlog=4096; root {directory}/pages; }}\n}}\n",
    )
}

/// A child whose output goes to a file; killed with its children when dropped.
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it in a process group of its own.
    pub(super) fn start(name: &str, command: &mut Command, directory: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let log = directory.join(format!("{name}.log"));
        let file = fs::File::create(&log).context("making a log file")?;
        let child = command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log, for an error message.
    pub(super) fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(8);
        format!("{} said:\n{}", self.name, lines[from..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            // SAFETY: two integers; the group is the child's, which has not been waited for.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = self.child.wait();
    }
}
