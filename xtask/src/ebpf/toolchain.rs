//! Which compiler and linker build the BPF object.
//!
//! Debian's compiler comes first because its `core` for BPF is prebuilt and its version is
//! fixed by the distribution. Rustup's nightly is the way of everybody else; it builds `core`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::host::{self, Tool};

/// The BPF target: little-endian, as every machine the gateway runs on.
pub(super) const TARGET: &str = "bpfel-unknown-none";
const LINKER_VERSION: &str = "0.13.0";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// `(major, minor)`: the first one whose LLVM is bpf-linker's.
const DEBIAN_RUSTC_MIN: (u32, u32) = (1, 96);
const LLVM: &str = "/usr/lib/llvm-22";
/// Where a machine may keep tools that outlive the target directory.
const TOOLS_VARIABLE: &str = "EDGEMETER_TOOLS";

/// A choice of compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Toolchain {
    /// Debian's `rustc-web` with its prebuilt `core`.
    Debian,
    /// Rustup's nightly with `rust-src`, building `core`.
    Nightly,
}

/// Everything a build runs, found and checked.
pub(super) struct Tools {
    /// Which way of building this is.
    pub toolchain: Toolchain,
    /// What the compiler says of itself.
    pub rustc: RustcVersion,
    /// Where the compiler's libraries and sources are.
    pub sysroot: PathBuf,
    /// bpf-linker, of the pinned version.
    pub linker: PathBuf,
    /// `llvm-strip`, or an `llvm-objcopy` that takes the same `-g`.
    pub strip: PathBuf,
}

impl Tools {
    /// Finds the tools of the chosen toolchain, or of the first that is there; installs
    /// Debian's when none is.
    ///
    /// # Errors
    /// When what is missing cannot be installed.
    pub fn find(choice: Option<Toolchain>) -> Result<Self> {
        let toolchain = match choice {
            Some(toolchain) => toolchain,
            None if debian_toolchain_is_fit() => Toolchain::Debian,
            None if nightly_sysroot().is_ok() => Toolchain::Nightly,
            None => Toolchain::Debian,
        };
        let (rustc, sysroot) = match toolchain {
            Toolchain::Debian => {
                host::need(&[Tool::RUSTC_BPF])?;
                (
                    RustcVersion::of(&mut Command::new(DEBIAN_RUSTC))?,
                    "/usr".into(),
                )
            }
            Toolchain::Nightly => (RustcVersion::of(&mut nightly("rustc"))?, nightly_sysroot()?),
        };
        Ok(Self {
            toolchain,
            rustc,
            linker: find_linker()?,
            strip: find_strip(&sysroot)?,
            sysroot,
        })
    }

    /// The cargo invocation, without subcommand: stable cargo with Debian's compiler, or
    /// nightly's own.
    pub fn cargo(&self) -> Command {
        match self.toolchain {
            Toolchain::Debian => {
                let mut cargo = host::cargo();
                // Debian's compiler is a release that must take `#![feature]` here.
                cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
            Toolchain::Nightly => {
                let mut cargo = nightly("cargo");
                cargo.env_remove("RUSTC").env_remove("RUSTC_BOOTSTRAP");
                cargo
            }
        }
    }

    /// Arguments of `cargo build` that only this toolchain needs.
    pub fn build_arguments(&self) -> &'static [&'static str] {
        match self.toolchain {
            Toolchain::Debian => &[],
            Toolchain::Nightly => &["-Z", "build-std=core"],
        }
    }

    /// The LLVM that bpf-linker generates code with, as far as the machine tells.
    pub fn linker_llvm(&self) -> String {
        let config = Path::new(LLVM).join("bin/llvm-config");
        host::output(Command::new(config).arg("--version")).map_or_else(
            |_| "unknown".to_owned(),
            |version| version.trim().to_owned(),
        )
    }

    /// bpf-linker's version, which [`Tools::find`] has checked.
    pub fn linker_version(&self) -> &'static str {
        LINKER_VERSION
    }
}

/// What `rustc -vV` says that decides the bytes.
pub(super) struct RustcVersion {
    /// The first line.
    pub version: String,
    /// The commit it was built from.
    pub commit: String,
    /// The LLVM in it.
    pub llvm: String,
    release: String,
}

impl RustcVersion {
    fn of(rustc: &mut Command) -> Result<Self> {
        Self::parse(&host::output(rustc.arg("-vV"))?)
    }

    fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::to_owned)
                .with_context(|| format!("`rustc -vV` has no {name}: {text}"))
        };
        Ok(Self {
            version: text.lines().next().unwrap_or_default().to_owned(),
            commit: field("commit-hash")?,
            llvm: field("LLVM version")?,
            release: field("release")?,
        })
    }

    fn is_at_least(&self, minimum: (u32, u32)) -> bool {
        let mut parts = self.release.split('.').map(str::parse::<u32>);
        matches!((parts.next(), parts.next()),
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= minimum)
    }
}

/// Whether `/usr/bin/rustc` is new enough and has `core` for BPF: Debian's older `rustc`
/// package installs the same path.
pub(crate) fn debian_toolchain_is_fit() -> bool {
    let version = RustcVersion::of(&mut Command::new(DEBIAN_RUSTC));
    version.is_ok_and(|version| version.is_at_least(DEBIAN_RUSTC_MIN)) && debian_has_core()
}

fn debian_has_core() -> bool {
    let mut rustc = Command::new(DEBIAN_RUSTC);
    rustc.args(["--print", "target-libdir", "--target", TARGET]);
    let Ok(directory) = host::output(&mut rustc) else {
        return false;
    };
    let Ok(entries) = std::fs::read_dir(directory.trim()) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

/// A program of rustup's nightly.
fn nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    // Cargo under rustup pins its own toolchain for whatever it starts.
    command.env_remove("RUSTUP_TOOLCHAIN");
    command
}

fn nightly_sysroot() -> Result<PathBuf> {
    let printed = host::output(nightly("rustc").args(["--print", "sysroot"]))
        .context("no nightly; get it with `rustup toolchain install nightly -c rust-src`")?;
    let sysroot = PathBuf::from(printed.trim());
    if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        bail!(
            "nightly has no rust-src; get it with `rustup component add rust-src --toolchain nightly`"
        );
    }
    Ok(sysroot)
}

/// bpf-linker must be exactly the pinned version: its passes decide the bytes.
fn find_linker() -> Result<PathBuf> {
    let own = host::target_directory().join("tools");
    let kept = std::env::var_os(TOOLS_VARIABLE).map(PathBuf::from);
    let candidates = kept
        .into_iter()
        .chain([own.clone()])
        .map(|root| root.join("bin/bpf-linker"))
        .chain(host::find_program("bpf-linker"));
    for candidate in candidates {
        if linker_version(&candidate).as_deref() == Some(LINKER_VERSION) {
            return Ok(candidate);
        }
    }
    install_linker(&own)?;
    Ok(own.join("bin/bpf-linker"))
}

fn linker_version(linker: &Path) -> Option<String> {
    let said = host::output(Command::new(linker).arg("--version")).ok()?;
    said.trim().strip_prefix("bpf-linker ").map(str::to_owned)
}

fn install_linker(root: &Path) -> Result<()> {
    host::need(&[Tool::LLVM_22, Tool::CC])?;
    println!(
        "installing bpf-linker {LINKER_VERSION} into {} (minutes, once)",
        root.display()
    );
    let mut path = std::ffi::OsString::from(format!("{LLVM}/bin:"));
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut cargo = host::cargo();
    cargo
        .args([
            "install",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--locked",
        ])
        .args(["--no-default-features", "--features", "llvm-22", "--root"])
        .arg(root)
        .env("PATH", path)
        .env("LLVM_PREFIX", LLVM)
        .env("LLVM_SYS_221_PREFIX", LLVM);
    host::run(&mut cargo)
}

fn find_strip(sysroot: &Path) -> Result<PathBuf> {
    let system = Path::new(LLVM).join("bin/llvm-strip");
    if system.is_file() {
        return Ok(system);
    }
    let host_bin = sysroot
        .join("lib/rustlib")
        .join(format!("{}-unknown-linux-gnu", std::env::consts::ARCH))
        .join("bin");
    ["llvm-strip", "llvm-objcopy", "rust-objcopy"]
        .map(|name| host_bin.join(name))
        .into_iter()
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!(
                "no {} and no llvm-tools in {}",
                system.display(),
                host_bin.display()
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n\
        binary: rustc\ncommit-hash: ac68faa20c58\nhost: x86_64-unknown-linux-gnu\n\
        release: 1.96.0\nLLVM version: 22.1.8\n";

    #[test]
    fn a_compiler_is_known_by_what_it_says() -> Result<()> {
        let version = RustcVersion::parse(DEBIAN)?;
        assert_eq!(version.commit, "ac68faa20c58");
        assert_eq!(version.llvm, "22.1.8");
        assert!(version.is_at_least((1, 96)));
        assert!(!version.is_at_least((1, 97)));
        Ok(())
    }

    #[test]
    fn an_older_or_unreadable_release_is_not_fit() -> Result<()> {
        let old = RustcVersion::parse(&DEBIAN.replace("1.96.0", "1.85.0"))?;
        assert!(!old.is_at_least(DEBIAN_RUSTC_MIN));
        let nightly = RustcVersion::parse(&DEBIAN.replace("1.96.0", "1.97.0-nightly"))?;
        assert!(nightly.is_at_least(DEBIAN_RUSTC_MIN));
        assert!(RustcVersion::parse("rustc 1.96.0").is_err());
        Ok(())
    }
}
