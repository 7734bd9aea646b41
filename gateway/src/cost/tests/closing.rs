//! Closed files stay what they are; what comes later is a correction that adds up.

use super::*;
use crate::cost::{
    bill::Charge,
    close::{Outcome, close, difference},
};

const GB: i64 = 1_000_000_000;

fn tiers() -> Book {
    book(
        "currency = \"CNY\"\ntimezone = \"Asia/Shanghai\"\n[[skus]]\nid = \"out\"\n\
         leg = \"client\"\ndirection = \"tx\"\nunit_bytes = 1073741824\nfree_units = 1\n\
         tiers = [{ to = 10, price = \"0.80\" }, { price = \"0.33\" }]\n",
    )
}

fn folder_bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn rows(folder: &Path) -> Vec<Charge> {
    serde_json::from_slice(&std::fs::read(folder.join("rows.json")).unwrap()).unwrap()
}

#[test]
fn late_data_makes_corrections_and_closed_files_stay() {
    let directory = tempfile::tempdir().unwrap();
    let book = tiers();
    let end = book.zone.month(month("2026-11")).end;
    let first = start(&book, "2026-11-03");
    let mut known = vec![sent("a", first, 7 * GB), sent("b", first, 2 * GB + 1)];

    let bill = rated(&book, &usage(known.clone()), "2026-11");
    let early = close(&book, &bill, end - 1, directory.path()).unwrap_err();
    assert!(early.to_string().contains("2026-11 is not over"), "{early}");
    let folder = match close(&book, &bill, end, directory.path()).unwrap() {
        Outcome::Closed(folder, cost) => {
            assert_eq!(cost, super::cost(&bill));
            folder
        }
        other => panic!("{other:?}"),
    };
    let before = folder_bytes(&folder);
    assert_eq!(before.len(), 4);
    let again = close(&book, &bill, end + 5, directory.path()).unwrap();
    assert_eq!(again, Outcome::Unchanged(folder.clone()));

    // Twice something arrives late, once into another tier, once moving bytes between routes.
    for (round, late) in [(1, sent("c", first, 9 * GB)), (2, sent("a", first - 60, 1))] {
        known.push(late);
        let bill = rated(&book, &usage(known.clone()), "2026-11");
        let outcome = close(&book, &bill, end + 86_400, directory.path()).unwrap();
        assert!(matches!(outcome, Outcome::Corrected(..)), "{outcome:?}");
        assert_eq!(folder_bytes(&folder), before, "closed files changed");
        let mut sum = rows(&folder);
        for number in 1..=round {
            let correction = folder.join(format!("correction-{number:03}"));
            let text = std::fs::read_to_string(correction.join("focus.csv")).unwrap();
            let lines = text.lines().skip(1);
            assert!(lines.clone().count() > 0);
            assert!(lines.into_iter().all(|line| line.contains(",Correction,")));
            sum.extend(rows(&correction));
        }
        // Closed rows and corrections are together the new bill, row by row.
        assert_eq!(difference(&bill.charges, &sum), []);
        let again = close(&book, &bill, end + 86_400, directory.path()).unwrap();
        assert_eq!(again, Outcome::Unchanged(folder.clone()));
    }
}

#[test]
fn a_new_price_after_closing_reverses_the_old_rows() {
    let old = tiers();
    let text = "currency = \"CNY\"\ntimezone = \"Asia/Shanghai\"\n[[skus]]\nid = \"out\"\n\
                leg = \"client\"\ndirection = \"tx\"\nunit_bytes = 1073741824\nprice = \"0.5\"\n";
    let new = book(text);
    let usage = usage(vec![sent("a", start(&old, "2026-11-03"), 20 * GB)]);
    let (old, new) = (
        rated(&old, &usage, "2026-11"),
        rated(&new, &usage, "2026-11"),
    );
    let changes = difference(&new.charges, &old.charges);
    let change: i128 = changes.iter().map(|charge| charge.cost).sum();
    assert_eq!(change, cost(&new).0 - cost(&old).0);
    assert_eq!(
        changes.iter().map(|charge| charge.wire_bytes).sum::<i128>(),
        0
    );
    assert!(changes.iter().any(|charge| charge.quantity < 0));
}

#[test]
fn a_closed_file_that_was_touched_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let book = tiers();
    let end = book.zone.month(month("2026-11")).end;
    let bill = rated(
        &book,
        &usage(vec![sent("a", start(&book, "2026-11-03"), GB)]),
        "2026-11",
    );
    close(&book, &bill, end, directory.path()).unwrap();
    let path = directory.path().join("2026-11/focus.csv");
    // Written anew, since the file itself is read-only.
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("CNY", "USD");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, text).unwrap();
    let error = close(&book, &bill, end, directory.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("focus.csv is not what was closed"),
        "{error}"
    );
}

#[test]
fn rating_again_writes_identical_bytes() {
    let book = tiers();
    let end = book.zone.month(month("2026-11")).end;
    let first = start(&book, "2026-11-03");
    let mut list: Vec<UsageRow> = (0..50)
        .map(|index| {
            sent(
                &format!("r{}", index % 7),
                first + index * 3_600,
                index * 777_777_777,
            )
        })
        .collect();
    let mut folders = Vec::new();
    for _ in 0..2 {
        let directory = tempfile::tempdir().unwrap();
        let bill = rated(&book, &usage(list.clone()), "2026-11");
        close(&book, &bill, end, directory.path()).unwrap();
        folders.push(folder_bytes(&directory.path().join("2026-11")));
        list.reverse();
    }
    assert_eq!(folders[0], folders[1]);
}

#[test]
fn unattributed_and_overhead_are_rows_also_where_there_are_none() {
    let book = tiers();
    let usage = usage(vec![sent("a", start(&book, "2026-11-03"), GB)]);
    let bill = rated(&book, &usage, "2026-11").with_standing_rows();
    check(&bill, &usage);
    for kind in [Kind::Overhead, Kind::Foreign] {
        let mut of_kind = bill.charges.iter().filter(|row| row.account.kind == kind);
        assert_eq!(of_kind.next().unwrap().wire_bytes, 0);
        assert!(of_kind.next().is_none());
    }
    assert_eq!(bill.clone().with_standing_rows(), bill);
}
