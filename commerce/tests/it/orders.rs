//! Orders: idempotency, stock, and listing.

use std::collections::HashSet;

use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{InProcess, header, product};

async fn an_order_is_created_shown_and_revalidated(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10), product("b", 10)]).await;
    let response = service
        .api
        .place("k1", &[("b", 1), ("a", 1), ("b", 2)])
        .await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let location = header(&response, "location").to_owned();
    let etag = header(&response, "etag").to_owned();
    assert!(response.headers().get("idempotency-replayed").is_none());
    let order: Value = response.json().await.unwrap();

    assert_eq!(
        location,
        format!("/api/v1/orders/{}", order["id"].as_str().unwrap())
    );
    assert_eq!(order["status"], "placed");
    assert_eq!(
        order["total"],
        json!({ "minor": 4 * 1999, "currency": "CNY" })
    );
    assert_eq!(
        order["lines"],
        json!([
            { "sku": "a", "quantity": 1, "unit_price": { "minor": 1999, "currency": "CNY" },
              "total": { "minor": 1999, "currency": "CNY" },
              "allocated_discount": { "minor": 0, "currency": "CNY" } },
            { "sku": "b", "quantity": 3, "unit_price": { "minor": 1999, "currency": "CNY" },
              "total": { "minor": 3 * 1999, "currency": "CNY" },
              "allocated_discount": { "minor": 0, "currency": "CNY" } },
        ])
    );

    let shown = service.api.get(&location).await;
    assert_eq!(header(&shown, "etag"), etag);
    assert_eq!(shown.json::<Value>().await.unwrap(), order);
    let conditional = service
        .api
        .request(Method::GET, &location)
        .header("if-none-match", &etag);
    let unchanged = conditional.send().await.unwrap();
    assert_eq!(unchanged.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(header(&unchanged, "etag"), etag);
    assert_eq!(unchanged.bytes().await.unwrap().len(), 0);
    assert_eq!(
        service.api.get_json("/api/v1/products/b").await["available"],
        7
    );
    service.stop_and_audit().await;
}

async fn the_same_key_and_body_replays_and_another_body_is_refused(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let first = service.api.place("k1", &[("a", 2)]).await;
    let (location, etag) = (
        header(&first, "location").to_owned(),
        header(&first, "etag").to_owned(),
    );
    let body = first.bytes().await.unwrap();

    // The quoted form names the same key.
    for key in ["k1", "\"k1\""] {
        let again = service.api.place(key, &[("a", 2)]).await;
        assert_eq!(again.status(), StatusCode::CREATED);
        assert_eq!(header(&again, "idempotency-replayed"), "true");
        assert_eq!(header(&again, "location"), location);
        assert_eq!(header(&again, "etag"), etag);
        assert_eq!(again.bytes().await.unwrap(), body);
    }
    let changed = service.api.place("k1", &[("a", 3)]).await;
    assert_eq!(changed.status(), StatusCode::UNPROCESSABLE_ENTITY);
    let problem: Value = changed.json().await.unwrap();
    assert_eq!(
        problem["type"],
        "urn:commerce:problem:idempotency-key-reused"
    );
    assert_eq!(
        service.api.get_json("/api/v1/products/a").await["available"],
        8
    );

    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM orders"), 1);
}

async fn concurrent_requests_with_one_key_make_one_order(on: Backend) {
    let service = InProcess::start(on, &[product("a", 100)]).await;
    let mut tasks = JoinSet::new();
    for _ in 0..40 {
        let api = service.api.clone();
        tasks.spawn(async move {
            let response = api.place("same", &[("a", 1)]).await;
            assert_eq!(response.status(), StatusCode::CREATED);
            let replayed = response.headers().contains_key("idempotency-replayed");
            (replayed, response.bytes().await.unwrap())
        });
    }
    let answers = tasks.join_all().await;
    assert_eq!(answers.iter().filter(|(replayed, _)| !replayed).count(), 1);
    assert_eq!(
        answers
            .iter()
            .map(|(_, body)| body)
            .collect::<HashSet<_>>()
            .len(),
        1
    );
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT available FROM stock"), 99);
}

async fn keys_of_two_tenants_and_their_orders_are_apart(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let place = |tenant: &'static str| {
        let request = service.api.request(Method::POST, "/api/v1/orders");
        request
            .header("x-tenant", tenant)
            .header("idempotency-key", "k")
            .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }))
            .send()
    };
    let (one, two) = (place("one").await.unwrap(), place("two").await.unwrap());
    assert_eq!(
        (one.status(), two.status()),
        (StatusCode::CREATED, StatusCode::CREATED)
    );
    let location = header(&one, "location").to_owned();
    assert_ne!(location, header(&two, "location"));

    let show = |tenant: &'static str| {
        service
            .api
            .request(Method::GET, &location)
            .header("x-tenant", tenant)
            .send()
    };
    assert_eq!(show("one").await.unwrap().status(), StatusCode::OK);
    assert_eq!(show("two").await.unwrap().status(), StatusCode::NOT_FOUND);
    assert_eq!(
        service.api.get_json("/api/v1/orders").await["orders"],
        json!([])
    );
    service.stop_and_audit().await;
}

async fn a_hot_sku_is_never_oversold(on: Backend) {
    const STOCK: usize = 70;
    const BUYERS: usize = 200;
    let service = InProcess::start(on, &[product("hot", 70)]).await;
    let mut tasks = JoinSet::new();
    for buyer in 0..BUYERS {
        let api = service.api.clone();
        tasks.spawn(async move {
            api.place(&format!("buyer-{buyer}"), &[("hot", 1)])
                .await
                .status()
        });
    }
    let statuses = tasks.join_all().await;
    let having = |status| statuses.iter().filter(|found| **found == status).count();
    assert_eq!(having(StatusCode::CREATED), STOCK);
    assert_eq!(having(StatusCode::CONFLICT), BUYERS - STOCK);
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT available FROM stock"), 0);
    assert_eq!(
        database.count("SELECT sum(quantity) FROM order_line"),
        STOCK
    );
}

async fn an_order_takes_all_its_lines_or_none(on: Backend) {
    let service = InProcess::start(on, &[product("a", 5), product("b", 1)]).await;
    let short = service.api.place("k1", &[("a", 1), ("b", 2)]).await;
    assert_eq!(short.status(), StatusCode::CONFLICT);
    assert_eq!(header(&short, "content-type"), "application/problem+json");
    let problem: Value = short.json().await.unwrap();
    assert_eq!(problem["type"], "urn:commerce:problem:insufficient-stock");
    assert_eq!(
        (&problem["status"], &problem["sku"]),
        (&json!(409), &json!("b"))
    );
    // Two lines of one SKU are one demand.
    assert_eq!(
        service
            .api
            .place("k2", &[("b", 1), ("b", 1)])
            .await
            .status(),
        StatusCode::CONFLICT
    );
    assert_eq!(
        service.api.get_json("/api/v1/products/a").await["available"],
        5
    );
    assert_eq!(
        service.api.get_json("/api/v1/products/b").await["available"],
        1
    );
    service.stop_and_audit().await;
}

async fn a_refusal_for_stock_is_remembered_and_an_unknown_sku_is_not(on: Backend) {
    let service = InProcess::start(on, &[product("a", 1)]).await;
    let first = service.api.place("k1", &[("a", 2)]).await;
    assert_eq!(first.status(), StatusCode::CONFLICT);
    let body = first.bytes().await.unwrap();
    let again = service.api.place("k1", &[("a", 2)]).await;
    assert_eq!(again.status(), StatusCode::CONFLICT);
    assert_eq!(header(&again, "idempotency-replayed"), "true");
    assert_eq!(header(&again, "content-type"), "application/problem+json");
    assert_eq!(again.bytes().await.unwrap(), body);

    let unknown = service.api.place("k2", &[("a", 1), ("ghost", 1)]).await;
    assert_eq!(unknown.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(
        unknown.json::<Value>().await.unwrap()["type"],
        "urn:commerce:problem:unknown-sku"
    );
    // The key is free for the corrected order.
    assert_eq!(
        service.api.place("k2", &[("a", 1)]).await.status(),
        StatusCode::CREATED
    );
    service.stop_and_audit().await;
}

async fn pages_cover_every_order_once_in_commit_order(on: Backend) {
    let service = InProcess::start(on, &[product("a", 100)]).await;
    let mut placed = Vec::new();
    for n in 0..23 {
        let order: Value = service
            .api
            .place(&format!("k{n}"), &[("a", 1)])
            .await
            .json()
            .await
            .unwrap();
        placed.push(order["id"].as_str().unwrap().to_owned());
    }
    // 23 in pages of 1, of a divisor-free 5, of exactly all, and of more than all.
    for limit in [1, 5, 23, 100] {
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let page = service
                .api
                .get_json(&format!("/api/v1/orders?limit={limit}{after}"))
                .await;
            let orders = page["orders"].as_array().unwrap();
            assert!(orders.len() <= limit);
            seen.extend(
                orders
                    .iter()
                    .map(|order| order["id"].as_str().unwrap().to_owned()),
            );
            assert!(seen.len() <= placed.len(), "pages repeat");
            match page["next"].as_str() {
                Some(id) => after = format!("&after={id}"),
                None => break,
            }
        }
        assert_eq!(seen, placed, "limit {limit}");
    }
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    an_order_is_created_shown_and_revalidated,
    the_same_key_and_body_replays_and_another_body_is_refused,
    concurrent_requests_with_one_key_make_one_order,
    keys_of_two_tenants_and_their_orders_are_apart,
    a_hot_sku_is_never_oversold,
    an_order_takes_all_its_lines_or_none,
    a_refusal_for_stock_is_remembered_and_an_unknown_sku_is_not,
    pages_cover_every_order_once_in_commit_order,
);
