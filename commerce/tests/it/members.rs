//! Membership: tokens, their rotation, renewals, and what members pay.

use commerce::store::sql::Backend;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::groups::with_campaign;
use crate::harness::{Api, InProcess, product};

async fn post(api: &Api, path: &str, body: Value) -> Response {
    api.request(Method::POST, path)
        .json(&body)
        .send()
        .await
        .unwrap()
}

fn credentials(email: &str) -> Value {
    json!({ "email": email, "password": "correct horse" })
}

/// Registers and logs in.
pub async fn member(api: &Api, email: &str) -> Value {
    let registered = post(api, "/api/v1/members", credentials(email)).await;
    assert_eq!(registered.status(), StatusCode::CREATED);
    let tokens = post(api, "/api/v1/tokens", credentials(email)).await;
    assert_eq!(tokens.status(), StatusCode::OK);
    tokens.json().await.unwrap()
}

async fn refresh(api: &Api, token: &Value) -> Response {
    post(
        api,
        "/api/v1/tokens/refresh",
        json!({ "refresh_token": token }),
    )
    .await
}

pub async fn with_token(api: &Api, method: Method, path: &str, token: &str) -> Response {
    let request = api.request(method, path).bearer_auth(token);
    request.send().await.unwrap()
}

/// A paid order.
async fn bought(api: &Api, key: &str, sku: &str, quantity: u32) -> String {
    let placed = api.place(key, &[(sku, quantity)]).await;
    let order: Value = placed.json().await.unwrap();
    let id = order["id"].as_str().unwrap().to_owned();
    let location = format!("/api/v1/orders/{id}");
    let paid = api
        .change(&location, "pay", &format!("{key}-pay"), json!({}))
        .await;
    assert_eq!(paid.status(), StatusCode::OK);
    id
}

async fn renew(api: &Api, token: &str, period: u32, order: &str) -> Response {
    let path = format!("/api/v1/membership/periods/{period}");
    let request = api.request(Method::PUT, &path).bearer_auth(token);
    let request = request.json(&json!({ "order": order }));
    request.send().await.unwrap()
}

crate::on_both_stores!(
    a_refresh_token_works_once_and_a_copy_ends_the_login,
    a_period_is_paid_once_however_often_it_is_asked_for,
    a_period_takes_an_order_that_was_paid_for_it_and_only_once,
    members_pay_members_prices_while_they_are_entitled,
);

async fn a_refresh_token_works_once_and_a_copy_ends_the_login(on: Backend) {
    let service = InProcess::start(on, &[product("a", 1)]).await;
    let api = &service.api;
    let first = member(api, "Ann@Shop.example").await;
    // The address is one, however it is written.
    let twice = post(api, "/api/v1/members", credentials("ann@shop.example")).await;
    assert_eq!(twice.status(), StatusCode::CONFLICT);

    let second = refresh(api, &first["refresh_token"]).await;
    assert_eq!(second.status(), StatusCode::OK);
    let second: Value = second.json().await.unwrap();
    let reused = refresh(api, &first["refresh_token"]).await;
    assert_eq!(reused.status(), StatusCode::UNAUTHORIZED);
    // Owner or thief: the newer token of the family is void, too.
    let after = refresh(api, &second["refresh_token"]).await;
    assert_eq!(after.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(
        api.metric("commerce_refresh_tokens_total{outcome=\"reused\"}")
            .await,
        1
    );

    let again = post(api, "/api/v1/tokens", credentials("ann@shop.example")).await;
    let again: Value = again.json().await.unwrap();
    let out = json!({ "refresh_token": again["refresh_token"] });
    let out = post(api, "/api/v1/tokens/revoke", out).await;
    assert_eq!(out.status(), StatusCode::NO_CONTENT);
    let after = refresh(api, &again["refresh_token"]).await;
    assert_eq!(after.status(), StatusCode::UNAUTHORIZED);
    for wrong in [
        json!({ "email": "ann@shop.example", "password": "wrong horse" }),
        json!({ "email": "nobody@shop.example", "password": "wrong horse" }),
    ] {
        let refused = post(api, "/api/v1/tokens", wrong).await;
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    }
    service.stop_and_audit().await;
}

async fn a_period_is_paid_once_however_often_it_is_asked_for(on: Backend) {
    let service = InProcess::start(on, &[product("member-30d", 10)]).await;
    let api = &service.api;
    let tokens = member(api, "bob@shop.example").await;
    let token = tokens["access_token"].as_str().unwrap();
    let before = with_token(api, Method::GET, "/api/v1/membership", token).await;
    let before: Value = before.json().await.unwrap();
    assert_eq!(
        (&before["standing"], &before["period"]),
        (&json!("lapsed"), &json!(0))
    );

    let order = bought(api, "k1", "member-30d", 1).await;
    let first = renew(api, token, 1, &order).await;
    let first: Value = first.json().await.unwrap();
    assert_eq!(first["standing"], "active");
    let again: Value = renew(api, token, 1, &order).await.json().await.unwrap();
    assert_eq!(again, first, "the same period once more changes nothing");
    let next = bought(api, "k2", "member-30d", 1).await;
    let skipped = renew(api, token, 3, &next).await;
    assert_eq!(skipped.status(), StatusCode::CONFLICT);
    let second: Value = renew(api, token, 2, &next).await.json().await.unwrap();
    let until = |answer: &Value| answer["paid_until_ms"].as_i64().unwrap();
    assert_eq!(until(&second) - until(&first), 30 * 24 * 3_600 * 1_000);
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM renewal"), 2);
}

/// A member cannot give itself a period: money must have come in for it, and stays.
async fn a_period_takes_an_order_that_was_paid_for_it_and_only_once(on: Backend) {
    let products = [product("member-30d", 10), product("a", 10)];
    let service = InProcess::start(on, &products).await;
    let api = &service.api;
    let tokens = member(api, "mia@shop.example").await;
    let token = tokens["access_token"].as_str().unwrap();
    let refused = async |period: u32, order: &str, why: &str| {
        let answer = renew(api, token, period, order).await;
        assert_eq!(answer.status(), StatusCode::CONFLICT, "{why}");
        let problem: Value = answer.json().await.unwrap();
        assert!(
            problem["detail"].as_str().unwrap().contains(why),
            "{problem}"
        );
    };
    let bare = with_token(api, Method::PUT, "/api/v1/membership/periods/1", token).await;
    assert_eq!(bare.status(), StatusCode::BAD_REQUEST);
    refused(1, "x", "no such order").await;
    let unpaid = api.place("k1", &[("member-30d", 1)]).await;
    let location = unpaid.headers()["location"].to_str().unwrap().to_owned();
    let unpaid: Value = unpaid.json().await.unwrap();
    let unpaid = unpaid["id"].as_str().unwrap();
    refused(1, unpaid, "not paid").await;
    refused(1, &bought(api, "k2", "a", 1).await, "not for one period").await;
    refused(1, &bought(api, "k3", "member-30d", 2).await, "not for one").await;
    let paid = api.change(&location, "pay", "p", json!({})).await;
    assert_eq!(paid.status(), StatusCode::OK);
    let renewed = renew(api, token, 1, unpaid).await;
    assert_eq!(renewed.status(), StatusCode::OK);
    refused(2, unpaid, "another period").await;
    // What it bought is in use: the money does not go back.
    let refund = api.change(&location, "refund", "r", json!({})).await;
    assert_eq!(refund.status(), StatusCode::CONFLICT);
    // And a refunded order buys nothing.
    let back = bought(api, "k4", "member-30d", 1).await;
    let location = format!("/api/v1/orders/{back}");
    api.change(&location, "refund", "r2", json!({})).await;
    refused(2, &back, "refunded").await;
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM renewal"), 1);
}

async fn members_pay_members_prices_while_they_are_entitled(on: Backend) {
    let campaign = r#"
        [[discounts]]
        id = "club"
        member_price_minor = 1500
        skus = ["a"]
        when = "member"

        [[discounts]]
        id = "welcome"
        threshold = { at_least_minor = 0, off_minor = 100 }
        when = { coupon = { code = "WELCOME", stacks = true } }
    "#;
    let (service, _campaign) = with_campaign(on, campaign).await;
    let api = &service.api;
    let tokens = member(api, "eve@shop.example").await;
    let token = tokens["access_token"].as_str().unwrap();
    let order = async |key: &str, token: Option<&str>, coupons: &[&str]| {
        let mut request = api
            .request(Method::POST, "/api/v1/orders")
            .header("idempotency-key", key)
            .json(&json!({ "lines": [{ "sku": "a", "quantity": 2 }], "coupons": coupons }));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await.unwrap()
    };
    let total = async |response: Response| {
        assert_eq!(response.status(), StatusCode::CREATED);
        let order: Value = response.json().await.unwrap();
        order["total"]["minor"].as_i64().unwrap()
    };
    assert_eq!(total(order("k1", None, &[]).await).await, 2 * 1999);
    assert_eq!(
        total(order("k2", Some(token), &[]).await).await,
        2 * 1999,
        "not entitled yet"
    );
    let membership = bought(api, "m", "member-30d", 1).await;
    let renewed = renew(api, token, 1, &membership).await;
    assert_eq!(renewed.status(), StatusCode::OK);
    assert_eq!(total(order("k3", Some(token), &[]).await).await, 2 * 1500);
    assert_eq!(
        total(order("k4", Some(token), &["WELCOME"]).await).await,
        2 * 1500 - 100
    );
    let unknown = order("k5", None, &["NOPE"]).await;
    assert_eq!(unknown.status(), StatusCode::UNPROCESSABLE_ENTITY);
    let forged = order("k6", Some("e30.e30.e30"), &[]).await;
    assert_eq!(forged.status(), StatusCode::UNAUTHORIZED);
    service.stop_and_audit().await;
}

#[tokio::test]
async fn the_published_keys_verify_a_token() {
    let service = InProcess::start(Backend::Sqlite, &[product("a", 1)]).await;
    let tokens = member(&service.api, "kim@shop.example").await;
    let set = service.api.get_json("/.well-known/jwks.json").await;
    let set: jsonwebtoken::jwk::JwkSet = serde_json::from_value(set).unwrap();
    let token = tokens["access_token"].as_str().unwrap();
    let header = jsonwebtoken::decode_header(token).unwrap();
    let key = set.find(&header.kid.unwrap()).unwrap();
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::EdDSA);
    validation.set_issuer(&["https://shop.test"]);
    validation.set_audience(&["shop"]);
    let key = jsonwebtoken::DecodingKey::from_jwk(key).unwrap();
    let claims = jsonwebtoken::decode::<Value>(token, &key, &validation)
        .unwrap()
        .claims;
    let life = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
    assert_eq!(life, 600);
    service.stop_and_audit().await;
}
