//! Request to route, by the precedence of the Kubernetes Gateway API.
//!
//! Among the routes that match a request's listener, host, path and method, the winner has
//!
//! 1. the most specific host: exact, then the longest wildcard suffix, then any;
//! 2. the most specific path: exact, then the longest prefix (on segment boundaries);
//! 3. a list of methods rather than any;
//! 4. the earliest place in the file.
//!
//! A more specific host or path whose methods do not match does not hide a less specific route that
//! does. So [`Router::find`] walks the candidates in this order and takes the first that matches:
//! hash look-ups only, as many as the host has labels and the path has segments, and never more
//! than the longest configured suffix and prefix make useful.
//!
//! Hosts are compared without port, trailing dot or case, IPv6 literals as addresses; a host that
//! is none (`a:b:c`, `[::1`) matches only routes for any host. Paths are compared as sent: no
//! decoding, no dot segments. Limits by design: no headers, no queries, no regular expressions.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::sync::Arc;

use http::Method;

use crate::config::{
    Config, HostPattern, ListenerIndex, Name, PathPattern, RouteIndex, TenantRule, UpstreamIndex,
};

/// The longest host name there is; longer ones match nothing and are not even lower-cased.
const HOST_LENGTH_MAX: usize = 253;

/// What a request needs to know about its route.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its place in the configuration.
    pub index: RouteIndex,
    /// Its name.
    pub name: Name,
    /// Whose traffic it is.
    pub service: Name,
    /// On whose account.
    pub tenant: TenantRule,
    /// Where requests go.
    pub upstream: UpstreamIndex,
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
                let rule = Rule {
                    methods: route.methods.clone(),
                    route: position,
                };
                if route.hosts.is_empty() {
                    hosts.any.insert(&route.path, rule.clone());
                }
                for host in &route.hosts {
                    hosts.of(host).insert(&route.path, rule.clone());
                }
            }
        }
        let routes = config.routes.iter().enumerate();
        Self {
            routes: routes
                .map(|(position, route)| {
                    Arc::new(Route {
                        index: RouteIndex(position),
                        name: route.name.clone(),
                        service: route.service.clone(),
                        tenant: route.tenant.clone(),
                        upstream: route.upstream,
                    })
                })
                .collect(),
            listeners,
        }
    }

    /// The route for a request, or `None` when no route matches. `host` is the authority or `Host`
    /// header as received; `path` is raw, and a query, if still there, is ignored.
    pub fn find(
        &self,
        listener: ListenerIndex,
        host: Option<&str>,
        path: &str,
        method: &Method,
    ) -> Option<&Arc<Route>> {
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let rule = self.listeners.get(listener.0)?.find(host, path, method)?;
        self.routes.get(rule.route)
    }
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

    fn find(&self, host: Option<&str>, path: &str, method: &Method) -> Option<&Rule> {
        let specific = match host.and_then(Host::parse) {
            Some(Host::Name(name)) => self.find_name(&name, path, method),
            Some(Host::Ipv6(address)) => self
                .ipv6
                .get(&address)
                .and_then(|paths| paths.find(path, method)),
            None => None,
        };
        specific.or_else(|| self.any.find(path, method))
    }

    fn find_name(&self, name: &str, path: &str, method: &Method) -> Option<&Rule> {
        let exact = self.exact.get(name);
        let found = exact.and_then(|paths| paths.find(path, method));
        if found.is_some() || self.wildcard.is_empty() {
            return found;
        }
        // A wildcard stands for at least one label, so a leading dot is not a suffix.
        let suffixes = name.match_indices('.').filter(|&(at, _)| at > 0);
        suffixes
            .filter_map(|(at, _)| self.wildcard.get(&name[at..]))
            .find_map(|paths| paths.find(path, method))
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
    /// By prefix without trailing slash; the empty one is for every path.
    prefixes: HashMap<Box<str>, Rules>,
    /// In bytes: longer parts of a path need not be hashed. Without it a path of slashes would
    /// cost the square of its length.
    longest_prefix: usize,
}

impl Paths {
    fn insert(&mut self, path: &PathPattern, rule: Rule) {
        match path {
            PathPattern::Exact(path) => self.exact.entry(path.clone()).or_default().insert(rule),
            PathPattern::Prefix(prefix) => {
                self.longest_prefix = self.longest_prefix.max(prefix.len());
                let rules = self.prefixes.entry(prefix.clone()).or_default();
                rules.insert(rule);
            }
        }
    }

    fn find(&self, path: &str, method: &Method) -> Option<&Rule> {
        let exact = self.exact.get(path);
        let found = exact.and_then(|rules| rules.find(method));
        if found.is_some() || self.prefixes.is_empty() {
            return found;
        }
        self.segments(path)
            .filter_map(|prefix| self.prefixes.get(prefix))
            .find_map(|rules| rules.find(method))
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

/// The third level: how it is asked for. Few for one path, so a list: those with methods first,
/// each kind in the order of the file.
#[derive(Debug, Default)]
struct Rules(Vec<Rule>);

#[derive(Clone, Debug)]
struct Rule {
    /// Empty: any.
    methods: Vec<Method>,
    route: usize,
}

impl Rules {
    fn insert(&mut self, rule: Rule) {
        let any = rule.methods.is_empty();
        // Stable: routes arrive in the order of the file.
        let at = self
            .0
            .partition_point(|other| any || !other.methods.is_empty());
        self.0.insert(at, rule);
    }

    fn find(&self, method: &Method) -> Option<&Rule> {
        self.0
            .iter()
            .find(|rule| rule.methods.is_empty() || rule.methods.contains(method))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn router(routes: &str) -> Router {
        let text = format!(
            r#"
            [[listeners]]
            name = "a"
            address = "127.0.0.1:80"
            [[listeners]]
            name = "b"
            address = "127.0.0.1:81"
            [[upstreams]]
            name = "up"
            peers = ["127.0.0.1:90"]
            {}
            "#,
            routes
                .lines()
                .filter(|line| !line.trim().is_empty())
                .map(|line| format!(
                    "[[routes]]\nupstream = \"up\"\n{}\n",
                    line.replace(';', "\n")
                ))
                .collect::<String>()
        );
        match Config::parse(&text, "routes.toml") {
            Ok(config) => Router::new(&config),
            Err(error) => panic!("{error}"),
        }
    }

    fn find<'r>(router: &'r Router, method: &str, host: &str, path: &str) -> Option<&'r str> {
        let host = Some(host).filter(|host| !host.is_empty());
        let method = method.parse().unwrap();
        let found = router.find(ListenerIndex(0), host, path, &method);
        found.map(|route| route.name.as_str())
    }

    #[test]
    fn hosts_win_by_specificity() {
        let router = router(
            r#"
            name = "any"
            name = "com"; hosts = ["*.com"]
            name = "wild"; hosts = ["*.shop.com"]
            name = "exact"; hosts = ["a.shop.com"]
            "#,
        );
        for (host, name) in [
            ("a.shop.com", "exact"),
            ("A.Shop.COM:8080", "exact"),
            ("a.shop.com.", "exact"),
            ("b.shop.com", "wild"),
            ("c.b.shop.com", "wild"),
            ("shop.com", "com"),
            (".shop.com", "com"),
            ("com", "any"),
            (".com", "any"),
            ("", "any"),
            ("a.shop.com:x", "any"),
        ] {
            assert_eq!(find(&router, "GET", host, "/"), Some(name), "{host}");
        }
    }

    #[test]
    fn ipv6_literals_are_addresses() {
        let router = router(r#"name = "six"; hosts = ["[2001:db8::1]"]"#);
        let six = |host| find(&router, "GET", host, "/");
        assert_eq!(six("[2001:db8::1]"), Some("six"));
        assert_eq!(six("[2001:DB8:0::1]:443"), Some("six"));
        for other in [
            "[2001:db8::2]",
            "[2001:db8::1",
            "[2001:db8::1]x",
            "2001:db8::1",
        ] {
            assert_eq!(six(other), None, "{other}");
        }
    }

    #[test]
    fn prefixes_end_at_segments_and_exact_paths_come_first() {
        let router = router(
            r#"
            name = "api"; path = { prefix = "/api/" }
            name = "deep"; path = { prefix = "/api/v1" }
            name = "one"; path = { exact = "/api/v1" }
            name = "slash"; path = { exact = "/api/v1/" }
            "#,
        );
        for (path, name) in [
            ("/api", Some("api")),
            ("/api/", Some("api")),
            ("/api/x", Some("api")),
            ("/apix", None),
            ("/", None),
            ("/API", None),
            ("/api/v1", Some("one")),
            ("/api/v1?x=/y", Some("one")),
            ("/api/v1/", Some("slash")),
            ("/api/v1/x", Some("deep")),
            ("/api/v1x", Some("api")),
            ("/api//v1", Some("api")),
            ("/api/v%31", Some("api")),
        ] {
            assert_eq!(find(&router, "GET", "h", path), name, "{path}");
        }
    }

    #[test]
    fn a_specific_route_of_another_method_hides_nothing() {
        let router = router(
            r#"
            name = "post"; hosts = ["h"]; path = { exact = "/a" }; methods = ["POST"]
            name = "put"; hosts = ["h"]; methods = ["PUT"]
            name = "rest"
            "#,
        );
        assert_eq!(find(&router, "POST", "h", "/a"), Some("post"));
        assert_eq!(find(&router, "PUT", "h", "/a"), Some("put"));
        assert_eq!(find(&router, "GET", "h", "/a"), Some("rest"));
        assert_eq!(find(&router, "OPTIONS", "h", "*"), Some("rest"));
    }

    #[test]
    fn methods_come_before_any_and_listeners_are_apart() {
        let router = router(
            r#"
            name = "any"; listeners = ["a"]
            name = "get"; methods = ["GET", "HEAD"]
            "#,
        );
        assert_eq!(find(&router, "HEAD", "h", "/"), Some("get"));
        assert_eq!(find(&router, "POST", "h", "/"), Some("any"));
        let on = |index, method| router.find(ListenerIndex(index), None, "/", &method);
        assert!(on(1, Method::POST).is_none());
        assert_eq!(on(1, Method::GET).unwrap().index, RouteIndex(1));
        assert!(on(2, Method::GET).is_none());
    }

    /// Deterministic randomness.
    struct Xorshift(u64);

    impl Xorshift {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 % u64::try_from(bound).unwrap()).unwrap()
        }

        fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
            &items[self.below(items.len())]
        }

        /// Up to two of the items, often none.
        fn few<T: Clone>(&mut self, items: &[T]) -> Vec<T> {
            (0..self.below(3))
                .map(|_| self.pick(items).clone())
                .collect()
        }

        fn path(&mut self) -> String {
            let segments = self.below(4);
            let mut path: String = (0..segments)
                .map(|_| format!("/{}", self.pick(&["a", "b", "ab", ""])))
                .collect();
            if path.is_empty() || self.below(4) == 0 {
                path.push('/');
            }
            path
        }
    }

    /// The rules of the module documentation, one route at a time: its rank when it matches.
    fn rank(
        route: &config::Route,
        host: Option<&str>,
        path: &str,
        method: &Method,
    ) -> Option<(usize, usize, bool, usize, bool)> {
        let host = host.map(|host| {
            let host = host.to_ascii_lowercase();
            let host = if host.starts_with('[') {
                host.split_inclusive(']').next().unwrap_or("").to_owned()
            } else {
                host.split(':').next().unwrap_or("").to_owned()
            };
            host.trim_end_matches('.').to_owned()
        });
        let host_rank = |pattern: &HostPattern| {
            let host = host.as_deref()?;
            match pattern {
                HostPattern::Exact(name) => (host == &**name).then_some((2, 0)),
                HostPattern::Ipv6(address) => (host == format!("[{address}]")).then_some((2, 0)),
                HostPattern::Wildcard(suffix) => (host.len() > suffix.len()
                    && host.ends_with(&**suffix))
                .then_some((1, suffix.len())),
            }
        };
        let (host_kind, host_length) = if route.hosts.is_empty() {
            (0, 0)
        } else {
            route.hosts.iter().filter_map(host_rank).max()?
        };
        let (path_exact, path_length) = match &route.path {
            PathPattern::Exact(exact) if **exact == *path => (true, 0),
            PathPattern::Prefix(prefix)
                if *path == **prefix || path.starts_with(&format!("{prefix}/")) =>
            {
                (false, prefix.len())
            }
            _ => return None,
        };
        if !route.methods.is_empty() && !route.methods.contains(method) {
            return None;
        }
        let methods = !route.methods.is_empty();
        Some((host_kind, host_length, path_exact, path_length, methods))
    }

    #[test]
    fn the_router_agrees_with_the_rules_read_one_by_one() {
        let hosts: Vec<HostPattern> = [
            HostPattern::Exact("a.x.com".into()),
            HostPattern::Exact("x.com".into()),
            HostPattern::Wildcard(".x.com".into()),
            HostPattern::Wildcard(".a.x.com".into()),
            HostPattern::Wildcard(".com".into()),
            HostPattern::Ipv6("::1".parse().unwrap()),
        ]
        .into();
        let asked = [
            None,
            Some("a.x.com"),
            Some("A.X.com:80"),
            Some("x.com"),
            Some("b.a.x.com"),
            Some("b.x.com."),
            Some("com"),
            Some("[::1]"),
            Some("[::1]:80"),
            Some("other"),
        ];
        let methods = [Method::GET, Method::POST, Method::PUT];
        let template = Config::parse(
            r#"
            listeners = [{ name = "a", address = "127.0.0.1:80" }, { name = "b", address = "127.0.0.1:81" }]
            upstreams = [{ name = "up", peers = ["127.0.0.1:90"] }]
            routes = [{ name = "r", upstream = "up" }]
            "#,
            "template.toml",
        )
        .unwrap();
        let mut random = Xorshift(0x2545_f491_4f6c_dd1d);
        let mut matched = 0_u32;
        for _ in 0..2_000 {
            let mut config = template.clone();
            // Conflicts included, unlike in a checked file: the first route must win them.
            config.routes = (0..=random.below(12))
                .map(|_| {
                    let path = random.path();
                    config::Route {
                        hosts: random.few(&hosts),
                        methods: random.few(&methods),
                        path: if random.below(3) == 0 {
                            PathPattern::Exact(path.into())
                        } else {
                            PathPattern::Prefix(path.trim_end_matches('/').into())
                        },
                        listeners: match random.below(3) {
                            0 => vec![ListenerIndex(0)],
                            1 => vec![ListenerIndex(1)],
                            _ => vec![ListenerIndex(0), ListenerIndex(1)],
                        },
                        ..template.routes[0].clone()
                    }
                })
                .collect();
            let router = Router::new(&config);
            for _ in 0..20 {
                let listener = ListenerIndex(random.below(2));
                let host = *random.pick(&asked);
                let path = random.path();
                let method = random.pick(&methods).clone();
                let candidates = config.routes.iter().enumerate().rev();
                let expected = candidates
                    .filter(|(_, route)| route.listeners.contains(&listener))
                    .filter_map(|(index, route)| {
                        rank(route, host, &path, &method).map(|rank| (rank, index))
                    })
                    .max_by_key(|&(rank, _)| rank)
                    .map(|(_, index)| RouteIndex(index));
                let found = router.find(listener, host, &path, &method);
                assert_eq!(
                    found.map(|route| route.index),
                    expected,
                    "{method} {host:?} {path} on {listener:?} among {:#?}",
                    config.routes
                );
                matched += u32::from(expected.is_some());
            }
        }
        assert!((8_000..32_000).contains(&matched), "{matched} is lopsided");
    }

    #[test]
    fn a_hostile_path_is_cut_to_the_longest_prefix() {
        let router = router(r#"name = "api"; path = { prefix = "/a/b" }"#);
        let paths = &router.listeners[0].any;
        let hostile = "/".repeat(100_000);
        assert_eq!(paths.segments(&hostile).count(), 5);
        let all: Vec<&str> = paths.segments("/a/b/c").collect();
        assert_eq!(all, ["/a/b", "/a", ""]);
        let all: Vec<&str> = paths.segments("/a/b").collect();
        assert_eq!(all, ["/a/b", "/a", ""]);
    }
}
