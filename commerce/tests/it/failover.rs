//! The database server crashes under a service that serves.

use commerce::store::Target;
use commerce::store::sql::Backend;
use reqwest::StatusCode;
use xtask::server::Postgres;

use crate::harness::{InProcess, eventually, header};

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_postgres_costs_time_and_no_order() {
    let mut server = Postgres::start().unwrap();
    let url = server.create_database().unwrap();
    let service = InProcess::with(Backend::Postgres, &[], |config| {
        config.store = Target::Postgres(url.clone());
    })
    .await;
    let lines: &[(&str, u32)] = &[("1001", 1)];
    assert_eq!(
        service.api.place("k1", lines).await.status(),
        StatusCode::CREATED
    );
    server.kill().unwrap();
    // Not confirmed, and said so: the key is safe to use again.
    // A backend may outlive its postmaster for a moment, and still commit.
    let mut tries = 0;
    let key = loop {
        tries += 1;
        let key = format!("k2-{tries}");
        let lost = service.api.place(&key, lines).await;
        if lost.status() != StatusCode::CREATED {
            assert_eq!(lost.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(header(&lost, "retry-after"), "1");
            break key;
        }
    };
    server.restart().unwrap();
    let placed = eventually("orders are taken again", async || {
        let response = service.api.place(&key, lines).await;
        (response.status() == StatusCode::CREATED).then_some(response)
    })
    .await;
    let location = header(&placed, "location").to_owned();
    eventually("and shown", async || {
        let shown = service.api.get(&location).await;
        (shown.status() == StatusCode::OK).then_some(())
    })
    .await;
    let again = service.api.place("k1", lines).await;
    assert_eq!(header(&again, "idempotency-replayed"), "true");
    service.stop_only().await;
    let target = Target::Postgres(url);
    let report = tokio::task::spawn_blocking(move || commerce::audit::audit(&target).unwrap());
    let report = report.await.unwrap();
    assert!(report.is_clean(), "{report}");
}
