//! The file: open, read back, append one tick.

use std::{
    collections::HashMap,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flow_abi::{Account, AccountKey, Cell, Direction, InterfaceCells, cell};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Balances, schema};
use crate::{
    attribution::{Amount, Postings, Watermarks},
    owner::{Leg, Owner, OwnerId, OwnerKind, OwnerStore, Quality, StoreError},
};

/// The ledger cannot be used. Metering goes on: the kernel keeps counting, and the next commit
/// that works posts everything since the last one.
#[derive(Debug, thiserror::Error)]
#[error("ledger {path}: {what}")]
pub struct LedgerError {
    path: PathBuf,
    what: String,
}

/// One tick's additions, to be committed whole or not at all.
#[derive(Clone, Copy, Debug)]
pub struct Tick<'a> {
    /// Unix time of the tick, seconds.
    pub unix_seconds: i64,
    /// Lifetime of the kernel maps.
    pub epoch: &'a str,
    /// What to add.
    pub postings: &'a Postings,
    /// Marks after it.
    pub watermarks: &'a Watermarks,
    /// Names by interface index.
    pub interfaces: &'a HashMap<u32, String>,
}

/// A handle to the ledger; clones share it.
#[derive(Clone)]
pub struct Ledger {
    connection: Arc<Mutex<Connection>>,
    path: PathBuf,
}

impl Ledger {
    /// Opens or makes `<state_dir>/ledger.db`.
    ///
    /// # Errors
    /// The directory or file cannot be written, is not a ledger, or is a newer program's.
    pub fn open(state_dir: &Path) -> Result<Self, LedgerError> {
        let path = state_dir.join("ledger.db");
        let fail = |what: String| LedgerError {
            path: path.clone(),
            what,
        };
        std::fs::create_dir_all(state_dir).map_err(|error| {
            fail(format!(
                "cannot make its directory: {error}; fix gateway.state_dir"
            ))
        })?;
        let mut connection = Connection::open(&path).map_err(|error| fail(error.to_string()))?;
        // FULL: an acknowledged posting survives power loss.
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000;",
            )
            .map_err(|error| fail(error.to_string()))?;
        schema::migrate(&mut connection).map_err(fail)?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
            path,
        })
    }

    /// Takes the state directory for this process alone: two posters would post every byte twice.
    /// The kernel gives it back when the process ends, however it ends.
    ///
    /// # Errors
    /// Another process has it.
    pub fn take(&self) -> Result<File, LedgerError> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let file = File::open(directory).map_err(|error| self.error(error.to_string()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(self.error(
                "in use by another edgemeter; stop it first, or give this one another \
                 gateway.state_dir"
                    .into(),
            )),
            Err(TryLockError::Error(error)) => Err(self.error(error.to_string())),
        }
    }

    /// All owners ever numbered.
    ///
    /// # Errors
    /// The file cannot be read, or holds a word this program does not know.
    pub fn owners(&self) -> Result<Vec<(OwnerId, Owner)>, LedgerError> {
        let connection = self.lock();
        let mut statement = self.ok(connection.prepare(
            "SELECT id, kind, leg, endpoint, route, service, tenant, quality FROM owner",
        ))?;
        let rows = self.ok(statement.query_map([], |row| {
            let word = |index: usize| row.get::<_, String>(index);
            Ok((
                row.get::<_, u32>(0)?,
                [word(1)?, word(2)?, word(7)?],
                [word(3)?, word(4)?, word(5)?, word(6)?],
            ))
        }))?;
        let mut owners = Vec::new();
        for row in rows {
            let (id, [kind, leg, quality], [endpoint, route, service, tenant]) = self.ok(row)?;
            let words = OwnerKind::from_word(&kind)
                .zip(Leg::from_word(&leg))
                .zip(Quality::from_word(&quality));
            let Some(((kind, leg), quality)) = words else {
                return Err(self.error(format!(
                    "owner {id} is of an unknown kind {kind} {leg} {quality}"
                )));
            };
            owners.push((
                OwnerId(id),
                Owner {
                    kind,
                    leg,
                    endpoint,
                    route,
                    service,
                    tenant,
                    quality,
                },
            ));
        }
        Ok(owners)
    }

    /// Where posting stopped, for one lifetime of the kernel maps.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn watermarks(&self, epoch: &str) -> Result<Watermarks, LedgerError> {
        let connection = self.lock();
        let mut marks = Watermarks::default();
        let id: Option<i64> = self.ok(connection
            .query_row("SELECT id FROM epoch WHERE name = ?1", [epoch], |row| {
                row.get(0)
            })
            .optional())?;
        let Some(id) = id else { return Ok(marks) };
        let mut statement = self.ok(connection
            .prepare("SELECT owner, ifindex, counters FROM account_mark WHERE epoch = ?1"))?;
        let rows = self.ok(statement.query_map([id], |row| {
            Ok((
                AccountKey {
                    owner: row.get(0)?,
                    ifindex: row.get(1)?,
                },
                row.get::<_, Vec<u8>>(2)?,
            ))
        }))?;
        for row in rows {
            let (key, blob) = self.ok(row)?;
            let [
                tx_bytes,
                tx_frames,
                tx_payload_bytes,
                tx_retransmit_bytes,
                tx_retransmit_frames,
                tx_retransmit_payload_bytes,
                rx_bytes,
                rx_frames,
                rx_payload_bytes,
            ] = self.words(&blob)?;
            marks.accounts.insert(
                key,
                Account {
                    tx_bytes,
                    tx_frames,
                    tx_payload_bytes,
                    tx_retransmit_bytes,
                    tx_retransmit_frames,
                    tx_retransmit_payload_bytes,
                    rx_bytes,
                    rx_frames,
                    rx_payload_bytes,
                },
            );
        }
        let mut statement = self
            .ok(connection.prepare("SELECT ifindex, counters FROM cell_mark WHERE epoch = ?1"))?;
        let rows = self.ok(statement.query_map([id], |row| {
            Ok((row.get::<_, u32>(0)?, row.get::<_, Vec<u8>>(1)?))
        }))?;
        for row in rows {
            let (ifindex, blob) = self.ok(row)?;
            let words: [u64; 4 * cell::COUNT] = self.words(&blob)?;
            let mut cells = InterfaceCells::default();
            for (cell, pair) in cells.cells.iter_mut().flatten().zip(words.chunks_exact(2)) {
                *cell = Cell {
                    bytes: pair[0],
                    frames: pair[1],
                };
            }
            marks.interfaces.insert(ifindex, cells);
        }
        Ok(marks)
    }

    /// Appends a tick: postings and watermarks in one transaction.
    ///
    /// # Errors
    /// Nothing was appended: post again from the old watermarks later.
    pub fn append(&self, tick: &Tick<'_>) -> Result<(), LedgerError> {
        let mut connection = self.lock();
        let transaction = self.ok(connection.transaction())?;
        let minute = tick.unix_seconds - tick.unix_seconds.rem_euclid(60);
        let unnamed = String::from("(gone)");
        let name = |ifindex: u32| tick.interfaces.get(&ifindex).unwrap_or(&unnamed);
        {
            self.ok(transaction.execute(
                "INSERT OR IGNORE INTO epoch (name) VALUES (?1)",
                [tick.epoch],
            ))?;
            let epoch: i64 = self.ok(transaction.query_row(
                "SELECT id FROM epoch WHERE name = ?1",
                [tick.epoch],
                |row| row.get(0),
            ))?;
            let mut post = self.ok(transaction.prepare_cached(
                "INSERT INTO posting VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
                 ON CONFLICT DO UPDATE SET wire_bytes = wire_bytes + ?5, frames = frames + ?6,
                    l4_payload_bytes = l4_payload_bytes + ?7,
                    retransmit_bytes = retransmit_bytes + ?8,
                    retransmit_frames = retransmit_frames + ?9,
                    retransmit_payload_bytes = retransmit_payload_bytes + ?10",
            ))?;
            let mut mark = self.ok(transaction
                .prepare_cached("INSERT OR REPLACE INTO account_mark VALUES (?1, ?2, ?3, ?4)"))?;
            for (key, amount) in &tick.postings.amounts {
                self.ok(post.execute(params![
                    minute,
                    name(key.ifindex),
                    key.direction as u32,
                    key.owner.0,
                    amount.wire_bytes,
                    amount.frames,
                    amount.l4_payload_bytes,
                    amount.retransmit_bytes,
                    amount.retransmit_frames,
                    amount.retransmit_payload_bytes,
                ]))?;
                let account = AccountKey {
                    owner: key.owner.0,
                    ifindex: key.ifindex,
                };
                if let Some(value) = tick.watermarks.accounts.get(&account) {
                    self.ok(mark.execute(params![
                        epoch,
                        account.owner,
                        account.ifindex,
                        blob(&[
                            value.tx_bytes,
                            value.tx_frames,
                            value.tx_payload_bytes,
                            value.tx_retransmit_bytes,
                            value.tx_retransmit_frames,
                            value.tx_retransmit_payload_bytes,
                            value.rx_bytes,
                            value.rx_frames,
                            value.rx_payload_bytes,
                        ])
                    ]))?;
                }
            }
            let mut post = self.ok(transaction.prepare_cached(
                "INSERT INTO cell_posting VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT DO UPDATE SET bytes = bytes + ?5, frames = frames + ?6",
            ))?;
            let mut mark = self
                .ok(transaction
                    .prepare_cached("INSERT OR REPLACE INTO cell_mark VALUES (?1, ?2, ?3)"))?;
            for (key, (bytes, frames)) in &tick.postings.cells {
                let cell_name = cell::NAMES[key.cell];
                self.ok(post.execute(params![
                    minute,
                    name(key.ifindex),
                    key.direction as u32,
                    cell_name,
                    bytes,
                    frames
                ]))?;
                if let Some(cells) = tick.watermarks.interfaces.get(&key.ifindex) {
                    let words: Vec<u64> = cells
                        .cells
                        .iter()
                        .flatten()
                        .flat_map(|cell| [cell.bytes, cell.frames])
                        .collect();
                    self.ok(mark.execute(params![epoch, key.ifindex, blob(&words)]))?;
                }
            }
        }
        self.ok(transaction.commit())
    }

    /// All postings, summed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn balances(&self) -> Result<Balances, LedgerError> {
        let connection = self.lock();
        let mut balances = Balances::default();
        let mut statement = self.ok(connection.prepare(
            "SELECT interface, direction, owner, SUM(wire_bytes), SUM(frames),
                    SUM(l4_payload_bytes), SUM(retransmit_bytes), SUM(retransmit_frames),
                    SUM(retransmit_payload_bytes)
             FROM posting GROUP BY interface, direction, owner",
        ))?;
        let rows = self.ok(statement.query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                direction(row.get(1)?),
                OwnerId(row.get(2)?),
                Amount {
                    wire_bytes: row.get(3)?,
                    frames: row.get(4)?,
                    l4_payload_bytes: row.get(5)?,
                    retransmit_bytes: row.get(6)?,
                    retransmit_frames: row.get(7)?,
                    retransmit_payload_bytes: row.get(8)?,
                },
            ))
        }))?;
        for row in rows {
            let (interface, direction, owner, amount) = self.ok(row)?;
            balances.add_amount(&interface, direction, owner, &amount);
        }
        let mut statement = self.ok(connection.prepare(
            "SELECT interface, direction, cell, SUM(bytes), SUM(frames) FROM cell_posting
             GROUP BY interface, direction, cell",
        ))?;
        let rows = self.ok(statement.query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                direction(row.get(1)?),
                row.get::<_, String>(2)?,
                row.get::<_, i64>(3)?,
                row.get::<_, i64>(4)?,
            ))
        }))?;
        for row in rows {
            let (interface, direction, name, bytes, frames) = self.ok(row)?;
            let Some(number) = cell::NAMES.iter().position(|known| *known == name) else {
                return Err(self.error(format!("cell_posting has an unknown cell {name}")));
            };
            balances.add_cell(&interface, direction, number, bytes, frames);
        }
        Ok(balances)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: String) -> LedgerError {
        LedgerError {
            path: self.path.clone(),
            what,
        }
    }

    pub(super) fn ok<T>(&self, result: rusqlite::Result<T>) -> Result<T, LedgerError> {
        result.map_err(|error| self.error(error.to_string()))
    }

    fn words<const N: usize>(&self, blob: &[u8]) -> Result<[u64; N], LedgerError> {
        let mut words = [0; N];
        if blob.len() != N * 8 {
            return Err(self.error(format!(
                "a watermark has {} bytes, not {}",
                blob.len(),
                N * 8
            )));
        }
        for (word, bytes) in words.iter_mut().zip(blob.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            *word = u64::from_le_bytes(eight);
        }
        Ok(words)
    }
}

impl OwnerStore for Ledger {
    fn store(&self, id: OwnerId, owner: &Owner) -> Result<(), StoreError> {
        self.lock()
            .execute(
                "INSERT INTO owner VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    id.0,
                    owner.kind.as_str(),
                    owner.leg.as_str(),
                    owner.endpoint,
                    owner.route,
                    owner.service,
                    owner.tenant,
                    owner.quality.as_str(),
                ],
            )
            .map(|_| ())
            .map_err(|error| StoreError(format!("{}: {error}", self.path.display())))
    }
}

pub(super) fn direction(number: u32) -> Direction {
    if number == 0 {
        Direction::Rx
    } else {
        Direction::Tx
    }
}

fn blob(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
