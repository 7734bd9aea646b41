//! `cargo xtask test`: every check there is, in the order that fails soonest. CI runs this and
//! nothing else, so that what passes here passes there.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::host::{self, Tool};
use crate::{demo, ebpf};

/// The workspace of the BPF program, which the root's commands do not see.
const FLOW_TC: &str = "ebpf/flow-tc/Cargo.toml";
const DEMO_SECONDS: u64 = 5;

/// Programs that a test of ours starts. What builds the BPF object is found, or installed,
/// where it is built.
const TOOLS: &[Tool] = &[
    Tool::CC,
    Tool::CMAKE,
    Tool::IP,
    Tool::TC,
    Tool::ETHTOOL,
    Tool::TCPDUMP,
    Tool::IPERF3,
    Tool::NSENTER,
    Tool::NFT,
    Tool::PROMTOOL,
    Tool::POSTGRES,
    Tool::REDIS,
    Tool::CHROMIUM,
    Tool::PEBBLE,
];

/// Runs the steps and stops at the first that fails.
///
/// # Errors
/// Carries the step and the command that failed.
pub fn run(skip_demo: bool) -> Result<()> {
    let started = Instant::now();
    step("root", || host::require_root("cargo xtask test"))?;
    step("null device", host::restore_null_device)?;
    step("tools", || host::need(TOOLS))?;
    step("bpffs", host::mount_bpffs)?;
    step("format", || cargo(&["fmt", "--all", "--check"]))?;
    step("format of flow-tc", || {
        cargo(&["fmt", "--check", "--manifest-path", FLOW_TC])
    })?;
    step("committed BPF object", ebpf::check_not_stale)?;
    step("alert rules", || {
        let rules = host::workspace_root().join("dashboards/prometheus");
        for arguments in [
            ["check", "config", "prometheus.yml"],
            ["check", "rules", "rules.yml"],
            ["test", "rules", "rules_test.yml"],
        ] {
            host::run(Command::new("promtool").args(arguments).current_dir(&rules))?;
        }
        Ok(())
    })?;
    step("clippy", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ])
    })?;
    step("tests", || cargo(&["test", "--workspace", "--locked"]))?;
    step("mutants", crate::mutants::run)?;
    step("rebuilt BPF object", || ebpf::check(None))?;
    if !skip_demo {
        step("demo", || {
            demo::run(demo::Options {
                seconds: DEMO_SECONDS,
                keep: false,
                clean: false,
            })
        })?;
    }
    println!("\nall steps passed in {:.1?}", started.elapsed());
    Ok(())
}

fn step(heading: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("\n== {heading}");
    let started = Instant::now();
    let outcome = work();
    let word = if outcome.is_ok() { "passed" } else { "FAILED" };
    println!("-- {heading}: {word} in {:.1?}", started.elapsed());
    outcome.with_context(|| format!("step `{heading}`"))
}

fn cargo(arguments: &[&str]) -> Result<()> {
    let command: &mut Command = &mut host::cargo();
    host::run(command.args(arguments))
}
