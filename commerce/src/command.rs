//! Commands: everything that changes the database. Each one is a [`Command`] or, when a
//! client asked for it with an idempotency key, an [`Effect`] inside a [`Keyed`].
//!
//! They decide first and write then; see [`Command`]. README.md has the recipe for another.

pub mod callback;
pub mod campaign;
pub mod cancel;
pub mod expire;
pub mod forget;
pub mod group;
pub mod keyed;
pub mod member;
pub mod pay;
pub mod place;
pub mod refund;
pub mod stock;

pub use crate::store::{Command, Locks, Tx};
pub use keyed::{Answer, Effect, Keyed, Outcome};

use crate::event::{self, Origin, Topic};
use crate::idempotency::Reply;
use crate::order::{Action, Line, Order, OrderId, Refusal};
use crate::store::StoreError;
use crate::store::sql::{Connection, Param, Record as _, SqlError};

/// What to render. Rendering happens inside the transaction, because the rendered bytes are
/// stored with what they describe.
#[derive(Debug)]
pub enum Verdict<'a> {
    /// A new order as it will be committed, and its JSON.
    Placed(&'a Order, &'a str),
    /// A changed order and its JSON.
    Changed(&'a Order, &'a str),
    /// A payment is under way; the order as it is.
    Accepted(&'a Order, &'a str),
    /// Why nothing happened.
    Refused(&'a Refusal),
}

/// Renders an answer.
pub type Render = fn(&Verdict<'_>) -> Result<Reply, serde_json::Error>;

/// Which version a client wants to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Whatever is there.
    Any,
    /// Only this version.
    Version(i64),
    /// A tag that is no version of ours: never.
    Nothing,
}

/// An order with its lines; of `principal` only, when one is given. Another's order is not
/// found rather than forbidden: its existence is nobody's business.
///
/// # Errors
/// [`SqlError`]
pub fn find(
    connection: &mut dyn Connection,
    principal: Option<&str>,
    id: OrderId,
) -> Result<Option<Order>, SqlError> {
    let found = Order::select(connection, "WHERE id = ?1", &[id.param()])?.pop();
    let visible = |order: &Order| principal.is_none_or(|principal| order.principal == principal);
    let Some(mut order) = found.filter(visible) else {
        return Ok(None);
    };
    order.lines = Line::select(
        connection,
        "WHERE order_id = ?1 ORDER BY sku",
        &[id.param()],
    )?;
    Ok(Some(order))
}

/// The order to change, or why it cannot be: not found, another version, or a state that
/// does not allow `action`. A reservation whose deadline has come counts as expired.
///
/// # Errors
/// [`SqlError`]
pub fn find_to_change(
    tx: &mut Tx<'_>,
    principal: &str,
    id: OrderId,
    expected: Expected,
    action: Action,
) -> Result<Result<Order, Refusal>, SqlError> {
    let now_ms = tx.now_ms;
    let Some(order) = find(tx.connection(), Some(principal), id)? else {
        return Ok(Err(Refusal::NotFound));
    };
    let is_current = match expected {
        Expected::Any => true,
        Expected::Version(version) => version == order.version,
        Expected::Nothing => false,
    };
    if !is_current {
        let current = order.version;
        return Ok(Err(Refusal::Stale { current }));
    }
    let status = if order.is_overdue(now_ms) {
        crate::order::Status::Expired
    } else {
        order.status
    };
    if status.after(action).is_none() {
        return Ok(Err(Refusal::State { status, action }));
    }
    Ok(Ok(order))
}

/// Writes the order's next version and its event; returns the order's JSON.
///
/// # Errors
/// [`StoreError::Inconsistent`] if the state machine has no such arrow, or the row is not
/// what was read; nothing is committed then.
pub fn change(
    tx: &mut Tx<'_>,
    order: &mut Order,
    action: Action,
    topic: Topic,
    origin: &Origin,
) -> Result<String, StoreError> {
    let before = order.version;
    order.status = order.status.after(action).ok_or(StoreError::Inconsistent(
        "an order's state has no such arrow",
    ))?;
    order.version = before.saturating_add(1);
    let changed = tx.execute(
        "UPDATE orders SET status = ?1, version = ?2, refunded_minor = ?3
         WHERE id = ?4 AND version = ?5",
        &[
            Param::Text(order.status.as_str().into()),
            Param::Integer(order.version),
            Param::Integer(order.refunded.minor()),
            order.id.param(),
            Param::Integer(before),
        ],
    )?;
    if changed != 1 {
        return Err(StoreError::Inconsistent("an order changed while locked"));
    }
    group::follow(tx, order, action)?;
    let json = tx.json(order)?;
    event::emit(tx, topic, order, origin, json.clone())?;
    Ok(json)
}
