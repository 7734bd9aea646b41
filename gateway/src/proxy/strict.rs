//! HTTP/1.1 message framing as RFC 9112 writes it, without the leniency request smuggling lives
//! on. What two parsers could read differently is refused, never repaired.
//!
//! Pure: bytes in, where the message ends or why it is refused out. [`super::guard`] runs it on
//! every HTTP/1 connection before pingora's more forgiving parser sees a byte.

use std::fmt;

/// Bytes of chunk extensions and of trailers one body may have.
const CHUNK_EXTRAS_MAX: usize = 8 * 1024;

/// Why a client is refused; the label of the metric and the word in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// A line feed without a carriage return before it.
    BareLf,
    /// A carriage return without a line feed after it.
    BareCr,
    /// NUL or another control character.
    ControlByte,
    /// Not `method SP target SP version`.
    RequestLine,
    /// A method that is no token.
    Method,
    /// Neither HTTP/1.0 nor HTTP/1.1.
    Version,
    /// A byte no URI may have, or a `%` without two hexadecimal digits.
    UriByte,
    /// Longer than the limit for request targets.
    UriTooLong,
    /// A header line that starts with white space.
    ObsoleteFolding,
    /// White space between a header's name and its colon.
    SpaceBeforeColon,
    /// A header name that is no token, or a line without a colon.
    HeaderName,
    /// HTTP/1.1 without Host.
    HostMissing,
    /// More than one Host.
    HostRepeated,
    /// A Host that is no host.
    HostInvalid,
    /// More than one Content-Length, alike or not.
    ContentLengthRepeated,
    /// A Content-Length that is not digits only.
    ContentLengthInvalid,
    /// Content-Length and Transfer-Encoding in one message.
    LengthAndEncoding,
    /// A Transfer-Encoding other than `chunked`, or in HTTP/1.0.
    TransferEncoding,
    /// A name that some servers take for Content-Length or Transfer-Encoding.
    Lookalike,
    /// More header bytes than the limit.
    HeaderTooLarge,
    /// More header lines than the limit.
    HeadersTooMany,
    /// The header did not arrive within its deadline.
    HeaderTimeout,
    /// A chunk size, extension or end that is malformed.
    Chunk,
    /// The body arrives more slowly than the least rate.
    BodyTooSlow,
    /// The answer is taken more slowly than the least rate.
    ReadsTooSlowly,
    /// More HTTP/2 control frames than the traffic explains.
    Http2Flood,
    /// Longer than the route's or listener's limit.
    BodyTooLarge,
}

impl Refusal {
    /// All of them, so that each has a counter before it first happens.
    pub const ALL: [Self; 27] = [
        Self::BareLf,
        Self::BareCr,
        Self::ControlByte,
        Self::RequestLine,
        Self::Method,
        Self::Version,
        Self::UriByte,
        Self::UriTooLong,
        Self::ObsoleteFolding,
        Self::SpaceBeforeColon,
        Self::HeaderName,
        Self::HostMissing,
        Self::HostRepeated,
        Self::HostInvalid,
        Self::ContentLengthRepeated,
        Self::ContentLengthInvalid,
        Self::LengthAndEncoding,
        Self::TransferEncoding,
        Self::Lookalike,
        Self::HeaderTooLarge,
        Self::HeadersTooMany,
        Self::HeaderTimeout,
        Self::Chunk,
        Self::BodyTooSlow,
        Self::ReadsTooSlowly,
        Self::Http2Flood,
        Self::BodyTooLarge,
    ];

    /// The metric label.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::BareLf => "bare_lf",
            Self::BareCr => "bare_cr",
            Self::ControlByte => "control_byte",
            Self::RequestLine => "request_line",
            Self::Method => "method",
            Self::Version => "version",
            Self::UriByte => "uri_byte",
            Self::UriTooLong => "uri_too_long",
            Self::ObsoleteFolding => "obs_fold",
            Self::SpaceBeforeColon => "space_before_colon",
            Self::HeaderName => "header_name",
            Self::HostMissing => "host_missing",
            Self::HostRepeated => "host_repeated",
            Self::HostInvalid => "host_invalid",
            Self::ContentLengthRepeated => "content_length_repeated",
            Self::ContentLengthInvalid => "content_length_invalid",
            Self::LengthAndEncoding => "length_and_encoding",
            Self::TransferEncoding => "transfer_encoding",
            Self::Lookalike => "lookalike",
            Self::HeaderTooLarge => "header_too_large",
            Self::HeadersTooMany => "headers_too_many",
            Self::HeaderTimeout => "header_timeout",
            Self::Chunk => "chunk",
            Self::BodyTooSlow => "body_too_slow",
            Self::ReadsTooSlowly => "reads_too_slowly",
            Self::Http2Flood => "http2_flood",
            Self::BodyTooLarge => "body_too_large",
        }
    }

    /// The status it is answered with.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::Version => 505,
            Self::UriTooLong => 414,
            Self::HeaderTooLarge | Self::HeadersTooMany => 431,
            Self::HeaderTimeout | Self::BodyTooSlow => 408,
            Self::BodyTooLarge => 413,
            _ => 400,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for Refusal {}

/// What a header may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// The whole header, request line included.
    pub bytes_max: usize,
    /// Lines after the request line.
    pub lines_max: usize,
    /// The request target.
    pub target_bytes_max: usize,
}

/// How a request's body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// Content-Length, in bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
}

/// A header that may be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its length in bytes, with the empty line.
    pub length: usize,
    /// What follows.
    pub framing: Framing,
}

/// Looks for the end of a header in a growing buffer; each byte is scanned once.
#[derive(Debug, Default)]
pub struct HeadScanner {
    scanned: usize,
    line_start: usize,
}

impl HeadScanner {
    /// Whether nothing was scanned yet.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.scanned == 0
    }

    /// The whole buffer so far. `None`: more is needed.
    ///
    /// # Errors
    /// Why the header is refused, as early as that can be said.
    pub fn scan(&mut self, buffer: &[u8], limits: &HeadLimits) -> Result<Option<Head>, Refusal> {
        while let Some(&first) = buffer.get(self.scanned) {
            if first != b'\n' && self.scanned > 0 && buffer[self.scanned - 1] == b'\r' {
                return Err(Refusal::BareCr);
            }
            let unread = &buffer[self.scanned..];
            let Some(line_feed) = memchr::memchr(b'\n', unread) else {
                no_control(unread)?;
                self.scanned = buffer.len();
                break;
            };
            no_control(&unread[..line_feed])?;
            let length = self.scanned + line_feed + 1;
            if length < 2 || buffer[length - 2] != b'\r' {
                return Err(Refusal::BareLf);
            }
            if length > limits.bytes_max {
                return Err(Refusal::HeaderTooLarge);
            }
            if length - self.line_start == 2 && self.line_start > 0 {
                let framing = read(&buffer[..length], limits)?;
                return Ok(Some(Head { length, framing }));
            }
            if length - self.line_start == 2 {
                // An empty line before the request line: the caller strips one.
                return Err(Refusal::RequestLine);
            }
            self.line_start = length;
            self.scanned = length;
        }
        if self.line_start == 0 && self.scanned > limits.target_bytes_max + 64 {
            return Err(Refusal::UriTooLong);
        }
        if self.scanned > limits.bytes_max {
            return Err(Refusal::HeaderTooLarge);
        }
        Ok(None)
    }
}

/// No control character but tabs; a carriage return only at the end.
fn no_control(line: &[u8]) -> Result<(), Refusal> {
    let body = line.strip_suffix(b"\r").unwrap_or(line);
    let is_control = |byte: u8| byte < 0x20 && byte != b'\t' || byte == 0x7f;
    // All of it without a branch, many bytes at a time: there is hardly ever one.
    if !body.iter().fold(false, |any, &byte| any | is_control(byte)) {
        return Ok(());
    }
    let first = body.iter().find(|byte| is_control(**byte));
    Err(if first == Some(&b'\r') {
        Refusal::BareCr
    } else {
        Refusal::ControlByte
    })
}

/// A complete header: every line ends in CRLF and no other control characters are in it.
fn read(header: &[u8], limits: &HeadLimits) -> Result<Framing, Refusal> {
    let mut lines = header
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let modern = request_line(lines.next().unwrap_or_default(), limits)?;
    let (mut hosts, mut length, mut chunked, mut count) = (0, None, false, 0);
    for line in lines {
        let Some(&first) = line.first() else { break };
        count += 1;
        if count > limits.lines_max {
            return Err(Refusal::HeadersTooMany);
        }
        if first == b' ' || first == b'\t' {
            return Err(Refusal::ObsoleteFolding);
        }
        let Some(colon) = memchr::memchr(b':', line) else {
            return Err(Refusal::HeaderName);
        };
        let (name, value) = (&line[..colon], trim(&line[colon + 1..]));
        if matches!(name.last(), Some(b' ' | b'\t')) {
            return Err(Refusal::SpaceBeforeColon);
        }
        if name.is_empty() || !name.iter().all(|&byte| is_token(byte)) {
            return Err(Refusal::HeaderName);
        }
        if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
            if hosts > 1 {
                return Err(Refusal::HostRepeated);
            }
            if !is_host(value) {
                return Err(Refusal::HostInvalid);
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            if length.is_some() {
                return Err(Refusal::ContentLengthRepeated);
            }
            length = Some(content_length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || !modern || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Refusal::TransferEncoding);
            }
            chunked = true;
        } else if name.eq_ignore_ascii_case(b"content_length")
            || name.eq_ignore_ascii_case(b"transfer_encoding")
        {
            return Err(Refusal::Lookalike);
        }
    }
    if modern && hosts == 0 {
        return Err(Refusal::HostMissing);
    }
    match (length, chunked) {
        (Some(_), true) => Err(Refusal::LengthAndEncoding),
        (None, true) => Ok(Framing::Chunked),
        (Some(length), false) if length > 0 => Ok(Framing::Length(length)),
        _ => Ok(Framing::None),
    }
}

/// Whether it is HTTP/1.1.
fn request_line(line: &[u8], limits: &HeadLimits) -> Result<bool, Refusal> {
    let mut parts = line.split(|&byte| byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Refusal::RequestLine);
    };
    if method.is_empty() || !method.iter().all(|&byte| is_token(byte)) {
        return Err(Refusal::Method);
    }
    if target.len() > limits.target_bytes_max {
        return Err(Refusal::UriTooLong);
    }
    is_target(method, target)?;
    match version {
        b"HTTP/1.1" => Ok(true),
        b"HTTP/1.0" => Ok(false),
        _ if version.starts_with(b"HTTP/") => Err(Refusal::Version),
        _ => Err(Refusal::RequestLine),
    }
}

fn is_target(method: &[u8], target: &[u8]) -> Result<(), Refusal> {
    match target.first() {
        None => return Err(Refusal::RequestLine),
        Some(b'/') => {}
        // Asterisk form and authority form are for one method each.
        Some(b'*') if target.len() == 1 && method == b"OPTIONS" => return Ok(()),
        Some(_) if method == b"CONNECT" => {
            return if is_host(target) {
                Ok(())
            } else {
                Err(Refusal::UriByte)
            };
        }
        Some(_) => {
            let scheme = target.get(..7).unwrap_or_default();
            let secure = target.get(..8).unwrap_or_default();
            if !scheme.eq_ignore_ascii_case(b"http://") && !secure.eq_ignore_ascii_case(b"https://")
            {
                return Err(Refusal::UriByte);
            }
        }
    }
    let mut query = false;
    let mut bytes = target.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'%' => {
                let high = bytes.next().is_some_and(u8::is_ascii_hexdigit);
                let low = bytes.next().is_some_and(u8::is_ascii_hexdigit);
                if !high || !low {
                    return Err(Refusal::UriByte);
                }
            }
            b'?' => query = true,
            0..=0x20 | 0x7f.. | b'"' | b'<' | b'>' | b'#' => return Err(Refusal::UriByte),
            // Browsers send these in a query as typed; in a path they hide from matching.
            b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' if !query => return Err(Refusal::UriByte),
            _ => {}
        }
    }
    Ok(())
}

fn content_length(value: &[u8]) -> Result<u64, Refusal> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::ContentLengthInvalid);
    }
    std::str::from_utf8(value)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or(Refusal::ContentLengthInvalid)
}

/// Letters, digits and these.
const fn with_alphanumeric(more: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 128_u8 {
        table[byte as usize] = byte.is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < more.len() {
        table[more[at] as usize] = true;
        at += 1;
    }
    table
}

static TOKEN: [bool; 256] = with_alphanumeric(b"!#$%&'*+-.^_`|~");
static HOST: [bool; 256] = with_alphanumeric(b"-._~!$&'()*+,;=%:[]");

fn is_token(byte: u8) -> bool {
    TOKEN[usize::from(byte)]
}

/// `uri-host [ ":" port ]`, possibly empty, without user information.
fn is_host(value: &[u8]) -> bool {
    value.iter().all(|&byte| HOST[usize::from(byte)])
}

fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Follows a chunked body to its end.
#[derive(Debug)]
pub struct ChunkScanner {
    at: Chunk,
    extras: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
    },
    SizeLf {
        value: u64,
    },
    Data(u64),
    DataCr,
    DataLf,
    /// In a trailer line of this many bytes so far.
    Trailer(usize),
    TrailerLf(usize),
    End,
}

impl Default for ChunkScanner {
    fn default() -> Self {
        Self {
            at: Chunk::START,
            extras: 0,
        }
    }
}

impl Chunk {
    const START: Self = Self::Size {
        value: 0,
        digits: 0,
    };
}

impl ChunkScanner {
    /// The next bytes of the body. Some: the body ends after this many of them.
    ///
    /// # Errors
    /// [`Refusal::Chunk`], or what is wrong with a line end.
    pub fn scan(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        let mut position = 0;
        while let Some(&byte) = bytes.get(position) {
            if let Chunk::Data(left) = self.at {
                let here = (bytes.len() - position) as u64;
                if here < left {
                    self.at = Chunk::Data(left - here);
                    return Ok(None);
                }
                position += usize::try_from(left).map_err(|_| Refusal::Chunk)?;
                self.at = Chunk::DataCr;
                continue;
            }
            position += 1;
            self.at = self.step(byte)?;
            if self.at == Chunk::End {
                return Ok(Some(position));
            }
        }
        Ok(None)
    }

    fn step(&mut self, byte: u8) -> Result<Chunk, Refusal> {
        Ok(match self.at {
            Chunk::Size { value, digits } => match (byte, char::from(byte).to_digit(16)) {
                (_, Some(digit)) if digits < 15 => Chunk::Size {
                    value: value * 16 + u64::from(digit),
                    digits: digits + 1,
                },
                (b';', _) if digits > 0 => Chunk::Extension { value },
                (b'\r', _) if digits > 0 => Chunk::SizeLf { value },
                (b'\n', _) => return Err(Refusal::BareLf),
                _ => return Err(Refusal::Chunk),
            },
            Chunk::Extension { value } => match byte {
                b'\r' => Chunk::SizeLf { value },
                b'\n' => return Err(Refusal::BareLf),
                b'\t' | 0x20..=0x7e | 0x80.. => {
                    self.extra()?;
                    Chunk::Extension { value }
                }
                _ => return Err(Refusal::ControlByte),
            },
            Chunk::SizeLf { value } => match (byte, value) {
                (b'\n', 0) => Chunk::Trailer(0),
                (b'\n', _) => Chunk::Data(value),
                _ => return Err(Refusal::BareCr),
            },
            Chunk::Data(_) | Chunk::End => return Err(Refusal::Chunk),
            Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
            Chunk::DataLf if byte == b'\n' => Chunk::START,
            Chunk::DataCr | Chunk::DataLf => return Err(Refusal::Chunk),
            Chunk::Trailer(length) => match byte {
                b'\r' => Chunk::TrailerLf(length),
                b'\n' => return Err(Refusal::BareLf),
                b' ' | b'\t' if length == 0 => return Err(Refusal::ObsoleteFolding),
                b'\t' | 0x20..=0x7e | 0x80.. => {
                    self.extra()?;
                    Chunk::Trailer(length + 1)
                }
                _ => return Err(Refusal::ControlByte),
            },
            Chunk::TrailerLf(length) => match (byte, length) {
                // The empty line: the end.
                (b'\n', 0) => Chunk::End,
                (b'\n', _) => Chunk::Trailer(0),
                _ => return Err(Refusal::BareCr),
            },
        })
    }

    fn extra(&mut self) -> Result<(), Refusal> {
        self.extras += 1;
        if self.extras > CHUNK_EXTRAS_MAX {
            return Err(Refusal::Chunk);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
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

    fn chunks(text: &[u8]) -> Result<Option<usize>, Refusal> {
        let at_once = ChunkScanner::default().scan(text);
        let mut scanner = ChunkScanner::default();
        for (position, byte) in text.iter().enumerate() {
            match scanner.scan(std::slice::from_ref(byte)) {
                Ok(None) => {}
                Ok(Some(end)) => {
                    assert_eq!(at_once, Ok(Some(position + end)), "{}", text.escape_ascii());
                    return at_once;
                }
                Err(refusal) => {
                    assert_eq!(at_once, Err(refusal), "{}", text.escape_ascii());
                    return at_once;
                }
            }
        }
        assert_eq!(at_once, Ok(None));
        at_once
    }

    #[test]
    fn chunked_bodies_end_where_they_end() {
        for text in [
            "0\r\n\r\n",
            "5\r\nhello\r\n0\r\n\r\n",
            "5;a=b\r\nhello\r\n1\r\nx\r\n0\r\n\r\n",
            "A\r\n0123456789\r\n000\r\nTrailer: x\r\nOther: y\r\n\r\n",
        ] {
            assert_eq!(chunks(text.as_bytes()), Ok(Some(text.len())), "{text:?}");
            let more = format!("{text}GET / HTTP/1.1\r\n");
            assert_eq!(
                ChunkScanner::default().scan(more.as_bytes()),
                Ok(Some(text.len()))
            );
        }
        for (text, reason) in [
            ("5\nhello\r\n", "bare_lf"),
            ("5\r\nhelloX\r\n", "chunk"),
            ("5\r\nhello\n", "chunk"),
            ("0x5\r\n", "chunk"),
            (" 5\r\n", "chunk"),
            ("5 \r\n", "chunk"),
            ("\r\n", "chunk"),
            (";a\r\n", "chunk"),
            ("-5\r\n", "chunk"),
            ("1111111111111111\r\n", "chunk"),
            ("5\rhello", "bare_cr"),
            ("5;a\nhello", "bare_lf"),
            ("5;\0\r\n", "control_byte"),
            ("0\r\nA: b\n\r\n", "bare_lf"),
            ("0\r\n A: b\r\n\r\n", "obs_fold"),
        ] {
            assert_eq!(
                chunks(text.as_bytes()).map_err(Refusal::reason),
                Err(reason),
                "{text:?}"
            );
        }
        let long = format!("5;{}", "a".repeat(CHUNK_EXTRAS_MAX + 1));
        assert_eq!(chunks(long.as_bytes()), Err(Refusal::Chunk));
    }
}
