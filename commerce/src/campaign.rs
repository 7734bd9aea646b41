//! The campaign file: discounts, group offers and experiments, changed without a redeploy.
//!
//! One TOML file, read as a whole and accepted as a whole. A mistake names the entry and
//! the fix, and what was in force stays in force.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::catalogue::Sku;
use crate::discount::{Rule, RuleId, Strategy, Trigger};
use crate::experiment::decision::Policy;
use crate::experiment::{Experiment, Metric, Variant, revision};
use crate::group::{Offer, SIZE_MAX, SIZE_MIN};
use crate::money::{BasisPoints, Currency, Money};

/// Longest campaign file, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// What is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Campaign {
    /// Discount rules.
    pub discounts: Arc<[Rule]>,
    /// Group offers.
    pub groups: Vec<Offer>,
    /// Experiments.
    pub experiments: Vec<Experiment>,
}

/// Where and why a campaign file is refused.
#[derive(Debug, thiserror::Error)]
pub enum CampaignError {
    /// Not TOML, or of another shape; carries line and column.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// An entry that means nothing.
    #[error("{place}: {problem}")]
    Entry {
        /// The entry, such as `discounts[2]`.
        place: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl Campaign {
    /// Parses a campaign file.
    ///
    /// # Errors
    /// [`CampaignError`]
    pub fn parse(text: &str) -> Result<Self, CampaignError> {
        let raw: Raw = toml::from_str(text)?;
        let currency =
            Currency::parse(&raw.currency).map_err(|error| entry("currency", error.to_string()))?;
        let mut campaign = Self::default();
        let (mut ids, mut rules) = (BTreeSet::new(), Vec::new());
        for (at, raw) in raw.discounts.into_iter().enumerate() {
            let place = format!("discounts[{at}]");
            let rule = raw
                .rule(currency)
                .map_err(|problem| entry(&place, problem))?;
            if !ids.insert(rule.id.clone()) {
                return Err(entry(
                    &place,
                    format!("the id {:?} occurs twice", rule.id.as_str()),
                ));
            }
            rules.push(rule);
        }
        campaign.discounts = rules.into();
        for (at, raw) in raw.groups.into_iter().enumerate() {
            let place = format!("groups[{at}]");
            let offer = raw
                .offer(currency)
                .map_err(|problem| entry(&place, problem))?;
            if campaign.group(&offer.sku, offer.size).is_some() {
                return Err(entry(&place, "the SKU has an offer of this size already"));
            }
            campaign.groups.push(offer);
        }
        for (at, raw) in raw.experiments.into_iter().enumerate() {
            let place = format!("experiments[{at}]");
            let experiment = raw.experiment().map_err(|problem| entry(&place, problem))?;
            if campaign.experiment(&experiment.name).is_some() {
                return Err(entry(&place, "another experiment has this name"));
            }
            campaign.experiments.push(experiment);
        }
        campaign.check_variants()?;
        Ok(campaign)
    }

    /// The digest by which a revision is recognised.
    #[must_use]
    pub fn digest(text: &str) -> revision::Digest {
        Sha256::digest(text).into()
    }

    /// The offer for groups of `size` for a SKU.
    #[must_use]
    pub fn group(&self, sku: &Sku, size: u32) -> Option<&Offer> {
        self.groups
            .iter()
            .find(|offer| offer.sku == *sku && offer.size == size)
    }

    /// The experiment of that name.
    #[must_use]
    pub fn experiment(&self, name: &str) -> Option<&Experiment> {
        self.experiments
            .iter()
            .find(|experiment| experiment.name == name)
    }

    /// A discount for a variant must find it.
    fn check_variants(&self) -> Result<(), CampaignError> {
        for rule in self.discounts.iter() {
            if let Trigger::Variant {
                experiment,
                variant,
            } = &rule.trigger
            {
                let known = self
                    .experiment(experiment)
                    .is_some_and(|of| of.variants.iter().any(|is| is.name == *variant));
                if !known {
                    return Err(entry(
                        &format!("discount {:?}", rule.id.as_str()),
                        format!("no experiment {experiment:?} has a variant {variant:?}"),
                    ));
                }
            }
        }
        Ok(())
    }
}

fn entry(place: &str, problem: impl Into<String>) -> CampaignError {
    CampaignError::Entry {
        place: place.to_owned(),
        problem: problem.into(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default = "cny")]
    currency: String,
    #[serde(default)]
    discounts: Vec<RawDiscount>,
    #[serde(default)]
    groups: Vec<RawGroup>,
    #[serde(default)]
    experiments: Vec<RawExperiment>,
}

fn cny() -> String {
    "CNY".to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDiscount {
    id: String,
    percent_off_basis_points: Option<u16>,
    threshold: Option<RawThreshold>,
    buy_get: Option<RawBuyGet>,
    member_price_minor: Option<i64>,
    #[serde(default)]
    when: RawWhen,
    #[serde(default)]
    skus: Vec<String>,
    #[serde(default)]
    from_ms: i64,
    until_ms: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawThreshold {
    at_least_minor: i64,
    off_minor: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBuyGet {
    buy: NonZeroU32,
    free: NonZeroU32,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum RawWhen {
    #[default]
    Always,
    Member,
    Coupon {
        code: String,
        stacks: bool,
    },
    Variant {
        experiment: String,
        variant: String,
    },
}

impl RawDiscount {
    fn rule(self, currency: Currency) -> Result<Rule, String> {
        let id = RuleId::parse(&self.id)
            .ok_or_else(|| format!("{:?} is no id: 1 to 64 of a-z, 0-9, '-' and '_'", self.id))?;
        let positive = |minor: i64, what: &str| {
            (minor >= 0)
                .then(|| Money::new(minor, currency))
                .ok_or_else(|| format!("{what} must not be negative"))
        };
        let mut strategies = Vec::new();
        if let Some(points) = self.percent_off_basis_points {
            let points = BasisPoints::new(points).map_err(|error| error.to_string())?;
            strategies.push(Strategy::Percent(points));
        }
        if let Some(RawThreshold {
            at_least_minor,
            off_minor,
        }) = self.threshold
        {
            strategies.push(Strategy::Threshold {
                at_least: positive(at_least_minor, "threshold.at_least_minor")?,
                off: positive(off_minor, "threshold.off_minor")?,
            });
        }
        if let Some(RawBuyGet { buy, free }) = self.buy_get {
            strategies.push(Strategy::BuyGet { buy, free });
        }
        if let Some(minor) = self.member_price_minor {
            strategies.push(Strategy::MemberPrice(positive(
                minor,
                "member_price_minor",
            )?));
        }
        let count = strategies.len();
        let (Some(strategy), 1) = (strategies.pop(), count) else {
            return Err(format!(
                "{count} strategies; write exactly one of percent_off_basis_points, threshold, \
                 buy_get, member_price_minor"
            ));
        };
        let until_ms = self.until_ms.unwrap_or(i64::MAX);
        if until_ms <= self.from_ms {
            return Err("until_ms must be after from_ms".to_owned());
        }
        Ok(Rule {
            id,
            strategy,
            trigger: match self.when {
                RawWhen::Always => Trigger::Always,
                RawWhen::Member => Trigger::Member,
                RawWhen::Coupon { code, stacks } => Trigger::Coupon { code, stacks },
                RawWhen::Variant {
                    experiment,
                    variant,
                } => Trigger::Variant {
                    experiment,
                    variant,
                },
            },
            skus: self
                .skus
                .iter()
                .map(|text| sku(text))
                .collect::<Result<_, _>>()?,
            from_ms: self.from_ms,
            until_ms,
        })
    }
}

fn sku(text: &str) -> Result<Sku, String> {
    Sku::parse(text).map_err(|error| format!("{text:?}: {error}"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGroup {
    sku: String,
    size: u32,
    price_minor: i64,
    #[serde(default = "one_day")]
    forming_seconds: u32,
    #[serde(default = "quarter_hour")]
    hold_seconds: u32,
}

const fn one_day() -> u32 {
    24 * 3_600
}

const fn quarter_hour() -> u32 {
    900
}

impl RawGroup {
    fn offer(self, currency: Currency) -> Result<Offer, String> {
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.size) {
            return Err(format!("size must be {SIZE_MIN} to {SIZE_MAX}"));
        }
        if self.price_minor <= 0 {
            return Err("price_minor must be positive".to_owned());
        }
        if self.forming_seconds == 0 || self.hold_seconds == 0 {
            return Err("forming_seconds and hold_seconds must be positive".to_owned());
        }
        Ok(Offer {
            sku: sku(&self.sku)?,
            size: self.size,
            unit_price: Money::new(self.price_minor, currency),
            forming_ms: i64::from(self.forming_seconds) * 1_000,
            hold_ms: i64::from(self.hold_seconds) * 1_000,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExperiment {
    name: String,
    salt: String,
    #[serde(default)]
    metric: RawMetric,
    #[serde(default = "whole")]
    coverage_basis_points: u16,
    variants: Vec<RawVariant>,
    horizon_seconds: Option<u32>,
    units_min: Option<u64>,
    win_basis_points: Option<u16>,
    risk_basis_points: Option<u16>,
    harm_basis_points: Option<u16>,
}

const fn whole() -> u16 {
    BasisPoints::WHOLE
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawMetric {
    #[default]
    Conversion,
    Revenue,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVariant {
    name: String,
    weight_basis_points: u16,
}

impl RawExperiment {
    fn experiment(self) -> Result<Experiment, String> {
        let points = |points| BasisPoints::new(points).map_err(|error| error.to_string());
        let default = Policy::default();
        let limit = |given: Option<u16>, default: u16| {
            given.map_or(Ok(default), |given| points(given).map(BasisPoints::points))
        };
        let experiment = Experiment {
            name: self.name,
            salt: self.salt,
            variants: self
                .variants
                .into_iter()
                .map(|variant| {
                    Ok(Variant {
                        name: variant.name,
                        weight: points(variant.weight_basis_points)?,
                    })
                })
                .collect::<Result<_, String>>()?,
            coverage: points(self.coverage_basis_points)?,
            metric: match self.metric {
                RawMetric::Conversion => Metric::Conversion,
                RawMetric::Revenue => Metric::Revenue,
            },
            policy: Policy {
                horizon_ms: self
                    .horizon_seconds
                    .map_or(default.horizon_ms, |seconds| i64::from(seconds) * 1_000),
                units_min: self.units_min.unwrap_or(default.units_min),
                win_points: limit(self.win_basis_points, default.win_points)?,
                risk_points: limit(self.risk_basis_points, default.risk_points)?,
                harm_points: limit(self.harm_basis_points, default.harm_points)?,
                ..default
            },
        };
        experiment.validate().map_err(|error| error.to_string())?;
        Ok(experiment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The documented example is the one that works.
    const EXAMPLE: &str = include_str!("../examples/campaign.toml");

    #[test]
    fn the_example_means_what_it_says() {
        let campaign = Campaign::parse(EXAMPLE).unwrap();
        assert_eq!(campaign.discounts.len(), 6);
        assert_eq!(campaign.experiments.len(), 1);
        let offer = campaign.group(&Sku::parse("1001").unwrap(), 3).unwrap();
        assert!(offer.unit_price.minor() > 0);
        assert_eq!(offer.hold_ms, 900_000);
        assert_eq!(Campaign::parse("").unwrap(), Campaign::default());
    }

    #[test]
    fn a_mistake_names_the_entry_and_the_fix() {
        let said = |text: &str| Campaign::parse(text).unwrap_err().to_string();
        for (text, parts) in [
            ("discount = []", ["unknown field", "discounts"]),
            (
                "[[discounts]]\nid = \"a\"",
                ["discounts[0]", "exactly one of"],
            ),
            (
                "[[discounts]]\nid = \"a\"\npercent_off_basis_points = 10001",
                ["discounts[0]", "10000"],
            ),
            (
                "[[discounts]]\nid = \"a\"\npercent_off_basis_points = 1\nwhen = { variant = { experiment = \"x\", variant = \"y\" } }",
                ["discount \"a\"", "no experiment \"x\""],
            ),
            (
                "[[groups]]\nsku = \"1\"\nsize = 1\nprice_minor = 1",
                ["groups[0]", "2 to 100"],
            ),
            (
                "[[experiments]]\nname = \"x\"\nsalt = \"s\"\nvariants = [{ name = \"a\", weight_basis_points = 1 }, { name = \"b\", weight_basis_points = 1 }]",
                ["experiments[0]", "10000"],
            ),
            ("currency = \"yuan\"", ["currency", "three capital"]),
        ] {
            let said = said(text);
            for part in parts {
                assert!(said.contains(part), "{text}\nsaid: {said}");
            }
        }
    }
}
