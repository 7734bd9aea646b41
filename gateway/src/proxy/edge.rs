//! What the edge decides about a request before it is routed to an upstream: whose it is, and
//! whether it may.

mod identity;
mod rate;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;
use pingora::{Error, ErrorType, Result};
use rustls::ServerConfig;

use super::answer::{problem_with, write_whole};
use super::connection::{Connection, OnConnection};
use super::forward_auth::Asker;
use super::limit::{Cell, Limiter, Nanos};
use super::outbound::Outbound;
use super::record::RequestRecord;
use super::shared_limit::Store;
use super::strict::Refusal;
use super::tls::{self, TlsError};
use super::token::Verifier;
use super::{Gateway, X_FORWARDED_FOR, keys};
use crate::acme::CHALLENGE_PATH;
use crate::config::{Config, Name, Policy, RateLimit};
use crate::export::EdgeMetrics;

use rate::{rate_key, tighter};

pub(super) use identity::verified_tenant;
pub(super) use rate::{Rate, rate_headers};

/// What a generation holds for the edge.
pub struct Edge {
    /// By listener; None on a plain one.
    pub tls: Vec<Option<Arc<ServerConfig>>>,
    /// By route, in the order of its limits.
    pub limiters: Vec<Vec<Arc<Limiter>>>,
    /// By token issuer.
    pub verifiers: Vec<Arc<Verifier>>,
    /// By forward authentication service.
    pub askers: Vec<Arc<Asker>>,
    /// By upstream.
    pub outbound: Vec<Option<Outbound>>,
    /// Where shared limits are counted.
    pub store: Option<Arc<Store>>,
}

impl Edge {
    /// Built whole. Limits that are also in `before` keep their counts.
    ///
    /// # Errors
    /// A file that TLS needs cannot be used.
    pub fn build(config: &Config, before: Option<(&Config, &Self)>) -> Result<Self, TlsError> {
        let tls = config.listeners.iter().map(|listener| {
            let Some(tls) = &listener.tls else {
                return Ok(None);
            };
            let config = tls::server_config(tls, listener.http2)?;
            Ok(Some(Arc::new(config)))
        });
        let kept = |route: &Name, limit: &RateLimit| {
            let (config, edge) = before?;
            let routes = &config.routes;
            let at = routes.iter().position(|r| r.name == *route)?;
            let limits = &routes[at].policy.rate_limits;
            let place = limits.iter().position(|l| l == limit)?;
            edge.limiters.get(at)?.get(place).cloned()
        };
        let limiters = config.routes.iter().map(|route| {
            let limits = route.policy.rate_limits.iter();
            let limiter =
                |limit| kept(&route.name, limit).unwrap_or_else(|| Arc::new(Limiter::new(limit)));
            limits.map(limiter).collect()
        });
        let verifiers = config.tokens.iter().map(|issuer| {
            let known = before.and_then(|(_, edge)| {
                let mut known = edge.verifiers.iter();
                known.find(|verifier| verifier.issuer() == issuer)
            });
            known.map_or_else(|| Arc::new(Verifier::new(issuer.clone())), Arc::clone)
        });
        let askers = config.forward_auth.iter().map(|service| {
            let known = before.and_then(|(_, edge)| {
                let mut known = edge.askers.iter();
                known.find(|asker| asker.service() == service)
            });
            known.map_or_else(|| Arc::new(Asker::new(service.clone())), Arc::clone)
        });
        let outbound = config.upstreams.iter().map(|upstream| {
            let tls = upstream.tls.as_ref();
            tls.map(Outbound::load).transpose()
        });
        let store = config.rate_store.as_ref().map(|store| {
            let known = before.and_then(|(_, edge)| edge.store.as_ref());
            known
                .filter(|known| known.config() == store)
                .map_or_else(|| Arc::new(Store::new(store.clone())), Arc::clone)
        });
        Ok(Self {
            verifiers: verifiers.collect(),
            askers: askers.collect(),
            outbound: outbound.collect::<std::result::Result<_, TlsError>>()?,
            store,
            tls: tls.collect::<std::result::Result<_, TlsError>>()?,
            limiters: limiters.collect(),
        })
    }
}

impl Edge {
    /// Starts what goes on in the background and has not begun yet.
    pub fn start(&self, background: &tokio::runtime::Handle, metrics: &EdgeMetrics) {
        for verifier in &self.verifiers {
            if verifier.starts() {
                let verifier = Arc::downgrade(verifier);
                background.spawn(keys::look_after(verifier, metrics.clone()));
            }
        }
    }
}

/// Nanoseconds since the process first asked.
fn now() -> Nanos {
    static START: OnceLock<Instant> = OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    // Never 0, which stands for nothing.
    1 + u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Gateway {
    /// The first thing a request meets: its connection, and its client behind trusted proxies.
    pub(super) fn meet(&self, session: &mut Session, record: &mut RequestRecord) {
        let Some(connection) = Connection::of(session) else {
            return;
        };
        if speaks_http2(session) {
            connection.request_begins();
        } else {
            record.refused = connection.refusal();
        }
        let protection = &record.generation.config.listeners[self.listener.0].protection;
        let forwarded = session.req_header().headers.get_all(&X_FORWARDED_FOR);
        let lines: Vec<&str> = forwarded.iter().filter_map(|v| v.to_str().ok()).collect();
        let client = protection.client(connection.client.ip(), lines.into_iter());
        let limits = &protection.limits;
        let write_timeout = limits.write_timeout;
        let last = connection.is_spent() || record.refused.is_some();
        let idle = limits.idle_timeout.as_secs().max(1);
        record.client_ip = Some(client);
        record.connection = Some(OnConnection::new(connection));
        session.set_write_timeout(Some(write_timeout));
        if last {
            session.set_keepalive(None);
        } else if session.get_keepalive().is_some() {
            session.set_keepalive(Some(idle));
        }
    }

    /// Whether the request was an ACME server's, and was answered: on a plain listener, before any
    /// route or policy, and only while an order is under way.
    pub(super) async fn challenge(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<bool> {
        let path = session.req_header().uri.path();
        let Some(token) = path.strip_prefix(CHALLENGE_PATH) else {
            return Ok(false);
        };
        let listener = &record.generation.config.listeners[self.listener.0];
        let answer = self.shared.challenges.answer(token);
        let Some(answer) = answer.filter(|_| listener.tls.is_none()) else {
            return Ok(false);
        };
        record.status = 200;
        let mut response = ResponseHeader::build(200, Some(2))?;
        response.insert_header(header::CONTENT_TYPE, "application/octet-stream")?;
        response.insert_header(header::CONTENT_LENGTH, answer.len())?;
        write_whole(session, record, response, Bytes::from(answer.into_string())).await?;
        Ok(true)
    }

    /// Whether the request was answered here: refused by its framing, or denied by its route.
    pub(super) async fn stop(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<bool> {
        if let Some(refusal) = record.refused {
            record.error = Some(format!("refused: {refusal}"));
            answer(
                session,
                record,
                refusal.status(),
                "the request is malformed",
                &[],
            )
            .await?;
            return Ok(true);
        }
        let Some(route) = record.route.clone() else {
            return Ok(false);
        };
        let generation = Arc::clone(&record.generation);
        let policy = &generation.config.routes[route.index.0].policy;
        let deny = |reason| self.shared.edge.denied(route.name.as_str(), reason);
        if let Some(client) = record.client_ip
            && !policy.access.permits(client)
        {
            deny("access_list");
            record.error = Some("denied: access list".to_owned());
            answer(session, record, 403, "this address may not", &[]).await?;
            return Ok(true);
        }
        if self.unknown(session, record, &route, policy).await? {
            return Ok(true);
        }
        record.body_bytes_max = self.body_bytes_max(policy, record);
        if let Some(most) = record.body_bytes_max
            && declared_length(session.req_header()).is_some_and(|length| length > most)
        {
            deny("body_too_large");
            record.error = Some("denied: the body is too large".to_owned());
            session.set_keepalive(None);
            answer(session, record, 413, "the body is too large", &[]).await?;
            return Ok(true);
        }
        let limiters = generation.edge.limiters.get(route.index.0);
        let limits = policy
            .rate_limits
            .iter()
            .zip(limiters.into_iter().flatten());
        for (limit, limiter) in limits {
            let key = rate_key(limit, session.req_header(), record);
            let store = generation.edge.store.as_ref().filter(|_| limit.shared);
            let verdict = match store {
                None => limiter.check(&key, now()),
                Some(store) => {
                    let place = format!("edgemeter:{}:{}:{key}", route.name, limit.name);
                    match store.check(Cell::new(limit), &place).await {
                        Ok(verdict) => verdict,
                        Err(error) => {
                            self.shared.edge.store_error();
                            log::debug!("rate limit {}: {error}", limit.name);
                            let mut verdict = limiter.check(&key, now());
                            verdict.allowed &= store.config().allow_on_error;
                            verdict
                        }
                    }
                }
            };
            record.rate = Some(tighter(record.rate.take(), limit, verdict));
            if !verdict.allowed {
                deny("rate_limit");
                record.error = Some(format!("denied: rate limit {}", limit.name));
                let headers = rate_headers(record);
                answer(session, record, 429, "too many requests", &headers).await?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn body_bytes_max(&self, policy: &Policy, record: &RequestRecord) -> Option<u64> {
        let listener = &record.generation.config.listeners[self.listener.0];
        policy
            .body_bytes_max
            .or(listener.protection.limits.body_bytes_max)
    }

    /// A body whose length was not declared may turn out to be too large.
    pub(super) fn body_may_be(&self, record: &mut RequestRecord) -> Result<()> {
        let Some(most) = record.body_bytes_max else {
            return Ok(());
        };
        if record.request_body.0 <= most {
            return Ok(());
        }
        if let Some(route) = &record.route {
            self.shared
                .edge
                .denied(route.name.as_str(), "body_too_large");
        }
        record.error = Some(format!("denied: {}", Refusal::BodyTooLarge));
        Err(Error::explain(
            ErrorType::HTTPStatus(413),
            "the body is too large",
        ))
    }
}

/// Whether the client does. The session may be pingora's or of our own making.
pub(super) fn speaks_http2(session: &Session) -> bool {
    session.req_header().version == http::Version::HTTP_2
}

fn declared_length(request: &RequestHeader) -> Option<u64> {
    let length = request.headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

async fn answer(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &str,
    headers: &[(HeaderName, HeaderValue)],
) -> Result<()> {
    problem_with(
        session,
        record,
        status,
        title,
        |response: &mut ResponseHeader| {
            for (name, value) in headers {
                response.insert_header(name.clone(), value.clone())?;
            }
            Ok(())
        },
    )
    .await
}
