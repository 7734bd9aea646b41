//! Orders over HTTP: place, show, list, cancel, pay, refund, and what happened to them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::Json;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::keyed::{self, expected, json, key};
use super::problem::{Kind, Problem, ProblemDocument};
use super::{PageQuery, Shared, experiments, principal, route};
use crate::catalogue::Sku;
use crate::command::cancel::Cancel;
use crate::command::pay::Pay;
use crate::command::place::{Place, Placed, Terms};
use crate::command::refund::RefundOrder;
use crate::command::{Answer, Keyed, Verdict};
use crate::discount::COUPONS_MAX;
use crate::event::{Event, Origin};
use crate::gate::{Admission, Gate};
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::metrics::RefusalReason;
use crate::order::{Draft, Order, OrderId};
use crate::payment::Payment;
use crate::trace::TraceId;

/// Longest reason of a refund, in bytes.
const REASON_LEN_MAX: usize = 200;

/// The body of a request to place an order.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OrderRequest<'a> {
    /// Lines of one SKU are summed.
    #[serde(borrow)]
    #[schema(min_items = 1, max_items = 100)]
    lines: Vec<LineRequest<'a>>,
    /// Coupon codes.
    #[serde(default)]
    #[schema(max_items = 5)]
    coupons: Vec<String>,
}

/// One line of a request.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LineRequest<'a> {
    /// What.
    #[serde(borrow)]
    #[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,64}$", example = "1001")]
    sku: Cow<'a, str>,
    /// How many units.
    #[schema(minimum = 1, maximum = 10000, example = 1)]
    quantity: u32,
}

/// The body of a request to refund; `{}` refunds everything that is left.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RefundRequest<'a> {
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

/// Places an order: reserves its stock until its deadline.
#[utoipa::path(
    post, path = "/api/v1/orders", tag = "orders",
    params(("Idempotency-Key" = String, Header, description = "Names the intended effect; the same key gives the same answer", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$")),
    request_body = OrderRequest<'_>,
    responses(
        (status = 201, description = "Committed", body = Order,
            headers(("location" = String, description = "The order"), ("etag" = String, description = "Its version")),
            links(
                ("show" = (operation_id = "show", parameters(("id" = "$response.body#/id")))),
                ("cancel" = (operation_id = "cancel", parameters(("id" = "$response.body#/id")))),
                ("pay" = (operation_id = "pay", parameters(("id" = "$response.body#/id")))),
                ("refund" = (operation_id = "refund", parameters(("id" = "$response.body#/id")))),
                ("events" = (operation_id = "events", parameters(("id" = "$response.body#/id"))))
            )),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn place(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let order = parse(&shared, trace, &headers, body)
        .inspect_err(|_| shared.metrics.order_refused(RefusalReason::InvalidRequest))?;
    let unit = experiments::unit(&headers).map(str::to_owned);
    let (active, variants) = (
        shared.campaigns.active(),
        order.effect.terms.variants.clone(),
    );
    let began = Instant::now();
    let answer = match &shared.gate {
        None => keyed::queue(&shared, order).await,
        Some(gate) => through_gate(&shared, gate, order).await,
    };
    shared.metrics.deducted(began.elapsed());
    let answer = answer?;
    if let (Answer::Done(_, Placed::Order { id, total, .. }), Some(unit)) = (&answer, &unit)
        && !active.campaign.experiments.is_empty()
    {
        // An order is an exposure too: its price may depend on the variant.
        shared.campaigns.exposed(&active, unit, &variants);
        shared
            .campaigns
            .ordered(unit, id.to_string(), total.minor());
    }
    keyed::respond(answer)
}

/// Asks the gate first; what the ledger says counts, and teaches the gate.
async fn through_gate(
    shared: &Shared,
    gate: &Gate,
    mut order: Keyed<Place>,
) -> Result<Answer<Placed>, Problem> {
    let reservation = Gate::reservation(&order.scope);
    let admission = gate.admit(&reservation, &order.effect.draft).await;
    order.effect.is_sold_out = matches!(admission, Admission::SoldOut(_));
    let answer = keyed::queue(shared, order).await;
    let is_placed = matches!(&answer, Ok(Answer::Done(_, Placed::Order { .. })));
    let ran_out = matches!(
        &answer,
        Ok(Answer::Done(
            _,
            Placed::Refused(RefusalReason::InsufficientStock)
        ))
    );
    match admission {
        Admission::Admitted => {
            gate.settle(&reservation, is_placed).await;
            if ran_out {
                gate.mark_stale();
            }
        }
        Admission::SoldOut(_) if is_placed => gate.mark_stale(),
        Admission::SoldOut(_) | Admission::Unknown => {}
    }
    answer
}

/// The whole request, parsed once.
fn parse(
    shared: &Shared,
    trace: TraceId,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Keyed<Place>, Problem> {
    let principal = principal(headers)?;
    let key = key(headers)?;
    let body = keyed::body(headers, body)?;
    let request: OrderRequest<'_> = json(&body)?;
    let lines = request.lines.iter().map(|line| (&*line.sku, line.quantity));
    let draft =
        Draft::new(lines).map_err(|error| Problem::new(Kind::InvalidOrder, error.to_string()))?;
    if request.coupons.len() > COUPONS_MAX {
        let detail = format!("An order takes {COUPONS_MAX} coupons.");
        return Err(Problem::new(Kind::InvalidOrder, detail));
    }
    let active = shared.campaigns.active();
    let terms = Terms {
        rules: Arc::clone(&active.campaign.discounts),
        member: shared.issuer.member(headers)?,
        coupons: request.coupons,
        variants: experiments::variants(&active, headers, experiments::unit(headers)),
    };
    Ok(Keyed {
        scope: Scope {
            principal: principal.clone(),
            route: "POST /api/v1/orders",
            key,
        },
        fingerprint: Fingerprint::of(&body),
        effect: Place {
            origin: Origin {
                actor: principal.clone(),
                trace,
            },
            principal,
            draft,
            terms,
            hold: shared.hold,
            is_sold_out: false,
            render,
        },
    })
}

/// What every change of one order is asked with.
struct Change {
    scope: Scope,
    fingerprint: Fingerprint,
    principal: String,
    origin: Origin,
    order: OrderId,
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
            origin: Origin {
                actor: principal.clone(),
                trace,
            },
            principal,
            order,
        })
    }
}

fn not_found() -> Problem {
    Problem::new(Kind::NotFound, "There is no such order.")
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
pub(super) async fn cancel(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = keyed::body(&headers, body)?;
    require_empty(&body)?;
    let change = Change::parse(&headers, trace, "POST /api/v1/orders/{id}/cancel", &id, &[])?;
    let effect = Cancel {
        principal: change.principal,
        origin: change.origin,
        order: change.order,
        expected: expected(&headers),
        render,
    };
    keyed::run(
        &shared,
        Keyed {
            scope: change.scope,
            fingerprint: change.fingerprint,
            effect,
        },
    )
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
pub(super) async fn pay(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = keyed::body(&headers, body)?;
    require_empty(&body)?;
    let change = Change::parse(&headers, trace, "POST /api/v1/orders/{id}/pay", &id, &[])?;
    let effect = Pay {
        principal: change.principal,
        origin: change.origin,
        order: change.order,
        expected: expected(&headers),
        provider: shared.provider,
        render,
    };
    keyed::run(
        &shared,
        Keyed {
            scope: change.scope,
            fingerprint: change.fingerprint,
            effect,
        },
    )
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
pub(super) async fn refund(
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
    let effect = RefundOrder {
        principal: change.principal,
        origin: change.origin,
        order: change.order,
        expected: expected(&headers),
        lines,
        restock: request.restock,
        reason: request.reason,
        provider: shared.provider,
        render,
    };
    keyed::run(
        &shared,
        Keyed {
            scope: change.scope,
            fingerprint: change.fingerprint,
            effect,
        },
    )
    .await
}

/// The answer as it is stored with the order.
fn render(verdict: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    let (status, location, order, json) = match verdict {
        Verdict::Refused(refusal) => return Problem::from(*refusal).reply(),
        Verdict::Placed(order, json) => {
            let location = format!("{}/{}", route::ORDERS, order.id);
            (StatusCode::CREATED, Some(location), order, json)
        }
        Verdict::Changed(order, json) => (StatusCode::OK, None, order, json),
        Verdict::Accepted(order, json) => (StatusCode::ACCEPTED, None, order, json),
    };
    Ok(Reply {
        status: status.as_u16(),
        content_type: "application/json".to_owned(),
        location,
        etag: Some(order.etag()),
        body: json.as_bytes().to_vec(),
    })
}

/// Shows one order.
#[utoipa::path(
    get, path = "/api/v1/orders/{id}", tag = "orders",
    params(
        ("id" = String, Path, format = Uuid, description = "The order"),
        ("If-None-Match" = Option<String>, Header, description = "The version already known"),
    ),
    responses(
        (status = 200, description = "The order", body = Order, headers(("etag" = String, description = "Its version"))),
        (status = 304, description = "It is the version already known"),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn show(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let principal = principal(&headers)?;
    let id = OrderId::parse(&id).ok_or_else(not_found)?;
    let order = shared
        .store
        .order(principal, id)
        .await?
        .ok_or_else(not_found)?;
    let etag = order.etag();
    if is_current(&headers, &etag) {
        Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response())
    } else {
        Ok(([(header::ETAG, etag)], Json(order)).into_response())
    }
}

/// Whether `If-None-Match` names the tag. Compared weakly, as RFC 9110 asks for reads.
fn is_current(headers: &HeaderMap, etag: &str) -> bool {
    headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

/// A page of orders.
#[derive(Serialize, ToSchema)]
pub(super) struct OrderPage {
    /// In the order they were written.
    orders: Vec<Order>,
    /// The `after` of the next page; null on the last.
    #[schema(required = true)]
    next: Option<OrderId>,
}

/// Lists orders in the order they were written.
#[utoipa::path(
    get, path = "/api/v1/orders", tag = "orders",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = OrderPage),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn list(
    State(shared): State<Shared>,
    headers: HeaderMap,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let unknown = || Problem::new(Kind::BadRequest, "`after` names no order of yours.");
    let principal = principal(&headers)?;
    let (limit, after) = PageQuery::parse(query)?;
    let after = after
        .map(|id| OrderId::parse(&id).ok_or_else(unknown))
        .transpose()?;
    let page = shared
        .store
        .orders(principal, after, limit)
        .await?
        .ok_or_else(unknown)?;
    let next = page
        .items
        .last()
        .filter(|_| page.more)
        .map(|order| order.id);
    Ok(Json(OrderPage {
        orders: page.items,
        next,
    })
    .into_response())
}

/// What happened to an order: who changed it when, in which trace, and how it was then.
#[utoipa::path(
    get, path = "/api/v1/orders/{id}/events", tag = "orders",
    params(("id" = String, Path, format = Uuid, description = "The order")),
    responses(
        (status = 200, description = "In the order they happened", body = Vec<Event>),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn events(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Vec<Event>>, Problem> {
    let principal = principal(&headers)?;
    let id = OrderId::parse(&id).ok_or_else(not_found)?;
    let events = shared.store.order_events(principal, id).await?;
    events.map(Json).ok_or_else(not_found)
}

/// The payments of an order, as the provider's events add up.
#[utoipa::path(
    get, path = "/api/v1/orders/{id}/payments", tag = "orders",
    params(("id" = String, Path, format = Uuid, description = "The order")),
    responses(
        (status = 200, description = "Oldest first", body = Vec<Payment>),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn payments(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Vec<Payment>>, Problem> {
    let principal = principal(&headers)?;
    let id = OrderId::parse(&id).ok_or_else(not_found)?;
    let payments = shared.store.order_payments(principal, id).await?;
    payments.map(Json).ok_or_else(not_found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn entity_tags_compare_weakly_and_in_lists() {
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(header::IF_NONE_MATCH, HeaderValue::from_static(value))])
        };
        for current in ["\"1\"", "W/\"1\"", "\"0\", \"1\"", "*"] {
            assert!(is_current(&headers(current), "\"1\""), "{current}");
        }
        for stale in ["\"2\"", "1", "\"11\""] {
            assert!(!is_current(&headers(stale), "\"1\""), "{stale}");
        }
        assert!(!is_current(&HeaderMap::new(), "\"1\""));
    }
}
