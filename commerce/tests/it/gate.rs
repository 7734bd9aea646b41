//! PostgreSQL as the ledger with the Redis gate before it, and a gate that fails.

use std::time::Duration;

use commerce::gate::Lock;
use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;
use xtask::server::Redis;

use crate::harness::{InProcess, eventually, header, product};

async fn start(redis: &Redis, units: u32) -> InProcess {
    let url = redis.url();
    InProcess::with(Backend::Postgres, &[product("hot", units)], |config| {
        config.gate_url = Some(url);
    })
    .await
}

async fn loaded(redis: &Redis, units: &str) {
    eventually("the gate is loaded", async || {
        let found = redis.command(&["HGET", "{0}:stock", "hot"]).unwrap();
        (found.trim() == units).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gate_turns_orders_away_and_the_ledger_stays_right() {
    let redis = Redis::start().unwrap();
    let service = start(&redis, 30).await;
    loaded(&redis, "30").await;
    let mut tasks = JoinSet::new();
    for n in 0..100 {
        let api = service.api.clone();
        tasks.spawn(async move {
            let placed = api.place(&format!("k{n}"), &[("hot", 1)]).await;
            let location = placed.headers().get("location").cloned();
            (placed.status(), location)
        });
    }
    let answers = tasks.join_all().await;
    let placed: Vec<_> = answers
        .iter()
        .filter_map(|(_, location)| location.clone())
        .collect();
    assert_eq!(placed.len(), 30);
    let refused = answers
        .iter()
        .filter(|(status, _)| *status == StatusCode::CONFLICT);
    assert_eq!(refused.count(), 70);
    let away = "commerce_gate_admissions_total{outcome=\"sold_out\"}";
    assert!(service.api.metric(away).await > 0);

    // The gate hears of a cancellation from nobody: the ledger knows, and is believed.
    let location = placed[0].to_str().unwrap();
    let cancelled = service.api.change(location, "cancel", "c", json!({})).await;
    assert_eq!(cancelled.status(), StatusCode::OK);
    let again = service.api.place("again", &[("hot", 1)]).await;
    assert_eq!(again.status(), StatusCode::CREATED);
    // The same key is the same reservation, and the same answer.
    let replay = service.api.place("again", &[("hot", 1)]).await;
    assert_eq!(header(&replay, "idempotency-replayed"), "true");
    service.stop_and_audit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_is_flushed_or_gone_costs_no_order() {
    let mut redis = Redis::start().unwrap();
    let service = start(&redis, 10).await;
    loaded(&redis, "10").await;
    let place = async |key: &str| service.api.place(key, &[("hot", 2)]).await.status();
    assert_eq!(place("k1").await, StatusCode::CREATED);
    redis.command(&["FLUSHALL"]).unwrap();
    assert_eq!(place("k2").await, StatusCode::CREATED);
    // Loaded anew from the ledger.
    loaded(&redis, "6").await;
    redis.kill().unwrap();
    assert_eq!(place("k3").await, StatusCode::CREATED);
    redis.restart().unwrap();
    eventually("the gate admits again", async || {
        let admitted = "commerce_gate_admissions_total{outcome=\"admitted\"}";
        let before = service.api.metric(admitted).await;
        let refused = service.api.place("too-many", &[("hot", 9)]).await;
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        let found = redis.command(&["HGET", "{0}:stock", "hot"]).unwrap();
        (before > 0 && found.trim() == "4").then_some(())
    })
    .await;
    assert_eq!(place("k4").await, StatusCode::CREATED);
    assert_eq!(place("k5").await, StatusCode::CREATED);
    assert_eq!(place("k6").await, StatusCode::CONFLICT);
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT reserved FROM stock"), 10);
}

#[tokio::test]
async fn a_lock_that_ran_out_is_not_released_by_its_old_holder() {
    let redis = Redis::start().unwrap();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let long = Duration::from_secs(60);
    let first = Lock::acquire(&mut connection, "l", long)
        .await
        .unwrap()
        .unwrap();
    assert!(
        Lock::acquire(&mut connection, "l", long)
            .await
            .unwrap()
            .is_none()
    );
    // It runs out, and a successor takes it.
    redis.command(&["DEL", "l"]).unwrap();
    let second = Lock::acquire(&mut connection, "l", long)
        .await
        .unwrap()
        .unwrap();
    first.release(&mut connection).await.unwrap();
    let third = Lock::acquire(&mut connection, "l", long).await.unwrap();
    assert!(
        third.is_none(),
        "the first holder released its successor's lock"
    );
    second.release(&mut connection).await.unwrap();
    assert!(
        Lock::acquire(&mut connection, "l", long)
            .await
            .unwrap()
            .is_some()
    );
}

/// Two machines over one ledger and one gate.
#[tokio::test(flavor = "multi_thread")]
async fn two_machines_sell_one_stock() {
    let redis = Redis::start().unwrap();
    let one = start(&redis, 50).await;
    loaded(&redis, "50").await;
    let config_url = redis.url();
    let target = one.database.target.clone();
    let other = InProcess::with(Backend::Postgres, &[], |config| {
        config.store = target;
        config.gate_url = Some(config_url);
    })
    .await;
    let mut tasks = JoinSet::new();
    for n in 0..120 {
        let api = if n % 2 == 0 { &one.api } else { &other.api }.clone();
        // Every key goes to both machines.
        let key = format!("k{}", n / 2);
        tasks.spawn(async move { (key.clone(), api.place(&key, &[("hot", 1)]).await) });
    }
    let mut by_key = std::collections::BTreeMap::<String, Vec<StatusCode>>::new();
    for (key, response) in tasks.join_all().await {
        by_key.entry(key).or_default().push(response.status());
    }
    assert!(
        by_key.values().all(|answers| answers[0] == answers[1]),
        "{by_key:?}"
    );
    let sold = by_key
        .values()
        .filter(|answers| answers[0] == StatusCode::CREATED)
        .count();
    assert_eq!(sold, 50);
    other.stop_only().await;
    let database = one.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM orders"), 50);
}
