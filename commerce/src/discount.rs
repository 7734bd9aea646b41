//! Discounts, pure: a basket and the rules in force in, prices and their reasons out.
//!
//! The rules are applied in three stages, each on what the stage before left:
//!
//! 1. **Items**: of the member prices and buy-n-get-m offers for a line, the best one.
//! 2. **Order**: of the thresholds and percentages that need no coupon, the best one.
//! 3. **Coupons**: every stacking coupon, amounts before percentages, then by rule id.
//!
//! A coupon that does not stack is weighed against all of this: it alone on list prices, or
//! the three stages without it, whichever saves more; with equal savings the stages.
//!
//! What a stage takes off is *allocated* to the lines by largest remainder, so that
//! Σ allocations = discount to the minor unit, no line falls below zero, and a refund gives
//! back what was stored instead of computing it again ([`refund`]). Neither the order of the
//! lines nor that of the rules changes the outcome: lines are taken by SKU, rules by id.
//!
//! The tests beside this file are the specification.

mod allocate;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;

use serde::Serialize;

use crate::catalogue::Sku;
use crate::money::{BasisPoints, Money, MoneyError};

pub use allocate::{allocate, refund};

/// Most coupons in one order.
pub const COUPONS_MAX: usize = 5;

/// A rule's identity: 1 to 64 lower-case letters, digits, `-` or `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct RuleId(String);

impl RuleId {
    /// Parses an identity; `None` when it is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
        };
        ((1..=64).contains(&text.len()) && text.bytes().all(allowed)).then(|| Self(text.to_owned()))
    }

    /// The identity as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How much a rule takes off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// A unit price for members, where it is below the list price.
    MemberPrice(Money),
    /// Of every `buy + free` units of a line, `free` cost nothing.
    BuyGet {
        /// Units paid for.
        buy: NonZeroU32,
        /// Units given with them.
        free: NonZeroU32,
    },
    /// An amount off, once the eligible lines reach `at_least`.
    Threshold {
        /// What the eligible lines must come to.
        at_least: Money,
        /// What is taken off.
        off: Money,
    },
    /// A share off the eligible lines.
    Percent(BasisPoints),
}

impl Strategy {
    /// Whether it prices a line by itself rather than several together.
    const fn is_of_items(&self) -> bool {
        matches!(self, Self::MemberPrice(_) | Self::BuyGet { .. })
    }
}

/// What brings a rule into force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Every order.
    Always,
    /// Orders of members.
    Member,
    /// Orders that name the code.
    Coupon {
        /// The code, compared as written.
        code: String,
        /// Whether it may be used with other discounts.
        stacks: bool,
    },
    /// Orders of customers in a variant of an experiment.
    Variant {
        /// The experiment.
        experiment: String,
        /// The variant.
        variant: String,
    },
}

/// A discount rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its identity, shown with what it took off.
    pub id: RuleId,
    /// How much it takes off.
    pub strategy: Strategy,
    /// What brings it into force.
    pub trigger: Trigger,
    /// The SKUs it is for; empty for all.
    pub skus: BTreeSet<Sku>,
    /// First millisecond since the Unix epoch at which it holds.
    pub from_ms: i64,
    /// First millisecond at which it no longer holds.
    pub until_ms: i64,
}

impl Rule {
    fn covers(&self, sku: &Sku) -> bool {
        self.skus.is_empty() || self.skus.contains(sku)
    }

    fn holds_at(&self, now_ms: i64) -> bool {
        (self.from_ms..self.until_ms).contains(&now_ms)
    }
}

/// One SKU of a basket at its list price.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What.
    pub sku: Sku,
    /// How many.
    pub quantity: u32,
    /// List price of one.
    pub unit_price: Money,
}

/// What is known of the customer.
#[derive(Clone, Debug, Default)]
pub struct Customer<'a> {
    /// Whether the membership is in force.
    pub member: bool,
    /// Coupon codes offered.
    pub coupons: &'a [String],
    /// (experiment, variant) pairs the customer is in.
    pub variants: &'a [(String, String)],
}

/// What a rule took off a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// The rule.
    pub rule: RuleId,
    /// How much; positive.
    pub amount: Money,
}

/// A line with its discounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PricedLine {
    /// What.
    pub sku: Sku,
    /// How many.
    pub quantity: u32,
    /// Unit price times quantity.
    pub list: Money,
    /// What was taken off, in the order of the stages.
    pub applied: Vec<Applied>,
    /// What is left to pay; never negative.
    pub net: Money,
}

/// A priced basket, ordered by SKU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priced {
    /// The lines.
    pub lines: Vec<PricedLine>,
    /// The sum of all that was taken off.
    pub discount: Money,
    /// The sum of what is left.
    pub total: Money,
}

/// Why a basket has no price.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiscountError {
    /// Nothing to price.
    #[error("the basket is empty")]
    Empty,
    /// The same SKU twice: sum it first.
    #[error("SKU {0} occurs twice")]
    Duplicate(Sku),
    /// More coupons than [`COUPONS_MAX`].
    #[error("more than {COUPONS_MAX} coupons")]
    TooManyCoupons,
    /// No rule in force has the code.
    #[error("coupon {0:?} is unknown or not valid now")]
    Coupon(String),
    /// The prices have no sum.
    #[error(transparent)]
    Money(#[from] MoneyError),
}

/// Prices a basket. Pure: the same arguments give the same prices, in any order of lines
/// and rules.
///
/// # Errors
/// [`DiscountError`]; above all a coupon that no rule in force knows, so that nobody pays
/// more than they were promised without being told.
pub fn price(
    basket: &[Item],
    rules: &[Rule],
    customer: &Customer<'_>,
    now_ms: i64,
) -> Result<Priced, DiscountError> {
    let list = list_prices(basket)?;
    let rules = in_force(rules, customer, now_ms)?;
    let exclusive = |rule: &&&Rule| matches!(rule.trigger, Trigger::Coupon { stacks: false, .. });
    let stages: Vec<&Rule> = rules
        .iter()
        .filter(|rule| !exclusive(rule))
        .copied()
        .collect();
    let mut best = apply_stages(&list, &stages)?;
    for coupon in rules.iter().filter(exclusive) {
        let alone = apply_stages(&list, &[coupon])?;
        if alone.discount.minor() > best.discount.minor() {
            best = alone;
        }
    }
    Ok(best)
}

/// The lines by SKU, nothing taken off yet.
fn list_prices(basket: &[Item]) -> Result<Vec<PricedLine>, DiscountError> {
    let mut lines = basket
        .iter()
        .map(|item| {
            let list = item.unit_price.checked_mul(item.quantity)?;
            Ok(PricedLine {
                sku: item.sku.clone(),
                quantity: item.quantity,
                list,
                applied: Vec::new(),
                net: list,
            })
        })
        .collect::<Result<Vec<_>, MoneyError>>()?;
    lines.sort_by(|one, other| one.sku.cmp(&other.sku));
    if let Some(pair) = lines.windows(2).find(|pair| pair[0].sku == pair[1].sku) {
        return Err(DiscountError::Duplicate(pair[0].sku.clone()));
    }
    Ok(lines)
}

/// The rules for this customer now, by id; each coupon code must bring at least one.
fn in_force<'r>(
    rules: &'r [Rule],
    customer: &Customer<'_>,
    now_ms: i64,
) -> Result<Vec<&'r Rule>, DiscountError> {
    if customer.coupons.len() > COUPONS_MAX {
        return Err(DiscountError::TooManyCoupons);
    }
    let held = |rule: &&Rule| rule.holds_at(now_ms);
    for code in customer.coupons {
        let known =
            |rule: &Rule| matches!(&rule.trigger, Trigger::Coupon { code: of, .. } if of == code);
        if !rules.iter().filter(held).any(known) {
            return Err(DiscountError::Coupon(code.clone()));
        }
    }
    let mut chosen: Vec<&Rule> = rules
        .iter()
        .filter(held)
        .filter(|rule| match &rule.trigger {
            Trigger::Always => true,
            Trigger::Member => customer.member,
            Trigger::Coupon { code, .. } => customer.coupons.contains(code),
            Trigger::Variant {
                experiment,
                variant,
            } => customer
                .variants
                .iter()
                .any(|(of, is)| of == experiment && is == variant),
        })
        .collect();
    chosen.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(chosen)
}

/// The three stages over lines at list price. `rules` are by id.
fn apply_stages(list: &[PricedLine], rules: &[&Rule]) -> Result<Priced, DiscountError> {
    let mut lines = list.to_vec();
    for line in &mut lines {
        apply_best_item_rule(line, rules);
    }
    let is_coupon = |rule: &Rule| matches!(rule.trigger, Trigger::Coupon { .. });
    let of_orders = rules.iter().filter(|rule| !rule.strategy.is_of_items());
    // The first of the best: ties go to the smaller id.
    let mut best: Option<(&Rule, i64)> = None;
    for rule in of_orders.clone().filter(|rule| !is_coupon(rule)) {
        let off = off_order(&lines, rule)?;
        if off > best.map_or(0, |(_, most)| most) {
            best = Some((rule, off));
        }
    }
    if let Some((rule, off)) = best {
        take_off(&mut lines, rule, off);
    }
    let mut coupons: Vec<&Rule> = of_orders.filter(|rule| is_coupon(rule)).copied().collect();
    coupons.sort_by_key(|rule| matches!(rule.strategy, Strategy::Percent(_)));
    for rule in coupons {
        let off = off_order(&lines, rule)?;
        take_off(&mut lines, rule, off);
    }
    sum(lines)
}

fn apply_best_item_rule(line: &mut PricedLine, rules: &[&Rule]) {
    let mut best: Option<(&Rule, i64)> = None;
    for rule in rules.iter().filter(|rule| rule.covers(&line.sku)) {
        let off = off_item(line, &rule.strategy);
        if off > best.map_or(0, |(_, most)| most) {
            best = Some((rule, off));
        }
    }
    if let Some((rule, off)) = best {
        apply(line, rule, off);
    }
}

/// What an item strategy takes off a line at list price, in minor units.
fn off_item(line: &PricedLine, strategy: &Strategy) -> i64 {
    let off = match strategy {
        Strategy::MemberPrice(unit) if unit.currency() == line.net.currency() => unit
            .checked_mul(line.quantity)
            .and_then(|price| line.list.checked_sub(price))
            .map_or(0, Money::minor),
        Strategy::BuyGet { buy, free } => {
            let (buy, free) = (u64::from(buy.get()), u64::from(free.get()));
            let (quantity, round) = (u64::from(line.quantity), buy.saturating_add(free));
            let given = quantity / round * free + (quantity % round).saturating_sub(buy);
            // list is a multiple of quantity: the division is exact.
            let unit = line.list.minor() / i64::from(line.quantity.max(1));
            i64::try_from(given)
                .ok()
                .and_then(|given| unit.checked_mul(given))
                .unwrap_or(0)
        }
        Strategy::MemberPrice(_) | Strategy::Threshold { .. } | Strategy::Percent(_) => 0,
    };
    off.clamp(0, line.net.minor())
}

/// What an order strategy takes off its lines together, in minor units.
fn off_order(lines: &[PricedLine], rule: &Rule) -> Result<i64, MoneyError> {
    let mut eligible = lines.iter().filter(|line| rule.covers(&line.sku));
    let Some(first) = eligible.next() else {
        return Ok(0);
    };
    let sum = eligible.try_fold(first.net, |sum, line| sum.checked_add(line.net))?;
    Ok(match &rule.strategy {
        Strategy::Percent(share) => share.of(sum).minor(),
        Strategy::Threshold { at_least, off }
            if at_least.currency() == sum.currency()
                && off.currency() == sum.currency()
                && sum.minor() >= at_least.minor() =>
        {
            off.minor().clamp(0, sum.minor())
        }
        Strategy::Threshold { .. } | Strategy::MemberPrice(_) | Strategy::BuyGet { .. } => 0,
    })
}

/// Spreads `off` over the lines a rule covers, in proportion to what they still cost.
fn take_off(lines: &mut [PricedLine], rule: &Rule, off: i64) {
    let mut eligible: Vec<&mut PricedLine> = lines
        .iter_mut()
        .filter(|line| rule.covers(&line.sku))
        .collect();
    let weights: Vec<i64> = eligible.iter().map(|line| line.net.minor()).collect();
    let shares = allocate(off, &weights);
    for (line, share) in eligible.iter_mut().zip(shares) {
        apply(line, rule, share);
    }
}

fn apply(line: &mut PricedLine, rule: &Rule, off: i64) {
    let amount = Money::new(off, line.net.currency());
    // `off` is at most what is left: the subtraction cannot fail.
    if let Ok(net) = line.net.checked_sub(amount)
        && off > 0
    {
        line.net = net;
        line.applied.push(Applied {
            rule: rule.id.clone(),
            amount,
        });
    }
}

fn sum(lines: Vec<PricedLine>) -> Result<Priced, DiscountError> {
    let (first, rest) = lines.split_first().ok_or(DiscountError::Empty)?;
    let total = rest
        .iter()
        .try_fold(first.net, |sum, line| sum.checked_add(line.net))?;
    let listed = rest
        .iter()
        .try_fold(first.list, |sum, line| sum.checked_add(line.list))?;
    Ok(Priced {
        discount: listed.checked_sub(total)?,
        total,
        lines,
    })
}
