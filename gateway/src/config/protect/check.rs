//! What is written about protection, checked.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;

use super::{
    Access, Limits, NETWORKS_MAX, Protection, RateKey, RateLimit, RawAccess, RawLimits,
    RawRateLimit,
};
use crate::config::check::{Checker, Seen};
use crate::config::raw::{Number, Text};

impl Checker<'_> {
    pub(in crate::config) fn protection(
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
    pub(in crate::config) fn optional<T: TryFrom<i64>>(
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
    pub(in crate::config) fn route_access(
        &mut self,
        raw: Option<&RawAccess>,
        here: &str,
    ) -> Option<Access> {
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

    pub(in crate::config) fn rate_limits(
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
