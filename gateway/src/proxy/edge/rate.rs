//! What a rate limit counts, and what the client is told about it.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderName, HeaderValue, header};
use pingora::http::RequestHeader;

use crate::config::{Name, RateKey, RateLimit};
use crate::proxy::gate::network_of;
use crate::proxy::limit::Verdict;
use crate::proxy::record::RequestRecord;

static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

pub(super) fn rate_key(
    limit: &RateLimit,
    request: &RequestHeader,
    record: &RequestRecord,
) -> String {
    match &limit.key {
        RateKey::Route => String::new(),
        RateKey::Tenant => record.tenant.to_string(),
        RateKey::Client => record
            .client_ip
            .map(network_of)
            .as_ref()
            .map_or_else(String::new, IpAddr::to_string),
        RateKey::Header(name) => request
            .headers
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .unwrap_or_default(),
    }
}

/// The limit a client is closest to.
#[derive(Clone, Debug)]
pub(in crate::proxy) struct Rate {
    name: Name,
    requests: u64,
    period: Duration,
    verdict: Verdict,
}

pub(super) fn tighter(before: Option<Rate>, limit: &RateLimit, verdict: Verdict) -> Rate {
    match before {
        Some(before) if verdict.allowed && before.verdict.remaining <= verdict.remaining => before,
        _ => Rate {
            name: limit.name.clone(),
            requests: limit.requests.get(),
            period: limit.period,
            verdict,
        },
    }
}

/// RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers), and Retry-After where
/// the request did not pass.
pub(in crate::proxy) fn rate_headers(record: &RequestRecord) -> Vec<(HeaderName, HeaderValue)> {
    let Some(rate) = &record.rate else {
        return Vec::new();
    };
    let up = |wait: Duration| wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let (remaining, wait) = (rate.verdict.remaining, up(rate.verdict.wait));
    let name = &rate.name;
    let mut headers = vec![
        (
            RATE_LIMIT.clone(),
            format!("\"{name}\";r={remaining};t={wait}"),
        ),
        (
            RATE_LIMIT_POLICY.clone(),
            format!("\"{name}\";q={};w={}", rate.requests, rate.period.as_secs()),
        ),
    ];
    if !rate.verdict.allowed {
        headers.push((header::RETRY_AFTER, wait.max(1).to_string()));
    }
    let valid = |(name, value): (HeaderName, String)| Some((name, value.parse().ok()?));
    headers.into_iter().filter_map(valid).collect()
}
