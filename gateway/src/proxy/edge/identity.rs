//! Who a client is: what its token and its certificate say, and what a service of ours says of it.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;

use super::answer;
use crate::config::{CertificatePart, Name, Policy, TenantRule};
use crate::proxy::Gateway;
use crate::proxy::answer::write_whole;
use crate::proxy::forward_auth::{About, Answer};
use crate::proxy::record::RequestRecord;
use crate::proxy::route::Route;
use crate::proxy::token::{self, Claims, Refused, bearer};

impl Gateway {
    /// Whether the client was told that it is nobody who may.
    pub(super) async fn unknown(
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
    pub(in crate::proxy) fn verify(
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
    pub(in crate::proxy) fn introduce(
        request: &mut RequestHeader,
        record: &RequestRecord,
    ) -> Result<()> {
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
}

/// The tenant that the connection or a verified token names; None where nothing was verified.
pub(in crate::proxy) fn verified_tenant(
    rule: &TenantRule,
    record: &RequestRecord,
) -> Option<Box<str>> {
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
