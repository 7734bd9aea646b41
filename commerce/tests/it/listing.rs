//! Listings while orders come in: nothing is passed over.

use commerce::store::Target;
use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::Value;

use crate::harness::{Api, InProcess, Process, WriteLock, eventually, product};

/// The orders after `after`, and where the next page begins.
async fn walk(api: &Api, after: &mut Option<String>) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let from = after.as_ref().map(|id| format!("&after={id}"));
        let path = format!("/api/v1/orders?limit=1{}", from.unwrap_or_default());
        let page: Value = api.get_json(&path).await;
        let orders = page["orders"].as_array().unwrap();
        for order in orders {
            let id = order["id"].as_str().unwrap().to_owned();
            *after = Some(id.clone());
            seen.push(id);
        }
        if page["next"].is_null() {
            return seen;
        }
    }
}

/// One machine takes number 1 and is held up before its commit; another takes number 2 and
/// commits. Whoever reads on from where the first listing ended still sees both.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_commits_late_is_not_passed_over() {
    let products = [product("slow", 9), product("quick", 9)];
    let service = InProcess::start(Backend::Postgres, &products).await;
    let other = Process::start(&service.database, &[]);
    let Target::Postgres(url) = &service.database.target else {
        panic!("this test is about PostgreSQL");
    };
    // What the foreign key of the order's line waits for, after the order has its number.
    let held = "SELECT 'locked' FROM product WHERE sku = 'slow' FOR UPDATE";
    let held = WriteLock::hold(url, held);
    let api = service.api.clone();
    let slow = tokio::spawn(async move { api.place("k1", &[("slow", 1)]).await });
    let numbered = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM orders_seq_seq";
    eventually("the first order has its number", async || {
        (service.database.count(numbered) == 1).then_some(())
    })
    .await;
    let quick = other.api.place("k2", &[("quick", 1)]).await;
    assert_eq!(quick.status(), StatusCode::CREATED);
    let mut place = None;
    let mut seen = walk(&other.api, &mut place).await;
    drop(held);
    assert_eq!(slow.await.unwrap().status(), StatusCode::CREATED);
    seen.extend(walk(&other.api, &mut place).await);
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert_ne!(seen[0], seen[1]);
    drop(other);
    service.stop_and_audit().await;
}
