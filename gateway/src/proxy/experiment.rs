//! Sticky assignment by hash: no state, the same answer on every gateway and in the service behind.
//!
//! ```text
//! bucket = first 8 bytes of SHA-256(salt ‖ 0x00 ‖ unit), big endian, modulo 10000
//! ```
//!
//! Variant *i* owns the buckets from Σ weights before it, for `weight × coverage ∕ 10000` (rounded
//! down) of them; other buckets are not in the experiment. `vectors.json` is the order service's
//! own: both sides test against the same numbers.

use sha2::{Digest as _, Sha256};

use crate::config::{Experiment, Unit, UpstreamIndex, Variant, WHOLE};

/// Carries a client's variants to the service, as an RFC 9651 dictionary of tokens.
pub const VARIANT_HEADER: &str = "x-edgemeter-variant";
/// Carries the unit that was hashed.
pub const UNIT_HEADER: &str = "x-edgemeter-unit";
/// The longest unit that is hashed; a longer one is a client playing games.
const UNIT_LENGTH_MAX: usize = 256;
/// For how long a client keeps the unit it was given, seconds.
const COOKIE_SECONDS: u32 = 365 * 86_400;

/// The variants of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    /// The value of [`VARIANT_HEADER`]; empty in no experiment.
    pub variants: String,
    /// The value of [`UNIT_HEADER`].
    pub unit: String,
    /// A cookie to give to the client.
    pub set_cookie: Option<String>,
    /// Where the first variant that says so sends the request.
    pub upstream: Option<UpstreamIndex>,
}

impl Assignment {
    /// Deals a request's variants. `cookie` and `header` read the request; `new_unit` invents an
    /// identity for a client without one.
    pub fn deal<'e, 'r>(
        experiments: impl IntoIterator<Item = &'e Experiment>,
        cookie: impl Fn(&str) -> Option<&'r str>,
        header: impl Fn(&http::HeaderName) -> Option<&'r str>,
        new_unit: impl Fn() -> String,
    ) -> Self {
        let mut dealt = Self::default();
        let mut given: Option<(&str, String)> = None;
        for experiment in experiments {
            let fits = |unit: &&str| (1..=UNIT_LENGTH_MAX).contains(&unit.len());
            let unit = match &experiment.unit {
                Unit::Header(name) => header(name).filter(fits).map(str::to_owned),
                Unit::Cookie(name) => {
                    let known = cookie(name).filter(fits).map(str::to_owned);
                    known.or_else(|| {
                        // Two experiments by one cookie share the new identity.
                        let (_, unit) = given.get_or_insert_with(|| (name, new_unit()));
                        Some(unit.clone())
                    })
                }
            };
            let Some(unit) = unit else { continue };
            if let Some(variant) = assign(experiment, &unit) {
                if !dealt.variants.is_empty() {
                    dealt.variants.push_str(", ");
                }
                dealt.variants.push_str(&experiment.name);
                dealt.variants.push('=');
                dealt.variants.push_str(&variant.name);
                dealt.upstream = dealt.upstream.or(variant.upstream);
            }
            if dealt.unit.is_empty() {
                dealt.unit = unit;
            }
        }
        dealt.set_cookie = given.map(|(name, unit)| {
            format!("{name}={unit}; Path=/; Max-Age={COOKIE_SECONDS}; HttpOnly; SameSite=Lax")
        });
        dealt
    }
}

/// The value of a cookie in a `Cookie` header.
pub fn cookie<'h>(header: &'h str, name: &str) -> Option<&'h str> {
    header.split(';').find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        (key == name).then_some(value.trim_matches('"'))
    })
}

/// The bucket of a unit, 0 to 9999.
fn bucket(salt: &str, unit: &str) -> u32 {
    let digest = Sha256::new()
        .chain_update(salt)
        .chain_update([0])
        .chain_update(unit)
        .finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u32::try_from(u64::from_be_bytes(first) % u64::from(WHOLE)).unwrap_or(0)
}

/// The variant of a unit; `None` when it is not in the experiment.
fn assign<'e>(experiment: &'e Experiment, unit: &str) -> Option<&'e Variant> {
    let bucket = bucket(&experiment.salt, unit);
    let mut start = 0;
    for variant in &experiment.variants {
        let owned = variant.weight * experiment.coverage / WHOLE;
        if (start..start + owned).contains(&bucket) {
            return Some(variant);
        }
        start += variant.weight;
    }
    None
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::config::Name;

    #[derive(Deserialize)]
    struct Vectors {
        buckets: Vec<(String, String, u32)>,
        assignments: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        salt: String,
        weights: Vec<u32>,
        coverage: u32,
        units: Vec<(String, Option<usize>)>,
    }

    fn experiment(name: &str, salt: &str, weights: &[u32], coverage: u32) -> Experiment {
        let variants = weights.iter().enumerate().map(|(n, &weight)| Variant {
            name: Name::new(&format!("v{n}")).unwrap(),
            weight,
            upstream: None,
        });
        Experiment {
            name: Name::new(name).unwrap(),
            salt: salt.into(),
            unit: Unit::Cookie("uid".into()),
            coverage,
            variants: variants.collect(),
        }
    }

    #[test]
    fn the_order_services_vectors_hold() {
        let vectors: Vectors =
            serde_json::from_str(include_str!("experiment/vectors.json")).unwrap();
        assert!(vectors.buckets.len() >= 10);
        for (salt, unit, expected) in vectors.buckets {
            assert_eq!(bucket(&salt, &unit), expected, "{salt:?} {unit:?}");
        }
        for case in vectors.assignments {
            let experiment = experiment("e", &case.salt, &case.weights, case.coverage);
            for (unit, expected) in case.units {
                let got = assign(&experiment, &unit).map(|variant| &variant.name);
                let expected = expected.map(|at| &experiment.variants[at].name);
                assert_eq!(got, expected, "{unit:?}");
            }
        }
    }

    #[test]
    fn a_client_without_identity_gets_one_and_keeps_its_variants() {
        let mut experiments = [
            experiment("badge", "badge-1", &[5_000, 5_000], 10_000),
            experiment("hero", "hero-2026", &[5_000, 5_000], 10_000),
        ];
        experiments[1].variants[0].upstream = Some(UpstreamIndex(1));
        experiments[1].variants[1].upstream = Some(UpstreamIndex(2));
        let none = |_: &http::HeaderName| None;
        let first = Assignment::deal(&experiments, |_| None, none, || "u1".to_owned());
        let set = first.set_cookie.as_deref().unwrap();
        assert!(set.starts_with("uid=u1; Path=/;"), "{set}");
        assert_eq!(first.unit, "u1");
        let again = Assignment::deal(&experiments, |_| Some("u1"), none, || unreachable!());
        assert_eq!(again.set_cookie, None);
        assert_eq!(again.variants, first.variants);
        assert!(again.variants.starts_with("badge=v") && again.variants.contains(", hero=v"));
        assert!(again.upstream.is_some());
    }

    #[test]
    fn without_its_header_a_request_is_in_no_experiment() {
        let mut experiment = experiment("e", "e", &[10_000, 0], 10_000);
        experiment.unit = Unit::Header(http::HeaderName::from_static("x-customer"));
        let dealt = Assignment::deal([&experiment], |_| None, |_| None, || unreachable!());
        assert_eq!(dealt, Assignment::default());
        let dealt = Assignment::deal([&experiment], |_| None, |_| Some("c"), || unreachable!());
        assert_eq!(
            (dealt.variants.as_str(), dealt.unit.as_str()),
            ("e=v0", "c")
        );
    }

    #[test]
    fn cookies_are_found_by_their_whole_name() {
        let header = "xuid=0; uid=1; uid=2; q=\"3\"";
        assert_eq!(cookie(header, "uid"), Some("1"));
        assert_eq!(cookie(header, "q"), Some("3"));
        assert_eq!(cookie(header, "id"), None);
    }
}
