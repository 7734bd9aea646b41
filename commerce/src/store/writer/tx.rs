//! A command's view of its transaction.

use crate::store::StoreError;
use crate::store::sql::{Connection, Param, Record, Row, SqlError};

/// A command's view of the transaction.
pub struct Tx<'c> {
    pub(super) connection: &'c mut dyn Connection,
    /// Milliseconds since the Unix epoch; the same for the whole command.
    pub now_ms: i64,
    pub(super) effects: &'c mut Effects,
    pub(super) buffer: &'c mut Vec<u8>,
}

/// What a committed batch means to the rest of the process.
#[derive(Default)]
pub(super) struct Effects {
    pub(super) deadline_ms: Option<i64>,
    pub(super) events: u64,
}

impl Tx<'_> {
    /// The rows of a statement.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn query(&mut self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>, SqlError> {
        self.connection.query(sql, params)
    }

    /// How many rows a statement changed.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn execute(&mut self, sql: &str, params: &[Param<'_>]) -> Result<u64, SqlError> {
        self.connection.execute(sql, params)
    }

    /// A statement whose success shows at the commit.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn write(&mut self, sql: &str, params: &[Param<'_>]) -> Result<(), SqlError> {
        self.connection.write(sql, params)
    }

    /// Inserts a row.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn insert(&mut self, record: &impl Record) -> Result<(), SqlError> {
        record.insert(self.connection)
    }

    /// Rows that `rest` selects.
    ///
    /// # Errors
    /// [`SqlError`]
    pub fn select<R: Record>(
        &mut self,
        rest: &str,
        params: &[Param<'_>],
    ) -> Result<Vec<R>, SqlError> {
        R::select(self.connection, rest, params)
    }

    /// A value as JSON. The writer's buffer has grown to the size of what it renders, so this
    /// is one allocation, however large the value.
    ///
    /// # Errors
    /// [`StoreError::Render`]
    pub fn json(&mut self, value: &impl serde::Serialize) -> Result<String, StoreError> {
        // What the last request left must not show in this one's.
        if !crate::mutant::Mutant::PooledBuffer.is_on() {
            self.buffer.clear();
        }
        serde_json::to_writer(&mut *self.buffer, value)?;
        let json = std::str::from_utf8(self.buffer);
        Ok(json
            .map_err(|_| StoreError::Inconsistent("JSON is UTF-8"))?
            .to_owned())
    }

    /// The connection, for functions that reads and commands share.
    pub fn connection(&mut self) -> &mut dyn Connection {
        self.connection
    }

    /// Something is due then: the writer wakes for it.
    pub fn wake_at(&mut self, deadline_ms: i64) {
        let earliest = self
            .effects
            .deadline_ms
            .map_or(deadline_ms, |known| known.min(deadline_ms));
        self.effects.deadline_ms = Some(earliest);
    }

    /// An event was written: the relays look once it is committed.
    pub(crate) fn wrote_event(&mut self) {
        self.effects.events = self.effects.events.saturating_add(1);
    }
}
