//! Sticky assignment by hash: no state, the same answer on every machine and in the gateway.
//!
//! ```text
//! bucket = first 8 bytes of SHA-256(salt ‖ 0x00 ‖ unit), big endian, modulo 10000
//! ```
//!
//! Variant *i* owns the buckets from Σ weights before it, for `weight × coverage ∕ 10000`
//! (rounded down) of them; other buckets are not in the experiment. Raising the coverage
//! therefore adds customers and moves none.
//!
//! The gateway in front computes the same, removes what a client sent under
//! [`VARIANT_HEADER`], and sets it to an RFC 9651 dictionary of tokens:
//! `x-edgemeter-variant: badge=treatment, hero=control`. `vectors.json` beside this file is
//! what both sides test against.

use sha2::{Digest as _, Sha256};

use super::{Experiment, Variant, is_name};
use crate::money::BasisPoints;

/// Carries a customer's variants from the gateway.
pub const VARIANT_HEADER: &str = "x-edgemeter-variant";
/// Carries the unit the gateway hashed: an opaque customer or browser identity.
pub const UNIT_HEADER: &str = "x-edgemeter-unit";
/// Most experiments in one header.
pub const HEADER_ENTRIES_MAX: usize = 32;

/// The bucket of a unit, 0 to 9999.
#[must_use]
pub fn bucket(salt: &str, unit: &str) -> u16 {
    let digest = Sha256::new()
        .chain_update(salt)
        .chain_update([0])
        .chain_update(unit)
        .finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    // 2^64 is so much more than 10,000 that no bucket is favoured by more than 10^-15.
    u16::try_from(u64::from_be_bytes(first) % u64::from(BasisPoints::WHOLE)).unwrap_or(0)
}

/// The variant of a unit; `None` when it is not in the experiment.
#[must_use]
pub fn assign<'e>(experiment: &'e Experiment, unit: &str) -> Option<&'e Variant> {
    let bucket = u32::from(bucket(&experiment.salt, unit));
    let coverage = u32::from(experiment.coverage.points());
    let mut start = 0;
    for variant in &experiment.variants {
        let weight = u32::from(variant.weight.points());
        let owned = weight * coverage / u32::from(BasisPoints::WHOLE);
        if (start..start + owned).contains(&bucket) {
            return Some(variant);
        }
        start += weight;
    }
    None
}

/// The (experiment, variant) pairs of a header value. What is malformed is left out: a
/// faulty header costs an observation, not an order.
pub fn parse_header(value: &str) -> impl Iterator<Item = (&str, &str)> {
    value
        .split(',')
        .take(HEADER_ENTRIES_MAX)
        .filter_map(|entry| {
            let (name, rest) = entry.trim().split_once('=')?;
            // Parameters after the token are for later versions.
            let variant = rest.split(';').next()?.trim_end();
            (is_name(name) && is_name(variant)).then_some((name, variant))
        })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::experiment::tests::experiment;

    #[derive(Deserialize)]
    struct Vectors {
        buckets: Vec<(String, String, u16)>,
        assignments: Vec<Assignments>,
    }

    #[derive(Deserialize)]
    struct Assignments {
        salt: String,
        weights: Vec<u16>,
        coverage: u16,
        units: Vec<(String, Option<usize>)>,
    }

    #[test]
    fn the_published_vectors_hold() {
        let vectors: Vectors = serde_json::from_str(include_str!("vectors.json")).unwrap();
        assert!(vectors.buckets.len() >= 10);
        for (salt, unit, expected) in vectors.buckets {
            assert_eq!(bucket(&salt, &unit), expected, "{salt:?} {unit:?}");
        }
        for case in vectors.assignments {
            let experiment = Experiment {
                salt: case.salt,
                ..experiment(&case.weights, case.coverage)
            };
            for (unit, expected) in case.units {
                let got = assign(&experiment, &unit).map(|variant| &variant.name);
                let expected = expected.map(|at| &experiment.variants[at].name);
                assert_eq!(got, expected, "{unit:?}");
            }
        }
    }

    #[test]
    fn more_coverage_adds_customers_and_moves_none() {
        let tenth = experiment(&[3_000, 7_000], 1_000);
        let all = experiment(&[3_000, 7_000], 10_000);
        let mut inside = 0;
        for unit in (0..5_000).map(|n| format!("u{n}")) {
            if let Some(variant) = assign(&tenth, &unit) {
                inside += 1;
                assert_eq!(Some(variant), assign(&all, &unit));
            }
            assert!(assign(&all, &unit).is_some());
        }
        assert!((350..650).contains(&inside), "{inside} of 5000 at 10 %");
    }

    #[test]
    fn two_salts_deal_independently() {
        let both = (0..4_000).filter(|n| {
            let unit = format!("u{n}");
            bucket("one", &unit) < 5_000 && bucket("two", &unit) < 5_000
        });
        let both = both.count();
        assert!(
            (850..1_150).contains(&both),
            "{both} of 4000 in both halves"
        );
    }

    #[test]
    fn a_header_gives_what_is_well_formed() {
        let pairs: Vec<_> =
            parse_header("badge=treatment, hero=control;v=1,x=,=y,BAD=1, z").collect();
        assert_eq!(pairs, [("badge", "treatment"), ("hero", "control")]);
        let many = vec!["a=b"; HEADER_ENTRIES_MAX + 5].join(",");
        assert_eq!(parse_header(&many).count(), HEADER_ENTRIES_MAX);
    }
}
