//! Changes of one order: cancel, pay, refund.

use std::collections::BTreeMap;

use axum::Extension;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{LineRequest, not_found, render};
use crate::catalogue::Sku;
use crate::command::cancel::Cancel;
use crate::command::pay::Pay;
use crate::command::refund::RefundOrder;
use crate::command::{Effect, Expected, Keyed};
use crate::event::Origin;
use crate::http::keyed::{self, expected, json, key};
use crate::http::problem::{Kind, Problem, ProblemDocument};
use crate::http::{Shared, principal};
use crate::idempotency::{Fingerprint, Scope};
use crate::order::{Draft, Order, OrderId};
use crate::trace::TraceId;

/// Longest reason of a refund, in bytes.
const REASON_LEN_MAX: usize = 200;

/// The body of a request to refund; `{}` refunds everything that is left.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct RefundRequest<'a> {
    /// The units that go back; without it, all that are left.
    #[serde(borrow, default)]
    lines: Option<Vec<LineRequest<'a>>>,
    /// Whether they are for sale again.
    #[serde(default = "yes")]
    restock: bool,
    /// Why.
    #[serde(default)]
    #[schema(max_length = 200)]
    reason: String,
}

const fn yes() -> bool {
    true
}

/// What every change of one order is asked with.
struct Change {
    scope: Scope,
    fingerprint: Fingerprint,
    subject: Subject,
}

/// Which order, and on whose behalf.
struct Subject {
    principal: String,
    origin: Origin,
    order: OrderId,
    expected: Expected,
}

impl Change {
    fn parse(
        headers: &HeaderMap,
        trace: TraceId,
        route: &'static str,
        id: &str,
        body: &[u8],
    ) -> Result<Self, Problem> {
        let principal = principal(headers)?;
        let key = key(headers)?;
        let order = OrderId::parse(id).ok_or_else(not_found)?;
        Ok(Self {
            scope: Scope {
                principal: principal.clone(),
                route,
                key,
            },
            fingerprint: Fingerprint::of_request(id, body),
            subject: Subject {
                origin: Origin {
                    actor: principal.clone(),
                    trace,
                },
                principal,
                order,
                expected: expected(headers),
            },
        })
    }

    async fn run<E: Effect>(
        self,
        shared: &Shared,
        effect: impl FnOnce(Subject) -> E,
    ) -> Result<Response, Problem> {
        let keyed = Keyed {
            scope: self.scope,
            fingerprint: self.fingerprint,
            effect: effect(self.subject),
        };
        keyed::run(shared, keyed).await
    }
}

/// A body that says nothing.
fn require_empty(body: &[u8]) -> Result<(), Problem> {
    if body.is_empty() || body.trim_ascii() == b"{}" {
        return Ok(());
    }
    Err(Problem::new(
        Kind::MalformedBody,
        "This request takes no body.",
    ))
}

/// Cancels an unpaid order; its stock is free again.
#[utoipa::path(
    post, path = "/api/v1/orders/{id}/cancel", tag = "orders",
    params(
        ("id" = String, Path, format = Uuid, description = "The order"),
        ("Idempotency-Key" = String, Header, description = "Names the intended effect", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$"),
        ("If-Match" = Option<String>, Header, description = "Only this version"),
    ),
    responses(
        (status = 200, description = "Cancelled", body = Order, headers(("etag" = String, description = "Its version"))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(in crate::http) async fn cancel(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = keyed::body(&headers, body)?;
    require_empty(&body)?;
    let change = Change::parse(&headers, trace, "POST /api/v1/orders/{id}/cancel", &id, &[])?;
    change
        .run(&shared, |subject| Cancel {
            principal: subject.principal,
            origin: subject.origin,
            order: subject.order,
            expected: subject.expected,
            render,
        })
        .await
}

/// Pays an order: at once, or 202 and the provider decides.
#[utoipa::path(
    post, path = "/api/v1/orders/{id}/pay", tag = "orders",
    params(
        ("id" = String, Path, format = Uuid, description = "The order"),
        ("Idempotency-Key" = String, Header, description = "Names the intended effect", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$"),
        ("If-Match" = Option<String>, Header, description = "Only this version"),
    ),
    responses(
        (status = 200, description = "Paid", body = Order, headers(("etag" = String, description = "Its version"))),
        (status = 202, description = "The provider was asked", body = Order, headers(("etag" = String, description = "Its version"))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(in crate::http) async fn pay(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = keyed::body(&headers, body)?;
    require_empty(&body)?;
    let change = Change::parse(&headers, trace, "POST /api/v1/orders/{id}/pay", &id, &[])?;
    change
        .run(&shared, |subject| Pay {
            principal: subject.principal,
            origin: subject.origin,
            order: subject.order,
            expected: subject.expected,
            provider: shared.provider,
            render,
        })
        .await
}

/// Refunds a paid order, or some units of it.
#[utoipa::path(
    post, path = "/api/v1/orders/{id}/refund", tag = "orders",
    params(
        ("id" = String, Path, format = Uuid, description = "The order"),
        ("Idempotency-Key" = String, Header, description = "Names the intended effect", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$"),
        ("If-Match" = Option<String>, Header, description = "Only this version"),
    ),
    request_body = RefundRequest<'_>,
    responses(
        (status = 200, description = "Refunded", body = Order, headers(("etag" = String, description = "Its version"))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(in crate::http) async fn refund(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = keyed::body(&headers, body)?;
    let request: RefundRequest<'_> = json(&body)?;
    let invalid = |detail: String| Problem::new(Kind::InvalidOrder, detail);
    if request.reason.len() > REASON_LEN_MAX {
        return Err(invalid(format!(
            "The reason may have {REASON_LEN_MAX} bytes."
        )));
    }
    let lines = match &request.lines {
        None => None,
        Some(lines) => {
            // The same rules as for an order: summed, positive, bounded.
            let draft = Draft::new(lines.iter().map(|line| (&*line.sku, line.quantity)));
            let draft = draft.map_err(|error| invalid(error.to_string()))?;
            let lines: BTreeMap<Sku, u32> = draft
                .lines()
                .map(|(sku, units)| (sku.clone(), units))
                .collect();
            Some(lines)
        }
    };
    let change = Change::parse(
        &headers,
        trace,
        "POST /api/v1/orders/{id}/refund",
        &id,
        &body,
    )?;
    change
        .run(&shared, |subject| RefundOrder {
            principal: subject.principal,
            origin: subject.origin,
            order: subject.order,
            expected: subject.expected,
            lines,
            restock: request.restock,
            reason: request.reason,
            provider: shared.provider,
            render,
        })
        .await
}
