//! A price book as written, before anything is checked.

use serde::Deserialize;
use toml::Spanned;

use crate::config::raw::{Number, Text};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawBook {
    pub(super) currency: Text,
    pub(super) timezone: Option<Text>,
    pub(super) account: Option<RawAccount>,
    #[serde(default)]
    pub(super) fx: Vec<RawFx>,
    #[serde(default)]
    pub(super) skus: Vec<Spanned<RawSku>>,
    #[serde(default)]
    pub(super) compute: Vec<RawCompute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAccount {
    pub(super) id: String,
    pub(super) name: Option<String>,
    pub(super) provider: Option<String>,
    pub(super) region: Option<Text>,
    pub(super) region_name: Option<Text>,
    pub(super) availability_zone: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawFx {
    pub(super) from: Text,
    pub(super) to: Text,
    pub(super) rate: Text,
    pub(super) as_of: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawSku {
    pub(super) id: Text,
    pub(super) description: Option<String>,
    pub(super) source: Option<String>,
    #[serde(default)]
    pub(super) bill_names: Vec<String>,
    pub(super) currency: Option<Text>,
    pub(super) leg: Text,
    pub(super) direction: Text,
    pub(super) class: Option<Text>,
    #[serde(default)]
    pub(super) interfaces: Vec<String>,
    pub(super) basis: Option<Text>,
    pub(super) unit_bytes: Option<Number>,
    pub(super) tier_mode: Option<Text>,
    pub(super) pool: Option<Text>,
    pub(super) free_units: Option<Number>,
    pub(super) price: Option<Text>,
    pub(super) tiers: Option<Spanned<Vec<Spanned<RawTier>>>>,
    #[serde(default)]
    pub(super) adders: Vec<RawAdder>,
    pub(super) fixed_per_day: Option<Text>,
    pub(super) sample_s: Option<Number>,
    pub(super) mbps_decimals: Option<Number>,
    pub(super) method: Option<Spanned<RawMethod>>,
    pub(super) commit: Option<RawCommit>,
    pub(super) prorate: Option<Text>,
    pub(super) from: Option<Text>,
    pub(super) until: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTier {
    pub(super) to: Option<Number>,
    pub(super) price: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAdder {
    pub(super) id: Text,
    pub(super) price: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawMethod {
    pub(super) day_rank: Option<Number>,
    pub(super) month_mean_top: Option<Number>,
    pub(super) drop_top_pct: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCommit {
    pub(super) cap_mbps: Number,
    pub(super) floor_pct: Number,
    pub(super) from: Option<Text>,
    pub(super) until: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawCompute {
    pub(super) id: Text,
    pub(super) source: Option<String>,
    pub(super) core_hour: Text,
    pub(super) gib_hour: Option<Text>,
}
