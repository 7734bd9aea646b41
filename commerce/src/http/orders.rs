//! Orders over HTTP: place, show, list.

use axum::Json;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::problem::{Kind, Problem};
use super::{BODY_BYTES_MAX, PageQuery, Shared, principal, route};
use crate::idempotency::{Fingerprint, Key, Reply, Scope};
use crate::metrics::RefusalReason;
use crate::order::{Draft, Order, OrderId};
use crate::store::{PlaceOrder, Placement, StoreError, Verdict};

/// The scope of keys for placing orders.
const PLACE_ROUTE: &str = "POST /api/v1/orders";

/// The body of a request to place an order.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderRequest<'a> {
    #[serde(borrow)]
    lines: Vec<LineRequest<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineRequest<'a> {
    #[serde(borrow)]
    sku: std::borrow::Cow<'a, str>,
    quantity: u32,
}

/// `POST /api/v1/orders`
pub(super) async fn place(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let order = parse(&headers, body)
        .inspect_err(|_| shared.metrics.order_refused(RefusalReason::InvalidRequest))?;
    let placement = shared.store.place(order).await.inspect_err(|error| {
        // The writer counts what reached it.
        if matches!(error, StoreError::QueueFull | StoreError::Closed) {
            shared.metrics.order_refused(RefusalReason::Overloaded);
        }
    })?;
    match placement {
        Placement::Placed { reply, .. } | Placement::Refused { reply, .. } => send(reply),
        Placement::Replayed(reply) => {
            let mut response = send(reply)?;
            response
                .headers_mut()
                .insert("idempotency-replayed", HeaderValue::from_static("true"));
            Ok(response)
        }
        Placement::KeyReused => Err(Problem::new(
            Kind::IdempotencyKeyReused,
            "This Idempotency-Key was used with another body; take a new key for a new order.",
        )),
    }
}

/// The whole request, parsed once.
fn parse(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<PlaceOrder, Problem> {
    let scope = Scope {
        principal: principal(headers)?,
        route: PLACE_ROUTE,
        key: key(headers)?,
    };
    require_json(headers)?;
    let body = body.map_err(refuse_body)?;
    // The message of the parser names line and column.
    let request: OrderRequest<'_> = serde_json::from_slice(&body)
        .map_err(|error| Problem::new(Kind::MalformedBody, error.to_string()))?;
    let lines = request.lines.iter().map(|line| (&*line.sku, line.quantity));
    let draft =
        Draft::new(lines).map_err(|error| Problem::new(Kind::InvalidOrder, error.to_string()))?;
    Ok(PlaceOrder {
        scope,
        fingerprint: Fingerprint::of(&body),
        draft,
        render,
    })
}

fn key(headers: &HeaderMap) -> Result<Key, Problem> {
    let refuse = |detail: String| Problem::new(Kind::InvalidIdempotencyKey, detail);
    let mut values = headers.get_all("idempotency-key").iter();
    match (values.next(), values.next()) {
        (Some(value), None) => {
            Key::parse(value.as_bytes()).map_err(|error| refuse(error.to_string()))
        }
        (None, _) => Err(refuse("The Idempotency-Key header is required.".to_owned())),
        (Some(_), Some(_)) => Err(refuse(
            "The Idempotency-Key header must occur once.".to_owned(),
        )),
    }
}

/// A missing media type is taken for JSON; another one is a mistake worth naming.
fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let media_type = value
        .as_bytes()
        .split(|&byte| byte == b';')
        .next()
        .unwrap_or_default();
    if media_type
        .trim_ascii()
        .eq_ignore_ascii_case(b"application/json")
    {
        Ok(())
    } else {
        Err(Problem::new(
            Kind::UnsupportedMediaType,
            "The body must be application/json.",
        ))
    }
}

fn refuse_body(rejected: BytesRejection) -> Problem {
    if rejected.status() == StatusCode::PAYLOAD_TOO_LARGE {
        Problem::new(
            Kind::BodyTooLarge,
            format!("The body may have {BODY_BYTES_MAX} bytes."),
        )
    } else {
        Problem::new(Kind::BadRequest, "The body could not be read.")
    }
}

/// The answer as it is stored with the order.
fn render(verdict: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    match verdict {
        Verdict::Placed(order) => Ok(Reply {
            status: StatusCode::CREATED.as_u16(),
            content_type: "application/json".to_owned(),
            location: Some(format!("{}/{}", route::ORDERS, order.id)),
            etag: Some(order.etag()),
            body: serde_json::to_vec(order)?,
        }),
        Verdict::Refused(refusal) => Problem::from(*refusal).reply(),
    }
}

fn send(reply: Reply) -> Result<Response, Problem> {
    let mut response = Response::builder()
        .status(reply.status)
        .header(header::CONTENT_TYPE, reply.content_type);
    for (name, value) in [
        (header::LOCATION, reply.location),
        (header::ETAG, reply.etag),
    ] {
        if let Some(value) = value {
            response = response.header(name, value);
        }
    }
    response.body(reply.body.into()).map_err(|error| {
        tracing::error!(%error, "a stored answer is not a response");
        Problem::new(Kind::Internal, "The stored answer could not be sent.")
    })
}

/// `GET /api/v1/orders/{id}`
pub(super) async fn show(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let not_found = || Problem::new(Kind::NotFound, "There is no such order.");
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
#[derive(Serialize)]
struct OrderPage {
    orders: Vec<Order>,
    /// The `after` of the next page; null on the last.
    next: Option<OrderId>,
}

/// `GET /api/v1/orders?limit=&after=`, in the order of commitment.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn entity_tags_compare_weakly_and_in_lists() {
        for current in ["\"1\"", "W/\"1\"", "\"0\", \"1\"", "*"] {
            assert!(
                is_current(&headers(header::IF_NONE_MATCH, current), "\"1\""),
                "{current}"
            );
        }
        for stale in ["\"2\"", "1", "\"11\""] {
            assert!(
                !is_current(&headers(header::IF_NONE_MATCH, stale), "\"1\""),
                "{stale}"
            );
        }
        assert!(!is_current(&HeaderMap::new(), "\"1\""));
    }

    #[test]
    fn only_json_is_taken() {
        for fine in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(
                require_json(&headers(header::CONTENT_TYPE, fine)).is_ok(),
                "{fine}"
            );
        }
        for wrong in ["text/plain", "application/jsonx", ""] {
            assert!(
                require_json(&headers(header::CONTENT_TYPE, wrong)).is_err(),
                "{wrong}"
            );
        }
    }
}
