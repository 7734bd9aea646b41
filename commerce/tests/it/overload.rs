//! Too much, and callers that leave.

use std::time::Duration;

use commerce::app::Service;
use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::{
    Database, InProcess, WriteLock, configuration, eventually, header, limits, product,
};

async fn a_full_queue_refuses_at_once_and_every_order_can_be_retried(on: Backend) {
    // One batch takes 128 commands and the queue one: of 140 orders at least 11 find no room.
    const ORDERS: usize = 140;
    let service = InProcess::with(on, &[product("a", 1000)], |config| {
        config.queue_capacity = limits(1).queue_capacity
    })
    .await;
    let lock = WriteLock::take(&service.database);
    let mut tasks = JoinSet::new();
    for n in 0..ORDERS {
        let api = service.api.clone();
        tasks.spawn(async move {
            let key = format!("k{n}");
            let response = api.place(&key, &[("a", 1)]).await;
            (key, response)
        });
    }
    // Nothing can commit, so the first answer is a refusal.
    let (first, refused) = tasks.join_next().await.unwrap().unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(header(&refused, "retry-after"), "1");
    assert_eq!(
        refused.json::<Value>().await.unwrap()["type"],
        "urn:commerce:problem:overloaded"
    );

    drop(lock);
    let mut retries = vec![first];
    for (key, response) in tasks.join_all().await {
        match response.status() {
            StatusCode::CREATED => {}
            StatusCode::SERVICE_UNAVAILABLE => retries.push(key),
            other => panic!("{key}: {other}"),
        }
    }
    for key in &retries {
        assert_eq!(
            service.api.place(key, &[("a", 1)]).await.status(),
            StatusCode::CREATED
        );
    }
    let refused = service
        .api
        .metric("commerce_orders_refused_total{reason=\"overloaded\"}")
        .await;
    assert!(refused >= 1);
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM orders"), ORDERS);
}

async fn an_order_whose_caller_left_is_counted_committed_and_replayed(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let lock = WriteLock::take(&service.database);
    let api = service.api.clone();
    let caller = tokio::spawn(async move { api.place("k1", &[("a", 1)]).await });
    // The scrape itself is the other request in flight.
    eventually("the order is in flight", async || {
        (service.api.metric("commerce_requests_in_flight").await == 2).then_some(())
    })
    .await;
    caller.abort();
    let cancelled = "commerce_requests_total{route=\"/api/v1/orders\",method=\"POST\",status_class=\"cancelled\"}";
    eventually("the cancellation is counted", async || {
        (service.api.metric(cancelled).await == 1).then_some(())
    })
    .await;
    drop(lock);
    let again = service.api.place("k1", &[("a", 1)]).await;
    assert_eq!(again.status(), StatusCode::CREATED);
    assert_eq!(header(&again, "idempotency-replayed"), "true");
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    a_full_queue_refuses_at_once_and_every_order_can_be_retried,
    an_order_whose_caller_left_is_counted_committed_and_replayed,
);

/// A gateway opens as many connections at once as it has clients. Nobody accepts them yet, and
/// still the kernel answers every one.
#[tokio::test]
async fn a_crowd_may_wait_at_the_door() {
    let database = Database::with(Backend::Sqlite, &[product("a", 1)]).await;
    let service = Service::start(&configuration(&database)).await.unwrap();
    let address = service.address();
    let mut tasks = JoinSet::new();
    for _ in 0..600 {
        tasks.spawn(TcpStream::connect(address));
    }
    // Only turns a hang into a failure: without room the last ones never connect.
    let crowd = tokio::time::timeout(Duration::from_secs(60), tasks.join_all()).await;
    assert_eq!(
        crowd.unwrap().into_iter().filter(Result::is_ok).count(),
        600
    );
}
