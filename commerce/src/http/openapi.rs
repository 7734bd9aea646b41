//! The OpenAPI 3.1 document, made from the handlers and from the types that are the rows and
//! the JSON.

use axum::Json;
use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Document;

use super::{catalogue, experiments, group, member, orders, problem, webhooks};

/// What the document consists of.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "commerce",
        description = "The order service behind the gateway"
    ),
    paths(
        orders::place,
        orders::look::list,
        orders::look::show,
        orders::change::cancel,
        orders::change::pay,
        orders::change::refund,
        orders::look::events,
        orders::look::payments,
        webhooks::subscribe,
        webhooks::list,
        webhooks::unsubscribe,
        catalogue::list,
        catalogue::show,
        group::offer,
        group::join,
        group::show,
        group::ticket,
        member::register,
        member::log_in,
        member::refresh,
        member::log_out,
        member::membership,
        member::renew,
        experiments::list,
    ),
    components(schemas(problem::ProblemDocument))
)]
struct Api;

/// `GET /openapi.json`
pub(super) async fn document() -> Json<Document> {
    Json(Api::openapi())
}
