//! The days of a month, and what each account moved on each of them.

use std::collections::BTreeMap;

use super::RateError;
use crate::cost::{
    book::Book,
    calendar::{Date, Month, Period, Zone},
    exact::allocate,
    usage::{Account, Usage, UsageRow, Way},
};

/// A month of the book's zone.
pub(super) struct Days {
    pub(super) month: Period,
    pub(super) list: Vec<(Date, Period)>,
    /// How far the usage is known.
    pub(super) until: i64,
    zone: Zone,
}

impl Days {
    pub(super) fn new(book: &Book, month: Month, until: i64) -> Self {
        let period = book.zone.month(month);
        Self {
            month: period,
            list: book.zone.days(period),
            until: until.min(period.end),
            zone: book.zone,
        }
    }

    /// Index of the day an instant of this month belongs to.
    pub(super) fn index(&self, at: i64) -> Option<usize> {
        let after = self.list.partition_point(|(_, day)| day.start <= at);
        let index = after.checked_sub(1)?;
        (at < self.list[index].1.end).then_some(index)
    }

    /// The row's bytes by day of this month. A row that crosses midnight is cut there, its bytes
    /// going by time: all pieces together are the row, whichever months they fall in.
    pub(super) fn cut(&self, row: &UsageRow) -> Result<Vec<(usize, Period, i128)>, RateError> {
        let bytes = i128::from(row.wire_bytes);
        if let Some(index) = self.index(row.period.start)
            && row.period.end <= self.list[index].1.end
        {
            return Ok(vec![(index, row.period, bytes)]);
        }
        if row.period.meet(self.month).is_none() {
            return Ok(Vec::new());
        }
        let pieces: Vec<Period> = self
            .zone
            .days(row.period)
            .into_iter()
            .filter_map(|(_, day)| day.meet(row.period))
            .collect();
        let weights: Vec<i128> = pieces
            .iter()
            .map(|piece| i128::from(piece.seconds()))
            .collect();
        let shares = allocate(bytes, &weights)
            .map_err(|overflow| RateError::Overflow(overflow, row.account.interface.clone()))?;
        Ok(pieces
            .into_iter()
            .zip(shares)
            .filter_map(|(piece, share)| Some((self.index(piece.start)?, piece, share)))
            .collect())
    }
}

/// Bytes by day and account; none negative.
pub(super) fn daily(
    days: &Days,
    usage: &Usage,
) -> Result<BTreeMap<(usize, Account), i128>, RateError> {
    let mut daily: BTreeMap<(usize, Account), i128> = BTreeMap::new();
    for row in &usage.rows {
        let pieces = days.cut(row)?;
        for (day, piece, bytes) in pieces {
            let mut account = row.account.clone();
            account.estimated |= piece != row.period;
            *daily.entry((day, account)).or_default() += bytes;
        }
    }
    cancel(days, &mut daily)?;
    daily.retain(|_, bytes| *bytes != 0);
    Ok(daily)
}

/// A request that claims after midnight what came before it makes a negative row: those bytes were
/// on the day before's bill, as unclaimed. They leave the largest row of the same interface and
/// direction, which is marked as estimated; the day's sum stays what the interface moved.
fn cancel(days: &Days, daily: &mut BTreeMap<(usize, Account), i128>) -> Result<(), RateError> {
    let negative: Vec<(usize, Account)> = daily
        .iter()
        .filter(|(_, bytes)| **bytes < 0)
        .map(|(key, _)| key.clone())
        .collect();
    for key in negative {
        let mut missing = -daily.remove(&key).unwrap_or_default();
        let (day, account) = &key;
        while missing > 0 {
            let found = daily
                .iter()
                .filter(|((other, candidate), bytes)| {
                    other == day
                        && candidate.interface == account.interface
                        && candidate.way == account.way
                        && **bytes > 0
                })
                .max_by_key(|((_, candidate), bytes)| {
                    let near = candidate.side == account.side && candidate.class == account.class;
                    (near, **bytes, std::cmp::Reverse(candidate.clone()))
                })
                .map(|(key, bytes)| (key.clone(), *bytes));
            let Some((from, bytes)) = found else {
                return Err(RateError::Negative {
                    interface: account.interface.clone(),
                    date: days.list[*day].0.to_string(),
                    bytes: -missing,
                });
            };
            let taken = bytes.min(missing);
            missing -= taken;
            daily.remove(&from);
            let (day, mut account) = from;
            account.estimated = true;
            *daily.entry((day, account)).or_default() += bytes - taken;
        }
    }
    Ok(())
}

/// Whether a reading of one of these interfaces was missed in a period.
pub(super) fn has_gap<'a>(
    usage: &Usage,
    mut interfaces: impl Iterator<Item = &'a str> + Clone,
    period: Period,
) -> bool {
    usage.gaps.iter().any(|gap| {
        gap.period.meet(period).is_some() && interfaces.clone().any(|name| name == gap.interface)
    }) && interfaces.next().is_some()
}

/// Bytes of one sample by account, with their direction's sum.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) accounts: BTreeMap<Account, i128>,
}

impl Sample {
    pub(super) fn sum(&self, way: Option<Way>) -> i128 {
        let of_way = self
            .accounts
            .iter()
            .filter(|(account, _)| way.is_none_or(|way| account.way == way));
        of_way.map(|(_, bytes)| *bytes).sum()
    }
}
