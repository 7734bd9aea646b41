//! SQLite: one file in WAL mode with `synchronous=FULL`.
//!
//! SQLite's write-ahead log is the local log; nothing else is written. `FULL` stays: with
//! `NORMAL` a power loss takes acknowledged orders with it.

use std::path::Path;
use std::time::Duration;

use rusqlite::types::{ToSql, ToSqlOutput, Value as SqliteValue, ValueRef};
use rusqlite::{OpenFlags, params_from_iter};

use super::checkpoint::{Checkpointer, Limits};
use super::sql::{Backend, Connection, Param, Row, SqlError, Value};

/// How long the writer waits for another process that holds the write lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// An open file.
pub(super) struct Sqlite {
    connection: rusqlite::Connection,
    writes: bool,
    /// Beside the connection that writes to a file.
    checkpointer: Option<Checkpointer>,
}

impl Sqlite {
    /// Opens the file for writing and creates it when absent.
    pub(super) fn open(path: &Path) -> Result<Self, SqlError> {
        Self::open_with(path, Limits::default())
    }

    pub(super) fn open_with(path: &Path, limits: Limits) -> Result<Self, SqlError> {
        let connection = rusqlite::Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        // The checkpointer's work; beyond this something is wrong with it.
        connection.pragma_update(None, "wal_autocheckpoint", limits.length_max)?;
        // Kibibytes, negative by SQLite's convention: the hot pages of the indices.
        connection.pragma_update(None, "cache_size", -65536)?;
        connection.set_prepared_statement_cache_capacity(256);
        let in_memory = path == Path::new(":memory:");
        let checkpointer = (!in_memory)
            .then(|| Checkpointer::start(path, limits))
            .transpose()?;
        Ok(Self {
            connection,
            writes: true,
            checkpointer,
        })
    }

    /// Opens the file so that nothing can be written through the connection.
    pub(super) fn open_to_read(path: &Path) -> Result<Self, SqlError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = rusqlite::Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(256);
        Ok(Self {
            connection,
            writes: false,
            checkpointer: None,
        })
    }

    #[cfg(test)]
    pub(super) fn inner(&self) -> &rusqlite::Connection {
        &self.connection
    }
}

impl ToSql for Param<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Null => ToSqlOutput::Borrowed(ValueRef::Null),
            Self::Integer(number) => ToSqlOutput::Borrowed(ValueRef::Integer(*number)),
            Self::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
            Self::Uuid(uuid) => ToSqlOutput::Owned(SqliteValue::Text(uuid.to_string())),
            Self::Blob(bytes) => ToSqlOutput::Borrowed(ValueRef::Blob(bytes)),
        })
    }
}

fn value(found: ValueRef<'_>) -> Result<Value, SqlError> {
    Ok(match found {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Text(text) => Value::Text(
            std::str::from_utf8(text)
                .map_err(|_| SqlError::Column("UTF-8"))?
                .to_owned(),
        ),
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
        ValueRef::Real(_) => return Err(SqlError::Column("anything but a float")),
    })
}

impl Connection for Sqlite {
    fn backend(&self) -> Backend {
        Backend::Sqlite
    }

    fn query(&mut self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, SqlError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let width = statement.column_count();
        let mut found = statement.query(params_from_iter(params))?;
        let mut rows = Vec::new();
        while let Some(row) = found.next()? {
            let values = (0..width)
                .map(|column| value(row.get_ref(column)?))
                .collect::<Result<_, _>>()?;
            rows.push(Row::new(values));
        }
        Ok(rows)
    }

    fn execute(&mut self, sql: &str, params: &[Param<'_>]) -> Result<u64, SqlError> {
        let changed = self
            .connection
            .prepare_cached(sql)?
            .execute(params_from_iter(params))?;
        Ok(u64::try_from(changed).unwrap_or(u64::MAX))
    }

    fn script(&mut self, sql: &str) -> Result<(), SqlError> {
        Ok(self.connection.execute_batch(sql)?)
    }

    fn begin(&mut self) -> Result<(), SqlError> {
        self.execute("BEGIN IMMEDIATE", &[]).map(drop)
    }

    fn begin_snapshot(&mut self) -> Result<(), SqlError> {
        self.execute("BEGIN DEFERRED", &[]).map(drop)
    }

    fn commit(&mut self) -> Result<(), SqlError> {
        self.execute("COMMIT", &[]).map(drop)
    }

    fn maintain(&mut self) -> Result<(), SqlError> {
        match &self.checkpointer {
            Some(checkpointer) => Ok(checkpointer.finish(&self.connection)?),
            None => Ok(()),
        }
    }

    fn rollback(&mut self) -> Result<(), SqlError> {
        // SQLite rolls back on its own when the disk is full or fails.
        if self.connection.is_autocommit() {
            return Ok(());
        }
        self.execute("ROLLBACK", &[]).map(drop)
    }

    /// Moves the whole log into the database file and empties it.
    fn close(&mut self) -> Result<(), SqlError> {
        if !self.writes {
            return Ok(());
        }
        // It must not be in a pass of its own.
        self.checkpointer.take();
        let (busy, pages): (bool, i64) =
            self.connection
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })?;
        if busy {
            tracing::warn!(pages, "another connection kept the log from being emptied");
        } else {
            tracing::info!("the log is in the database file");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_sqlite_is_past_the_wal_reset_bug() {
        // 3.7.0 to 3.51.2 can corrupt a WAL database that has two connections.
        assert!(
            rusqlite::version_number() >= 3_051_003,
            "{}",
            rusqlite::version()
        );
    }

    #[test]
    fn the_writing_connection_is_durable_and_the_reading_one_cannot_write() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.db");
        let mut writing = Sqlite::open(&path).unwrap();
        let pragma = |name| {
            writing
                .inner()
                .pragma_query_value(None, name, |row| row.get::<_, SqliteValue>(0))
                .unwrap()
        };
        assert_eq!(pragma("journal_mode"), SqliteValue::Text("wal".to_owned()));
        assert_eq!(pragma("synchronous"), SqliteValue::Integer(2), "2 is FULL");
        assert_eq!(pragma("foreign_keys"), SqliteValue::Integer(1));
        writing.script("CREATE TABLE t (n)").unwrap();
        let mut reading = Sqlite::open_to_read(&path).unwrap();
        assert!(reading.execute("DELETE FROM t", &[]).is_err());
    }
}
