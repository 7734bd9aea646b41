//! What a request is: its route, its tenant, its id, and on whose account its bytes go.

use std::borrow::Cow;
use std::sync::Arc;

use http::{HeaderName, header};
use pingora::http::RequestHeader;
use pingora::prelude::Session;

use super::experiment::{self, Assignment};
use super::generation::Generation;
use super::meter::EndpointId;
use super::record::{Leg, RequestLine, RequestRecord};
use super::route::{self, Asked};
use super::{Gateway, X_REQUEST_ID, edge, retry};
use crate::access_log::ClientAddress;
use crate::config::{Name, TenantRule};
use crate::owner::Quality;
use crate::trace::{self, TRACEPARENT};

impl Gateway {
    /// A header was parsed: the route, the tenant, and from here the connection's bytes are this
    /// request's.
    pub(super) fn arrived(&self, session: &mut Session, record: &mut RequestRecord) {
        record.arrive();
        self.meet(session, record);
        let request = session.req_header();
        let asked = Asked {
            host: host(request),
            path: request.uri.path(),
            query: request.uri.query(),
            method: &request.method,
            headers: &request.headers,
        };
        let generation = Arc::clone(&record.generation);
        // What stands for a refused request is nobody's.
        if record.refused.is_none()
            && let Some(found) = generation.router.find(self.listener, &asked)
        {
            record.route = Some(Arc::clone(found.route));
            record.matched = Some(Arc::clone(found.by));
            record.deadline = retry::deadline(found.route.request_timeout, request);
            record.assignment = assignment(found.route, &generation, request);
        }
        record.token = Self::verify(request, record);
        let rule = record.route.as_deref().map(|route| &route.tenant);
        let (host, path) = (host(request), request.uri.path());
        let named = tenant(rule, record, host, path, |name| {
            request.headers.get(name)?.to_str().ok()
        });
        record.tenant = named;
        record.begin(self.request_line(session, record));
        record.trace(&session.req_header().headers);
        Self::enable_compression(session, record);
        let request = session.req_header();
        let quality = if edge::speaks_http2(session) {
            Quality::Estimated
        } else {
            Quality::Exact
        };
        let endpoint = EndpointId::Listener(self.listener);
        let tracked = session
            .digest()
            .and_then(|digest| digest.socket_digest.as_ref())
            .and_then(|digest| self.shared.meter.find(digest));
        if let Some(tracked) = tracked {
            let meter = &self.shared.meter;
            let owner = meter.route_owner(
                &record.generation.endpoints,
                endpoint,
                record.route.as_deref(),
                &record.tenant,
                quality,
            );
            let more = quality == Quality::Estimated || expects_body(request);
            record.client =
                owner.map(|owner| Leg::begin(&self.shared, tracked, owner, quality, more));
        }
    }

    fn request_line(&self, session: &Session, record: &RequestRecord) -> RequestLine {
        let client = record
            .connection
            .as_ref()
            .map(|connection| connection.client);
        let request = session.req_header();
        let id = request_id(|name| request.headers.get(name)?.to_str().ok());
        let host = host(request).unwrap_or_default();
        RequestLine::new(
            (&id, host, request.uri.path()),
            request.method.clone(),
            match request.version {
                http::Version::HTTP_2 => "HTTP/2",
                http::Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            match (client, record.client_ip) {
                // A trusted proxy says whose request it is, but not from which port.
                (Some(client), Some(ip)) if client.ip() != ip => ClientAddress::Named(ip),
                (Some(client), _) => ClientAddress::Socket(client),
                (None, _) => ClientAddress::Unknown,
            },
            self.listener,
        )
    }
}

/// Whether an HTTP/1.1 request has more to come after its header: a body, or a tunnel.
fn expects_body(request: &RequestHeader) -> bool {
    let headers = &request.headers;
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers.contains_key(header::UPGRADE)
        || length.is_some_and(|length| length.as_bytes() != b"0")
}

/// HTTP/2 has the authority in the URI, HTTP/1.1 in the Host header.
pub(super) fn host(request: &RequestHeader) -> Option<&str> {
    request
        .uri
        .authority()
        .map(http::uri::Authority::as_str)
        .or_else(|| request.headers.get(header::HOST)?.to_str().ok())
}

/// On whose account a request goes; `header` looks a request header up.
pub(super) fn tenant<'h>(
    rule: Option<&TenantRule>,
    record: &RequestRecord,
    host: Option<&str>,
    path: &str,
    header: impl Fn(&HeaderName) -> Option<&'h str>,
) -> Box<str> {
    let Some(rule) = rule else {
        return "none".into();
    };
    named(rule, record, host, path, &header).unwrap_or_else(|| rule.fallback().as_str().into())
}

/// The tenant that a request names by a rule. A client's word becomes a metric label: only a
/// well-formed name may.
fn named<'h>(
    rule: &TenantRule,
    record: &RequestRecord,
    host: Option<&str>,
    path: &str,
    header: &impl Fn(&HeaderName) -> Option<&'h str>,
) -> Option<Box<str>> {
    match rule {
        TenantRule::Fixed(name) => Some(name.as_str().into()),
        TenantRule::Header { header: name, .. } => header(name)
            .filter(|value| Name::is_valid(value))
            .map(Into::into),
        TenantRule::Certificate { .. } | TenantRule::Claim { .. } => {
            edge::verified_tenant(rule, record)
        }
        TenantRule::Host { template, .. } => template.tenant(host?),
        TenantRule::Path { template, .. } => template.tenant(path),
        TenantRule::FirstOf { rules, .. } => rules
            .iter()
            .find_map(|rule| named(rule, record, host, path, header)),
    }
}

/// The id the client gave its request, else that of the trace it is part of, else a new one.
pub(super) fn request_id<'r>(header: impl Fn(&HeaderName) -> Option<&'r str>) -> Cow<'r, str> {
    header(&X_REQUEST_ID)
        .filter(|id| !id.is_empty() && id.len() <= 128)
        .or_else(|| header(&TRACEPARENT).and_then(trace::id_of))
        .map_or_else(|| Cow::Owned(new_request_id()), Cow::Borrowed)
}

/// 128 random bits: unique without coordination.
fn new_request_id() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    // Two fresh random keys of the standard library's hasher.
    let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(0_u8));
    let text = crate::written::hex(u128::from(high) << 64 | u128::from(low));
    // Digits only.
    std::str::from_utf8(&text).unwrap_or_default().to_owned()
}

pub(super) fn cookie<'r>(request: &'r RequestHeader, name: &str) -> Option<&'r str> {
    let lines = request.headers.get_all(header::COOKIE).iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .find_map(|line| experiment::cookie(line, name))
}

fn assignment(
    route: &route::Route,
    generation: &Generation,
    request: &RequestHeader,
) -> Assignment {
    if route.experiments.is_empty() {
        return Assignment::default();
    }
    let all = &generation.config.experiments;
    let experiments = route
        .experiments
        .iter()
        .filter_map(|index| all.get(index.0));
    Assignment::deal(
        experiments,
        |name| cookie(request, name),
        |name| request.headers.get(name)?.to_str().ok(),
        new_request_id,
    )
}
