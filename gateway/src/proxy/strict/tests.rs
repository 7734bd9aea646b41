//! Which heads pass, and which are refused by which name.

use super::*;

const LIMITS: HeadLimits = HeadLimits {
    bytes_max: 1000,
    lines_max: 5,
    target_bytes_max: 100,
};

/// As it arrives byte by byte and as it arrives at once: the same answer.
fn head(text: &[u8]) -> Result<Option<Head>, Refusal> {
    let at_once = HeadScanner::default().scan(text, &LIMITS);
    let mut scanner = HeadScanner::default();
    let mut dripped = Ok(None);
    for end in 1..=text.len() {
        dripped = scanner.scan(&text[..end], &LIMITS);
        if dripped != Ok(None) {
            break;
        }
    }
    assert_eq!(at_once, dripped, "{}", text.escape_ascii());
    at_once
}

#[test]
fn well_formed_heads_pass_with_their_framing() {
    for (text, framing) in [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", Framing::None),
        ("GET / HTTP/1.0\r\n\r\n", Framing::None),
        (
            "GET /?q={a|b} HTTP/1.1\r\nhost:a.b:80\r\n\r\n",
            Framing::None,
        ),
        (
            "OPTIONS * HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
            Framing::None,
        ),
        ("GET http://a/b HTTP/1.1\r\nHost: a\r\n\r\n", Framing::None),
        (
            "PUT /%2F HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            Framing::None,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:  12 \r\n\r\n",
            Framing::Length(12),
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n",
            Framing::Chunked,
        ),
    ] {
        let expected = Head {
            length: text.len(),
            framing,
        };
        assert_eq!(head(text.as_bytes()), Ok(Some(expected)), "{text:?}");
        let more = [text.as_bytes(), b"more"].concat();
        assert_eq!(
            HeadScanner::default().scan(&more, &LIMITS),
            Ok(Some(expected))
        );
    }
    assert_eq!(head(b"GET / HTTP/1.1\r\nHost: a\r\n"), Ok(None));
}

#[test]
fn each_ambiguity_is_refused_by_name() {
    let get = |lines: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n");
    for (text, reason) in [
        ("GET / HTTP/1.1\nHost: a\r\n\r\n".to_owned(), "bare_lf"),
        (get("X: a\n"), "bare_lf"),
        (get("X: a\rY: b\r\n"), "bare_cr"),
        (get("X: a\0b\r\n"), "control_byte"),
        (get("X: \x0b\r\n"), "control_byte"),
        ("\r\n\r\n".to_owned(), "request_line"),
        (
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "request_line",
        ),
        (
            "GET / HTTP/1.1 \r\nHost: a\r\n\r\n".to_owned(),
            "request_line",
        ),
        ("GET /\r\n\r\n".to_owned(), "request_line"),
        ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), "method"),
        ("GET / HTTP/1.2\r\nHost: a\r\n\r\n".to_owned(), "version"),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), "version"),
        (
            "GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (
            "GET /<x> HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (
            "GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (
            "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (
            "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (
            "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
            "uri_byte",
        ),
        (get("X: a\r\n b\r\n"), "obs_fold"),
        (get(" X: a\r\n"), "obs_fold"),
        (get("Content-Length : 5\r\n"), "space_before_colon"),
        (get("Content-Length\t: 5\r\n"), "space_before_colon"),
        (get("X y: a\r\n"), "header_name"),
        (get("X\r\n"), "header_name"),
        (get(": a\r\n"), "header_name"),
        ("GET / HTTP/1.1\r\nX: a\r\n\r\n".to_owned(), "host_missing"),
        (get("Host: a\r\n"), "host_repeated"),
        (
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".to_owned(),
            "host_invalid",
        ),
        (
            "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n".to_owned(),
            "host_invalid",
        ),
        (
            get("Content-Length: 5\r\nContent-Length: 5\r\n"),
            "content_length_repeated",
        ),
        (
            get("Content-Length: 5\r\nContent-Length: 6\r\n"),
            "content_length_repeated",
        ),
        (get("Content-Length: 5, 5\r\n"), "content_length_invalid"),
        (get("Content-Length: +5\r\n"), "content_length_invalid"),
        (get("Content-Length: 0x5\r\n"), "content_length_invalid"),
        (get("Content-Length: \r\n"), "content_length_invalid"),
        (
            get("Content-Length: 99999999999999999999\r\n"),
            "content_length_invalid",
        ),
        (
            get("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
            "length_and_encoding",
        ),
        (
            get("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
            "length_and_encoding",
        ),
        (
            get("Transfer-Encoding: gzip, chunked\r\n"),
            "transfer_encoding",
        ),
        (get("Transfer-Encoding: xchunked\r\n"), "transfer_encoding"),
        (get("Transfer-Encoding: \x0bchunked\r\n"), "control_byte"),
        (
            get("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            "transfer_encoding",
        ),
        (get("Content_Length: 5\r\n"), "lookalike"),
        (get(&"A: b\r\n".repeat(5)), "headers_too_many"),
        (
            get(&format!("A: {}\r\n", "b".repeat(1000))),
            "header_too_large",
        ),
        (
            format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(100)),
            "uri_too_long",
        ),
        (
            format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(900)),
            "uri_too_long",
        ),
    ] {
        assert_eq!(
            head(text.as_bytes()).map_err(Refusal::reason),
            Err(reason),
            "{text:?}"
        );
    }
}
