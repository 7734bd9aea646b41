//! The headers between a client and an upstream: what is added, what is edited, what concerns
//! one connection only.

use http::{HeaderName, HeaderValue, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;

use super::record::RequestRecord;
use super::{
    Gateway, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_REQUEST_ID, X_TIMEOUT,
    experiment, forward,
};
use crate::config::Action;
use crate::trace::TRACEPARENT;

impl Gateway {
    /// The request as the upstream gets it.
    pub(super) fn prepare(
        session: &Session,
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
}

/// Lines that the upstream's `Connection` names concern that connection only (RFC 9110, section
/// 7.6.1); pingora drops them from requests and leaves them in responses.
pub(super) fn drop_what_connection_names(response: &mut ResponseHeader) {
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
