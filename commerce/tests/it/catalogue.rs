//! Products: listed, shown, and readable by people.

use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::Value;

use crate::harness::{InProcess, header};

async fn the_seeded_catalogue_is_listed_once_in_pages_of_several_kibibytes(on: Backend) {
    // No products of its own: the service seeds.
    let service = InProcess::start(on, &[]).await;
    let whole = service
        .api
        .get("/api/v1/products")
        .await
        .bytes()
        .await
        .unwrap();
    assert!(whole.len() > 4096, "{} bytes", whole.len());

    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = service
            .api
            .get_json(&format!("/api/v1/products?limit=7{after}"))
            .await;
        let products = page["products"].as_array().unwrap();
        seen.extend(
            products
                .iter()
                .map(|product| product["sku"].as_str().unwrap().to_owned()),
        );
        assert!(seen.len() <= 49, "pages repeat");
        match page["next"].as_str() {
            Some(sku) => after = format!("&after={sku}"),
            None => break,
        }
    }
    let mut expected: Vec<String> = (1001..=1048).map(|sku| sku.to_string()).collect();
    expected.push("member-30d".to_owned());
    assert_eq!(seen, expected);
    service.stop_and_audit().await;
}

async fn a_product_is_shown_as_json_and_as_a_page(on: Backend) {
    let service = InProcess::start(on, &[]).await;
    let product: Value = service.api.get_json("/api/v1/products/1001").await;
    assert_eq!(product["name"], "Enamel Camping Mug");
    assert_eq!(product["price"]["minor"], 4900);

    let page = service.api.get("/products/1001").await;
    assert_eq!(page.status(), StatusCode::OK);
    assert_eq!(header(&page, "content-type"), "text/html; charset=utf-8");
    let html = page.text().await.unwrap();
    assert!(
        html.contains("<h1>Enamel Camping Mug</h1>") && html.contains("CNY 49.00"),
        "{html}"
    );
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    the_seeded_catalogue_is_listed_once_in_pages_of_several_kibibytes,
    a_product_is_shown_as_json_and_as_a_page,
);
