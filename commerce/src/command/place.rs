//! Placing an order.
//!
//! ```text
//! price    ► refuse unknown SKUs, impossible totals, and what is not available
//! reserve  ► one conditional UPDATE per SKU
//! record   ► order, lines, ledger movements, event, answer under its key
//! ```
//!
//! Either all of it commits, or nothing but a remembered refusal.

use std::sync::Arc;
use std::time::Duration;

use super::member;
use super::stock::{self, Move};
use super::{Effect, Locks, Outcome, Render, Tx, Verdict};
use crate::catalogue::Sku;
use crate::discount::{self, Customer, DiscountError, Item, Rule};
use crate::event::{self, Origin, Topic};
use crate::metrics::{Metrics, RefusalReason};
use crate::money::Money;
use crate::order::{self, Draft, Line, Order, OrderId, Refusal, Status, TotalRefusal};
use crate::store::StoreError;
use crate::store::sql::Param;

/// A request to place an order.
#[derive(Debug)]
pub struct Place {
    /// Whose order it will be.
    pub principal: String,
    /// On whose behalf.
    pub origin: Origin,
    /// What is asked for.
    pub draft: Draft,
    /// What takes something off the prices.
    pub terms: Terms,
    /// How long the stock is reserved for a payment.
    pub hold: Duration,
    /// The gate calls it sold out: the ledger is asked without taking its rows' locks.
    pub is_sold_out: bool,
    /// Renders the answer.
    pub render: Render,
}

/// The rules in force, and what is known of the customer.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Discount rules.
    pub rules: Arc<[Rule]>,
    /// The member, if the customer is one; what they are entitled to is in the database.
    pub member: Option<String>,
    /// Coupon codes offered.
    pub coupons: Vec<String>,
    /// (experiment, variant) pairs the customer is in.
    pub variants: Vec<(String, String)>,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub enum Placed {
    /// A new order.
    Order {
        /// Its identity.
        id: OrderId,
        /// Its total.
        total: Money,
        /// Units over all lines.
        units: u64,
    },
    /// No order.
    Refused(RefusalReason),
}

impl Effect for Place {
    type Value = Placed;

    fn locks(&self, locks: &mut Locks) {
        locks.new_order();
        if self.is_sold_out {
            return;
        }
        for (sku, _) in self.draft.lines() {
            locks.sku(sku);
        }
    }

    fn run(&self, tx: &mut Tx<'_>) -> Result<Outcome<Placed>, StoreError> {
        let id = OrderId::generate();
        let priced = match price(tx, id, &self.draft)? {
            Ok(lines) => self.terms.apply(tx, lines)?,
            Err(refusal) => Err(refusal),
        };
        let priced = priced.and_then(|lines| {
            let total = order::total(&lines)?;
            Ok((lines, total))
        });
        match priced {
            Ok((lines, total)) => self.record(tx, id, lines, total),
            Err(refusal) => Ok(Outcome {
                reply: (self.render)(&Verdict::Refused(&refusal))?,
                remember: refusal.is_remembered(),
                created: None,
                value: Placed::Refused(RefusalReason::of(&refusal)),
            }),
        }
    }

    fn committed(&self, value: &Placed, metrics: &Metrics) {
        value.count(metrics);
    }

    fn failed(&self, metrics: &Metrics) {
        metrics.order_refused(RefusalReason::Storage);
    }
}

/// The lines with the catalogue's prices, if every one of them is available.
fn price(
    tx: &mut Tx<'_>,
    id: OrderId,
    draft: &Draft,
) -> Result<Result<Vec<Line>, Refusal>, StoreError> {
    let mut lines = Vec::new();
    for (sku, requested) in draft.lines() {
        let found = tx.query(
            "SELECT price_minor, currency, available
             FROM product JOIN stock USING (sku) WHERE sku = ?1",
            &[Param::Text(sku.as_str().into())],
        )?;
        let Some(mut row) = found.into_iter().next() else {
            return Ok(Err(Refusal::UnknownSku(sku.clone())));
        };
        let unit_price: Money = row.take()?;
        let available: i64 = row.take()?;
        if available < i64::from(requested) {
            let sku = sku.clone();
            return Ok(Err(Refusal::InsufficientStock { sku, requested }));
        }
        match Line::price(id, sku.clone(), requested, unit_price) {
            Ok(line) => lines.push(line),
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(Ok(lines))
}

/// Whether so many units of a SKU are for sale.
pub(super) fn is_available(tx: &mut Tx<'_>, sku: &Sku, units: u32) -> Result<bool, StoreError> {
    let available = tx.query(
        "SELECT 1 FROM stock WHERE sku = ?1 AND available >= ?2",
        &[
            Param::Text(sku.as_str().into()),
            Param::Integer(i64::from(units)),
        ],
    )?;
    Ok(!available.is_empty())
}

impl Terms {
    /// The lines with the discounts that apply allocated to them.
    fn apply(
        &self,
        tx: &mut Tx<'_>,
        mut lines: Vec<Line>,
    ) -> Result<Result<Vec<Line>, Refusal>, StoreError> {
        if self.rules.is_empty() && self.coupons.is_empty() {
            return Ok(Ok(lines));
        }
        let now_ms = tx.now_ms;
        let member = match &self.member {
            Some(id) => member::standing(tx.connection(), id, now_ms)?.is_entitled(),
            None => false,
        };
        let customer = Customer {
            member,
            coupons: &self.coupons,
            variants: &self.variants,
        };
        let basket: Vec<Item> = lines
            .iter()
            .map(|line| Item {
                sku: line.sku.clone(),
                quantity: line.quantity,
                unit_price: line.unit_price,
            })
            .collect();
        let priced = match discount::price(&basket, &self.rules, &customer, now_ms) {
            Ok(priced) => priced,
            Err(error) => return Ok(Err(refuse(error))),
        };
        for line in &mut lines {
            // By SKU, of which each has one line.
            let found = priced.lines.iter().find(|priced| priced.sku == line.sku);
            line.allocated_discount = found
                .and_then(|found| found.list.checked_sub(found.net).ok())
                .ok_or(StoreError::Inconsistent("a line has no price"))?;
        }
        Ok(Ok(lines))
    }
}

fn refuse(error: DiscountError) -> Refusal {
    match error {
        DiscountError::Coupon(code) => Refusal::Coupon(code),
        // The request's parser has ruled these out.
        DiscountError::TooManyCoupons => Refusal::Coupon(String::new()),
        DiscountError::Empty | DiscountError::Duplicate(_) => Refusal::Total(TotalRefusal::NoLines),
        DiscountError::Money(crate::money::MoneyError::Mixed(..)) => {
            Refusal::Total(TotalRefusal::MixedCurrencies)
        }
        DiscountError::Money(_) => Refusal::Total(TotalRefusal::Overflow),
    }
}

impl Placed {
    /// Counts what was committed.
    pub(super) fn count(&self, metrics: &Metrics) {
        match self {
            Self::Order { total, units, .. } => {
                // Totals are what is left of positive prices: never negative.
                let minor = u64::try_from(total.minor()).unwrap_or(0);
                metrics.order_created(minor, total.currency().to_string(), *units);
            }
            Self::Refused(reason) => metrics.order_refused(*reason),
        }
    }
}

impl Place {
    fn record(
        &self,
        tx: &mut Tx<'_>,
        id: OrderId,
        lines: Vec<Line>,
        total: Money,
    ) -> Result<Outcome<Placed>, StoreError> {
        let order = order(
            tx,
            id,
            &self.principal,
            lines,
            total,
            self.hold,
            &self.origin,
        );
        let (json, units) = write(tx, &order, &self.origin)?;
        Ok(Outcome {
            reply: (self.render)(&Verdict::Placed(&order, &json))?,
            remember: true,
            created: Some(id),
            value: Placed::Order { id, total, units },
        })
    }
}

/// An order as it begins.
pub(super) fn order(
    tx: &Tx<'_>,
    id: OrderId,
    principal: &str,
    lines: Vec<Line>,
    total: Money,
    hold: Duration,
    origin: &Origin,
) -> Order {
    let hold_ms = i64::try_from(hold.as_millis()).unwrap_or(i64::MAX);
    Order {
        id,
        principal: principal.to_owned(),
        status: Status::Placed,
        version: 1,
        lines,
        total,
        refunded: total.zero(),
        created_at_ms: tx.now_ms,
        expires_at_ms: tx.now_ms.saturating_add(hold_ms),
        trace_id: origin.trace.as_str().to_owned(),
    }
}

/// Writes everything an order consists of; its JSON, and how many units it has.
pub(super) fn write(
    tx: &mut Tx<'_>,
    order: &Order,
    origin: &Origin,
) -> Result<(String, u64), StoreError> {
    tx.insert(order)?;
    let mut units = 0_u64;
    for line in &order.lines {
        if !stock::shift(tx, Move::Reserve, order.id, &line.sku, line.quantity)? {
            // It was available a moment ago, in this transaction.
            return Err(StoreError::Inconsistent("stock changed while locked"));
        }
        tx.insert(line)?;
        units = units.saturating_add(u64::from(line.quantity));
    }
    let json = tx.json(order)?;
    event::emit(tx, Topic::OrderPlaced, order, origin, json.clone())?;
    tx.wake_at(order.expires_at_ms);
    Ok((json, units))
}
