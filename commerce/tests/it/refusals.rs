//! What is wrong is refused by name, as a problem document, and changes nothing.

use commerce::store::sql::Backend;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::harness::{Api, InProcess, header, product};

/// One faulty request, and how it must be refused.
struct Faulty<'a> {
    headers: &'a [(&'a str, &'a str)],
    body: &'a str,
    status: u16,
    kind: &'a str,
    detail: &'a str,
}

impl Faulty<'_> {
    async fn is_refused_by(&self, api: &Api) {
        let Self {
            headers,
            body,
            status,
            kind,
            detail,
        } = self;
        let mut request = api
            .request(Method::POST, "/api/v1/orders")
            .body((*body).to_owned());
        for (name, value) in *headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), *status, "{kind}: {detail}");
        assert_eq!(
            header(&response, "content-type"),
            "application/problem+json"
        );
        let problem: Value = response.json().await.unwrap();
        assert_eq!(
            problem["type"],
            format!("urn:commerce:problem:{kind}"),
            "{problem}"
        );
        assert_eq!(problem["status"], *status);
        assert!(problem["title"].is_string());
        assert!(
            problem["detail"].as_str().unwrap().contains(detail),
            "{detail} not in {problem}"
        );
    }
}

const JSON: (&str, &str) = ("content-type", "application/json");
const KEY: (&str, &str) = ("idempotency-key", "k");
const GOOD: &str = r#"{"lines":[{"sku":"a","quantity":1}]}"#;

async fn faulty_headers_are_refused_by_name_and_change_nothing(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let key_kind = "invalid-idempotency-key";
    for (headers, status, kind, detail) in [
        (&[JSON][..], 400, key_kind, "required"),
        (
            &[JSON, ("idempotency-key", "\"open")],
            400,
            key_kind,
            "quotes",
        ),
        (
            &[JSON, KEY, ("idempotency-key", "two")],
            400,
            key_kind,
            "once",
        ),
        (
            &[JSON, KEY, ("x-tenant", "")],
            400,
            "bad-request",
            "x-tenant",
        ),
        (
            &[KEY, ("content-type", "text/plain")],
            415,
            "unsupported-media-type",
            "json",
        ),
    ] {
        let faulty = Faulty {
            headers,
            body: GOOD,
            status,
            kind,
            detail,
        };
        faulty.is_refused_by(&service.api).await;
    }
    let database = service.stop_and_audit().await;
    assert_eq!(database.count("SELECT count(*) FROM idempotency"), 0);
}

async fn faulty_bodies_are_refused_by_name_and_leave_the_key_free(on: Backend) {
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let large = format!(r#"{{"lines":[],"pad":"{}"}}"#, "x".repeat(64 * 1024));
    let (malformed, invalid) = ((400, "malformed-body"), (422, "invalid-order"));
    for (body, (status, kind), detail) in [
        ("{\"lines\":\n  [}", malformed, "line 2 column 4"),
        ("", malformed, "line 1 column 0"),
        (
            r#"{"lines":[],"coupon":"x"}"#,
            malformed,
            "unknown field `coupon`",
        ),
        (
            r#"{"lines":[{"sku":"a","quantity":1,"price":1}]}"#,
            malformed,
            "`price`",
        ),
        (
            r#"{"lines":[{"sku":"a","quantity":1.5}]}"#,
            malformed,
            "line 1 column",
        ),
        (
            r#"{"lines":[{"sku":"a","quantity":-1}]}"#,
            malformed,
            "line 1 column",
        ),
        (r#"{"lines":[]}"#, invalid, "at least one line"),
        (
            r#"{"lines":[{"sku":"a","quantity":0}]}"#,
            invalid,
            "quantity",
        ),
        (r#"{"lines":[{"sku":"a b","quantity":1}]}"#, invalid, "SKU"),
        (&large, (413, "body-too-large"), "65536 bytes"),
    ] {
        let faulty = Faulty {
            headers: &[JSON, KEY],
            body,
            status,
            kind,
            detail,
        };
        faulty.is_refused_by(&service.api).await;
    }
    // Escapes are JSON too, and no media type is taken for JSON.
    let escaped = r#"{"lines":[{"sku":"\u0061","quantity":1}]}"#;
    let request = service
        .api
        .request(Method::POST, "/api/v1/orders")
        .header(KEY.0, KEY.1);
    assert_eq!(
        request.body(escaped).send().await.unwrap().status(),
        StatusCode::CREATED
    );
    service.stop_and_audit().await;
}

async fn wrong_paths_methods_and_pages_are_problems_too(on: Backend) {
    let service = InProcess::start(on, &[product("a", 1)]).await;
    for (path, status) in [
        ("/nothing", 404),
        ("/api/v1/orders/not-an-id", 404),
        ("/api/v1/orders/01890000-0000-7000-8000-000000000000", 404),
        ("/api/v1/products/ghost", 404),
        ("/products/a%20b", 404),
        ("/api/v1/orders?limit=0", 400),
        ("/api/v1/orders?limit=101", 400),
        ("/api/v1/orders?limit=x", 400),
        ("/api/v1/orders?page=2", 400),
        (
            "/api/v1/orders?after=01890000-0000-7000-8000-000000000000",
            400,
        ),
        ("/api/v1/products?after=a%20b", 400),
    ] {
        let response = service.api.get(path).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(
            header(&response, "content-type"),
            "application/problem+json",
            "{path}"
        );
    }
    let response = service
        .api
        .request(Method::DELETE, "/api/v1/orders")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(
        header(&response, "content-type"),
        "application/problem+json"
    );
    let allow = header(&response, "allow");
    assert!(allow.contains("GET") && allow.contains("POST"), "{allow}");
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    faulty_headers_are_refused_by_name_and_change_nothing,
    faulty_bodies_are_refused_by_name_and_leave_the_key_free,
    wrong_paths_methods_and_pages_are_problems_too,
);
