//! Stock: units are available, reserved or sold; every move is a row of the stock ledger.
//!
//! `initial = available + reserved + sold` holds in every row at every moment: the table
//! checks it, and a move's deltas sum to zero by construction.

use super::Tx;
use crate::catalogue::Sku;
use crate::order::OrderId;
use crate::store::StoreError;
use crate::store::sql::Param;

/// Why units move, and from where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// An order was placed: available → reserved.
    Reserve,
    /// It was paid: reserved → sold.
    Sell,
    /// It was cancelled: reserved → available.
    Cancel,
    /// Its deadline came: reserved → available.
    Expire,
    /// It was returned: sold → available.
    Restock,
}

impl Move {
    /// The ledger's word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Sell => "sell",
            Self::Cancel => "cancel",
            Self::Expire => "expire",
            Self::Restock => "restock",
        }
    }

    /// Signs of the change: available, reserved, sold.
    const fn signs(self) -> (i64, i64, i64) {
        match self {
            Self::Reserve => (-1, 1, 0),
            Self::Sell => (0, -1, 1),
            Self::Cancel | Self::Expire => (1, -1, 0),
            Self::Restock => (1, 0, -1),
        }
    }
}

/// Moves units of one SKU for an order. `false` when there are not enough where they come
/// from; nothing was written then.
///
/// # Errors
/// [`StoreError`]
pub fn shift(
    tx: &mut Tx<'_>,
    reason: Move,
    order_id: OrderId,
    sku: &Sku,
    quantity: u32,
) -> Result<bool, StoreError> {
    let (available, reserved, sold) = reason.signs();
    let units = i64::from(quantity);
    // At most 32 bits times a sign.
    let delta = |sign: i64| Param::Integer(units.saturating_mul(sign));
    let sku = || Param::Text(sku.as_str().into());
    // The condition is the guard against overselling, whoever else is writing.
    let changed = tx.execute(
        "UPDATE stock SET available = available + ?2, reserved = reserved + ?3, sold = sold + ?4
         WHERE sku = ?1 AND available + ?2 >= 0 AND reserved + ?3 >= 0 AND sold + ?4 >= 0",
        &[sku(), delta(available), delta(reserved), delta(sold)],
    )?;
    if changed == 0 {
        return Ok(false);
    }
    let now_ms = tx.now_ms;
    tx.write(
        "INSERT INTO stock_movement (sku, reason, order_id, available, reserved, sold, at_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        &[
            sku(),
            Param::Text(reason.as_str().into()),
            order_id.param(),
            delta(available),
            delta(reserved),
            delta(sold),
            Param::Integer(now_ms),
        ],
    )?;
    Ok(true)
}
