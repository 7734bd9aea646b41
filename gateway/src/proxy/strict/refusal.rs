//! Why a client is refused: the label, and the status it is answered with.

use std::fmt;

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
