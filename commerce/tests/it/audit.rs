//! The auditor finds each kind of damage. A check that never fails proves nothing.

use commerce::audit::audit;

use crate::harness::{InProcess, product};

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
            "UPDATE stock_movement SET delta = delta - 1 WHERE reason = 'sale' AND sku = 'a'",
            &["ledger_balanced", "ledger_explained"],
        ),
        // Split in two: the balance holds, the entries do not.
        (
            "INSERT INTO stock_movement (sku, delta, reason, order_id, at_ms)
                 SELECT sku, -1, 'sale', order_id, 0 FROM stock_movement WHERE delta = -2;
             UPDATE stock_movement SET delta = -1 WHERE delta = -2",
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
            "UPDATE orders SET total_minor = total_minor + 1",
            &["order_totals"],
        ),
        // A cheaper unit with the old line total.
        (
            "UPDATE order_line SET unit_price_minor = 1 WHERE sku = 'a'",
            &["order_totals"],
        ),
        ("DELETE FROM outbox", &["outbox_complete"]),
        (
            "INSERT INTO outbox (event_id, topic, order_id, payload, at_ms)
                 SELECT 'twice', topic, order_id, payload, at_ms FROM outbox",
            &["outbox_complete"],
        ),
        (
            "DELETE FROM product WHERE sku = 'b'",
            &["references_intact"],
        ),
        // An index without the table's row.
        (
            "PRAGMA writable_schema = ON;
             UPDATE sqlite_schema SET sql = replace(sql, '(principal, seq)', '(status, seq)')
                 WHERE name = 'orders_by_principal'",
            &["file_intact"],
        ),
    ];
    let service = InProcess::start(&[product("a", 10), product("b", 10)]).await;
    service.api.place("k1", &[("a", 2), ("b", 1)]).await;
    service.api.place("k2", &[("a", 99)]).await;
    let (database, directory) = service.stop_and_audit().await;
    for (damage, expected) in cases {
        let copy = directory.path().join("copy.db");
        std::fs::copy(&database, &copy).unwrap();
        let connection = rusqlite::Connection::open(&copy).unwrap();
        // The constraints are the first guard; this is about the second.
        connection
            .execute_batch("PRAGMA foreign_keys = OFF; PRAGMA ignore_check_constraints = ON")
            .unwrap();
        connection.execute_batch(damage).unwrap();
        drop(connection);
        let report = audit(&copy).unwrap();
        assert_eq!(
            report.violated().collect::<Vec<_>>(),
            *expected,
            "{damage}\n{report}"
        );
    }
}
