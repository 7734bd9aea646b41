//! Payments through a provider whose callbacks are slow, doubled, lost and out of order.

use std::path::PathBuf;
use std::time::Duration;

use commerce::fake::{self, Faults};
use commerce::store::sql::Backend;
use commerce::webhook::Secret;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::harness::{InProcess, eventually, header, product};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A service that pays through a provider with these faults.
async fn start(on: Backend, hold: Duration, faults: Faults) -> InProcess {
    start_with(on, hold, faults, None).await
}

async fn start_with(
    on: Backend,
    hold: Duration,
    faults: Faults,
    campaign: Option<PathBuf>,
) -> InProcess {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let service = InProcess::with(on, &[product("a", 100_000)], |config| {
        config.hold = hold;
        config.campaigns.file = campaign;
        config.provider_url = Some(url);
        config.shared_secret = Some(SECRET.to_owned());
        config.provider_check = Duration::from_millis(700);
    })
    .await;
    let callback = format!("http://{}/api/v1/payments/callback", service.api.address());
    let secret = Secret::parse(SECRET).unwrap();
    tokio::spawn(fake::serve(listener, callback, secret, faults));
    service
}

async fn every_payment_is_settled_whatever_happens_to_its_callbacks(on: Backend) {
    const ORDERS: usize = 60;
    let faults = Faults {
        seed: 7,
        decline: 20,
        lose: 30,
        duplicate: 40,
        slow_ms: 300,
    };
    let service = start(on, Duration::from_secs(900), faults).await;
    let mut tasks = JoinSet::new();
    for n in 0..ORDERS {
        let api = service.api.clone();
        tasks.spawn(async move {
            let placed = api.place(&format!("k{n}"), &[("a", 2)]).await;
            let location = header(&placed, "location").to_owned();
            let pay = api
                .change(&location, "pay", &format!("p{n}"), json!({}))
                .await;
            assert_eq!(pay.status(), StatusCode::ACCEPTED);
            let order: Value = pay.json().await.unwrap();
            assert_eq!(order["status"], "placed");
            location
        });
    }
    let locations = tasks.join_all().await;
    eventually("every payment is settled", async || {
        let open = "SELECT count(*) FROM payment WHERE status = 'pending'";
        (service.database.count(open) == 0).then_some(())
    })
    .await;
    let (mut paid, mut declined) = (0, 0);
    for location in &locations {
        let order = service.api.get_json(location).await;
        let payments = service.api.get_json(&format!("{location}/payments")).await;
        match payments[0]["status"].as_str().unwrap() {
            "captured" => {
                assert_eq!(order["status"], "paid");
                assert_eq!(payments[0]["captured"], order["total"]);
                paid += 1;
            }
            "failed" => {
                assert_eq!(order["status"], "placed");
                declined += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert!(paid > 0 && declined > 0, "{paid} paid, {declined} declined");
    // A refund of one of them goes the same way.
    let location = eventually("a paid order", async || {
        for location in &locations {
            if service.api.get_json(location).await["status"] == "paid" {
                return Some(location);
            }
        }
        None
    })
    .await;
    let refund = service.api.change(location, "refund", "r", json!({})).await;
    assert_eq!(refund.status(), StatusCode::OK);
    eventually("the money is back", async || {
        let payments = service.api.get_json(&format!("{location}/payments")).await;
        (payments[0]["status"] == "refunded").then_some(())
    })
    .await;
    service.stop_and_audit().await;
}

async fn money_that_comes_after_the_deadline_goes_back(on: Backend) {
    let faults = Faults {
        seed: 1,
        decline: 0,
        lose: 100,
        duplicate: 0,
        slow_ms: 0,
    };
    // No callback comes, and the question is asked after the reservation has ended.
    let service = start(on, Duration::from_millis(300), faults).await;
    let placed = service.api.place("k", &[("a", 1)]).await;
    let location = header(&placed, "location").to_owned();
    let pay = service.api.change(&location, "pay", "p", json!({})).await;
    assert_eq!(pay.status(), StatusCode::ACCEPTED);
    eventually("the money is back", async || {
        let payments = service.api.get_json(&format!("{location}/payments")).await;
        (payments[0]["status"] == "refunded").then_some(())
    })
    .await;
    assert_eq!(service.api.get_json(&location).await["status"], "expired");
    let refunds = "SELECT count(*) FROM refund WHERE reason = 'late_payment'";
    assert_eq!(service.database.count(refunds), 1);
    service.stop_and_audit().await;
}

async fn a_callback_without_the_providers_signature_changes_nothing(on: Backend) {
    let faults = Faults {
        seed: 1,
        decline: 0,
        lose: 100,
        duplicate: 0,
        slow_ms: 0,
    };
    let service = start(on, Duration::from_secs(900), faults).await;
    let placed = service.api.place("k", &[("a", 1)]).await;
    let location = header(&placed, "location").to_owned();
    service.api.change(&location, "pay", "p", json!({})).await;
    let payments = service.api.get_json(&format!("{location}/payments")).await;
    let body = json!({
        "event_id": "forged", "payment_id": payments[0]["id"], "sequence": 9,
        "kind": "captured", "amount_minor": 1999,
    })
    .to_string();
    let forged = Secret::parse(&Secret::generate()).unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let signature = forged.sign("forged", now.try_into().unwrap(), body.as_bytes());
    let request = service
        .api
        .request(Method::POST, "/api/v1/payments/callback")
        .header("webhook-id", "forged")
        .header("webhook-timestamp", now.to_string())
        .header("webhook-signature", signature)
        .body(body);
    assert_eq!(
        request.send().await.unwrap().status(),
        StatusCode::UNAUTHORIZED
    );
    let forged = "SELECT count(*) FROM payment_event WHERE event_id = 'forged'";
    assert_eq!(service.database.count(forged), 0);
    service.stop_and_audit().await;
}

/// A coupon takes everything off: there is nothing to charge and nothing to pay back, but the
/// units are sold and come back all the same. The provider, who would refuse such a charge, is
/// not asked.
async fn an_order_that_costs_nothing_is_paid_and_refunded(on: Backend) {
    let directory = tempfile::tempdir().unwrap();
    let campaign = directory.path().join("campaign.toml");
    let rule = "[[discounts]]\nid = \"gift\"\npercent_off_basis_points = 10000\n\
                when = { coupon = { code = \"GIFT\", stacks = true } }\n";
    std::fs::write(&campaign, rule).unwrap();
    let faults = Faults {
        seed: 1,
        decline: 100,
        lose: 0,
        duplicate: 0,
        slow_ms: 0,
    };
    let service = start_with(on, Duration::from_secs(900), faults, Some(campaign)).await;
    let api = &service.api;
    let placed = api
        .request(Method::POST, "/api/v1/orders")
        .header("idempotency-key", "k")
        .json(&json!({ "lines": [{ "sku": "a", "quantity": 3 }], "coupons": ["GIFT"] }))
        .send()
        .await
        .unwrap();
    assert_eq!(placed.status(), StatusCode::CREATED);
    let location = header(&placed, "location").to_owned();
    let order: Value = placed.json().await.unwrap();
    assert_eq!(order["total"]["minor"], 0);
    let pay = api.change(&location, "pay", "p", json!({})).await;
    assert_eq!(pay.status(), StatusCode::OK);
    let part = json!({ "lines": [{ "sku": "a", "quantity": 1 }] });
    for (key, body, status) in [
        ("r1", part, "partially_refunded"),
        ("r2", json!({}), "refunded"),
    ] {
        let refund = api.change(&location, "refund", key, body).await;
        assert_eq!(refund.status(), StatusCode::OK, "{key}");
        let order: Value = refund.json().await.unwrap();
        assert_eq!(order["status"], status);
    }
    let payments = api.get_json(&format!("{location}/payments")).await;
    assert_eq!(payments[0]["status"], "refunded");
    let database = service.stop_and_audit().await;
    let asked = "SELECT count(*) FROM outbox WHERE topic LIKE '%.requested'";
    assert_eq!(database.count(asked), 0);
    let back = "SELECT available FROM stock WHERE sku = 'a'";
    assert_eq!(database.count(back), 100_000);
}

crate::on_both_stores!(
    an_order_that_costs_nothing_is_paid_and_refunded,
    every_payment_is_settled_whatever_happens_to_its_callbacks,
    money_that_comes_after_the_deadline_goes_back,
    a_callback_without_the_providers_signature_changes_nothing,
);
