//! Open, read back, append one tick.

use std::{
    collections::HashMap,
    fs::{File, TryLockError},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use flow_abi::{Account, AccountKey, Cell, Direction, InterfaceCells, cell};

use super::{
    Balances, Grain, Place, outbox,
    postgres::Postgres,
    schema,
    sql::{Access, Database, Fault, SqlError, Statements, values},
    sqlite::Sqlite,
};
use crate::{
    attribution::{Amount, Postings, Watermarks},
    class::{ClassId, ClassStore},
    owner::{Leg, Owner, OwnerId, OwnerKind, OwnerStore, Quality, StoreError},
};

/// The gateway's name in a ledger that has one only.
const ALONE: &str = "local";
/// Its number there.
const ALONE_ID: i64 = 1;

/// The ledger cannot be used. Metering goes on: the kernel keeps counting, and the next commit
/// that works posts everything since the last one.
#[derive(Clone, Debug, thiserror::Error)]
#[error("ledger {place}: {what}{}", self.advice())]
pub struct LedgerError {
    place: String,
    what: String,
    /// Whose fault it is.
    pub fault: Fault,
}

impl LedgerError {
    fn advice(&self) -> &'static str {
        match self.fault {
            Fault::Full => "; fix: make space on its disk; nothing is lost meanwhile",
            Fault::ReadOnly => "; fix: make it writable; nothing is lost meanwhile",
            Fault::Damaged => {
                "; fix: stop the gateway, see `edgemeter ledger check`, keep a copy of the file, \
                 and `edgemeter ledger restore` the last export; `edgemeter detach` only if you \
                 give up what the kernel has counted since"
            }
            Fault::Unavailable => "; it is tried again; nothing is lost meanwhile",
            Fault::Uncertain => "; whether it was written is found out before anything is posted",
            Fault::Stale | Fault::Other => "",
        }
    }
}

/// One tick's additions, to be committed whole or not at all.
#[derive(Clone, Copy, Debug)]
pub struct Tick<'a> {
    /// Unix time of the tick, seconds.
    pub unix_seconds: i64,
    /// Lifetime of the kernel maps.
    pub epoch: &'a str,
    /// Ticks of this epoch committed so far, as far as the poster knows.
    pub number: i64,
    /// Marks as the ledger has them.
    pub before: &'a Watermarks,
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
    inner: Arc<Inner>,
}

struct Inner {
    database: Mutex<Box<dyn Database>>,
    place: Place,
    gateway: i64,
    name: String,
    sinks: RwLock<Vec<outbox::Sink>>,
    /// Rows begin by second.
    by_second: AtomicBool,
}

/// The right to post, until dropped or given up.
#[derive(Debug)]
pub struct Taken(Option<File>);

impl Taken {
    /// Another hold on the lock, for the process that posts next: the lock stays taken as long as
    /// any hold on it lives. None for a ledger that several gateways share.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn second_hold(&self) -> std::io::Result<Option<OwnedFd>> {
        let file = self.0.as_ref();
        file.map(|file| file.as_fd().try_clone_to_owned())
            .transpose()
    }

    /// From such a hold.
    #[must_use]
    pub fn from_hold(hold: OwnedFd) -> Self {
        Self(Some(File::from(hold)))
    }
}

impl Ledger {
    /// Opens or makes `<state_dir>/ledger.db`.
    ///
    /// # Errors
    /// The directory or file cannot be written, is damaged or no ledger, or is a newer program's.
    pub fn open(state_dir: &Path) -> Result<Self, LedgerError> {
        Self::open_at(&Place::in_directory(state_dir), ALONE)
    }

    /// Opens or makes the ledger at a place, for the gateway of this name.
    ///
    /// # Errors
    /// As [`Ledger::open`], or the server cannot be reached.
    pub fn open_at(place: &Place, gateway: &str) -> Result<Self, LedgerError> {
        let fail = |error: SqlError| wrap(place, error);
        let database: Box<dyn Database> = match place {
            Place::File(path) => {
                let directory = path.parent().unwrap_or(Path::new("."));
                std::fs::create_dir_all(directory).map_err(|error| {
                    fail(SqlError::new(
                        Fault::Other,
                        format!("cannot make its directory: {error}; fix gateway.state_dir"),
                    ))
                })?;
                Box::new(Sqlite::open(path).map_err(fail)?)
            }
            Place::Shared(url) => Box::new(Postgres::open(url).map_err(fail)?),
        };
        Self::over(database, place.clone(), gateway)
    }

    /// Stands in for a ledger that cannot be used, so that the gateway can serve: what it is told
    /// is gone with the process. Nothing may be metered into it.
    ///
    /// # Errors
    /// There is no memory.
    pub fn stand_in(place: &Place, gateway: &str) -> Result<Self, LedgerError> {
        let database = Sqlite::in_memory().map_err(|error| wrap(place, error))?;
        Self::over(Box::new(database), Place::File(":memory:".into()), gateway)
    }

    /// A ledger over a database: tests put theirs in between.
    pub(crate) fn over(
        mut database: Box<dyn Database>,
        place: Place,
        gateway: &str,
    ) -> Result<Self, LedgerError> {
        let fail = |error: SqlError| wrap(&place, error);
        schema::migrate(database.as_mut()).map_err(fail)?;
        let id = match place {
            Place::File(_) => number_alone(database.as_mut(), gateway),
            Place::Shared(_) => number_among_many(database.as_mut(), gateway),
        }
        .map_err(fail)?;
        Ok(Self {
            inner: Arc::new(Inner {
                database: Mutex::new(database),
                gateway: id,
                name: gateway.to_owned(),
                sinks: RwLock::default(),
                by_second: AtomicBool::new(false),
                place,
            }),
        })
    }

    /// Where it is, without a password.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.inner.place
    }

    /// The gateway's name.
    #[must_use]
    pub fn gateway(&self) -> &str {
        &self.inner.name
    }

    pub(super) fn gateway_id(&self) -> i64 {
        self.inner.gateway
    }

    /// Whether rows begin by second, for as long as [`super::Retention::seconds`] keeps them.
    pub fn begin_by_second(&self, wanted: bool) {
        self.inner.by_second.store(wanted, Ordering::Relaxed);
    }

    /// From now on every tick also goes to the outbox of these sinks.
    pub fn push_to(&self, sinks: Vec<outbox::Sink>) {
        *self
            .inner
            .sinks
            .write()
            .unwrap_or_else(PoisonError::into_inner) = sinks;
    }

    /// Takes the ledger for this process alone: two posters would post every byte twice. It is
    /// given back when the process ends, however it ends.
    ///
    /// # Errors
    /// Another process has it.
    pub fn take(&self) -> Result<Taken, LedgerError> {
        self.ok(self.lock().take(self.inner.gateway))?;
        let Place::File(path) = &self.inner.place else {
            return Ok(Taken(None));
        };
        let directory = path.parent().unwrap_or(Path::new("."));
        let failed = |fault, what: String| self.error(SqlError::new(fault, what));
        let file =
            File::open(directory).map_err(|error| failed(Fault::Other, error.to_string()))?;
        match file.try_lock() {
            Ok(()) => Ok(Taken(Some(file))),
            Err(TryLockError::WouldBlock) => Err(failed(
                Fault::Stale,
                "in use by another edgemeter; stop it first, or give this one another \
                 gateway.state_dir"
                    .into(),
            )),
            Err(TryLockError::Error(error)) => Err(failed(Fault::Other, error.to_string())),
        }
    }

    /// Lets another process take a ledger that several gateways share; a file's lock is handed
    /// over ([`Taken::second_hold`]).
    ///
    /// # Errors
    /// The server cannot be reached: its connections end on their own, and the lock with them.
    pub fn give_up(&self) -> Result<(), LedgerError> {
        self.ok(self.lock().give_up())
    }

    /// Opens a ledger whose tables must be as this program knows them: another process uses them.
    ///
    /// # Errors
    /// As [`Ledger::open_at`], or the tables are another version's.
    pub fn open_beside(place: &Place, gateway: &str) -> Result<Self, LedgerError> {
        let fail = |error: SqlError| wrap(place, error);
        let mut database: Box<dyn Database> = match place {
            Place::File(path) => Box::new(Sqlite::open(path).map_err(fail)?),
            Place::Shared(url) => Box::new(Postgres::open(url).map_err(fail)?),
        };
        schema::expect_current(database.as_mut()).map_err(fail)?;
        Self::over(database, place.clone(), gateway)
    }

    /// All owners this gateway ever numbered.
    ///
    /// # Errors
    /// The ledger cannot be read, or holds a word this program does not know.
    pub fn owners(&self) -> Result<Vec<(OwnerId, Owner)>, LedgerError> {
        let gateway = self.inner.gateway;
        self.read(|statements| {
            let rows = statements.query(
                "SELECT id, kind, leg, endpoint, route, service, tenant, quality FROM owner
                 WHERE gateway = ?1 ORDER BY id",
                values![gateway],
            )?;
            rows.iter()
                .map(|row| Ok((OwnerId(row.small(0)?), owner(row, 1)?)))
                .collect()
        })
    }

    /// All classes of remote addresses this gateway ever numbered.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn classes(&self) -> Result<Vec<(ClassId, String)>, LedgerError> {
        let gateway = self.inner.gateway;
        self.read(|statements| {
            let sql = "SELECT id, name FROM class WHERE gateway = ?1 ORDER BY id";
            let rows = statements.query(sql, values![gateway])?;
            rows.iter()
                .map(|row| Ok((ClassId(row.small(0)?), row.text(1)?.to_owned())))
                .collect()
        })
    }

    /// Begins a lifetime of the kernel maps, before anything is attached to them. What they hold
    /// when the ledger has never seen them was posted elsewhere, or never will be: it becomes the
    /// opening watermarks. Returns false when the ledger knows the lifetime already.
    ///
    /// # Errors
    /// The ledger cannot be written, or the lifetime is another gateway's: do not attach, bytes
    /// could not be told from older ones.
    pub fn begin_epoch(&self, epoch: &str, opening: &Watermarks) -> Result<bool, LedgerError> {
        let gateway = self.inner.gateway;
        self.write(|statements| {
            if epoch_of(statements, gateway, epoch)?.is_some() {
                return Ok(false);
            }
            let id = new_epoch(statements, gateway, epoch)?;
            for (key, value) in &opening.accounts {
                mark(statements, gateway, id, key, value)?;
            }
            for (ifindex, cells) in &opening.interfaces {
                mark_cells(statements, gateway, id, *ifindex, cells)?;
            }
            Ok(true)
        })
    }

    /// Where posting stopped, for one lifetime of the kernel maps.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn watermarks(&self, epoch: &str) -> Result<Watermarks, LedgerError> {
        self.resume(epoch).map(|(_, watermarks)| watermarks)
    }

    /// The ticks committed and where posting stopped, for one lifetime of the kernel maps.
    ///
    /// # Errors
    /// The ledger cannot be read, or the epoch is another gateway's.
    pub fn resume(&self, epoch: &str) -> Result<(i64, Watermarks), LedgerError> {
        let gateway = self.inner.gateway;
        self.read(|statements| {
            let Some((id, tick)) = epoch_of(statements, gateway, epoch)? else {
                return Ok((0, Watermarks::default()));
            };
            Ok((tick, marks(statements, gateway, id)?))
        })
    }

    /// Appends a tick: postings and watermarks in one transaction. False when there was nothing
    /// to write, and the tick does not count.
    ///
    /// # Errors
    /// Nothing was appended: post again from the old watermarks later. With
    /// [`Fault::Uncertain`] it may have been: ask [`Ledger::resume`] before posting on. With
    /// [`Fault::Stale`] the ledger is not where the poster thinks it is.
    pub fn append(&self, tick: &Tick<'_>) -> Result<bool, LedgerError> {
        let gateway = self.inner.gateway;
        let sinks = self.inner.sinks.read();
        let sinks = sinks.unwrap_or_else(PoisonError::into_inner).clone();
        // Not only those with a posting: where a claim took all that an account gained, nothing is
        // left to post, and its mark moves all the same.
        let before = |key| tick.before.accounts.get(key).copied().unwrap_or_default();
        let accounts = tick.watermarks.accounts.iter();
        let accounts: Vec<(&AccountKey, &Account)> = accounts
            .filter(|(key, value)| before(*key) != **value)
            .collect();
        if accounts.is_empty()
            && tick.postings.amounts.is_empty()
            && tick.postings.cells.is_empty()
            // No write, and so no disk access, unless a window is to be closed.
            && !self.read(|statements| {
                outbox::is_due(statements, gateway, &sinks, tick.unix_seconds)
            })?
        {
            return Ok(false);
        }
        let grain = if self.inner.by_second.load(Ordering::Relaxed) {
            Grain::Second
        } else {
            Grain::Minute
        };
        self.write(|statements| {
            let epoch = advance(statements, gateway, tick)?;
            post_amounts(statements, gateway, grain, tick)?;
            for (key, value) in &accounts {
                mark(statements, gateway, epoch, key, value)?;
            }
            post_cells(statements, gateway, epoch, grain, tick)?;
            outbox::collect(statements, gateway, &sinks, tick)?;
            Ok(true)
        })
    }

    /// All postings of this gateway, summed.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn balances(&self) -> Result<Balances, LedgerError> {
        let gateway = self.inner.gateway;
        self.read(|statements| balances(statements, gateway))
    }

    pub(super) fn read<T: Send>(
        &self,
        work: impl FnMut(&mut dyn Statements) -> Result<T, SqlError> + Send,
    ) -> Result<T, LedgerError> {
        let result = self.lock().run(Access::Read, work);
        self.ok(result)
    }

    pub(super) fn write<T: Send>(
        &self,
        work: impl FnMut(&mut dyn Statements) -> Result<T, SqlError> + Send,
    ) -> Result<T, LedgerError> {
        let result = self.lock().run(Access::Write, work);
        self.ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Database>> {
        self.inner
            .database
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, error: SqlError) -> LedgerError {
        wrap(&self.inner.place, error)
    }

    fn ok<T>(&self, result: Result<T, SqlError>) -> Result<T, LedgerError> {
        result.map_err(|error| self.error(error))
    }
}

impl OwnerStore for Ledger {
    fn store(&self, owners: &[(OwnerId, Owner)]) -> Result<(), StoreError> {
        let gateway = self.inner.gateway;
        self.write(|statements| {
            for (id, owner) in owners {
                store_owner(statements, gateway, *id, owner)?;
            }
            Ok(())
        })
        .map_err(|error| StoreError(error.to_string()))
    }

    fn stored(&self) -> Result<Vec<(OwnerId, Owner)>, StoreError> {
        self.owners().map_err(|error| StoreError(error.to_string()))
    }
}

impl ClassStore for Ledger {
    fn store_class(&self, id: ClassId, name: &str) -> Result<(), StoreError> {
        let gateway = self.inner.gateway;
        self.write(|statements| {
            statements.execute(
                "INSERT INTO class VALUES (?1, ?2, ?3)",
                values![gateway, id.0, name],
            )
        })
        .map(|_| ())
        .map_err(|error| StoreError(error.to_string()))
    }
}

pub(super) fn wrap(place: &Place, error: SqlError) -> LedgerError {
    LedgerError {
        place: place.to_string(),
        what: error.what,
        fault: error.fault,
    }
}

fn number_alone(database: &mut dyn Database, name: &str) -> Result<i64, SqlError> {
    let known = database.run(Access::Read, |statements| {
        statements.one("SELECT name FROM gateway WHERE id = ?1", values![ALONE_ID])
    })?;
    // Who does not know the name leaves it.
    if known.is_some() && name == ALONE {
        return Ok(ALONE_ID);
    }
    if known.as_ref().is_none_or(|row| row.text(0) != Ok(name)) {
        database.run(Access::Write, |statements| {
            statements.execute(
                "INSERT INTO gateway VALUES (?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET name = excluded.name",
                values![ALONE_ID, name],
            )
        })?;
    }
    Ok(ALONE_ID)
}

fn number_among_many(database: &mut dyn Database, name: &str) -> Result<i64, SqlError> {
    // Two gateways may start at once: one of them loses and looks again.
    let mut attempts = 0;
    loop {
        attempts += 1;
        let numbered = database.run(Access::Write, |statements| {
            let known = statements.one("SELECT id FROM gateway WHERE name = ?1", values![name])?;
            if let Some(row) = known {
                return row.int(0);
            }
            let last = statements.one("SELECT MAX(id) FROM gateway", &[])?;
            let id = last.map_or(Ok(0), |row| row.sum(0))? + 1;
            statements.execute("INSERT INTO gateway VALUES (?1, ?2)", values![id, name])?;
            Ok(id)
        });
        match numbered {
            Err(_) if attempts < 5 => {}
            other => return other,
        }
    }
}

/// A number that is stored keeps its meaning.
fn store_owner(
    statements: &mut dyn Statements,
    gateway: i64,
    id: OwnerId,
    new: &Owner,
) -> Result<(), SqlError> {
    let stored = statements.one(
        "SELECT kind, leg, endpoint, route, service, tenant, quality FROM owner
         WHERE gateway = ?1 AND id = ?2",
        values![gateway, id.0],
    )?;
    match stored {
        Some(row) if owner(&row, 0)? == *new => Ok(()),
        Some(_) => Err(SqlError::new(
            Fault::Other,
            format!("owner {} is stored already, with another meaning", id.0),
        )),
        None => statements
            .execute(
                "INSERT INTO owner VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
                values![
                    gateway,
                    id.0,
                    new.kind.as_str(),
                    new.leg.as_str(),
                    &new.endpoint,
                    &new.route,
                    &new.service,
                    &new.tenant,
                    new.quality.as_str(),
                ],
            )
            .map(drop),
    }
}

/// An owner from eight columns: kind, leg, endpoint, route, service, tenant, quality.
pub(super) fn owner(row: &super::sql::Row, first: usize) -> Result<Owner, SqlError> {
    let [kind, leg, endpoint, route, service, tenant, quality] =
        [0, 1, 2, 3, 4, 5, 6].map(|column| row.text(first + column).map(str::to_owned));
    let (kind, leg, quality) = (kind?, leg?, quality?);
    let words = OwnerKind::from_word(&kind)
        .zip(Leg::from_word(&leg))
        .zip(Quality::from_word(&quality));
    let Some(((kind, leg), quality)) = words else {
        return Err(SqlError::new(
            Fault::Other,
            format!("an owner is of an unknown kind {kind} {leg} {quality}"),
        ));
    };
    Ok(Owner {
        kind,
        leg,
        endpoint: endpoint?,
        route: route?,
        service: service?,
        tenant: tenant?,
        quality,
    })
}

/// An epoch's number and tick.
fn epoch_of(
    statements: &mut dyn Statements,
    gateway: i64,
    epoch: &str,
) -> Result<Option<(i64, i64)>, SqlError> {
    let row = statements.one(
        "SELECT e.gateway, e.id, e.tick, g.name FROM epoch e JOIN gateway g ON g.id = e.gateway
         WHERE e.name = ?1",
        values![epoch],
    )?;
    let Some(row) = row else { return Ok(None) };
    if row.int(0)? != gateway {
        // The same counters under another name would be posted a second time.
        return Err(SqlError::new(
            Fault::Stale,
            format!(
                "this machine's counters are posted as gateway \"{}\"; fix: set gateway.id to \
                 that, or `edgemeter detach` first",
                row.text(3)?
            ),
        ));
    }
    Ok(Some((row.int(1)?, row.int(2)?)))
}

fn new_epoch(statements: &mut dyn Statements, gateway: i64, epoch: &str) -> Result<i64, SqlError> {
    let last = statements.one(
        "SELECT MAX(id) FROM epoch WHERE gateway = ?1",
        values![gateway],
    )?;
    let id = last.map_or(Ok(0), |row| row.sum(0))? + 1;
    statements.execute(
        "INSERT INTO epoch VALUES (?1, ?2, ?3, 0)",
        values![gateway, id, epoch],
    )?;
    Ok(id)
}

/// Counts the tick; fails when it is not the one that follows the last one committed.
fn advance(
    statements: &mut dyn Statements,
    gateway: i64,
    tick: &Tick<'_>,
) -> Result<i64, SqlError> {
    let id = match epoch_of(statements, gateway, tick.epoch)? {
        Some((id, _)) => id,
        None => new_epoch(statements, gateway, tick.epoch)?,
    };
    let counted = statements.execute(
        "UPDATE epoch SET tick = tick + 1 WHERE gateway = ?1 AND id = ?2 AND tick = ?3",
        values![gateway, id, tick.number],
    )?;
    if counted == 1 {
        return Ok(id);
    }
    Err(SqlError::new(
        Fault::Stale,
        "another process posted to it, or it was restored: it is read again before the next tick",
    ))
}

fn post_amounts(
    statements: &mut dyn Statements,
    gateway: i64,
    grain: Grain,
    tick: &Tick<'_>,
) -> Result<(), SqlError> {
    let start = grain.span(tick.unix_seconds).start;
    for (key, amount) in &tick.postings.amounts {
        statements.execute(
            "INSERT INTO posting VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
             ON CONFLICT (gateway, grain, start, interface, direction, owner, class) DO UPDATE SET
                wire_bytes = posting.wire_bytes + excluded.wire_bytes,
                frames = posting.frames + excluded.frames,
                l4_payload_bytes = posting.l4_payload_bytes + excluded.l4_payload_bytes,
                retransmit_bytes = posting.retransmit_bytes + excluded.retransmit_bytes,
                retransmit_frames = posting.retransmit_frames + excluded.retransmit_frames,
                retransmit_payload_bytes =
                    posting.retransmit_payload_bytes + excluded.retransmit_payload_bytes",
            values![
                gateway,
                grain.number(),
                start,
                interface(tick, key.ifindex),
                key.direction as u32,
                key.owner.0,
                key.class.0,
                amount.wire_bytes,
                amount.frames,
                amount.l4_payload_bytes,
                amount.retransmit_bytes,
                amount.retransmit_frames,
                amount.retransmit_payload_bytes,
            ],
        )?;
    }
    Ok(())
}

fn mark(
    statements: &mut dyn Statements,
    gateway: i64,
    epoch: i64,
    key: &AccountKey,
    value: &Account,
) -> Result<(), SqlError> {
    statements.execute(
        "INSERT INTO account_mark VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (gateway, epoch, owner, ifindex, class)
         DO UPDATE SET counters = excluded.counters",
        values![
            gateway,
            epoch,
            key.owner,
            key.ifindex,
            key.class,
            blob(&account_words(value)),
        ],
    )?;
    Ok(())
}

fn mark_cells(
    statements: &mut dyn Statements,
    gateway: i64,
    epoch: i64,
    ifindex: u32,
    cells: &InterfaceCells,
) -> Result<(), SqlError> {
    let cells = cells.cells.iter().flatten();
    let words: Vec<u64> = cells.flat_map(|cell| [cell.bytes, cell.frames]).collect();
    statements.execute(
        "INSERT INTO cell_mark VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (gateway, epoch, ifindex)
         DO UPDATE SET counters = excluded.counters",
        values![gateway, epoch, ifindex, blob(&words)],
    )?;
    Ok(())
}

fn post_cells(
    statements: &mut dyn Statements,
    gateway: i64,
    epoch: i64,
    grain: Grain,
    tick: &Tick<'_>,
) -> Result<(), SqlError> {
    let start = grain.span(tick.unix_seconds).start;
    let mut marked = None;
    for (key, (bytes, frames)) in &tick.postings.cells {
        statements.execute(
            "INSERT INTO cell_posting VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (gateway, grain, start, interface, direction, cell) DO UPDATE SET
                bytes = cell_posting.bytes + excluded.bytes,
                frames = cell_posting.frames + excluded.frames",
            values![
                gateway,
                grain.number(),
                start,
                interface(tick, key.ifindex),
                key.direction as u32,
                cell::NAMES[key.cell],
                *bytes,
                *frames,
            ],
        )?;
        // The keys are in order: an interface's cells come together.
        if marked != Some(key.ifindex)
            && let Some(cells) = tick.watermarks.interfaces.get(&key.ifindex)
        {
            marked = Some(key.ifindex);
            mark_cells(statements, gateway, epoch, key.ifindex, cells)?;
        }
    }
    Ok(())
}

fn interface<'t>(tick: &'t Tick<'_>, ifindex: u32) -> &'t str {
    tick.interfaces
        .get(&ifindex)
        .map_or("(gone)", String::as_str)
}

fn account_words(value: &Account) -> [u64; 9] {
    [
        value.tx_bytes,
        value.tx_frames,
        value.tx_payload_bytes,
        value.tx_retransmit_bytes,
        value.tx_retransmit_frames,
        value.tx_retransmit_payload_bytes,
        value.rx_bytes,
        value.rx_frames,
        value.rx_payload_bytes,
    ]
}

fn marks(
    statements: &mut dyn Statements,
    gateway: i64,
    epoch: i64,
) -> Result<Watermarks, SqlError> {
    let mut marks = Watermarks::default();
    let rows = statements.query(
        "SELECT owner, ifindex, class, counters FROM account_mark
         WHERE gateway = ?1 AND epoch = ?2",
        values![gateway, epoch],
    )?;
    for row in rows {
        let key = AccountKey {
            owner: row.small(0)?,
            ifindex: row.small(1)?,
            class: row.small(2)?,
        };
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
        ] = words(row.blob(3)?)?;
        let account = Account {
            tx_bytes,
            tx_frames,
            tx_payload_bytes,
            tx_retransmit_bytes,
            tx_retransmit_frames,
            tx_retransmit_payload_bytes,
            rx_bytes,
            rx_frames,
            rx_payload_bytes,
        };
        marks.accounts.insert(key, account);
    }
    let rows = statements.query(
        "SELECT ifindex, counters FROM cell_mark WHERE gateway = ?1 AND epoch = ?2",
        values![gateway, epoch],
    )?;
    for row in rows {
        let words: [u64; 4 * cell::COUNT] = words(row.blob(1)?)?;
        let mut cells = InterfaceCells::default();
        for (cell, pair) in cells.cells.iter_mut().flatten().zip(words.chunks_exact(2)) {
            *cell = Cell {
                bytes: pair[0],
                frames: pair[1],
            };
        }
        marks.interfaces.insert(row.small(0)?, cells);
    }
    Ok(marks)
}

pub(super) fn balances(
    statements: &mut dyn Statements,
    gateway: i64,
) -> Result<Balances, SqlError> {
    let mut balances = Balances::default();
    let rows = statements.query(
        "SELECT interface, direction, owner, CAST(SUM(wire_bytes) AS BIGINT),
                CAST(SUM(frames) AS BIGINT), CAST(SUM(l4_payload_bytes) AS BIGINT),
                CAST(SUM(retransmit_bytes) AS BIGINT), CAST(SUM(retransmit_frames) AS BIGINT),
                CAST(SUM(retransmit_payload_bytes) AS BIGINT), class
         FROM posting WHERE gateway = ?1 GROUP BY interface, direction, owner, class",
        values![gateway],
    )?;
    for row in rows {
        let amount = amount(&row, 3)?;
        balances.add_amount(
            row.text(0)?,
            direction(row.int(1)?),
            OwnerId(row.small(2)?),
            ClassId(row.small(9)?),
            &amount,
        );
    }
    let rows = statements.query(
        "SELECT interface, direction, cell, CAST(SUM(bytes) AS BIGINT),
                CAST(SUM(frames) AS BIGINT)
         FROM cell_posting WHERE gateway = ?1 GROUP BY interface, direction, cell",
        values![gateway],
    )?;
    for row in rows {
        let name = row.text(2)?;
        let Some(number) = cell::NAMES.iter().position(|known| *known == name) else {
            let what = format!("cell_posting has an unknown cell {name}");
            return Err(SqlError::new(Fault::Other, what));
        };
        balances.add_cell(
            row.text(0)?,
            direction(row.int(1)?),
            number,
            row.int(3)?,
            row.int(4)?,
        );
    }
    Ok(balances)
}

/// Six columns of sums.
pub(super) fn amount(row: &super::sql::Row, first: usize) -> Result<Amount, SqlError> {
    Ok(Amount {
        wire_bytes: row.sum(first)?,
        frames: row.sum(first + 1)?,
        l4_payload_bytes: row.sum(first + 2)?,
        retransmit_bytes: row.sum(first + 3)?,
        retransmit_frames: row.sum(first + 4)?,
        retransmit_payload_bytes: row.sum(first + 5)?,
    })
}

pub(super) fn direction(number: i64) -> Direction {
    if number == 0 {
        Direction::Rx
    } else {
        Direction::Tx
    }
}

fn blob(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words<const N: usize>(blob: &[u8]) -> Result<[u64; N], SqlError> {
    let mut words = [0; N];
    if blob.len() != N * 8 {
        return Err(SqlError::new(
            Fault::Damaged,
            format!("a watermark has {} bytes, not {}", blob.len(), N * 8),
        ));
    }
    for (word, bytes) in words.iter_mut().zip(blob.chunks_exact(8)) {
        let mut eight = [0; 8];
        eight.copy_from_slice(bytes);
        *word = u64::from_le_bytes(eight);
    }
    Ok(words)
}
