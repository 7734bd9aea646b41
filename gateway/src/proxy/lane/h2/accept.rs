//! Which requests go on: what the h2 crate lets through and an HTTP/1.1 upstream could misread is
//! refused here, stream by stream (RFC 9113, sections 8.1.1 to 8.3.1).

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};

/// A stream to be served.
pub type Accepted = (Request<RecvStream>, SendResponse<Bytes>);

/// Why a request is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Malformed {
    /// Nobody can say where its parts end.
    Framing,
    /// It does not say for whom it is.
    Authority,
}

/// Judges a stream the client has opened; None when it was malformed, and is answered or reset
/// already.
pub fn judge(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Option<Accepted> {
    let (mut parts, body) = request.into_parts();
    match check(&parts) {
        Ok(()) => {
            join_cookies(&mut parts.headers);
            Some((Request::from_parts(parts, body), respond))
        }
        Err(Malformed::Framing) => {
            respond.send_reset(Reason::PROTOCOL_ERROR);
            None
        }
        Err(Malformed::Authority) => {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::BAD_REQUEST;
            // A client that is gone already is told nothing.
            let _ = respond.send_response(response, true);
            None
        }
    }
}

fn check(parts: &Parts) -> Result<(), Malformed> {
    let target = parts
        .uri
        .path_and_query()
        .map_or("", |target| target.as_str());
    if target.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
        return Err(Malformed::Framing);
    }
    one_length(&parts.headers)?;
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let userinfo = |bytes: &[u8]| bytes.contains(&b'@');
    let differ = host
        .zip(authority)
        .is_some_and(|(host, authority)| host.as_bytes() != authority.as_bytes());
    if second.is_some()
        || differ
        || (host.is_none() && authority.is_none())
        || host.is_some_and(|host| userinfo(host.as_bytes()))
        || authority.is_some_and(|authority| userinfo(authority.as_bytes()))
    {
        return Err(Malformed::Authority);
    }
    let origin_form = target.starts_with('/')
        || (target == "*" && parts.method == Method::OPTIONS)
        || parts.method == Method::CONNECT;
    if origin_form {
        Ok(())
    } else {
        Err(Malformed::Authority)
    }
}

/// Several lengths must be one and the same number.
fn one_length(headers: &HeaderMap) -> Result<(), Malformed> {
    let mut known: Option<u64> = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for part in value.as_bytes().split(|&byte| byte == b',') {
            let text = std::str::from_utf8(part.trim_ascii()).unwrap_or("");
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let length = digits.then(|| text.parse().ok()).flatten();
            let length: u64 = length.ok_or(Malformed::Framing)?;
            if known.is_some_and(|known| known != length) {
                return Err(Malformed::Framing);
            }
            known = Some(length);
        }
    }
    Ok(())
}

/// HTTP/2 lets a client split its cookies; HTTP/1.1 has one line of them (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let lines = headers.get_all(header::COOKIE);
    if lines.iter().nth(1).is_none() {
        return;
    }
    let mut joined = BytesMut::new();
    for (number, line) in lines.iter().enumerate() {
        if number > 0 {
            joined.put_slice(b"; ");
        }
        joined.put_slice(line.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_maybe_shared(joined.freeze()) {
        headers.insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str, lines: &[(&str, &str)]) -> Parts {
        let mut request = Request::get(uri);
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        let refused = |uri, lines: &[(&str, &str)]| check(&parts(uri, lines)).err();
        let here = "http://a.example/x";
        assert_eq!(refused(here, &[]), None);
        assert_eq!(refused(here, &[("host", "a.example")]), None);
        assert_eq!(refused(here, &[("content-length", "3")]), None);
        assert_eq!(refused(here, &[("content-length", "3, 3")]), None);
        assert_eq!(refused("/x", &[("host", "a.example")]), None);
        let authority = Some(Malformed::Authority);
        assert_eq!(refused("/x", &[]), authority);
        assert_eq!(refused(here, &[("host", "b.example")]), authority);
        assert_eq!(
            refused(here, &[("host", "a.example"), ("host", "a.example")]),
            authority
        );
        assert_eq!(refused("http://u@a.example/x", &[]), authority);
        assert_eq!(refused("/x", &[("host", "u@a.example")]), authority);
        let framing = Some(Malformed::Framing);
        for length in ["", "+3", "3x", "3, 4", "99999999999999999999"] {
            assert_eq!(
                refused(here, &[("content-length", length)]),
                framing,
                "{length}"
            );
        }
        assert_eq!(
            refused(here, &[("content-length", "3"), ("content-length", "4")]),
            framing
        );
    }

    #[test]
    fn cookies_become_one_line() {
        let mut parts = parts("/", &[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
        join_cookies(&mut parts.headers);
        let lines: Vec<_> = parts.headers.get_all("cookie").iter().collect();
        assert_eq!(lines, ["a=1; b=2; c=3"]);
    }
}
