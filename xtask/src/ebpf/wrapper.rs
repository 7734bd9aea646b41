//! The executable as cargo's `RUSTC_WRAPPER`, so that our crates have the same name everywhere.
//!
//! Cargo tells the compiler a hash of each crate's origin, and the compiler mixes it into every
//! symbol. For flow-abi, a path outside of flow-tc's workspace, that origin is the absolute
//! path: two checkouts would give two objects, and no flag remaps it. So the hash is replaced,
//! for these crates alone; there is one of each in the build, and their names tell them apart.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Error, Result};

/// Set for the executable when cargo, not a person, calls it.
const VARIABLE: &str = "XTASK_IS_RUSTC_WRAPPER";
/// The crates that cargo knows by their path.
const OURS: [&str; 2] = ["flow_abi", "flow_tc"];

/// Makes a cargo command call this executable in place of the compiler.
///
/// # Errors
/// When the executable cannot tell where it is.
pub(super) fn install(cargo: &mut Command) -> Result<()> {
    let executable = std::env::current_exe().context("finding our own executable")?;
    cargo.env("RUSTC_WRAPPER", executable).env(VARIABLE, "1");
    Ok(())
}

/// Becomes the compiler when cargo calls; otherwise returns and does nothing. The executable
/// asks this before it looks at its arguments.
///
/// # Errors
/// Returns one only when cargo has called and the compiler cannot be started.
pub fn become_rustc_if_called_by_cargo() -> Result<()> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let mut arguments = std::env::args_os().skip(1);
    let rustc = arguments.next().context("cargo named no compiler")?;
    let arguments = with_fixed_metadata(arguments.collect());
    let error = Command::new(&rustc).args(arguments).exec();
    Err(Error::new(error).context(format!("starting {}", rustc.display())))
}

fn with_fixed_metadata(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let named = arguments.windows(2).find(|pair| pair[0] == "--crate-name");
    let name = named.and_then(|pair| OURS.into_iter().find(|ours| pair[1] == OsStr::new(ours)));
    let Some(name) = name else { return arguments };
    for argument in &mut arguments {
        if argument.to_string_lossy().starts_with("metadata=") {
            *argument = format!("metadata={name}").into();
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> String {
        let arguments = with_fixed_metadata(line.split(' ').map(OsString::from).collect());
        arguments
            .join(OsStr::new(" "))
            .to_string_lossy()
            .into_owned()
    }

    #[test]
    fn only_the_metadata_of_our_crates_changes() {
        let ours = "--crate-name flow_tc -C metadata=85ab -C extra-filename=-85ab";
        let fixed = "--crate-name flow_tc -C metadata=flow_tc -C extra-filename=-85ab";
        assert_eq!(rewritten(ours), fixed);
        let theirs = "--crate-name aya_ebpf -C metadata=85ab";
        assert_eq!(rewritten(theirs), theirs);
        assert_eq!(rewritten("-vV"), "-vV");
    }
}
