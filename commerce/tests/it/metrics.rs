//! What operators see.

use commerce::metrics::NAMES;
use commerce::store::sql::Backend;
use reqwest::StatusCode;

use crate::harness::{InProcess, header, product};

async fn a_scrape_has_every_documented_name_and_counts_what_happened(on: Backend) {
    let service = InProcess::start(on, &[product("a", 5)]).await;
    let api = &service.api;
    api.place("k1", &[("a", 3)]).await;
    api.place("k1", &[("a", 3)]).await;
    api.place("k1", &[("a", 1)]).await;
    api.place("k2", &[("a", 3)]).await;
    api.place("k3", &[("ghost", 1)]).await;
    api.place("k4", &[]).await;
    api.get("/products/a").await;
    api.get("/wp-login.php").await;

    let scrape = api.get("/metrics").await;
    assert_eq!(
        header(&scrape, "content-type"),
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    let text = scrape.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"));
    for name in NAMES {
        let family = name.strip_suffix("_total").unwrap_or(name);
        assert!(
            text.contains(&format!("# HELP {family} ")),
            "no help for {name}"
        );
        let sampled = text.lines().any(|line| line.starts_with(name));
        // Counters with labels and no event, and only they, have no sample yet.
        assert!(sampled, "no sample of {name} in\n{text}");
    }
    for line in [
        "commerce_orders_created_total 1",
        "commerce_orders_refused_total{reason=\"insufficient_stock\"} 1",
        "commerce_orders_refused_total{reason=\"invalid_request\"} 1",
        "commerce_orders_refused_total{reason=\"key_reused\"} 1",
        "commerce_orders_refused_total{reason=\"unknown_sku\"} 1",
        "commerce_revenue_minor_units_total{currency=\"CNY\"} 5997",
        "commerce_idempotent_replays_total 1",
        "commerce_stock_units_deducted_total 3",
        "commerce_writer_queue_commands 0",
        // The first signing key is a command, too.
        "commerce_writer_batch_commands_count 6",
        "commerce_writer_commit_duration_seconds_count 6",
        "commerce_requests_in_flight 1",
        "commerce_requests_total{route=\"/api/v1/orders\",method=\"POST\",status_class=\"2xx\"} 2",
        "commerce_requests_total{route=\"/api/v1/orders\",method=\"POST\",status_class=\"4xx\"} 4",
        "commerce_requests_total{route=\"/products/{sku}\",method=\"GET\",status_class=\"2xx\"} 1",
        "commerce_requests_total{route=\"unmatched\",method=\"GET\",status_class=\"4xx\"} 1",
        "commerce_request_duration_seconds_count{route=\"/api/v1/orders\"} 6",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} not in\n{text}"
        );
    }
    service.stop_and_audit().await;
}

async fn a_working_service_is_alive_and_ready(on: Backend) {
    let service = InProcess::start(on, &[product("a", 1)]).await;
    assert_eq!(service.api.get("/livez").await.status(), StatusCode::OK);
    assert_eq!(service.api.get("/readyz").await.status(), StatusCode::OK);
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    a_scrape_has_every_documented_name_and_counts_what_happened,
    a_working_service_is_alive_and_ready,
);
