//! The product page for people, and what it is made of.
//!
//! The page names its style sheet and picture in a `Link` header, which a gateway can send
//! ahead as 103 Early Hints. Their names carry a digest, so that caches may keep them for
//! good. The page reports its own first contentful paint.

use std::sync::LazyLock;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::Shared;
use super::catalogue::find;
use super::experiments::{UNIT_COOKIE, unit, variants};
use super::problem::{Kind, Problem};
use crate::catalogue::{Product, Sku};
use crate::group::Offer;
use crate::money::Money;

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/paint.js");
const TEMPLATE: &str = include_str!("page/product.html");

/// Paths with a digest of what they serve.
struct Assets {
    style: String,
    script: String,
}

static ASSETS: LazyLock<Assets> = LazyLock::new(|| {
    let digest = |text: &str| {
        let digest = Sha256::digest(text);
        digest[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    Assets {
        style: format!("style-{}.css", digest(STYLE)),
        script: format!("paint-{}.js", digest(SCRIPT)),
    }
});

/// A year: the name changes with the content.
const FOREVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// `GET /products/{sku}`
pub(super) async fn page(
    State(shared): State<Shared>,
    Path(sku): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let product = find(&shared, &sku).await?;
    let active = shared.campaigns.active();
    let minted = Uuid::now_v7().to_string();
    let known = unit(&headers);
    let customer = known.unwrap_or(&minted);
    let variants = variants(&active, &headers, Some(customer));
    shared.campaigns.exposed(&active, customer, &variants);
    let offer = active
        .campaign
        .groups
        .iter()
        .filter(|offer| offer.sku == product.sku)
        .min_by_key(|offer| offer.unit_price.minor());
    let mut response = Html(render(&product, offer)).into_response();
    let link = format!(
        "</assets/{}>; rel=preload; as=style, </pictures/{}.svg>; rel=preload; as=image",
        ASSETS.style, product.sku
    );
    let headers = response.headers_mut();
    let text = |value: String| HeaderValue::from_str(&value).ok();
    // SKUs and digests are plain ASCII.
    headers.extend(text(link).map(|link| (header::LINK, link)));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("private, no-cache"),
    );
    if known.is_none() && !variants.is_empty() {
        let cookie =
            format!("{UNIT_COOKIE}={minted}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax");
        headers.extend(text(cookie).map(|cookie| (header::SET_COOKIE, cookie)));
    }
    Ok(response)
}

/// `GET /assets/{name}`
pub(super) async fn asset(Path(name): Path<String>) -> Result<Response, Problem> {
    let (media_type, text) = if name == ASSETS.style {
        ("text/css; charset=utf-8", STYLE)
    } else if name == ASSETS.script {
        ("text/javascript; charset=utf-8", SCRIPT)
    } else {
        return Err(Problem::new(
            Kind::NotFound,
            "There is nothing at this path.",
        ));
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
        (header::CACHE_CONTROL, FOREVER),
    ];
    Ok((StatusCode::OK, headers, text).into_response())
}

/// `GET /pictures/{sku}.svg`: a picture drawn from the SKU, the same every time.
pub(super) async fn picture(Path(name): Path<String>) -> Result<Response, Problem> {
    let sku = name
        .strip_suffix(".svg")
        .and_then(|sku| Sku::parse(sku).ok());
    let sku = sku.ok_or_else(|| Problem::new(Kind::NotFound, "There is nothing at this path."))?;
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("image/svg+xml"),
        ),
        (
            header::CACHE_CONTROL,
            HeaderValue::from_static("public, max-age=86400"),
        ),
    ];
    Ok((headers, draw(&sku)).into_response())
}

fn draw(sku: &Sku) -> String {
    let digest: [u8; 32] = Sha256::digest(sku.as_str()).into();
    let hue = u32::from(digest[0]) * 360 / 256;
    let other = (hue + 40) % 360;
    let mut shapes = String::new();
    for shape in digest[1..].chunks_exact(3).take(7) {
        let (x, y) = (
            u32::from(shape[0]) * 480 / 256,
            u32::from(shape[1]) * 360 / 256,
        );
        let radius = 24 + u32::from(shape[2]) / 3;
        shapes.push_str(&format!(
            "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" fill=\"hsl({other} 70% 70% / .45)\"/>"
        ));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 480 360\" width=\"480\" height=\"360\">\
         <rect width=\"480\" height=\"360\" fill=\"hsl({hue} 55% 45%)\"/>{shapes}</svg>\n"
    )
}

fn render(product: &Product, offer: Option<&Offer>) -> String {
    let (stock, in_stock) = if product.available > 0 {
        ("In stock", "yes")
    } else {
        ("Sold out", "no")
    };
    let group = offer.map_or_else(String::new, |offer| {
        format!(
            "<p class=\"group\">Together with {} others: <strong>{}</strong></p>",
            offer.size.saturating_sub(1),
            price(offer.unit_price)
        )
    });
    // One pass: what is filled in is not looked at again.
    let mut page = String::with_capacity(TEMPLATE.len() * 2);
    let mut rest = TEMPLATE;
    while let Some((before, after)) = rest.split_once("{{") {
        page.push_str(before);
        let Some((name, after)) = after.split_once("}}") else {
            break;
        };
        match name {
            "name" => page.push_str(&escape(&product.name)),
            "description" => page.push_str(&escape(&product.description)),
            "price" => page.push_str(&price(product.price)),
            "sku" => page.push_str(product.sku.as_str()),
            "stock" => page.push_str(stock),
            "in_stock" => page.push_str(in_stock),
            "group" => page.push_str(&group),
            "style" => page.push_str(&ASSETS.style),
            "script" => page.push_str(&ASSETS.script),
            _ => {}
        }
        rest = after;
    }
    page.push_str(rest);
    page
}

/// Two decimals hold for the catalogue's currency; prices are positive.
fn price(price: Money) -> String {
    let minor = price.minor();
    let (major, cents) = (minor.div_euclid(100), minor.rem_euclid(100));
    format!("{} {major}.{cents:02}", price.currency())
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
    use crate::money::Currency;

    #[test]
    fn a_page_escapes_text_and_writes_the_price_exactly() {
        let product = Product {
            sku: Sku::parse("1").unwrap(),
            name: "<b>\"Tom\" & 'Jerry' {{sku}}</b>".to_owned(),
            description: "plain".to_owned(),
            price: Money::new(1905, Currency::CNY),
            available: 0,
        };
        let page = render(&product, None);
        let heading = "<h1>&lt;b&gt;&quot;Tom&quot; &amp; &#39;Jerry&#39; {{sku}}&lt;/b&gt;</h1>";
        assert!(page.contains(heading), "{page}");
        assert!(page.contains("CNY 19.05"), "{page}");
        assert!(page.contains("Sold out"), "{page}");
        assert!(page.contains(&ASSETS.style) && page.contains(&ASSETS.script));
        assert!(
            !page.contains("{{price}}") && page.ends_with("</html>\n"),
            "{page}"
        );
    }

    #[test]
    fn a_picture_is_the_same_every_time() {
        let sku = Sku::parse("1001").unwrap();
        assert_eq!(draw(&sku), draw(&sku));
        assert!(draw(&sku).starts_with("<svg "));
    }
}
