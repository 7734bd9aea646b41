//! A line as text. What is not known when the request ends is left open, and filled in later.

use std::{
    io::Write as _,
    net::SocketAddr,
    time::{Duration, Instant, UNIX_EPOCH},
};

use super::entry::{ClientAddress, Entry, Leg};
use crate::written::{self, number};

/// A line that waits for its last bytes to leave.
pub(super) struct Waiting {
    pub(super) text: Vec<u8>,
    /// What the wire did goes there: positions in `text`, ascending.
    pub(super) gaps: Vec<(usize, Leg)>,
    /// Where `wire_settled` goes.
    pub(super) verdict_at: usize,
    pub(super) ended: Instant,
}

impl Leg {
    /// What the wire did.
    fn write(&self, out: &mut Vec<u8>) {
        let (sent, retransmits) = self.sent();
        key(out, b"{\"received_bytes\":");
        number(out, self.received_wire_bytes);
        key(out, b",\"sent_bytes\":");
        optional(out, sent, number);
        key(out, b",\"retransmits\":");
        optional(out, retransmits, number);
        key(out, b",\"srtt_us\":");
        number(out, self.srtt_us);
        key(out, b",\"connection\":");
        number(out, self.connection.cookie());
        key(out, b",\"quality\":");
        name(out, self.quality.as_str());
        out.push(b'}');
    }
}

/// Where what the wire did goes.
pub(super) trait Wires {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg);
    fn verdict(&mut self, out: &mut Vec<u8>);
}

/// All of it is known.
pub(super) struct Settled;

impl Wires for Settled {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg) {
        leg.write(out);
    }

    fn verdict(&mut self, out: &mut Vec<u8>) {
        key(out, b"true");
    }
}

impl Wires for Waiting {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg) {
        self.gaps.push((out.len(), leg));
    }

    fn verdict(&mut self, out: &mut Vec<u8>) {
        self.verdict_at = out.len();
    }
}

impl Waiting {
    pub(super) fn settled(&self) -> bool {
        self.gaps.iter().all(|(_, leg)| leg.settled())
    }

    pub(super) fn write(&self, out: &mut Vec<u8>, settled: bool) {
        let mut from = 0;
        let mut verdict = Some(self.verdict_at);
        for (at, leg) in &self.gaps {
            if let Some(verdict_at) = verdict.take_if(|verdict_at| *verdict_at < *at) {
                out.extend_from_slice(&self.text[from..verdict_at]);
                key(out, if settled { b"true" } else { b"false" });
                from = verdict_at;
            }
            out.extend_from_slice(&self.text[from..*at]);
            leg.write(out);
            from = *at;
        }
        if let Some(verdict_at) = verdict {
            out.extend_from_slice(&self.text[from..verdict_at]);
            key(out, if settled { b"true" } else { b"false" });
            from = verdict_at;
        }
        out.extend_from_slice(&self.text[from..]);
    }
}

pub(super) fn write_line(out: &mut Vec<u8>, entry: Entry<'_>, wires: &mut impl Wires) {
    let unix = entry
        .unix_time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    key(out, b"{\"unix_ms\":");
    number(out, unix.as_secs() * 1000 + u64::from(unix.subsec_millis()));
    key(out, b",\"id\":");
    text(out, entry.id);
    key(out, b",\"listener\":");
    name(out, entry.listener);
    key(out, b",\"client\":");
    match entry.client {
        ClientAddress::Socket(socket) => address(out, socket),
        ClientAddress::Named(ip) => text(out, &ip.to_string()),
        ClientAddress::Unknown => text(out, ""),
    }
    key(out, b",\"method\":");
    name(out, entry.method);
    key(out, b",\"host\":");
    text(out, entry.host);
    key(out, b",\"path\":");
    text(out, entry.path);
    key(out, b",\"version\":");
    name(out, entry.version);
    key(out, b",\"route\":");
    optional(out, entry.route, name);
    key(out, b",\"service\":");
    optional(out, entry.service, name);
    key(out, b",\"tenant\":");
    text(out, entry.tenant);
    key(out, b",\"status\":");
    number(out, entry.status);
    key(out, b",\"duration_us\":");
    micros(out, entry.duration);
    key(out, b",\"variants\":");
    let variants = Some(entry.variants).filter(|all| !all.is_empty());
    optional(out, variants, text);
    key(out, b",\"request_body_bytes\":");
    number(out, entry.request_body.0);
    key(out, b",\"response_body_bytes\":");
    number(out, entry.response_body.0);
    key(out, b",\"error\":");
    optional(out, entry.error, text);
    key(out, b",\"trace\":");
    optional(out, entry.trace, |out, trace| {
        // Writing to memory cannot fail.
        let _ = write!(out, "\"{}\"", trace.id);
    });
    key(out, b",\"wire\":");
    optional(out, entry.client_leg, |out, leg| wires.wire(out, leg));
    key(out, b",\"wire_settled\":");
    wires.verdict(out);
    key(out, b",\"upstream_name\":");
    optional(out, entry.upstream, name);
    key(out, b",\"upstream\":[");
    for (index, attempt) in entry.attempts.into_iter().enumerate() {
        let timing = &attempt.timing;
        key(
            out,
            if index == 0 {
                b"{\"peer\":"
            } else {
                b",{\"peer\":"
            },
        );
        address(out, attempt.peer);
        key(out, b",\"reused\":");
        key(out, if timing.reused { b"true" } else { b"false" });
        key(out, b",\"began_us\":");
        micros(out, timing.began);
        for (name, time) in [
            (&b",\"connected_us\":"[..], timing.connected),
            (b",\"answered_us\":", timing.answered),
            (b",\"ended_us\":", timing.ended),
        ] {
            key(out, name);
            optional(out, time, micros);
        }
        key(out, b",\"status\":");
        optional(out, timing.status, number);
        key(out, b",\"error\":");
        optional(out, timing.error.as_deref(), text);
        key(out, b",\"wire\":");
        optional(out, attempt.leg, |out, leg| wires.wire(out, leg));
        out.push(b'}');
    }
    key(out, b"]}\n");
}

fn key(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn optional<T>(out: &mut Vec<u8>, value: Option<T>, write: impl FnOnce(&mut Vec<u8>, T)) {
    match value {
        Some(value) => write(out, value),
        None => key(out, b"null"),
    }
}

/// What a configuration or HTTP allows no quote in: names, methods, versions.
fn name(out: &mut Vec<u8>, value: &str) {
    out.push(b'"');
    out.extend_from_slice(value.as_bytes());
    out.push(b'"');
}

/// Whatever it is.
fn text(out: &mut Vec<u8>, value: &str) {
    let is_odd = |byte: u8| (byte < 0x20) | (byte == b'"') | (byte == b'\\');
    // All of it without a branch, many bytes at a time: there is hardly ever one.
    if value.bytes().fold(false, |any, byte| any | is_odd(byte)) {
        // Writing to memory cannot fail.
        let _ = serde_json::to_writer(out, value);
    } else {
        name(out, value);
    }
}

fn address(out: &mut Vec<u8>, address: SocketAddr) {
    out.push(b'"');
    written::socket(out, address);
    out.push(b'"');
}

/// Microseconds; a request that takes half a million years is cut short.
fn micros(out: &mut Vec<u8>, time: Duration) {
    number(
        out,
        time.as_secs() * 1_000_000 + u64::from(time.subsec_micros()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access_log::{AccessLog, Attempt, AttemptTiming},
        config::{self, AccessLogTarget},
        units::PayloadBytes,
    };

    fn entry<'a>(path: &'a str, error: Option<&'a str>) -> Entry<'a> {
        Entry {
            unix_time: UNIX_EPOCH + Duration::from_millis(1_790_000_000_123),
            id: "7f",
            listener: "public",
            client: ClientAddress::Socket("192.0.2.1:4711".parse().unwrap()),
            method: "GET",
            host: "shop.example",
            path,
            version: "HTTP/1.1",
            route: Some("orders"),
            service: None,
            tenant: "acme",
            status: 200,
            duration: Duration::from_micros(1234),
            variants: "",
            upstream: Some("origin"),
            request_body: PayloadBytes(0),
            response_body: PayloadBytes(u64::MAX),
            error,
            client_leg: None,
            attempts: ["10.0.0.1:80", "[2001:db8::1]:443"]
                .map(|peer| Attempt {
                    peer: peer.parse().unwrap(),
                    timing: AttemptTiming {
                        connected: Some(Duration::from_micros(7)),
                        status: Some(200),
                        ..AttemptTiming::default()
                    },
                    leg: None,
                    span: None,
                })
                .into(),
            trace: None,
            trace_state: None,
        }
    }

    #[test]
    fn a_line_is_json_whatever_a_client_sends() {
        let odd = "/a\"b\\c\n\u{1}é";
        let mut out = Vec::new();
        write_line(
            &mut out,
            entry(odd, Some("upstream: \"gone\"")),
            &mut Settled,
        );
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        let line: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(line["path"], odd);
        assert_eq!(line["client"], "192.0.2.1:4711");
        assert_eq!(line["error"], "upstream: \"gone\"");
        assert_eq!(line["unix_ms"], 1_790_000_000_123_u64);
        assert_eq!(line["response_body_bytes"], u64::MAX);
        assert_eq!(line["service"], serde_json::Value::Null);
        assert_eq!(line["variants"], serde_json::Value::Null);
        assert_eq!(line["wire_settled"], true);
        assert_eq!(line["upstream"][0]["peer"], "10.0.0.1:80");
        assert_eq!(line["upstream"][1]["peer"], "[2001:db8::1]:443");
        assert_eq!(line["upstream"][1]["connected_us"], 7);
        assert_eq!(line["upstream"][1]["ended_us"], serde_json::Value::Null);
    }

    #[test]
    fn a_full_queue_loses_lines_countably() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = AccessLog::start(&config::AccessLog {
            target: AccessLogTarget::File(path.clone()),
            queue: 5,
            settle: Duration::from_secs(1),
        })
        .unwrap();
        for _ in 0..50_000 {
            log.push(entry("/", None));
        }
        log.close();
        let written = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(log.lost() > 0);
        assert_eq!(written as u64 + log.lost(), 50_000);
    }
}
