//! Hosts made of network namespaces and cables made of veth pairs, all gone when dropped.
//!
//! Byte counts are compared exactly, so the namespaces are silent: no router solicitations, no
//! duplicate address detection, no multicast reports, and neighbours are told, not asked for.
//!
//! Namespaces are entered by `setns` and not by `ip netns exec`, which mounts a new `/sys` and
//! so hides the BPF file system. Everything here needs root, and fails without.

mod topology;

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::host;
pub use topology::{
    GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Link, MANAGEMENT_DEVICE, MANAGEMENT_GATEWAY,
    MANAGEMENT_HOST, Topology,
};

/// Where iproute2 keeps the names.
const NAMES: &str = "/run/netns";
/// The kernel's limit on an interface's name, without the final zero.
const INTERFACE_NAME_MAX: usize = 15;

/// Sysctls that keep a namespace from speaking when nobody asked it to.
const SILENCE: [(&str, &str); 7] = [
    ("net/ipv6/conf/all/router_solicitations", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    (
        "net/ipv6/conf/default/mldv2_unsolicited_report_interval",
        "100000000",
    ),
];

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A network namespace with a name; dropping it deletes the name, and with the last process
/// in it the namespace and its interfaces.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// Keeps entering possible, and safe after `fork`: nothing has to be opened there.
    handle: File,
}

impl Namespace {
    /// Creates a silent namespace with its loopback up.
    ///
    /// # Errors
    /// Without root, when the name is taken, or when `ip` fails.
    pub fn create(name: &str) -> Result<Self> {
        host::require_root("a network namespace")?;
        ip(&["netns", "add", name])?;
        let path = Path::new(NAMES).join(name);
        let handle = match File::open(&path) {
            Ok(handle) => handle,
            Err(error) => {
                delete(name);
                return Err(error).with_context(|| format!("opening {}", path.display()));
            }
        };
        // From here on, an error deletes what was created.
        let namespace = Self {
            name: name.to_owned(),
            handle,
        };
        namespace.ip(&["link", "set", "lo", "up"])?;
        namespace.run(|| {
            SILENCE.iter().try_for_each(|(name, value)| {
                let path = Path::new("/proc/sys").join(name);
                std::fs::write(&path, value).with_context(|| format!("setting {}", path.display()))
            })
        })??;
        Ok(namespace)
    }

    /// A prefix for names that no other run uses, and that [`Namespace::sweep`] recognises as
    /// left over once this process has ended.
    #[must_use]
    pub fn unique_prefix(prefix: &str) -> String {
        use std::sync::atomic::{AtomicU32, Ordering};
        static TAKEN: AtomicU32 = AtomicU32::new(0);
        let number = TAKEN.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{}-{number}", std::process::id())
    }

    /// Removes the namespaces named `prefix-…` that dead runs left, with the processes in them.
    /// A name that holds a process id, see [`Namespace::unique_prefix`], is left over when that
    /// process is gone; any other name always is, as such a prefix is for one run at a time.
    ///
    /// # Errors
    /// Without root, or when the names cannot be listed.
    pub fn sweep(prefix: &str) -> Result<()> {
        host::require_root("removing network namespaces")?;
        let entries = match std::fs::read_dir(NAMES) {
            Ok(entries) => entries,
            // Nobody has ever created one on this machine.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("listing {NAMES}")),
        };
        for entry in entries {
            let name = entry.context("listing namespaces")?.file_name();
            let name = name.to_string_lossy();
            if is_left_over(&name, prefix, |pid| Path::new("/proc").join(pid).exists()) {
                kill_processes(&name);
                delete(&name);
            }
        }
        Ok(())
    }

    /// The name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace, for `nsenter --net=`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// Sets how its TCP connections, from now on, adapt to congestion. A namespace may have what
    /// `net.ipv4.tcp_allowed_congestion_control` names.
    ///
    /// # Errors
    /// The kernel does not know the algorithm, or keeps it for the host itself.
    pub fn set_congestion_control(&self, algorithm: &str) -> Result<()> {
        const SETTING: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
        self.run(|| std::fs::write(SETTING, algorithm))?
            .with_context(|| {
                let allowed =
                    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
                format!(
                    "a namespace cannot have the congestion control {algorithm:?}; it can have: {}",
                    allowed.unwrap_or_default().trim(),
                )
            })
    }

    /// A command that will run in the namespace, and otherwise where we are: same mounts, so
    /// same BPF file system.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let handle = self
            .handle
            .try_clone()
            .context("copying the namespace's handle")?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns and
        // reading errno are, nothing is allocated, and the descriptor lives in the closure.
        unsafe {
            command.pre_exec(move || enter(&handle));
        }
        Ok(command)
    }

    /// Runs a function inside the namespace, on a thread of its own that ends with it: sockets
    /// it opens stay in the namespace wherever they go.
    ///
    /// # Errors
    /// When the namespace cannot be entered. A panic continues in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| enter(&self.handle).map(|()| work()));
            match worker.join() {
                Ok(outcome) => outcome.with_context(|| format!("entering namespace {}", self.name)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Gives an interface an address, usable at once.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn add_address(&self, device: &str, address: IpAddr, prefix_bits: u8) -> Result<()> {
        let address = format!("{address}/{prefix_bits}");
        let mut arguments = vec!["addr", "add", address.as_str(), "dev", device];
        if address.contains(':') {
            arguments.push("nodad");
        }
        self.ip(&arguments)
    }

    /// Tells an interface where a neighbour is, for good, so that nobody asks on the wire.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn add_neighbour(&self, device: &str, address: IpAddr, mac: Mac) -> Result<()> {
        let (address, mac) = (address.to_string(), mac_text(mac));
        self.ip(&[
            "neigh",
            "replace",
            &address,
            "lladdr",
            &mac,
            "dev",
            device,
            "nud",
            "permanent",
        ])
    }

    /// Switches offloads as `ethtool -K` takes them: `"tso off gso on gro on"`.
    ///
    /// # Errors
    /// When `ethtool` fails or a feature is not known.
    pub fn offloads(&self, device: &str, features: &str) -> Result<()> {
        let mut ethtool = self.command("ethtool")?;
        ethtool
            .args(["-K", device])
            .args(features.split_whitespace());
        host::output(&mut ethtool).map(drop)
    }

    /// Runs `ip` for this namespace.
    ///
    /// # Errors
    /// When it fails; carries what it said.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", self.name.as_str()], arguments].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// One end of a cable.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The host it is plugged into.
    pub namespace: &'a Namespace,
    /// The interface's name there.
    pub device: &'a str,
    /// Its address.
    pub mac: Mac,
}

/// A cable between two namespaces. There is nothing to drop: a veth pair dies with either of
/// its namespaces.
#[derive(Clone, Copy, Debug)]
pub struct Veth;

impl Veth {
    /// Creates the pair with both ends up and no address but the MACs.
    ///
    /// # Errors
    /// When a name is longer than the kernel takes, is in use, or `ip` fails.
    pub fn pair(a: End<'_>, b: End<'_>) -> Result<()> {
        for device in [a.device, b.device] {
            check_interface_name(device)?;
        }
        let (mac_a, mac_b) = (mac_text(a.mac), mac_text(b.mac));
        ip(&[
            "link",
            "add",
            a.device,
            "netns",
            a.namespace.name(),
            "address",
            &mac_a,
            "type",
            "veth",
            "peer",
            "name",
            b.device,
            "netns",
            b.namespace.name(),
            "address",
            &mac_b,
        ])?;
        for end in [a, b] {
            // A link-local address would bring multicast reports with it.
            end.namespace
                .ip(&["link", "set", end.device, "addrgenmode", "none"])?;
            end.namespace.ip(&["link", "set", end.device, "up"])?;
        }
        Ok(())
    }
}

fn check_interface_name(device: &str) -> Result<()> {
    ensure!(
        !device.is_empty() && device.len() <= INTERFACE_NAME_MAX,
        "interface name {device:?} is not 1 to {INTERFACE_NAME_MAX} bytes long"
    );
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    host::output(Command::new("ip").args(arguments)).map(drop)
}

/// Moves the calling thread.
fn enter(handle: &File) -> std::io::Result<()> {
    // SAFETY: the descriptor is open, and setns changes nothing but the calling thread.
    if unsafe { libc::setns(handle.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

fn delete(name: &str) {
    // Used by drop and sweep: a failure is worth a line, not a second error.
    if let Err(error) = ip(&["netns", "del", name]) {
        eprintln!("namespace {name} is left behind: {error:#}");
    }
}

fn kill_processes(name: &str) {
    let pids = host::output(Command::new("ip").args(["netns", "pids", name])).unwrap_or_default();
    for pid in pids
        .lines()
        .filter_map(|line| line.trim().parse::<i32>().ok())
    {
        // SAFETY: kill takes two integers; the process is one a dead run left in its namespace.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

fn is_left_over(name: &str, prefix: &str, is_alive: impl Fn(&str) -> bool) -> bool {
    let Some(rest) = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('-'))
    else {
        return false;
    };
    match rest.split('-').next() {
        Some(pid) if pid.parse::<u32>().is_ok() => !is_alive(pid),
        _ => true,
    }
}

/// The usual notation of an Ethernet address.
#[must_use]
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests;
