//! What clients may do: `[listeners.limits]`, access lists, trusted proxies, the PROXY protocol,
//! and a route's body limit and rate limits.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use http::HeaderName;
use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use super::Name;
use super::check::{Checker, Seen};
use super::raw::{Number, Text};

/// A listener's protection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Protection {
    /// What connections may take.
    pub limits: Limits,
    /// Who may connect.
    pub access: Access,
    /// Whose X-Forwarded-For is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Who must say whose connection it is, by a PROXY header; empty: nobody does.
    pub proxy_protocol_from: Vec<IpNet>,
}

impl Protection {
    /// The client's address: the last in the chain of forwarders that is no trusted proxy.
    /// `forwarded` are the X-Forwarded-For lines in their order.
    #[must_use]
    pub fn client<'h>(
        &self,
        peer: IpAddr,
        forwarded: impl DoubleEndedIterator<Item = &'h str>,
    ) -> IpAddr {
        let trusted = |ip: IpAddr| self.trusted_proxies.iter().any(|net| net.contains(&ip));
        let mut client = peer.to_canonical();
        let hops = forwarded.rev().flat_map(|line| line.rsplit(','));
        for hop in hops {
            if !trusted(client) {
                break;
            }
            // A word that is no address ends what can be believed.
            let Some(address) = forwarded_address(hop.trim()) else {
                break;
            };
            client = address;
        }
        client
    }
}

/// An address in X-Forwarded-For, with or without a port.
fn forwarded_address(text: &str) -> Option<IpAddr> {
    let plain = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    let ip = plain.unwrap_or(text).parse::<IpAddr>().ok();
    ip.or_else(|| Some(text.parse::<std::net::SocketAddr>().ok()?.ip()))
        .map(|ip| ip.to_canonical())
}

/// What a listener's connections may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the first byte of a header (of a connection, for the first) to its last.
    pub header_timeout: Duration,
    /// A header with its request line.
    pub header_bytes_max: usize,
    /// Lines of a header.
    pub headers_max: usize,
    /// A request target.
    pub uri_bytes_max: usize,
    /// A request body; None: no limit.
    pub body_bytes_max: Option<u64>,
    /// Bytes a second a request body must come with, over 10 s; 0: no limit. HTTP/1.
    pub body_rate_min: u64,
    /// For one write to the client to be taken.
    pub write_timeout: Duration,
    /// For the TLS handshake, PROXY header included.
    pub handshake_timeout: Duration,
    /// Without a request, a connection closes.
    pub idle_timeout: Duration,
    /// Connections of the listener.
    pub connections_max: usize,
    /// Connections of one client address (IPv6: of one /64); None: no limit.
    pub connections_per_client_max: Option<usize>,
    /// After this many requests a connection closes; None: no limit.
    pub requests_per_connection_max: Option<u64>,
    /// At this age a connection closes once its requests are over; None: no limit.
    pub connection_age_max: Option<Duration>,
    /// HTTP/2 streams at once on one connection.
    pub streams_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            header_bytes_max: 64 * 1024,
            headers_max: 100,
            uri_bytes_max: 8 * 1024,
            body_bytes_max: None,
            body_rate_min: 64,
            write_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            connections_max: 16_384,
            connections_per_client_max: None,
            requests_per_connection_max: None,
            connection_age_max: None,
            streams_max: 100,
        }
    }
}

/// Networks of a list that acts in the kernel: a program has at most 4096 instructions, and an
/// IPv6 network takes up to 13.
pub const NETWORKS_MAX: usize = 300;

/// Who may: what is denied may not; where something is allowed, nothing else may.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Empty: everybody not denied.
    pub allow: Vec<IpNet>,
    /// Comes first.
    pub deny: Vec<IpNet>,
    /// Whether the kernel turns others away before there is a connection.
    pub kernel: bool,
}

impl Access {
    /// Whether an address may.
    #[must_use]
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
        !within(&self.deny) && (self.allow.is_empty() || within(&self.allow))
    }
}

/// At most so many requests in so long, for each value of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Unique among the route's.
    pub name: Name,
    /// What is counted apart.
    pub key: RateKey,
    /// In [`RateLimit::period`].
    pub requests: NonZeroU64,
    /// For [`RateLimit::requests`].
    pub period: Duration,
    /// May come at once.
    pub burst: NonZeroU64,
    /// Counted in Redis, together with other gateways.
    pub shared: bool,
}

/// What a rate limit counts apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RateKey {
    /// The client's address (IPv6: its /64).
    Client,
    /// The tenant.
    Tenant,
    /// Nothing: the route as a whole.
    Route,
    /// A request header's value; requests without one share a key.
    Header(HeaderName),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawLimits {
    header_timeout_ms: Option<Number>,
    header_bytes_max: Option<Number>,
    headers_max: Option<Number>,
    uri_bytes_max: Option<Number>,
    body_bytes_max: Option<Number>,
    body_rate_min: Option<Number>,
    write_timeout_ms: Option<Number>,
    handshake_timeout_ms: Option<Number>,
    idle_timeout_ms: Option<Number>,
    connections_max: Option<Number>,
    connections_per_client_max: Option<Number>,
    requests_per_connection_max: Option<Number>,
    connection_age_max_seconds: Option<Number>,
    streams_max: Option<Number>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAccess {
    allow: Option<Spanned<Vec<Text>>>,
    deny: Option<Spanned<Vec<Text>>>,
    kernel: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawRateLimit {
    name: Text,
    key: Text,
    requests: Number,
    per_seconds: Option<Number>,
    burst: Option<Number>,
    shared: Option<Spanned<bool>>,
}

impl Checker<'_> {
    pub(super) fn protection(
        &mut self,
        limits: Option<&RawLimits>,
        access: Option<&RawAccess>,
        trusted: Option<&Spanned<Vec<Text>>>,
        proxy_protocol: Option<&Spanned<Vec<Text>>>,
        here: &str,
    ) -> Option<Protection> {
        let limits = match limits {
            Some(raw) => self.limits(raw, &format!("{here}.limits")),
            None => Some(Limits::default()),
        };
        let raw_access = access;
        let access = self.access(access, &format!("{here}.access"));
        if let Some((raw, access)) = raw_access.zip(access.as_ref()) {
            let named = proxy_protocol.is_some();
            self.kernel_access(raw, access, named, &format!("{here}.access"));
        }
        let trusted = self.networks(trusted, &format!("{here}.trusted_proxies"));
        let from = self.networks(proxy_protocol, &format!("{here}.proxy_protocol_from"));
        Some(Protection {
            limits: limits?,
            access: access?,
            trusted_proxies: trusted?,
            proxy_protocol_from: from?,
        })
    }

    fn limits(&mut self, raw: &RawLimits, here: &str) -> Option<Limits> {
        const HOUR_MS: i64 = 3_600_000;
        let d = Limits::default();
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let size = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
        let field = |name: &str| format!("{here}.{name}");
        let mut time = |raw: &Option<Number>, name: &str, default: Duration| {
            self.number(raw.as_ref(), &field(name), 1..=HOUR_MS, ms(default))
                .map(Duration::from_millis)
        };
        let header = time(
            &raw.header_timeout_ms,
            "header_timeout_ms",
            d.header_timeout,
        );
        let write = time(&raw.write_timeout_ms, "write_timeout_ms", d.write_timeout);
        let shake = time(
            &raw.handshake_timeout_ms,
            "handshake_timeout_ms",
            d.handshake_timeout,
        );
        let idle = time(&raw.idle_timeout_ms, "idle_timeout_ms", d.idle_timeout);
        let mut count = |raw: &Option<Number>, name: &str, most: i64, default: usize| {
            self.number::<usize>(raw.as_ref(), &field(name), 1..=most, size(default))
        };
        let bytes = count(
            &raw.header_bytes_max,
            "header_bytes_max",
            1 << 20,
            d.header_bytes_max,
        );
        let lines = count(&raw.headers_max, "headers_max", 256, d.headers_max);
        let uri = count(
            &raw.uri_bytes_max,
            "uri_bytes_max",
            1 << 20,
            d.uri_bytes_max,
        );
        let most = count(
            &raw.connections_max,
            "connections_max",
            1 << 24,
            d.connections_max,
        );
        let streams = count(&raw.streams_max, "streams_max", 100_000, 100);
        let rate = raw.body_rate_min.as_ref();
        let rate = self.number(rate, &field("body_rate_min"), 0..=1 << 30, 64);
        let body = self.optional(&raw.body_bytes_max, &field("body_bytes_max"), 1 << 50);
        let each = &raw.connections_per_client_max;
        let each = self.optional::<usize>(each, &field("connections_per_client_max"), 1 << 24);
        let requests = &raw.requests_per_connection_max;
        let requests = self.optional(requests, &field("requests_per_connection_max"), 1 << 40);
        let age = &raw.connection_age_max_seconds;
        let age = self.optional(age, &field("connection_age_max_seconds"), 1 << 30);
        Some(Limits {
            header_timeout: header?,
            header_bytes_max: bytes?,
            headers_max: lines?,
            uri_bytes_max: uri?,
            body_bytes_max: body?,
            body_rate_min: rate?,
            write_timeout: write?,
            handshake_timeout: shake?,
            idle_timeout: idle?,
            connections_max: most?,
            connections_per_client_max: each?,
            requests_per_connection_max: requests?,
            connection_age_max: age?.map(Duration::from_secs),
            streams_max: u32::try_from(streams?).ok()?,
        })
    }

    /// `Some(None)` where it is absent.
    pub(super) fn optional<T: TryFrom<i64>>(
        &mut self,
        raw: &Option<Number>,
        field: &str,
        most: i64,
    ) -> Option<Option<T>> {
        match raw {
            None => Some(None),
            Some(number) => self.number(Some(number), field, 1..=most, 1).map(Some),
        }
    }

    fn access(&mut self, raw: Option<&RawAccess>, here: &str) -> Option<Access> {
        let Some(raw) = raw else {
            return Some(Access::default());
        };
        let allow = self.networks(raw.allow.as_ref(), &format!("{here}.allow"));
        let deny = self.networks(raw.deny.as_ref(), &format!("{here}.deny"));
        Some(Access {
            allow: allow?,
            deny: deny?,
            kernel: raw.kernel.as_ref().is_some_and(|kernel| *kernel.get_ref()),
        })
    }

    /// A list can act in the kernel where the socket's address is the client's.
    fn kernel_access(&mut self, raw: &RawAccess, access: &Access, named: bool, here: &str) {
        let Some(kernel) = raw.kernel.as_ref().filter(|kernel| *kernel.get_ref()) else {
            return;
        };
        let networks = access.allow.len() + access.deny.len();
        let (wrong, fix) = if named {
            (
                "cannot act in the kernel: who a client is, is in the PROXY header".to_owned(),
                "delete it, or `proxy_protocol_from`".to_owned(),
            )
        } else if networks == 0 {
            let fix = "add `allow` or `deny`, or delete it";
            ("has no list to act on".to_owned(), fix.to_owned())
        } else if networks > NETWORKS_MAX {
            (
                format!("has {networks} networks, more than a program takes"),
                format!("write at most {NETWORKS_MAX}, or delete it"),
            )
        } else {
            return;
        };
        self.report(kernel.span(), format!("{here}.kernel"), wrong, fix);
    }

    /// A route is known only when a request has been read.
    pub(super) fn route_access(&mut self, raw: Option<&RawAccess>, here: &str) -> Option<Access> {
        if let Some(kernel) = raw.and_then(|raw| raw.kernel.as_ref()) {
            let wrong = "cannot act in the kernel: a route is known when the request is read";
            let fix = "delete it, or write the list into `[listeners.access]`";
            self.report(kernel.span(), format!("{here}.kernel"), wrong, fix);
        }
        self.access(raw, here)
    }

    fn networks(&mut self, raw: Option<&Spanned<Vec<Text>>>, field: &str) -> Option<Vec<IpNet>> {
        let Some(list) = raw else {
            return Some(Vec::new());
        };
        self.list(
            list.get_ref(),
            list.span(),
            field,
            |checker, text, field| {
                let written = text.get_ref();
                let single = written.parse::<IpAddr>().map(IpNet::from).ok();
                let network = single.or_else(|| Some(written.parse::<IpNet>().ok()?.trunc()));
                if network.is_none() {
                    let wrong = format!("\"{written}\" is neither an address nor a network");
                    let fix = "write such as \"10.0.0.0/8\" or \"2001:db8::/32\"";
                    checker.report(text.span(), field, wrong, fix);
                }
                network
            },
        )
    }

    pub(super) fn rate_limits(
        &mut self,
        raw: &[Spanned<RawRateLimit>],
        store: bool,
        here: &str,
    ) -> Option<Vec<RateLimit>> {
        let mut names = Seen::default();
        let checked: Vec<Option<RateLimit>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let raw = raw.get_ref();
                let here = format!("{here}[{index}]");
                let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
                let key = self.rate_key(&raw.key, &format!("{here}.key"));
                let field = format!("{here}.requests");
                let requests = self.number(Some(&raw.requests), &field, 1..=1 << 30, 1);
                let period = raw.per_seconds.as_ref();
                let period = self.number(period, &format!("{here}.per_seconds"), 1..=86_400, 1);
                let burst = raw.burst.as_ref();
                let most = requests
                    .and_then(|r: u64| i64::try_from(r).ok())
                    .unwrap_or(1);
                let burst = self.number(burst, &format!("{here}.burst"), 1..=1 << 30, most);
                let shared = raw.shared.as_ref();
                if let Some(shared) = shared.filter(|shared| *shared.get_ref() && !store) {
                    let fix = "add a [rate_limit_store] table";
                    let wrong = "there is no store to share it in";
                    self.report(shared.span(), format!("{here}.shared"), wrong, fix);
                }
                Some(RateLimit {
                    name: name?,
                    key: key?,
                    requests: NonZeroU64::new(requests?)?,
                    period: Duration::from_secs(period?),
                    burst: NonZeroU64::new(burst?)?,
                    shared: shared.is_some_and(|shared| *shared.get_ref()),
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    fn rate_key(&mut self, text: &Text, field: &str) -> Option<RateKey> {
        let written = text.get_ref().as_str();
        if let Some(header) = written.strip_prefix("header:") {
            if let Ok(header) = header.parse() {
                return Some(RateKey::Header(header));
            }
            let wrong = format!("\"{header}\" is not a header name");
            let fix = "write such as \"header:x-api-key\"";
            self.report(text.span(), field, wrong, fix);
            return None;
        }
        let known = [
            ("client", RateKey::Client),
            ("tenant", RateKey::Tenant),
            ("route", RateKey::Route),
        ];
        match known.into_iter().find(|(name, _)| *name == written) {
            Some((_, key)) => Some(key),
            None => {
                let wrong = format!("\"{written}\" is not a key to count by");
                let fix = "write \"client\", \"tenant\", \"route\" or \"header:x-api-key\"";
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_the_last_that_no_trusted_proxy_vouches_for() {
        let protection = Protection {
            trusted_proxies: vec!["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            ..Protection::default()
        };
        for (peer, lines, client) in [
            ("192.0.2.1", &["1.1.1.1"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("::ffff:10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("10.0.0.1", &["6.6.6.6, 1.1.1.1, 10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["6.6.6.6", "1.1.1.1, 10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["6.6.6.6, junk, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &["1.1.1.1:4711"], "1.1.1.1"),
            ("::1", &["[2001:db8::1]:80"], "2001:db8::1"),
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ] {
            let found = protection.client(peer.parse().unwrap(), lines.iter().copied());
            assert_eq!(found.to_string(), client, "{peer} {lines:?}");
        }
    }

    #[test]
    fn denied_comes_before_allowed() {
        let access = Access {
            allow: vec!["10.0.0.0/8".parse().unwrap()],
            deny: vec!["10.1.0.0/16".parse().unwrap()],
            kernel: false,
        };
        for (address, permitted) in [
            ("10.2.0.1", true),
            ("::ffff:10.2.0.1", true),
            ("10.1.0.1", false),
            ("192.0.2.1", false),
            ("::1", false),
        ] {
            assert_eq!(
                access.permits(address.parse().unwrap()),
                permitted,
                "{address}"
            );
        }
        assert!(Access::default().permits("192.0.2.1".parse().unwrap()));
    }
}
