//! The embedded backend: one file, one connection, WAL, `synchronous = FULL`.

use std::path::{Path, PathBuf};

use rusqlite::{
    Connection, ErrorCode, TransactionBehavior, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};

use super::sql::{Access, Database, Dialect, Fault, Row, SqlError, Statements, Value, Work};

/// A file.
pub(super) struct Sqlite {
    connection: Connection,
    path: PathBuf,
}

impl Sqlite {
    /// Opens the file, makes it when there is none, and looks for damage.
    pub(super) fn open(path: &Path) -> Result<Self, SqlError> {
        let connection = Connection::open(path).map_err(|error| refused(&error))?;
        // FULL: an acknowledged posting survives power loss.
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000;",
            )
            .map_err(|error| refused(&error))?;
        Self::checked(connection, path)
    }

    /// One that is gone with the process.
    pub(super) fn in_memory() -> Result<Self, SqlError> {
        let connection = Connection::open_in_memory().map_err(|error| refused(&error))?;
        Self::checked(connection, Path::new(":memory:"))
    }

    fn checked(connection: Connection, path: &Path) -> Result<Self, SqlError> {
        let verdict: String = connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|error| refused(&error))?;
        if verdict != "ok" {
            return Err(SqlError::new(Fault::Damaged, verdict));
        }
        Ok(Self {
            connection,
            path: path.to_owned(),
        })
    }
}

impl Database for Sqlite {
    fn dialect(&self) -> Dialect {
        Dialect::Sqlite
    }

    fn transaction(&mut self, access: Access, work: Work<'_>) -> Result<(), SqlError> {
        let behavior = match access {
            Access::Read => TransactionBehavior::Deferred,
            // At once: a transaction that begins by reading could not become a writer later.
            Access::Write => TransactionBehavior::Immediate,
        };
        let transaction = self
            .connection
            .transaction_with_behavior(behavior)
            .map_err(|error| refused(&error))?;
        work(&mut Running(&transaction))?;
        // A commit that fails is rolled back, or by the next process from the journal; which of
        // the two a disk error leaves is not known.
        transaction.commit().map_err(|error| {
            let mut error = refused(&error);
            if !matches!(error.fault, Fault::Full | Fault::ReadOnly) {
                error.fault = Fault::Uncertain;
            }
            error
        })
    }

    fn take(&mut self, _gateway: i64) -> Result<(), SqlError> {
        // The state directory's lock does it; a file has one gateway.
        let _ = &self.path;
        Ok(())
    }

    fn give_up(&mut self) -> Result<(), SqlError> {
        Ok(())
    }
}

struct Running<'c>(&'c Connection);

impl Statements for Running<'_> {
    fn execute(&mut self, sql: &str, values: &[Value]) -> Result<u64, SqlError> {
        if values.is_empty() {
            // Also several statements at once: the tables.
            self.0.execute_batch(sql).map_err(|error| refused(&error))?;
            return Ok(self.0.changes());
        }
        let mut statement = self.0.prepare_cached(sql).map_err(|e| refused(&e))?;
        statement
            .execute(params_from_iter(values))
            .map(|rows| rows as u64)
            .map_err(|error| refused(&error))
    }

    fn query(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Row>, SqlError> {
        let mut statement = self.0.prepare_cached(sql).map_err(|e| refused(&e))?;
        let columns = statement.column_count();
        let mut rows = statement
            .query(params_from_iter(values))
            .map_err(|error| refused(&error))?;
        let mut answer = Vec::new();
        while let Some(row) = rows.next().map_err(|error| refused(&error))? {
            let read = (0..columns).map(|column| {
                let value = row.get_ref(column).map_err(|error| refused(&error))?;
                match value {
                    ValueRef::Null => Ok(Value::Null),
                    ValueRef::Integer(value) => Ok(Value::Int(value)),
                    ValueRef::Text(text) => {
                        Ok(Value::Text(String::from_utf8_lossy(text).into_owned()))
                    }
                    ValueRef::Blob(bytes) => Ok(Value::Blob(bytes.to_vec())),
                    ValueRef::Real(_) => Err(SqlError::new(
                        Fault::Damaged,
                        format!("column {column} holds a fraction"),
                    )),
                }
            });
            answer.push(Row(read.collect::<Result<_, _>>()?));
        }
        Ok(answer)
    }
}

impl rusqlite::ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Int(value) => ValueRef::Integer(*value),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(bytes) => ValueRef::Blob(bytes),
            Self::Null => ValueRef::Null,
        }))
    }
}

/// Sorts SQLite's errors by what can be done about them.
fn refused(error: &rusqlite::Error) -> SqlError {
    let fault = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Fault::Full,
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Fault::ReadOnly,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Fault::Damaged,
        Some(
            ErrorCode::CannotOpen
            | ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::SystemIoFailure,
        ) => Fault::Unavailable,
        _ => Fault::Other,
    };
    SqlError::new(fault, error.to_string())
}
