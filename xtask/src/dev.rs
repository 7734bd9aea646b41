//! `cargo xtask dev`: the gateway and the service, rebuilt and restarted while you edit.
//!
//! A change that does not compile leaves the running ones alone. Sources are polled: twice a
//! second over a few dozen files costs nothing, and needs no event API per platform.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};

use crate::host;

const POLL: Duration = Duration::from_millis(500);
/// Longer than either program takes to drain when nobody is connected.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// What both programs are built from, relative to the root.
const SOURCES: [&str; 5] = [
    "gateway",
    "commerce",
    "ebpf/flow-abi",
    "ebpf/flow-tc.bpf.o",
    "Cargo.toml",
];

/// Builds, runs and watches until Ctrl-C, then stops what it started.
///
/// # Errors
/// When the first build fails, a program cannot be started, or a signal handler not be set.
pub fn run(config: &Path) -> Result<()> {
    let config = std::path::absolute(config).context("the configuration's path")?;
    anyhow::ensure!(
        config.is_file(),
        "no configuration file {}",
        config.display()
    );
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .context("setting a signal handler")?;
    }

    let mut seen = modification_times(&config);
    build()?;
    let mut programs = Programs::start(&config)?;
    println!("dev: running; edit a source to rebuild, Ctrl-C to stop");
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(POLL);
        programs.report_ended();
        // Read before the build: what changes during it is built next time.
        let present = modification_times(&config);
        if present == seen {
            continue;
        }
        println!(
            "dev: {} changed, building",
            first_difference(&seen, &present).display()
        );
        seen = present;
        match build() {
            Ok(()) => {
                programs.stop();
                programs = Programs::start(&config)?;
                println!("dev: restarted");
            }
            Err(error) => eprintln!("dev: {error:#}; the previous build keeps running"),
        }
    }
    println!("dev: stopping");
    programs.stop();
    Ok(())
}

fn build() -> Result<()> {
    let mut cargo = host::cargo();
    host::run(cargo.args(["build", "--locked", "-p", "edgemeter", "-p", "commerce"]))
}

/// The two running programs; dropping them stops them, also when an error ends the command.
struct Programs {
    running: Vec<(&'static str, Child)>,
}

impl Programs {
    /// The service first: the gateway finds it ready.
    fn start(config: &Path) -> Result<Self> {
        let target = host::target_directory();
        let database = target.join("dev.sqlite");
        let mut programs = Self { running: vec![] };
        let mut commerce = Command::new(target.join("debug/commerce"));
        programs.spawn(
            "commerce",
            commerce.arg("serve").arg("--database").arg(database),
        )?;
        let mut gateway = Command::new(target.join("debug/edgemeter"));
        programs.spawn("edgemeter", gateway.arg("run").arg("--config").arg(config))?;
        Ok(programs)
    }

    fn spawn(&mut self, name: &'static str, command: &mut Command) -> Result<()> {
        // A group of its own, so that Ctrl-C reaches us alone and we choose the order.
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        self.running.push((name, child));
        Ok(())
    }

    /// Says once that a program ended by itself; the next change starts it again.
    fn report_ended(&mut self) {
        self.running
            .retain_mut(|(name, child)| match child.try_wait() {
                Ok(Some(status)) => {
                    eprintln!("dev: {name} ended by itself ({status}); the next change starts it");
                    false
                }
                _ => true,
            });
    }

    /// Asks each to drain, the gateway first so that its last requests still find the service.
    fn stop(&mut self) {
        while let Some((name, mut child)) = self.running.pop() {
            terminate(&child);
            if !ends_within(&mut child, STOP_DEADLINE) {
                eprintln!("dev: {name} does not end on SIGTERM, killing it");
                // Fails only when it has just ended.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.stop();
    }
}

fn terminate(child: &Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // SAFETY: kill takes two integers; the child is not waited for yet, so the id is its.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
}

fn ends_within(child: &mut Child, limit: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < limit {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

type Times = BTreeMap<PathBuf, SystemTime>;

fn modification_times(config: &Path) -> Times {
    let root = host::workspace_root();
    let mut times = Times::new();
    for source in SOURCES {
        collect(&root.join(source), &mut times);
    }
    collect(config, &mut times);
    times
}

/// A file that vanishes while we look is a change like any other: it is not in the result.
fn collect(path: &Path, times: &mut Times) {
    let Ok(metadata) = path.metadata() else {
        return;
    };
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            collect(&entry.path(), times);
        }
    } else if let Ok(modified) = metadata.modified() {
        times.insert(path.to_path_buf(), modified);
    }
}

/// The first path that was added, removed or written.
fn first_difference(before: &Times, after: &Times) -> PathBuf {
    let changed = after
        .iter()
        .find(|(path, time)| before.get(*path) != Some(*time));
    let removed = || before.iter().find(|(path, _)| !after.contains_key(*path));
    changed
        .or_else(removed)
        .map(|(path, _)| path.clone())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_added_or_removed_file_is_a_change() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let look = || {
            let mut times = Times::new();
            collect(folder.path(), &mut times);
            times
        };
        let empty = look();
        let file = folder.path().join("a.rs");
        std::fs::write(&file, "one")?;
        let added = look();
        assert_eq!(first_difference(&empty, &added), file);

        std::fs::File::options()
            .append(true)
            .open(&file)?
            .set_modified(SystemTime::UNIX_EPOCH)?;
        let written = look();
        assert_eq!(first_difference(&added, &written), file);
        assert_eq!(first_difference(&written, &empty), file);
        Ok(())
    }

    #[test]
    fn a_program_ends_when_told_and_not_before() -> Result<()> {
        let mut child = Command::new("sleep").arg("60").spawn()?;
        assert!(!ends_within(&mut child, Duration::from_millis(50)));
        terminate(&child);
        assert!(ends_within(&mut child, Duration::from_secs(5)));
        Ok(())
    }
}
