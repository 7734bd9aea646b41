//! What is too old is forgotten: keys and trails, nothing that somebody waits for, and the
//! auditor can still tell forgotten from lost.

use std::time::Duration;

use commerce::command::forget::Keep;
use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Api, InProcess, eventually, header, product};

const DAY_MS: u64 = 86_400_000;
const KEEP: Keep = Keep {
    keys: Duration::from_millis(DAY_MS),
    events: Duration::from_millis(DAY_MS),
};

/// Places and pays an order; returns where it is.
async fn bought(api: &Api, key: &str, tenant: &str) -> String {
    let post = |path: &str, key: &str, body: Value| {
        let request = api.request(Method::POST, path).header("x-tenant", tenant);
        request.header("idempotency-key", key).json(&body).send()
    };
    let body = json!({ "lines": [{ "sku": "a", "quantity": 1 }] });
    let placed = post("/api/v1/orders", key, body).await.unwrap();
    let location = header(&placed, "location").to_owned();
    let paid = post(&format!("{location}/pay"), &format!("{key}-pay"), json!({}));
    assert_eq!(paid.await.unwrap().status(), StatusCode::OK);
    location
}

async fn trail(api: &Api, tenant: &str, location: &str) -> usize {
    let path = format!("{location}/events");
    let request = api.request(Method::GET, &path).header("x-tenant", tenant);
    let events: Value = request.send().await.unwrap().json().await.unwrap();
    events.as_array().unwrap().len()
}

async fn what_is_too_old_is_forgotten_and_nothing_else(on: Backend) {
    let service = InProcess::start(on, &[product("a", 100)]).await;
    let api = &service.api;
    // Nobody listens at this subscriber's: its tenant's events wait.
    let subscribed = api
        .request(Method::POST, "/api/v1/webhooks")
        .header("x-tenant", "watched")
        .header("idempotency-key", "hook")
        .json(&json!({ "url": "http://127.0.0.1:9/hook" }))
        .send()
        .await
        .unwrap();
    assert_eq!(subscribed.status(), StatusCode::CREATED);
    let old = bought(api, "old", "anonymous").await;
    let touched = bought(api, "touched", "anonymous").await;
    let watched = bought(api, "watched", "watched").await;
    let database = service.stop_and_audit().await;
    let back = format!("at_ms = at_ms - {}", 2 * DAY_MS);
    database.execute(&format!("UPDATE outbox SET {back}"));
    database.execute(&format!("UPDATE idempotency SET {back}"));
    database.execute(&format!(
        "UPDATE orders SET created_at_ms = created_at_ms - {}",
        2 * DAY_MS
    ));
    // More than one transaction forgets.
    database.execute(
        "INSERT INTO idempotency (principal, route, key, fingerprint, status, content_type, body, at_ms)
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200)
         SELECT 'many', 'r', 'k' || i, fingerprint, 200, 'x', body, 1
         FROM n, (SELECT fingerprint, body FROM idempotency WHERE key = 'old') AS one",
    );

    let service = InProcess::over(database, |config| config.keep = KEEP).await;
    let api = &service.api;
    let young = bought(api, "young", "anonymous").await;
    let keys = "commerce_forgotten_rows_total{what=\"keys\"}";
    eventually("the keys are forgotten", async || {
        (api.metric(keys).await == 1207).then_some(())
    })
    .await;
    eventually("the trails are forgotten", async || {
        (trail(api, "anonymous", &old).await == 0).then_some(())
    })
    .await;
    assert_eq!(trail(api, "anonymous", &young).await, 2);
    assert_eq!(trail(api, "watched", &watched).await, 2, "still to be sent");
    // The orders themselves are kept.
    let order = api.get_json(&old).await;
    assert_eq!(order["status"], "paid");
    // A forgotten key is a new one, a young one replays.
    let lines: &[(&str, u32)] = &[("a", 1)];
    let again = api.place("old", lines).await;
    assert!(again.headers().get("idempotency-replayed").is_none());
    let replay = api.place("young", lines).await;
    assert_eq!(header(&replay, "idempotency-replayed"), "true");
    // An order whose trail was forgotten goes on.
    let refund = api.change(&touched, "refund", "r", json!({})).await;
    assert_eq!(refund.status(), StatusCode::OK);
    assert_eq!(trail(api, "anonymous", &touched).await, 1);
    service.stop_and_audit().await;
}

crate::on_both_stores!(what_is_too_old_is_forgotten_and_nothing_else);
