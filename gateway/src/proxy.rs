//! The reverse proxy: pingora's request phases, each handing its decision to a module below.
//!
//! request → [`route`] → [`upstream`] → [`record`] → attribution and access log.

pub mod alarm;
mod answer;
pub mod app;
pub mod caching;
pub mod coding;
pub mod connection;
pub mod edge;
pub mod experiment;
mod forward;
pub mod forward_auth;
pub mod frames;
pub mod full;
pub mod full_http2;
pub mod gate;
pub mod generation;
pub mod guard;
pub mod hints;
pub mod keys;
pub mod lane;
pub mod limit;
pub mod meter;
pub mod mirror;
pub mod outbound;
pub mod proxy_header;
pub mod record;
mod records;
mod retry;
mod rotation;
pub mod route;
pub mod shared_limit;
mod slow_reader;
pub mod strict;
pub mod tls;
pub mod token;
pub mod upstream;

use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::{Error, ErrorType, Result};
use pingora::{
    cache::{
        CacheKey, CacheMeta, ForcedFreshness, RespCacheable,
        key::HashBinary,
        lock::{CacheKeyLockImpl, CacheLock},
        storage::HitHandler,
    },
    http::{RequestHeader, ResponseHeader},
    modules::http::{HttpModules, compression::ResponseCompressionBuilder},
    prelude::{HttpPeer, ProxyHttp, Session},
    protocols::{ALPN, Digest},
    proxy::FailToProxy,
};

use crate::{
    access_log::{AccessLog, ClientAddress},
    acme::Challenges,
    budget::{Budgets, Decision},
    cache::Store,
    census::Census,
    config::{Action, Balance, HashKey, ListenerIndex, Name, TenantRule},
    export::{EdgeMetrics, RequestMetrics},
    otlp::Exporter,
    owner::Quality,
    slots::Before,
    trace::{self, Sampler, TRACEPARENT},
    units::PayloadBytes,
};
use alarm::Alarm;
use answer::{problem, problem_with, redirect};
use experiment::Assignment;
use gate::Gate;
use generation::Generation;
use meter::{EndpointId, Meter};
use mirror::{MirrorCopy, Mirroring};
use record::{Leg, RequestLine, RequestRecord, attempt_quality};
use route::Asked;
use upstream::{hash_key, limits::Refused};

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// On responses while a budget warns: its name, the share used, its period.
const BUDGET_HEADER: &str = "x-edgemeter-budget";
static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Milliseconds the sender still waits: shortens a request's deadline, and goes on to the upstream.
static X_TIMEOUT: HeaderName = HeaderName::from_static("x-edgemeter-timeout-ms");

/// What all listeners share for as long as the process lives. What a reload changes is in the
/// [`Generation`].
pub struct Shared {
    /// The configuration in force.
    pub generation: ArcSwap<Generation>,
    /// The kernel side.
    pub meter: Meter,
    /// Request metrics.
    pub metrics: RequestMetrics,
    /// Copies of requests.
    pub mirroring: Mirroring,
    /// None when not configured.
    pub access_log: Option<AccessLog>,
    /// What may be used.
    pub budgets: Arc<Budgets>,
    /// Connections open now.
    pub gate: Arc<Gate>,
    /// What was refused.
    pub edge: EdgeMetrics,
    /// Who sends what is in no request.
    pub alarm: Alarm,
    /// Stored responses.
    pub cache: ResponseCache,
    /// What pages said that they need.
    pub learned: hints::Learned,
    /// Where what no request waits for is done.
    pub background: tokio::runtime::Handle,
    /// What is alive.
    pub census: Arc<Census>,
    /// What ACME servers ask for.
    pub challenges: Challenges,
    /// Which requests are recorded.
    pub sampler: Sampler,
    /// Where they are sent; None: nowhere.
    pub exporter: Option<Exporter>,
}

/// Stored responses, and the locks by which one request fetches for all that wait. pingora wants
/// them to live as long as the process.
#[derive(Clone, Copy)]
pub struct ResponseCache {
    /// What is stored.
    pub store: &'static Store,
    /// Who fetches.
    pub lock: &'static CacheKeyLockImpl,
}

impl ResponseCache {
    /// For the rest of the process.
    #[must_use]
    pub fn new(store: Store) -> Self {
        // After this long, waiting requests fetch for themselves.
        let lock = CacheLock::new_boxed(Duration::from_secs(10));
        Self {
            store: Box::leak(Box::new(store)),
            lock: Box::leak(lock),
        }
    }
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

    fn init_downstream_modules(&self, modules: &mut HttpModules) {
        // Off until a route turns it on.
        modules.add_module(ResponseCompressionBuilder::enable(0));
    }

    fn request_cache_filter(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<()> {
        self.enable_cache(session, record);
        Ok(())
    }

    fn cache_key_callback(
        &self,
        session: &Session,
        record: &mut RequestRecord,
    ) -> Result<CacheKey> {
        Ok(Self::key_of(session, record))
    }

    async fn cache_hit_filter(
        &self,
        session: &mut Session,
        meta: &CacheMeta,
        _handler: &mut HitHandler,
        _is_fresh: bool,
        _record: &mut RequestRecord,
    ) -> Result<Option<ForcedFreshness>> {
        Ok(Self::freshness_asked(session, meta))
    }

    fn response_cache_filter(
        &self,
        session: &Session,
        response: &ResponseHeader,
        record: &mut RequestRecord,
    ) -> Result<RespCacheable> {
        Ok(self.storable(session, response, record))
    }

    fn cache_vary_filter(
        &self,
        meta: &CacheMeta,
        _record: &mut RequestRecord,
        request: &RequestHeader,
    ) -> Option<HashBinary> {
        Self::variance(meta, request)
    }

    fn should_serve_stale(
        &self,
        _session: &mut Session,
        _record: &mut RequestRecord,
        error: Option<&Error>,
    ) -> bool {
        Self::stale_is_better(error)
    }

    fn allow_spawning_subrequest(&self, _session: &Session, record: &RequestRecord) -> bool {
        // For what is fetched again while the stale response is served.
        record.route.is_some()
    }

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
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<bool> {
        if self.challenge(session, record).await? || self.stop(session, record).await? {
            return Ok(true);
        }
        let Some(route) = record.route.clone() else {
            let title = "no route matches this host, path and method";
            problem(session, record, 404, title).await?;
            return Ok(true);
        };
        if let Action::Redirect(to) = &route.action {
            let listener = &record.generation.config.listeners[self.listener.0];
            let scheme = if listener.tls.is_some() {
                "https"
            } else {
                "http"
            };
            redirect(session, record, to, (scheme, listener.address.port())).await?;
            return Ok(true);
        }
        if self.budget(session, record).await? {
            return Ok(true);
        }
        record.mirror = route.mirror().map(MirrorCopy::new);
        Ok(false)
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<Box<HttpPeer>> {
        let Some(route) = record.route.clone() else {
            return Err(Error::explain(
                ErrorType::InternalError,
                "routed without a route",
            ));
        };
        if record.is_late() {
            return Err(fail(record, 504, "the deadline has passed"));
        }
        let chosen = record.upstream.or(record.assignment.upstream);
        let Some(index) = chosen.or_else(|| route.backend()) else {
            return Err(fail(record, 500, "the route has no upstream"));
        };
        record.upstream = Some(index);
        self.hint_early(session, record).await;
        let generation = Arc::clone(&record.generation);
        let upstream = &generation.config.upstreams[index.0];
        let pool = &generation.pools[index.0];
        if record.admission.is_none() {
            match pool.admit() {
                Ok(admission) => record.admission = Some(admission),
                Err(refused) => return Err(refusal(record, refused)),
            }
        }
        let key = balance_key(&upstream.balance, session);
        let held = match pool.pick(key, &record.tried, Instant::now()) {
            Ok(held) => held,
            Err(refused) => return Err(refusal(record, refused)),
        };
        let mut http_peer = HttpPeer::new(held.address(), false, String::new());
        record.attempt(held, Instant::now());
        let options = &mut http_peer.options;
        let connect = match record.remaining() {
            Some(left) => upstream.connect_timeout.min(left),
            None => upstream.connect_timeout,
        };
        options.connection_timeout = Some(connect);
        options.total_connection_timeout = Some(connect);
        let silence = route.try_timeout.into_iter().chain(record.remaining());
        options.read_timeout = Some(silence.fold(upstream.read_timeout, Ord::min));
        options.write_timeout = Some(upstream.write_timeout);
        options.idle_timeout = Some(upstream.idle_timeout);
        if let Some(outbound) = &generation.edge.outbound[index.0] {
            outbound.apply(&mut http_peer);
        }
        if let (Some(version), Some(connection)) = (upstream.proxy_protocol, &record.connection) {
            outbound::name_client(&mut http_peer, connection.client, version);
        }
        let options = &mut http_peer.options;
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
        let quality = attempt_quality(peer);
        let meter = &self.shared.meter;
        let mut leg = None;
        let handshake = digest.filter(|_| !reused).and_then(tls_handshake);
        if let Some((took, upstream)) = handshake.zip(record.upstream_name()) {
            let route = record.route.as_deref();
            self.shared.metrics.tls_handshake(route, upstream, took);
        }
        if let Some(endpoint) = record.upstream_id()
            && let Some(digest) = digest.and_then(|digest| digest.socket_digest.as_ref())
        {
            let table = &record.generation.endpoints;
            let tls = record
                .upstream
                .is_some_and(|index| record.generation.config.upstreams[index.0].tls.is_some());
            let before = if tls {
                Before::Handshake
            } else {
                Before::Nothing
            };
            meter.open(table, digest, fd, endpoint, before);
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
        record.attempt_connected(reused, leg);
        Ok(())
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        record: &mut RequestRecord,
        error: Box<Error>,
    ) -> Box<Error> {
        if let Some(upstream) = record.upstream_name() {
            self.shared.metrics.connect_failure(upstream);
        }
        retry::not_connected(record, error)
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        record: &mut RequestRecord,
        client_reused: bool,
    ) -> Box<Error> {
        let error = error.more_context(format!("Peer: {peer}"));
        retry::broken(session, record, error, client_reused)
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        record: &mut RequestRecord,
    ) -> Result<()> {
        retry::answered(session, record, response.status.as_u16())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        record: &mut RequestRecord,
    ) -> Result<()> {
        if let Some(address) = record
            .connection
            .as_ref()
            .map(|connection| connection.client)
        {
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
        if request.version == http::Version::HTTP_2
            && session
                .req_header()
                .headers
                .get(header::TE)
                .is_some_and(|te| te.as_bytes() == b"trailers")
        {
            // pingora takes it from sessions of our own making, and gRPC asks for it.
            request.insert_header(header::TE, "trailers")?;
        }
        Self::introduce(request, record)?;
        Self::ask_for_identity(request, record);
        request.remove_header(&X_FORWARDED_HOST);
        let tls = record.connection.as_ref().is_some_and(|c| c.tls.is_some());
        request.insert_header(
            X_FORWARDED_PROTO.clone(),
            if tls { "https" } else { "http" },
        )?;
        if let Some(line) = &record.request {
            if !line.host().is_empty()
                && let Ok(value) = HeaderValue::from_str(line.host())
            {
                request.insert_header(X_FORWARDED_HOST.clone(), value)?;
            }
            request.insert_header(X_REQUEST_ID.clone(), line.id())?;
        }
        if let Some(span) = record.trace_attempt()
            && let Some(trace) = record.recorded()
        {
            request.insert_header(TRACEPARENT.clone(), trace.header(span))?;
        }
        if let Some(left) = record.remaining() {
            request.insert_header(X_TIMEOUT.clone(), left.as_millis().to_string())?;
        }
        // A client cannot choose its variant.
        request.remove_header(experiment::VARIANT_HEADER);
        request.remove_header(experiment::UNIT_HEADER);
        let assignment = &record.assignment;
        if !assignment.variants.is_empty() {
            request.insert_header(experiment::VARIANT_HEADER, assignment.variants.as_str())?;
        }
        if let Ok(unit) = HeaderValue::from_str(&assignment.unit)
            && !unit.is_empty()
        {
            request.insert_header(experiment::UNIT_HEADER, unit)?;
        }
        if let Some((route, matched)) = record.route.as_ref().zip(record.matched.as_ref()) {
            forward::edit(&route.request_headers, request)?;
            if let Action::Forward { rewrite, .. } = &route.action {
                if let Some(edit) = &rewrite.path {
                    let path = forward::edited_path(edit, &matched.path, request.uri.path());
                    if let Some(uri) = forward::with_path(&request.uri, &path) {
                        request.set_uri(uri);
                    }
                }
                if let Some(host) = &rewrite.host {
                    forward::set_host(request, host)?;
                }
            }
        }
        if let Some(copy) = &mut record.mirror {
            copy.header(request);
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
            if let Some(copy) = &mut record.mirror {
                copy.append(body);
            }
        }
        self.body_may_be(record)?;
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
    ) -> Result<Option<Duration>> {
        if end && let Some(leg) = record.attempts.last_mut().and_then(|at| at.leg.as_mut()) {
            leg.received_all();
        }
        Ok(None)
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        record: &mut RequestRecord,
    ) -> Result<()> {
        record.status = response.status.as_u16();
        drop_what_connection_names(response);
        if response.status.is_informational()
            && response.status != http::StatusCode::SWITCHING_PROTOCOLS
        {
            // Passed on as it stands: what is added below belongs to the answer.
            if response.status == http::StatusCode::EARLY_HINTS && edge::speaks_http2(session) {
                self.count_early(record, "upstream");
            }
            record.take_turn();
            return Ok(());
        }
        if let Decision::Warn(text) = &record.budget {
            response.insert_header(BUDGET_HEADER, text)?;
        }
        if response.status == http::StatusCode::SWITCHING_PROTOCOLS {
            // The request had ended; what the client sends through the tunnel is its own again.
            record.resume_client();
            if let Some(connection) = &record.connection {
                connection.becomes_tunnel();
            }
        }
        self.after_response(session, response, record)?;
        self.add_hints(session, response, record)?;
        Self::judge_compression(session, response, record);
        for (name, value) in edge::rate_headers(record) {
            response.insert_header(name, value)?;
        }
        if let Some(route) = &record.route {
            forward::edit(&route.response_headers, response)?;
        }
        if let Some(cookie) = &record.assignment.set_cookie {
            response.append_header(header::SET_COOKIE, cookie.as_str())?;
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
    ) -> Result<Option<Duration>> {
        let mut wait = None;
        if let Some(body) = body {
            record.body_before_coding += body.len() as u64;
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
        record.response_body = PayloadBytes(session.body_bytes_sent() as u64);
        self.count_cache(session, record);
        self.count_coding(record);
        if let Some(error) = error {
            record.error.get_or_insert_with(|| error.to_string());
        }
        if let Some((copy, route)) = record.mirror.take().zip(record.route.as_ref()) {
            mirror::launch(
                &self.shared,
                &record.generation,
                route,
                &record.tenant,
                copy,
            );
        }
    }

    /// Answers what could not be proxied with a problem that says why, as far as outsiders may know.
    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        record: &mut RequestRecord,
    ) -> FailToProxy {
        let (status, title) = retry::status_of(error, record);
        if status > 0 && session.response_written().is_none() {
            let _ = problem(session, record, status, title).await;
        }
        FailToProxy {
            error_code: status,
            can_reuse_downstream: false,
        }
    }

    fn suppress_proxy_warn_log(
        &self,
        _: &Session,
        _: &RequestRecord,
        _: &Error,
        _: pingora::proxy::ProxyWarnLogContext,
    ) -> bool {
        // Each attempt is in the access log.
        self.shared.access_log.is_some()
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
        problem_with(session, record, 429, &what, |response| {
            response.insert_header(header::RETRY_AFTER, seconds)
        })
        .await?;
        Ok(true)
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

/// How long a new connection's TLS handshake took; None where there was none. The socket's own entry
/// comes first, that of TLS after it.
fn tls_handshake(digest: &Digest) -> Option<Duration> {
    let tls = digest.timing_digest.get(1)?.as_ref()?;
    tls.establishment_duration
}

/// On whose account a request goes; `header` looks a request header up.
fn tenant<'h>(
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
fn request_id<'r>(header: impl Fn(&HeaderName) -> Option<&'r str>) -> Cow<'r, str> {
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

/// An error with the status it is answered with, and its reason for the access log.
fn fail(record: &mut RequestRecord, status: u16, why: &'static str) -> Box<Error> {
    record.error = Some(match record.upstream_name() {
        Some(upstream) => format!("upstream {upstream}: {why}"),
        None => why.to_owned(),
    });
    Error::explain(ErrorType::HTTPStatus(status), why)
}

/// A limit was reached: 503, and the client may come back.
fn refusal(record: &mut RequestRecord, refused: Refused) -> Box<Error> {
    let why = match refused {
        Refused::Requests => "as many requests are under way as may be",
        Refused::Pending => "as many requests wait for a connection as may",
        Refused::PerPeer => "every peer has as many requests as it may",
        Refused::Unresolved => "no name has led to an address yet",
    };
    fail(record, 503, why)
}

/// What a hash balance goes by.
fn balance_key(balance: &Balance, session: &Session) -> Option<u64> {
    let Balance::Hash(key) = balance else {
        return None;
    };
    match key {
        HashKey::Header(name) => {
            let value = session.req_header().headers.get(name)?;
            Some(hash_key(value.as_bytes()))
        }
        HashKey::Cookie(name) => {
            cookie(session.req_header(), name).map(|value| hash_key(value.as_bytes()))
        }
        HashKey::Source => {
            let address: SocketAddr = *session.client_addr()?.as_inet()?;
            Some(hash_key(address.ip().to_string().as_bytes()))
        }
    }
}

fn cookie<'r>(request: &'r RequestHeader, name: &str) -> Option<&'r str> {
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
