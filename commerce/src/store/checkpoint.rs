//! Moves SQLite's log into the database file beside the writer, so that no customer waits for it.
//!
//! SQLite would do it in the COMMIT that makes the log long enough: a stall of tens of
//! milliseconds for everybody in the queue. A passive checkpoint on another connection blocks
//! nobody, but under load it never gets to the end of a log that grows meanwhile, and only a log
//! that is moved to its end begins anew. So the two share the work: this thread moves all but a
//! few pages and says so; the writer moves those between two transactions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

/// Between two looks at the log.
const LOOK: Duration = Duration::from_millis(20);
/// Passes in a row: each has less left to do.
const PASSES_MAX: u32 = 6;

/// How long the log may become, in pages of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// What is worth a pass.
    pub(super) pass: i64,
    /// What is long enough to begin anew.
    pub(super) restart: i64,
    /// What the writer may be left with.
    pub(super) rest_max: i64,
    /// Where SQLite takes over and lets a COMMIT wait: this thread has failed, or a reader holds
    /// an old snapshot.
    pub(super) length_max: i64,
}

impl Default for Limits {
    /// Passes of 4 MiB, a log of 64 MiB, half a MiB for the writer, and 512 MiB at most.
    fn default() -> Self {
        Self {
            pass: 1_024,
            restart: 16_384,
            rest_max: 128,
            length_max: 131_072,
        }
    }
}

/// The thread, ended on drop.
pub(super) struct Checkpointer {
    /// Dropped to stop it.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    rest: Rest,
}

/// Whether a long log is moved but for a few pages.
#[derive(Clone, Default)]
struct Rest(Arc<AtomicBool>);

impl Rest {
    fn is_left(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self, is_left: bool) {
        self.0.store(is_left, Ordering::Release);
    }
}

impl Checkpointer {
    pub(super) fn start(path: &Path, limits: Limits) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let path = path.to_owned();
        let rest = Rest::default();
        let left = rest.clone();
        let thread = std::thread::Builder::new()
            .name("commerce-checkpoint".to_owned())
            .spawn(move || {
                // Opened at the first look: the start of the service does not wait for it.
                let mut log = None;
                while matches!(stopped.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
                    let looked = match &log {
                        // A pass now would be in the writer's way.
                        Some(_) if left.is_left() => Ok(()),
                        Some(log) => look(log, limits).map(|is_left| left.set(is_left)),
                        None => open(&path).map(|opened| log = Some(opened)),
                    };
                    if let Err(error) = looked {
                        // The writer's own checkpoint bounds the log.
                        tracing::warn!(%error, "a checkpoint has failed and is tried again");
                    }
                }
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            rest,
        })
    }

    /// Between two transactions: moves what is left of a long log, so that the next one begins it
    /// anew. Mostly there is nothing to do.
    ///
    /// # Errors
    /// SQLite's, when the file cannot be written.
    pub(super) fn finish(&self, writer: &Connection) -> rusqlite::Result<()> {
        if self.rest.is_left() {
            let moved = left(writer, "PASSIVE");
            self.rest.set(false);
            moved?;
        }
        Ok(())
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic there has lost nothing: the log is still beside the file.
            let _ = thread.join();
        }
    }
}

fn open(path: &PathBuf) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // A connection knows of the log once it has read.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    Ok(connection)
}

/// Runs passes while there is much to do. Whether a few pages of a long log are left.
fn look(log: &Connection, limits: Limits) -> rusqlite::Result<bool> {
    let (mut length, mut rest) = left(log, "NOOP")?;
    if rest < limits.pass && length < limits.restart {
        return Ok(false);
    }
    for _ in 0..PASSES_MAX {
        if rest <= limits.rest_max {
            break;
        }
        left(log, "PASSIVE")?;
        (length, rest) = left(log, "NOOP")?;
    }
    // A log without a rest begins anew by itself.
    Ok(length >= limits.restart && (1..=limits.rest_max).contains(&rest))
}

/// Pages of the log, and of those the ones that are not in the file yet, after a checkpoint of
/// this mode.
fn left(log: &Connection, mode: &str) -> rusqlite::Result<(i64, i64)> {
    let sql = format!("PRAGMA wal_checkpoint({mode})");
    log.query_row(&sql, [], |row| {
        let (written, moved): (i64, i64) = (row.get(1)?, row.get(2)?);
        Ok((written, written.saturating_sub(moved).max(0)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sql::Connection as _;
    use crate::store::sqlite::Sqlite;

    const DEADLINE: Duration = Duration::from_secs(60);

    #[test]
    fn a_long_log_is_moved_while_its_writer_stays_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.db");
        let mut writer = Sqlite::open(&path).unwrap();
        writer.script("CREATE TABLE t (b BLOB)").unwrap();
        let pass = Limits::default().pass;
        for _ in 0..3 {
            let sql = format!("INSERT INTO t VALUES (zeroblob({}))", pass * 4096);
            writer.script(&sql).unwrap();
        }
        let log = open(&path).unwrap();
        let deadline = std::time::Instant::now() + DEADLINE;
        while left(&log, "NOOP").unwrap().1 > 0 {
            assert!(std::time::Instant::now() < deadline, "never moved");
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!(
            bytes > 3 * pass.unsigned_abs() * 4096,
            "{bytes} in the file"
        );
    }

    /// The writer never pauses, so that no pass gets to the end: the log must not grow for ever.
    #[test]
    fn the_log_begins_anew_under_a_writer_that_never_pauses() {
        let limits = Limits {
            pass: 16,
            restart: 256,
            rest_max: 64,
            length_max: 1 << 30,
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.db");
        let mut writer = Sqlite::open_with(&path, limits).unwrap();
        writer.script("CREATE TABLE t (b BLOB)").unwrap();
        let mut begins_anew = 0;
        let mut before = 0;
        let deadline = std::time::Instant::now() + DEADLINE;
        while begins_anew < 3 {
            assert!(
                std::time::Instant::now() < deadline,
                "it began anew {begins_anew} times"
            );
            writer
                .script("INSERT INTO t VALUES (zeroblob(16384))")
                .unwrap();
            let length = left(writer.inner(), "NOOP").unwrap().0;
            begins_anew += u32::from(length < before);
            before = length;
            writer.maintain().unwrap();
        }
    }
}
