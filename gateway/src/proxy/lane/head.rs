//! HTTP/1 heads for the lean lane: parsed once into borrowed slices, forwarded as they stand.
//!
//! Nothing is repaired. A head that RFC 9112 calls ambiguous or malformed is an error, and the
//! connection it came on is closed: what follows on it has no certain beginning.

use std::mem::MaybeUninit;

use httparse::{Header, ParserConfig, Status};

/// Most bytes of a head, request or response.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Most header lines.
pub const HEADERS_MAX: usize = 128;

/// Room for the parser's slices, on the caller's stack. Not filled: most heads have ten lines.
pub type Lines<'b> = [MaybeUninit<Header<'b>>; HEADERS_MAX];

/// Fresh room.
#[must_use]
pub const fn room<'b>() -> Lines<'b> {
    [const { MaybeUninit::uninit() }; HEADERS_MAX]
}

/// Where a message's body ends (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// At the last chunk.
    Chunked,
    /// When the connection closes; responses only.
    UntilClose,
}

/// What stands in a header line that is about the connection or the message's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Form {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    upgrade: bool,
    names_lines: bool,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Not HTTP/1, or a byte where none may be.
    #[error("malformed HTTP/1 head: {0}")]
    Malformed(httparse::Error),
    /// More than [`HEAD_BYTES_MAX`].
    #[error("the head is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    /// Two lengths, or a length that is no number.
    #[error("Content-Length is not one number")]
    Length,
    /// A transfer coding other than a single `chunked`, or one beside a length.
    #[error("Transfer-Encoding is not a single chunked without Content-Length")]
    Coding,
    /// A line ended without CR.
    #[error("a line of the head ends in LF without CR")]
    BareLf,
    /// A response status that cannot come here.
    #[error("status {0} was not asked for")]
    Status(u16),
}

/// A parsed request head.
#[derive(Debug)]
pub struct RequestHead<'h, 'b> {
    /// Method.
    pub method: &'b str,
    /// Request target as sent.
    pub target: &'b str,
    /// `Host`, where there is exactly one.
    pub host: Option<&'b str>,
    /// Every line, in order.
    pub headers: &'h [Header<'b>],
    /// Bytes of the head.
    pub bytes: usize,
    /// The head as sent.
    pub raw: &'b [u8],
    /// The body.
    pub framing: Framing,
    /// The client may send another request on the connection.
    pub keep_alive: bool,
    /// `Connection` names other lines of the head.
    pub names_lines: bool,
    /// HTTP/1.0.
    pub old: bool,
    /// Asks to change the protocol, or to be told to go on: not for the lean lane.
    pub special: bool,
}

/// Parses a request head, or says that more bytes are needed.
///
/// # Errors
/// [`HeadError`]: answer 400 and close.
pub fn request<'h, 'b>(
    bytes: &'b [u8],
    lines: &'h mut Lines<'b>,
) -> Result<Option<RequestHead<'h, 'b>>, HeadError> {
    let mut parsed = httparse::Request::new(&mut []);
    let read = parsed.parse_with_uninit_headers(bytes, lines);
    let length = match read.map_err(HeadError::Malformed)? {
        Status::Partial if bytes.len() >= HEAD_BYTES_MAX => return Err(HeadError::TooLong),
        Status::Partial => return Ok(None),
        Status::Complete(length) => length,
    };
    no_bare_lf(&bytes[..length])?;
    let (method, target, minor) = match (parsed.method, parsed.path, parsed.version) {
        (Some(method), Some(target), Some(minor)) => (method, target, minor),
        // A complete request has all three.
        _ => return Err(HeadError::Malformed(httparse::Error::Token)),
    };
    let headers: &[Header<'_>] = parsed.headers;
    let form = form(headers)?;
    let mut hosts = headers
        .iter()
        .filter(|line| line.name.eq_ignore_ascii_case("host"))
        .map(|line| std::str::from_utf8(line.value).ok());
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host,
        _ => None,
    };
    let old = minor == 0;
    let expects = headers
        .iter()
        .any(|line| line.name.eq_ignore_ascii_case("expect"));
    let framing = match (form.chunked, form.length) {
        (true, _) => Framing::Chunked,
        (false, None | Some(0)) => Framing::None,
        (false, Some(length)) => Framing::Length(length),
    };
    Ok(Some(RequestHead {
        method,
        target,
        host,
        headers,
        bytes: length,
        raw: &bytes[..length],
        framing,
        keep_alive: !form.close && (!old || form.keep_alive),
        names_lines: form.names_lines,
        old,
        special: expects || form.upgrade || method == "CONNECT",
    }))
}

/// A parsed response head.
#[derive(Debug)]
pub struct ResponseHead<'h, 'b> {
    /// Status.
    pub status: u16,
    /// Reason phrase as sent.
    pub reason: &'b str,
    /// Every line, in order.
    pub headers: &'h [Header<'b>],
    /// Bytes of the head.
    pub bytes: usize,
    /// The head as sent.
    pub raw: &'b [u8],
    /// The body.
    pub framing: Framing,
    /// The upstream may be asked again on the connection.
    pub keep_alive: bool,
    /// `Connection` names other lines of the head.
    pub names_lines: bool,
}

/// Parses a response head to a request with the given method, or says that more bytes are needed.
///
/// # Errors
/// [`HeadError`]: the upstream's answer cannot be forwarded; answer 502 and close.
pub fn response<'h, 'b>(
    bytes: &'b [u8],
    lines: &'h mut Lines<'b>,
    to_head: bool,
) -> Result<Option<ResponseHead<'h, 'b>>, HeadError> {
    let mut parsed = httparse::Response::new(&mut []);
    let read =
        ParserConfig::default().parse_response_with_uninit_headers(&mut parsed, bytes, lines);
    let length = match read.map_err(HeadError::Malformed)? {
        Status::Partial if bytes.len() >= HEAD_BYTES_MAX => return Err(HeadError::TooLong),
        Status::Partial => return Ok(None),
        Status::Complete(length) => length,
    };
    no_bare_lf(&bytes[..length])?;
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(HeadError::Malformed(httparse::Error::Token));
    };
    // No request of this lane asks for another protocol.
    if status == 101 {
        return Err(HeadError::Status(status));
    }
    let headers: &[Header<'_>] = parsed.headers;
    let form = form(headers)?;
    let framing = match form {
        _ if to_head || status < 200 || status == 204 || status == 304 => Framing::None,
        Form { chunked: true, .. } => Framing::Chunked,
        Form {
            length: Some(0), ..
        } => Framing::None,
        Form {
            length: Some(length),
            ..
        } => Framing::Length(length),
        _ => Framing::UntilClose,
    };
    let persistent = !form.close && (minor == 1 || form.keep_alive);
    Ok(Some(ResponseHead {
        status,
        reason: parsed.reason.unwrap_or(""),
        headers,
        bytes: length,
        raw: &bytes[..length],
        framing,
        keep_alive: persistent && framing != Framing::UntilClose,
        names_lines: form.names_lines,
    }))
}

fn form(headers: &[Header<'_>]) -> Result<Form, HeadError> {
    let mut form = Form::default();
    for line in headers {
        // By length first: most lines are none of these.
        match line.name.len() {
            14 if line.name.eq_ignore_ascii_case("content-length") => {
                let length = decimal(line.value).ok_or(HeadError::Length)?;
                if form.length.is_some() {
                    return Err(HeadError::Length);
                }
                form.length = Some(length);
            }
            17 if line.name.eq_ignore_ascii_case("transfer-encoding") => {
                if form.chunked || !line.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(HeadError::Coding);
                }
                form.chunked = true;
            }
            10 if line.name.eq_ignore_ascii_case("connection") => {
                for option in tokens(line.value) {
                    let close = option.eq_ignore_ascii_case(b"close");
                    let keep_alive = option.eq_ignore_ascii_case(b"keep-alive");
                    form.close |= close;
                    form.keep_alive |= keep_alive;
                    form.names_lines |= !close && !keep_alive;
                }
            }
            7 if line.name.eq_ignore_ascii_case("upgrade") => form.upgrade = true,
            _ => {}
        }
    }
    if form.chunked && form.length.is_some() {
        return Err(HeadError::Coding);
    }
    Ok(form)
}

/// Digits only: no sign, no list, no space, and within 64 bits.
fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0_u64, |number, &digit| {
        if !digit.is_ascii_digit() {
            return None;
        }
        number.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
}

/// The elements of a comma-separated list.
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|&byte| byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

/// The parser takes a bare LF for a line's end; another parser may not, and then the two read
/// different requests (RFC 9112, section 2.2 allows the leniency, and smuggling lives on it).
fn no_bare_lf(head: &[u8]) -> Result<(), HeadError> {
    // All of it without a branch, many bytes at a time: there is hardly ever one.
    let pairs = head.iter().zip(head.iter().skip(1));
    let bare = pairs.fold(head.first() == Some(&b'\n'), |any, (before, byte)| {
        any | (*byte == b'\n') & (*before != b'\r')
    });
    if bare { Err(HeadError::BareLf) } else { Ok(()) }
}

/// True for lines that concern one connection only and are never forwarded (RFC 9110, section
/// 7.6.1). What a `Connection` line names beside them is asked of `named`.
pub fn is_hop_by_hop(name: &str, headers: &[Header<'_>]) -> bool {
    let known = match name.len() {
        2 => name.eq_ignore_ascii_case("te"),
        7 => name.eq_ignore_ascii_case("upgrade"),
        10 => name.eq_ignore_ascii_case("connection") || name.eq_ignore_ascii_case("keep-alive"),
        16 => name.eq_ignore_ascii_case("proxy-connection"),
        17 => name.eq_ignore_ascii_case("transfer-encoding"),
        _ => false,
    };
    known
        || headers
            .iter()
            .filter(|line| line.name.len() == 10 && line.name.eq_ignore_ascii_case("connection"))
            .flat_map(|line| tokens(line.value))
            .any(|token| token.eq_ignore_ascii_case(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing_of(text: &str) -> Result<Framing, HeadError> {
        let mut lines = room();
        Ok(request(text.as_bytes(), &mut lines)?.unwrap().framing)
    }

    #[test]
    fn a_request_is_read_in_one_go() {
        let text = b"GET /a?b=c HTTP/1.1\r\nHost: shop.example\r\nX-Tenant: acme\r\n\r\nNEXT";
        let mut lines = room();
        let head = request(text, &mut lines).unwrap().unwrap();
        assert_eq!((head.method, head.target), ("GET", "/a?b=c"));
        assert_eq!(head.host, Some("shop.example"));
        assert_eq!(
            (head.framing, head.keep_alive, head.special),
            (Framing::None, true, false)
        );
        assert_eq!(&text[head.bytes..], b"NEXT");
    }

    #[test]
    fn every_prefix_needs_more() {
        let text = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n";
        for end in 0..text.len() {
            let mut lines = room();
            assert!(
                request(&text[..end], &mut lines).unwrap().is_none(),
                "{end}"
            );
        }
    }

    #[test]
    fn what_is_ambiguous_is_refused() {
        let with = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n");
        for (lines, error) in [
            (
                "Content-Length: 3\r\nContent-Length: 3\r\n",
                HeadError::Length,
            ),
            ("Content-Length: +3\r\n", HeadError::Length),
            ("Content-Length: 3, 3\r\n", HeadError::Length),
            (
                "Content-Length: 99999999999999999999\r\n",
                HeadError::Length,
            ),
            ("Content-Length: \r\n", HeadError::Length),
            (
                "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
                HeadError::Coding,
            ),
            ("Transfer-Encoding: gzip, chunked\r\n", HeadError::Coding),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                HeadError::Coding,
            ),
            ("Transfer-Encoding: xchunked\r\n", HeadError::Coding),
            ("X: y\n", HeadError::BareLf),
        ] {
            assert_eq!(framing_of(&with(lines)), Err(error), "{lines:?}");
        }
        for lines in [
            "X : y\r\n",
            " folded\r\n",
            "X: a\r\n b\r\n",
            "X: a\0b\r\n",
            "X: a\rb\r\n",
        ] {
            let refused = framing_of(&with(lines));
            assert!(
                matches!(refused, Err(HeadError::Malformed(_))),
                "{lines:?}: {refused:?}"
            );
        }
        assert_eq!(
            framing_of(&with("Content-Length: 12\r\n")),
            Ok(Framing::Length(12))
        );
        assert_eq!(
            framing_of(&with("Transfer-Encoding: Chunked\r\n")),
            Ok(Framing::Chunked)
        );
    }

    #[test]
    fn a_head_without_end_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(HEAD_BYTES_MAX));
        let mut lines = room();
        assert_eq!(
            request(long.as_bytes(), &mut lines).unwrap_err(),
            HeadError::TooLong
        );
    }

    #[test]
    fn persistence_follows_version_and_connection() {
        for (text, keeps) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", true),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n",
                false,
            ),
            ("GET / HTTP/1.0\r\nHost: a\r\n\r\n", false),
            (
                "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
                true,
            ),
        ] {
            let mut lines = room();
            let head = request(text.as_bytes(), &mut lines).unwrap().unwrap();
            assert_eq!(head.keep_alive, keeps, "{text}");
        }
    }

    #[test]
    fn responses_end_where_rfc_9112_says() {
        for (text, to_head, framing, keeps) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
                false,
                Framing::Length(5),
                true,
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
                true,
                Framing::None,
                true,
            ),
            (
                "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
                false,
                Framing::None,
                true,
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                false,
                Framing::Chunked,
                true,
            ),
            ("HTTP/1.1 200 OK\r\n\r\n", false, Framing::UntilClose, false),
            (
                "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
                false,
                Framing::Length(5),
                false,
            ),
            (
                "HTTP/1.1 103 Early Hints\r\n\r\n",
                false,
                Framing::None,
                true,
            ),
        ] {
            let mut lines = room();
            let head = response(text.as_bytes(), &mut lines, to_head)
                .unwrap()
                .unwrap();
            assert_eq!((head.framing, head.keep_alive), (framing, keeps), "{text}");
        }
        let mut lines = room();
        let switched = response(b"HTTP/1.1 101 Switching\r\n\r\n", &mut lines, false);
        assert_eq!(switched.unwrap_err(), HeadError::Status(101));
    }

    #[test]
    fn what_concerns_the_connection_is_not_forwarded() {
        let text =
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Private\r\nX-Private: 1\r\n\r\n";
        let mut lines = room();
        let head = request(text, &mut lines).unwrap().unwrap();
        let forwarded: Vec<&str> = head
            .headers
            .iter()
            .map(|line| line.name)
            .filter(|name| !is_hop_by_hop(name, head.headers))
            .collect();
        assert_eq!(forwarded, ["Host"]);
    }
}
