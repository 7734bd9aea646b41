//! Listeners, and what refers to each other: names become indices.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use super::check::{Checker, Seen};
use super::fields::example;
use super::problem::{nearest, quoted};
use super::raw::{RawConfig, RawListener, Text};
use super::{Experiment, Listener, Route, Upstream};
use crate::acme;

/// What [`Checker::traffic`] found to be consistent.
pub(super) struct Traffic {
    pub(super) listeners: Vec<Listener>,
    pub(super) upstreams: Vec<Upstream>,
    pub(super) experiments: Vec<Experiment>,
    pub(super) routes: Vec<Arc<Route>>,
}

impl Checker<'_> {
    pub(super) fn traffic(
        &mut self,
        raw: &RawConfig,
        admin: Option<SocketAddr>,
        state_dir: Option<&Path>,
    ) -> Option<Traffic> {
        self.at_least_one(raw.listeners.is_empty(), "listeners");
        self.at_least_one(raw.routes.is_empty(), "routes");
        let listeners = self.listeners(&raw.listeners, admin, state_dir);
        let upstreams = self.upstreams(&raw.upstreams);
        fn names<T>(list: &[T], name: impl Fn(&T) -> &Text) -> Vec<&str> {
            list.iter()
                .map(|item| name(item).get_ref().as_str())
                .collect()
        }
        let known = Known {
            listeners: names(&raw.listeners, |raw| &raw.name),
            upstreams: names(&raw.upstreams, |raw| &raw.name),
            experiments: names(&raw.experiments, |raw| &raw.name),
        };
        let experiments = self.experiments(&raw.experiments, &known);
        let routes = self.routes(raw, &known);
        Some(Traffic {
            listeners: listeners?,
            upstreams: upstreams?,
            experiments: experiments?,
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
        state_dir: Option<&Path>,
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
                    Some(tls) => {
                        let ordered =
                            state_dir.map(|folder| acme::file(folder, raw.name.get_ref()));
                        self.tls(tls, &here, raw.name.span(), ordered).map(Some)
                    }
                    None => Some(None),
                };
                let protection = self.protection(
                    raw.limits.as_ref(),
                    raw.access.as_ref(),
                    raw.trusted_proxies.as_ref(),
                    raw.proxy_protocol_from.as_ref(),
                    &here,
                );
                Some(Listener {
                    name: name?,
                    address: address?,
                    http2: raw.http2.unwrap_or(raw.tls.is_some()),
                    tls: tls?,
                    protection: protection?,
                })
            })
            .collect();
        let is_plain = |raw: &RawListener| raw.tls.is_none();
        if !raw.iter().any(is_plain)
            && let Some(acme) = raw.iter().find_map(|raw| raw.tls.as_ref()?.acme_span())
        {
            let wrong = "needs a plain listener, on which the server looks for its challenge";
            let fix = "add a listener without TLS that is reached on port 80";
            self.report(acme, "listeners", wrong, fix);
            return None;
        }
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
}

/// Whether the second address cannot be bound beside the first.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port()
        && a.port() != 0
        && a.is_ipv4() == b.is_ipv4()
        && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// Names that others refer to, in index order.
pub(super) struct Known<'r> {
    pub(super) listeners: Vec<&'r str>,
    pub(super) upstreams: Vec<&'r str>,
    pub(super) experiments: Vec<&'r str>,
}

/// References.
impl Checker<'_> {
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
}
