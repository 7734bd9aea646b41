//! Subscriptions to one's own events, and the payment provider's callbacks.

use axum::Extension;
use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::keyed::{self, key};
use super::problem::{Kind, Problem, ProblemDocument};
use super::{Shared, principal};
use crate::command::Keyed;
use crate::command::pay::Provider;
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::provider::{self, Notice};
use crate::relay::sink::{self, Sink, Subscribe, Unsubscribe};
use crate::store::unix_time_ms;
use crate::trace::TraceId;
use crate::webhook;

/// Longest address, in bytes.
const URL_LEN_MAX: usize = 2048;

/// The body of a request to subscribe.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SubscribeRequest {
    /// Where events are posted.
    #[schema(
        pattern = "^https?://[a-z0-9.]+(:[0-9]{1,4})?/[a-z0-9/]*$",
        max_length = 2048,
        example = "http://127.0.0.1:9/hook"
    )]
    url: String,
}

/// A new subscription with its secret, which is shown only here.
#[derive(Serialize, ToSchema)]
pub(super) struct Subscribed<'a> {
    #[serde(flatten)]
    sink: &'a Sink,
    /// Signs the events: Standard Webhooks.
    secret: &'a str,
}

/// Subscribes to this tenant's events from now on.
#[utoipa::path(
    post, path = "/api/v1/webhooks", tag = "webhooks",
    params(("Idempotency-Key" = String, Header, description = "Names the intended effect", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$")),
    request_body = SubscribeRequest,
    responses(
        (status = 201, description = "Subscribed", body = Subscribed<'_>,
            links(("unsubscribe" = (operation_id = "unsubscribe", parameters(("id" = "$response.body#/id")))))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn subscribe(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let principal = principal(&headers)?;
    let key = key(&headers)?;
    let body = keyed::body(&headers, body)?;
    let request: SubscribeRequest = serde_json::from_slice(&body)
        .map_err(|error| Problem::new(Kind::MalformedBody, error.to_string()))?;
    let url = reqwest::Url::parse(&request.url)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .filter(|url| url.has_host() && request.url.len() <= URL_LEN_MAX);
    if url.is_none() {
        return Err(Problem::new(
            Kind::InvalidOrder,
            "`url` must be an https:// or http:// address.",
        ));
    }
    let keyed = Keyed {
        scope: Scope {
            principal: principal.clone(),
            route: "POST /api/v1/webhooks",
            key,
        },
        fingerprint: Fingerprint::of(&body),
        effect: Subscribe {
            principal,
            url: request.url,
            render,
        },
    };
    let response = keyed::run(&shared, keyed).await?;
    shared
        .sinks
        .send_modify(|count| *count = count.wrapping_add(1));
    Ok(response)
}

fn render(sink: &Sink) -> Result<Reply, serde_json::Error> {
    Ok(Reply {
        status: StatusCode::CREATED.as_u16(),
        content_type: "application/json".to_owned(),
        location: None,
        etag: None,
        body: serde_json::to_vec(&Subscribed {
            sink,
            secret: &sink.secret,
        })?,
    })
}

/// This tenant's subscriptions.
#[utoipa::path(
    get, path = "/api/v1/webhooks", tag = "webhooks", operation_id = "subscriptions",
    responses(
        (status = 200, description = "Oldest first", body = Vec<Sink>),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn list(
    State(shared): State<Shared>,
    headers: HeaderMap,
) -> Result<Json<Vec<Sink>>, Problem> {
    let principal = principal(&headers)?;
    let found = shared
        .store
        .read(move |connection| sink::of_principal(connection, &principal))
        .await?;
    Ok(Json(found))
}

/// Ends a subscription.
#[utoipa::path(
    delete, path = "/api/v1/webhooks/{id}", tag = "webhooks",
    params(("id" = String, Path, description = "The subscription")),
    responses(
        (status = 204, description = "Ended"),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn unsubscribe(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let principal = principal(&headers)?;
    if !shared.store.run(Unsubscribe { principal, id }).await? {
        return Err(Problem::new(
            Kind::NotFound,
            "There is no such subscription.",
        ));
    }
    shared
        .sinks
        .send_modify(|count| *count = count.wrapping_add(1));
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /api/v1/payments/callback`: what the provider says, signed by it. Answered 2xx once
/// it is on the disk, so that a provider that repeats until then loses nothing.
pub(super) async fn callback(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    let (Some(secret), Provider::External { .. }) = (&shared.provider_secret, shared.provider)
    else {
        return Err(Problem::new(
            Kind::NotFound,
            "No payment provider is configured.",
        ));
    };
    let body = keyed::body(&headers, body)?;
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    secret
        .verify(
            text(webhook::ID),
            text(webhook::TIMESTAMP),
            text(webhook::SIGNATURE),
            &body,
            unix_time_ms().div_euclid(1000),
        )
        .map_err(|error| Problem::new(Kind::InvalidSignature, error.to_string()))?;
    let notice: Notice = serde_json::from_slice(&body)
        .map_err(|error| Problem::new(Kind::MalformedBody, error.to_string()))?;
    if notice.amount_minor < 0 {
        return Err(Problem::new(
            Kind::MalformedBody,
            "`amount_minor` is negative.",
        ));
    }
    let applied = provider::apply(&shared.store, notice, shared.provider).await?;
    let applied =
        applied.ok_or_else(|| Problem::new(Kind::NotFound, "There is no such payment."))?;
    tracing::debug!(
        trace_id = trace.as_str(),
        ?applied,
        "a callback was applied"
    );
    Ok(StatusCode::NO_CONTENT)
}
