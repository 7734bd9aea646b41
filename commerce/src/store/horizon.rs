//! How far a listing of orders may go on PostgreSQL, whose sequence hands out numbers before
//! they commit.
//!
//! A page that ended after number 12 while 11 was still to commit would pass 11 over for good.
//! So a transaction that will number orders first takes a shared lock that names the last number
//! handed out, and a listing ends before the lowest such lock. It is late by the transactions
//! under way, a few milliseconds, and misses nothing. SQLite has one writer: numbers are commits.

use super::sql::{Backend, Connection, Param, SqlError};

/// The class of the advisory locks: any number that no other program uses.
const CLASS: i64 = 0x6f72_6472;

/// Says that numbers after the last one handed out are not committed yet, until this
/// transaction ends. Before the first number is taken.
pub(super) fn hold(connection: &mut dyn Connection) -> Result<(), SqlError> {
    // Locks have 32 bits for it; see `last`.
    connection.write(
        "SELECT pg_advisory_xact_lock_shared(CAST(?1 AS INTEGER),
             CAST(CAST(last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS BIT(32)) AS INTEGER))
         FROM orders_seq_seq",
        &[Param::Integer(CLASS)],
    )
}

/// The last number such that it and all before it are committed, or never will be.
///
/// The order of the three looks is the proof: a number up to `handed_out` had its lock before;
/// if the lock is gone by the second look, it is committed by the third, the listing, whose
/// snapshot must begin after this function.
pub(crate) fn last(connection: &mut dyn Connection) -> Result<i64, SqlError> {
    if connection.backend() == Backend::Sqlite {
        return Ok(i64::MAX);
    }
    let number = |rows: Vec<super::sql::Row>| match rows.into_iter().next() {
        Some(mut row) => row.take::<i64>(),
        None => Ok(0),
    };
    let handed_out = number(connection.query("SELECT last_value FROM orders_seq_seq", &[])?)?;
    // What of the lock's 32 bits is below the last number, is the distance to it.
    number(connection.query(
        "SELECT CAST(coalesce(min(?1 - ((?1 - CAST(objid AS BIGINT)) & 4294967295)), ?1) AS BIGINT)
         FROM pg_locks
         WHERE locktype = 'advisory' AND objsubid = 2 AND CAST(classid AS BIGINT) = ?2
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        &[Param::Integer(handed_out), Param::Integer(CLASS)],
    )?)
}
