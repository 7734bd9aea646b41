//! When a request is sent again, and until when.
//!
//! A request may be sent again when nothing of it was sent, or when sending it twice is harmless:
//! its method is idempotent, or it says so itself with an Idempotency-Key. And only while none of
//! the answer has gone to the client, its body is still in pingora's buffer (64 KiB), attempts and
//! budget are left, and the deadline has not passed. A pooled connection that turned out to be dead
//! is not the peer's failure: it costs neither an attempt nor budget.

use std::time::{Duration, Instant};

use http::HeaderName;
use pingora::{
    Error, ErrorSource, ErrorType, Result, RetryType, http::RequestHeader, prelude::Session,
};

use super::{X_TIMEOUT, record::RequestRecord};

pub(super) static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(super) static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// When a request must be over: the route's timeout, or what the client says it still waits, if
/// that is less.
pub(super) fn deadline(route: Option<Duration>, request: &RequestHeader) -> Option<Instant> {
    let text = |name: &HeaderName| request.headers.get(name)?.to_str().ok();
    let asked = text(&X_TIMEOUT).and_then(|text| text.parse().ok().map(Duration::from_millis));
    let grpc = text(&GRPC_TIMEOUT).and_then(grpc_timeout);
    let shortest = [route, asked, grpc].into_iter().flatten().min()?;
    Instant::now().checked_add(shortest)
}

/// `grpc-timeout`: at most eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3_600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// The peer could not be connected to: nothing was sent, so any method may try another. True when
/// it may, and is paid for.
pub(super) fn connect_failed(record: &mut RequestRecord, why: String) -> bool {
    let mut others = false;
    if let Some(attempt) = record.attempts.last()
        && let Some(held) = &attempt.held
    {
        held.broke(Instant::now());
        record.tried.push(attempt.peer);
        others = held.others_left(&record.tried);
    }
    record.attempt_failed(why);
    others && pay(record)
}

/// The connection broke, or nothing came in time. `stale`: it came from the pool and was dead
/// already. True when the request may be sent again, and that is paid for.
pub(super) fn connection_broke(
    record: &mut RequestRecord,
    why: String,
    stale: bool,
    repeatable: bool,
) -> bool {
    if let Some(attempt) = record.attempts.last()
        && let Some(held) = &attempt.held
        && !stale
    {
        held.broke(Instant::now());
        record.tried.push(attempt.peer);
    }
    record.attempt_failed(why);
    repeatable && (stale || pay(record))
}

/// An answer has begun. True when another attempt is worth more, and is paid for.
pub(super) fn answer_began(record: &mut RequestRecord, status: u16, repeatable: bool) -> bool {
    if (100..200).contains(&status) {
        return false;
    }
    let now = record.elapsed();
    let Some(attempt) = record.attempts.last_mut() else {
        return false;
    };
    attempt.timing.answered = Some(now);
    attempt.timing.status = Some(status);
    let peer = attempt.peer;
    let mut others = false;
    if let Some(held) = &attempt.held {
        held.answered(status, Instant::now());
        others = status >= 500 && held.others_left(&[&record.tried[..], &[peer]].concat());
    }
    let statuses = record
        .pool()
        .map(|pool| pool.settings.retry.statuses.contains(&status));
    if statuses != Some(true) || !others || !repeatable || !pay(record) {
        return false;
    }
    record.tried.push(peer);
    record.attempt_failed(format!("answered {status}, which is worth another attempt"));
    true
}

/// pingora could not connect.
pub(super) fn not_connected(record: &mut RequestRecord, mut error: Box<Error>) -> Box<Error> {
    let again = connect_failed(record, error.to_string());
    error.set_retry(again);
    error
}

/// pingora lost the connection, or waited in vain.
pub(super) fn broken(
    session: &Session,
    record: &mut RequestRecord,
    mut error: Box<Error>,
    reused: bool,
) -> Box<Error> {
    let answer_refused = std::mem::take(&mut record.retry_answer);
    if *error.esource() != ErrorSource::Upstream {
        error.set_retry(false);
        return error;
    }
    if answer_refused {
        // Decided, paid for and reported by `answered`.
        error.set_retry(true);
        return error;
    }
    let stale = reused && matches!(error.retry, RetryType::ReusedOnly);
    let repeatable = is_repeatable(session, record);
    let again = connection_broke(record, error.to_string(), stale, repeatable);
    error.set_retry(again);
    error
}

/// The upstream's header has come. Fails, to be tried again, when another attempt is worth it.
pub(super) fn answered(session: &Session, record: &mut RequestRecord, status: u16) -> Result<()> {
    let repeatable = is_repeatable(session, record);
    if !answer_began(record, status, repeatable) {
        return Ok(());
    }
    record.retry_answer = true;
    let mut error = Error::explain(ErrorType::HTTPStatus(status), "worth another attempt");
    error.as_up();
    error.set_retry(true);
    Err(error)
}

/// Whether sending a request twice is harmless: by its method, or by its own word.
pub(super) fn is_harmless(record: &RequestRecord, method: &http::Method, has_key: bool) -> bool {
    let by_key = record
        .pool()
        .is_some_and(|pool| pool.settings.retry.idempotency_key);
    method.is_idempotent() || (by_key && has_key)
}

/// Whether it is harmless, and still possible, to send the request once more.
fn is_repeatable(session: &Session, record: &RequestRecord) -> bool {
    let request = session.req_header();
    let has_key = request.headers.contains_key(&IDEMPOTENCY_KEY);
    is_harmless(record, &request.method, has_key)
        && session.response_written().is_none()
        && !session.as_ref().retry_buffer_truncated()
}

/// Whether another attempt is allowed; it is paid for then.
fn pay(record: &mut RequestRecord) -> bool {
    let late = record.is_late();
    let Some(pool) = record.pool() else {
        return false;
    };
    let left = record.retries < pool.settings.retry.attempts;
    if late || !left || !pool.budget.withdraw() {
        return false;
    }
    record.retries += 1;
    true
}

/// How an error is answered: a status (0 when the client is gone) and what outsiders may know.
pub(super) fn status_of(error: &Error, record: &RequestRecord) -> (u16, &'static str) {
    use ErrorType::{
        ConnectTimedout, ConnectionClosed, HTTPStatus, ReadError, ReadTimedout,
        TLSHandshakeTimedout, WriteError, WriteTimedout,
    };
    if record.is_late() && *error.esource() != ErrorSource::Downstream {
        return (504, "the deadline has passed");
    }
    match (error.etype(), error.esource()) {
        (HTTPStatus(503), _) => (503, "the service is busy; try again later"),
        (HTTPStatus(504), _) => (504, "the service did not answer in time"),
        (HTTPStatus(status), _) => (*status, "the request could not be served"),
        (
            ConnectTimedout | ReadTimedout | WriteTimedout | TLSHandshakeTimedout,
            ErrorSource::Upstream,
        ) => (504, "the service did not answer in time"),
        (_, ErrorSource::Upstream) => (502, "the service could not be reached"),
        (WriteError | ReadError | ConnectionClosed, ErrorSource::Downstream) => (0, ""),
        (_, ErrorSource::Downstream) => (400, "the request cannot be understood"),
        _ => (500, "the gateway failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        assert_eq!(grpc_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(grpc_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(grpc_timeout("1H"), Some(Duration::from_secs(3_600)));
        for wrong in ["", "m", "1", "123456789S", "-1S", "1é"] {
            assert_eq!(grpc_timeout(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_shortest_wait_is_the_deadline() {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        assert!(deadline(None, &request).is_none());
        let route = Some(Duration::from_secs(1_000));
        let left = |request: &RequestHeader| {
            let left = deadline(route, request).unwrap() - Instant::now();
            left.as_secs()
        };
        assert!((900..=1_000).contains(&left(&request)));
        request
            .insert_header("x-edgemeter-timeout-ms", "500000")
            .unwrap();
        assert!((400..=500).contains(&left(&request)));
        request.insert_header("grpc-timeout", "200S").unwrap();
        assert!((100..=200).contains(&left(&request)));
    }
}
