//! Moves SQLite's log into the database file beside the writer, so that no customer waits for it.
//!
//! SQLite would do it in the COMMIT that makes the log long enough: a stall of tens of
//! milliseconds for everybody in the queue. A passive checkpoint on another connection blocks
//! nobody. What is left when the log is long is moved by the writer, which then begins it anew.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

/// Between two looks at the log.
const LOOK: Duration = Duration::from_millis(20);
/// Pages of the log that are worth a pass: 8 MiB.
const PASS_PAGES: i64 = 2048;
/// Passes in a row: each has less left to do, until one ends between two commits.
const PASSES_MAX: u32 = 6;

/// The thread, ended on drop.
pub(super) struct Checkpointer {
    /// Dropped to stop it.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    pub(super) fn start(path: &Path) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let path = path.to_owned();
        let thread = std::thread::Builder::new()
            .name("commerce-checkpoint".to_owned())
            .spawn(move || {
                // Opened at the first look: the start of the service does not wait for it.
                let mut log = None;
                while matches!(stopped.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
                    let looked = match &log {
                        Some(log) => look(log),
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
        })
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

/// Runs passes while there is much to do.
fn look(log: &Connection) -> rusqlite::Result<()> {
    if left(log, "NOOP")? < PASS_PAGES {
        return Ok(());
    }
    for _ in 0..PASSES_MAX {
        left(log, "PASSIVE")?;
        if left(log, "NOOP")? == 0 {
            break;
        }
    }
    Ok(())
}

/// Pages of the log that are not in the file yet, after a checkpoint of this mode.
fn left(log: &Connection, mode: &str) -> rusqlite::Result<i64> {
    let sql = format!("PRAGMA wal_checkpoint({mode})");
    log.query_row(&sql, [], |row| {
        let (written, moved): (i64, i64) = (row.get(1)?, row.get(2)?);
        Ok(written.saturating_sub(moved).max(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sql::Connection as _;
    use crate::store::sqlite::Sqlite;

    #[test]
    fn a_long_log_is_moved_while_its_writer_stays_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.db");
        let mut writer = Sqlite::open(&path).unwrap();
        writer.script("CREATE TABLE t (b BLOB)").unwrap();
        for _ in 0..3 {
            let sql = format!("INSERT INTO t VALUES (zeroblob({}))", PASS_PAGES * 4096);
            writer.script(&sql).unwrap();
        }
        let log = open(&path).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while left(&log, "NOOP").unwrap() > 0 {
            assert!(std::time::Instant::now() < deadline, "never moved");
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!(bytes > 3 * 8 * 1024 * 1024, "{bytes} in the file");
    }
}
