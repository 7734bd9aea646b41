//! Experiments, pure: who sees what, and what the numbers say about it.
//!
//! - [`assign`]: a customer's variant, by a hash that the gateway computes as well.
//! - [`statistics`]: the posterior of a relative lift; the only floats in this crate's core.
//! - [`decision`]: ship, keep, roll back or wait, from counts.
//! - [`revision`]: which configuration is active, and which one to fall back to.
//!
//! What an experiment compares is counted in integers: customers, orders, minor units.

pub mod assign;
pub mod decision;
pub mod revision;
pub mod statistics;

use std::collections::BTreeSet;

use crate::money::BasisPoints;

/// Most variants of one experiment.
pub const VARIANTS_MAX: usize = 8;

/// What an outcome is, per exposed customer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Whether they ordered at all.
    Conversion,
    /// What their orders came to, in minor units.
    Revenue,
}

/// One way of doing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Its name, as in the header.
    pub name: String,
    /// Its share of those in the experiment.
    pub weight: BasisPoints,
}

/// An experiment as configured. The first variant is the control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    /// Its name, as in the header.
    pub name: String,
    /// Decorrelates it from other experiments; changing it deals customers anew.
    pub salt: String,
    /// The variants, control first; their weights sum to the whole.
    pub variants: Vec<Variant>,
    /// The share of all customers in the experiment.
    pub coverage: BasisPoints,
    /// What is compared.
    pub metric: Metric,
    /// When and how it is decided.
    pub policy: decision::Policy,
}

/// Why an experiment cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExperimentError {
    /// Not a name.
    #[error("{0:?} is no name: 1 to 64 of a-z, 0-9 and '-', a letter first")]
    Name(String),
    /// Less than two variants, or too many.
    #[error("{0} variants; an experiment has 2 to {VARIANTS_MAX}, the control first")]
    Variants(usize),
    /// Two variants of one name.
    #[error("two variants are named {0:?}")]
    Duplicate(String),
    /// Weights that do not sum to the whole.
    #[error("the weights sum to {0} basis points instead of 10000")]
    Weights(u32),
    /// A salt that could run into the unit.
    #[error("the salt must have 1 to 64 printable ASCII characters")]
    Salt,
}

impl Experiment {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ExperimentError`].
    pub fn validate(&self) -> Result<(), ExperimentError> {
        if !is_name(&self.name) {
            return Err(ExperimentError::Name(self.name.clone()));
        }
        let salt = self.salt.as_bytes();
        if !(1..=64).contains(&salt.len()) || !salt.iter().all(u8::is_ascii_graphic) {
            return Err(ExperimentError::Salt);
        }
        if !(2..=VARIANTS_MAX).contains(&self.variants.len()) {
            return Err(ExperimentError::Variants(self.variants.len()));
        }
        let mut names = BTreeSet::new();
        for variant in &self.variants {
            if !is_name(&variant.name) {
                return Err(ExperimentError::Name(variant.name.clone()));
            }
            if !names.insert(&variant.name) {
                return Err(ExperimentError::Duplicate(variant.name.clone()));
            }
        }
        let sum = self
            .variants
            .iter()
            .map(|variant| u32::from(variant.weight.points()))
            .sum();
        if sum == u32::from(BasisPoints::WHOLE) {
            Ok(())
        } else {
            Err(ExperimentError::Weights(sum))
        }
    }

    /// The control, which every other variant is compared with.
    #[must_use]
    pub fn control(&self) -> Option<&Variant> {
        self.variants.first()
    }
}

/// A name that is a key and a token of RFC 9651 alike, and safe everywhere else.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&text.len())
        && text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.bytes().all(allowed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn experiment(weights: &[u16], coverage: u16) -> Experiment {
        let variants = weights.iter().enumerate().map(|(n, &weight)| Variant {
            name: match n {
                0 => "control".to_owned(),
                1 => "treatment".to_owned(),
                n => format!("treatment-{n}"),
            },
            weight: BasisPoints::new(weight).unwrap(),
        });
        Experiment {
            name: "badge".to_owned(),
            salt: "badge-1".to_owned(),
            variants: variants.collect(),
            coverage: BasisPoints::new(coverage).unwrap(),
            metric: Metric::Conversion,
            policy: decision::Policy::default(),
        }
    }

    #[test]
    fn a_faulty_experiment_says_what_is_wrong() {
        let good = experiment(&[5_000, 5_000], 10_000);
        assert_eq!(good.validate(), Ok(()));
        let named = |name: &str| Experiment {
            name: name.to_owned(),
            ..good.clone()
        };
        for name in ["", "Badge", "1st", "a b", "a=b"] {
            let error = ExperimentError::Name(name.to_owned());
            assert_eq!(named(name).validate(), Err(error));
        }
        assert_eq!(
            experiment(&[10_000], 1).validate(),
            Err(ExperimentError::Variants(1))
        );
        assert_eq!(
            experiment(&[5_000, 4_999], 1).validate(),
            Err(ExperimentError::Weights(9_999))
        );
        let mut twice = good.clone();
        twice.variants[1].name = "control".to_owned();
        let error = ExperimentError::Duplicate("control".to_owned());
        assert_eq!(twice.validate(), Err(error));
    }
}
