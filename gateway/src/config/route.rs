//! Routes: which requests, whose, where to, and what is changed on the way. Shaped like the
//! Gateway API's HTTPRoute.

mod action;
mod claims;
mod matching;
mod raw;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use toml::Spanned;

use super::check::{Checker, Seen};
use super::raw::RawConfig;
use super::traffic::Known;
use super::{
    ExperimentIndex, HostPattern, ListenerIndex, Name, PathPattern, Policy, Regex, TenantRule,
    UpstreamIndex,
};
use claims::Claims;
use raw::RawMirror;
pub(super) use raw::{EXAMPLES, RawRoute};

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

impl Checker<'_> {
    pub(in crate::config) fn routes(
        &mut self,
        raw: &RawConfig,
        known: &Known<'_>,
    ) -> Option<Vec<Arc<Route>>> {
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

    fn policy(&mut self, config: &RawConfig, raw: &RawRoute, here: &str) -> Option<Policy> {
        let access = self.route_access(raw.access.as_ref(), &format!("{here}.access"));
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
}
