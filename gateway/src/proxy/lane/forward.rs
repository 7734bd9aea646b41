//! What of a head goes on to the other side, and what is added: the same lines, in the same
//! order, as the full lane's.

use std::io::Write as _;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use httparse::Header;

use super::head::{Framing, RequestHead, ResponseHead, is_hop_by_hop};
use crate::{
    proxy::{X_FORWARDED_FOR, connection::Connection, record::RequestRecord},
    trace::{SpanId, TRACEPARENT, Trace},
    written,
};

/// What the gateway says of the request to the upstream.
#[derive(Clone, Copy, Debug)]
pub struct Forwarded<'a> {
    /// The client's address.
    pub client: Option<IpAddr>,
    /// Whether it came by TLS.
    pub tls: bool,
    /// The request's id.
    pub id: &'a str,
    /// Its place in a trace, when it is recorded.
    pub trace: Option<&'a Trace>,
}

impl<'a> Forwarded<'a> {
    /// Of a request that came on a connection.
    #[must_use]
    pub fn of(connection: &Connection, record: &'a RequestRecord) -> Self {
        Self {
            client: Some(connection.client.ip()),
            tls: connection.tls.is_some(),
            id: record.request.as_ref().map_or("", |line| line.id()),
            trace: record.recorded(),
        }
    }
}

/// Writes the request head for the upstream. Returns where an attempt's span goes, when the request
/// is recorded.
pub fn request(
    out: &mut Vec<u8>,
    head: &RequestHead<'_, '_>,
    forwarded: &Forwarded<'_>,
) -> Option<usize> {
    for part in [head.method, " ", head.target, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    let named = named_by_connection(head.headers, head.names_lines);
    let mut chained = false;
    let mut run = Run::of(head.raw);
    for header in head.headers {
        if is_hop_by_hop(header.name, named) || is_ours(header.name, forwarded) {
            chained |= header.name.eq_ignore_ascii_case("x-forwarded-for");
            continue;
        }
        run.line(out, header);
    }
    run.end(out);
    let chain = head
        .headers
        .iter()
        .filter(|header| chained && header.name.eq_ignore_ascii_case("x-forwarded-for"))
        .map(|header| header.value);
    ours(out, chain, head.host, forwarded)
}

/// Writes the head of a request that came by HTTP/2 for an upstream that speaks HTTP/1.1. Returns
/// what [`request`] does.
pub fn request_of_http2(
    out: &mut Vec<u8>,
    method: &Method,
    (target, host): (&str, &str),
    headers: &HeaderMap,
    forwarded: &Forwarded<'_>,
) -> Option<usize> {
    for part in [method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    text_line(out, "host", host);
    for (name, value) in headers {
        if is_not_sent_on(name) || is_ours(name.as_str(), forwarded) {
            continue;
        }
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    let chain = headers.get_all(&X_FORWARDED_FOR).iter();
    ours(out, chain.map(HeaderValue::as_bytes), Some(host), forwarded)
}

/// The host, which is said already, and what is about this hop: lines that HTTP/2 knows no
/// `Connection` for and lets through all the same.
fn is_not_sent_on(name: &HeaderName) -> bool {
    [
        header::HOST,
        header::TE,
        header::TRAILER,
        header::PROXY_AUTHORIZATION,
        header::PROXY_AUTHENTICATE,
    ]
    .contains(name)
        || name == "http2-settings"
}

/// What the gateway says of every request, and the end of the head. `chain` is what proxies before
/// it said of the client.
fn ours<'c>(
    out: &mut Vec<u8>,
    chain: impl Iterator<Item = &'c [u8]>,
    host: Option<&str>,
    forwarded: &Forwarded<'_>,
) -> Option<usize> {
    if let Some(client) = forwarded.client {
        out.extend_from_slice(b"x-forwarded-for: ");
        for before in chain.filter(|before| std::str::from_utf8(before).is_ok()) {
            out.extend_from_slice(before);
            out.extend_from_slice(b", ");
        }
        written::address(out, client);
        out.extend_from_slice(b"\r\n");
    }
    let protocol = if forwarded.tls { "https" } else { "http" };
    text_line(out, "x-forwarded-proto", protocol);
    if let Some(host) = host {
        text_line(out, "x-forwarded-host", host);
    }
    text_line(out, "x-request-id", forwarded.id);
    let span_at = forwarded.trace.map(|trace| {
        text_line(out, TRACEPARENT.as_str(), &trace.header(trace.span));
        out.len() - SPAN_FROM_END
    });
    out.extend_from_slice(b"\r\n");
    span_at
}

/// From a span's number to the end of its line.
const SPAN_FROM_END: usize = "0123456789abcdef-01\r\n".len();

/// Puts an attempt's span where [`request`] said.
pub fn set_span(head: &mut [u8], at: usize, span: SpanId) {
    // As long as the one before it.
    let _ = write!(&mut head[at..], "{span}");
}

/// Writes the response head for the client. With `close` it says that nothing follows.
pub fn response(out: &mut Vec<u8>, head: &ResponseHead<'_, '_>, close: bool) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(itoa::Buffer::new().format(head.status).as_bytes());
    for part in [" ", head.reason, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    let named = named_by_connection(head.headers, head.names_lines);
    let mut run = Run::of(head.raw);
    for header in head.headers {
        if !is_hop_by_hop(header.name, named) {
            run.line(out, header);
        }
    }
    run.end(out);
    if head.framing == Framing::Chunked {
        text_line(out, "transfer-encoding", "chunked");
    }
    if close {
        text_line(out, "connection", "close");
    }
    out.extend_from_slice(b"\r\n");
}

/// Where to look for what a `Connection` line names: nowhere, as a rule, or each line would be
/// compared with all.
pub fn named_by_connection<'h, 'b>(headers: &'h [Header<'b>], any: bool) -> &'h [Header<'b>] {
    if any { headers } else { &[] }
}

/// Lines that only the gateway may write: a client's own would be believed.
fn is_ours(name: &str, forwarded: &Forwarded<'_>) -> bool {
    match name.len() {
        // Of a request that is not recorded it goes on as it came.
        11 => forwarded.trace.is_some() && name.eq_ignore_ascii_case(TRACEPARENT.as_str()),
        12 => name.eq_ignore_ascii_case("x-request-id"),
        15 => name.eq_ignore_ascii_case("x-forwarded-for"),
        16 => {
            name.eq_ignore_ascii_case("x-forwarded-host")
                || name.eq_ignore_ascii_case("x-edgemeter-unit")
        }
        17 => name.eq_ignore_ascii_case("x-forwarded-proto"),
        // A client cannot choose its variant.
        19 => name.eq_ignore_ascii_case("x-edgemeter-variant"),
        _ => false,
    }
}

/// Lines that go on as they stand and follow one another: copied in one piece.
struct Run<'b> {
    head: &'b [u8],
    /// What is to be copied.
    from: usize,
    to: usize,
}

impl<'b> Run<'b> {
    fn of(head: &'b [u8]) -> Self {
        Self {
            head,
            from: 0,
            to: 0,
        }
    }

    fn line(&mut self, out: &mut Vec<u8>, header: &Header<'_>) {
        // Both are slices of the head; anything else fails the comparison below.
        let at = |part: &[u8]| (part.as_ptr() as usize).wrapping_sub(self.head.as_ptr() as usize);
        let (name, value) = (at(header.name.as_bytes()), at(header.value));
        let end = value.wrapping_add(header.value.len());
        // As the other lane writes it: one space after the colon, none at the end.
        let is_plain = value == name.wrapping_add(header.name.len() + 2)
            && self.head.get(end..end.wrapping_add(2)) == Some(b"\r\n")
            && self.head.get(value.wrapping_sub(2)..value) == Some(b": ");
        if is_plain && name == self.to {
            self.to = end + 2;
            return;
        }
        self.end(out);
        if is_plain {
            (self.from, self.to) = (name, end + 2);
        } else {
            for part in [header.name.as_bytes(), b": ", header.value, b"\r\n"] {
                out.extend_from_slice(part);
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head[self.from..self.to]);
        (self.from, self.to) = (0, 0);
    }
}

fn text_line(out: &mut Vec<u8>, name: &str, value: &str) {
    for part in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}
