//! The auditor finds each kind of damage. A check that never fails proves nothing.

use commerce::audit::audit;
use commerce::store::Target;
use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::json;

use crate::harness::{InProcess, header, product};

#[tokio::test]
async fn every_kind_of_damage_is_found_by_name() {
    let cases: &[(&str, &[&str])] = &[
        // Sold twice: stock lower than the orders explain.
        (
            "UPDATE stock SET available = available - 1 WHERE sku = 'a'",
            &["stock_conserved", "ledger_balanced"],
        ),
        // Stock and initial wrong together: only the ledger notices.
        (
            "UPDATE stock SET available = available + 1, initial = initial + 1 WHERE sku = 'a'",
            &["ledger_balanced"],
        ),
        (
            "UPDATE stock_movement SET available = available - 1 WHERE reason = 'reserve' AND sku = 'a'",
            &["ledger_balanced", "ledger_explained"],
        ),
        // Split in two: the balance holds, the entries do not.
        (
            "INSERT INTO stock_movement (sku, reason, order_id, available, reserved, sold, at_ms)
                 SELECT sku, reason, order_id, -1, 1, 0, 0 FROM stock_movement WHERE available = -2;
             UPDATE stock_movement SET available = -1, reserved = 1 WHERE available = -2",
            &["ledger_explained"],
        ),
        (
            "DELETE FROM idempotency WHERE order_id IS NOT NULL",
            &["one_order_per_key"],
        ),
        // A refusal that claims to have created something.
        (
            "UPDATE idempotency SET status = 201 WHERE status = 409",
            &["one_order_per_key"],
        ),
        (
            "UPDATE idempotency SET principal = 'thief' WHERE status = 201",
            &["one_order_per_key"],
        ),
        (
            "UPDATE orders SET total_minor = total_minor + 1 WHERE status = 'placed'",
            &["order_totals"],
        ),
        // Reserved for nobody, and sold without an order: the rows still add up.
        (
            "UPDATE stock SET reserved = reserved + 1, available = available - 1 WHERE sku = 'a';
             UPDATE stock_movement SET available = available - 1, reserved = reserved + 1
                 WHERE reason = 'initial' AND sku = 'a'",
            &["stock_explained"],
        ),
        (
            "UPDATE orders SET status = 'expired' WHERE status = 'placed'",
            &["stock_explained"],
        ),
        ("DELETE FROM payment_event", &["payments_add_up"]),
        (
            "DELETE FROM payment_event; DELETE FROM refund; DELETE FROM payment",
            &["payments_add_up", "references_intact"],
        ),
        (
            "UPDATE orders SET refunded_minor = refunded_minor - 1 WHERE refunded_minor > 0",
            &["refunds_reverse_lines"],
        ),
        (
            "UPDATE refund_line SET quantity = quantity + 2",
            &["stock_explained", "refunds_reverse_lines"],
        ),
        (
            "INSERT INTO sink (id, kind, url, secret, cursor, created_at_ms) VALUES ('s', 'risk', '', '', 99, 0)",
            &["events_delivered_or_pending"],
        ),
        // A cheaper unit with the old line total.
        (
            "UPDATE order_line SET unit_price_minor = 1 WHERE sku = 'a'",
            &["order_totals"],
        ),
        (
            "DELETE FROM outbox",
            &["outbox_complete", "events_delivered_or_pending"],
        ),
        (
            "INSERT INTO outbox (event_id, topic, order_id, version, principal, actor, trace_id, payload, at_ms)
                 SELECT 'twice', topic, order_id, version, principal, actor, trace_id, payload, at_ms
                 FROM outbox WHERE topic = 'order.placed' LIMIT 1",
            &["outbox_complete"],
        ),
        // Lost before it was delivered.
        (
            "DELETE FROM outbox WHERE seq = 1",
            &["outbox_complete", "events_delivered_or_pending"],
        ),
        // A place that nobody holds.
        (
            "INSERT INTO buying_group VALUES ('g', 'a', 2, 1, 'CNY', 'forming', 1, 0, 2, 0, 1)",
            &["groups_conserved"],
        ),
        (
            "INSERT INTO member VALUES ('m', 'm@x.y', '', 1, 5, 0)",
            &["renewals_explained"],
        ),
        (
            "DELETE FROM product WHERE sku = 'b'",
            &["references_intact"],
        ),
        // An index without the table's row.
        (
            "PRAGMA writable_schema = ON;
             UPDATE sqlite_schema SET sql = replace(sql, '(order_id)', '(reason)')
                 WHERE name = 'refund_by_order'",
            &["file_intact"],
        ),
    ];
    let service = InProcess::start(Backend::Sqlite, &[product("a", 10), product("b", 10)]).await;
    let api = &service.api;
    api.place("k1", &[("a", 2), ("b", 1)]).await;
    api.place("k2", &[("a", 99)]).await;
    let paid = api.place("k3", &[("b", 2)]).await;
    let location = header(&paid, "location");
    let pay = api.change(location, "pay", "k4", json!({})).await;
    assert_eq!(pay.status(), StatusCode::OK);
    let lines = json!({ "lines": [{ "sku": "b", "quantity": 1 }] });
    let refund = api.change(location, "refund", "k5", lines).await;
    assert_eq!(refund.status(), StatusCode::OK);
    let database = service.stop_and_audit().await;
    let directory = tempfile::tempdir().unwrap();
    for (damage, expected) in cases {
        let copy = directory.path().join("copy.db");
        std::fs::copy(database.path(), &copy).unwrap();
        let connection = rusqlite::Connection::open(&copy).unwrap();
        // The constraints are the first guard; this is about the second.
        connection
            .execute_batch("PRAGMA foreign_keys = OFF; PRAGMA ignore_check_constraints = ON")
            .unwrap();
        connection.execute_batch(damage).unwrap();
        drop(connection);
        let report = audit(&Target::Sqlite(copy)).unwrap();
        assert_eq!(
            report.violated().collect::<Vec<_>>(),
            *expected,
            "{damage}\n{report}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_on_postgres_as_well() {
    let cases: &[(&str, &[&str])] = &[
        (
            "ALTER TABLE stock DROP CONSTRAINT stock_check; UPDATE stock SET available = available - 1",
            &["stock_conserved", "ledger_balanced"],
        ),
        (
            "UPDATE stock_movement SET available = available - 1 WHERE reason = 'reserve'",
            &["ledger_balanced", "ledger_explained"],
        ),
        (
            "DELETE FROM idempotency WHERE order_id IS NOT NULL",
            &["one_order_per_key"],
        ),
        (
            "UPDATE orders SET total_minor = total_minor - 1",
            &["order_totals"],
        ),
        ("DELETE FROM payment_event", &["payments_add_up"]),
        (
            "UPDATE outbox SET version = 1 WHERE version = 2",
            &["outbox_complete"],
        ),
        // An event that no sink was ever to get.
        (
            "DELETE FROM delivery WHERE seq = 1",
            &["events_delivered_or_pending"],
        ),
    ];
    let service = InProcess::with(Backend::Postgres, &[product("a", 10)], |config| {
        // Nobody listens there: events stay pending.
        config.risk_url = Some("http://127.0.0.1:9/".to_owned());
    })
    .await;
    let placed = service.api.place("k1", &[("a", 2)]).await;
    let location = header(&placed, "location");
    let pay = service.api.change(location, "pay", "k2", json!({})).await;
    assert_eq!(pay.status(), StatusCode::OK);
    let database = service.stop_and_audit().await;
    let server = xtask::server::Postgres::shared().unwrap();
    let original = database.argument();
    let original = original.rsplit('/').next().unwrap();
    for (n, (damage, expected)) in cases.iter().enumerate() {
        let copy = format!("{original}_damaged_{n}");
        // A template may have no sessions. The service's pool closes its own in its time, and may
        // make new ones until then.
        let shut = format!("ALTER DATABASE {original} ALLOW_CONNECTIONS false");
        server.query("postgres", &shut).unwrap();
        let end = format!(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = '{original}'"
        );
        server.query("postgres", &end).unwrap();
        let create = format!("CREATE DATABASE {copy} TEMPLATE {original}");
        server.query("postgres", &create).unwrap();
        server.query(&copy, damage).unwrap();
        let target = Target::Postgres(server.url(&copy));
        let report = tokio::task::spawn_blocking(move || audit(&target).unwrap());
        let report = report.await.unwrap();
        assert_eq!(
            report.violated().collect::<Vec<_>>(),
            *expected,
            "{damage}\n{report}"
        );
    }
}
