//! The schema, as the list of steps that lead to it. Both databases take the same steps.
//!
//! SQLite counts the steps a file has taken in `PRAGMA user_version`, PostgreSQL in a table.
//! A released step never changes: add another one.

use super::StoreError;
use super::sql::{Backend, Connection, Param, SqlError};

/// Step `n` brings a database from version `n` to `n + 1`. Written for SQLite; see
/// [`for_postgres`].
///
/// Closed vocabularies (status, reason) are not `CHECK`ed: SQLite cannot alter a check
/// without rewriting the table. The types that read them refuse what they do not know.
const STEPS: &[&str] = &[
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
];

/// The version this program writes and audits.
pub(crate) const VERSION: u32 = 3;
const _: () = assert!(STEPS.len() == VERSION as usize, "one version per step");

/// Any number that no other program locks: two processes may start at once.
const MIGRATION_LOCK: i64 = 0x6564_6765_6d74;

/// Takes the steps the database has not taken, each in a transaction of its own.
///
/// # Errors
/// [`StoreError::SchemaTooNew`] leaves the database untouched.
pub(super) fn migrate(connection: &mut dyn Connection) -> Result<(), StoreError> {
    loop {
        connection.begin()?;
        let more = step(connection);
        match more {
            Ok(more) => {
                connection.commit()?;
                if !more {
                    return Ok(());
                }
            }
            Err(error) => {
                connection.rollback()?;
                return Err(error);
            }
        }
    }
}

fn step(connection: &mut dyn Connection) -> Result<bool, StoreError> {
    let backend = connection.backend();
    if backend == Backend::Postgres {
        connection.query(
            "SELECT CAST(pg_advisory_xact_lock(?1) AS TEXT)",
            &[Param::Integer(MIGRATION_LOCK)],
        )?;
        connection.script("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")?;
    }
    let found = version(connection)?;
    if found > VERSION {
        return Err(StoreError::SchemaTooNew {
            found,
            known: VERSION,
        });
    }
    let taken = usize::try_from(found).unwrap_or(usize::MAX);
    let Some(step) = STEPS.get(taken) else {
        return Ok(false);
    };
    let next = found.saturating_add(1);
    match backend {
        Backend::Sqlite => {
            connection.script(step)?;
            connection.script(&format!("PRAGMA user_version = {next}"))?;
        }
        Backend::Postgres => {
            connection.script(&for_postgres(step))?;
            connection.script(&format!(
                "DELETE FROM schema_version; INSERT INTO schema_version VALUES ({next})"
            ))?;
        }
    }
    Ok(true)
}

/// How many steps the database has taken.
///
/// # Errors
/// Whatever the database reports, a file that is no database first of all.
pub(crate) fn version(connection: &mut dyn Connection) -> Result<u32, SqlError> {
    let sql = match connection.backend() {
        Backend::Sqlite => "PRAGMA user_version",
        Backend::Postgres => "SELECT coalesce(max(version), 0) FROM schema_version",
    };
    let mut rows = connection.query(sql, &[])?;
    rows.pop().map_or(Ok(0), |mut row| row.take())
}

/// The same tables in PostgreSQL's words.
fn for_postgres(step: &str) -> String {
    step.replace(
        "INTEGER PRIMARY KEY AUTOINCREMENT",
        "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    )
    .replace("INTEGER", "BIGINT")
    .replace("-- PostgreSQL: ", "")
    .replace(" BLOB", " BYTEA")
    .replace(") STRICT, WITHOUT ROWID;", ");")
    .replace(") STRICT;", ");")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::Sqlite;

    #[test]
    fn migration_reaches_the_version_and_is_repeatable() {
        let mut connection = Sqlite::open(":memory:".as_ref()).unwrap();
        migrate(&mut connection).unwrap();
        migrate(&mut connection).unwrap();
        assert_eq!(version(&mut connection).unwrap(), VERSION);
    }

    #[test]
    fn a_newer_file_is_left_alone() {
        let mut connection = Sqlite::open(":memory:".as_ref()).unwrap();
        let newer = VERSION + 1;
        connection
            .script(&format!("PRAGMA user_version = {newer}"))
            .unwrap();
        let error = migrate(&mut connection).unwrap_err();
        assert!(matches!(error, StoreError::SchemaTooNew { .. }), "{error}");
        assert_eq!(version(&mut connection).unwrap(), newer);
    }
}
