//! What commands need from the machine they run on: privileges, programs, mounts.
//!
//! As root on a Debian system what is missing is installed; anywhere else the command fails
//! with the line that would install it.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

const BPFFS: &str = "/sys/fs/bpf";

/// A program or a set of development files, how to see that it is there, and who ships it.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    name: &'static str,
    packages: &'static [&'static str],
    present: Presence,
}

#[derive(Clone, Copy, Debug)]
enum Presence {
    Program,
    File(&'static str),
    Check(fn() -> bool),
}

impl Tool {
    /// Creates namespaces, links and addresses.
    pub const IP: Self = Self::program("ip", &["iproute2"]);
    /// Queue disciplines: delay, loss, limits.
    pub const TC: Self = Self::program("tc", &["iproute2"]);
    /// Switches offloads.
    pub const ETHTOOL: Self = Self::program("ethtool", &["ethtool"]);
    /// Records what a far end received.
    pub const TCPDUMP: Self = Self::program("tcpdump", &["tcpdump"]);
    /// Dissects a capture, as a reference.
    pub const TSHARK: Self = Self::program("tshark", &["tshark"]);
    /// Packet loss on purpose.
    pub const NFT: Self = Self::program("nft", &["nftables"]);
    /// Bulk traffic.
    pub const IPERF3: Self = Self::program("iperf3", &["iperf3"]);
    /// Enters a namespace from a shell without hiding bpffs.
    pub const NSENTER: Self = Self::program("nsenter", &["util-linux"]);
    /// Shows programs, maps and links to a person.
    pub const BPFTOOL: Self = Self::program("bpftool", &["bpftool"]);
    /// Scrapes and stores. Debian's package also starts it as a service.
    pub const PROMETHEUS: Self = Self::program("prometheus", &["prometheus"]);
    /// Checks a scrape and the rules; ships with Prometheus.
    pub const PROMTOOL: Self = Self::program("promtool", &["prometheus"]);
    /// The database server; Debian keeps its programs off PATH and also starts it as a service.
    pub const POSTGRES: Self = Self {
        name: "PostgreSQL",
        packages: &["postgresql", "postgresql-client"],
        present: Presence::Check(|| crate::server::postgres_directory().is_some()),
    };
    /// Keys and scripts in memory, with its client.
    pub const REDIS: Self = Self::program("redis-server", &["redis-server", "redis-tools"]);
    /// An ACME server for tests, with a name server of its own.
    pub const PEBBLE: Self = Self::program("pebble", &["pebble"]);
    /// C compiler that crates with bundled C code build with.
    pub const CC: Self = Self::program("cc", &["gcc", "libc6-dev"]);
    /// Configures the C of a compression library that the gateway's build brings with it.
    pub const CMAKE: Self = Self::program("cmake", &["cmake"]);
    /// The proxy that ratios are relative to.
    pub const NGINX: Self = Self::program("nginx", &["nginx-light"]);
    /// A peer.
    pub const HAPROXY: Self = Self::program("haproxy", &["haproxy"]);
    /// HTTP/1.1 load.
    pub const WRK: Self = Self::program("wrk", &["wrk"]);
    /// HTTP/2 load.
    pub const H2LOAD: Self = Self::program("h2load", &["nghttp2-client"]);
    /// Slow headers, slow bodies, slow readers.
    pub const SLOWHTTPTEST: Self = Self::program("slowhttptest", &["slowhttptest"]);
    /// Renders pages as people see them.
    pub const CHROMIUM: Self = Self::program("chromium", &["chromium"]);
    /// Lists what the kernel's connection tracking counted.
    pub const CONNTRACK: Self = Self::program("conntrack", &["conntrack"]);
    /// Flow records from a packet socket.
    pub const SOFTFLOWD: Self = Self::program("softflowd", &["softflowd"]);
    /// Accounting from a packet socket. Debian's package may also start it as a service.
    pub const PMACCTD: Self = Self::program("pmacctd", &["pmacct"]);
    /// Virtual environments for tools from PyPI.
    pub const PYTHON_VENV: Self = Self {
        name: "python3 with venv",
        packages: &["python3", "python3-venv"],
        present: Presence::Check(has_python_venv),
    };
    /// LLVM 22: bpf-linker links with it, and `llvm-strip` comes from it.
    pub const LLVM_22: Self = Self {
        name: "LLVM 22 development files",
        packages: &["llvm-22-dev", "libpolly-22-dev", "g++"],
        present: Presence::File("/usr/lib/llvm-22/bin/llvm-config"),
    };
    /// A compiler with a prebuilt `core` for BPF.
    pub const RUSTC_BPF: Self = Self {
        name: "rustc with core for bpfel-unknown-none",
        packages: &["rustc-web", "libstd-rust-web-dev-bpf"],
        present: Presence::Check(crate::ebpf::debian_toolchain_is_fit),
    };

    const fn program(name: &'static str, packages: &'static [&'static str]) -> Self {
        Self {
            name,
            packages,
            present: Presence::Program,
        }
    }

    fn is_present(&self) -> bool {
        match self.present {
            Presence::Program => find_program(self.name).is_some(),
            Presence::File(path) => Path::new(path).exists(),
            Presence::Check(check) => check(),
        }
    }
}

/// Makes sure that every tool is there, installing what is not when that is possible.
///
/// # Errors
/// Names what is missing and the command that installs it, when not root, not on Debian, or
/// when the installation did not bring it.
pub fn need(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !tool.is_present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing
        .iter()
        .flat_map(|tool| tool.packages)
        .copied()
        .collect();
    packages.sort_unstable();
    packages.dedup();
    let packages = packages.join(" ");
    let wanted = names(&missing);
    let by_hand = format!("apt-get install -y --no-install-recommends {packages}");
    if !is_root() || !is_debian() {
        let whose = if is_debian() {
            "run as root"
        } else {
            "on Debian, as root"
        };
        bail!("missing: {wanted}; {whose}: {by_hand}");
    }
    println!("installing {packages} (for {wanted})");
    apt_get(&["update", "-qq"])?;
    let mut install = vec!["install", "-y", "-qq", "--no-install-recommends"];
    install.extend(packages.split(' '));
    apt_get(&install)?;
    let absent: Vec<&Tool> = missing
        .into_iter()
        .filter(|tool| !tool.is_present())
        .collect();
    if !absent.is_empty() {
        bail!("still missing after `{by_hand}`: {}", names(&absent));
    }
    Ok(())
}

/// Fails unless the process is root.
///
/// # Errors
/// Says `what` needs it.
pub fn require_root(what: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!("{what} needs root: it creates network namespaces and loads BPF programs; use sudo -E")
}

/// Makes sure that `/dev/null` is the device. A server told to keep its pid file there removes
/// it when it ends; the next redirection then leaves a file, compilers read it as their input,
/// and nothing that fails says why.
///
/// # Errors
/// When it is not the device and cannot be made again.
pub fn restore_null_device() -> Result<()> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
    const NULL: &str = "/dev/null";
    let device = libc::makedev(1, 3);
    if let Ok(metadata) = std::fs::metadata(NULL)
        && metadata.file_type().is_char_device()
        && metadata.rdev() == device
    {
        return Ok(());
    }
    println!("{NULL} is not the null device: making it again");
    let fresh = CString::new(format!("{NULL}.{}", std::process::id())).context("a file name")?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    if unsafe { libc::mknod(fresh.as_ptr(), libc::S_IFCHR | 0o666, device) } != 0 {
        return Err(std::io::Error::last_os_error()).context("making a null device");
    }
    let fresh = fresh.to_string_lossy().into_owned();
    // The umask took part in the mode above.
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o666))
        .and_then(|()| std::fs::rename(&fresh, NULL))
        .with_context(|| format!("replacing {NULL}"))
}

/// Mounts the BPF file system where pins live, unless it is mounted. A fresh machine or a
/// container has the directory only.
///
/// # Errors
/// When not privileged or the kernel has no bpffs.
pub fn mount_bpffs() -> Result<()> {
    if file_system_magic(BPFFS) == Some(libc::BPF_FS_MAGIC) {
        return Ok(());
    }
    std::fs::create_dir_all(BPFFS).with_context(|| format!("creating {BPFFS}"))?;
    let kind = c"bpf";
    let target = CString::new(BPFFS).context("mount point")?;
    // SAFETY: the three strings are NUL-terminated and outlive the call; bpffs takes no data.
    let outcome = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if outcome == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).with_context(|| format!("mounting bpffs at {BPFFS}"))
}

/// Where the workspace was when this was compiled, which is where cargo runs it.
#[must_use]
pub fn workspace_root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// Where build products go: cargo's own choice, so that nothing lands in the sources.
#[must_use]
pub fn target_directory() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // Cargo takes a relative one from where it was called.
        Some(directory) => std::path::absolute(&directory).unwrap_or_else(|_| directory.into()),
        None => workspace_root().join("target"),
    }
}

/// The cargo that runs us, at the workspace root, without what it told only to us.
///
/// `cargo run` describes the package it runs in the environment; build scripts that watch
/// those variables would otherwise see them change and rebuild.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it cannot start or fails; carries the command line and what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting `{line}`"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!("`{line}` failed ({}): {}", output.status, said.trim())
}

/// Runs a command to its end with our own output streams.
///
/// # Errors
/// When it cannot start or fails; carries the command line.
pub fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let status = command
        .status()
        .with_context(|| format!("starting `{line}`"))?;
    if status.success() {
        return Ok(());
    }
    bail!("failed ({status}): {line}")
}

/// The command as a person would type it; quoting is for reading, not for a shell.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    // The full path of cargo says nothing to the reader.
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut line = name.to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// Finds a program on PATH, or in the system directories a plain user's PATH leaves out.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// Whether the process may do everything.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: geteuid reads the process's credentials and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Debian's python3 comes without what makes an environment.
fn has_python_venv() -> bool {
    output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_ok()
}

fn is_debian() -> bool {
    Path::new("/etc/debian_version").exists() && find_program("apt-get").is_some()
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    output(&mut command).map(drop)
}

fn names(tools: &[&Tool]) -> String {
    tools
        .iter()
        .map(|tool| tool.name)
        .collect::<Vec<_>>()
        .join(", ")
}

fn file_system_magic(path: &str) -> Option<i64> {
    let path = CString::new(path).ok()?;
    let mut statistics = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is NUL-terminated and the buffer is as large as the kernel writes.
    if unsafe { libc::statfs(path.as_ptr(), statistics.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: statfs returned 0, so it filled the buffer.
    Some(unsafe { statistics.assume_init() }.f_type)
}
