//! A history of concurrent operations, recorded at the clients and checked: is there one order
//! of them, in agreement with real time, in which every answer is right? (Linearizability, by
//! Wing and Gong's search with Lowe's memory.)

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use commerce::store::sql::Backend;
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinSet;

use crate::harness::{InProcess, header, product};

/// What a client did to one SKU, and what it was told.
#[derive(Clone, Copy, Debug)]
enum Told {
    Reserved(i64),
    Refused(i64),
    Released(i64),
    Read(i64),
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    /// A shared counter at the call, and at the answer.
    called: u64,
    answered: u64,
    told: Told,
}

impl Told {
    /// The stock afterwards, if the answer is right for the stock before.
    fn apply(self, available: i64) -> Option<i64> {
        match self {
            Self::Reserved(units) => (available >= units).then(|| available - units),
            Self::Refused(units) => (available < units).then_some(available),
            Self::Released(units) => Some(available + units),
            Self::Read(seen) => (available == seen).then_some(available),
        }
    }
}

/// Whether some order explains the history. At most 128 operations.
fn is_linearizable(initial: i64, history: &[Operation]) -> bool {
    assert!(history.len() <= 128);
    let all = if history.len() == 128 {
        u128::MAX
    } else {
        (1 << history.len()) - 1
    };
    let mut seen = HashSet::new();
    // The stock follows from the set of what was done: sums do not depend on the order.
    let mut open = vec![(0_u128, initial)];
    while let Some((done, available)) = open.pop() {
        if done == all {
            return true;
        }
        if !seen.insert(done) {
            continue;
        }
        let left = || {
            history
                .iter()
                .enumerate()
                .filter(|(n, _)| done & (1 << n) == 0)
        };
        let first_answer = left()
            .map(|(_, operation)| operation.answered)
            .min()
            .unwrap();
        for (n, operation) in left() {
            // Only what was called before the first outstanding answer can come next.
            if operation.called < first_answer
                && let Some(after) = operation.told.apply(available)
            {
                open.push((done | (1 << n), after));
            }
        }
    }
    false
}

#[test]
fn the_checker_tells_right_histories_from_wrong_ones() {
    let operation = |called, answered, told| Operation {
        called,
        answered,
        told,
    };
    // Overlapping: either order explains it.
    let right = [
        operation(0, 3, Told::Reserved(2)),
        operation(1, 2, Told::Read(2)),
        operation(4, 5, Told::Refused(1)),
    ];
    assert!(is_linearizable(2, &right));
    let oversold = [
        operation(0, 2, Told::Reserved(2)),
        operation(1, 3, Told::Reserved(1)),
    ];
    assert!(!is_linearizable(2, &oversold));
    let stale = [
        operation(0, 1, Told::Reserved(1)),
        operation(2, 3, Told::Read(2)),
    ];
    assert!(!is_linearizable(2, &stale));
    let refused_though_free = [
        operation(0, 1, Told::Reserved(1)),
        operation(2, 3, Told::Released(1)),
        operation(4, 5, Told::Refused(2)),
    ];
    assert!(!is_linearizable(2, &refused_though_free));
}

async fn concurrent_orders_reads_and_cancellations_have_one_order(on: Backend) {
    const STOCK: u32 = 6;
    let service = InProcess::start(on, &[product("x", STOCK), product("y", STOCK)]).await;
    let clock = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for client in 0..6_u32 {
        let (api, clock) = (service.api.clone(), Arc::clone(&clock));
        clients.spawn(async move {
            let tick = || clock.fetch_add(1, Ordering::SeqCst);
            let mut history: Vec<(usize, Operation)> = Vec::new();
            for n in 0..6_u32 {
                let which = usize::try_from((client + n) % 2).unwrap();
                let sku = ["x", "y"][which];
                let units = 1 + (client + n) % 3;
                let key = format!("c{client}-{n}");
                let called = tick();
                let placed = api.place(&key, &[(sku, units)]).await;
                let answered = tick();
                let told = match placed.status() {
                    StatusCode::CREATED => Told::Reserved(units.into()),
                    StatusCode::CONFLICT => Told::Refused(units.into()),
                    other => panic!("{other}"),
                };
                history.push((
                    which,
                    Operation {
                        called,
                        answered,
                        told,
                    },
                ));
                if n % 2 == 0 {
                    let called = tick();
                    let product = api.get_json(&format!("/api/v1/products/{sku}")).await;
                    let answered = tick();
                    let told = Told::Read(product["available"].as_i64().unwrap());
                    history.push((
                        which,
                        Operation {
                            called,
                            answered,
                            told,
                        },
                    ));
                }
                if placed.status() == StatusCode::CREATED {
                    let location = header(&placed, "location");
                    let called = tick();
                    let cancelled = api.change(location, "cancel", &key, json!({})).await;
                    let answered = tick();
                    assert_eq!(cancelled.status(), StatusCode::OK);
                    let told = Told::Released(units.into());
                    history.push((
                        which,
                        Operation {
                            called,
                            answered,
                            told,
                        },
                    ));
                }
            }
            history
        });
    }
    let history: Vec<(usize, Operation)> = clients.join_all().await.concat();
    for which in [0, 1] {
        let of_sku: Vec<Operation> = history
            .iter()
            .filter(|(sku, _)| *sku == which)
            .map(|(_, operation)| *operation)
            .collect();
        assert!(of_sku.len() > 20, "{} operations", of_sku.len());
        assert!(is_linearizable(STOCK.into(), &of_sku), "{of_sku:#?}");
    }
    service.stop_and_audit().await;
}

crate::on_both_stores!(concurrent_orders_reads_and_cancellations_have_one_order);
