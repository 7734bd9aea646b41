//! Experiments: who is dealt which variant. The same rule as the order service's, which reads the
//! result from a header (see the test vectors beside `proxy/experiment.rs`).

use serde::Deserialize;
use toml::Spanned;

use http::HeaderName;

use super::check::{Checker, Seen};
use super::raw::{Number, Text};
use super::traffic::Known;
use super::{Name, UpstreamIndex};

/// The whole, in basis points.
pub const WHOLE: u32 = 10_000;

/// Position in [`super::Config::experiments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExperimentIndex(pub usize);

/// An experiment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    /// Unique among experiments.
    pub name: Name,
    /// Decorrelates it from others; changing it deals everybody anew.
    pub salt: Box<str>,
    /// What identifies a client.
    pub unit: Unit,
    /// Basis points of all clients that are in the experiment.
    pub coverage: u32,
    /// At least two; their weights sum to [`WHOLE`].
    pub variants: Vec<Variant>,
}

/// What identifies a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The value of a cookie; a client without one is given one.
    Cookie(Box<str>),
    /// The value of a header; without it a request is in no experiment.
    Header(HeaderName),
}

/// One way of doing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// As in the header.
    pub name: Name,
    /// Basis points of those in the experiment.
    pub weight: u32,
    /// Where requests of this variant go instead of the route's upstream.
    pub upstream: Option<UpstreamIndex>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawExperiment {
    pub(super) name: Text,
    pub(super) salt: Option<Text>,
    pub(super) cookie: Option<Text>,
    pub(super) header: Option<Text>,
    pub(super) coverage: Option<Number>,
    pub(super) variants: Spanned<Vec<RawVariant>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawVariant {
    pub(super) name: Text,
    pub(super) weight: Number,
    pub(super) upstream: Option<Text>,
}

/// An example line for each field.
pub(super) const EXAMPLES: &[(&str, &str)] = &[
    ("experiments", "[[experiments]]"),
    ("experiments.name", r#"name = "badge""#),
    ("experiments.salt", r#"salt = "badge-1""#),
    ("experiments.cookie", r#"cookie = "uid""#),
    ("experiments.header", r#"header = "x-customer""#),
    ("experiments.coverage", "coverage = 10000"),
    (
        "experiments.variants",
        r#"variants = [{ name = "control", weight = 5000 }, { name = "treatment", weight = 5000 }]"#,
    ),
    ("experiments.variants.name", r#"name = "control""#),
    ("experiments.variants.weight", "weight = 5000"),
    (
        "experiments.variants.upstream",
        r#"upstream = "orders-next""#,
    ),
];

impl Checker<'_> {
    pub(super) fn experiments(
        &mut self,
        raw: &[RawExperiment],
        known: &Known<'_>,
    ) -> Option<Vec<Experiment>> {
        let mut names = Seen::default();
        let checked: Vec<Option<Experiment>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("experiments[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                if let Some(name) = &name {
                    self.token(name, &raw.name, &format!("{here}.name"));
                }
                let salt = self.salt(raw, &here);
                let unit = self.unit(raw, &here);
                let coverage = raw.coverage.as_ref();
                let coverage =
                    self.number(coverage, &format!("{here}.coverage"), 0..=10_000, 10_000);
                let variants = self.variants(&raw.variants, &format!("{here}.variants"), known);
                Some(Experiment {
                    name: name?,
                    salt: salt?,
                    unit: unit?,
                    coverage: coverage?,
                    variants: variants?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    /// Names travel as keys and tokens of RFC 9651, which begin with a letter.
    fn token(&mut self, name: &Name, text: &Text, field: &str) {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let first = name.as_bytes().first().copied().unwrap_or_default();
        if !first.is_ascii_lowercase() || !name.bytes().all(plain) {
            let wrong = format!("\"{name}\" cannot travel in a header");
            let fix = "write a-z, 0-9 and -, beginning with a letter";
            self.report(text.span(), field, wrong, fix);
        }
    }

    fn salt(&mut self, raw: &RawExperiment, here: &str) -> Option<Box<str>> {
        let Some(text) = &raw.salt else {
            return Some(raw.name.get_ref().as_str().into());
        };
        let salt = text.get_ref();
        if (1..=64).contains(&salt.len()) && salt.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Some(salt.as_str().into());
        }
        let fix = "write 1 to 64 visible ASCII characters";
        let wrong = "is no salt";
        self.report(text.span(), format!("{here}.salt"), wrong, fix);
        None
    }

    fn unit(&mut self, raw: &RawExperiment, here: &str) -> Option<Unit> {
        match (&raw.cookie, &raw.header) {
            (Some(text), None) => {
                let token = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
                if !text.get_ref().is_empty() && text.get_ref().bytes().all(token) {
                    return Some(Unit::Cookie(text.get_ref().as_str().into()));
                }
                let wrong = format!("\"{}\" is no cookie name", text.get_ref());
                let fix = "write letters, digits, - _ or .";
                self.report(text.span(), format!("{here}.cookie"), wrong, fix);
                None
            }
            (None, Some(text)) => self
                .header_name(text, &format!("{here}.header"))
                .map(Unit::Header),
            _ => {
                let wrong = "needs one of `cookie` and `header`";
                let fix = "write what identifies a client, such as `cookie = \"uid\"`";
                self.report(raw.name.span(), here, wrong, fix);
                None
            }
        }
    }

    fn variants(
        &mut self,
        raw: &Spanned<Vec<RawVariant>>,
        here: &str,
        known: &Known<'_>,
    ) -> Option<Vec<Variant>> {
        let mut names = Seen::default();
        let list = raw.get_ref();
        let checked: Vec<Option<Variant>> = list
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("{here}[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                if let Some(name) = &name {
                    self.token(name, &raw.name, &format!("{here}.name"));
                }
                let field = format!("{here}.weight");
                let weight = self.number(Some(&raw.weight), &field, 0..=10_000, 0);
                let upstream = match &raw.upstream {
                    Some(text) => self
                        .reference(
                            text,
                            &format!("{here}.upstream"),
                            "upstream",
                            &known.upstreams,
                        )
                        .map(|index| Some(UpstreamIndex(index))),
                    None => Some(None),
                };
                Some(Variant {
                    name: name?,
                    weight: weight?,
                    upstream: upstream?,
                })
            })
            .collect();
        let variants: Vec<Variant> = checked.into_iter().collect::<Option<_>>()?;
        let sum: u32 = variants.iter().map(|variant| variant.weight).sum();
        if !(2..=8).contains(&variants.len()) || sum != WHOLE {
            let wrong = format!("{} variants with weights that sum to {sum}", variants.len());
            let fix = "write 2 to 8 variants, the control first, weights that sum to 10000";
            self.report(raw.span(), here, wrong, fix);
            return None;
        }
        Some(variants)
    }
}
