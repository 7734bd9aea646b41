//! The router against its rules, and against the Gateway API's text.

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
    find_with(router, method, host, path, &[])
}

/// With headers; the path may have a query.
fn find_with<'r>(
    router: &'r Router,
    method: &str,
    host: Option<&str>,
    path: &str,
    headers: &[(&'static str, &str)],
) -> Option<&'r str> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().unwrap());
    }
    let asked = Asked {
        host,
        path,
        query: path.split_once('?').map(|(_, query)| query),
        method: &method.parse().unwrap(),
        headers: &map,
    };
    let found = router.find(ListenerIndex(0), &asked);
    found.map(|found| found.route.name.as_str())
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
    let headers = HeaderMap::new();
    let on = |index, method| {
        let asked = Asked {
            host: None,
            path: "/",
            query: None,
            method: &method,
            headers: &headers,
        };
        let found = router.find(ListenerIndex(index), &asked);
        found.map(|found| found.route.index)
    };
    assert!(on(1, Method::POST).is_none());
    assert_eq!(on(1, Method::GET).unwrap(), RouteIndex(1));
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
fn rank(route: &config::Route, asked: &Asked<'_>) -> Option<[usize; 7]> {
    let one = &route.matches[0];
    let (path, method) = (asked.path, asked.method);
    let host = asked.host.map(|host| {
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
    let (path_kind, path_length) = match &one.path {
        PathPattern::Exact(exact) if **exact == *path => (2, 0),
        PathPattern::Regex(regex) if regex.is_match(path) => (1, 0),
        PathPattern::Prefix(prefix)
            if *path == **prefix || path.starts_with(&format!("{prefix}/")) =>
        {
            (0, prefix.len())
        }
        _ => return None,
    };
    if !one.methods.is_empty() && !one.methods.contains(method) {
        return None;
    }
    for (name, pattern) in &one.headers {
        let value = asked.headers.first(name)?;
        pattern.is_match(value).then_some(())?;
    }
    for (name, pattern) in &one.query {
        let pairs = asked
            .query?
            .split('&')
            .map(|pair| pair.split_once('=').unwrap());
        let (_, value) = pairs.clone().find(|(key, _)| *key == &**name)?;
        pattern.is_match(value).then_some(())?;
    }
    Some([
        host_kind,
        host_length,
        path_kind,
        path_length,
        usize::from(!one.methods.is_empty()),
        one.headers.len(),
        one.query.len(),
    ])
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
    let regex = |text: &str| {
        let path = format!("path = {{ regex = \"{text}\" }}");
        let text = format!(
            "listeners = [{{ name = \"a\", address = \"127.0.0.1:80\" }}]\n\
             upstreams = [{{ name = \"up\", peers = [\"127.0.0.1:90\"] }}]\n\
             [[routes]]\nname = \"r\"\nupstream = \"up\"\n{path}\n"
        );
        let config = Config::parse(&text, "regex.toml").unwrap();
        config.routes[0].matches[0].path.clone()
    };
    let regexes = [regex("/a.*"), regex("(/b)+"), regex(".*/")];
    let exact = |value: &str| config::ValuePattern::Exact(value.into());
    let headers: [(HeaderName, _); 3] = [
        (HeaderName::from_static("x-a"), exact("1")),
        (HeaderName::from_static("x-a"), exact("2")),
        (HeaderName::from_static("x-b"), exact("1")),
    ];
    let query = [("q".into(), exact("1")), ("r".into(), exact("1"))];
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
                let one = Match {
                    methods: random.few(&methods),
                    path: match random.below(8) {
                        0 | 1 => PathPattern::Exact(path.into()),
                        2 => random.pick(&regexes).clone(),
                        _ => PathPattern::Prefix(path.trim_end_matches('/').into()),
                    },
                    headers: if random.below(3) == 0 {
                        random.few(&headers)
                    } else {
                        Vec::new()
                    },
                    query: if random.below(3) == 0 {
                        random.few(&query)
                    } else {
                        Vec::new()
                    },
                };
                Arc::new(config::Route {
                    hosts: random.few(&hosts),
                    matches: vec![one],
                    listeners: match random.below(3) {
                        0 => vec![ListenerIndex(0)],
                        1 => vec![ListenerIndex(1)],
                        _ => vec![ListenerIndex(0), ListenerIndex(1)],
                    },
                    ..(*template.routes[0]).clone()
                })
            })
            .collect();
        let router = Router::new(&config);
        for _ in 0..20 {
            let listener = ListenerIndex(random.below(2));
            let host = *random.pick(&asked);
            let path = random.path();
            let mut map = HeaderMap::new();
            for (name, value) in random.few(&[("x-a", "1"), ("x-a", "2"), ("x-b", "1")]) {
                map.append(name, value.parse().unwrap());
            }
            let asked = Asked {
                host,
                path: &path,
                query: *random.pick(&[None, Some("q=1"), Some("r=1&q=1"), Some("q=2&q=1")]),
                method: random.pick(&methods),
                headers: &map,
            };
            let candidates = config.routes.iter().enumerate().rev();
            let expected = candidates
                .filter(|(_, route)| route.listeners.contains(&listener))
                .filter_map(|(index, route)| rank(route, &asked).map(|rank| (rank, index)))
                .max_by_key(|&(rank, _)| rank)
                .map(|(_, index)| RouteIndex(index));
            let found = router.find(listener, &asked);
            assert_eq!(
                found.map(|found| found.route.index),
                expected,
                "{asked:?} on {listener:?} among {:#?}",
                config.routes
            );
            matched += u32::from(expected.is_some());
        }
    }
    assert!((8_000..32_000).contains(&matched), "{matched} is lopsided");
}

/// HTTPRouteRule.matches in the Gateway API (v1): "Proxy or Load Balancer routing configuration
/// generated from HTTPRoutes MUST prioritize matches based on the following criteria, continuing on
/// ties. Across all rules specified on applicable Routes, precedence must be given to the match
/// having: "Exact" path match; "Prefix" path match with largest number of characters; Method match;
/// Largest number of header matches; Largest number of query param matches."
#[test]
fn precedence_is_that_of_the_gateway_api() {
    let router = router(
        r#"
        name = "short"; path = { prefix = "/a" }; methods = ["GET"]; headers = [{ name = "x", exact = "1" }, { name = "y", exact = "1" }]; query = [{ name = "q", exact = "1" }]
        name = "long"; path = { prefix = "/a/b" }
        name = "long-query"; path = { prefix = "/a/b" }; query = [{ name = "q", exact = "1" }]
        name = "long-queries"; path = { prefix = "/a/b" }; query = [{ name = "q", exact = "1" }, { name = "r", regex = "." }]
        name = "long-header"; path = { prefix = "/a/b" }; headers = [{ name = "x", exact = "1" }]
        name = "long-headers"; path = { prefix = "/a/b" }; headers = [{ name = "x", exact = "1" }, { name = "y", exact = "1" }]
        name = "long-method"; path = { prefix = "/a/b" }; methods = ["POST"]
        name = "regex"; path = { regex = "/a/b/[0-9]+" }
        name = "exact"; path = { exact = "/a/b/7" }
        "#,
    );
    let x = ("x", "1");
    let y = ("y", "1");
    for (method, path, headers, name) in [
        // An exact path before everything, whatever else the others say.
        ("POST", "/a/b/7?q=1&r=1", &[x, y][..], "exact"),
        // Where the Gateway API says nothing: expressions come after exact paths.
        ("POST", "/a/b/8?q=1&r=1", &[x, y], "regex"),
        // The longer prefix, though the shorter says more.
        ("GET", "/a/b/x", &[], "long"),
        ("GET", "/a/x?q=1", &[x, y], "short"),
        // A method before any number of headers.
        ("POST", "/a/b/x?q=1&r=1", &[x, y], "long-method"),
        // More headers before more parameters.
        ("GET", "/a/b/x?q=1&r=1", &[x, y], "long-headers"),
        ("GET", "/a/b/x?q=1&r=1", &[x], "long-header"),
        ("GET", "/a/b/x?q=1&r=1", &[], "long-queries"),
        ("GET", "/a/b/x?q=1", &[], "long-query"),
    ] {
        let found = find_with(&router, method, None, path, headers);
        assert_eq!(found, Some(name), "{method} {path} {headers:?}");
    }
}

/// "If ties still exist … matching precedence MUST be granted to the FIRST matching rule (in list
/// order) with a match meeting the above criteria."
#[test]
fn ties_go_to_the_first_in_the_file() {
    let router = router(
        r#"
        name = "first"; headers = [{ name = "x", exact = "1" }]
        name = "second"; headers = [{ name = "y", exact = "1" }]
        "#,
    );
    let both = [("y", "1"), ("x", "1")];
    assert_eq!(find_with(&router, "GET", None, "/", &both), Some("first"));
    assert_eq!(
        find_with(&router, "GET", None, "/", &both[..1]),
        Some("second")
    );
}

/// "Only the first entry with an equivalent name MUST be considered for a match" of a header; and
/// values are compared decoded in a query.
#[test]
fn values_are_compared_as_a_whole() {
    let router = router(
        r#"
        name = "header"; headers = [{ name = "X-Version", regex = "1|2" }]
        name = "query"; query = [{ name = "a b", exact = "c/d" }]
        "#,
    );
    let with = |value| find_with(&router, "GET", None, "/", &[("x-version", value)]);
    assert_eq!(with("1"), Some("header"));
    assert_eq!(with("12"), None, "an expression matches as a whole");
    assert_eq!(with("3"), None);
    let query = |query: &str| find_with(&router, "GET", None, &format!("/?{query}"), &[]);
    assert_eq!(query("a%20b=c%2Fd"), Some("query"));
    assert_eq!(query("x=1&a+b=c/d"), Some("query"));
    assert_eq!(query("a%20b=c"), None);
    assert_eq!(query("a%20b=e&a%20b=c/d"), None, "the first counts");
}

#[test]
fn any_of_several_matches_leads_to_the_route() {
    let router = router(
        r#"
        name = "two"; matches = [{ path = { exact = "/a" } }, { path = { prefix = "/b" }, methods = ["PUT"] }]
        "#,
    );
    assert_eq!(find(&router, "GET", "h", "/a"), Some("two"));
    assert_eq!(find(&router, "PUT", "h", "/b/c"), Some("two"));
    assert_eq!(find(&router, "GET", "h", "/b/c"), None);
}

/// Counted, not timed: look-ups and rules tried for one request.
#[test]
fn a_hundred_thousand_routes_cost_no_more_steps_than_ten() {
    fn steps(count: usize) -> (usize, usize) {
        let mut text = String::from(
            "listeners = [{ name = \"a\", address = \"127.0.0.1:80\" }]\n\
             upstreams = [{ name = \"up\", peers = [\"127.0.0.1:90\"] }]\n",
        );
        for n in 0..count {
            use std::fmt::Write as _;
            let path = if n % 2 == 0 { "prefix" } else { "exact" };
            write!(
                text,
                "[[routes]]\nname = \"r{n}\"\nupstream = \"up\"\n\
                 hosts = [\"h{}.example\"]\npath = {{ {path} = \"/api/v{n}/things\" }}\n",
                n % 100
            )
            .unwrap();
        }
        let config = Config::parse(&text, "many.toml").unwrap();
        let router = Router::new(&config);
        let headers = HeaderMap::new();
        let (mut worst, mut found) = (0, 0);
        for n in (0..count).step_by(count.div_ceil(997)) {
            let mut taken = 0;
            let host = format!("h{}.example", n % 100);
            let path = format!("/api/v{n}/things");
            let asked = Asked {
                host: Some(&host),
                path: &path,
                query: None,
                method: &Method::GET,
                headers: &headers,
            };
            let hit = router.find_counting(ListenerIndex(0), &asked, &mut || taken += 1);
            found += usize::from(hit.is_some_and(|hit| hit.route.index.0 == n));
            worst = worst.max(taken);
        }
        (worst, found)
    }
    let (few, _) = steps(10);
    let (many, found) = steps(100_000);
    assert!(found > 900, "{found}");
    assert!(
        many <= few && many < 10,
        "{many} steps among 100,000, {few} among 10"
    );
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
