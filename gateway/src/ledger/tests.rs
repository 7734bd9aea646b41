//! Replay and conservation, on a real file and on a real PostgreSQL.

pub(crate) mod backend;
mod crash;

use std::collections::HashMap;

use flow_abi::{Account, AccountKey, Cell, InterfaceCells, cell};

use self::backend::{Backend, on_both};
use super::*;
use crate::{
    attribution::{Counters, Watermarks},
    class::Classes,
    cost::calendar::Period,
    owner::{Leg, Owner, OwnerId, OwnerKind, Owners},
};

fn counters(bytes: u64) -> Counters {
    let mut counters = Counters::default();
    let account = Account {
        rx_bytes: bytes,
        rx_frames: bytes / 100,
        tx_bytes: 3 * bytes,
        tx_frames: bytes / 50,
        tx_retransmit_bytes: bytes / 7,
        ..Account::default()
    };
    counters.accounts.insert(
        AccountKey {
            owner: 4,
            ifindex: 2,
            class: 3,
        },
        account,
    );
    let mut cells = InterfaceCells::default();
    cells.cells[0][cell::TOTAL] = Cell {
        bytes: bytes + 60,
        frames: 1,
    };
    cells.cells[0][cell::NON_IP] = Cell {
        bytes: 60,
        frames: 1,
    };
    cells.cells[1][cell::TOTAL] = Cell {
        bytes: 3 * bytes,
        frames: 1,
    };
    counters.interfaces.insert(2, cells);
    counters
}

/// Posts counters the way the collector does, from what the ledger says.
fn tick(ledger: &Ledger, counters: &Counters, at: i64) {
    let interfaces = HashMap::from([(2, "edge0".to_owned())]);
    let mut poster = Poster::resume(ledger.clone(), "boot:1").unwrap();
    let posted = poster.post(counters, &[], at, &interfaces);
    assert!(posted.failure.is_none(), "{:?}", posted.failure);
}

#[test]
fn balances_kept_in_memory_equal_balances_read_back() {
    on_both(|backend| {
        let ledger = backend.open();
        let interfaces = HashMap::from([(2, "edge0".to_owned())]);
        let mut memory = Balances::default();
        let mut poster = Poster::resume(ledger.clone(), "boot:1").unwrap();
        for bytes in [700, 9_000] {
            let posted = poster.post(&counters(bytes), &[], 0, &interfaces);
            assert!(posted.failure.is_none());
            for postings in &posted.postings {
                memory.add(postings, &interfaces);
            }
        }
        assert_eq!(memory, ledger.balances().unwrap());
        assert_eq!(ledger.breaches().unwrap(), []);
    });
}

#[test]
fn new_kernel_maps_start_a_new_epoch() {
    on_both(|backend| {
        let ledger = backend.open();
        tick(&ledger, &counters(5_000), 0);
        assert_ne!(ledger.watermarks("boot:1").unwrap(), Default::default());
        assert_eq!(ledger.watermarks("boot:2").unwrap(), Default::default());
    });
}

#[test]
fn owners_come_back_as_they_were() {
    on_both(|backend| {
        let ledger = backend.open();
        let owners = Owners::new(Vec::new(), Box::new(ledger.clone()));
        let owner = Owner {
            route: "orders".into(),
            tenant: "a".into(),
            ..Owner::connection(OwnerKind::Route, Leg::Upstream, "pool")
        };
        let id = owners.intern(&owner).unwrap();
        drop((owners, ledger));
        assert_eq!(backend.open().owners().unwrap(), vec![(id, owner)]);
    });
}

#[test]
fn a_poster_that_another_one_has_overtaken_posts_nothing_and_reads_again() {
    on_both(|backend| {
        let ledger = backend.open();
        let interfaces = HashMap::from([(2, "edge0".to_owned())]);
        let mut slow = Poster::resume(ledger.clone(), "boot:1").unwrap();
        tick(&ledger, &counters(5_000), 0);
        let error = slow
            .post(&counters(6_000), &[], 0, &interfaces)
            .failure
            .unwrap();
        assert_eq!(error.fault, Fault::Stale, "{error}");
        assert!(
            slow.post(&counters(6_000), &[], 0, &interfaces)
                .failure
                .is_none()
        );
        let edge = ledger.balances().unwrap().by_interface()["edge0"];
        assert_eq!((edge.total, edge.difference()), (4 * 6_000 + 60, 0));
    });
}

#[test]
fn gateways_that_share_a_ledger_never_meet() {
    let backend = Backend::shared();
    let one = Ledger::open_at(&backend.place, "edge-1").unwrap();
    let two = Ledger::open_at(&backend.place, "edge-2").unwrap();
    let owner = Owner::connection(OwnerKind::Overhead, Leg::Client, "public");
    for ledger in [&one, &two] {
        let owners = Owners::new(ledger.owners().unwrap(), Box::new(ledger.clone()));
        assert_eq!(owners.intern(&owner).unwrap().0, 1);
    }
    let interfaces = HashMap::from([(2, "edge0".to_owned())]);
    for (ledger, epoch, bytes) in [(&one, "a:1", 1_000), (&two, "b:1", 5_000)] {
        let mut poster = Poster::resume(ledger.clone(), epoch).unwrap();
        assert!(
            poster
                .post(&counters(bytes), &[], 60, &interfaces)
                .failure
                .is_none()
        );
        let edge = ledger.balances().unwrap().by_interface()["edge0"];
        assert_eq!(edge.total, 4 * i64::try_from(bytes).unwrap() + 60);
    }
    let all = one.sums(Period { start: 0, end: 120 }, true).unwrap();
    let total: i64 = all.iter().map(|usage| usage.amount.wire_bytes).sum();
    assert_eq!(total, 4 * 6_000);
    assert_eq!(
        all.iter().filter(|usage| usage.gateway == "edge-2").count(),
        2
    );
    // The same counters under another name would be posted a second time.
    let error = Poster::resume(two, "a:1").err().unwrap().to_string();
    assert!(error.contains("gateway \"edge-1\""), "{error}");
}

#[test]
fn one_gateway_has_one_poster() {
    on_both(|backend| {
        let one = backend.open();
        let taken = one.take().unwrap();
        let error = backend.open().take().unwrap_err().to_string();
        assert!(error.contains("in use by another edgemeter"), "{error}");
        drop((taken, one));
        backend.open().take().unwrap();
    });
}

#[test]
fn an_export_restores_into_either_backend() {
    let from = Backend::file();
    let ledger = from.open();
    tick(&ledger, &counters(5_000), 60);
    let mut file = Vec::new();
    let rows = export(&ledger, &mut file).unwrap();
    for to in [Backend::file(), Backend::shared()] {
        let restored = to.open();
        assert_eq!(restore(&restored, &mut file.as_slice()).unwrap(), rows);
        assert_eq!(restored.balances().unwrap(), ledger.balances().unwrap());
        // Posting goes on where the export stopped.
        tick(&restored, &counters(9_000), 120);
        let edge = restored.balances().unwrap().by_interface()["edge0"];
        assert_eq!((edge.total, edge.difference()), (4 * 9_000 + 60, 0));
        let again = restore(&restored, &mut file.as_slice())
            .unwrap_err()
            .to_string();
        assert!(again.contains("not empty"), "{again}");
    }
    let cut = &file[..file.len() - 20];
    let error = restore(&Backend::file().open(), &mut &*cut)
        .unwrap_err()
        .to_string();
    assert!(error.contains("line"), "{error}");
}

#[test]
fn a_file_of_the_first_version_is_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let raw = rusqlite::Connection::open(directory.path().join("ledger.db")).unwrap();
    raw.execute_batch(include_str!("tests/version_1.sql"))
        .unwrap();
    drop(raw);
    let ledger = Ledger::open(directory.path()).unwrap();
    let edge = ledger.balances().unwrap().by_interface()["edge0"];
    assert_eq!((edge.total, edge.owned, edge.cells), (160, 100, 60));
    assert_eq!(ledger.owners().unwrap().len(), 1);
    let marks = ledger.watermarks("boot:1").unwrap();
    assert_eq!(marks.accounts.len(), 1);
}

#[test]
fn damage_is_found_at_start_and_said_what_to_do_about() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    for minute in 0..200 {
        tick(
            &ledger,
            &counters(5_000 + 100 * minute),
            60 * i64::try_from(minute).unwrap(),
        );
    }
    drop(ledger);
    let path = directory.path().join("ledger.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8_000].fill(0x5a);
    std::fs::write(&path, bytes).unwrap();
    let error = Ledger::open(directory.path()).err().unwrap();
    assert_eq!(error.fault, Fault::Damaged, "{error}");
    assert!(
        error.to_string().contains("edgemeter ledger restore"),
        "{error}"
    );
}

#[test]
fn a_newer_file_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(Ledger::open(directory.path()).unwrap());
    let raw = rusqlite::Connection::open(directory.path().join("ledger.db")).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    let error = Ledger::open(directory.path()).err().unwrap().to_string();
    assert!(error.contains("schema version 99"), "{error}");
}

#[test]
fn a_file_that_is_no_database_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("ledger.db"), "not a database, surely").unwrap();
    let error = Ledger::open(directory.path()).err().unwrap().to_string();
    assert!(error.contains("ledger.db"), "{error}");
}

#[test]
fn a_server_that_is_killed_and_comes_back_has_everything_once() {
    let mut server = xtask::server::Postgres::start().unwrap();
    let place = Place::shared(&server.create_database().unwrap()).unwrap();
    let ledger = Ledger::open_at(&place, "edge-1").unwrap();
    let _alone = ledger.take().unwrap();
    let interfaces = HashMap::from([(2, "edge0".to_owned())]);
    let mut poster = Poster::resume(ledger.clone(), "boot:1").unwrap();
    let mut post = |bytes| poster.post(&counters(bytes), &[], 60, &interfaces).failure;
    assert!(post(1_000).is_none());
    server.kill().unwrap();
    let error = post(2_000).unwrap();
    assert!(
        matches!(error.fault, Fault::Unavailable | Fault::Uncertain),
        "{error}"
    );
    assert!(post(3_000).is_some());
    server.restart().unwrap();
    // A server that has just come back may still refuse for a moment.
    let started = std::time::Instant::now();
    while post(5_000).is_some() {
        assert!(started.elapsed().as_secs() < 60);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let edge = ledger.balances().unwrap().by_interface()["edge0"];
    assert_eq!((edge.total, edge.difference()), (4 * 5_000 + 60, 0));
    // The new session holds the lock too.
    let second = Ledger::open_at(&place, "edge-1").unwrap();
    let error = second.take().unwrap_err().to_string();
    assert!(error.contains("same gateway.id"), "{error}");
}

#[test]
fn what_maps_held_before_their_ledger_is_never_posted() {
    on_both(|backend| {
        let ledger = backend.open();
        let marks = |counters: Counters| Watermarks {
            accounts: counters.accounts,
            interfaces: counters.interfaces,
        };
        assert!(
            ledger
                .begin_epoch("boot:1", &marks(counters(5_000)))
                .unwrap()
        );
        tick(&ledger, &counters(5_700), 0);
        // A restart finds its lifetime: what came meanwhile is its own.
        assert!(
            !ledger
                .begin_epoch("boot:1", &marks(counters(9_000)))
                .unwrap()
        );
        tick(&ledger, &counters(9_000), 0);
        let balances = ledger.balances().unwrap();
        assert_eq!(balances.by_owner()[&OwnerId(4)][0].wire_bytes, 4_000);
        assert_eq!(balances.by_interface()["edge0"].total, 4 * 4_000);
        assert_eq!(ledger.breaches().unwrap(), []);
    });
}

#[test]
fn classes_come_back_as_they_were() {
    on_both(|backend| {
        let ledger = backend.open();
        let classes = Classes::new(ledger.classes().unwrap(), Box::new(ledger.clone()));
        let id = classes.intern("internet").unwrap();
        let again = Classes::new(ledger.classes().unwrap(), Box::new(ledger));
        assert_eq!(again.intern("internet").unwrap(), id);
    });
}

/// What bills are made from: rows and totals of one moment, minutes added up to the grain asked
/// for, and the minutes that were not read.
#[test]
fn usage_is_what_was_posted_at_the_grain_asked_for() {
    on_both(|backend| {
        let ledger = backend.open();
        tick(&ledger, &counters(7_000), 900);
        tick(&ledger, &counters(9_000), 960);
        tick(&ledger, &counters(9_500), 1_200);
        let all = Period {
            start: 0,
            end: 3_600,
        };
        let fine = ledger.usage(all, 60).unwrap();
        let coarse = ledger.usage(all, 900).unwrap();
        for usage in [&fine, &coarse] {
            assert_eq!(usage.totals, usage.sums());
            // A price may name the class of addresses in no other; cells have none.
            let classes = usage.rows.iter().map(|row| row.account.class.as_str());
            assert!(classes.clone().any(|class| class == "default"));
            assert!(usage.imbalance(all).is_empty());
            // Two of three minutes are neighbours; before the third, three are missing.
            let gap = Period {
                start: 1_020,
                end: 1_260,
            };
            assert_eq!(usage.gaps.len(), 1);
            assert_eq!(usage.gaps[0].period, gap);
        }
        let periods = |usage: &crate::cost::usage::Usage| {
            let mut periods: Vec<(i64, i64)> = usage
                .rows
                .iter()
                .map(|row| (row.period.start, row.period.end))
                .collect();
            periods.dedup();
            periods
        };
        assert_eq!(periods(&fine), [(900, 960), (960, 1_020), (1_200, 1_260)]);
        assert_eq!(periods(&coarse), [(900, 1_800)]);
        let sum = |usage: &crate::cost::usage::Usage| -> i64 {
            usage.rows.iter().map(|row| row.wire_bytes).sum()
        };
        assert_eq!((sum(&fine), sum(&coarse)), (4 * 9_500 + 60, 4 * 9_500 + 60));
        let later = Period {
            start: 1_200,
            end: 3_600,
        };
        assert_eq!(sum(&ledger.usage(later, 60).unwrap()), 4 * 500);
    });
}
