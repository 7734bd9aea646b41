//! W3C trace context: what came with a request, what goes on with each attempt, and which requests
//! are recorded. A request that is not recorded keeps the headers it came with.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use http::HeaderName;

/// The header that carries a span (<https://www.w3.org/TR/trace-context/>).
pub static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Vendors' own, which stays as it is.
pub static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The flag that says that somebody records the trace.
const SAMPLED: u8 = 1;
/// Chances are counted in parts of this.
const WHOLE: u64 = 1_000_000;

/// A trace's number; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub [u8; 16]);

/// A span's number; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanId(pub [u8; 8]);

/// A recorded request's place in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Of the whole.
    pub id: TraceId,
    /// Who called; None when the trace begins here.
    pub parent: Option<SpanId>,
    /// The request's own span.
    pub span: SpanId,
}

/// Decides which requests are recorded.
#[derive(Debug)]
pub struct Sampler {
    /// Of [`WHOLE`]; None: nothing is recorded.
    parts: Option<u64>,
    /// Requests without a context, so that the chance is met exactly and costs no random number.
    asked: AtomicU64,
}

impl Sampler {
    /// Records this many of a million requests that bring no context. None: nothing at all.
    #[must_use]
    pub fn new(parts_per_million: Option<u32>) -> Self {
        Self {
            parts: parts_per_million.map(|parts| u64::from(parts).min(WHOLE)),
            asked: AtomicU64::new(0),
        }
    }

    /// Whether anything is recorded.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.parts.is_some()
    }

    /// Whether a request is recorded: as its caller says, or by chance when it says nothing. Ask
    /// once a request.
    pub fn wants(&self, traceparent: Option<&str>) -> bool {
        let Some(parts) = self.parts else {
            return false;
        };
        match traceparent.and_then(parse) {
            Some((_, _, sampled)) => sampled,
            None => {
                // Spread evenly: each time the running sum passes a whole.
                let before = self.asked.fetch_add(1, Ordering::Relaxed) % WHOLE;
                (before + 1) * parts / WHOLE > before * parts / WHOLE
            }
        }
    }
}

impl Trace {
    /// A span under the caller's, or the first one of a new trace.
    #[must_use]
    pub fn begin(traceparent: Option<&str>) -> Self {
        let (id, parent) = match traceparent.and_then(parse) {
            Some((id, parent, _)) => (id, Some(parent)),
            None => (TraceId::random(), None),
        };
        Self {
            id,
            parent,
            span: SpanId::random(),
        }
    }

    /// The header for a request whose span is `span`.
    #[must_use]
    pub fn header(&self, span: SpanId) -> String {
        format!("00-{}-{span}-01", self.id)
    }
}

impl TraceId {
    fn random() -> Self {
        let (high, low) = (random(), random());
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&high);
        bytes[8..].copy_from_slice(&low);
        Self(bytes)
    }
}

impl SpanId {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        Self(random())
    }
}

/// Two fresh random keys of the standard library's hasher; never 0.
fn random() -> [u8; 8] {
    use std::hash::{BuildHasher as _, RandomState};
    loop {
        let number = RandomState::new().hash_one(0);
        if number != 0 {
            return number.to_be_bytes();
        }
    }
}

/// The trace's number in a header, as written there; None where the header is none.
#[must_use]
pub fn id_of(traceparent: &str) -> Option<&str> {
    parse(traceparent)?;
    traceparent.trim().split('-').nth(1)
}

/// Trace, caller's span, and whether it is recorded. Of a later version only what version 00 has
/// is read, as the specification says.
fn parse(header: &str) -> Option<(TraceId, SpanId, bool)> {
    let header = header.trim();
    let mut fields = header.split('-');
    let version = hex::<1>(fields.next()?)?[0];
    let trace = TraceId(hex(fields.next()?)?);
    let parent = SpanId(hex(fields.next()?)?);
    let flags = hex::<1>(fields.next()?)?[0];
    let ends = fields.next().is_none();
    let known = match version {
        0 => ends,
        0xff => false,
        _ => true,
    };
    let is_some = trace.0 != [0; 16] && parent.0 != [0; 8];
    (known && is_some).then_some((trace, parent, flags & SAMPLED != 0))
}

/// Exactly so many bytes in lower case hexadecimal.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification.
    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_callers_trace_goes_on_with_a_new_span() {
        let trace = Trace::begin(Some(GIVEN));
        assert_eq!(trace.id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(trace.parent.unwrap().to_string(), "00f067aa0ba902b7");
        let attempt = SpanId::random();
        let header = trace.header(attempt);
        assert_eq!(id_of(&header), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        let (id, parent, sampled) = parse(&header).unwrap();
        assert_eq!((id, parent, sampled), (trace.id, attempt, true));
        assert_ne!(trace.span, attempt);
    }

    #[test]
    fn what_the_specification_forbids_begins_a_new_trace() {
        for wrong in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what",
        ] {
            assert_eq!((parse(wrong), id_of(wrong)), (None, None), "{wrong}");
            assert_eq!(Trace::begin(Some(wrong)).parent, None);
        }
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what";
        assert!(parse(later).is_some(), "a later version may have more");
    }

    #[test]
    fn the_caller_decides_and_else_the_ratio_is_met() {
        let never = Sampler::new(None);
        assert!(!never.wants(Some(GIVEN)));
        let tenth = Sampler::new(Some(100_000));
        let unsampled = GIVEN.replace("-01", "-00");
        assert!(tenth.wants(Some(GIVEN)));
        assert!(!tenth.wants(Some(&unsampled)));
        let taken = (0..1000).filter(|_| tenth.wants(None)).count();
        assert_eq!(taken, 100);
        let all = Sampler::new(Some(1_000_000));
        assert!((0..10).all(|_| all.wants(None)));
        assert!(!Sampler::new(Some(0)).wants(None));
    }
}
