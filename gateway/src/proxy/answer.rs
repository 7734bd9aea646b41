//! Answers the gateway gives itself.

use bytes::Bytes;
use http::header;
use pingora::{Result, http::ResponseHeader, prelude::Session};

use super::{forward, host, record::RequestRecord};
use crate::config::Redirect;

/// Answers with an RFC 9457 problem.
pub(super) async fn problem(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &str,
) -> Result<()> {
    let after = (status == 503).then(|| "1".to_owned());
    problem_after(session, record, status, title, after).await
}

/// As above, and says when to come back, seconds.
async fn problem_after(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &str,
    retry_after: Option<String>,
) -> Result<()> {
    problem_with(session, record, status, title, |header| match retry_after {
        Some(seconds) => header.insert_header(header::RETRY_AFTER, seconds),
        None => Ok(()),
    })
    .await
}

/// As [`problem`], with more headers.
pub(super) async fn problem_with(
    session: &mut Session,
    record: &mut RequestRecord,
    status: u16,
    title: &str,
    more: impl FnOnce(&mut ResponseHeader) -> Result<()>,
) -> Result<()> {
    let body = serde_json::json!({ "type": "about:blank", "title": title, "status": status });
    let body = Bytes::from(body.to_string());
    let mut header = ResponseHeader::build(status, Some(4))?;
    header.insert_header(header::CONTENT_TYPE, "application/problem+json")?;
    header.insert_header(header::CONTENT_LENGTH, body.len())?;
    more(&mut header)?;
    record.status = status;
    write_whole(session, record, header, body).await
}

/// Answers with a header that is complete, and its body.
pub(super) async fn write_whole(
    session: &mut Session,
    record: &mut RequestRecord,
    header: ResponseHeader,
    body: Bytes,
) -> Result<()> {
    record.take_turn();
    if session.req_header().method == http::Method::HEAD {
        // The header as GET would have it, and no body: HTTP/2 would call one an error.
        return session.write_response_header(Box::new(header), true).await;
    }
    session
        .write_response_header(Box::new(header), false)
        .await?;
    session.write_response_body(Some(body), true).await
}

/// Answers with another address. `(scheme, port)` are the listener's.
pub(super) async fn redirect(
    session: &mut Session,
    record: &mut RequestRecord,
    to: &Redirect,
    (scheme, port): (&str, u16),
) -> Result<()> {
    let request = session.req_header();
    let asked = host(request).unwrap_or_default();
    // The port is the listener's or the route's, not what the client wrote.
    let name = match asked.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => asked,
    };
    let location = record
        .matched
        .as_ref()
        .map(|matched| forward::location(to, &matched.path, (scheme, name, port), &request.uri));
    let mut header = ResponseHeader::build(to.status, Some(3))?;
    header.insert_header(header::LOCATION, location.unwrap_or_default())?;
    header.insert_header(header::CONTENT_LENGTH, 0)?;
    if let Some(route) = &record.route {
        forward::edit(&route.response_headers, &mut header)?;
    }
    record.status = to.status;
    record.take_turn();
    session.write_response_header(Box::new(header), true).await
}
