//! What operators ask: alive, ready, and how it goes.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::Shared;
use super::problem::{Kind, Problem};
use crate::metrics;

/// How long a healthy store may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// `GET /livez`: the process answers. It asks nobody, so that a slow disk does not get the
/// process killed and its queue lost.
pub(super) async fn livez() -> Response {
    Json(json!({ "status": "alive" })).into_response()
}

/// `GET /readyz`: orders and reads work, and nobody announced the end.
pub(super) async fn readyz(State(shared): State<Shared>) -> Result<Response, Problem> {
    if shared.drain.has_begun() {
        return Err(Problem::new(
            Kind::Draining,
            "The service is about to stop.",
        ));
    }
    shared.store.check(PATIENCE).await.map_err(|error| {
        tracing::warn!(%error, "not ready");
        Problem::new(Kind::StorageFailed, "The storage does not answer.")
    })?;
    Ok(Json(json!({ "status": "ready" })).into_response())
}

/// `GET /metrics`
pub(super) async fn metrics(State(shared): State<Shared>) -> Result<Response, Problem> {
    shared.metrics.process(&shared.census);
    let text = shared.metrics.encode().map_err(|error| {
        tracing::error!(%error, "the metrics could not be written");
        Problem::new(Kind::Internal, "The metrics could not be written.")
    })?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
