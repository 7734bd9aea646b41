//! Routes: which requests, whose, where to, and what is changed on the way. Shaped like the
//! Gateway API's HTTPRoute.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, header};
use serde::Deserialize;
use toml::Spanned;

use super::auth::RawAuthentication;
use super::check::{Checker, Seen};
use super::content::{RawCachePolicy, RawCompression, RawHints};
use super::pattern::Refused;
use super::protect::{RawAccess, RawRateLimit};
use super::raw::{Number, RawConfig, RawTenant, RawTenantHeader, Text};
use super::traffic::Known;
use super::{
    CertificatePart, ExperimentIndex, HostPattern, HostTemplate, ListenerIndex, Name, PathPattern,
    PathTemplate, Policy, Regex, TenantRule, UpstreamIndex,
};

/// Which requests go to which upstream, and on whose account.
#[derive(Clone, Debug)]
pub struct Route {
    /// Unique among routes.
    pub name: Name,
    /// Whose traffic this is; the first upstream's name unless given.
    pub service: Name,
    /// On whose account.
    pub tenant: TenantRule,
    /// Where the route is served; never empty.
    pub listeners: Vec<ListenerIndex>,
    /// Empty: any host.
    pub hosts: Vec<HostPattern>,
    /// Any one of them; never empty.
    pub matches: Vec<Match>,
    /// What becomes of a request.
    pub action: Action,
    /// Changes to the request on its way to the upstream.
    pub request_headers: HeaderEdits,
    /// Changes to the response on its way to the client.
    pub response_headers: HeaderEdits,
    /// Where a copy goes.
    pub mirror: Option<Mirror>,
    /// Which experiments a client is assigned in.
    pub experiments: Vec<ExperimentIndex>,
    /// From the request's header to the response's end, all attempts.
    pub request_timeout: Option<Duration>,
    /// From a connection to the first byte of the response, each attempt.
    pub try_timeout: Option<Duration>,
    /// Who may, how often and how much.
    pub policy: Policy,
}

impl Route {
    /// Every upstream requests may go to.
    pub fn upstreams(&self) -> impl Iterator<Item = UpstreamIndex> {
        let backends = match &self.action {
            Action::Forward { backends, .. } => &backends[..],
            Action::Redirect(_) => &[],
        };
        backends.iter().map(|backend| backend.upstream)
    }
}

/// One way for a request to belong to a route: all of it must hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Match {
    /// Which paths.
    pub path: PathPattern,
    /// Empty: any method.
    pub methods: Vec<Method>,
    /// Sorted by name, each name once.
    pub headers: Vec<(HeaderName, ValuePattern)>,
    /// Sorted by name, each name once.
    pub query: Vec<(Box<str>, ValuePattern)>,
}

/// What a header or a query parameter is compared with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ValuePattern {
    /// This value.
    Exact(Box<str>),
    /// A value that matches as a whole.
    Regex(Regex),
}

impl ValuePattern {
    /// Whether the value is meant.
    pub fn is_match(&self, value: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *value,
            Self::Regex(regex) => regex.is_match(value),
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Action {
    /// It goes to one of these.
    Forward {
        /// Never empty; the weights are not all 0.
        backends: Vec<Backend>,
        /// Changes to the address asked for.
        rewrite: Rewrite,
    },
    /// It is answered with another address.
    Redirect(Redirect),
}

/// A share of a route's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where to.
    pub upstream: UpstreamIndex,
    /// Relative to the other backends; 0 gets none.
    pub weight: u32,
}

/// What replaces the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathEdit {
    /// All of it.
    Full(Box<str>),
    /// The prefix the route matched.
    Prefix(Box<str>),
}

/// Changes to the address asked for, before it goes to the upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// The Host header.
    pub host: Option<Box<str>>,
    /// The path; the query stays.
    pub path: Option<PathEdit>,
}

/// Another address to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`; else the listener's.
    pub scheme: Option<&'static str>,
    /// Else the one asked for.
    pub host: Option<Box<str>>,
    /// Else the scheme's if one is given, else the listener's.
    pub port: Option<u16>,
    /// Else the one asked for.
    pub path: Option<PathEdit>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// Changes to headers; no name is in two of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Replace what is there.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Beside what is there.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Take away.
    pub remove: Vec<HeaderName>,
}

/// A copy of requests, whose answer nobody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Where to.
    pub upstream: UpstreamIndex,
    /// Of the requests, 0 to 100.
    pub percent: u32,
    /// Requests with a longer body are not mirrored, and counted.
    pub body_max_bytes: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRoute {
    pub(super) name: Text,
    pub(super) service: Option<Text>,
    pub(super) tenant: Option<Spanned<RawTenant>>,
    pub(super) listeners: Option<Spanned<Vec<Text>>>,
    pub(super) hosts: Option<Spanned<Vec<Text>>>,
    pub(super) path: Option<Spanned<RawPath>>,
    pub(super) methods: Option<Spanned<Vec<Text>>>,
    pub(super) headers: Option<Vec<RawValueMatch>>,
    pub(super) query: Option<Vec<RawValueMatch>>,
    pub(super) matches: Option<Spanned<Vec<Spanned<RawMatch>>>>,
    pub(super) upstream: Option<Text>,
    pub(super) backends: Option<Spanned<Vec<RawBackend>>>,
    pub(super) redirect: Option<Spanned<RawRedirect>>,
    pub(super) rewrite: Option<Spanned<RawRewrite>>,
    pub(super) request_headers: Option<RawHeaderEdits>,
    pub(super) response_headers: Option<RawHeaderEdits>,
    pub(super) mirror: Option<RawMirror>,
    pub(super) experiments: Option<Spanned<Vec<Text>>>,
    pub(super) request_timeout_ms: Option<Number>,
    pub(super) try_timeout_ms: Option<Number>,
    pub(super) access: Option<RawAccess>,
    pub(super) body_bytes_max: Option<Number>,
    #[serde(default)]
    pub(super) rate_limits: Vec<Spanned<RawRateLimit>>,
    pub(super) authentication: Option<RawAuthentication>,
    pub(super) cache: Option<RawCachePolicy>,
    pub(super) compression: Option<RawCompression>,
    pub(super) hints: Option<RawHints>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawMatch {
    pub(super) path: Option<Spanned<RawPath>>,
    pub(super) methods: Option<Spanned<Vec<Text>>>,
    pub(super) headers: Option<Vec<RawValueMatch>>,
    pub(super) query: Option<Vec<RawValueMatch>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawPath {
    pub(super) exact: Option<Text>,
    pub(super) prefix: Option<Text>,
    pub(super) regex: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawValueMatch {
    pub(super) name: Text,
    pub(super) exact: Option<Text>,
    pub(super) regex: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawBackend {
    pub(super) upstream: Text,
    pub(super) weight: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRedirect {
    pub(super) scheme: Option<Text>,
    pub(super) host: Option<Text>,
    pub(super) port: Option<Number>,
    pub(super) path: Option<Text>,
    pub(super) prefix: Option<Text>,
    pub(super) status: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRewrite {
    pub(super) host: Option<Text>,
    pub(super) path: Option<Text>,
    pub(super) prefix: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawHeaderEdits {
    pub(super) set: Option<BTreeMap<Spanned<String>, Text>>,
    pub(super) add: Option<BTreeMap<Spanned<String>, Text>>,
    pub(super) remove: Option<Vec<Text>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawMirror {
    pub(super) upstream: Text,
    pub(super) percent: Option<Number>,
    pub(super) body_max_bytes: Option<Number>,
}

/// An example line for each field.
pub(super) const EXAMPLES: &[(&str, &str)] = &[
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

impl Checker<'_> {
    pub(super) fn routes(&mut self, raw: &RawConfig, known: &Known<'_>) -> Option<Vec<Arc<Route>>> {
        let mut names = Seen::default();
        let mut claims = Claims::default();
        let mut routes = Vec::new();
        for (index, spanned) in raw.routes.iter().enumerate() {
            let here = format!("routes[{index}]");
            let route = self.route(raw, spanned, &here, known, &mut names);
            if let Some(route) = &route {
                for conflict in claims.claim(index, route, &known.listeners) {
                    let fix = "give one of the two another host, path or method, or delete it";
                    self.report(spanned.span(), &here, conflict, fix);
                }
            }
            routes.push(route.map(Arc::new));
        }
        routes.into_iter().collect()
    }

    fn route<'r>(
        &mut self,
        config: &RawConfig,
        spanned: &'r Spanned<RawRoute>,
        here: &str,
        known: &Known<'_>,
        names: &mut Seen<&'r str>,
    ) -> Option<Route> {
        let raw = spanned.get_ref();
        let name = self.unique_name(names, &raw.name, &format!("{here}.name"));
        let matches = self.matches(raw, here);
        let action = self.action(spanned, here, known, matches.as_deref());
        let service = self.service(raw, here, name.as_ref());
        let tenant = self.tenant(raw.tenant.as_ref(), &format!("{here}.tenant"));
        let listeners = match &raw.listeners {
            Some(list) => {
                let field = format!("{here}.listeners");
                self.list(
                    list.get_ref(),
                    list.span(),
                    &field,
                    |checker, text, field| {
                        checker
                            .reference(text, field, "listener", &known.listeners)
                            .map(ListenerIndex)
                    },
                )
            }
            None => Some((0..known.listeners.len()).map(ListenerIndex).collect()),
        };
        let hosts = match &raw.hosts {
            Some(list) => {
                let field = format!("{here}.hosts");
                self.list(list.get_ref(), list.span(), &field, Self::host)
            }
            None => Some(Vec::new()),
        };
        let experiments = match &raw.experiments {
            Some(list) => {
                let field = format!("{here}.experiments");
                self.list(
                    list.get_ref(),
                    list.span(),
                    &field,
                    |checker, text, field| {
                        checker
                            .reference(text, field, "experiment", &known.experiments)
                            .map(ExperimentIndex)
                    },
                )
            }
            None => Some(Vec::new()),
        };
        let request_headers = raw.request_headers.as_ref();
        let request_headers =
            self.header_edits(request_headers, &format!("{here}.request_headers"));
        let response_headers = raw.response_headers.as_ref();
        let response_headers =
            self.header_edits(response_headers, &format!("{here}.response_headers"));
        let mirror = match &raw.mirror {
            Some(raw) => self.mirror(raw, &format!("{here}.mirror"), known).map(Some),
            None => Some(None),
        };
        let request_timeout = self.optional_ms(
            raw.request_timeout_ms.as_ref(),
            &format!("{here}.request_timeout_ms"),
        );
        let try_timeout = self.optional_ms(
            raw.try_timeout_ms.as_ref(),
            &format!("{here}.try_timeout_ms"),
        );
        let policy = self.policy(config, raw, here);
        Some(Route {
            policy: policy?,
            name: name?,
            service: service?,
            tenant: tenant?,
            listeners: listeners?,
            hosts: hosts?,
            matches: matches?,
            action: action?,
            request_headers: request_headers?,
            response_headers: response_headers?,
            mirror: mirror?,
            experiments: experiments?,
            request_timeout: request_timeout?,
            try_timeout: try_timeout?,
        })
    }

    fn service(&mut self, raw: &RawRoute, here: &str, route: Option<&Name>) -> Option<Name> {
        if let Some(text) = &raw.service {
            let field = format!("{here}.service");
            return self.name(text.get_ref(), text.span(), &field);
        }
        let first = raw
            .backends
            .as_ref()
            .and_then(|list| list.get_ref().first());
        let upstream = raw
            .upstream
            .as_ref()
            .or(first.map(|backend| &backend.upstream));
        match upstream {
            // A bad upstream name is reported at the upstream.
            Some(text) => Name::new(text.get_ref()),
            None => route.cloned(),
        }
    }

    fn tenant(&mut self, raw: Option<&Spanned<RawTenant>>, field: &str) -> Option<TenantRule> {
        let none = || Name::new("none");
        let Some(tenant) = raw else {
            return none().map(TenantRule::Fixed);
        };
        match tenant.get_ref() {
            RawTenant::Fixed(text) => self.name(text, tenant.span(), field).map(TenantRule::Fixed),
            RawTenant::Header(table) => self.tenant_of(table, tenant.span(), field),
        }
    }

    /// The rules of a table, in their fixed order: what is verified before what a client says, and where a request
    /// goes before what it carries.
    fn tenant_of(
        &mut self,
        table: &RawTenantHeader,
        at: Range<usize>,
        field: &str,
    ) -> Option<TenantRule> {
        let default = match &table.default {
            Some(text) => self.name(text.get_ref(), text.span(), &format!("{field}.default")),
            None => Name::new("none"),
        }?;
        let mut rules = Vec::new();
        if let Some(text) = &table.claim {
            rules.push(Some(TenantRule::Claim {
                claim: text.get_ref().as_str().into(),
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.certificate {
            let known = [
                ("name", CertificatePart::Name),
                ("alternative_name", CertificatePart::AlternativeName),
                ("common_name", CertificatePart::CommonName),
            ];
            let part = self.choice(text, &format!("{field}.certificate"), &known);
            rules.push(part.map(|part| TenantRule::Certificate {
                part,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.host {
            let template = HostTemplate::parse(text.get_ref());
            let template = self.accepted(template, text, &format!("{field}.host"));
            rules.push(template.map(|template| TenantRule::Host {
                template,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.path {
            let template = PathTemplate::parse(text.get_ref());
            let template = self.accepted(template, text, &format!("{field}.path"));
            rules.push(template.map(|template| TenantRule::Path {
                template,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.header {
            let header: Option<HeaderName> = text.get_ref().parse().ok();
            if header.is_none() {
                let wrong = format!("\"{}\" is not a header name", text.get_ref());
                let fix = "write such as `header = \"x-tenant\"`";
                self.report(text.span(), format!("{field}.header"), wrong, fix);
            }
            rules.push(header.map(|header| TenantRule::Header {
                header,
                default: default.clone(),
            }));
        }
        let mut rules = rules.into_iter().collect::<Option<Vec<TenantRule>>>()?;
        match rules.len() {
            0 => {
                let wrong = "says nowhere to read the tenant from";
                let fix =
                    "write such as `tenant = { header = \"x-tenant\", default = \"public\" }`";
                self.report(at, field, wrong, fix);
                None
            }
            1 => rules.pop(),
            _ => Some(TenantRule::FirstOf { rules, default }),
        }
    }

    fn policy(&mut self, config: &RawConfig, raw: &RawRoute, here: &str) -> Option<Policy> {
        let access = self.access(raw.access.as_ref(), &format!("{here}.access"));
        let field = format!("{here}.body_bytes_max");
        let body = self.optional(&raw.body_bytes_max, &field, 1 << 50);
        let store = config.rate_limit_store.is_some();
        let limits = self.rate_limits(&raw.rate_limits, store, &format!("{here}.rate_limits"));
        let authentication = self.authentication(config, raw, here);
        let content = self.content(raw, here);
        let content = content?;
        Some(Policy {
            access: access?,
            body_bytes_max: body?,
            rate_limits: limits?,
            authentication: authentication?,
            cache: content.cache,
            compression: content.compression,
            hints: content.hints,
        })
    }

    pub(super) fn header_name(&mut self, text: &Text, field: &str) -> Option<HeaderName> {
        let header: Option<HeaderName> = text.get_ref().parse().ok();
        if header.is_none() {
            let wrong = format!("\"{}\" is not a header name", text.get_ref());
            let fix = "write such as `header = \"x-tenant\"`";
            self.report(text.span(), field, wrong, fix);
        }
        header
    }

    fn mirror(&mut self, raw: &RawMirror, here: &str, known: &Known<'_>) -> Option<Mirror> {
        let field = format!("{here}.upstream");
        let upstream = self.reference(&raw.upstream, &field, "upstream", &known.upstreams);
        let percent = raw.percent.as_ref();
        let percent = self.number(percent, &format!("{here}.percent"), 0..=100, 100);
        let body = raw.body_max_bytes.as_ref();
        let field = format!("{here}.body_max_bytes");
        let body = self.number(body, &field, 0..=16_777_216, 65_536);
        Some(Mirror {
            upstream: UpstreamIndex(upstream?),
            percent: percent?,
            body_max_bytes: body?,
        })
    }

    /// `Some(None)` when left out.
    pub(super) fn optional_ms(
        &mut self,
        raw: Option<&Number>,
        field: &str,
    ) -> Option<Option<Duration>> {
        match raw {
            Some(_) => self
                .number(raw, field, 1..=3_600_000, 1)
                .map(|ms| Some(Duration::from_millis(ms))),
            None => Some(None),
        }
    }
}

/// What is matched.
impl Checker<'_> {
    fn matches(&mut self, raw: &RawRoute, here: &str) -> Option<Vec<Match>> {
        let Some(list) = &raw.matches else {
            let (headers, query) = (raw.headers.as_deref(), raw.query.as_deref());
            let one = self.one_match(
                raw.path.as_ref(),
                raw.methods.as_ref(),
                headers,
                query,
                here,
            );
            return one.map(|one| vec![one]);
        };
        let field = format!("{here}.matches");
        let outside = raw.path.is_some()
            || raw.methods.is_some()
            || raw.headers.is_some()
            || raw.query.is_some();
        if outside {
            let wrong = "stands beside `path`, `methods`, `headers` or `query`";
            let fix = "move them into one of the matches";
            self.report(list.span(), &field, wrong, fix);
            return None;
        }
        if list.get_ref().is_empty() {
            let fix = "leave it out to match everything";
            self.report(list.span(), &field, "is empty", fix);
            return None;
        }
        let checked: Vec<Option<Match>> = list
            .get_ref()
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let raw = raw.get_ref();
                let (headers, query) = (raw.headers.as_deref(), raw.query.as_deref());
                let here = format!("{field}[{index}]");
                self.one_match(
                    raw.path.as_ref(),
                    raw.methods.as_ref(),
                    headers,
                    query,
                    &here,
                )
            })
            .collect();
        checked.into_iter().collect()
    }

    fn one_match(
        &mut self,
        path: Option<&Spanned<RawPath>>,
        methods: Option<&Spanned<Vec<Text>>>,
        headers: Option<&[RawValueMatch]>,
        query: Option<&[RawValueMatch]>,
        here: &str,
    ) -> Option<Match> {
        let methods = match methods {
            Some(list) => {
                let field = format!("{here}.methods");
                self.list(list.get_ref(), list.span(), &field, Self::method)
            }
            None => Some(Vec::new()),
        };
        let path = match path {
            Some(path) => self.path_pattern(path.get_ref(), path.span(), &format!("{here}.path")),
            None => Some(PathPattern::Prefix("".into())),
        };
        let headers = self.values(headers, &format!("{here}.headers"), Self::header_name);
        let query = self.values(query, &format!("{here}.query"), |_, text, _| {
            Some(Box::<str>::from(text.get_ref().as_str()))
        });
        let mut headers = headers?;
        headers.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        let mut query = query?;
        query.sort_by(|(a, _), (b, _)| a.cmp(b));
        Some(Match {
            path: path?,
            methods: methods?,
            headers,
            query,
        })
    }

    fn values<N: PartialEq>(
        &mut self,
        raw: Option<&[RawValueMatch]>,
        here: &str,
        mut named: impl FnMut(&mut Self, &Text, &str) -> Option<N>,
    ) -> Option<Vec<(N, ValuePattern)>> {
        let mut values: Vec<Option<(N, ValuePattern)>> = Vec::new();
        for (index, raw) in raw.unwrap_or_default().iter().enumerate() {
            let here = format!("{here}[{index}]");
            let name = named(self, &raw.name, &format!("{here}.name"));
            if let Some(name) = &name
                && values.iter().flatten().any(|(known, _)| known == name)
            {
                let wrong = format!("\"{}\" is already matched", raw.name.get_ref());
                let fix = "keep one; write a regex for several values";
                self.report(raw.name.span(), format!("{here}.name"), wrong, fix);
            }
            let pattern = match (&raw.exact, &raw.regex) {
                (Some(text), None) => Some(ValuePattern::Exact(text.get_ref().as_str().into())),
                (None, Some(text)) => {
                    let regex = Regex::parse(text.get_ref());
                    self.accepted(regex, text, &format!("{here}.regex"))
                        .map(ValuePattern::Regex)
                }
                _ => {
                    let fix = "write either `exact` or `regex`";
                    let wrong = "needs one of `exact` and `regex`";
                    self.report(raw.name.span(), &here, wrong, fix);
                    None
                }
            };
            values.push(name.zip(pattern));
        }
        values.into_iter().collect()
    }

    fn host(&mut self, text: &Text, field: &str) -> Option<HostPattern> {
        let pattern = HostPattern::parse(text.get_ref());
        self.accepted(pattern, text, field)
    }

    fn method(&mut self, text: &Text, field: &str) -> Option<Method> {
        let written = text.get_ref();
        let capital = written.to_ascii_uppercase();
        let method = match Method::from_bytes(written.as_bytes()) {
            Ok(method) if *written == capital => Ok(method),
            Ok(_) => Err(("is not in capital letters", format!("write \"{capital}\""))),
            Err(_) => Err(("is not a method", "write such as \"GET\"".to_owned())),
        };
        self.accepted(method, text, field)
    }

    fn path_pattern(
        &mut self,
        raw: &RawPath,
        at: Range<usize>,
        field: &str,
    ) -> Option<PathPattern> {
        match (&raw.exact, &raw.prefix, &raw.regex) {
            (Some(text), None, None) => {
                let pattern = PathPattern::exact(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.exact"))
            }
            (None, Some(text), None) => {
                let pattern = PathPattern::prefix(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.prefix"))
            }
            (None, None, Some(text)) => {
                let pattern = Regex::parse(text.get_ref()).map(PathPattern::Regex);
                self.accepted(pattern, text, &format!("{field}.regex"))
            }
            (exact, prefix, _) => {
                let wrong = match (exact, prefix) {
                    (Some(_), Some(_)) => "has both `exact` and `prefix`",
                    (None, None) => "has neither `exact`, `prefix` nor `regex`",
                    _ => "has a `regex` beside another pattern",
                };
                let fix = r#"write `path = { prefix = "/api" }` or `path = { exact = "/x" }`"#;
                self.report(at, field, wrong, fix);
                None
            }
        }
    }

    pub(super) fn accepted<T>(
        &mut self,
        result: Result<T, Refused>,
        text: &Text,
        field: &str,
    ) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err((wrong, fix)) => {
                let wrong = format!("\"{}\" {wrong}", text.get_ref());
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }

    /// A list that, when written, is neither empty nor repeats itself.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        list: &[Text],
        at: Range<usize>,
        field: &str,
        mut item: impl FnMut(&mut Self, &Text, &str) -> Option<T>,
    ) -> Option<Vec<T>> {
        if list.is_empty() {
            let fix = "leave it out to mean all, or name at least one";
            self.report(at, field, "is empty", fix);
            return None;
        }
        let mut values: Vec<Option<T>> = Vec::new();
        for (index, text) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let value = item(self, text, &field);
            if value.is_some() && values.contains(&value) {
                let wrong = format!("\"{}\" is already in the list", text.get_ref());
                self.report(text.span(), field, wrong, "delete it");
            }
            values.push(value);
        }
        values.into_iter().collect()
    }
}

/// What becomes of a request.
impl Checker<'_> {
    fn action(
        &mut self,
        spanned: &Spanned<RawRoute>,
        here: &str,
        known: &Known<'_>,
        matches: Option<&[Match]>,
    ) -> Option<Action> {
        let raw = spanned.get_ref();
        let prefixed = matches.is_none_or(|matches| {
            let mut paths = matches.iter().map(|one| &one.path);
            paths.all(|path| matches!(path, PathPattern::Prefix(_)))
        });
        let one = Backend {
            upstream: UpstreamIndex(0),
            weight: 1,
        };
        let backends = match (&raw.upstream, &raw.backends, &raw.redirect) {
            (Some(text), None, None) => {
                let field = format!("{here}.upstream");
                let upstream = self.reference(text, &field, "upstream", &known.upstreams)?;
                vec![Backend {
                    upstream: UpstreamIndex(upstream),
                    ..one
                }]
            }
            (None, Some(list), None) => {
                let field = format!("{here}.backends");
                self.backends(list.get_ref(), list.span(), &field, known)?
            }
            (None, None, Some(redirect)) => {
                let field = format!("{here}.redirect");
                if let Some(rewrite) = &raw.rewrite {
                    let fix = "write what changes into `redirect`";
                    let field = format!("{here}.rewrite");
                    self.report(rewrite.span(), field, "stands beside `redirect`", fix);
                }
                return self
                    .redirect(redirect.get_ref(), redirect.span(), &field, prefixed)
                    .map(Action::Redirect);
            }
            (None, None, None) => {
                let fix = "add `upstream = \"orders\"`, `backends` or `redirect`";
                let wrong = "goes nowhere: has neither `upstream`, `backends` nor `redirect`";
                self.report(spanned.span(), here, wrong, fix);
                return None;
            }
            _ => {
                let fix = "keep one of `upstream`, `backends` and `redirect`";
                let wrong = "has more than one of `upstream`, `backends` and `redirect`";
                self.report(spanned.span(), here, wrong, fix);
                return None;
            }
        };
        let rewrite = match &raw.rewrite {
            None => Rewrite::default(),
            Some(raw) => {
                let (raw, at) = (raw.get_ref(), raw.span());
                let field = format!("{here}.rewrite");
                let host = match &raw.host {
                    Some(text) => self.plain_host(text, &format!("{field}.host")).map(Some),
                    None => Some(None),
                };
                let (full, prefix) = (raw.path.as_ref(), raw.prefix.as_ref());
                let path = self.path_edit(full, prefix, at, &field, prefixed);
                Rewrite {
                    host: host?,
                    path: path?,
                }
            }
        };
        Some(Action::Forward { backends, rewrite })
    }

    fn backends(
        &mut self,
        list: &[RawBackend],
        at: Range<usize>,
        here: &str,
        known: &Known<'_>,
    ) -> Option<Vec<Backend>> {
        let mut seen = Seen::default();
        let checked: Vec<Option<Backend>> = list
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("{here}[{index}]");
                let field = format!("{here}.upstream");
                let upstream = self.reference(&raw.upstream, &field, "upstream", &known.upstreams);
                let name = raw.upstream.get_ref().as_str();
                self.unique(
                    &mut seen,
                    name,
                    raw.upstream.span(),
                    &field,
                    "add the weights",
                );
                let weight = raw.weight.as_ref();
                let weight = self.number(weight, &format!("{here}.weight"), 0..=1_000_000, 1);
                Some(Backend {
                    upstream: UpstreamIndex(upstream?),
                    weight: weight?,
                })
            })
            .collect();
        let backends: Option<Vec<Backend>> = checked.into_iter().collect();
        if backends.as_ref()?.iter().all(|backend| backend.weight == 0) {
            let fix = "give at least one backend a weight above 0";
            self.report(at, here, "gets no request: every weight is 0", fix);
            return None;
        }
        backends
    }

    fn redirect(
        &mut self,
        raw: &RawRedirect,
        at: Range<usize>,
        here: &str,
        prefixed: bool,
    ) -> Option<Redirect> {
        let scheme = match &raw.scheme {
            Some(text) => self
                .choice(
                    text,
                    &format!("{here}.scheme"),
                    &[("http", "http"), ("https", "https")],
                )
                .map(Some),
            None => Some(None),
        };
        let host = match &raw.host {
            Some(text) => self.plain_host(text, &format!("{here}.host")).map(Some),
            None => Some(None),
        };
        let port = match &raw.port {
            Some(_) => self
                .number(raw.port.as_ref(), &format!("{here}.port"), 1..=65_535, 1)
                .map(Some),
            None => Some(None),
        };
        let (full, prefix) = (raw.path.as_ref(), raw.prefix.as_ref());
        let path = self.path_edit(full, prefix, at.clone(), here, prefixed);
        let status: Option<u16> = self.number(
            raw.status.as_ref(),
            &format!("{here}.status"),
            301..=308,
            302,
        );
        if let Some(304..=306) = status {
            let fix = "write 301, 302, 303, 307 or 308";
            self.report(at.clone(), format!("{here}.status"), "is no redirect", fix);
        }
        let redirect = Redirect {
            scheme: scheme?,
            host: host?,
            port: port?,
            path: path?,
            status: status?,
        };
        let same = redirect.scheme.is_none()
            && redirect.host.is_none()
            && redirect.port.is_none()
            && redirect.path.is_none();
        if same {
            let fix = r#"write such as `redirect = { scheme = "https" }`"#;
            self.report(at, here, "leads to where it came from", fix);
            return None;
        }
        Some(redirect)
    }

    fn path_edit(
        &mut self,
        full: Option<&Text>,
        prefix: Option<&Text>,
        at: Range<usize>,
        here: &str,
        prefixed: bool,
    ) -> Option<Option<PathEdit>> {
        let raw = |text: &str| PathPattern::exact(text).map(|_| Box::<str>::from(text));
        match (full, prefix) {
            (None, None) => Some(None),
            (Some(text), None) => self
                .accepted(raw(text.get_ref()), text, &format!("{here}.path"))
                .map(|path| Some(PathEdit::Full(path))),
            (None, Some(text)) => {
                let field = format!("{here}.prefix");
                if !prefixed {
                    let wrong = "replaces a prefix, and the route does not match by prefix alone";
                    let fix = "write `path` instead, or match with `path = { prefix = … }`";
                    self.report(text.span(), field, wrong, fix);
                    return None;
                }
                let path = match text.get_ref().as_str() {
                    "" => Some("".into()),
                    path => self.accepted(raw(path), text, &field),
                };
                path.map(|path| Some(PathEdit::Prefix(path)))
            }
            (Some(_), Some(_)) => {
                self.report(
                    at,
                    here,
                    "has both `path` and `prefix`",
                    "keep one of the two",
                );
                None
            }
        }
    }

    /// A host to write into a message.
    fn plain_host(&mut self, text: &Text, field: &str) -> Option<Box<str>> {
        let host = match HostPattern::parse(text.get_ref()) {
            Ok(HostPattern::Wildcard(_)) => {
                Err(("stands for many hosts", "write one name".to_owned()))
            }
            Ok(host) => Ok(host.to_string().into()),
            Err(refused) => Err(refused),
        };
        self.accepted(host, text, field)
    }

    fn header_edits(&mut self, raw: Option<&RawHeaderEdits>, here: &str) -> Option<HeaderEdits> {
        let Some(raw) = raw else {
            return Some(HeaderEdits::default());
        };
        let mut seen = Seen::default();
        let mut values = |checker: &mut Self, map: &Option<BTreeMap<Text, Text>>, key: &str| {
            let pairs = map.iter().flatten().map(|(name, value)| {
                let field = format!("{here}.{key}.{}", name.get_ref());
                let header = checker.edited_header(name, &field, &mut seen);
                let parsed = HeaderValue::from_str(value.get_ref());
                if parsed.is_err() {
                    let fix = "write visible ASCII characters";
                    let wrong = "is not a header value";
                    checker.report(value.span(), field, wrong, fix);
                }
                header.zip(parsed.ok())
            });
            pairs.collect::<Vec<_>>()
        };
        let set = values(self, &raw.set, "set");
        let add = values(self, &raw.add, "add");
        let remove: Vec<Option<HeaderName>> = raw
            .remove
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, name)| {
                self.edited_header(name, &format!("{here}.remove[{index}]"), &mut seen)
            })
            .collect();
        Some(HeaderEdits {
            set: set.into_iter().collect::<Option<_>>()?,
            add: add.into_iter().collect::<Option<_>>()?,
            remove: remove.into_iter().collect::<Option<_>>()?,
        })
    }

    fn edited_header(
        &mut self,
        text: &Text,
        field: &str,
        seen: &mut Seen<String>,
    ) -> Option<HeaderName> {
        /// What frames the message, or has a field of its own.
        const FIXED: [HeaderName; 6] = [
            header::HOST,
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::CONNECTION,
            header::UPGRADE,
            header::TE,
        ];
        let name = self.header_name(text, field)?;
        if FIXED.contains(&name) {
            let wrong = format!("`{name}` is the gateway's to write");
            let fix = "delete it; the host is changed with `rewrite`";
            self.report(text.span(), field, wrong, fix);
            return None;
        }
        let key = name.as_str().to_owned();
        self.unique(seen, key, text.span(), field, "keep one of the two")?;
        Some(name)
    }
}

/// What one route says about requests at the finest grain the router distinguishes. Two routes
/// with one claim in common would leave the order of the file to decide: refused.
type Claim = (ListenerIndex, Option<HostPattern>, Match, Option<Method>);

#[derive(Default)]
struct Claims(HashMap<Claim, (usize, Name)>);

impl Claims {
    /// Enters a route's claims; a sentence for every earlier route that has one of them.
    fn claim(&mut self, index: usize, route: &Route, listeners: &[&str]) -> Vec<String> {
        let mut conflicts = Vec::new();
        let mut reported = HashSet::new();
        let hosts = one_or_any(&route.hosts);
        for one in &route.matches {
            let bare = Match {
                methods: Vec::new(),
                ..one.clone()
            };
            for &listener in &route.listeners {
                for host in &hosts {
                    for method in one_or_any(&one.methods) {
                        let claim = (listener, host.clone(), bare.clone(), method.clone());
                        let (first, first_name) = self
                            .0
                            .entry(claim)
                            .or_insert_with(|| (index, route.name.clone()));
                        if *first != index && reported.insert(*first) {
                            conflicts.push(format!(
                                "claims the same requests as routes[{first}] \"{first_name}\": listener {}, {}, path {}, {}",
                                listeners.get(listener.0).unwrap_or(&"?"),
                                host.as_ref().map_or("any host".into(), |host| format!("host {host}")),
                                one.path,
                                method.as_ref().map_or("any method".into(), |method| format!("method {method}")),
                            ));
                        }
                    }
                }
            }
        }
        conflicts
    }
}

fn one_or_any<T: Clone>(values: &[T]) -> Vec<Option<T>> {
    if values.is_empty() {
        vec![None]
    } else {
        values.iter().cloned().map(Some).collect()
    }
}
