//! What clients may do: `[listeners.limits]`, access lists, trusted proxies, the PROXY protocol,
//! and a route's body limit and rate limits.

mod check;

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use http::HeaderName;
use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use super::Name;
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
