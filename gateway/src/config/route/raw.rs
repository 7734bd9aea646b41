//! How a route is written: its fields, and an example line for each.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use crate::config::auth::RawAuthentication;
use crate::config::content::{RawCachePolicy, RawCompression, RawHints};
use crate::config::protect::{RawAccess, RawRateLimit};
use crate::config::raw::{Number, RawTenant, Text};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawRoute {
    pub(in crate::config) name: Text,
    pub(in crate::config) service: Option<Text>,
    pub(in crate::config) tenant: Option<Spanned<RawTenant>>,
    pub(in crate::config) listeners: Option<Spanned<Vec<Text>>>,
    pub(in crate::config) hosts: Option<Spanned<Vec<Text>>>,
    pub(in crate::config) path: Option<Spanned<RawPath>>,
    pub(in crate::config) methods: Option<Spanned<Vec<Text>>>,
    pub(in crate::config) headers: Option<Vec<RawValueMatch>>,
    pub(in crate::config) query: Option<Vec<RawValueMatch>>,
    pub(in crate::config) matches: Option<Spanned<Vec<Spanned<RawMatch>>>>,
    pub(in crate::config) upstream: Option<Text>,
    pub(in crate::config) backends: Option<Spanned<Vec<RawBackend>>>,
    pub(in crate::config) redirect: Option<Spanned<RawRedirect>>,
    pub(in crate::config) rewrite: Option<Spanned<RawRewrite>>,
    pub(in crate::config) request_headers: Option<RawHeaderEdits>,
    pub(in crate::config) response_headers: Option<RawHeaderEdits>,
    pub(in crate::config) mirror: Option<RawMirror>,
    pub(in crate::config) experiments: Option<Spanned<Vec<Text>>>,
    pub(in crate::config) request_timeout_ms: Option<Number>,
    pub(in crate::config) try_timeout_ms: Option<Number>,
    pub(in crate::config) access: Option<RawAccess>,
    pub(in crate::config) body_bytes_max: Option<Number>,
    #[serde(default)]
    pub(in crate::config) rate_limits: Vec<Spanned<RawRateLimit>>,
    pub(in crate::config) authentication: Option<RawAuthentication>,
    pub(in crate::config) cache: Option<RawCachePolicy>,
    pub(in crate::config) compression: Option<RawCompression>,
    pub(in crate::config) hints: Option<RawHints>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawMatch {
    pub(in crate::config) path: Option<Spanned<RawPath>>,
    pub(in crate::config) methods: Option<Spanned<Vec<Text>>>,
    pub(in crate::config) headers: Option<Vec<RawValueMatch>>,
    pub(in crate::config) query: Option<Vec<RawValueMatch>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawPath {
    pub(in crate::config) exact: Option<Text>,
    pub(in crate::config) prefix: Option<Text>,
    pub(in crate::config) regex: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawValueMatch {
    pub(in crate::config) name: Text,
    pub(in crate::config) exact: Option<Text>,
    pub(in crate::config) regex: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawBackend {
    pub(in crate::config) upstream: Text,
    pub(in crate::config) weight: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawRedirect {
    pub(in crate::config) scheme: Option<Text>,
    pub(in crate::config) host: Option<Text>,
    pub(in crate::config) port: Option<Number>,
    pub(in crate::config) path: Option<Text>,
    pub(in crate::config) prefix: Option<Text>,
    pub(in crate::config) status: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawRewrite {
    pub(in crate::config) host: Option<Text>,
    pub(in crate::config) path: Option<Text>,
    pub(in crate::config) prefix: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawHeaderEdits {
    pub(in crate::config) set: Option<BTreeMap<Spanned<String>, Text>>,
    pub(in crate::config) add: Option<BTreeMap<Spanned<String>, Text>>,
    pub(in crate::config) remove: Option<Vec<Text>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(in crate::config) struct RawMirror {
    pub(in crate::config) upstream: Text,
    pub(in crate::config) percent: Option<Number>,
    pub(in crate::config) body_max_bytes: Option<Number>,
}

/// An example line for each field.
pub(in crate::config) const EXAMPLES: &[(&str, &str)] = &[
    ("routes", "[[routes]]"),
    ("routes.name", r#"name = "orders-create""#),
    ("routes.service", r#"service = "commerce""#),
    (
        "routes.tenant",
        r#"tenant = { header = "x-tenant", default = "public" }"#,
    ),
    ("routes.tenant.header", r#"header = "x-tenant""#),
    ("routes.tenant.default", r#"default = "public""#),
    ("routes.listeners", r#"listeners = ["public"]"#),
    ("routes.hosts", r#"hosts = ["shop.example"]"#),
    ("routes.path", r#"path = { prefix = "/api" }"#),
    ("routes.path.exact", r#"exact = "/x""#),
    ("routes.path.prefix", r#"prefix = "/api""#),
    ("routes.path.regex", r#"regex = "/items/[0-9]+""#),
    ("routes.methods", r#"methods = ["GET"]"#),
    (
        "routes.headers",
        r#"headers = [{ name = "x-beta", exact = "1" }]"#,
    ),
    ("routes.headers.name", r#"name = "x-beta""#),
    ("routes.headers.exact", r#"exact = "1""#),
    ("routes.headers.regex", r#"regex = "1|2""#),
    ("routes.query", r#"query = [{ name = "v", exact = "2" }]"#),
    ("routes.query.name", r#"name = "v""#),
    ("routes.query.exact", r#"exact = "2""#),
    ("routes.query.regex", r#"regex = "[23]""#),
    ("routes.matches", "[[routes.matches]]"),
    ("routes.matches.path", r#"path = { prefix = "/api" }"#),
    ("routes.matches.path.exact", r#"exact = "/x""#),
    ("routes.matches.path.prefix", r#"prefix = "/api""#),
    ("routes.matches.path.regex", r#"regex = "/items/[0-9]+""#),
    ("routes.matches.methods", r#"methods = ["GET"]"#),
    (
        "routes.matches.headers",
        r#"headers = [{ name = "x-beta", exact = "1" }]"#,
    ),
    ("routes.matches.headers.name", r#"name = "x-beta""#),
    ("routes.matches.headers.exact", r#"exact = "1""#),
    ("routes.matches.headers.regex", r#"regex = "1|2""#),
    (
        "routes.matches.query",
        r#"query = [{ name = "v", exact = "2" }]"#,
    ),
    ("routes.matches.query.name", r#"name = "v""#),
    ("routes.matches.query.exact", r#"exact = "2""#),
    ("routes.matches.query.regex", r#"regex = "[23]""#),
    ("routes.upstream", r#"upstream = "orders""#),
    (
        "routes.backends",
        r#"backends = [{ upstream = "orders", weight = 95 }, { upstream = "orders-next", weight = 5 }]"#,
    ),
    ("routes.backends.upstream", r#"upstream = "orders""#),
    ("routes.backends.weight", "weight = 95"),
    (
        "routes.redirect",
        r#"redirect = { scheme = "https", status = 301 }"#,
    ),
    ("routes.redirect.scheme", r#"scheme = "https""#),
    ("routes.redirect.host", r#"host = "www.shop.example""#),
    ("routes.redirect.port", "port = 8443"),
    ("routes.redirect.path", r#"path = "/new""#),
    ("routes.redirect.prefix", r#"prefix = "/v2""#),
    ("routes.redirect.status", "status = 301"),
    ("routes.rewrite", r#"rewrite = { prefix = "/v2" }"#),
    ("routes.rewrite.host", r#"host = "orders.internal""#),
    ("routes.rewrite.path", r#"path = "/new""#),
    ("routes.rewrite.prefix", r#"prefix = "/v2""#),
    (
        "routes.request_headers",
        r#"request_headers = { set = { "x-edge" = "1" } }"#,
    ),
    ("routes.request_headers.set", r#"set = { "x-edge" = "1" }"#),
    ("routes.request_headers.add", r#"add = { "via" = "edge" }"#),
    (
        "routes.request_headers.remove",
        r#"remove = ["x-internal"]"#,
    ),
    (
        "routes.response_headers",
        r#"response_headers = { remove = ["server"] }"#,
    ),
    (
        "routes.response_headers.set",
        r#"set = { "x-frame-options" = "DENY" }"#,
    ),
    (
        "routes.response_headers.add",
        r#"add = { "vary" = "Origin" }"#,
    ),
    ("routes.response_headers.remove", r#"remove = ["server"]"#),
    (
        "routes.mirror",
        r#"mirror = { upstream = "shadow", percent = 10 }"#,
    ),
    ("routes.mirror.upstream", r#"upstream = "shadow""#),
    ("routes.mirror.percent", "percent = 10"),
    ("routes.mirror.body_max_bytes", "body_max_bytes = 65536"),
    ("routes.experiments", r#"experiments = ["badge"]"#),
    ("routes.request_timeout_ms", "request_timeout_ms = 5000"),
    ("routes.try_timeout_ms", "try_timeout_ms = 1000"),
];
