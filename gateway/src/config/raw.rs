//! The file as written: which fields exist and their TOML types, nothing more. What routes,
//! upstreams and experiments look like is beside their meaning, in files of their own.
//!
//! A value is `Spanned` where `check` may still complain about it. Missing required fields, unknown
//! fields and wrong types are serde's to find; `shape` turns its messages into problems.

use std::fmt;

use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{Deserializer, MapAccess, Visitor};
use toml::Spanned;

use super::auth::{RawForwardAuth, RawRateStore, RawTokens};
use super::content::RawCache;
use super::experiment::RawExperiment;
use super::protect::{RawAccess, RawLimits};
use super::route::RawRoute;
use super::tls::RawTls;
use super::tracing::RawTracing;
use super::upstream::RawUpstream;

pub(super) type Text = Spanned<String>;
pub(super) type Number = Spanned<i64>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawConfig {
    #[serde(default)]
    pub(super) gateway: RawGateway,
    #[serde(default)]
    pub(super) admin: RawAdmin,
    pub(super) observe: Option<Spanned<RawObserve>>,
    pub(super) access_log: Option<RawAccessLog>,
    #[serde(default)]
    pub(super) listeners: Vec<RawListener>,
    #[serde(default)]
    pub(super) upstreams: Vec<RawUpstream>,
    #[serde(default)]
    pub(super) experiments: Vec<RawExperiment>,
    #[serde(default)]
    pub(super) routes: Vec<Spanned<RawRoute>>,
    #[serde(default)]
    pub(super) tokens: Vec<RawTokens>,
    #[serde(default)]
    pub(super) forward_auth: Vec<RawForwardAuth>,
    pub(super) rate_limit_store: Option<RawRateStore>,
    pub(super) cache: Option<RawCache>,
    pub(super) prices: Option<Spanned<RawPrices>>,
    #[serde(default)]
    pub(super) retention: RawRetention,
    #[serde(default)]
    pub(super) push: Vec<Spanned<RawPush>>,
    #[serde(default)]
    pub(super) budgets: Vec<Spanned<RawBudget>>,
    #[serde(default)]
    pub(super) classes: Vec<RawClass>,
    pub(super) tracing: Option<RawTracing>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawClass {
    pub(super) name: Text,
    pub(super) cidrs: Spanned<Vec<Text>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawGateway {
    pub(super) state_dir: Option<Text>,
    pub(super) threads: Option<Number>,
    pub(super) grace_seconds: Option<Number>,
    pub(super) drain_delay_seconds: Option<Number>,
    pub(super) upgrade_timeout_seconds: Option<Number>,
    pub(super) lane: Option<Text>,
    pub(super) id: Option<Text>,
    pub(super) ledger: Option<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRetention {
    pub(super) seconds_for_minutes: Option<Number>,
    pub(super) minutes_for_days: Option<Number>,
    pub(super) hours_for_days: Option<Number>,
    pub(super) days_for_days: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawBudget {
    pub(super) name: Text,
    pub(super) period: Text,
    pub(super) limit_bytes: Option<Number>,
    pub(super) limit_money: Option<Text>,
    pub(super) routes: Option<Spanned<Vec<Text>>>,
    pub(super) services: Option<Spanned<Vec<Text>>>,
    pub(super) tenants: Option<Spanned<Vec<Text>>>,
    pub(super) timezone: Option<Text>,
    pub(super) warn_percent: Option<Spanned<Vec<Number>>>,
    pub(super) action: Option<Text>,
    pub(super) throttle_bytes_per_second: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawPush {
    pub(super) name: Text,
    pub(super) url: Text,
    pub(super) secret_file: Option<Text>,
    pub(super) token_file: Option<Text>,
    pub(super) ca_file: Option<Text>,
    pub(super) confirm_url: Option<Text>,
    pub(super) tenants: Option<Spanned<Vec<Text>>>,
    pub(super) unattributed: Option<bool>,
    pub(super) batch: Option<Number>,
    pub(super) window_seconds: Option<Number>,
    pub(super) timeout_ms: Option<Number>,
    pub(super) dedupe_seconds: Option<Number>,
    pub(super) keep_days: Option<Number>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAdmin {
    pub(super) listen: Option<Text>,
    pub(super) token_file: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawObserve {
    pub(super) enabled: Option<bool>,
    pub(super) interfaces: Option<Spanned<Vec<Text>>>,
    #[serde(default)]
    pub(super) exclude: Vec<Text>,
    #[serde(default)]
    pub(super) boundary: Vec<Text>,
    #[serde(default)]
    pub(super) namespaces: Vec<Text>,
    pub(super) attach: Option<Text>,
    pub(super) bpffs: Option<Text>,
    pub(super) flows_max: Option<Number>,
    pub(super) connections_max: Option<Number>,
    pub(super) accounts_max: Option<Number>,
    pub(super) collect_interval_ms: Option<Number>,
    pub(super) required: Option<bool>,
    pub(super) kernel_log: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAccessLog {
    pub(super) path: Text,
    pub(super) queue: Option<Number>,
    pub(super) settle_ms: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawListener {
    pub(super) name: Text,
    pub(super) address: Text,
    pub(super) http2: Option<bool>,
    pub(super) tls: Option<RawTls>,
    pub(super) limits: Option<RawLimits>,
    pub(super) access: Option<RawAccess>,
    pub(super) trusted_proxies: Option<Spanned<Vec<Text>>>,
    pub(super) proxy_protocol_from: Option<Spanned<Vec<Text>>>,
}

/// `"address"` or `{ address = "…", weight = … }`.
pub(super) enum RawPeer {
    Address(String),
    Weighted(RawWeightedPeer),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawWeightedPeer {
    pub(super) address: Text,
    pub(super) weight: Option<Number>,
}

/// `"name"`, or a table with one or more of `claim`, `certificate`, `host`, `path` and `header`.
pub(super) enum RawTenant {
    Fixed(String),
    Header(Box<RawTenantHeader>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTenantHeader {
    pub(super) header: Option<Text>,
    pub(super) certificate: Option<Text>,
    pub(super) claim: Option<Text>,
    pub(super) host: Option<Text>,
    pub(super) path: Option<Text>,
    pub(super) default: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawPrices {
    pub(super) book: Option<Text>,
    pub(super) currency: Option<Text>,
    #[serde(default)]
    pub(super) rates: Vec<Spanned<RawRate>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRate {
    pub(super) id: Text,
    pub(super) leg: Text,
    pub(super) direction: Text,
    pub(super) price: Text,
    pub(super) unit_bytes: Number,
}

impl<'de> Deserialize<'de> for RawPeer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrTable {
            expected: "an address or a table with `address` and `weight`",
            text: |text| Self::Address(text),
            table: |table| Self::Weighted(table),
            table_type: std::marker::PhantomData,
        })
    }
}

impl<'de> Deserialize<'de> for RawTenant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrTable {
            expected: "a name or a table with `claim`, `certificate`, `host`, `path` or `header`, and `default`",
            text: |text| Self::Fixed(text),
            table: |table| Self::Header(Box::new(table)),
            table_type: std::marker::PhantomData,
        })
    }
}

/// What `#[serde(untagged)]` would do, but keeping the precise error inside the table.
struct TextOrTable<F, G, T> {
    expected: &'static str,
    text: F,
    table: G,
    table_type: std::marker::PhantomData<T>,
}

impl<'de, V, T, F, G> Visitor<'de> for TextOrTable<F, G, T>
where
    T: Deserialize<'de>,
    F: FnOnce(String) -> V,
    G: FnOnce(T) -> V,
{
    type Value = V;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<V, E> {
        String::deserialize(StrDeserializer::new(text)).map(self.text)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(self.table)
    }
}
