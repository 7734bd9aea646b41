//! Placing an order: everything that happens inside its savepoint.
//!
//! key known? ► replay, or refuse another body
//! price      ► refuse unknown SKUs and impossible totals
//! deduct     ► one conditional UPDATE per SKU; a miss undoes those before it
//! record     ► order, lines, ledger movements, outbox event, answer under its key
//!
//! Either all of it commits, or nothing but a remembered refusal.

use rusqlite::{Connection, OptionalExtension as _};
use uuid::Uuid;

use super::StoreError;
use super::writer::Savepoint;
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::metrics::RefusalReason;
use crate::money::Money;
use crate::order::{self, Draft, Line, Order, OrderId, Refusal, Status};

/// A request to place an order.
pub struct PlaceOrder {
    /// Where its key is unique.
    pub scope: Scope,
    /// What body the key stands for.
    pub fingerprint: Fingerprint,
    /// What is asked for.
    pub draft: Draft,
    /// Renders the answer. It runs inside the transaction, because the rendered bytes are
    /// stored with the order they describe.
    pub render: fn(&Verdict<'_>) -> Result<Reply, serde_json::Error>,
}

/// What to render.
pub enum Verdict<'a> {
    /// The order as it will be committed.
    Placed(&'a Order),
    /// Why there is none.
    Refused(&'a Refusal),
}

/// What became of a request.
#[derive(Debug)]
pub enum Placement {
    /// A new order.
    Placed {
        /// The answer.
        reply: Reply,
        /// Its total.
        total: Money,
        /// Units over all lines.
        units: u64,
    },
    /// No order.
    Refused {
        /// The answer.
        reply: Reply,
        /// Why.
        reason: RefusalReason,
    },
    /// The key's first answer, unchanged.
    Replayed(Reply),
    /// The key stands for another body. Nothing was done.
    KeyReused,
}

/// Identity and time of what is about to happen. Made by the writer, so that ids rise in
/// commit order.
pub(super) struct Moment {
    order_id: OrderId,
    event_id: Uuid,
    now_ms: i64,
}

impl Moment {
    pub(super) fn new(now_ms: i64) -> Self {
        Self {
            order_id: OrderId::generate(),
            event_id: Uuid::now_v7(),
            now_ms,
        }
    }
}

pub(super) fn place(
    savepoint: &Savepoint<'_>,
    request: &PlaceOrder,
    moment: &Moment,
) -> Result<Placement, StoreError> {
    let connection = savepoint.connection;
    if let Some((fingerprint, reply)) = find_reply(connection, &request.scope)? {
        return Ok(if fingerprint == request.fingerprint {
            Placement::Replayed(reply)
        } else {
            Placement::KeyReused
        });
    }
    let refusal = match price(connection, &request.draft)? {
        Ok((lines, total)) => match deduct(connection, &lines)? {
            Ok(()) => return record(connection, request, moment, lines, total),
            Err(refusal) => {
                savepoint.undo()?;
                refusal
            }
        },
        Err(refusal) => refusal,
    };
    let reply = (request.render)(&Verdict::Refused(&refusal))?;
    if refusal.is_remembered() {
        remember(connection, request, &reply, None, moment.now_ms)?;
    }
    Ok(Placement::Refused {
        reply,
        reason: reason(&refusal),
    })
}

/// The answer already given under this key.
fn find_reply(
    connection: &Connection,
    scope: &Scope,
) -> rusqlite::Result<Option<(Fingerprint, Reply)>> {
    connection
        .prepare_cached(
            "SELECT fingerprint, status, content_type, location, etag, body
             FROM idempotency WHERE principal = ?1 AND route = ?2 AND key = ?3",
        )?
        .query_row((&scope.principal, scope.route, scope.key.as_str()), |row| {
            let reply = Reply {
                status: row.get(1)?,
                content_type: row.get(2)?,
                location: row.get(3)?,
                etag: row.get(4)?,
                body: row.get(5)?,
            };
            Ok((Fingerprint(row.get(0)?), reply))
        })
        .optional()
}

/// The lines with the catalogue's prices, and their total.
fn price(
    connection: &Connection,
    draft: &Draft,
) -> rusqlite::Result<Result<(Vec<Line>, Money), Refusal>> {
    let mut lines = Vec::new();
    let mut find =
        connection.prepare_cached("SELECT price_minor, currency FROM product WHERE sku = ?1")?;
    for (sku, quantity) in draft.lines() {
        let unit_price = find
            .query_row([sku], |row| Ok(Money::new(row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some(unit_price) = unit_price else {
            return Ok(Err(Refusal::UnknownSku(sku.clone())));
        };
        match Line::price(sku.clone(), quantity, unit_price) {
            Ok(line) => lines.push(line),
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(order::total(&lines).map(|total| (lines, total)))
}

/// Takes the stock of every line. After a refusal the caller undoes what was taken.
fn deduct(connection: &Connection, lines: &[Line]) -> rusqlite::Result<Result<(), Refusal>> {
    let mut take = connection.prepare_cached(
        "UPDATE stock SET available = available - ?2 WHERE sku = ?1 AND available >= ?2",
    )?;
    for line in lines {
        if take.execute((&line.sku, line.quantity))? == 0 {
            let (sku, requested) = (line.sku.clone(), line.quantity);
            return Ok(Err(Refusal::InsufficientStock { sku, requested }));
        }
    }
    Ok(Ok(()))
}

/// Writes everything an order consists of.
fn record(
    connection: &Connection,
    request: &PlaceOrder,
    moment: &Moment,
    lines: Vec<Line>,
    total: Money,
) -> Result<Placement, StoreError> {
    let order = Order {
        id: moment.order_id,
        status: Status::Placed,
        version: 1,
        lines,
        total,
        created_at_ms: moment.now_ms,
    };
    // Formatted once: it is written to five tables.
    let id = order.id.to_string();
    connection
        .prepare_cached(
            "INSERT INTO orders (id, principal, status, version, total_minor, currency, created_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute((
            &id,
            &request.scope.principal,
            order.status,
            order.version,
            total.minor(),
            total.currency(),
            order.created_at_ms,
        ))?;
    let mut add_line = connection.prepare_cached(
        "INSERT INTO order_line (order_id, sku, quantity, unit_price_minor, total_minor)
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )?;
    let mut add_movement = connection.prepare_cached(
        "INSERT INTO stock_movement (sku, delta, reason, order_id, at_ms)
         VALUES (?1, -?2, 'sale', ?3, ?4)",
    )?;
    for line in &order.lines {
        let Line {
            sku,
            quantity,
            unit_price,
            total,
        } = line;
        add_line.execute((&id, sku, quantity, unit_price.minor(), total.minor()))?;
        add_movement.execute((sku, quantity, &id, moment.now_ms))?;
    }
    connection
        .prepare_cached(
            "INSERT INTO outbox (event_id, topic, order_id, payload, at_ms)
             VALUES (?1, 'order.placed', ?2, ?3, ?4)",
        )?
        .execute((
            moment.event_id.hyphenated().to_string(),
            &id,
            serde_json::to_string(&order)?,
            moment.now_ms,
        ))?;
    let reply = (request.render)(&Verdict::Placed(&order))?;
    remember(connection, request, &reply, Some(&id), moment.now_ms)?;
    let units = order
        .lines
        .iter()
        .map(|line| u64::from(line.quantity))
        .sum();
    Ok(Placement::Placed {
        reply,
        total,
        units,
    })
}

/// Stores the answer under its key.
fn remember(
    connection: &Connection,
    request: &PlaceOrder,
    reply: &Reply,
    order_id: Option<&str>,
    now_ms: i64,
) -> rusqlite::Result<()> {
    let PlaceOrder {
        scope, fingerprint, ..
    } = request;
    connection
        .prepare_cached(
            "INSERT INTO idempotency (principal, route, key, fingerprint,
                 status, content_type, location, etag, body, order_id, at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?
        .execute((
            &scope.principal,
            scope.route,
            scope.key.as_str(),
            fingerprint.0,
            reply.status,
            &reply.content_type,
            &reply.location,
            &reply.etag,
            &reply.body,
            order_id,
            now_ms,
        ))?;
    Ok(())
}

fn reason(refusal: &Refusal) -> RefusalReason {
    match refusal {
        Refusal::UnknownSku(_) => RefusalReason::UnknownSku,
        Refusal::InsufficientStock { .. } => RefusalReason::InsufficientStock,
        Refusal::Total(_) => RefusalReason::Total,
    }
}
