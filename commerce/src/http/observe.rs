//! One count and one duration per request, recorded on drop.
//!
//! When a client disconnects, its handler's future is dropped instead of finished. The
//! guard records that as `cancelled`, so that the counters never lose a request.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::route;
use crate::metrics::Metrics;
use crate::trace::TraceId;

pub(super) async fn observe(
    State(metrics): State<Metrics>,
    mut request: Request,
    next: Next,
) -> Response {
    metrics.request_began();
    let mut record = Record {
        route: template(request.extensions().get::<MatchedPath>()),
        method: method(request.method()),
        status_class: "cancelled",
        started: Instant::now(),
        metrics,
    };
    let trace = trace(request.headers());
    request.extensions_mut().insert(trace.clone());
    let response = next.run(request).await;
    let status = response.status();
    record.status_class = class(status);
    let (route, method, trace_id) = (record.route, record.method, trace.as_str());
    if status.is_server_error() {
        tracing::warn!(trace_id, route, method, status = status.as_u16(), "failed");
    } else {
        tracing::debug!(
            trace_id,
            route,
            method,
            status = status.as_u16(),
            "answered"
        );
    }
    response
}

/// The gateway's trace, or a new one.
fn trace(headers: &HeaderMap) -> TraceId {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    TraceId::of(text("traceparent"), text("x-request-id"))
}

/// A request under way.
struct Record {
    route: &'static str,
    method: &'static str,
    status_class: &'static str,
    started: Instant,
    metrics: Metrics,
}

impl Drop for Record {
    fn drop(&mut self) {
        let Self {
            route,
            method,
            status_class,
            started,
            metrics,
        } = self;
        metrics.request_ended(route, method, status_class, started.elapsed());
    }
}

/// The template a path matched. Unknown paths share a value: clients choose paths, and
/// must not choose labels.
fn template(matched: Option<&MatchedPath>) -> &'static str {
    matched
        .and_then(|matched| {
            route::ALL
                .iter()
                .copied()
                .find(|template| *template == matched.as_str())
        })
        .unwrap_or("unmatched")
}

fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

fn class(status: StatusCode) -> &'static str {
    match status.as_u16() {
        100..=199 => "1xx",
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}
