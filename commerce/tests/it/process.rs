//! The executable: crashes, drains, and the audit command.

use std::collections::HashSet;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::events::Sink;
use crate::harness::{Api, Database, Process, eventually, header, product};

fn run_audit(database: &Database) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commerce"));
    command
        .args(["audit", "--store"])
        .arg(database.argument())
        .output()
        .unwrap()
}

/// A client's memory of one order it asked for.
struct Asked {
    key: String,
    /// Location and body, if the answer arrived.
    acknowledged: Option<(String, Value)>,
}

/// Orders with keys of its own until the service is gone.
async fn order_until_gone(api: &Api, name: String, acknowledged: Arc<AtomicUsize>) -> Vec<Asked> {
    let mut asked = Vec::new();
    for n in 0_u32.. {
        let key = format!("{name}-{n}");
        let answer = async {
            let response = api.try_place(&key, &[("1001", 1), ("1002", 2)]).await?;
            assert_eq!(response.status(), StatusCode::CREATED);
            let location = header(&response, "location").to_owned();
            Ok::<_, reqwest::Error>((location, response.json().await?))
        };
        let answer = answer.await.ok();
        let gone = answer.is_none();
        asked.push(Asked {
            key,
            acknowledged: answer,
        });
        if gone {
            break;
        }
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    asked
}

async fn killed_under_load_it_keeps_every_acknowledged_order(on: Backend) {
    const CLIENTS: usize = 16;
    let database = Database::empty(on);
    let mut asked: Vec<Asked> = Vec::new();
    for round in 0..3 {
        let process = Process::start(&database, &[]);
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (api, acknowledged) = (process.api.clone(), acknowledged.clone());
            clients.spawn(async move {
                order_until_gone(&api, format!("r{round}-c{client}"), acknowledged).await
            });
        }
        eventually("enough orders are acknowledged", async || {
            (acknowledged.load(Ordering::Relaxed) >= 200).then_some(())
        })
        .await;
        process.kill();
        asked.extend(clients.join_all().await.into_iter().flatten());

        // Before anyone else opens the file, and after the log has been read back.
        let report = run_audit(&database);
        assert!(
            report.status.success(),
            "{}",
            String::from_utf8_lossy(&report.stdout)
        );
    }

    let process = Process::start(&database, &[]);
    for Asked { key, acknowledged } in &asked {
        // Unanswered ones too: retried, each must become one order and not a second one.
        let again = process.api.place(key, &[("1001", 1), ("1002", 2)]).await;
        assert_eq!(again.status(), StatusCode::CREATED);
        if let Some((location, order)) = acknowledged {
            assert_eq!(process.api.get_json(location).await, *order);
            assert_eq!(header(&again, "idempotency-replayed"), "true");
        }
    }
    process.terminate();
    assert!(process.wait().success());
    assert!(run_audit(&database).status.success());
    assert_eq!(database.count("SELECT count(*) FROM orders"), asked.len());
    assert!(
        asked
            .iter()
            .filter(|asked| asked.acknowledged.is_some())
            .count()
            >= 600
    );
}

/// Killed at moments of chance, with orders and batches at every stage: each event of each order
/// still reaches the sink.
async fn killed_at_any_moment_it_loses_no_event(on: Backend) {
    let sink = Sink::default();
    let url = sink.start().await;
    let database = Database::empty(on);
    for round in 0..8_u64 {
        let process = Process::start(&database, &["--risk-url", &url]);
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for client in 0..4 {
            let (api, acknowledged) = (process.api.clone(), acknowledged.clone());
            clients.spawn(async move {
                order_until_gone(&api, format!("r{round}-c{client}"), acknowledged).await
            });
        }
        // From the first orders' batches to many in flight.
        tokio::time::sleep(std::time::Duration::from_millis(40 + 61 * round)).await;
        process.kill();
        clients.join_all().await;
        if on == Backend::Postgres {
            // The dead machine's claims run out; here they do so now.
            database
                .execute("UPDATE delivery SET leased_until_ms = 0 WHERE delivered_at_ms IS NULL");
        }
    }
    let process = Process::start(&database, &["--risk-url", &url]);
    let written = database.count("SELECT count(*) FROM outbox");
    assert!(written > 0, "nothing was ordered");
    eventually("every event arrives", async || {
        let told: HashSet<String> = sink
            .bodies()
            .iter()
            .map(|event| event["id"].as_str().unwrap().to_owned())
            .collect();
        (told.len() == written).then_some(())
    })
    .await;
    process.terminate();
    assert!(process.wait().success());
    database.assert_audit_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_announces_itself_finishes_requests_and_empties_the_log() {
    let database = Database::empty(Backend::Sqlite);
    let process = Process::start(&database, &["--drain-announce-ms", "1000"]);
    assert_eq!(process.api.get("/readyz").await.status(), StatusCode::OK);
    // As long as another connection is open, SQLite does not empty the log by itself.
    let reader = rusqlite::Connection::open(database.path()).unwrap();
    reader
        .query_row("SELECT count(*) FROM orders", [], |_| Ok(()))
        .unwrap();

    // An order whose last byte is still to come.
    let body = br#"{"lines":[{"sku":"1001","quantity":1}]}"#;
    let (last, most) = body.split_last().unwrap();
    let head = format!(
        "POST /api/v1/orders HTTP/1.1\r\nhost: x\r\nidempotency-key: k\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut order = TcpStream::connect(process.api.address()).await.unwrap();
    order.write_all(head.as_bytes()).await.unwrap();
    order.write_all(most).await.unwrap();
    eventually("the order is in flight", async || {
        (process.api.metric("commerce_requests_in_flight").await == 2).then_some(())
    })
    .await;

    process.terminate();
    let unready = eventually("/readyz says no", async || {
        let response = process.api.get("/readyz").await;
        (response.status() == StatusCode::SERVICE_UNAVAILABLE).then_some(response)
    })
    .await;
    let problem: Value = unready.json().await.unwrap();
    assert_eq!(problem["type"], "urn:commerce:problem:draining");
    eventually("the port is closed", async || {
        TcpStream::connect(process.api.address())
            .await
            .is_err()
            .then_some(())
    })
    .await;

    order.write_all(&[*last]).await.unwrap();
    let mut answer = String::new();
    order.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    assert!(process.wait().success());
    let log = std::fs::metadata(database.path().with_extension("db-wal")).unwrap();
    assert_eq!(log.len(), 0, "the log was not emptied");
    drop(reader);
    assert_eq!(database.count("SELECT count(*) FROM orders"), 1);
    assert!(run_audit(&database).status.success());
}

#[tokio::test]
async fn the_audit_command_reports_counts_and_fails_by_name() {
    let database = Database::empty(Backend::Sqlite);
    let missing = run_audit(&database);
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        !database.path().exists(),
        "an audit must not create what it audits"
    );

    let database = Database::with(Backend::Sqlite, &[product("a", 5), product("b", 5)]).await;
    let clean = run_audit(&database);
    let text = String::from_utf8(clean.stdout).unwrap();
    assert_eq!(clean.status.code(), Some(0), "{text}");
    assert!(
        text.contains("ok       stock_conserved: initial = available + reserved + sold, none negative (2 SKUs)"),
        "{text}"
    );
    assert!(
        text.ends_with("14 promises checked, 0 violated\n"),
        "{text}"
    );

    let connection = rusqlite::Connection::open(database.path()).unwrap();
    connection
        .pragma_update(None, "ignore_check_constraints", true)
        .unwrap();
    connection
        .execute("UPDATE stock SET available = 4 WHERE sku = 'b'", [])
        .unwrap();
    let broken = run_audit(&database);
    let text = String::from_utf8(broken.stdout).unwrap();
    assert_eq!(broken.status.code(), Some(1), "{text}");
    assert!(text.contains("VIOLATED stock_conserved"), "{text}");
    assert!(
        text.contains("SKU b: initial 5, available 4, reserved 0, sold 0"),
        "{text}"
    );
}

crate::on_both_stores!(
    killed_under_load_it_keeps_every_acknowledged_order,
    killed_at_any_moment_it_loses_no_event,
);
