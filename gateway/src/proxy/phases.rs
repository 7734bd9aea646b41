//! pingora's phases, in the order in which a request goes through them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::header;
use pingora::cache::key::HashBinary;
use pingora::cache::storage::HitHandler;
use pingora::cache::{CacheKey, CacheMeta, ForcedFreshness, RespCacheable};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::modules::http::compression::ResponseCompressionBuilder;
use pingora::prelude::{HttpPeer, ProxyHttp, Session};
use pingora::protocols::Digest;
use pingora::proxy::FailToProxy;
use pingora::{Error, Result};

use super::answer::{problem, problem_with, redirect};
use super::headers::drop_what_connection_names;
use super::mirror::{self, MirrorCopy};
use super::record::RequestRecord;
use super::{BUDGET_HEADER, Gateway, edge, forward, retry};
use crate::budget::Decision;
use crate::config::Action;
use crate::units::PayloadBytes;

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
        self.arrived(session, record);
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
        self.peer_for(session, record).await
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
        self.connected(reused, peer, fd, digest, record);
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
        Self::prepare(session, request, record)
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
}
