//! An order's life after it was placed: paid, cancelled, expired, refunded; and its trail.

use std::time::Duration;

use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{InProcess, eventually, header, product};

async fn pay_once_and_refund_in_parts(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10), product("b", 10)]).await;
    let api = &service.api;
    let placed = api.place("k1", &[("a", 3), ("b", 1)]).await;
    let location = header(&placed, "location").to_owned();

    let paid = api.change(&location, "pay", "k2", json!({})).await;
    assert_eq!(paid.status(), StatusCode::OK);
    assert_eq!(header(&paid, "etag"), "\"2\"");
    let body = paid.bytes().await.unwrap();
    let again = api.change(&location, "pay", "k2", json!({})).await;
    assert_eq!(header(&again, "idempotency-replayed"), "true");
    assert_eq!(again.bytes().await.unwrap(), body);
    // Another key is another intention, and the order is paid already.
    let twice = api.change(&location, "pay", "k3", json!({})).await;
    assert_eq!(twice.status(), StatusCode::CONFLICT);
    let problem: Value = twice.json().await.unwrap();
    assert_eq!(problem["type"], "urn:commerce:problem:invalid-state");

    let part = json!({ "lines": [{ "sku": "a", "quantity": 2 }], "reason": "broken" });
    let part: Value = api
        .change(&location, "refund", "k4", part)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(part["status"], "partially_refunded");
    assert_eq!(part["refunded"]["minor"], 2 * 1999);
    let too_many = json!({ "lines": [{ "sku": "a", "quantity": 2 }] });
    let too_many = api.change(&location, "refund", "k5", too_many).await;
    assert_eq!(too_many.status(), StatusCode::UNPROCESSABLE_ENTITY);
    // The rest, which is not for sale again.
    let rest = json!({ "restock": false });
    let rest: Value = api
        .change(&location, "refund", "k6", rest)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(rest["status"], "refunded");
    assert_eq!(rest["refunded"], rest["total"]);
    assert_eq!(api.get_json("/api/v1/products/a").await["available"], 9);
    assert_eq!(api.get_json("/api/v1/products/b").await["available"], 9);

    let payments = api.get_json(&format!("{location}/payments")).await;
    assert_eq!(payments[0]["status"], "refunded");
    assert_eq!(payments[0]["captured"], payments[0]["refunded"]);
    let events = api.get_json(&format!("{location}/events")).await;
    let trail: Vec<(&str, i64)> = events
        .as_array()
        .unwrap()
        .iter()
        .map(|event| {
            let version = event["order_version"].as_i64().unwrap();
            (event["type"].as_str().unwrap(), version)
        })
        .collect();
    assert_eq!(
        trail,
        [
            ("order.placed", 1),
            ("order.paid", 2),
            ("order.refunded", 3),
            ("order.refunded", 4)
        ]
    );
    assert_eq!(events[3]["data"], rest);
    service.stop_and_audit().await;
}

async fn a_cancelled_order_frees_its_stock_and_cannot_be_paid(on: Backend) {
    let service = InProcess::start(on, &[product("a", 2)]).await;
    let api = &service.api;
    let placed = api.place("k1", &[("a", 2)]).await;
    let location = header(&placed, "location").to_owned();
    assert_eq!(
        api.place("k2", &[("a", 1)]).await.status(),
        StatusCode::CONFLICT
    );
    let cancelled = api.change(&location, "cancel", "k3", json!({})).await;
    assert_eq!(cancelled.status(), StatusCode::OK);
    let order: Value = cancelled.json().await.unwrap();
    assert_eq!(order["status"], "cancelled");
    let pay = api.change(&location, "pay", "k4", json!({})).await;
    assert_eq!(pay.status(), StatusCode::CONFLICT);
    // Remembered: the key's answer stays what the client acted on.
    let pay = api.change(&location, "pay", "k4", json!({})).await;
    assert_eq!(header(&pay, "idempotency-replayed"), "true");
    assert_eq!(
        api.place("k5", &[("a", 2)]).await.status(),
        StatusCode::CREATED
    );
    service.stop_and_audit().await;
}

async fn if_match_protects_a_change_from_another(on: Backend) {
    let service = InProcess::start(on, &[product("a", 5)]).await;
    let api = &service.api;
    let placed = api.place("k1", &[("a", 1)]).await;
    let location = header(&placed, "location").to_owned();
    let cancel = |key: &'static str, tag: &'static str| {
        api.request(Method::POST, &format!("{location}/cancel"))
            .header("idempotency-key", key)
            .header("if-match", tag)
            .send()
    };
    for tag in ["\"2\"", "W/\"1\"", "\"x\""] {
        let stale = cancel("k2", tag).await.unwrap();
        assert_eq!(stale.status(), StatusCode::PRECONDITION_FAILED, "{tag}");
    }
    // A stale version is not remembered: the key is free for the right one.
    assert_eq!(
        cancel("k2", "\"1\"").await.unwrap().status(),
        StatusCode::OK
    );
    service.stop_and_audit().await;
}

async fn of_pay_and_cancel_at_once_exactly_one_happens(on: Backend) {
    let service = InProcess::start(on, &[product("a", 100)]).await;
    let mut tasks = JoinSet::new();
    for n in 0..20 {
        let placed = service.api.place(&format!("k{n}"), &[("a", 1)]).await;
        let location = header(&placed, "location").to_owned();
        let api = service.api.clone();
        tasks.spawn(async move {
            let (pay_key, cancel_key) = (format!("p{n}"), format!("c{n}"));
            let (pay, cancel) = tokio::join!(
                api.change(&location, "pay", &pay_key, json!({})),
                api.change(&location, "cancel", &cancel_key, json!({})),
            );
            [pay, cancel].map(|response| response.status() == StatusCode::OK)
        });
    }
    for [paid, cancelled] in tasks.join_all().await {
        assert!(paid != cancelled);
    }
    service.stop_and_audit().await;
}

async fn a_reservation_ends_at_its_deadline_and_not_before(on: Backend) {
    let service = InProcess::with(on, &[product("a", 1)], |config| {
        config.hold = Duration::from_millis(1500);
    })
    .await;
    let api = &service.api;
    let placed = api.place("k1", &[("a", 1)]).await;
    let location = header(&placed, "location").to_owned();
    let order: Value = placed.json().await.unwrap();
    let deadline = order["expires_at_ms"].as_i64().unwrap();
    assert_eq!(deadline - order["created_at_ms"].as_i64().unwrap(), 1500);
    // Nobody asks for it: no request comes in until the writer has woken by itself.
    eventually("the reservation ends", async || {
        let sql = "SELECT count(*) FROM outbox WHERE topic = 'order.expired'";
        (service.database.count(sql) == 1).then_some(())
    })
    .await;
    let events = api.get_json(&format!("{location}/events")).await;
    assert_eq!(events[1]["type"], "order.expired");
    assert_eq!(events[1]["actor"], "expiry");
    assert!(events[1]["at_ms"].as_i64().unwrap() >= deadline);
    let late = api.change(&location, "pay", "k2", json!({})).await;
    assert_eq!(late.status(), StatusCode::CONFLICT);
    assert_eq!(
        api.place("k3", &[("a", 1)]).await.status(),
        StatusCode::CREATED
    );
    service.stop_and_audit().await;
}

async fn deadlines_survive_a_restart(on: Backend) {
    let service = InProcess::with(on, &[product("a", 1)], |config| {
        config.hold = Duration::from_millis(500);
    })
    .await;
    service.api.place("k1", &[("a", 1)]).await;
    let database = service.stop_and_audit().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    let service = InProcess::over(database, |_| {}).await;
    eventually("the stock is free", async || {
        let product = service.api.get_json("/api/v1/products/a").await;
        (product["available"] == 1).then_some(())
    })
    .await;
    service.stop_and_audit().await;
}

async fn the_gateways_trace_is_in_the_order_and_in_every_event(on: Backend) {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let service = InProcess::start(on, &[product("a", 1)]).await;
    let traceparent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let placed = service
        .api
        .request(Method::POST, "/api/v1/orders")
        .header("idempotency-key", "k")
        .header("traceparent", traceparent)
        .header("x-request-id", "r-1")
        .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }))
        .send()
        .await
        .unwrap();
    let location = header(&placed, "location").to_owned();
    let cancel = service
        .api
        .request(Method::POST, &format!("{location}/cancel"))
        .header("idempotency-key", "k")
        .header("x-request-id", "r-2");
    assert_eq!(cancel.send().await.unwrap().status(), StatusCode::OK);
    let events = service.api.get_json(&format!("{location}/events")).await;
    assert_eq!(
        (&events[0]["trace_id"], &events[1]["trace_id"]),
        (&json!(TRACE), &json!("r-2"))
    );
    assert_eq!(service.api.get_json(&location).await["trace_id"], TRACE);
    service.stop_and_audit().await;
}

/// State of one request must not show in another's answer, row or event.
async fn requests_leave_nothing_behind_for_the_next(on: Backend) {
    let products: Vec<_> = (0..8)
        .map(|n| product(&format!("sku-{n}"), 10_000))
        .collect();
    let service = InProcess::start(on, &products).await;
    let mut tasks = JoinSet::new();
    for n in 0..120_u32 {
        let api = service.api.clone();
        tasks.spawn(async move {
            // Long and short ones in turn, so that a rest of a longer one would show.
            let lines: Vec<(String, u32)> = (0..=n % 8)
                .map(|line| (format!("sku-{line}"), n + line + 1))
                .collect();
            let borrowed: Vec<(&str, u32)> = lines
                .iter()
                .map(|(sku, units)| (sku.as_str(), *units))
                .collect();
            let placed = api.place(&format!("k{n}"), &borrowed).await;
            assert_eq!(placed.status(), StatusCode::CREATED);
            let location = header(&placed, "location").to_owned();
            let order: Value = placed.json().await.unwrap();
            let got: Vec<(String, u32)> = order["lines"]
                .as_array()
                .unwrap()
                .iter()
                .map(|line| {
                    let units = line["quantity"].as_u64().unwrap().try_into().unwrap();
                    (line["sku"].as_str().unwrap().to_owned(), units)
                })
                .collect();
            assert_eq!(got, lines);
            assert_eq!(api.get_json(&location).await, order);
            let events = api.get_json(&format!("{location}/events")).await;
            assert_eq!(events[0]["data"], order);
        });
    }
    tasks.join_all().await;
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    pay_once_and_refund_in_parts,
    a_cancelled_order_frees_its_stock_and_cannot_be_paid,
    if_match_protects_a_change_from_another,
    of_pay_and_cancel_at_once_exactly_one_happens,
    a_reservation_ends_at_its_deadline_and_not_before,
    deadlines_survive_a_restart,
    the_gateways_trace_is_in_the_order_and_in_every_event,
    requests_leave_nothing_behind_for_the_next,
);
