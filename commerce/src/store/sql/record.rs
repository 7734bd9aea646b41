//! A struct that is a row, and the statements made from its definition.

use std::sync::OnceLock;

use super::{Connection, Param, Row, SqlError};

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
}
