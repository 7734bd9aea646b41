//! Use and time in, standing and forecast out. Pure; whole numbers only.

use std::collections::BTreeMap;

use chrono::Datelike as _;

use super::{Budget, Limit, PeriodKind};
use crate::{
    config::Prices,
    cost::calendar::{Month, Period},
    ledger::Sum,
    money::{Overflow, Rate},
    owner::OwnerKind,
};

/// Fewer past days than this say nothing about a week.
const HISTORY_DAYS_MIN: usize = 14;

/// Where a budget stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The period it is about.
    pub period: Period,
    /// When it was judged, Unix seconds.
    pub at: i64,
    /// Used so far, in the limit's unit.
    pub used: i128,
    /// The limit.
    pub limit: i128,
    /// What will have been used when the period ends, at this pace: by the weekdays of the last
    /// four weeks where they are known, else in proportion to the time gone.
    pub forecast: i128,
    /// The highest warning reached, percent; 0: none.
    pub warned_percent: i64,
}

impl Standing {
    /// Whether the limit is reached.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.used >= self.limit
    }

    /// Share used, whole percent, rounded down.
    #[must_use]
    pub fn used_percent(&self) -> i128 {
        self.used.saturating_mul(100) / self.limit.max(1)
    }
}

/// What was moved on each day, by its period: the days of the budget's period and those before.
pub type Days = BTreeMap<Period, Vec<Sum>>;

/// The days that [`judge`] wants to know: four weeks back, and the budget's period so far.
#[must_use]
pub fn days(budget: &Budget, now: i64) -> Vec<Period> {
    let period = period(budget, now);
    let from = period.start.min(now - 28 * 86_400);
    let days = budget.zone.days(Period {
        start: from,
        end: now + 1,
    });
    days.into_iter().map(|(_, day)| day).collect()
}

/// The period that `now` lies in.
#[must_use]
pub fn period(budget: &Budget, now: i64) -> Period {
    let date = budget.zone.date(now);
    match budget.period {
        PeriodKind::Day => budget.zone.day(date),
        PeriodKind::Month => budget.zone.month(Month::of(date)),
    }
}

/// Judges a budget. `first` is when the ledger begins: days before it are not history.
///
/// # Errors
/// An amount of money does not fit.
pub fn judge(
    budget: &Budget,
    prices: Option<&Prices>,
    days: &Days,
    first: i64,
    now: i64,
) -> Result<Standing, Overflow> {
    let period = period(budget, now);
    let mut used = 0;
    let mut week: BTreeMap<u32, (i128, i128)> = BTreeMap::new();
    let mut history = 0;
    for (day, sums) in days {
        let amount = used_in(budget, prices, sums)?;
        if day.start >= period.start && day.start < period.end {
            used += amount;
        }
        if day.start >= first && day.end <= now {
            history += 1;
            let entry = week.entry(weekday(budget, day.start)).or_default();
            entry.0 += amount;
            entry.1 += 1;
        }
    }
    let linear = {
        let elapsed = i128::from((now - period.start).max(1));
        used.saturating_mul(i128::from(period.end - period.start)) / elapsed
    };
    let forecast = if history >= HISTORY_DAYS_MIN && week.len() == 7 {
        let usual = |day: u32| week.get(&day).map_or(0, |(sum, count)| sum / count);
        let mut forecast = used;
        let rest = Period {
            start: now,
            end: period.end,
        };
        for (_, day) in budget.zone.days(rest) {
            let usual = usual(weekday(budget, day.start));
            forecast += if day.start <= now {
                // What is left of today, by the clock, but not less than nothing.
                let left = i128::from(day.end - now);
                let all = i128::from((day.end - day.start).max(1));
                (usual.saturating_mul(left) / all).max(0)
            } else {
                usual
            };
        }
        forecast.max(used)
    } else {
        linear.max(used)
    };
    let limit = budget.limit.amount();
    let reached =
        |percent: &&i64| used.saturating_mul(100) >= limit.saturating_mul(i128::from(**percent));
    Ok(Standing {
        period,
        at: now,
        used,
        limit,
        forecast,
        warned_percent: budget
            .warn_percent
            .iter()
            .filter(reached)
            .max()
            .copied()
            .unwrap_or(0),
    })
}

fn weekday(budget: &Budget, at: i64) -> u32 {
    budget.zone.date(at).weekday().num_days_from_monday()
}

/// What of these sums a budget is charged with.
fn used_in(budget: &Budget, prices: Option<&Prices>, sums: &[Sum]) -> Result<i128, Overflow> {
    let mine = sums.iter().filter(|sum| {
        let owner = &sum.owner;
        owner.kind == OwnerKind::Route
            && budget
                .scope
                .covers(&owner.route, &owner.service, &owner.tenant)
    });
    match budget.limit {
        Limit::Bytes(_) => Ok(mine.map(|sum| i128::from(sum.amount.wire_bytes)).sum()),
        Limit::Money(_) => {
            // Products first, one division per rate: many small roundings would not add up.
            let mut products: Vec<(Rate, i128)> = Vec::new();
            for sum in mine {
                let price = prices.and_then(|p| p.find(sum.owner.leg, sum.direction));
                let Some(price) = price else { continue };
                let exact = price
                    .rate
                    .exact(sum.amount.wire_bytes.max(0).unsigned_abs());
                match products.iter_mut().find(|(rate, _)| *rate == price.rate) {
                    Some((_, product)) => {
                        *product = product.checked_add(exact).ok_or(Overflow)?;
                    }
                    None => products.push((price.rate, exact)),
                }
            }
            Ok(products
                .iter()
                .map(|(rate, exact)| rate.settle(*exact).0)
                .sum())
        }
    }
}
