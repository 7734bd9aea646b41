//! Listeners, upstreams and routes: names become indices, and no two routes claim one request.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::ops::Range;
use std::time::Duration;

use http::{HeaderName, Method};

use super::check::{Checker, Seen};
use super::fields::example;
use super::problem::{nearest, quoted};
use super::raw::{
    Number, RawConfig, RawListener, RawPath, RawPeer, RawRoute, RawTenant, RawTls, RawUpstream,
    Text,
};
use super::{
    HostPattern, Listener, ListenerIndex, Name, PathPattern, Peer, Route, TenantRule, Tls,
    Upstream, UpstreamIndex,
};

/// What [`Checker::traffic`] found to be consistent.
pub(super) struct Traffic {
    pub(super) listeners: Vec<Listener>,
    pub(super) upstreams: Vec<Upstream>,
    pub(super) routes: Vec<Route>,
}

impl Checker<'_> {
    pub(super) fn traffic(
        &mut self,
        raw: &RawConfig,
        admin: Option<SocketAddr>,
    ) -> Option<Traffic> {
        self.at_least_one(raw.listeners.is_empty(), "listeners");
        self.at_least_one(raw.routes.is_empty(), "routes");
        let listeners = self.listeners(&raw.listeners, admin);
        let upstreams = self.upstreams(&raw.upstreams);
        let routes = self.routes(raw);
        Some(Traffic {
            listeners: listeners?,
            upstreams: upstreams?,
            routes: routes?,
        })
    }

    fn at_least_one(&mut self, empty: bool, field: &str) {
        if empty {
            let fix = format!("add a {} table", example(field).unwrap_or_default());
            self.report(0..0, field, "at least one is needed", fix);
        }
    }
}

/// Listeners.
impl Checker<'_> {
    fn listeners(
        &mut self,
        raw: &[RawListener],
        admin: Option<SocketAddr>,
    ) -> Option<Vec<Listener>> {
        let mut names = Seen::default();
        let mut bound: Vec<(SocketAddr, String)> = admin
            .map(|listen| (listen, "admin.listen".to_owned()))
            .into_iter()
            .collect();
        let checked: Vec<Option<Listener>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("listeners[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let address = self.listen_address(&raw.address, &here, &mut bound);
                let tls = match &raw.tls {
                    Some(raw) => self.tls(raw, &here).map(Some),
                    None => Some(None),
                };
                Some(Listener {
                    name: name?,
                    address: address?,
                    // On plain text it means waiting for 24 bytes of preface, without a limit.
                    http2: raw.http2.unwrap_or(raw.tls.is_some()),
                    tls: tls?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    fn listen_address(
        &mut self,
        text: &Text,
        here: &str,
        bound: &mut Vec<(SocketAddr, String)>,
    ) -> Option<SocketAddr> {
        let field = format!("{here}.address");
        let address = self.address(text.get_ref(), text.span(), &field)?;
        if let Some((_, first)) = bound.iter().find(|(other, _)| collide(*other, address)) {
            let wrong = format!("\"{address}\" is already taken by {first}");
            self.report(text.span(), field, wrong, "write another port");
            return None;
        }
        bound.push((address, field));
        Some(address)
    }

    fn tls(&mut self, raw: &RawTls, here: &str) -> Option<Tls> {
        let field = format!("{here}.tls.certificate");
        let certificate = self.pem_file(&raw.certificate, &field, "CERTIFICATE");
        let key = self.pem_file(&raw.key, &format!("{here}.tls.key"), "PRIVATE KEY");
        Some(Tls {
            certificate: certificate?,
            key: key?,
        })
    }
}

/// Whether the second address cannot be bound beside the first.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port()
        && a.port() != 0
        && a.is_ipv4() == b.is_ipv4()
        && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// Upstreams.
impl Checker<'_> {
    fn upstreams(&mut self, raw: &[RawUpstream]) -> Option<Vec<Upstream>> {
        let mut names = Seen::default();
        let checked: Vec<Option<Upstream>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("upstreams[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let peers = self.peers(raw, &format!("{here}.peers"));
                let mut timeout = |raw: Option<&Number>, key: &str, default: i64| {
                    let field = format!("{here}.{key}");
                    self.number(raw, &field, 1..=3_600_000, default)
                        .map(Duration::from_millis)
                };
                let connect = raw.connect_timeout_ms.as_ref();
                let connect_timeout = timeout(connect, "connect_timeout_ms", 1_000);
                let read = raw.read_timeout_ms.as_ref();
                let read_timeout = timeout(read, "read_timeout_ms", 30_000);
                let write = raw.write_timeout_ms.as_ref();
                let write_timeout = timeout(write, "write_timeout_ms", 30_000);
                let idle = raw.idle_timeout_ms.as_ref();
                let idle_timeout = timeout(idle, "idle_timeout_ms", 30_000);
                let retries = raw.retries.as_ref();
                let retries = self.number(retries, &format!("{here}.retries"), 0..=5, 1);
                Some(Upstream {
                    name: name?,
                    peers: peers?,
                    http2: raw.http2.unwrap_or(false),
                    connect_timeout: connect_timeout?,
                    read_timeout: read_timeout?,
                    write_timeout: write_timeout?,
                    idle_timeout: idle_timeout?,
                    retries: retries?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    fn peers(&mut self, raw: &RawUpstream, here: &str) -> Option<Vec<Peer>> {
        if raw.peers.get_ref().is_empty() {
            let fix = format!("write such as `{}`", example(here).unwrap_or_default());
            self.report(raw.peers.span(), here, "is empty", fix);
            return None;
        }
        let mut seen = Seen::default();
        let checked: Vec<Option<Peer>> = raw
            .peers
            .get_ref()
            .iter()
            .enumerate()
            .map(|(index, peer)| {
                let here = format!("{here}[{index}]");
                let (text, at, field, weight) = match peer.get_ref() {
                    RawPeer::Address(text) => (text, peer.span(), here.clone(), Some(1)),
                    RawPeer::Weighted(raw) => {
                        let weight = format!("{here}.weight");
                        let weight = self.number(raw.weight.as_ref(), &weight, 1..=1_000, 1);
                        let address = &raw.address;
                        let field = format!("{here}.address");
                        (address.get_ref(), address.span(), field, weight)
                    }
                };
                let address = self.address(text, at.clone(), &field)?;
                if address.port() == 0 {
                    let fix = "write the port the server listens on";
                    self.report(at, field, "port 0 cannot be connected to", fix);
                    return None;
                }
                let fix = "delete it; use `weight` for a larger share";
                self.unique(&mut seen, address, at, &field, fix)?;
                Some(Peer {
                    address,
                    weight: weight.and_then(NonZeroU16::new)?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }
}

/// Names that routes refer to, in index order.
struct Known<'r> {
    listeners: Vec<&'r str>,
    upstreams: Vec<&'r str>,
}

/// Routes.
impl Checker<'_> {
    fn routes(&mut self, raw: &RawConfig) -> Option<Vec<Route>> {
        let known = Known {
            listeners: raw
                .listeners
                .iter()
                .map(|l| l.name.get_ref().as_str())
                .collect(),
            upstreams: raw
                .upstreams
                .iter()
                .map(|u| u.name.get_ref().as_str())
                .collect(),
        };
        let mut names = Seen::default();
        let mut claims = Claims::default();
        let mut routes = Vec::new();
        for (index, raw) in raw.routes.iter().enumerate() {
            let here = format!("routes[{index}]");
            let route = self.route(raw.get_ref(), &here, &known, &mut names);
            if let Some(route) = &route {
                for conflict in claims.claim(index, route, &known.listeners) {
                    let fix = "give one of the two another host, path or method, or delete it";
                    self.report(raw.span(), &here, conflict, fix);
                }
            }
            routes.push(route);
        }
        routes.into_iter().collect()
    }

    fn route<'r>(
        &mut self,
        raw: &'r RawRoute,
        here: &str,
        known: &Known<'_>,
        names: &mut Seen<&'r str>,
    ) -> Option<Route> {
        let name = self.unique_name(names, &raw.name, &format!("{here}.name"));
        let upstream = self.reference(
            &raw.upstream,
            &format!("{here}.upstream"),
            "upstream",
            &known.upstreams,
        );
        let service = match &raw.service {
            Some(text) => {
                let field = format!("{here}.service");
                self.name(text.get_ref(), text.span(), &field)
            }
            // A bad upstream name is reported at the upstream.
            None => Name::new(raw.upstream.get_ref()),
        };
        let tenant = self.tenant(raw, &format!("{here}.tenant"));
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
        let methods = match &raw.methods {
            Some(list) => {
                let field = format!("{here}.methods");
                self.list(list.get_ref(), list.span(), &field, Self::method)
            }
            None => Some(Vec::new()),
        };
        let path = match &raw.path {
            Some(path) => self.path_pattern(path.get_ref(), path.span(), &format!("{here}.path")),
            None => Some(PathPattern::Prefix("".into())),
        };
        Some(Route {
            name: name?,
            service: service?,
            tenant: tenant?,
            listeners: listeners?,
            hosts: hosts?,
            path: path?,
            methods: methods?,
            upstream: UpstreamIndex(upstream?),
        })
    }

    /// The position of the name among the known ones.
    pub(super) fn reference(
        &mut self,
        text: &Text,
        field: &str,
        what: &str,
        known: &[&str],
    ) -> Option<usize> {
        let written = text.get_ref().as_str();
        let position = known.iter().position(|&name| name == written);
        if position.is_none() {
            let names = known.iter().copied();
            let fix = match nearest(written, names.clone()) {
                Some(meant) => format!("write \"{meant}\""),
                None => format!("add a [[{what}s]] table named \"{written}\" or name another"),
            };
            let wrong = format!("no {what} is named \"{written}\"; known: {}", quoted(names));
            self.report(text.span(), field, wrong, fix);
        }
        position
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

    fn tenant(&mut self, raw: &RawRoute, field: &str) -> Option<TenantRule> {
        let none = || Name::new("none");
        let Some(tenant) = &raw.tenant else {
            return none().map(TenantRule::Fixed);
        };
        match tenant.get_ref() {
            RawTenant::Fixed(text) => self.name(text, tenant.span(), field).map(TenantRule::Fixed),
            RawTenant::Header(table) => {
                let text = &table.header;
                let header: Option<HeaderName> = text.get_ref().parse().ok();
                if header.is_none() {
                    let wrong = format!("\"{}\" is not a header name", text.get_ref());
                    let fix = "write such as `header = \"x-tenant\"`";
                    self.report(text.span(), format!("{field}.header"), wrong, fix);
                }
                let default = match &table.default {
                    Some(text) => {
                        self.name(text.get_ref(), text.span(), &format!("{field}.default"))
                    }
                    None => none(),
                };
                Some(TenantRule::Header {
                    header: header?,
                    default: default?,
                })
            }
        }
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
        match (&raw.exact, &raw.prefix) {
            (Some(text), None) => {
                let pattern = PathPattern::exact(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.exact"))
            }
            (None, Some(text)) => {
                let pattern = PathPattern::prefix(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.prefix"))
            }
            (both, _) => {
                let wrong = match both {
                    Some(_) => "has both `exact` and `prefix`",
                    None => "has neither `exact` nor `prefix`",
                };
                let fix = r#"write `path = { prefix = "/api" }` or `path = { exact = "/x" }`"#;
                self.report(at, field, wrong, fix);
                None
            }
        }
    }

    fn accepted<T>(
        &mut self,
        result: Result<T, super::pattern::Refused>,
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
}

/// What one route says about requests at the finest grain the router distinguishes. Two routes
/// with one claim in common would leave the order of the file to decide: refused.
type Claim = (
    ListenerIndex,
    Option<HostPattern>,
    PathPattern,
    Option<Method>,
);

#[derive(Default)]
struct Claims(HashMap<Claim, (usize, Name)>);

impl Claims {
    /// Enters a route's claims; a sentence for every earlier route that has one of them.
    fn claim(&mut self, index: usize, route: &Route, listeners: &[&str]) -> Vec<String> {
        let mut conflicts = Vec::new();
        let mut reported = HashSet::new();
        let hosts = one_or_any(&route.hosts);
        let methods = one_or_any(&route.methods);
        for &listener in &route.listeners {
            for host in &hosts {
                for method in &methods {
                    let claim = (listener, host.clone(), route.path.clone(), method.clone());
                    let (first, first_name) = self
                        .0
                        .entry(claim)
                        .or_insert_with(|| (index, route.name.clone()));
                    if *first != index && reported.insert(*first) {
                        conflicts.push(format!(
                            "claims the same requests as routes[{first}] \"{first_name}\": listener {}, {}, path {}, {}",
                            listeners.get(listener.0).unwrap_or(&"?"),
                            host.as_ref().map_or("any host".into(), |host| format!("host {host}")),
                            route.path,
                            method.as_ref().map_or("any method".into(), |method| format!("method {method}")),
                        ));
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
