//! What a batch locks on PostgreSQL before its first command, in one order for every machine.

use std::collections::BTreeSet;

use super::horizon;
use super::sql::{Backend, Connection, Param, SqlError};

/// Rows and names to lock, each kind in its own order.
#[derive(Debug, Default)]
pub struct Locks {
    /// Names without a row yet: idempotency keys, groups.
    names: BTreeSet<String>,
    orders: BTreeSet<String>,
    skus: BTreeSet<String>,
    /// Whether orders may be numbered.
    numbers_orders: bool,
}

impl Locks {
    /// A name that stands for something without a row: `kind` and `name` together.
    pub fn name(&mut self, kind: &str, name: &str) {
        self.names.insert(format!("{kind}:{name}"));
    }

    /// An order, and the stock of its lines.
    pub fn order(&mut self, id: &crate::order::OrderId) {
        self.orders.insert(id.to_string());
    }

    /// The stock of a SKU.
    pub fn sku(&mut self, sku: &crate::catalogue::Sku) {
        self.skus.insert(sku.to_string());
    }

    /// An order may be written: listings stop before its number until it is committed.
    pub fn new_order(&mut self) {
        self.numbers_orders = true;
    }

    /// Takes them: names, then orders, then stock, each sorted. Two transactions that want
    /// the same rows meet at the first one.
    pub(super) fn take(&self, connection: &mut dyn Connection) -> Result<(), SqlError> {
        if connection.backend() == Backend::Sqlite {
            return Ok(());
        }
        // Whoever adds a sink waits for this transaction, and this one for them: so every event
        // is queued for every sink that was there when it was committed.
        connection.write("LOCK TABLE sink IN ROW SHARE MODE", &[])?;
        let list = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join("\n");
        if !self.names.is_empty() {
            connection.write(
                "SELECT pg_advisory_xact_lock(key) FROM
                     (SELECT DISTINCT hashtextextended(name, 0) AS key
                      FROM unnest(string_to_array(?1, E'\\n')) AS name ORDER BY 1) AS keys",
                &[Param::Text(list(&self.names).into())],
            )?;
        }
        if !self.orders.is_empty() {
            connection.write(
                "SELECT 1 FROM orders WHERE id = ANY (string_to_array(?1, E'\\n'))
                 ORDER BY id FOR UPDATE",
                &[Param::Text(list(&self.orders).into())],
            )?;
        }
        if !self.skus.is_empty() || !self.orders.is_empty() {
            connection.write(
                "SELECT 1 FROM stock
                 WHERE sku = ANY (string_to_array(?1, E'\\n'))
                    OR sku IN (SELECT sku FROM order_line
                               WHERE order_id = ANY (string_to_array(?2, E'\\n')))
                 ORDER BY sku FOR NO KEY UPDATE",
                &[
                    Param::Text(list(&self.skus).into()),
                    Param::Text(list(&self.orders).into()),
                ],
            )?;
        }
        if self.numbers_orders {
            horizon::hold(connection)?;
        }
        Ok(())
    }
}
