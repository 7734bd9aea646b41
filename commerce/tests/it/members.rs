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
async fn member(api: &Api, email: &str) -> Value {
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

async fn with_token(api: &Api, method: Method, path: &str, token: &str) -> Response {
    let request = api.request(method, path).bearer_auth(token);
    request.send().await.unwrap()
}

crate::on_both_stores!(
    a_refresh_token_works_once_and_a_copy_ends_the_login,
    a_period_is_paid_once_however_often_it_is_asked_for,
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
    let service = InProcess::start(on, &[product("a", 1)]).await;
    let api = &service.api;
    let tokens = member(api, "bob@shop.example").await;
    let token = tokens["access_token"].as_str().unwrap();
    let before = with_token(api, Method::GET, "/api/v1/membership", token).await;
    let before: Value = before.json().await.unwrap();
    assert_eq!(
        (&before["standing"], &before["period"]),
        (&json!("lapsed"), &json!(0))
    );

    let renew = |period: u32| {
        let path = format!("/api/v1/membership/periods/{period}");
        async move { with_token(api, Method::PUT, &path, token).await }
    };
    let first: Value = renew(1).await.json().await.unwrap();
    assert_eq!(first["standing"], "active");
    let again: Value = renew(1).await.json().await.unwrap();
    assert_eq!(again, first, "the same period once more changes nothing");
    let skipped = renew(3).await;
    assert_eq!(skipped.status(), StatusCode::CONFLICT);
    let second: Value = renew(2).await.json().await.unwrap();
    let until = |answer: &Value| answer["paid_until_ms"].as_i64().unwrap();
    assert_eq!(until(&second) - until(&first), 30 * 24 * 3_600 * 1_000);
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM renewal"), 2);
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
    with_token(api, Method::PUT, "/api/v1/membership/periods/1", token).await;
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
