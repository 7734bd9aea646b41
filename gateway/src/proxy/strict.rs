//! HTTP/1.1 message framing as RFC 9112 writes it, without the leniency request smuggling lives
//! on. What two parsers could read differently is refused, never repaired.
//!
//! Pure: bytes in, where the message ends or why it is refused out. [`super::guard`] runs it on
//! every HTTP/1 connection before pingora's more forgiving parser sees a byte.

mod chunk;
mod refusal;
#[cfg(test)]
mod tests;

pub use chunk::ChunkScanner;
pub use refusal::Refusal;

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
