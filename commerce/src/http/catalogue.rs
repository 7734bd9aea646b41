//! Products over HTTP: as JSON, and one as a page for people.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{Html, IntoResponse, Response};
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

/// `GET /products/{sku}`
pub(super) async fn page(
    State(shared): State<Shared>,
    Path(sku): Path<String>,
) -> Result<Html<String>, Problem> {
    find(&shared, &sku)
        .await
        .map(|product| Html(render(&product)))
}

async fn find(shared: &Shared, sku: &str) -> Result<Product, Problem> {
    let not_found = || Problem::new(Kind::NotFound, "There is no such product.");
    let sku = Sku::parse(sku).map_err(|_| not_found())?;
    shared.store.product(sku).await?.ok_or_else(not_found)
}

/// A page without script, style sheet or image: it is complete when it arrives.
fn render(product: &Product) -> String {
    let name = escape(&product.name);
    let description = escape(&product.description);
    let (minor, currency) = (product.price.minor(), product.price.currency());
    // Two decimals hold for the catalogue's currency; prices are positive.
    let (major, cents) = (minor.div_euclid(100), minor.rem_euclid(100));
    let stock = if product.available > 0 {
        "In stock"
    } else {
        "Sold out"
    };
    let sku = &product.sku;
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name}</title>\n</head>\n<body>\n<main>\n<h1>{name}</h1>\n\
         <p>{description}</p>\n<p><strong>{currency} {major}.{cents:02}</strong> · {stock} · SKU {sku}</p>\n\
         </main>\n</body>\n</html>\n"
    )
}

/// Text as HTML text; the five characters that could be more.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::money::{Currency, Money};

    #[test]
    fn a_page_escapes_text_and_writes_the_price_exactly() {
        let page = render(&Product {
            sku: Sku::parse("1").unwrap(),
            name: "<b>\"Tom\" & 'Jerry'</b>".to_owned(),
            description: "plain".to_owned(),
            price: Money::new(1905, Currency::CNY),
            available: 0,
        });
        assert!(
            page.contains("<h1>&lt;b&gt;&quot;Tom&quot; &amp; &#39;Jerry&#39;&lt;/b&gt;</h1>"),
            "{page}"
        );
        assert!(page.contains("CNY 19.05"), "{page}");
        assert!(page.contains("Sold out"), "{page}");
    }
}
