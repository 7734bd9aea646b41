//! Products over HTTP: as JSON, and one as a page for people.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::problem::{Kind, Problem, ProblemDocument};
use super::{PageQuery, Shared};
use crate::catalogue::{Product, Sku};

/// A page of products.
#[derive(Serialize, ToSchema)]
pub(super) struct ProductPage {
    products: Vec<Product>,
    /// The `after` of the next page; null on the last.
    #[schema(required = true)]
    next: Option<Sku>,
}

/// Lists products in the order of their SKUs.
#[utoipa::path(
    get, path = "/api/v1/products", tag = "products", operation_id = "products",
    params(PageQuery),
    responses(
        (status = 200, description = "A page", body = ProductPage),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn list(
    State(shared): State<Shared>,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let (limit, after) = PageQuery::parse(query)?;
    let after = after
        .map(|sku| {
            Sku::parse(&sku).map_err(|_| Problem::new(Kind::BadRequest, "`after` is not a SKU."))
        })
        .transpose()?;
    let page = shared.store.products(after, limit).await?;
    let next = page
        .items
        .last()
        .filter(|_| page.more)
        .map(|product| product.sku.clone());
    Ok(Json(ProductPage {
        products: page.items,
        next,
    })
    .into_response())
}

/// Shows one product.
#[utoipa::path(
    get, path = "/api/v1/products/{sku}", tag = "products", operation_id = "product",
    params(("sku" = String, Path, description = "The product", example = "1001")),
    responses(
        (status = 200, description = "The product", body = Product),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn show(
    State(shared): State<Shared>,
    Path(sku): Path<String>,
) -> Result<Json<Product>, Problem> {
    find(&shared, &sku).await.map(Json)
}

/// The product, or why not.
pub(super) async fn find(shared: &Shared, sku: &str) -> Result<Product, Problem> {
    let not_found = || Problem::new(Kind::NotFound, "There is no such product.");
    let sku = Sku::parse(sku).map_err(|_| not_found())?;
    shared.store.product(sku).await?.ok_or_else(not_found)
}
