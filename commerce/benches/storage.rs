//! Orders a second that the store commits, without HTTP: the writer's own limit.
//!
//! `cargo bench --package commerce --bench storage -- --seconds 10`
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a bench is run and read by a person"
)]

use std::num::{NonZeroU32, NonZeroUsize};
use std::time::{Duration, Instant};

use commerce::command::place::{Place, Terms};
use commerce::command::{Answer, Keyed, Verdict};
use commerce::event::Origin;
use commerce::idempotency::{Fingerprint, Key, Reply, Scope};
use commerce::metrics::Metrics;
use commerce::order::Draft;
use commerce::store::{Limits, Store, Target};
use commerce::trace::TraceId;

/// Orders under way at once.
const CLIENTS: u32 = 256;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let seconds = arguments
        .iter()
        .position(|argument| argument == "--seconds")
        .and_then(|at| arguments.get(at + 1)?.parse().ok())
        .unwrap_or(5);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // Beside the executable: on the disk of the build, not in memory.
    let beside = std::env::current_exe().unwrap();
    let directory = tempfile::tempdir_in(beside.parent().unwrap()).unwrap();
    let target = Target::Sqlite(directory.path().join("bench.db"));
    let limits = Limits {
        queue_capacity: NonZeroUsize::new(4096).unwrap(),
        readers: NonZeroU32::new(1).unwrap(),
    };
    let seed = commerce::catalogue::seed().unwrap();
    let (store, writer) = Store::open(&target, limits, &seed, &Metrics::new()).unwrap();
    runtime.block_on(async {
        let began = Instant::now();
        let until = began + Duration::from_secs(seconds);
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..CLIENTS {
            clients.spawn(order_until(store.clone(), client, until));
        }
        let mut latencies: Vec<Duration> = clients.join_all().await.concat();
        let took = began.elapsed();
        latencies.sort_unstable();
        let count = u32::try_from(latencies.len()).unwrap();
        let rate = u128::from(count) * 1_000 / took.as_millis().max(1);
        let mean = latencies.iter().sum::<Duration>() / count.max(1);
        let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
        println!(
            "{rate} orders/s, one hot SKU, {CLIENTS} at once, FULL: mean {mean:.1?}, p50 {:.1?}, p99 {:.1?}",
            at(50),
            at(99)
        );
        writer.stop().await.unwrap();
    });
}

async fn order_until(store: Store, client: u32, until: Instant) -> Vec<Duration> {
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let key = format!("{client}-{}", latencies.len());
        let began = Instant::now();
        let keyed = Keyed {
            scope: Scope {
                principal: "bench".to_owned(),
                route: "POST /api/v1/orders",
                key: Key::parse(key.as_bytes()).unwrap(),
            },
            fingerprint: Fingerprint::of(key.as_bytes()),
            effect: Place {
                principal: "bench".to_owned(),
                origin: Origin {
                    actor: "bench".to_owned(),
                    trace: TraceId::generate(),
                },
                draft: Draft::new([("1001", 1)]).unwrap(),
                terms: Terms::default(),
                hold: Duration::from_secs(900),
                is_sold_out: false,
                render,
            },
        };
        match store.run(keyed).await.unwrap() {
            Answer::Done(reply, _) => assert_eq!(reply.status, 201),
            Answer::Replayed(_) | Answer::KeyReused => panic!("a key occurred twice"),
        }
        latencies.push(began.elapsed());
    }
    latencies
}

fn render(verdict: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    let (status, body) = match verdict {
        Verdict::Placed(_, json) => (201, json.as_bytes().to_vec()),
        _ => (500, Vec::new()),
    };
    Ok(Reply {
        status,
        content_type: "application/json".to_owned(),
        location: None,
        etag: None,
        body,
    })
}
