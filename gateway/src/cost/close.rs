//! Closing a month: its files are written once, and never again. What is learnt later becomes
//! correction rows in files of their own; closed files stay byte for byte what they were.
//!
//! ```text
//! <state_dir>/bills/2026-11/            focus.csv focus.parquet rows.json manifest.json
//! <state_dir>/bills/2026-11/correction-001/   the same, ChargeClass=Correction
//! ```
//!
//! A folder is complete or not there: it is written under another name and renamed.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    bill::{Bill, Charge, Provenance},
    book::Book,
    calendar::Month,
    focus, parquet,
    usage::hex,
};
use crate::money::Nanos;

const FILES: [&str; 3] = ["focus.csv", "focus.parquet", "rows.json"];
const MANIFEST: &str = "manifest.json";

/// What closing did.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The month is closed now.
    Closed(PathBuf, Nanos),
    /// It was closed before, and nothing has changed since.
    Unchanged(PathBuf),
    /// It was closed before; what has changed since is in this folder.
    Corrected(PathBuf, Nanos, usize),
}

/// What a folder holds and what it was made from.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Manifest {
    month: String,
    kind: String,
    currency: String,
    cost: String,
    rows: usize,
    provenance: Provenance,
    /// SHA-256 of each file.
    files: BTreeMap<String, String>,
}

/// Closes a month, or writes what has changed since it was closed.
///
/// # Errors
/// The month is not over at `now`, files cannot be written, or closed files are not what they
/// were.
pub fn close(book: &Book, bill: &Bill, now: i64, bills: &Path) -> Result<Outcome> {
    ensure!(
        now >= bill.period.end,
        "{} is not over: it ends at {} ({}); close it then, or read `cost report` until then",
        bill.month,
        bill.period.utc().1,
        book.zone.name()
    );
    let folder = bills.join(bill.month.to_string());
    if !folder.exists() {
        write(book, bill, &bill.charges, &folder, false)?;
        return Ok(Outcome::Closed(folder, sum(&bill.charges)?));
    }
    let (closed, corrections) = read(&folder, bill.month)?;
    let changes = difference(&bill.charges, &closed);
    if changes.is_empty() {
        return Ok(Outcome::Unchanged(folder));
    }
    let correction = folder.join(format!("correction-{:03}", corrections + 1));
    write(book, bill, &changes, &correction, true)?;
    Ok(Outcome::Corrected(
        correction,
        sum(&changes)?,
        changes.len(),
    ))
}

fn sum(charges: &[Charge]) -> Result<Nanos> {
    let mut total = Nanos::default();
    for charge in charges {
        total = total.checked_add(charge.cost())?;
    }
    Ok(total)
}

/// All rows of a closed month with its corrections, and how many of these there are.
fn read(folder: &Path, month: Month) -> Result<(Vec<Charge>, usize)> {
    let mut rows = verified(folder, month)?;
    let mut corrections = 0;
    loop {
        let next = folder.join(format!("correction-{:03}", corrections + 1));
        if !next.exists() {
            return Ok((rows, corrections));
        }
        rows.extend(verified(&next, month)?);
        corrections += 1;
    }
}

/// A folder's rows, after its files have been found unchanged.
fn verified(folder: &Path, month: Month) -> Result<Vec<Charge>> {
    let path = folder.join(MANIFEST);
    let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let manifest: Manifest =
        serde_json::from_slice(&text).with_context(|| format!("{}", path.display()))?;
    ensure!(
        manifest.month == month.to_string(),
        "{} is of {}",
        path.display(),
        manifest.month
    );
    let mut rows = None;
    for (name, hash) in &manifest.files {
        let path = folder.join(name);
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        if hex(&Sha256::digest(&bytes)) != *hash {
            bail!(
                "{} is not what was closed: its SHA-256 differs from the manifest; restore it \
                 from a copy",
                path.display()
            );
        }
        if name == "rows.json" {
            rows = Some(serde_json::from_slice(&bytes)?);
        }
    }
    rows.with_context(|| format!("{} lists no rows.json", path.display()))
}

/// Rows that turn the old bill into the new one: quantities, bytes and money may be negative.
#[must_use]
pub fn difference(new: &[Charge], old: &[Charge]) -> Vec<Charge> {
    let mut changes: BTreeMap<_, Charge> = BTreeMap::new();
    for (charges, sign) in [(new, 1), (old, -1)] {
        for charge in charges {
            let change = changes.entry(charge.identity()).or_insert_with(|| Charge {
                quantity: 0,
                wire_bytes: 0,
                cost: 0,
                ..charge.clone()
            });
            change.quantity += sign * charge.quantity;
            change.wire_bytes += sign * charge.wire_bytes;
            change.cost += sign * charge.cost;
        }
    }
    changes
        .into_values()
        .filter(|change| (change.quantity, change.wire_bytes, change.cost) != (0, 0, 0))
        .collect()
}

fn write(
    book: &Book,
    bill: &Bill,
    charges: &[Charge],
    folder: &Path,
    correction: bool,
) -> Result<()> {
    let records = focus::records(book, bill.period, charges, &bill.provenance, correction)?;
    let mut contents = BTreeMap::new();
    contents.insert("focus.csv", focus::csv(&records)?);
    contents.insert("focus.parquet", parquet::write(&records)?);
    contents.insert("rows.json", serde_json::to_vec_pretty(charges)?);
    debug_assert_eq!(contents.len(), FILES.len());
    let manifest = Manifest {
        month: bill.month.to_string(),
        kind: if correction { "correction" } else { "bill" }.into(),
        currency: book.currency.to_string(),
        cost: sum(charges)?.to_string(),
        rows: charges.len(),
        provenance: bill.provenance.clone(),
        files: contents
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), hex(&Sha256::digest(bytes))))
            .collect(),
    };
    contents.insert(MANIFEST, serde_json::to_vec_pretty(&manifest)?);

    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let unfinished = parent.join(format!(".unfinished-{}", std::process::id()));
    // A name of this process: what is there was left by one that had the same number.
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir(&unfinished)?;
    for (name, bytes) in &contents {
        let path = unfinished.join(name);
        let mut file = File::create_new(&path)?;
        file.write_all(bytes)
            .with_context(|| format!("writing {}", path.display()))?;
        let mut permissions = file.metadata()?.permissions();
        permissions.set_readonly(true);
        file.set_permissions(permissions)?;
        file.sync_all()?;
    }
    File::open(&unfinished)?.sync_all()?;
    // Fails where another process has closed the month meanwhile: the folder is not empty.
    fs::rename(&unfinished, folder).with_context(|| format!("making {}", folder.display()))?;
    File::open(parent)?.sync_all()?;
    Ok(())
}
