//! The trace id that follows a purchase: from the gateway's header through the log, the rows
//! and the events.

use uuid::Uuid;

/// Longest request id taken over from a header, in characters.
const REQUEST_ID_LEN_MAX: usize = 64;

/// 32 hexadecimal digits of a W3C trace, or the gateway's request id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceId(String);

impl TraceId {
    /// Takes the trace of a `traceparent` header, else the `x-request-id`, else a new one.
    /// A malformed header is ignored: it must not fail a purchase.
    #[must_use]
    pub fn of(traceparent: Option<&str>, request_id: Option<&str>) -> Self {
        traceparent
            .and_then(trace_of)
            .or_else(|| request_id.and_then(clean))
            .unwrap_or_else(Self::generate)
    }

    /// A trace that begins here.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7().simple().to_string())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `00-<32 hex>-<16 hex>-<2 hex>`; a trace of zeros is none.
fn trace_of(header: &str) -> Option<TraceId> {
    let mut parts = header.trim().split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length: usize| {
        text.len() == length
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_well_formed = is_hex(version, 2)
        && version != "ff"
        && is_hex(trace, 32)
        && is_hex(parent, 16)
        && is_hex(flags, 2);
    (is_well_formed && trace.bytes().any(|byte| byte != b'0')).then(|| TraceId(trace.to_owned()))
}

fn clean(request_id: &str) -> Option<TraceId> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let fits = (1..=REQUEST_ID_LEN_MAX).contains(&request_id.len());
    (fits && request_id.bytes().all(allowed)).then(|| TraceId(request_id.to_owned()))
}

/// A `traceparent` for a request that this service makes on behalf of the trace; `None` when
/// the id is not a W3C one.
#[must_use]
pub fn traceparent(trace_id: &str) -> Option<String> {
    let parent = Uuid::now_v7().simple().to_string();
    let header = format!("00-{trace_id}-{}-01", parent.get(16..)?);
    trace_of(&header).map(|_| header)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn the_gateways_trace_wins_and_nonsense_is_ignored() {
        let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
        assert_eq!(TraceId::of(Some(&parent), Some("r-1")).as_str(), TRACE);
        assert_eq!(TraceId::of(Some("00-xyz"), Some("r-1")).as_str(), "r-1");
        let zeros = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        for (traceparent, request_id) in [(Some(zeros.as_str()), Some("a b")), (None, Some(""))] {
            assert_eq!(TraceId::of(traceparent, request_id).as_str().len(), 32);
        }
    }

    #[test]
    fn the_trace_goes_on() {
        let header = traceparent(TRACE).unwrap();
        assert_eq!(TraceId::of(Some(&header), None).as_str(), TRACE);
        assert_eq!(traceparent("r-1"), None);
    }
}
