//! Replay and conservation on a real file.

use std::collections::HashMap;

use flow_abi::{Account, AccountKey, Cell, InterfaceCells, cell};

use super::*;
use crate::{
    attribution::{Counters, attribute},
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

/// Posts counters the way the collector does, from what the file says.
fn tick(ledger: &Ledger, counters: &Counters, at: i64, commit: bool) {
    let interfaces = HashMap::from([(2, "edge0".to_owned())]);
    let mut watermarks = ledger.watermarks("boot:1").unwrap();
    let (postings, _) = attribute(&mut watermarks, counters, &[]);
    let tick = Tick {
        unix_seconds: at,
        epoch: "boot:1",
        postings: &postings,
        watermarks: &watermarks,
        interfaces: &interfaces,
    };
    if commit {
        ledger.append(&tick).unwrap();
    }
}

#[test]
fn a_crash_before_or_after_a_commit_neither_loses_nor_doubles() {
    let directory = tempfile::tempdir().unwrap();
    for (step, bytes) in [1_000, 5_000, 5_000, 90_000].into_iter().enumerate() {
        // Every step is a new process; an uncommitted tick is a crash before the commit.
        let ledger = Ledger::open(directory.path()).unwrap();
        tick(
            &ledger,
            &counters(bytes),
            600 + 45 * i64::try_from(step).unwrap(),
            false,
        );
        tick(
            &ledger,
            &counters(bytes),
            600 + 45 * i64::try_from(step).unwrap(),
            true,
        );
    }
    let balances = Ledger::open(directory.path()).unwrap().balances().unwrap();
    let sums = balances.by_owner()[&OwnerId(4)];
    assert_eq!(sums[0].wire_bytes, 90_000);
    assert_eq!(sums[1].wire_bytes, 270_000);
    assert_eq!(sums[1].retransmit_bytes, 90_000 / 7);
    let edge = balances.by_interface()["edge0"];
    assert_eq!((edge.total, edge.owned, edge.cells), (360_060, 360_000, 60));
    assert_eq!(edge.difference(), 0);
}

#[test]
fn balances_kept_in_memory_equal_balances_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let interfaces = HashMap::from([(2, "edge0".to_owned())]);
    let mut memory = Balances::default();
    let mut watermarks = ledger.watermarks("boot:1").unwrap();
    for bytes in [700, 9_000] {
        let (postings, _) = attribute(&mut watermarks, &counters(bytes), &[]);
        let tick = Tick {
            unix_seconds: 0,
            epoch: "boot:1",
            postings: &postings,
            watermarks: &watermarks,
            interfaces: &interfaces,
        };
        ledger.append(&tick).unwrap();
        memory.add(&postings, &interfaces);
    }
    assert_eq!(memory, ledger.balances().unwrap());
}

#[test]
fn new_kernel_maps_start_a_new_epoch() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    tick(&ledger, &counters(5_000), 0, true);
    assert_ne!(ledger.watermarks("boot:1").unwrap(), Default::default());
    assert_eq!(ledger.watermarks("boot:2").unwrap(), Default::default());
}

#[test]
fn owners_come_back_as_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let owners = Owners::new(Vec::new(), Box::new(ledger.clone()));
    let owner = Owner {
        route: "orders".into(),
        tenant: "a".into(),
        ..Owner::connection(OwnerKind::Route, Leg::Upstream, "pool")
    };
    let id = owners.intern(&owner).unwrap();
    drop((owners, ledger));
    let ledger = Ledger::open(directory.path()).unwrap();
    assert_eq!(ledger.owners().unwrap(), vec![(id, owner)]);
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
