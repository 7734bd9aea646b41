//! Requests with an idempotency key: parsed once, run once, answered from what is stored.

use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;

use super::problem::{Kind, Problem};
use super::{BODY_BYTES_MAX, Shared};
use crate::command::{Answer, Effect, Expected, Keyed};
use crate::idempotency::{Key, Reply};
use crate::metrics::RefusalReason;
use crate::store::StoreError;

/// Runs an effect under its key and turns what is stored into a response.
pub(super) async fn run<E: Effect>(shared: &Shared, keyed: Keyed<E>) -> Result<Response, Problem> {
    respond(queue(shared, keyed).await?)
}

/// Runs an effect under its key.
pub(super) async fn queue<E: Effect>(
    shared: &Shared,
    keyed: Keyed<E>,
) -> Result<Answer<E::Value>, Problem> {
    let answer = shared.store.run(keyed).await.inspect_err(|error| {
        // The writer counts what reached it.
        if matches!(error, StoreError::QueueFull | StoreError::Closed) {
            shared.metrics.order_refused(RefusalReason::Overloaded);
        }
    });
    Ok(answer?)
}

/// What is stored, as a response.
pub(super) fn respond<V>(answer: Answer<V>) -> Result<Response, Problem> {
    match answer {
        Answer::Done(reply, _) => send(reply),
        Answer::Replayed(reply) => {
            let mut response = send(reply)?;
            response
                .headers_mut()
                .insert("idempotency-replayed", HeaderValue::from_static("true"));
            Ok(response)
        }
        Answer::KeyReused => Err(Problem::new(
            Kind::IdempotencyKeyReused,
            "This Idempotency-Key was used with another request; take a new key for a new one.",
        )),
    }
}

/// The `Idempotency-Key` header.
pub(super) fn key(headers: &HeaderMap) -> Result<Key, Problem> {
    let refuse = |detail: String| Problem::new(Kind::InvalidIdempotencyKey, detail);
    let mut values = headers.get_all("idempotency-key").iter();
    match (values.next(), values.next()) {
        (Some(value), None) => {
            Key::parse(value.as_bytes()).map_err(|error| refuse(error.to_string()))
        }
        (None, _) => Err(refuse("The Idempotency-Key header is required.".to_owned())),
        (Some(_), Some(_)) => Err(refuse(
            "The Idempotency-Key header must occur once.".to_owned(),
        )),
    }
}

/// The `If-Match` header. Compared strongly, as RFC 9110 asks for changes: a weak tag or
/// another's matches nothing.
pub(super) fn expected(headers: &HeaderMap) -> Expected {
    let mut tags = headers
        .get_all(header::IF_MATCH)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .peekable();
    if tags.peek().is_none() {
        return Expected::Any;
    }
    let mut expected = Expected::Nothing;
    for tag in tags {
        if tag == b"*" {
            return Expected::Any;
        }
        let version = tag
            .strip_prefix(b"\"")
            .and_then(|tag| tag.strip_suffix(b"\""))
            .and_then(|tag| std::str::from_utf8(tag).ok())
            .and_then(|tag| tag.parse().ok());
        if let Some(version) = version {
            expected = Expected::Version(version);
        }
    }
    expected
}

/// The body, if it may be JSON.
pub(super) fn body(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Bytes, Problem> {
    require_json(headers)?;
    body.map_err(refuse_body)
}

/// The body as what it should be. The parser's message names line and column.
pub(super) fn json<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    serde_json::from_slice(body)
        .map_err(|error| Problem::new(Kind::MalformedBody, error.to_string()))
}

/// A missing media type is taken for JSON; another one is a mistake worth naming.
fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let media_type = value
        .as_bytes()
        .split(|&byte| byte == b';')
        .next()
        .unwrap_or_default();
    if media_type
        .trim_ascii()
        .eq_ignore_ascii_case(b"application/json")
    {
        Ok(())
    } else {
        Err(Problem::new(
            Kind::UnsupportedMediaType,
            "The body must be application/json.",
        ))
    }
}

fn refuse_body(rejected: BytesRejection) -> Problem {
    if rejected.status() == StatusCode::PAYLOAD_TOO_LARGE {
        Problem::new(
            Kind::BodyTooLarge,
            format!("The body may have {BODY_BYTES_MAX} bytes."),
        )
    } else {
        Problem::new(Kind::BadRequest, "The body could not be read.")
    }
}

fn send(reply: Reply) -> Result<Response, Problem> {
    let mut response = Response::builder()
        .status(reply.status)
        .header(header::CONTENT_TYPE, reply.content_type);
    for (name, value) in [
        (header::LOCATION, reply.location),
        (header::ETAG, reply.etag),
    ] {
        if let Some(value) = value {
            response = response.header(name, value);
        }
    }
    response.body(reply.body.into()).map_err(|error| {
        tracing::error!(%error, "a stored answer is not a response");
        Problem::new(Kind::Internal, "The stored answer could not be sent.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn only_json_is_taken() {
        for fine in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(
                require_json(&headers(header::CONTENT_TYPE, fine)).is_ok(),
                "{fine}"
            );
        }
        for wrong in ["text/plain", "application/jsonx", ""] {
            assert!(
                require_json(&headers(header::CONTENT_TYPE, wrong)).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn changes_compare_tags_strongly() {
        for (value, meaning) in [
            ("\"3\"", Expected::Version(3)),
            ("\"x\", \"4\"", Expected::Version(4)),
            ("*", Expected::Any),
            ("W/\"3\"", Expected::Nothing),
            ("3", Expected::Nothing),
        ] {
            assert_eq!(
                expected(&headers(header::IF_MATCH, value)),
                meaning,
                "{value}"
            );
        }
        assert_eq!(expected(&HeaderMap::new()), Expected::Any);
    }
}
