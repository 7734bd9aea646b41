//! SQL as both databases understand it, and the one definition a row, its JSON and its
//! OpenAPI schema come from.
//!
//! Commands are written once, against [`Connection`]. Statements use `?1`, `?2`, … or plain
//! `?`; PostgreSQL's `$1` is made from them. Three types cross the border: 64-bit integers,
//! text, bytes.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::OnceLock;

use uuid::Uuid;

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

/// Something that fills a fixed number of columns.
pub trait Field: Sized {
    /// Appends one parameter per column.
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>);
    /// Reads its columns.
    ///
    /// # Errors
    /// [`SqlError::Column`] when they hold something else.
    fn load(row: &mut Row) -> Result<Self, SqlError>;
}

impl Field for i64 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(*self));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Integer(number) => Ok(number),
            _ => Err(SqlError::Column("an integer")),
        }
    }
}

impl Field for u32 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_from(i64::load(row)?).map_err(|_| SqlError::Column("a 32-bit count"))
    }
}

impl Field for u16 {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_from(i64::load(row)?).map_err(|_| SqlError::Column("a 16-bit count"))
    }
}

impl Field for bool {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Integer(i64::from(*self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Ok(i64::load(row)? != 0)
    }
}

impl Field for String {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Text(Cow::Borrowed(self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Text(text) => Ok(text),
            _ => Err(SqlError::Column("text")),
        }
    }
}

impl Field for Vec<u8> {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Blob(Cow::Borrowed(self)));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        match row.value() {
            Value::Blob(bytes) => Ok(bytes),
            _ => Err(SqlError::Column("bytes")),
        }
    }
}

impl Field for Uuid {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        params.push(Param::Uuid(*self));
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        Self::try_parse(&String::load(row)?).map_err(|_| SqlError::Column("a UUID"))
    }
}

/// One column; NULL is `None`.
impl<T: Field> Field for Option<T> {
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>) {
        match self {
            Some(field) => field.store(params),
            None => params.push(Param::Null),
        }
    }
    fn load(row: &mut Row) -> Result<Self, SqlError> {
        if row.values.as_slice().first().unwrap_or(&Value::Null) == &Value::Null {
            row.value();
            return Ok(None);
        }
        T::load(row).map(Some)
    }
}

/// A struct that is a row; made by [`row!`](crate::row).
pub trait Record: Sized {
    /// The table.
    const TABLE: &'static str;
    /// The columns of each field. A column may serve two fields: the currency of two amounts.
    const COLUMNS: &'static [&'static [&'static str]];
    /// Appends one parameter per column of [`Record::COLUMNS`].
    fn store<'a>(&'a self, params: &mut Vec<Param<'a>>);
    /// Reads the columns in their order.
    ///
    /// # Errors
    /// [`SqlError::Column`]
    fn load(row: &mut Row) -> Result<Self, SqlError>;
    /// The statements made from the definition, once.
    fn statements() -> &'static Statements;

    /// Inserts the row.
    ///
    /// # Errors
    /// [`SqlError`]
    fn insert(&self, connection: &mut dyn Connection) -> Result<(), SqlError> {
        let statements = Self::statements();
        let mut params = Vec::with_capacity(statements.keep.len());
        self.store(&mut params);
        let mut keep = statements.keep.iter();
        params.retain(|_| keep.next().copied().unwrap_or(true));
        connection.write(&statements.insert, &params)
    }

    /// The rows that `rest` (a WHERE clause and what follows) selects.
    ///
    /// # Errors
    /// [`SqlError`]
    fn select(
        connection: &mut dyn Connection,
        rest: &str,
        params: &[Param<'_>],
    ) -> Result<Vec<Self>, SqlError> {
        let sql = format!("{} {rest}", Self::statements().select);
        let rows = connection.query(&sql, params)?;
        rows.into_iter()
            .map(|mut row| Self::load(&mut row))
            .collect()
    }
}

/// SQL made from a [`Record`].
#[derive(Debug)]
pub struct Statements {
    /// `INSERT INTO … VALUES (…)`
    insert: String,
    /// `SELECT … FROM …`
    select: String,
    /// Which of the stored parameters the insert takes: not a column named before.
    keep: Vec<bool>,
}

impl Statements {
    /// Builds them.
    #[must_use]
    pub fn of<R: Record>() -> Self {
        let all: Vec<&str> = R::COLUMNS.iter().copied().flatten().copied().collect();
        let keep: Vec<bool> = (0..all.len())
            .map(|n| {
                !all.iter()
                    .take(n)
                    .any(|earlier| Some(earlier) == all.get(n))
            })
            .collect();
        let once: Vec<&str> = all
            .iter()
            .zip(&keep)
            .filter_map(|(column, keep)| keep.then_some(*column))
            .collect();
        let marks = vec!["?"; once.len()].join(", ");
        Self {
            insert: format!(
                "INSERT INTO {} ({}) VALUES ({marks})",
                R::TABLE,
                once.join(", ")
            ),
            select: format!("SELECT {} FROM {}", all.join(", "), R::TABLE),
            keep,
        }
    }

    /// The columns of a record, for a query that names its table `alias`.
    #[must_use]
    pub fn columns<R: Record>(alias: &str) -> String {
        let columns = R::COLUMNS.iter().copied().flatten();
        let columns: Vec<String> = columns.map(|name| format!("{alias}.{name}")).collect();
        columns.join(", ")
    }

    /// Builds them at first use.
    pub fn cached<R: Record>(cell: &'static OnceLock<Self>) -> &'static Self {
        cell.get_or_init(Self::of::<R>)
    }
}

/// Defines a struct that is a database row, a JSON document and an OpenAPI schema at once.
///
/// Each field names its columns; none for what other tables hold. `#[serde(skip)]` keeps a
/// column out of the JSON and of the schema.
#[macro_export]
macro_rules! row {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident in $table:literal {
            $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $kind:ty [$($column:literal),*],)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
        $vis struct $name {
            $($(#[$field_meta])* $field_vis $field: $kind,)*
        }

        impl $crate::store::sql::Record for $name {
            const TABLE: &'static str = $table;
            const COLUMNS: &'static [&'static [&'static str]] = &[$(&[$($column),*]),*];

            fn store<'a>(&'a self, params: &mut Vec<$crate::store::sql::Param<'a>>) {
                $($crate::store::sql::Field::store(&self.$field, params);)*
            }

            fn load(
                row: &mut $crate::store::sql::Row,
            ) -> Result<Self, $crate::store::sql::SqlError> {
                Ok(Self { $($field: $crate::store::sql::Field::load(row)?,)* })
            }

            fn statements() -> &'static $crate::store::sql::Statements {
                static STATEMENTS: std::sync::OnceLock<$crate::store::sql::Statements> =
                    std::sync::OnceLock::new();
                $crate::store::sql::Statements::cached::<Self>(&STATEMENTS)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    row! {
        /// Two amounts of one currency.
        struct Sale in "sale" {
            /// Name.
            name: String ["name"],
            /// First.
            first: i64 ["amount"],
            /// The same column again.
            second: i64 ["amount"],
        }
    }

    #[test]
    fn statements_come_from_the_definition() {
        let statements = Sale::statements();
        assert_eq!(
            statements.insert,
            "INSERT INTO sale (name, amount) VALUES (?, ?)"
        );
        assert_eq!(statements.select, "SELECT name, amount, amount FROM sale");
        assert_eq!(statements.keep, [true, true, false]);
    }

    #[test]
    fn placeholders_are_numbered_for_postgres() {
        assert_eq!(for_postgres("a = ?2 AND b = ?1"), "a = $2 AND b = $1");
        assert_eq!(for_postgres("VALUES (?, ?)"), "VALUES ($1, $2)");
    }
}
