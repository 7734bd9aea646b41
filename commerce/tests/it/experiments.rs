//! Statistics against gbstats, and how often a decision is wrong, by simulation.
#![allow(
    clippy::float_arithmetic,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "probabilities; no money in this file"
)]

use std::io::Write as _;
use std::process::{Command, Stdio};

use commerce::experiment::decision::{Policy, Verdict, assess};
use commerce::experiment::statistics::{
    Prior, Sample, posterior, sample_ratio_p, sequential_interval,
};
use commerce::experiment::{Experiment, Metric, Variant};
use commerce::money::BasisPoints;
use serde_json::{Value, json};

/// A small generator with a fixed seed: the same cases on every machine (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// How many of `units` succeed with probability `p`.
    fn successes(&mut self, units: u64, p: f64) -> u64 {
        let bound = (p * u64::MAX as f64) as u64;
        (0..units).map(|_| u64::from(self.next() < bound)).sum()
    }

    fn revenue(&mut self, units: u64) -> Sample {
        let mut sample = Sample {
            units,
            ..Sample::default()
        };
        for _ in 0..units {
            // Most buy nothing; those who do spend very differently.
            let spent = if self.below(10) == 0 {
                100 + self.below(50_000)
            } else {
                0
            };
            sample.sum += spent;
            sample.sum_of_squares += u128::from(spent) * u128::from(spent);
        }
        sample
    }
}

struct Case {
    metric: Metric,
    control: Sample,
    treatment: Sample,
    weights: [u16; 2],
    alpha: f64,
    tuned_for: u64,
    prior: bool,
}

fn cases() -> Vec<Case> {
    let mut dice = Dice(20_261_125);
    let mut cases = Vec::new();
    for n in 0..300_u64 {
        let (one, two) = (1 + dice.below(5_000), 1 + dice.below(5_000));
        let metric = if n % 2 == 0 {
            Metric::Conversion
        } else {
            Metric::Revenue
        };
        let (control, treatment) = match metric {
            Metric::Conversion => {
                let rates = (dice.below(40), dice.below(40));
                let mut some = |units, percent| {
                    Sample::of_conversions(units, dice.successes(units, percent as f64 / 100.0))
                };
                (some(one, rates.0), some(two, rates.1))
            }
            Metric::Revenue => (dice.revenue(one), dice.revenue(two)),
        };
        let share = 1_000 + u16::try_from(dice.below(8_000)).unwrap();
        cases.push(Case {
            metric,
            control,
            treatment,
            weights: [share, 10_000 - share],
            alpha: if n % 3 == 0 { 0.05 } else { 0.1 },
            tuned_for: 500 + dice.below(10_000),
            prior: n % 5 != 0,
        });
    }
    cases
}

fn close(what: &str, case: usize, ours: f64, theirs: f64) {
    // Relative, with a floor where a tail probability has lost its digits on their side.
    let tolerance = 1e-9 * theirs.abs().max(1e-4);
    assert!(
        (ours - theirs).abs() <= tolerance,
        "case {case}: {what}: {ours:e} here, {theirs:e} by gbstats"
    );
}

#[test]
fn the_statistics_equal_gbstats() {
    let python = xtask::python::venv("gbstats", &["gbstats==0.8.0"]).unwrap();
    let cases = cases();
    let asked: Vec<Value> = cases
        .iter()
        .map(|case| {
            let sample =
                |sample: &Sample| json!([sample.units, sample.sum, sample.sum_of_squares as u64]);
            json!({
                "metric": if case.metric == Metric::Conversion { "conversion" } else { "revenue" },
                "control": sample(&case.control),
                "treatment": sample(&case.treatment),
                "weights": case.weights,
                "alpha": case.alpha,
                "tuned_for": case.tuned_for,
                "prior": case.prior,
            })
        })
        .collect();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/experiments.py");
    let mut child = Command::new(python.join("bin/python"))
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(json!(asked).to_string().as_bytes())
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answers.len(), cases.len());

    let mut spoken = 0;
    for (n, (case, answer)) in cases.iter().zip(&answers).enumerate() {
        let number = |value: &Value| value.as_f64().unwrap();
        let units = [case.control.units, case.treatment.units];
        close(
            "sample ratio",
            n,
            sample_ratio_p(&units, &case.weights),
            number(&answer["sample_ratio_p"]),
        );
        let prior = case.prior.then_some(Prior::DEFAULT);
        let ours = posterior(&case.control, &case.treatment, case.metric, prior);
        assert_eq!(ours.is_none(), answer["silent"], "case {n}");
        let Some(ours) = ours else { continue };
        spoken += 1;
        close("mean", n, ours.mean, number(&answer["mean"]));
        close("deviation", n, ours.deviation, number(&answer["deviation"]));
        close("win", n, ours.win, number(&answer["win"]));
        // Theirs computes a risk as probability × truncated mean, which loses digits far out.
        for (ours, theirs) in [
            (ours.risk_of_keeping, &answer["risk"][0]),
            (ours.risk_of_shipping, &answer["risk"][1]),
        ] {
            let theirs = number(theirs);
            assert!(
                (ours - theirs).abs() <= 1e-8 * theirs.abs().max(1e-3),
                "case {n}: risk: {ours:e} here, {theirs:e} by gbstats"
            );
        }
        close(
            "low end",
            n,
            ours.interval.0,
            number(&answer["interval"][0]),
        );
        close(
            "high end",
            n,
            ours.interval.1,
            number(&answer["interval"][1]),
        );
        let bound = sequential_interval(
            &case.control,
            &case.treatment,
            case.metric,
            case.alpha,
            case.tuned_for,
        )
        .unwrap();
        close("sequence", n, bound.0, number(&answer["sequence"][0]));
        close("sequence", n, bound.1, number(&answer["sequence"][1]));
    }
    assert!(
        spoken > 250,
        "{spoken} of {} cases had an answer",
        cases.len()
    );
}

const HOUR_MS: i64 = 3_600_000;

/// Half and half, decided after a day.
fn experiment() -> Experiment {
    let half = BasisPoints::new(5_000).unwrap();
    let variant = |name: &str| Variant {
        name: name.to_owned(),
        weight: half,
    };
    Experiment {
        name: "simulated".to_owned(),
        salt: "s".to_owned(),
        variants: vec![variant("control"), variant("treatment")],
        coverage: BasisPoints::new(10_000).unwrap(),
        metric: Metric::Conversion,
        policy: Policy::default(),
    }
}

#[derive(Debug, Default)]
struct Outcomes {
    shipped: u32,
    kept: u32,
    rolled_back: u32,
    other: u32,
}

/// Runs experiments that are looked at four times an hour, as the service does, until their
/// verdict; `a_look` customers of each variant come between two looks.
fn simulate(runs: u32, a_look: u64, (control, treatment): (f64, f64), seed: u64) -> Outcomes {
    let experiment = experiment();
    let mut dice = Dice(seed);
    let mut outcomes = Outcomes::default();
    for _ in 0..runs {
        let mut samples = [Sample::default(); 2];
        let mut elapsed_ms = 0;
        let verdict = loop {
            for (sample, p) in samples.iter_mut().zip([control, treatment]) {
                let converted = sample.sum + dice.successes(a_look, p);
                *sample = Sample::of_conversions(sample.units + a_look, converted);
            }
            elapsed_ms += HOUR_MS / 4;
            match assess(&experiment, &samples, elapsed_ms).verdict {
                Verdict::Wait => assert!(elapsed_ms < 48 * HOUR_MS, "never decided"),
                verdict => break verdict,
            }
        };
        *match verdict {
            Verdict::Ship(_) => &mut outcomes.shipped,
            Verdict::Keep => &mut outcomes.kept,
            Verdict::RollBack(_) => &mut outcomes.rolled_back,
            Verdict::Wait | Verdict::Mismatch => &mut outcomes.other,
        } += 1;
    }
    println!("{runs} runs of {control} against {treatment}: {outcomes:?}");
    outcomes
}

#[test]
fn experiments_without_a_difference_rarely_ship_or_roll_back() {
    let few = simulate(2_000, 42, (0.10, 0.10), 1);
    // 1 % by design at one look.
    assert!(few.shipped <= 40, "{few:?}");
    // 5 % by design however often it is looked at.
    assert!(few.rolled_back <= 100, "{few:?}");
    // With many customers the prior no longer holds early luck back: peeking at each of the 96
    // looks ships many times the 1 %.
    let many = simulate(600, 420, (0.10, 0.10), 4);
    assert!(many.shipped <= 15, "{many:?}");
}

#[test]
fn a_real_gain_ships_and_a_real_loss_is_rolled_back() {
    let better = simulate(200, 42, (0.10, 0.13), 2);
    assert!(better.shipped >= 180, "{better:?}");
    let worse = simulate(200, 42, (0.10, 0.06), 3);
    assert!(worse.rolled_back >= 180, "{worse:?}");
    assert_eq!(worse.shipped, 0, "{worse:?}");
}
