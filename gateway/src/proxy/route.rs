//! Request to route, by the precedence of the Kubernetes Gateway API.
//!
//! Among the matches that hold for a request's listener, host, path, method, headers and query,
//! the winner has
//!
//! 1. the most specific host: exact, then the longest wildcard suffix, then any;
//! 2. an exact path; then a regular expression (the Gateway API leaves its place open); then the
//!    longest prefix (on segment boundaries);
//! 3. a list of methods rather than any;
//! 4. the most headers;
//! 5. the most query parameters;
//! 6. the earliest place in the file.
//!
//! A more specific host or path whose methods, headers or query do not match does not hide a less
//! specific one that does. So [`Router::find`] walks the candidates in this order and takes the
//! first that holds: hash look-ups, as many as the host has labels and the path has segments, never
//! more than the longest configured suffix and prefix make useful, and one pass over the path for
//! all regular expressions of a host together. Only matches for the same host and the same path are
//! tried one by one.
//!
//! Hosts are compared without port, trailing dot or case, IPv6 literals as addresses; a host that
//! is none (`a:b:c`, `[::1`) matches only routes for any host. Paths are compared as sent: no
//! decoding, no dot segments. Query parameters are compared decoded, the first of a name.

use std::borrow::Cow;
use std::net::Ipv6Addr;
use std::ops::Deref;
use std::sync::Arc;

use ahash::HashMap;
use http::{HeaderMap, HeaderName, Method};

use crate::config::{
    self, Action, Backend, Config, HostPattern, ListenerIndex, Match, PathPattern, RouteIndex,
    UpstreamIndex,
};
use crate::export::RouteSeries;

use super::rotation::Rotation;

/// The longest host name there is; longer ones match nothing and are not even lower-cased.
const HOST_LENGTH_MAX: usize = 253;

/// A route as a request meets it: its configuration, and what it counts.
#[derive(Debug)]
pub struct Route {
    /// Its place in the configuration.
    pub index: RouteIndex,
    config: Arc<config::Route>,
    backends: Rotation,
    mirrored: Rotation,
    /// Its request metrics.
    pub series: RouteSeries,
}

impl Deref for Route {
    type Target = config::Route;

    fn deref(&self) -> &config::Route {
        &self.config
    }
}

impl Route {
    /// The upstream for the next request, by weight: in any run of as many requests as the weights
    /// sum to, each backend gets exactly its weight. `None` for a redirect.
    pub fn backend(&self) -> Option<UpstreamIndex> {
        let Action::Forward { backends, .. } = &self.action else {
            return None;
        };
        let weight = |backend: &Backend| u64::from(backend.weight);
        let at = self.backends.pick(backends.iter().map(weight))?;
        backends.get(at).map(|backend| backend.upstream)
    }

    /// Whether the next request is mirrored, and where to.
    pub fn mirror(&self) -> Option<&config::Mirror> {
        let mirror = self.config.mirror.as_ref()?;
        let percent = u64::from(mirror.percent);
        let chosen = self.mirrored.pick([percent, 100 - percent])?;
        (chosen == 0).then_some(mirror)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'r> {
    /// The authority or `Host` header as received.
    pub host: Option<&'r str>,
    /// Raw; a query, if still there, is ignored.
    pub path: &'r str,
    /// Raw, without the `?`.
    pub query: Option<&'r str>,
    /// Method.
    pub method: &'r Method,
    /// All headers.
    pub headers: &'r dyn Lines,
}

/// Header lines, however they are kept.
pub trait Lines: std::fmt::Debug {
    /// The first value of a name, when it is text.
    fn first(&self, name: &HeaderName) -> Option<&str>;
}

impl Lines for HeaderMap {
    fn first(&self, name: &HeaderName) -> Option<&str> {
        self.get(name)?.to_str().ok()
    }
}

impl Asked<'_> {
    fn satisfies(&self, rule: &Rule) -> bool {
        (rule.one.methods.is_empty() || rule.one.methods.contains(self.method))
            && rule.one.headers.iter().all(|(name, pattern)| {
                let value = self.headers.first(name);
                value.is_some_and(|value| pattern.is_match(value))
            })
            && (rule.one.query.is_empty() || self.query_satisfies(rule))
    }

    fn query_satisfies(&self, rule: &Rule) -> bool {
        let query = self.query.unwrap_or_default();
        rule.one.query.iter().all(|(name, pattern)| {
            form_urlencoded::parse(query.as_bytes())
                .find(|(key, _)| **key == **name)
                .is_some_and(|(_, value)| pattern.is_match(&value))
        })
    }
}

/// Every route, arranged for look-up. Immutable: a new configuration is a new router.
#[derive(Debug)]
pub struct Router {
    routes: Vec<Arc<Route>>,
    /// In the order of [`Config::listeners`].
    listeners: Vec<Hosts>,
}

impl Router {
    /// Arranges the routes of a configuration.
    pub fn new(config: &Config) -> Self {
        let mut listeners: Vec<Hosts> = Vec::new();
        listeners.resize_with(config.listeners.len(), Hosts::default);
        for (position, route) in config.routes.iter().enumerate() {
            for listener in &route.listeners {
                let Some(hosts) = listeners.get_mut(listener.0) else {
                    continue;
                };
                for (one, _) in route.matches.iter().enumerate() {
                    let rule = Rule::new(route, one, position);
                    if route.hosts.is_empty() {
                        hosts.any.insert(&rule);
                    }
                    for host in &route.hosts {
                        hosts.of(host).insert(&rule);
                    }
                }
            }
        }
        for hosts in &mut listeners {
            hosts.each(Paths::finish);
        }
        let routes = config.routes.iter().enumerate();
        Self {
            routes: routes
                .map(|(position, route)| {
                    Arc::new(Route {
                        index: RouteIndex(position),
                        config: Arc::clone(route),
                        backends: Rotation::default(),
                        mirrored: Rotation::default(),
                        series: RouteSeries::default(),
                    })
                })
                .collect(),
            listeners,
        }
    }

    /// The route for a request, and which of its matches held; `None` when no route matches.
    pub fn find(&self, listener: ListenerIndex, asked: &Asked<'_>) -> Option<Found<'_>> {
        self.find_counting(listener, asked, &mut || {})
    }

    /// As [`find`](Self::find); calls `step` for every look-up and every rule it tries.
    pub fn find_counting(
        &self,
        listener: ListenerIndex,
        asked: &Asked<'_>,
        step: &mut impl FnMut(),
    ) -> Option<Found<'_>> {
        let path = asked.path;
        let asked = Asked {
            path: path.split_once('?').map_or(path, |(path, _)| path),
            ..*asked
        };
        let rule = self.listeners.get(listener.0)?.find(&asked, step)?;
        let route = self.routes.get(rule.route)?;
        Some(Found {
            route,
            by: &rule.one,
        })
    }
}

/// A route, and why.
#[derive(Debug)]
pub struct Found<'r> {
    /// The route.
    pub route: &'r Arc<Route>,
    /// The match that held.
    pub by: &'r Arc<Match>,
}

/// The first level: who is asked.
#[derive(Debug, Default)]
struct Hosts {
    exact: HashMap<Box<str>, Paths>,
    ipv6: HashMap<Ipv6Addr, Paths>,
    /// By suffix with its leading dot.
    wildcard: HashMap<Box<str>, Paths>,
    any: Paths,
}

impl Hosts {
    fn of(&mut self, host: &HostPattern) -> &mut Paths {
        match host {
            HostPattern::Exact(name) => self.exact.entry(name.clone()).or_default(),
            HostPattern::Ipv6(address) => self.ipv6.entry(*address).or_default(),
            HostPattern::Wildcard(suffix) => self.wildcard.entry(suffix.clone()).or_default(),
        }
    }

    fn each(&mut self, mut with: impl FnMut(&mut Paths)) {
        self.exact.values_mut().for_each(&mut with);
        self.ipv6.values_mut().for_each(&mut with);
        self.wildcard.values_mut().for_each(&mut with);
        with(&mut self.any);
    }

    fn find(&self, asked: &Asked<'_>, step: &mut impl FnMut()) -> Option<&Rule> {
        let specific = match asked.host.and_then(Host::parse) {
            Some(Host::Name(name)) => self.find_name(&name, asked, step),
            Some(Host::Ipv6(address)) => {
                step();
                let paths = self.ipv6.get(&address);
                paths.and_then(|paths| paths.find(asked, step))
            }
            None => None,
        };
        specific.or_else(|| self.any.find(asked, step))
    }

    fn find_name(&self, name: &str, asked: &Asked<'_>, step: &mut impl FnMut()) -> Option<&Rule> {
        step();
        let exact = self.exact.get(name);
        let found = exact.and_then(|paths| paths.find(asked, step));
        if found.is_some() || self.wildcard.is_empty() {
            return found;
        }
        // A wildcard stands for at least one label, so a leading dot is not a suffix.
        for (at, _) in name.match_indices('.').filter(|&(at, _)| at > 0) {
            step();
            if let Some(paths) = self.wildcard.get(&name[at..])
                && let Some(rule) = paths.find(asked, step)
            {
                return Some(rule);
            }
        }
        None
    }
}

/// A request's host in the normal form of [`HostPattern`].
enum Host<'h> {
    Name(Cow<'h, str>),
    Ipv6(Ipv6Addr),
}

impl<'h> Host<'h> {
    fn parse(text: &'h str) -> Option<Self> {
        if let Some(rest) = text.strip_prefix('[') {
            let (literal, after) = rest.split_once(']')?;
            let port = after.strip_prefix(':').unwrap_or(after);
            let clean = port.len() < after.len() || after.is_empty();
            return match literal.parse() {
                Ok(address) if clean && is_port(port) => Some(Self::Ipv6(address)),
                _ => None,
            };
        }
        let (name, port) = text.split_once(':').unwrap_or((text, ""));
        let name = name.strip_suffix('.').unwrap_or(name);
        if name.is_empty() || name.len() > HOST_LENGTH_MAX || !is_port(port) {
            return None;
        }
        Some(Self::Name(
            if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
                Cow::Owned(name.to_ascii_lowercase())
            } else {
                Cow::Borrowed(name)
            },
        ))
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The second level: what is asked for.
#[derive(Debug, Default)]
struct Paths {
    exact: HashMap<Box<str>, Rules>,
    /// In the order of the file.
    regexes: Vec<(config::Regex, Rules)>,
    /// All of them at once; absent when there is none.
    regex_set: Option<regex::RegexSet>,
    /// By prefix without trailing slash; the empty one is for every path.
    prefixes: HashMap<Box<str>, Rules>,
    /// In bytes: longer parts of a path need not be hashed. Without it a path of slashes would
    /// cost the square of its length.
    longest_prefix: usize,
}

impl Paths {
    fn insert(&mut self, rule: &Rule) {
        let rules = match &rule.one.path {
            PathPattern::Exact(path) => self.exact.entry(path.clone()).or_default(),
            PathPattern::Prefix(prefix) => {
                self.longest_prefix = self.longest_prefix.max(prefix.len());
                self.prefixes.entry(prefix.clone()).or_default()
            }
            PathPattern::Regex(regex) => {
                let at = self.regexes.iter().position(|(known, _)| known == regex);
                let at = at.unwrap_or_else(|| {
                    self.regexes.push((regex.clone(), Rules::default()));
                    self.regexes.len() - 1
                });
                &mut self.regexes[at].1
            }
        };
        rules.0.push(rule.clone());
    }

    /// Once everything is inserted.
    fn finish(&mut self) {
        let rules = self.exact.values_mut().chain(self.prefixes.values_mut());
        rules
            .chain(self.regexes.iter_mut().map(|(_, rules)| rules))
            .for_each(Rules::sort);
        if !self.regexes.is_empty() {
            let patterns = self.regexes.iter().map(|(regex, _)| regex.anchored());
            // Each compiled alone; together they may be too large, and are tried one by one then.
            self.regex_set = regex::RegexSetBuilder::new(patterns)
                .size_limit(256 << 20)
                .build()
                .ok();
        }
    }

    fn find(&self, asked: &Asked<'_>, step: &mut impl FnMut()) -> Option<&Rule> {
        let path = asked.path;
        step();
        let exact = self.exact.get(path);
        let found = exact.and_then(|rules| rules.find(asked, step));
        if found.is_some() {
            return found;
        }
        if !self.regexes.is_empty()
            && let Some(rule) = self.find_regex(asked, step)
        {
            return Some(rule);
        }
        if self.prefixes.is_empty() {
            return None;
        }
        for prefix in self.segments(path) {
            step();
            if let Some(rules) = self.prefixes.get(prefix)
                && let Some(rule) = rules.find(asked, step)
            {
                return Some(rule);
            }
        }
        None
    }

    fn find_regex(&self, asked: &Asked<'_>, step: &mut impl FnMut()) -> Option<&Rule> {
        let candidates: Vec<usize> = match &self.regex_set {
            Some(set) => set.matches(asked.path).into_iter().collect(),
            None => {
                let all = self.regexes.iter().enumerate();
                let held = all.filter(|(_, (regex, _))| regex.is_match(asked.path));
                held.map(|(at, _)| at).collect()
            }
        };
        step();
        // Of several expressions: as if they were one path.
        let rules = candidates.into_iter().filter_map(|at| {
            let (_, rules) = self.regexes.get(at)?;
            rules.find(asked, step)
        });
        rules.min_by_key(|rule| rule.rank())
    }

    /// The beginnings of a path that end at a segment boundary, longest first, down to the empty
    /// one; those longer than any prefix are left out.
    fn segments<'p>(&self, path: &'p str) -> impl Iterator<Item = &'p str> {
        // A cut before a slash at `longest_prefix` is still wanted, hence one byte more.
        let bytes = path.as_bytes();
        let within = &bytes[..bytes.len().min(self.longest_prefix + 1)];
        let whole = Some(path).filter(|path| path.len() <= self.longest_prefix);
        let cuts = (0..within.len()).rev().filter(|&at| within[at] == b'/');
        let shorter = cuts.map(move |at| &path[..at]);
        // `OPTIONS *` has no slash and still belongs to the prefix of everything.
        let everything = Some("").filter(|_| !path.starts_with('/') && !path.is_empty());
        whole.into_iter().chain(shorter).chain(everything)
    }
}

/// The third level: how it is asked for. Few for one path, so a list, best first.
#[derive(Debug, Default)]
struct Rules(Vec<Rule>);

/// One match of one route.
#[derive(Clone, Debug)]
struct Rule {
    one: Arc<Match>,
    route: usize,
}

impl Rule {
    fn new(route: &Arc<config::Route>, one: usize, position: usize) -> Self {
        Self {
            one: Arc::new(route.matches[one].clone()),
            route: position,
        }
    }

    /// Less is better.
    fn rank(&self) -> impl Ord + use<> {
        use std::cmp::Reverse;
        (
            self.one.methods.is_empty(),
            Reverse(self.one.headers.len()),
            Reverse(self.one.query.len()),
            self.route,
        )
    }
}

impl Rules {
    /// Stable: the matches of one route stay in the order of the file.
    fn sort(&mut self) {
        self.0.sort_by_key(Rule::rank);
    }

    fn find(&self, asked: &Asked<'_>, step: &mut impl FnMut()) -> Option<&Rule> {
        self.0.iter().find(|rule| {
            step();
            asked.satisfies(rule)
        })
    }
}

#[cfg(test)]
mod tests;
