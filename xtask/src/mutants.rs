//! `cargo xtask mutants`: every classic bug, switched on by a feature, must make its named test
//! fail; without it the test must pass. A mutant that survives means a test that proves nothing.

use anyhow::{Result, bail};

use crate::host;

/// A bug and the test that must catch it.
struct Mutant {
    feature: &'static str,
    /// What went wrong where somebody shipped it.
    bug: &'static str,
    /// `--lib` or the integration test's name.
    target: &'static [&'static str],
    test: &'static str,
}

const IT: &[&str] = &["--test", "it"];

const MUTANTS: &[Mutant] = &[
    Mutant {
        feature: "mutant-lock-delete",
        bug: "a lock that ran out is deleted by its old holder, and frees its successor's",
        target: IT,
        test: "gate::a_lock_that_ran_out_is_not_released_by_its_old_holder",
    },
    Mutant {
        feature: "mutant-pooled-buffer",
        bug: "a reused buffer is not emptied, and one tenant sees another's order",
        target: IT,
        test: "lifecycle::sqlite::requests_leave_nothing_behind_for_the_next",
    },
    Mutant {
        feature: "mutant-channel-events",
        bug: "events that a crash caught in memory are lost",
        target: IT,
        test: "events::sqlite::killed_with_batches_in_flight_it_sends_them_again",
    },
];

/// Proves that each mutant is caught.
///
/// # Errors
/// Names the mutants that survive, and tests that fail without one.
pub fn run() -> Result<()> {
    let mut survivors = Vec::new();
    for mutant in MUTANTS {
        let Mutant { feature, bug, .. } = mutant;
        println!("{feature}: {bug}");
        if !passes(mutant, false)? {
            bail!("{} fails without a mutant", mutant.test);
        }
        if passes(mutant, true)? {
            survivors.push(*feature);
        } else {
            println!("  caught by {}", mutant.test);
        }
    }
    if survivors.is_empty() {
        println!("{} mutants, each caught by its test", MUTANTS.len());
        return Ok(());
    }
    bail!("not caught: {}", survivors.join(", "))
}

/// Whether the test passes. A test that does not exist or does not compile is neither.
fn passes(mutant: &Mutant, with_bug: bool) -> Result<bool> {
    let mut cargo = host::cargo();
    cargo.args(["test", "--locked", "--package", "commerce"]);
    cargo.args(mutant.target);
    cargo.env(
        "COMMERCE_TEST_PATIENCE_SECONDS",
        if with_bug { "10" } else { "60" },
    );
    if with_bug {
        cargo.args(["--features", mutant.feature]);
    }
    cargo.args(["--", "--exact", mutant.test]);
    let output = cargo.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let count = |word: &str| {
        said.contains(&format!(" 1 {word};")) || said.contains(&format!(". 1 {word};"))
    };
    match (count("passed"), count("failed")) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => bail!(
            "{} did not run:\n{said}\n{}",
            mutant.test,
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}
