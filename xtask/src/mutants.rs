//! `cargo xtask mutants`: the named test of each classic bug fails when the bug is there.
//!
//! One build of the order service has them all behind the feature `mutants`; an environment
//! variable turns one on. A test that passes with its bug on proves nothing, and fails here.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host;

/// A bug and the test that must fail with it.
struct Mutant {
    name: &'static str,
    test: &'static str,
}

const MUTANTS: [Mutant; 6] = [
    Mutant {
        name: "float-money",
        test: "discount::tests::shares_sum_to_the_amount_and_stay_within_a_unit_of_the_proportion",
    },
    Mutant {
        name: "peeking",
        test: "experiments::experiments_without_a_difference_rarely_ship_or_roll_back",
    },
    Mutant {
        name: "check-then-act",
        test: "groups::sqlite::more_join_at_once_than_there_are_places",
    },
    Mutant {
        name: "lock-delete",
        test: "gate::a_lock_that_ran_out_is_not_released_by_its_old_holder",
    },
    Mutant {
        name: "pooled-buffer",
        test: "lifecycle::sqlite::requests_leave_nothing_behind_for_the_next",
    },
    Mutant {
        name: "channel-events",
        test: "events::sqlite::killed_with_batches_in_flight_it_sends_them_again",
    },
];

/// Builds once, then runs each named test without and with its bug.
///
/// # Errors
/// A test that fails without its bug, or does not fail with it.
pub fn run() -> Result<()> {
    for Mutant { name, test } in MUTANTS {
        ensure!(passes(test, None)?, "{test} fails without a bug");
        if passes(test, Some(name))? {
            bail!("{test} passes with the bug {name}: it proves nothing");
        }
        println!("{name}: caught by {test}");
    }
    Ok(())
}

/// Whether exactly this test was run, and passed.
fn passes(test: &str, mutant: Option<&str>) -> Result<bool> {
    let mut cargo: Command = host::cargo();
    cargo.args([
        "test",
        "--locked",
        "--package",
        "commerce",
        "--features",
        "mutants",
    ]);
    cargo.args([
        "--lib",
        "--test",
        "it",
        "--no-fail-fast",
        "--",
        "--exact",
        test,
    ]);
    cargo.stdin(Stdio::null()).stderr(Stdio::inherit());
    match mutant {
        // A test that waits for what never happens need not wait for long.
        Some(mutant) => cargo
            .env("COMMERCE_MUTANT", mutant)
            .env("COMMERCE_TEST_PATIENCE_SECONDS", "15"),
        None => cargo.env_remove("COMMERCE_MUTANT"),
    };
    let output = cargo.output().context("running cargo test")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let line = |outcome: &str| {
        said.lines()
            .any(|line| line == format!("test {test} ... {outcome}"))
    };
    match (line("ok"), line("FAILED")) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        _ => bail!("{test} was not run:\n{said}"),
    }
}
