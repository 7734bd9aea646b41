//! Batches whose commands fail, that cannot begin, or that find the disk full.

use std::path::Path;

use super::*;
use crate::audit::audit;
use crate::catalogue::{NewProduct, Sku};
use crate::idempotency::{Fingerprint, Key, Reply, Scope};
use crate::money::{Currency, Money};
use crate::order::Draft;
use crate::store::{Verdict, add_products_if_empty, open_to_write};

fn database(path: &Path) -> Connection {
    let connection = open_to_write(path).unwrap();
    let product = NewProduct {
        sku: Sku::parse("a").unwrap(),
        name: "A".to_owned(),
        description: String::new(),
        price: Money::new(1, Currency::CNY),
        initial: 1_000_000,
    };
    add_products_if_empty(&connection, &[product]).unwrap();
    connection
}

fn render(_: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    let content_type = "text/plain".to_owned();
    // Large, so that few orders fill a small file.
    let body = vec![b'x'; 10_000];
    Ok(Reply {
        status: 201,
        content_type,
        location: None,
        etag: None,
        body,
    })
}

fn fail_to_render(_: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    Err(serde::ser::Error::custom("not today"))
}

fn order(key: &str) -> PlaceOrder {
    let key = Key::parse(key.as_bytes()).unwrap();
    PlaceOrder {
        scope: Scope {
            principal: "p".to_owned(),
            route: "r",
            key,
        },
        fingerprint: Fingerprint::of(b""),
        draft: Draft::new([("a", 1)]).unwrap(),
        render,
    }
}

fn orders(path: &Path) -> usize {
    let connection = Connection::open(path).unwrap();
    let count = connection.query_row("SELECT count(*) FROM orders", [], |row| {
        row.get::<_, u32>(0)
    });
    usize::try_from(count.unwrap()).unwrap()
}

/// Commits one batch on this thread and gives the answers in order.
fn commit_batch(connection: &Connection, orders: Vec<PlaceOrder>) -> Vec<Answer<Placement>> {
    let (mut batch, mut answers) = (Vec::new(), Vec::new());
    for order in orders {
        let (answer, answered) = oneshot::channel();
        batch.push(Command::Place(order, answer));
        answers.push(answered);
    }
    commit(connection, &mut batch, &Metrics::new());
    assert!(batch.is_empty());
    answers
        .into_iter()
        .map(|answered| answered.blocking_recv().unwrap())
        .collect()
}

#[test]
fn a_command_that_fails_leaves_its_batch_alone_and_takes_no_stock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let connection = database(&path);
    // It fails after stock, order and ledger were written.
    let failing = PlaceOrder {
        render: fail_to_render,
        ..order("k2")
    };
    let answers = commit_batch(&connection, vec![order("k1"), failing, order("k3")]);
    assert!(matches!(answers[0], Ok(Placement::Placed { .. })));
    assert!(matches!(answers[1], Err(StoreError::Render(_))));
    assert!(matches!(answers[2], Ok(Placement::Placed { .. })));
    assert_eq!(orders(&path), 2);
    let report = audit(&path).unwrap();
    assert!(report.is_clean(), "{report}");
}

#[test]
fn a_batch_that_cannot_begin_answers_everyone_and_the_next_one_works() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let connection = database(&path);
    connection.busy_timeout(Duration::ZERO).unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let answers = commit_batch(&connection, vec![order("k1"), order("k2")]);
    assert_eq!(answers.len(), 2);
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(StoreError::Batch(_))))
    );
    other.execute_batch("ROLLBACK").unwrap();
    let answers = commit_batch(&connection, vec![order("k1"), order("k2")]);
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Ok(Placement::Placed { .. })))
    );
}

#[test]
fn a_full_disk_fails_orders_and_loses_none_that_were_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let connection = database(&path);
    let pages: u32 = connection
        .pragma_query_value(None, "page_count", |row| row.get(0))
        .unwrap();
    connection
        .pragma_update(None, "max_page_count", pages + 50)
        .unwrap();
    let (mut placed, mut failed) = (0_usize, 0_usize);
    for batch in 0..10 {
        let batch = (0..5).map(|n| order(&format!("k{batch}-{n}"))).collect();
        for answer in commit_batch(&connection, batch) {
            match answer {
                Ok(Placement::Placed { .. }) => placed += 1,
                Ok(other) => panic!("{other:?}"),
                Err(_) => failed += 1,
            }
        }
    }
    assert!(placed > 0 && failed > 0, "{placed} placed, {failed} failed");
    connection
        .pragma_update(None, "max_page_count", 1_000_000)
        .unwrap();
    let retried = commit_batch(&connection, vec![order("k9-4")]);
    assert!(matches!(retried[0], Ok(Placement::Placed { .. })));
    assert_eq!(orders(&path), placed + 1);
    let report = audit(&path).unwrap();
    assert!(report.is_clean(), "{report}");
}
