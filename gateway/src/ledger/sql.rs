//! What the ledger needs of a database: statements in transactions, over three kinds of value.
//!
//! The dialect is the part SQLite and PostgreSQL agree on, so that both run the same statements
//! and the same tests. Parameters are written `?1`, `?2`, …; all numbers are 64 bits wide.
//! Tests put failures between the ledger and the database by implementing [`Database`] around one.

use std::fmt;

/// A value on its way to or from a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Int(i64),
    Text(String),
    Blob(Vec<u8>),
    Null,
}

macro_rules! value_from {
    ($($type:ty => |$value:ident| $made:expr),+ $(,)?) => {$(
        impl From<$type> for Value {
            fn from($value: $type) -> Self { $made }
        }
    )+};
}
value_from! {
    i64 => |value| Self::Int(value),
    u32 => |value| Self::Int(value.into()),
    &str => |value| Self::Text(value.to_owned()),
    String => |value| Self::Text(value),
    &String => |value| Self::Text(value.clone()),
    Vec<u8> => |value| Self::Blob(value),
    Option<i64> => |value| value.map_or(Self::Null, Self::Int),
}

/// `values![1, "a"]`: parameters of a statement.
macro_rules! values {
    ($($value:expr),* $(,)?) => { &[$($crate::ledger::sql::Value::from($value)),*] };
}
pub(crate) use values;

/// One row of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row(pub(crate) Vec<Value>);

impl Row {
    pub(crate) fn int(&self, column: usize) -> Result<i64, SqlError> {
        match self.0.get(column) {
            Some(Value::Int(value)) => Ok(*value),
            other => Err(SqlError::unexpected(column, "a number", other)),
        }
    }

    /// A sum over no rows is null: 0.
    pub(crate) fn sum(&self, column: usize) -> Result<i64, SqlError> {
        match self.0.get(column) {
            Some(Value::Null) => Ok(0),
            _ => self.int(column),
        }
    }

    pub(crate) fn optional(&self, column: usize) -> Result<Option<i64>, SqlError> {
        match self.0.get(column) {
            Some(Value::Null) => Ok(None),
            _ => self.int(column).map(Some),
        }
    }

    pub(crate) fn small(&self, column: usize) -> Result<u32, SqlError> {
        let value = self.int(column)?;
        u32::try_from(value).map_err(|_| {
            SqlError::unexpected(column, "a number of 32 bits", Some(&Value::Int(value)))
        })
    }

    pub(crate) fn text(&self, column: usize) -> Result<&str, SqlError> {
        match self.0.get(column) {
            Some(Value::Text(value)) => Ok(value),
            other => Err(SqlError::unexpected(column, "text", other)),
        }
    }

    pub(crate) fn blob(&self, column: usize) -> Result<&[u8], SqlError> {
        match self.0.get(column) {
            Some(Value::Blob(value)) => Ok(value),
            other => Err(SqlError::unexpected(column, "bytes", other)),
        }
    }
}

/// Whose fault it is and whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No space left: make some.
    Full,
    /// The disk or file is read-only, or not ours to write.
    ReadOnly,
    /// The file is damaged: check and restore.
    Damaged,
    /// The server or disk cannot be reached now.
    Unavailable,
    /// The commit was sent and no answer came: it may have happened.
    Uncertain,
    /// The rows are not what the caller had read: another process has written.
    Stale,
    /// Anything else.
    Other,
}

/// A statement or transaction that did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SqlError {
    pub(crate) fault: Fault,
    pub(crate) what: String,
}

impl SqlError {
    pub(crate) fn new(fault: Fault, what: impl Into<String>) -> Self {
        Self {
            fault,
            what: what.into(),
        }
    }

    fn unexpected(column: usize, wanted: &str, found: Option<&Value>) -> Self {
        Self::new(
            Fault::Damaged,
            format!("column {column} holds {found:?}, not {wanted}"),
        )
    }
}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Statements of the transaction under way.
pub(crate) trait Statements {
    /// Changes rows; the number of rows changed.
    fn execute(&mut self, sql: &str, values: &[Value]) -> Result<u64, SqlError>;
    /// All rows of an answer.
    fn query(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Row>, SqlError>;
}

impl dyn Statements + '_ {
    /// The answer's only row, or none.
    pub(crate) fn one(&mut self, sql: &str, values: &[Value]) -> Result<Option<Row>, SqlError> {
        Ok(self.query(sql, values)?.into_iter().next())
    }
}

/// What a transaction may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads one consistent state.
    Read,
    /// Reads and writes.
    Write,
}

/// Which database it is: the tables are the same, the words for types are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

/// Work inside a transaction.
pub(crate) type Work<'w> =
    &'w mut (dyn FnMut(&mut dyn Statements) -> Result<(), SqlError> + Send + 'w);

/// A connection.
pub(crate) trait Database: Send {
    fn dialect(&self) -> Dialect;

    /// Runs `work` once, in one transaction: committed when it returns `Ok`, else nothing of it
    /// has happened. [`Fault::Uncertain`] when the commit may have happened all the same.
    fn transaction(&mut self, access: Access, work: Work<'_>) -> Result<(), SqlError>;

    /// From now on this connection, and whatever replaces it, is the only one that posts for
    /// `gateway`. Fails with [`Fault::Stale`] when another one is.
    fn take(&mut self, gateway: i64) -> Result<(), SqlError>;

    /// From now on another one may.
    fn give_up(&mut self) -> Result<(), SqlError>;
}

impl dyn Database + '_ {
    /// [`Database::transaction`] with a result.
    pub(crate) fn run<T: Send>(
        &mut self,
        access: Access,
        mut work: impl FnMut(&mut dyn Statements) -> Result<T, SqlError> + Send,
    ) -> Result<T, SqlError> {
        let mut made = None;
        self.transaction(access, &mut |statements| {
            made = Some(work(statements)?);
            Ok(())
        })?;
        made.ok_or_else(|| SqlError::new(Fault::Other, "the transaction did not run"))
    }
}
