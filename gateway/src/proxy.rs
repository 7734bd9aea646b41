//! The reverse proxy: pingora's request phases, each handing its decision to a module below.
//!
//! request → [`route`] → [`upstream`] → [`record`] → attribution and access log.

pub mod app;
pub mod generation;
pub mod lane;
pub mod meter;
pub mod record;
pub mod route;
pub mod upstream;

use std::{sync::Arc, time::Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::{Error, ErrorType, Result};
use pingora::{
    http::{RequestHeader, ResponseHeader},
    prelude::{HttpPeer, ProxyHttp, Session},
    protocols::{ALPN, Digest},
    upstreams::peer::Peer as _,
};

use crate::{
    access_log::AccessLog,
    budget::{Budgets, Decision},
    config::{ListenerIndex, Name, TenantRule},
    export::RequestMetrics,
    owner::Quality,
    units::PayloadBytes,
};
use generation::Generation;
use meter::{EndpointId, Meter};
use record::{Leg, RequestLine, RequestRecord};
use upstream::Outcome;

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// On responses while a budget warns: its name, the share used, its period.
const BUDGET_HEADER: &str = "x-edgemeter-budget";
static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What all listeners share for as long as the process lives. What a reload changes is in the
/// [`Generation`].
pub struct Shared {
    /// The configuration in force.
    pub generation: ArcSwap<Generation>,
    /// The kernel side.
    pub meter: Meter,
    /// Request metrics.
    pub metrics: RequestMetrics,
    /// None when not configured.
    pub access_log: Option<AccessLog>,
    /// What may be used.
    pub budgets: Arc<Budgets>,
}

/// The proxy of one listener.
pub struct Gateway {
    /// Shared state.
    pub shared: Arc<Shared>,
    /// Which listener.
    pub listener: ListenerIndex,
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = RequestRecord;

    fn new_ctx(&self) -> RequestRecord {
        RequestRecord::new(Arc::clone(&self.shared))
    }

    /// The first phase with a parsed header: from here the connection's bytes are this request's.
    async fn early_request_filter(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<()> {
        record.arrive();
        let request = session.req_header();
        let host = host(request);
        let path = request.uri.path();
        record.route = record
            .generation
            .router
            .find(self.listener, host, path, &request.method)
            .cloned();
        let rule = record.route.as_deref().map(|route| &route.tenant);
        record.tenant = tenant(rule, |name| request.headers.get(name)?.to_str().ok());
        record.begin(self.request_line(session, &record.generation));
        let quality = if session.is_http2() {
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
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<bool> {
        if record.route.is_some() {
            return self.budget(session, record).await;
        }
        problem(
            session,
            record,
            404,
            "no route matches this host, path and method",
        )
        .await?;
        Ok(true)
    }

    async fn upstream_peer(
        &self,
        _session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<Box<HttpPeer>> {
        let Some(route) = &record.route else {
            return Err(Error::explain(
                ErrorType::InternalError,
                "routed without a route",
            ));
        };
        let index = route.upstream;
        let generation = &record.generation;
        let upstream = &generation.config.upstreams[index.0];
        let Some(peer) = generation.pools[index.0].pick(&record.tried, Instant::now()) else {
            record.error = Some(format!("upstream {}: every peer was tried", upstream.name));
            return Err(Error::explain(
                ErrorType::HTTPStatus(502),
                "every peer was tried",
            ));
        };
        record.current = Some((index, peer));
        let mut http_peer = HttpPeer::new(peer.address, false, String::new());
        let options = &mut http_peer.options;
        options.connection_timeout = Some(upstream.connect_timeout);
        options.total_connection_timeout = Some(upstream.connect_timeout);
        options.read_timeout = Some(upstream.read_timeout);
        options.write_timeout = Some(upstream.write_timeout);
        options.idle_timeout = Some(upstream.idle_timeout);
        if upstream.http2 {
            options.alpn = ALPN::H2;
            // pingora's default of 1 would open a connection per concurrent request.
            options.max_h2_streams = 128;
        }
        Ok(Box::new(http_peer))
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        reused: bool,
        peer: &HttpPeer,
        fd: std::os::unix::io::RawFd,
        digest: Option<&Digest>,
        record: &mut RequestRecord,
    ) -> Result<()> {
        let Some((index, chosen)) = record.current else {
            return Ok(());
        };
        record.generation.pools[index.0].report(chosen.index, Outcome::Connected, Instant::now());
        let h2 = matches!(peer.get_alpn(), Some(ALPN::H2));
        let quality = if h2 {
            Quality::Estimated
        } else {
            Quality::Exact
        };
        let meter = &self.shared.meter;
        let mut leg = None;
        if let Some(endpoint) = record.upstream_id()
            && let Some(digest) = digest.and_then(|digest| digest.socket_digest.as_ref())
        {
            let table = &record.generation.endpoints;
            meter.open(table, digest, fd, endpoint, false);
            let owner = meter.route_owner(
                table,
                endpoint,
                record.route.as_deref(),
                &record.tenant,
                quality,
            );
            if let Some((tracked, owner)) = meter.find(digest).zip(owner) {
                let mut begun = Leg::begin(&self.shared, tracked, owner, quality, true);
                if quality == Quality::Estimated {
                    begun
                        .tickets
                        .extend(begun.tracked.connection.continue_sending(owner));
                }
                leg = Some(begun);
            }
        }
        record.attempt(chosen, reused, leg);
        Ok(())
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        record: &mut RequestRecord,
        mut error: Box<Error>,
    ) -> Box<Error> {
        if let Some((index, peer)) = record.current {
            let generation = &record.generation;
            generation.pools[index.0].report(peer.index, Outcome::ConnectFailed, Instant::now());
            let upstream = &generation.config.upstreams[index.0];
            self.shared.metrics.connect_failure(&upstream.name);
            // Only now: a pooled connection that turned out stale may go to the same peer again.
            record.tried.push(peer.index);
            // Nothing was sent: any method may try the next peer.
            if record.tried.len() <= upstream.retries && record.tried.len() < upstream.peers.len() {
                error.set_retry(true);
            }
        }
        error
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        record: &mut RequestRecord,
    ) -> Result<()> {
        if let Some(address) = session.client_addr().and_then(|address| address.as_inet()) {
            let mut chain = String::new();
            // Every line of it: a proxy before us may have added its own.
            for before in request.headers.get_all(&X_FORWARDED_FOR) {
                if let Ok(before) = before.to_str() {
                    chain = format!("{chain}{before}, ");
                }
            }
            chain.push_str(&address.ip().to_string());
            request.insert_header(X_FORWARDED_FOR.clone(), chain)?;
        }
        request.remove_header(&X_FORWARDED_HOST);
        let tls = record.generation.config.listeners[self.listener.0]
            .tls
            .is_some();
        request.insert_header(
            X_FORWARDED_PROTO.clone(),
            if tls { "https" } else { "http" },
        )?;
        if let Some(line) = &record.request {
            if !line.host.is_empty()
                && let Ok(value) = HeaderValue::from_str(&line.host)
            {
                request.insert_header(X_FORWARDED_HOST.clone(), value)?;
            }
            request.insert_header(X_REQUEST_ID.clone(), line.id.as_str())?;
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        record: &mut RequestRecord,
    ) -> Result<()> {
        if let Some(body) = body {
            record.request_body += PayloadBytes(body.len() as u64);
        }
        if end && let Some(client) = &mut record.client {
            client.received_all();
        }
        Ok(())
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        end: bool,
        record: &mut RequestRecord,
    ) -> Result<Option<std::time::Duration>> {
        if end && let Some(leg) = record.upstreams.last_mut().and_then(|at| at.leg.as_mut()) {
            leg.received_all();
        }
        Ok(None)
    }

    async fn response_filter(
        &self,
        _session: &mut Session,
        response: &mut ResponseHeader,
        record: &mut RequestRecord,
    ) -> Result<()> {
        record.status = response.status.as_u16();
        drop_what_connection_names(response);
        if let Decision::Warn(text) = &record.budget {
            response.insert_header(BUDGET_HEADER, text)?;
        }
        if response.status == http::StatusCode::SWITCHING_PROTOCOLS {
            // The request had ended; what the client sends through the tunnel is its own again.
            record.resume_client();
        }
        record.take_turn();
        Ok(())
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        record: &mut RequestRecord,
    ) -> Result<Option<std::time::Duration>> {
        let mut wait = None;
        if let Some(body) = body {
            record.response_body += PayloadBytes(body.len() as u64);
            if let Decision::Throttle(pace) = &record.budget {
                wait = Some(pace.wait(body.len() as u64, Instant::now()));
            }
        }
        record.take_turn();
        Ok(wait)
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        record: &mut RequestRecord,
    ) {
        if let Some(written) = session.response_written() {
            record.status = written.status.as_u16();
        }
        if let Some(error) = error {
            record.error.get_or_insert_with(|| error.to_string());
        }
    }

    fn suppress_error_log(&self, _: &Session, _: &RequestRecord, _: &Error) -> bool {
        // The access log has it, with the route and the peer.
        self.shared.access_log.is_some()
    }
}

impl Gateway {
    /// Whether a budget had the request answered.
    async fn budget(&self, session: &mut Session, record: &mut RequestRecord) -> Result<bool> {
        let Some(route) = &record.route else {
            return Ok(false);
        };
        let budgets = &self.shared.budgets;
        record.budget = budgets.decide(&route.name, &route.service, &record.tenant, Instant::now());
        let Decision::Refuse {
            budget,
            retry_after,
        } = &record.budget
        else {
            return Ok(false);
        };
        let seconds = retry_after.as_secs().to_string();
        let what = format!("budget {budget} is used up");
        problem_after(session, record, 429, &what, Some(seconds)).await?;
        Ok(true)
    }

    fn request_line(&self, session: &Session, generation: &Generation) -> RequestLine {
        let request = session.req_header();
        let id = request
            .headers
            .get(&X_REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| !id.is_empty() && id.len() <= 128)
            .map_or_else(new_request_id, str::to_owned);
        RequestLine {
            id,
            method: request.method.as_str().to_owned(),
            host: host(request).unwrap_or_default().to_owned(),
            path: request.uri.path().to_owned(),
            version: match request.version {
                http::Version::HTTP_2 => "HTTP/2",
                http::Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            client_address: session
                .client_addr()
                .map(ToString::to_string)
                .unwrap_or_default(),
            listener: Arc::from(generation.config.listeners[self.listener.0].name.as_str()),
        }
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

/// Lines that the upstream's `Connection` names concern that connection only (RFC 9110, section
/// 7.6.1); pingora drops them from requests and leaves them in responses.
fn drop_what_connection_names(response: &mut ResponseHeader) {
    let named: Vec<HeaderName> = response
        .headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .filter_map(|token| HeaderName::from_bytes(token.trim_ascii()).ok())
        // An upgrade is said by both.
        .filter(|name| ![header::UPGRADE, header::CONNECTION].contains(name))
        .collect();
    for name in named {
        response.remove_header(&name);
    }
}

/// HTTP/2 has the authority in the URI, HTTP/1.1 in the Host header.
fn host(request: &RequestHeader) -> Option<&str> {
    request
        .uri
        .authority()
        .map(http::uri::Authority::as_str)
        .or_else(|| request.headers.get(header::HOST)?.to_str().ok())
}

/// On whose account a request goes; `header` looks a request header up.
fn tenant<'h>(
    rule: Option<&TenantRule>,
    header: impl Fn(&HeaderName) -> Option<&'h str>,
) -> Box<str> {
    match rule {
        None => "none".into(),
        Some(TenantRule::Fixed(name)) => name.as_str().into(),
        Some(TenantRule::Header {
            header: name,
            default,
        }) => header(name)
            // A client's word becomes a metric label: only a well-formed name may.
            .filter(|value| Name::is_valid(value))
            .unwrap_or(default.as_str())
            .into(),
    }
}

/// 128 random bits: unique without coordination.
fn new_request_id() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    // Two fresh random keys of the standard library's hasher.
    let [high, low] = [(); 2].map(|()| RandomState::new().hash_one(std::process::id()));
    format!("{high:016x}{low:016x}")
}

/// Answers with an RFC 9457 problem.
async fn problem(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &'static str,
) -> Result<()> {
    problem_after(session, record, status, title, None).await
}

/// The same, with the seconds after which another attempt has a chance.
async fn problem_after(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &str,
    retry_after: Option<String>,
) -> Result<()> {
    let body = serde_json::json!({ "type": "about:blank", "title": title, "status": status });
    let body = Bytes::from(body.to_string());
    let mut header = ResponseHeader::build(status, Some(3))?;
    header.insert_header(header::CONTENT_TYPE, "application/problem+json")?;
    header.insert_header(header::CONTENT_LENGTH, body.len())?;
    if let Some(seconds) = retry_after {
        header.insert_header(header::RETRY_AFTER, seconds)?;
    }
    record.status = status;
    record.take_turn();
    if session.req_header().method == http::Method::HEAD {
        // The header as GET would have it, and no body: HTTP/2 would call one an error.
        return session.write_response_header(Box::new(header), true).await;
    }
    record.response_body += PayloadBytes(body.len() as u64);
    session
        .write_response_header(Box::new(header), false)
        .await?;
    session.write_response_body(Some(body), true).await
}
