//! A finished request as spans: one for the request, one for each attempt at a peer. Names of
//! attributes are OpenTelemetry's semantic conventions where there are any.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Recorded,
    message::{
        KeyValue, Resource, ResourceSpans, Scope, ScopeSpans, Span, Status, TraceRequest, flag,
        int, text,
    },
};
use crate::access_log::{Attempt, Leg};

const SERVER: i32 = 2;
const CLIENT: i32 = 3;
const ERROR: i32 = 2;

/// Who tells.
pub(super) fn resource(service_name: &str, instance: &str) -> Resource {
    Resource {
        attributes: vec![
            text("service.name", service_name),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("service.instance.id", instance),
        ],
    }
}

/// By what.
pub(super) fn scope() -> Scope {
    Scope {
        name: "edgemeter".into(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

/// One message.
pub(super) fn request(resource: &Resource, entries: &[Box<Recorded>]) -> TraceRequest {
    let spans = entries.iter().flat_map(|entry| spans(entry)).collect();
    TraceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope()),
                spans,
            }],
        }],
    }
}

/// Spans in a message.
pub(super) fn count(request: &TraceRequest) -> u64 {
    let resources = request.resource_spans.iter();
    let scopes = resources.flat_map(|spans| &spans.scope_spans);
    scopes.map(|spans| spans.spans.len() as u64).sum()
}

fn spans(entry: &Recorded) -> Vec<Span> {
    let began = entry
        .unix_time
        .checked_sub(entry.duration)
        .unwrap_or(entry.unix_time);
    let mut spans = vec![request_span(entry, began)];
    let attempts = entry.attempts.iter();
    spans.extend(attempts.filter_map(|attempt| attempt_span(entry, attempt, began)));
    spans
}

fn request_span(entry: &Recorded, began: SystemTime) -> Span {
    let (trace, route) = (&entry.trace, &entry.route);
    let mut attributes = vec![
        text("http.request.method", &entry.method),
        text("url.path", &entry.path),
        text("server.address", &entry.host),
        text("client.address", &entry.client),
        text(
            "network.protocol.version",
            entry.version.trim_start_matches("HTTP/"),
        ),
        int("http.response.status_code", entry.status.into()),
        int("http.request.body.size", entry.request_body.0),
        int("http.response.body.size", entry.response_body.0),
        text("edgemeter.listener", &entry.listener),
        text("edgemeter.tenant", &entry.tenant),
        text("edgemeter.request_id", &entry.id),
    ];
    attributes.extend(route.clone().map(|route| text("http.route", route)));
    attributes.extend((entry.service.clone()).map(|name| text("edgemeter.service", name)));
    attributes.extend(wire(entry.client_leg.as_ref()));
    Span {
        name: format!("{} {}", entry.method, route.as_deref().unwrap_or("(none)")),
        kind: SERVER,
        span_id: trace.span.0.to_vec(),
        parent_span_id: trace
            .parent
            .map(|parent| parent.0.to_vec())
            .unwrap_or_default(),
        start_time_unix_nano: nanos(began),
        end_time_unix_nano: nanos(entry.unix_time),
        attributes,
        // A client's mistake is no error of a server's.
        status: status(
            entry.status == 0 || entry.status >= 500,
            entry.error.as_deref(),
        ),
        ..in_trace(entry)
    }
}

fn attempt_span(entry: &Recorded, attempt: &Attempt, began: SystemTime) -> Option<Span> {
    let span = attempt.span?;
    let timing = &attempt.timing;
    let at = |since: Duration| nanos(began + since);
    let upstream = entry.upstream.as_deref().unwrap_or_default();
    let mut attributes = vec![
        text("server.address", attempt.peer.ip().to_string()),
        int("server.port", attempt.peer.port().into()),
        text("edgemeter.upstream", upstream),
        flag("edgemeter.connection.reused", timing.reused),
    ];
    let status_code = timing.status.map(u64::from);
    attributes.extend(status_code.map(|code| int("http.response.status_code", code)));
    let micros = |since: Duration| u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
    for (key, since) in [
        ("edgemeter.connected_us", timing.connected),
        ("edgemeter.answered_us", timing.answered),
    ] {
        attributes.extend(since.map(|since| int(key, micros(since.saturating_sub(timing.began)))));
    }
    attributes.extend(wire(attempt.leg.as_ref()));
    let failed = timing.error.is_some() || timing.status.is_some_and(|status| status >= 400);
    Some(Span {
        name: format!("{} {upstream}", entry.method),
        kind: CLIENT,
        span_id: span.0.to_vec(),
        parent_span_id: entry.trace.span.0.to_vec(),
        start_time_unix_nano: at(timing.began),
        end_time_unix_nano: at(timing.ended.unwrap_or(entry.duration)),
        attributes,
        status: status(failed, timing.error.as_deref()),
        ..in_trace(entry)
    })
}

fn in_trace(entry: &Recorded) -> Span {
    Span {
        trace_id: entry.trace.id.0.to_vec(),
        trace_state: entry.trace_state.clone(),
        ..Span::default()
    }
}

fn status(failed: bool, why: Option<&str>) -> Option<Status> {
    failed.then(|| Status {
        message: why.unwrap_or_default().to_owned(),
        code: ERROR,
    })
}

/// What the kernel counted on a connection for this request.
fn wire(leg: Option<&Leg>) -> Vec<KeyValue> {
    let Some(leg) = leg else {
        return Vec::new();
    };
    let (sent, retransmits) = leg.sent();
    let mut attributes = vec![
        int("edgemeter.wire.received_bytes", leg.received_wire_bytes),
        text("edgemeter.wire.quality", leg.quality.as_str()),
        int("edgemeter.connection.cookie", leg.connection.cookie()),
        int("edgemeter.rtt_us", leg.srtt_us.into()),
    ];
    for (key, value) in [
        ("edgemeter.wire.sent_bytes", sent),
        ("edgemeter.wire.retransmits", retransmits),
    ] {
        attributes.extend(value.map(|value| int(key, value)));
    }
    attributes
}

pub(super) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
