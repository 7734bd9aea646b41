//! Batches whose commands fail, that cannot begin, or that find the disk full.

use std::path::Path;

use super::*;
use crate::audit::audit;
use crate::catalogue::{NewProduct, Sku};
use crate::command::place::{Place, Placed};
use crate::command::{Answer, Keyed, Verdict};
use crate::event::Origin;
use crate::idempotency::{Fingerprint, Key, Reply, Scope};
use crate::money::{Currency, Money};
use crate::order::Draft;
use crate::store::{Target, add_products_if_empty, schema};
use crate::trace::TraceId;

fn database(path: &Path) -> Batcher {
    let mut connection = Target::Sqlite(path.into()).open().unwrap();
    schema::migrate(connection.as_mut()).unwrap();
    let product = NewProduct {
        sku: Sku::parse("a").unwrap(),
        name: "A".to_owned(),
        description: String::new(),
        price: Money::new(1, Currency::CNY),
        initial: 1_000_000,
    };
    add_products_if_empty(connection.as_mut(), &[product]).unwrap();
    Batcher {
        connection,
        metrics: Metrics::new(),
        events: watch::channel(0).0,
        deadline_ms: None,
        learned: Instant::now(),
        buffer: Vec::new(),
    }
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

fn order(key: &str) -> Keyed<Place> {
    let key = Key::parse(key.as_bytes()).unwrap();
    Keyed {
        scope: Scope {
            principal: "p".to_owned(),
            route: "r",
            key,
        },
        fingerprint: Fingerprint::of(b""),
        effect: Place {
            principal: "p".to_owned(),
            origin: Origin {
                actor: "p".to_owned(),
                trace: TraceId::generate(),
            },
            draft: Draft::new([("a", 1)]).unwrap(),
            terms: crate::command::place::Terms::default(),
            hold: Duration::from_secs(900),
            is_sold_out: false,
            render,
        },
    }
}

fn orders(path: &Path) -> usize {
    let connection = rusqlite::Connection::open(path).unwrap();
    let count = connection.query_row("SELECT count(*) FROM orders", [], |row| {
        row.get::<_, u32>(0)
    });
    usize::try_from(count.unwrap()).unwrap()
}

type Given = Result<Answer<Placed>, StoreError>;

/// Commits one batch on this thread and gives the answers in order.
fn commit_batch(batcher: &mut Batcher, orders: Vec<Keyed<Place>>) -> Vec<Given> {
    let (mut batch, mut answers) = (Vec::<Box<dyn Job>>::new(), Vec::new());
    for command in orders {
        let (caller, answered) = oneshot::channel();
        batch.push(Box::new(Called {
            command,
            output: None,
            caller,
        }));
        answers.push(answered);
    }
    batcher.commit(&mut batch);
    assert!(batch.is_empty());
    answers
        .into_iter()
        .map(|answered| answered.blocking_recv().unwrap())
        .collect()
}

fn is_placed(answer: &Given) -> bool {
    matches!(answer, Ok(Answer::Done(_, Placed::Order { .. })))
}

fn assert_clean(path: &Path) {
    let report = audit(&Target::Sqlite(path.into())).unwrap();
    assert!(report.is_clean(), "{report}");
}

#[test]
fn a_command_that_fails_leaves_its_batch_alone_and_takes_no_stock() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let mut batcher = database(&path);
    // It fails after stock, order and ledger were written.
    let mut failing = order("k2");
    failing.effect.render = fail_to_render;
    let answers = commit_batch(&mut batcher, vec![order("k1"), failing, order("k3")]);
    assert!(is_placed(&answers[0]));
    assert!(matches!(answers[1], Err(StoreError::Render(_))));
    assert!(is_placed(&answers[2]));
    assert_eq!(orders(&path), 2);
    assert_clean(&path);
}

#[test]
fn a_batch_that_cannot_begin_answers_everyone_and_the_next_one_works() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let mut batcher = database(&path);
    batcher
        .connection
        .script("PRAGMA busy_timeout = 0")
        .unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let answers = commit_batch(&mut batcher, vec![order("k1"), order("k2")]);
    assert_eq!(answers.len(), 2);
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(StoreError::Batch(_))))
    );
    other.execute_batch("ROLLBACK").unwrap();
    let answers = commit_batch(&mut batcher, vec![order("k1"), order("k2")]);
    assert!(answers.iter().all(is_placed));
}

#[test]
fn a_full_disk_fails_orders_and_loses_none_that_were_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.db");
    let mut batcher = database(&path);
    let mut pages = batcher.connection.query("PRAGMA page_count", &[]).unwrap();
    let pages: i64 = pages.remove(0).take().unwrap();
    let limit = format!("PRAGMA max_page_count = {}", pages + 50);
    batcher.connection.query(&limit, &[]).unwrap();
    let (mut placed, mut failed) = (0_usize, 0_usize);
    for batch in 0..10 {
        let batch = (0..5).map(|n| order(&format!("k{batch}-{n}"))).collect();
        for answer in commit_batch(&mut batcher, batch) {
            match answer {
                Ok(Answer::Done(_, Placed::Order { .. })) => placed += 1,
                Ok(other) => panic!("{other:?}"),
                Err(_) => failed += 1,
            }
        }
    }
    assert!(placed > 0 && failed > 0, "{placed} placed, {failed} failed");
    batcher
        .connection
        .query("PRAGMA max_page_count = 1000000", &[])
        .unwrap();
    let retried = commit_batch(&mut batcher, vec![order("k9-4")]);
    assert!(is_placed(&retried[0]));
    assert_eq!(orders(&path), placed + 1);
    assert_clean(&path);
}
