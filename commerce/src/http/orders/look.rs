//! Reads of orders: one, a page, what happened to one, its payments.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::not_found;
use crate::event::Event;
use crate::http::problem::{Kind, Problem, ProblemDocument};
use crate::http::{PageQuery, Shared, principal};
use crate::order::{Order, OrderId};
use crate::payment::Payment;

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
pub(in crate::http) async fn show(
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
pub(in crate::http) struct OrderPage {
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
pub(in crate::http) async fn list(
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
pub(in crate::http) async fn events(
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
pub(in crate::http) async fn payments(
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
