//! SQL as both databases understand it, and the one definition a row, its JSON and its
//! OpenAPI schema come from.
//!
//! Commands are written once, against [`Connection`]. Statements use `?1`, `?2`, … or plain
//! `?`; PostgreSQL's `$1` is made from them. Three types cross the border: 64-bit integers,
//! text, bytes.

mod field;
mod record;

use std::borrow::Cow;
use std::fmt::Write as _;

use uuid::Uuid;

pub use field::Field;
pub use record::{Record, Statements};

/// A value on its way into a statement.
#[derive(Clone, Debug)]
pub enum Param<'a> {
    /// NULL
    Null,
    /// A 64-bit integer
    Integer(i64),
    /// Text
    Text(Cow<'a, str>),
    /// A UUID, stored as its hyphenated text: a person with a shell can find it.
    Uuid(Uuid),
    /// Bytes
    Blob(Cow<'a, [u8]>),
}

impl Param<'_> {
    /// The same value without borrowed parts.
    #[must_use]
    pub fn into_owned(self) -> Param<'static> {
        match self {
            Self::Null => Param::Null,
            Self::Integer(number) => Param::Integer(number),
            Self::Text(text) => Param::Text(Cow::Owned(text.into_owned())),
            Self::Uuid(uuid) => Param::Uuid(uuid),
            Self::Blob(bytes) => Param::Blob(Cow::Owned(bytes.into_owned())),
        }
    }
}

/// A value out of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// NULL
    Null,
    /// A 64-bit integer
    Integer(i64),
    /// Text
    Text(String),
    /// Bytes
    Blob(Vec<u8>),
}

/// A row of a result, read from left to right.
#[derive(Debug)]
pub struct Row {
    values: std::vec::IntoIter<Value>,
}

impl Row {
    pub(super) fn new(values: Vec<Value>) -> Self {
        Self {
            values: values.into_iter(),
        }
    }

    /// The next field.
    ///
    /// # Errors
    /// [`SqlError::Column`] when the columns do not hold a `T`.
    pub fn take<T: Field>(&mut self) -> Result<T, SqlError> {
        T::load(self)
    }

    fn value(&mut self) -> Value {
        self.values.next().unwrap_or(Value::Null)
    }
}

/// What a database said no to.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// SQLite refused a statement.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL refused a statement, or is gone.
    #[error("PostgreSQL: {}", describe(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// The columns do not hold what the program expects.
    #[error("a column does not hold {0}")]
    Column(&'static str),
    /// A thread or a runtime could not be started.
    #[error("a storage thread: {0}")]
    Io(#[from] std::io::Error),
}

impl SqlError {
    /// Whether the same transaction may succeed when run again: PostgreSQL chose it as the
    /// victim of a deadlock or of a serialisation conflict.
    #[must_use]
    pub fn is_worth_repeating(&self) -> bool {
        match self {
            Self::Postgres(error) => error
                .code()
                .is_some_and(|code| matches!(code.code(), "40P01" | "40001")),
            _ => false,
        }
    }
}

/// The server's message; the error's own text is only "db error".
fn describe(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || format!("{error}"),
        |server| format!("{} ({})", server.message(), server.code().code()),
    )
}

/// Which database is behind a connection. For the few statements they do not share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// One file, one writer.
    Sqlite,
    /// A server that several machines share.
    Postgres,
}

/// A connection to either database.
pub trait Connection: Send {
    /// Which one.
    fn backend(&self) -> Backend;

    /// Runs a statement and returns its rows.
    ///
    /// # Errors
    /// [`SqlError`]
    fn query(&mut self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, SqlError>;

    /// Runs a statement and returns how many rows it changed.
    ///
    /// # Errors
    /// [`SqlError`]
    fn execute(&mut self, sql: &str, params: &[Param<'_>]) -> Result<u64, SqlError>;

    /// Runs a statement whose success the caller does not need to know before the commit.
    /// PostgreSQL gets it without a round trip of its own; a failure fails the commit.
    ///
    /// # Errors
    /// [`SqlError`]
    fn write(&mut self, sql: &str, params: &[Param<'_>]) -> Result<(), SqlError> {
        self.execute(sql, params).map(drop)
    }

    /// Runs several statements without parameters.
    ///
    /// # Errors
    /// [`SqlError`]
    fn script(&mut self, sql: &str) -> Result<(), SqlError>;

    /// Begins a transaction that writes.
    ///
    /// # Errors
    /// [`SqlError`]
    fn begin(&mut self) -> Result<(), SqlError>;

    /// Begins a transaction that reads one snapshot.
    ///
    /// # Errors
    /// [`SqlError`]
    fn begin_snapshot(&mut self) -> Result<(), SqlError>;

    /// Commits. What was written is on the disk when this returns.
    ///
    /// # Errors
    /// [`SqlError`]; whether it was committed is then unknown if the connection was lost.
    fn commit(&mut self) -> Result<(), SqlError>;

    /// Takes everything since `begin` back. Without a transaction it does nothing.
    ///
    /// # Errors
    /// [`SqlError`]
    fn rollback(&mut self) -> Result<(), SqlError>;

    /// Makes a lost connection anew, where that is possible.
    ///
    /// # Errors
    /// [`SqlError`] when the server cannot be reached.
    fn recover(&mut self) -> Result<(), SqlError> {
        Ok(())
    }

    /// Work of its own between two transactions, when nobody waits for an answer.
    ///
    /// # Errors
    /// [`SqlError`]; what was committed stays so.
    fn maintain(&mut self) -> Result<(), SqlError> {
        Ok(())
    }

    /// Orderly end: moves logs where they belong.
    ///
    /// # Errors
    /// [`SqlError`]
    fn close(&mut self) -> Result<(), SqlError> {
        Ok(())
    }
}

/// Replaces `?1` and `?` by `$1` and so on. There is no `?` in a literal of ours.
pub(super) fn for_postgres(sql: &str) -> String {
    let mut out = String::with_capacity(sql.len().saturating_add(16));
    let mut next = 1_u32;
    let mut characters = sql.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '?' {
            out.push(character);
            continue;
        }
        out.push('$');
        let mut numbered = false;
        while let Some(digit) = characters.next_if(char::is_ascii_digit) {
            out.push(digit);
            numbered = true;
        }
        if !numbered {
            let _ = write!(out, "{next}");
            next = next.saturating_add(1);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_numbered_for_postgres() {
        assert_eq!(for_postgres("a = ?2 AND b = ?1"), "a = $2 AND b = $1");
        assert_eq!(for_postgres("VALUES (?, ?)"), "VALUES ($1, $2)");
    }
}
