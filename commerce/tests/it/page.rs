//! The product page: what it announces, and what it looks like in a real browser.

use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::json;

use xtask::browser::Browser;

use crate::harness::{InProcess, eventually, header};

/// The paths of a `Link` header.
fn links(header: &str) -> Vec<String> {
    header
        .split(',')
        .map(|link| {
            let link = link.trim();
            assert!(link.contains("rel=preload"), "{link}");
            link[1..link.find('>').unwrap()].to_owned()
        })
        .collect()
}

#[tokio::test]
async fn what_the_page_announces_is_there_and_may_be_kept() {
    let service = InProcess::start(Backend::Sqlite, &[]).await;
    let api = &service.api;
    let page = api.get("/products/1001").await;
    let announced = links(header(&page, "link"));
    assert_eq!(announced.len(), 2);
    let html = page.text().await.unwrap();
    for path in &announced {
        assert!(
            html.contains(path.as_str()),
            "{path} is announced and not used"
        );
        let asset = api.get(path).await;
        assert_eq!(asset.status(), StatusCode::OK, "{path}");
        assert!(header(&asset, "cache-control").contains("max-age"));
    }
    let stale = api.get("/assets/style-0000000000000000.css").await;
    assert_eq!(stale.status(), StatusCode::NOT_FOUND);

    // As navigator.sendBeacon sends it.
    let beacon = |body: &'static str| {
        api.request(Method::POST, "/api/v1/vitals")
            .header("content-type", "text/plain;charset=UTF-8")
            .body(body)
            .send()
    };
    let taken = beacon(r#"{"fcp_ms":480,"hinted":true}"#).await.unwrap();
    assert_eq!(taken.status(), StatusCode::NO_CONTENT);
    let nonsense = beacon(r#"{"fcp_ms":99999999}"#).await.unwrap();
    assert_eq!(nonsense.status(), StatusCode::BAD_REQUEST);
    let painted = "commerce_first_contentful_paint_seconds_count{hinted=\"true\"}";
    assert_eq!(api.metric(painted).await, 1);
    service.stop_and_audit().await;
}

/// What a customer gets to see: text, style, picture, a working script, and nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_browser_renders_the_page_and_reports_its_first_paint() {
    let service = InProcess::start(Backend::Sqlite, &[]).await;
    let url = format!("http://{}/products/1001", service.api.address());
    let seen = tokio::task::spawn_blocking(move || {
        let mut browser = Browser::start(&[]).unwrap();
        let page = browser.open().unwrap();
        browser.go_to(&page, &url).unwrap();
        // The first paint may come after everything is loaded.
        let painted = "new Promise((resolve) => {
            const look = () => performance.getEntriesByName('first-contentful-paint').length
                ? resolve(true) : setTimeout(look, 10);
            look();
        })";
        assert_eq!(browser.evaluate(&page, painted).unwrap(), true);
        let look = "({
            heading: document.querySelector('h1').innerText,
            price: document.querySelector('.price strong').innerText,
            stock: document.querySelector('[data-in-stock]').dataset.inStock,
            layout: getComputedStyle(document.querySelector('main')).display,
            picture: document.querySelector('img').naturalWidth,
        })";
        let first = browser.evaluate(&page, look).unwrap();
        // Once more: what may be kept is not fetched again.
        browser.go_to(&page, &url).unwrap();
        let fetched = "performance.getEntriesByType('resource')
            .filter((entry) => entry.initiatorType !== 'beacon' && entry.transferSize > 0)
            .map((entry) => entry.name)";
        let again = browser.evaluate(&page, fetched).unwrap();
        (first, again)
    });
    let (first, again) = seen.await.unwrap();
    assert_eq!(
        first,
        json!({
            "heading": "Enamel Camping Mug", "price": "CNY 49.00", "stock": "yes",
            "layout": "grid", "picture": 480,
        })
    );
    assert_eq!(again, json!([]), "fetched although it may be kept");
    let reported = "commerce_first_contentful_paint_seconds_count{hinted=\"false\"}";
    eventually("the paint is reported", async || {
        (service.api.metric(reported).await > 0).then_some(())
    })
    .await;
    service.stop_and_audit().await;
}
