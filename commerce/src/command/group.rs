//! What changes groups: opening and joining, and what an order's fate means for its place.
//!
//! Joining writes the order at the group's price and takes the place with one conditional
//! update, in one transaction: whoever comes last finds no row to change.

use std::time::Duration;

use serde::Serialize;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;
use uuid::Uuid;

use super::pay::Provider;
use super::place::{self, Placed};
use super::refund::RefundOrder;
use super::{Command, Effect, Expected, Locks, Outcome, Tx, Verdict};
use crate::event::Origin;
use crate::group::{Counts, Full, Group, Offer, State};
use crate::idempotency::Reply;
use crate::metrics::{Metrics, RefusalReason};
use crate::mutant::Mutant;
use crate::order::{Action, Line, Order, OrderId, Refusal, total};
use crate::store::StoreError;
use crate::store::sql::{Backend, Connection, Param, Record as _, SqlError};
use crate::trace::TraceId;

/// Groups that end in one transaction at most.
const ENDING_MAX: i64 = 16;
/// How long a ticket to watch a group is good, in milliseconds.
pub const TICKET_MS: i64 = 30_000;

/// A group.
///
/// # Errors
/// [`SqlError`]
pub fn find(connection: &mut dyn Connection, id: Uuid) -> Result<Option<Group>, SqlError> {
    Ok(Group::select(connection, "WHERE id = ?1", &[Param::Uuid(id)])?.pop())
}

/// Groups that can be joined, the fullest first.
///
/// # Errors
/// [`SqlError`]
pub fn open_groups(
    connection: &mut dyn Connection,
    offer: &Offer,
    now_ms: i64,
    limit: i64,
) -> Result<Vec<Group>, SqlError> {
    Group::select(
        connection,
        "WHERE sku = ?1 AND size = ?2 AND state = 'forming' AND taken < size AND deadline_ms > ?3
         ORDER BY taken DESC, opened_at_ms, id LIMIT ?4",
        &[
            Param::Text(offer.sku.as_str().into()),
            Param::Integer(i64::from(offer.size)),
            Param::Integer(now_ms),
            Param::Integer(limit),
        ],
    )
}

/// Why somebody has no place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotJoined {
    /// There is no such group of this offer.
    Unknown,
    /// No place is left, or the group is over.
    Full(Full),
    /// They have a place already.
    Member,
    /// There cannot be an order.
    Order(Refusal),
}

/// What an answer is made of.
#[derive(Debug)]
pub enum Joining<'a> {
    /// A place, and its order.
    Joined(&'a Group, &'a Order),
    /// Neither.
    Refused(&'a NotJoined),
}

/// A place in a group: its answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Place<'a> {
    /// The group.
    pub group: &'a Group,
    /// The order to pay; its deadline is the place's.
    pub order: &'a Order,
}

/// A request to join a group, or to open one.
#[derive(Debug)]
pub struct Join {
    /// Who.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// Which offer.
    pub offer: Offer,
    /// Which group; none for the fullest one that is open, or a new one.
    pub group: Option<Uuid>,
    /// What was seen before, where that is what decides.
    pub seen: Option<Counts>,
    /// Renders the answer.
    pub render: fn(&Joining<'_>) -> Result<Reply, serde_json::Error>,
}

impl Effect for Join {
    type Value = Placed;

    fn locks(&self, locks: &mut Locks) {
        let offer = format!("{} {}", self.offer.sku, self.offer.size);
        locks.new_order();
        locks.name("group-offer", &offer);
        locks.sku(&self.offer.sku);
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<Placed>, StoreError> {
        match self.decide(tx)? {
            Ok((group, is_new, line)) => self.record(tx, group, is_new, line),
            Err(why) => {
                let reason = match &why {
                    NotJoined::Order(refusal) => RefusalReason::of(refusal),
                    NotJoined::Unknown | NotJoined::Full(_) | NotJoined::Member => {
                        RefusalReason::Group
                    }
                };
                Ok(Outcome {
                    reply: (self.render)(&Joining::Refused(&why))?,
                    // A place may become free: nothing here is an answer for good.
                    remember: false,
                    created: None,
                    value: Placed::Refused(reason),
                })
            }
        }
    }

    fn committed(&self, value: &Placed, metrics: &Metrics) {
        metrics.group_joined(matches!(value, Placed::Order { .. }));
        value.count(metrics);
    }

    fn failed(&self, metrics: &Metrics) {
        metrics.order_refused(RefusalReason::Storage);
    }
}

type Decided = Result<(Group, bool, Line), NotJoined>;

impl Join {
    /// The group to join, whether it is new, and the line of the order. Writes nothing.
    fn decide(&self, tx: &mut Tx<'_>) -> Result<Decided, StoreError> {
        let now_ms = tx.now_ms;
        let (mut group, is_new) = match self.group {
            Some(id) => match find(tx.connection(), id)? {
                Some(group) if group.sku == self.offer.sku && group.size == self.offer.size => {
                    (group, false)
                }
                _ => return Ok(Err(NotJoined::Unknown)),
            },
            None => match self.fullest(tx)? {
                Some(group) => (group, false),
                None => (Group::open(&self.offer, Uuid::now_v7(), now_ms), true),
            },
        };
        if self.has_place(tx, group.id)? {
            return Ok(Err(NotJoined::Member));
        }
        // The mutant trusts what a reader saw before the command was queued.
        let mut counts = match self.seen {
            Some(seen) if Mutant::CheckThenAct.is_on() => seen,
            _ => group.counts(),
        };
        if let Err(full) = counts.join(now_ms) {
            return Ok(Err(NotJoined::Full(full)));
        }
        (group.taken, group.version) = (group.taken + 1, group.version + 1);
        let (sku, id) = (self.offer.sku.clone(), OrderId::generate());
        if !place::is_available(tx, &sku, 1)? {
            return Ok(Err(NotJoined::Order(Refusal::InsufficientStock {
                sku,
                requested: 1,
            })));
        }
        Ok(Line::price(id, sku, 1, group.unit_price)
            .map(|line| (group, is_new, line))
            .map_err(NotJoined::Order))
    }

    /// The fullest open group in which the principal has no place.
    fn fullest(&self, tx: &mut Tx<'_>) -> Result<Option<Group>, StoreError> {
        let now_ms = tx.now_ms;
        for group in open_groups(tx.connection(), &self.offer, now_ms, 20)? {
            if !self.has_place(tx, group.id)? {
                return Ok(Some(group));
            }
        }
        Ok(None)
    }

    fn has_place(&self, tx: &mut Tx<'_>, group: Uuid) -> Result<bool, SqlError> {
        let place = tx.query(
            "SELECT 1 FROM group_place
             WHERE group_id = ?1 AND principal = ?2 AND state <> 'released'",
            &[
                Param::Uuid(group),
                Param::Text(self.principal.as_str().into()),
            ],
        )?;
        Ok(!place.is_empty())
    }

    fn record(
        &self,
        tx: &mut Tx<'_>,
        group: Group,
        is_new: bool,
        line: Line,
    ) -> Result<Outcome<Placed>, StoreError> {
        if is_new {
            tx.insert(&group)?;
        } else if !take(tx, group.id)? {
            return Err(StoreError::Inconsistent("a group changed while locked"));
        }
        let sum = total(std::slice::from_ref(&line))
            .map_err(|_| StoreError::Inconsistent("a group's price has no total"))?;
        // Not beyond the group: what is unpaid then has ended before the group does.
        let left_ms = group.deadline_ms.saturating_sub(tx.now_ms);
        let hold_ms = u64::try_from(self.offer.hold_ms.min(left_ms)).unwrap_or(0);
        let order = place::order(
            tx,
            line.order_id,
            &self.principal,
            vec![line],
            sum,
            Duration::from_millis(hold_ms),
            &self.origin,
        );
        let (_, units) = place::write(tx, &order, &self.origin)?;
        tx.write(
            "INSERT INTO group_place (group_id, principal, order_id, state)
             VALUES (?1, ?2, ?3, 'held')
             ON CONFLICT (group_id, principal) DO UPDATE
             SET order_id = excluded.order_id, state = 'held'",
            &[
                Param::Uuid(group.id),
                Param::Text(self.principal.as_str().into()),
                order.id.param(),
            ],
        )?;
        Ok(Outcome {
            reply: (self.render)(&Joining::Joined(&group, &order))?,
            remember: true,
            created: Some(order.id),
            value: Placed::Order {
                id: order.id,
                total: sum,
                units,
            },
        })
    }
}

/// Takes a place, if one is left. The condition is the guard, whoever else is writing.
fn take(tx: &mut Tx<'_>, id: Uuid) -> Result<bool, SqlError> {
    let sql = if Mutant::CheckThenAct.is_on() {
        "UPDATE buying_group SET taken = taken + 1, version = version + 1
         WHERE id = ?1 AND deadline_ms > ?2"
    } else {
        "UPDATE buying_group SET taken = taken + 1, version = version + 1
         WHERE id = ?1 AND state = 'forming' AND taken < size AND deadline_ms > ?2"
    };
    let now_ms = tx.now_ms;
    Ok(tx.execute(sql, &[Param::Uuid(id), Param::Integer(now_ms)])? == 1)
}

/// What an order's change means for its place, in the same transaction. Orders that are in
/// no group are left alone.
///
/// # Errors
/// [`StoreError`]
pub(super) fn follow(tx: &mut Tx<'_>, order: &Order, action: Action) -> Result<(), StoreError> {
    let (place, group) = match action {
        Action::Pay => (
            "paid",
            "UPDATE buying_group SET paid = paid + 1, version = version + 1,
                 state = CASE WHEN paid + 1 >= size THEN 'succeeded' ELSE state END
             WHERE id = ?1 AND state = 'forming'",
        ),
        Action::Cancel | Action::Expire => (
            "released",
            "UPDATE buying_group SET taken = taken - 1, version = version + 1
             WHERE id = ?1 AND state = 'forming'",
        ),
        Action::RefundPart | Action::RefundRest => return Ok(()),
    };
    let held = tx.query(
        "SELECT group_id FROM group_place WHERE order_id = ?1 AND state = 'held'",
        &[order.id.param()],
    )?;
    let Some(mut row) = held.into_iter().next() else {
        return Ok(());
    };
    let id: Uuid = row.take()?;
    tx.write(
        "UPDATE group_place SET state = ?2 WHERE order_id = ?1",
        &[order.id.param(), Param::Text(place.into())],
    )?;
    tx.write(group, &[Param::Uuid(id)])?;
    Ok(())
}

/// Whether a group's deadline has come.
///
/// # Errors
/// [`SqlError`]
pub fn any_ending(connection: &mut dyn Connection, now_ms: i64) -> Result<bool, SqlError> {
    let due = connection.query(
        "SELECT 1 FROM buying_group WHERE state = 'forming' AND deadline_ms <= ?1 LIMIT 1",
        &[Param::Integer(now_ms)],
    )?;
    Ok(!due.is_empty())
}

/// Ends groups whose deadline has come, and gives back what was paid in them.
#[derive(Debug)]
pub struct EndGroups {
    /// Who pays back.
    pub provider: Provider,
}

impl Command for EndGroups {
    /// How many have ended.
    type Output = usize;

    fn locks(&self, locks: &mut Locks) {
        locks.name("group-end", "all");
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<usize, StoreError> {
        let now = Param::Integer(tx.now_ms);
        let due = tx.select::<Group>(
            "WHERE state = 'forming' AND deadline_ms <= ?1 ORDER BY deadline_ms LIMIT ?2",
            &[now, Param::Integer(ENDING_MAX)],
        )?;
        for group in &due {
            self.end(tx, group)?;
        }
        Ok(due.len())
    }

    fn committed(&self, ended: &usize, metrics: &Metrics) {
        metrics.groups_failed(u64::try_from(*ended).unwrap_or(u64::MAX));
    }
}

impl EndGroups {
    fn end(&self, tx: &mut Tx<'_>, group: &Group) -> Result<(), StoreError> {
        let lock = match tx.connection().backend() {
            // The same order of locks as everywhere: orders, then stock.
            Backend::Postgres => " ORDER BY orders.id FOR UPDATE OF orders",
            Backend::Sqlite => "",
        };
        let sql = format!(
            "SELECT orders.id, orders.principal, orders.trace_id
             FROM group_place JOIN orders ON orders.id = group_place.order_id
             WHERE group_id = ?1 AND orders.status IN ('paid', 'partially_refunded'){lock}"
        );
        let paid = tx.query(&sql, &[Param::Uuid(group.id)])?;
        for mut row in paid {
            let (order, principal): (OrderId, String) = (row.take()?, row.take()?);
            let trace: String = row.take()?;
            let refund = RefundOrder {
                principal,
                origin: Origin {
                    actor: "group".to_owned(),
                    trace: TraceId::of(None, Some(&trace)),
                },
                order,
                expected: Expected::Any,
                lines: None,
                restock: true,
                reason: "group_failed".to_owned(),
                provider: self.provider,
                render: no_answer,
            };
            // A refusal means that nothing is left to give back.
            refund.run(tx)?;
        }
        tx.write(
            "UPDATE buying_group SET state = 'failed', version = version + 1
             WHERE id = ?1 AND state = 'forming'",
            &[Param::Uuid(group.id)],
        )?;
        Ok(())
    }
}

/// Nobody waits for this one.
#[allow(clippy::unnecessary_wraps, reason = "the type of a renderer")]
fn no_answer(_: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    Ok(Reply {
        status: 204,
        content_type: String::new(),
        location: None,
        etag: None,
        body: Vec::new(),
    })
}

fn hash(ticket: &str) -> Param<'static> {
    Param::Blob(Sha256::digest(ticket).to_vec().into())
}

/// Writes a ticket to watch a group; `false` for an unknown group.
#[derive(Debug)]
pub struct IssueTicket {
    /// The group.
    pub group: Uuid,
    /// Random; only its hash is stored.
    pub ticket: String,
}

impl Command for IssueTicket {
    type Output = bool;

    fn run(&self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        if find(tx.connection(), self.group)?.is_none() {
            return Ok(false);
        }
        let now_ms = tx.now_ms;
        tx.write(
            "DELETE FROM watch_ticket WHERE expires_at_ms <= ?1",
            &[Param::Integer(now_ms)],
        )?;
        tx.write(
            "INSERT INTO watch_ticket (hash, group_id, expires_at_ms) VALUES (?1, ?2, ?3)",
            &[
                hash(&self.ticket),
                Param::Uuid(self.group),
                Param::Integer(now_ms.saturating_add(TICKET_MS)),
            ],
        )?;
        Ok(true)
    }
}

/// Uses a ticket up; `false` when it is not good for this group, or no longer.
#[derive(Debug)]
pub struct UseTicket {
    /// The group.
    pub group: Uuid,
    /// What was presented.
    pub ticket: String,
}

impl Command for UseTicket {
    type Output = bool;

    fn run(&self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        let now = Param::Integer(tx.now_ms);
        let used = tx.execute(
            "DELETE FROM watch_ticket WHERE hash = ?1 AND group_id = ?2 AND expires_at_ms > ?3",
            &[hash(&self.ticket), Param::Uuid(self.group), now],
        )?;
        Ok(used == 1)
    }
}

/// Groups by state, for the metrics.
///
/// # Errors
/// [`SqlError`]
pub fn by_state(connection: &mut dyn Connection) -> Result<Vec<(State, i64)>, SqlError> {
    let rows = connection.query(
        "SELECT state, count(*) FROM buying_group GROUP BY state",
        &[],
    )?;
    rows.into_iter()
        .map(|mut row| Ok((row.take()?, row.take()?)))
        .collect()
}
