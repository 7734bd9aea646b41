//! What the edge decides about a request before it is routed to an upstream: whose it is, and
//! whether it may.

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::{
    Error, ErrorType, Result, http::RequestHeader, http::ResponseHeader, prelude::Session,
};
use rustls::ServerConfig;

use super::{
    Gateway, X_FORWARDED_FOR,
    connection::{Connection, OnConnection},
    forward_auth::{About, Answer, Asker},
    gate::network_of,
    keys,
    limit::{Cell, Limiter, Nanos, Verdict},
    outbound::Outbound,
    problem_with,
    record::RequestRecord,
    route::Route,
    shared_limit::Store,
    strict::Refusal,
    tls::{self, TlsError},
    token::{self, Claims, Refused, Verifier, bearer},
    write_whole,
};
use crate::{
    acme::CHALLENGE_PATH,
    config::{CertificatePart, Config, Name, Policy, RateKey, RateLimit, TenantRule},
    export::EdgeMetrics,
};

static RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

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

    /// Whether the client was told that it is nobody who may.
    async fn unknown(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
        route: &Route,
        policy: &Policy,
    ) -> Result<bool> {
        let deny = |reason| self.shared.edge.denied(route.name.as_str(), reason);
        if let Some(Err(refused)) = &record.token {
            let refused = *refused;
            deny("token");
            record.error = Some(format!("denied: {}", refused.reason()));
            let challenge = match refused {
                Refused::Missing => "Bearer".to_owned(),
                _ => format!(
                    "Bearer error=\"invalid_token\", error_description=\"{}\"",
                    refused.reason()
                ),
            };
            let header = HeaderValue::from_str(&challenge).ok();
            let headers: Vec<_> = header
                .map(|value| (header::WWW_AUTHENTICATE, value))
                .into_iter()
                .collect();
            answer(session, record, 401, "a valid token is needed", &headers).await?;
            return Ok(true);
        }
        let Some(index) = policy.authentication.forward else {
            return Ok(false);
        };
        let asker = Arc::clone(&record.generation.edge.askers[index.0]);
        let answered = asker
            .ask(&About {
                request: session.req_header(),
                host: record.request.as_ref().map_or("", |line| line.host()),
                client: record.client_ip,
                tls: record.connection.as_ref().is_some_and(|c| c.tls.is_some()),
            })
            .await;
        match answered {
            Answer::Allowed(headers) => {
                record.vouched = headers;
                Ok(false)
            }
            Answer::Failed(error) => {
                log::debug!("forward_auth {}: {error}", asker.service().name);
                if asker.service().allow_on_error {
                    return Ok(false);
                }
                deny("forward_auth_failed");
                record.error = Some(format!("denied: {} does not answer", asker.service().name));
                answer(session, record, 503, "it cannot be known who you are", &[]).await?;
                Ok(true)
            }
            Answer::Denied(response) => {
                deny("forward_auth");
                record.error = Some(format!("denied: by {}", asker.service().name));
                pass_on(session, record, response).await?;
                Ok(true)
            }
        }
    }

    /// What a token says, where the route asks for one. None where it does not, or none is needed
    /// and there is none.
    pub(super) fn verify(
        request: &RequestHeader,
        record: &RequestRecord,
    ) -> Option<std::result::Result<Claims, Refused>> {
        let route = record.route.as_ref()?;
        let asked = record.generation.config.routes[route.index.0]
            .policy
            .authentication;
        let verifier = &record.generation.edge.verifiers[asked.token?.0];
        let presented = request.headers.get(header::AUTHORIZATION);
        let presented = presented
            .and_then(|value| value.to_str().ok())
            .and_then(bearer);
        match presented {
            Some(token) => Some(verifier.verify(token)),
            None if asked.token_required => Some(Err(Refused::Missing)),
            None => None,
        }
    }

    /// Headers that say who the client is, in place of those the client wrote itself.
    pub(super) fn introduce(request: &mut RequestHeader, record: &RequestRecord) -> Result<()> {
        let Some(route) = &record.route else {
            return Ok(());
        };
        let config = &record.generation.config;
        let asked = config.routes[route.index.0].policy.authentication;
        if let Some(index) = asked.token {
            for (name, header) in &config.tokens[index.0].headers {
                request.remove_header(header);
                if let Some(Ok(claims)) = &record.token
                    && let Some(value) = token::claim(claims, name)
                    && let Ok(value) = HeaderValue::from_str(&value)
                {
                    request.insert_header(header.clone(), value)?;
                }
            }
        }
        if let Some(index) = asked.forward {
            for header in &config.forward_auth[index.0].response_headers {
                request.remove_header(header);
            }
            for (header, value) in &record.vouched {
                request.insert_header(header.clone(), value.clone())?;
            }
        }
        Ok(())
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

/// The tenant that the connection or a verified token names; None where nothing was verified.
pub(super) fn verified_tenant(rule: &TenantRule, record: &RequestRecord) -> Option<Box<str>> {
    let named = match rule {
        TenantRule::Certificate { part, .. } => {
            let tls = record.connection.as_ref().and_then(|c| c.tls.as_ref());
            let identity = tls.and_then(|tls| tls.identity.as_ref())?;
            match part {
                CertificatePart::Name => identity.name(),
                CertificatePart::AlternativeName => identity.alternative_name.as_deref(),
                CertificatePart::CommonName => identity.common_name.as_deref(),
            }
            .map(str::to_owned)
        }
        TenantRule::Claim { claim, .. } => match &record.token {
            Some(Ok(claims)) => token::claim(claims, claim),
            _ => None,
        },
        _ => None,
    };
    named.filter(|name| Name::is_valid(name)).map(Into::into)
}

/// Whether the client does. The session may be pingora's or of our own making.
pub(super) fn speaks_http2(session: &Session) -> bool {
    session.req_header().version == http::Version::HTTP_2
}

fn declared_length(request: &RequestHeader) -> Option<u64> {
    let length = request.headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

fn rate_key(limit: &RateLimit, request: &RequestHeader, record: &RequestRecord) -> String {
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
pub(super) struct Rate {
    name: Name,
    requests: u64,
    period: Duration,
    verdict: Verdict,
}

fn tighter(before: Option<Rate>, limit: &RateLimit, verdict: Verdict) -> Rate {
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
pub(super) fn rate_headers(record: &RequestRecord) -> Vec<(HeaderName, HeaderValue)> {
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

/// The answer of a forward authentication service is the client's.
async fn pass_on(
    session: &mut Session,
    record: &mut RequestRecord,
    response: http::Response<Bytes>,
) -> Result<()> {
    let (parts, body) = response.into_parts();
    let mut header = ResponseHeader::build(parts.status, Some(parts.headers.len() + 1))?;
    for (name, value) in &parts.headers {
        header.append_header(name.clone(), value.clone())?;
    }
    header.insert_header(header::CONTENT_LENGTH, body.len())?;
    record.status = parts.status.as_u16();
    write_whole(session, record, header, body).await
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
