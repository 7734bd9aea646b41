//! One build of the object, such that where it happens leaves no trace in the bytes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSection as _};

use super::toolchain::{TARGET, Toolchain, Tools};
use super::wrapper;
use crate::host;

/// Between flags in `CARGO_ENCODED_RUSTFLAGS`, so that a flag may hold a space.
const SEPARATOR: &str = "\u{1f}";

/// Builds `ebpf/flow-tc` and returns the stripped object.
///
/// # Errors
/// When cargo or the stripper fail, or the object lacks BTF.
pub(super) fn compile(ebpf: &Path, tools: &Tools, target: &Path) -> Result<Vec<u8>> {
    let manifest = ebpf.join("flow-tc/Cargo.toml");
    // The sources of the dependencies must be unpacked before their folders can be remapped.
    host::run(
        cargo(tools)
            .args(["fetch", "--quiet", "--locked", "--manifest-path"])
            .arg(&manifest),
    )?;

    let mut build = cargo(tools);
    build
        .args(["build", "--release", "--locked", "--target", TARGET])
        .args(tools.build_arguments())
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(ebpf, tools, target)?)
        .env("PATH", path_with(&tools.linker));
    wrapper::install(&mut build)?;
    host::run(&mut build)?;

    let built = target.join(TARGET).join("release/flow-tc");
    let stripped = target.join("flow-tc.bpf.o");
    std::fs::copy(&built, &stripped).with_context(|| format!("copying {}", built.display()))?;
    // DWARF is five sixths of the object and nobody reads it; BTF stays, the kernel does.
    host::run(Command::new(&tools.strip).arg("-g").arg(&stripped))?;
    let object = std::fs::read(&stripped).context("reading the stripped object")?;
    verify_sections(&object)?;
    Ok(object)
}

/// Fails unless the object has BTF, without which socket storage cannot be loaded, and has
/// lost its DWARF.
///
/// # Errors
/// Names the section.
pub(super) fn verify_sections(bytes: &[u8]) -> Result<()> {
    let file = object::File::parse(bytes).context("the BPF object is not an ELF file")?;
    for name in [".BTF", ".BTF.ext"] {
        ensure!(
            file.section_by_name(name).is_some(),
            "the BPF object has no {name} section"
        );
    }
    for section in file.sections() {
        let name = section
            .name()
            .context("the BPF object has an unnamed section")?;
        ensure!(
            !name.starts_with(".debug_"),
            "the BPF object still has {name}"
        );
    }
    Ok(())
}

/// A cargo that hears our flags only.
///
/// It runs in `/` because cargo gathers configuration from the current directory upwards: the
/// workspace's `.cargo/config.toml` is for the gateway, not for BPF.
fn cargo(tools: &Tools) -> Command {
    let mut command = tools.cargo();
    command.current_dir("/");
    for (name, _) in std::env::vars_os() {
        if leaks_into_build(&name.to_string_lossy()) {
            command.env_remove(&name);
        }
    }
    command
}

fn leaks_into_build(variable: &str) -> bool {
    const PREFIXES: [&str; 3] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];
    const NAMES: [&str; 5] = [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_INCREMENTAL",
    ];
    // The number of jobs changes the wait, not the bytes.
    variable != "CARGO_BUILD_JOBS"
        && (NAMES.contains(&variable) || PREFIXES.iter().any(|prefix| variable.starts_with(prefix)))
}

fn rustflags(ebpf: &Path, tools: &Tools, target: &Path) -> Result<OsString> {
    let mut flags: Vec<OsString> = ["-Clinker=bpf-linker", "-Clink-arg=--btf", "-Cdebuginfo=2"]
        .map(OsString::from)
        .into();
    // Of several that match, the compiler takes the last: general first.
    let workspace = ebpf.parent().context("the ebpf folder is a root folder")?;
    flags.push(remap(workspace, "/edgemeter"));
    flags.push(remap(target, "/target"));
    for registry in registry_sources()? {
        flags.push(remap(&registry, "/registry"));
    }
    if tools.toolchain == Toolchain::Nightly {
        let sources = tools.sysroot.join("lib/rustlib/src/rust");
        flags.push(remap(&sources, &format!("/rustc/{}", tools.rustc.commit)));
    }
    Ok(flags.join(SEPARATOR.as_ref()))
}

fn remap(from: &Path, to: &str) -> OsString {
    let mut flag = OsString::from("--remap-path-prefix=");
    flag.push(from);
    flag.push("=");
    flag.push(to);
    flag
}

/// Each folder below the registry's sources: its name is a hash of the address the crates came
/// from, so it differs behind a mirror.
fn registry_sources() -> Result<Vec<PathBuf>> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir()
            .context("neither CARGO_HOME nor a home directory")?
            .join(".cargo"),
    };
    let sources = home.join("registry/src");
    let mut folders = vec![];
    for entry in
        std::fs::read_dir(&sources).with_context(|| format!("reading {}", sources.display()))?
    {
        folders.push(entry.context("reading the cargo registry")?.path());
    }
    folders.sort();
    Ok(folders)
}

/// The linker goes by its bare name and is found on PATH: a path among the flags would differ
/// from machine to machine.
fn path_with(linker: &Path) -> OsString {
    let mut path = linker
        .parent()
        .unwrap_or(Path::new(""))
        .as_os_str()
        .to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_for_the_gateway_do_not_reach_bpf() {
        for variable in ["RUSTFLAGS", "CARGO_PROFILE_RELEASE_LTO", "CARGO_TARGET_DIR"] {
            assert!(leaks_into_build(variable), "{variable}");
        }
        for variable in [
            "CARGO_HOME",
            "CARGO_BUILD_JOBS",
            "CARGO_NET_OFFLINE",
            "PATH",
        ] {
            assert!(!leaks_into_build(variable), "{variable}");
        }
    }

    #[test]
    fn an_object_without_btf_is_refused() {
        assert!(verify_sections(b"not ELF").is_err());
        // A bare ELF header: valid, but without any section.
        let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        header.resize(64, 0);
        assert!(verify_sections(&header).is_err());
    }
}
