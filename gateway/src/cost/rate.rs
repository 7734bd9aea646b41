//! Usage and a price book in, a bill out. Pure: no file, no clock.
//!
//! For each month: rows are cut at the midnights of the book's zone, each day's bytes find their
//! SKU, each SKU's bytes are poured into its tiers in the order of days, each tier is multiplied
//! and divided once, and the result is shared out by largest remainder. Shares within a day go by
//! bytes; the order in which rows arrive changes nothing.

mod bandwidth;
mod days;

use std::collections::BTreeMap;

use super::{
    bill::{Bill, Charge, Part, Pool, Provenance},
    book::{Basis, Book, Price, Sku, SkuDirection, TierMode},
    calendar::{Month, Period},
    exact::{allocate, divide_half_even},
    usage::{Account, Kind, Usage, Way},
};
use crate::money::{Nanos, Overflow, UnitPrice};

use days::{Days, daily};

/// Recorded in rows whose tier was found by pouring days into it in order.
pub const BY_DAY_AND_BYTES: &str = "edgemeter.day-order.byte-share.v1";
/// Recorded in rows that share a fee of a day.
pub const BY_BYTES: &str = "edgemeter.byte-share.v1";

/// A month cannot be rated. Nothing is half rated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// More than 128 bits: not a plausible count of bytes.
    #[error("{1}: {0}")]
    Overflow(Overflow, String),
    /// The ledger says that an interface moved fewer than no bytes.
    #[error(
        "{interface} moved {bytes} bytes on {date}, which cannot be: the ledger is damaged; \
         compare with `edgemeter report`"
    )]
    Negative {
        /// Where.
        interface: String,
        /// On which day.
        date: String,
        /// How many.
        bytes: i128,
    },
}

/// Prices a month. `until` is how far the usage is known, in Unix seconds: fees for days accrue
/// up to it.
///
/// # Errors
/// [`RateError`].
pub fn rate_month(book: &Book, usage: &Usage, month: Month, until: i64) -> Result<Bill, RateError> {
    let mut usage = usage.clone();
    usage.canonical();
    let days = Days::new(book, month, until);
    let daily = daily(&days, &usage)?;
    let mut rating = Rating {
        book,
        days: &days,
        charges: Vec::new(),
        pools: Vec::new(),
    };
    let mut by_sku: BTreeMap<usize, Vec<DayBytes>> = BTreeMap::new();
    for ((day, account), bytes) in daily {
        let row = DayBytes {
            day,
            account,
            bytes,
        };
        match book.find(&row.account, days.list[day].0) {
            Some(sku) => by_sku.entry(sku).or_default().push(row),
            None => rating.unpriced(row, "", Part::Unpriced),
        }
    }
    // Versions of one price share its pool: they stand together, in the order of the file.
    let mut done: Vec<&str> = Vec::new();
    for sku in &book.skus {
        let id = sku.id.as_str();
        if done.contains(&id) {
            continue;
        }
        done.push(id);
        let versions: Vec<usize> = (0..book.skus.len())
            .filter(|&index| book.skus[index].id.as_str() == id)
            .collect();
        let fail = |overflow| RateError::Overflow(overflow, id.to_owned());
        match sku.basis {
            Basis::Bytes { .. } => rating.bytes(&versions, &by_sku).map_err(fail)?,
            Basis::PeakMbpsDay(_) | Basis::Percentile { .. } => {
                for &version in &versions {
                    let rows = by_sku.remove(&version).unwrap_or_default();
                    rating.bandwidth(version, &rows, &usage).map_err(fail)?;
                }
            }
        }
        for &version in &versions {
            rating.fixed(version, &by_sku).map_err(fail)?;
        }
    }
    let mut charges = rating.charges;
    charges.sort();
    Ok(Bill {
        month,
        period: days.month,
        charges,
        pools: rating.pools,
        provenance: Provenance {
            book: book.hash.clone(),
            classes: usage.class_hash.clone(),
            usage: usage.hash(),
        },
    })
}

/// One account's bytes on one day.
#[derive(Clone, Debug)]
struct DayBytes {
    /// Index into [`Days::list`].
    day: usize,
    account: Account,
    bytes: i128,
}

/// A part of a pool, to be shared out.
struct Share {
    period: Period,
    account: Account,
    quantity: i128,
    wire_bytes: i128,
    estimated: bool,
}

struct Rating<'a> {
    book: &'a Book,
    days: &'a Days,
    charges: Vec<Charge>,
    pools: Vec<Pool>,
}

impl Rating<'_> {
    /// Bytes that cost nothing here, and are on the bill all the same.
    fn unpriced(&mut self, row: DayBytes, sku: &str, part: Part) {
        self.charges.push(Charge {
            period: self.days.list[row.day].1,
            sku: sku.to_owned(),
            part,
            estimated: row.account.estimated,
            account: row.account,
            unit: "B".into(),
            quantity: row.bytes,
            divisor: 1,
            price: 0,
            price_decimals: 9,
            wire_bytes: row.bytes,
            cost: 0,
            method: String::new(),
        });
    }

    /// The byte pool of one id over a month.
    fn bytes(
        &mut self,
        versions: &[usize],
        by_sku: &BTreeMap<usize, Vec<DayBytes>>,
    ) -> Result<(), Overflow> {
        let mut rows: Vec<(usize, &DayBytes)> = versions
            .iter()
            .flat_map(|&version| {
                by_sku
                    .get(&version)
                    .into_iter()
                    .flatten()
                    .map(move |row| (version, row))
            })
            .collect();
        rows.sort_by(|(a_version, a), (b_version, b)| {
            (a.day, a_version, &a.account).cmp(&(b.day, b_version, &b.account))
        });
        let smaller = self.smaller_direction(&rows);
        let (billed, other): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(version, row)| {
            self.book.skus[*version].direction != SkuDirection::MaxInOut
                || Some(row.account.way) != smaller
        });
        for (version, row) in other {
            let id = self.book.skus[version].id.to_string();
            self.unpriced(row.clone(), &id, Part::Measured);
        }
        let total: i128 = billed.iter().map(|(_, row)| row.bytes).sum();
        let mut position = 0;
        let mut shares: BTreeMap<(usize, Part), Vec<Share>> = BTreeMap::new();
        for group in billed
            .chunk_by(|(a_version, a), (b_version, b)| (a.day, a_version) == (b.day, b_version))
        {
            let Some(&(version, first)) = group.first() else {
                continue;
            };
            let sku = &self.book.skus[version];
            let unit = unit_bytes(sku);
            let mut left: Vec<i128> = group.iter().map(|(_, row)| row.bytes).collect();
            let day: i128 = left.iter().sum();
            for (part, piece) in pieces(sku, unit, position, day, total) {
                for (index, quantity) in allocate(piece, &left)?.into_iter().enumerate() {
                    left[index] -= quantity;
                    if quantity == 0 {
                        continue;
                    }
                    let row = group[index].1;
                    shares
                        .entry((version, part.clone()))
                        .or_default()
                        .push(Share {
                            period: self.days.list[first.day].1,
                            account: row.account.clone(),
                            quantity,
                            wire_bytes: quantity,
                            estimated: row.account.estimated,
                        });
                }
            }
            position += day;
        }
        // A surcharge is on all bytes of a version, whatever tier they fell in.
        let mut surcharged: BTreeMap<usize, BTreeMap<(Period, Account), i128>> = BTreeMap::new();
        for ((version, part), shares) in shares {
            let sku = &self.book.skus[version];
            let all = surcharged.entry(version).or_default();
            for share in &shares {
                *all.entry((share.period, share.account.clone()))
                    .or_default() += share.quantity;
            }
            let price = sku.price(part_price(sku, &part));
            let unit = unit_bytes(sku);
            self.close_bytes(sku, part, price, unit, &shares, true)?;
        }
        for (version, all) in surcharged {
            let sku = &self.book.skus[version];
            let shares: Vec<Share> = all
                .into_iter()
                .map(|((period, account), quantity)| Share {
                    period,
                    estimated: account.estimated,
                    account,
                    quantity,
                    wire_bytes: 0,
                })
                .collect();
            for adder in &sku.adders {
                let part = Part::Adder(adder.id.to_string());
                let price = sku.price(adder.price);
                self.close_bytes(sku, part, price, unit_bytes(sku), &shares, false)?;
            }
        }
        Ok(())
    }

    /// For `max_in_out`: the direction that moved less this month, and is not billed.
    fn smaller_direction(&self, rows: &[(usize, &DayBytes)]) -> Option<Way> {
        let sum = |way| -> i128 {
            let of_way = rows.iter().filter(|(_, row)| row.account.way == way);
            of_way.map(|(_, row)| row.bytes).sum()
        };
        Some(if sum(Way::Tx) >= sum(Way::Rx) {
            Way::Rx
        } else {
            Way::Tx
        })
    }

    fn close_bytes(
        &mut self,
        sku: &Sku,
        part: Part,
        price: Price,
        unit: i128,
        shares: &[Share],
        count_bytes: bool,
    ) -> Result<(), Overflow> {
        self.close(
            sku,
            part,
            price,
            unit,
            shares,
            count_bytes,
            BY_DAY_AND_BYTES,
            sku.unit(),
        )
    }

    /// Closes a pool: one product, one division, shares by largest remainder.
    #[expect(clippy::too_many_arguments, reason = "a pool has this many properties")]
    fn close(
        &mut self,
        sku: &Sku,
        part: Part,
        price: Price,
        divisor: i128,
        shares: &[Share],
        count_bytes: bool,
        method: &str,
        unit: String,
    ) -> Result<(), Overflow> {
        let weights: Vec<i128> = shares.iter().map(|share| share.quantity).collect();
        let quantity = weights
            .iter()
            .try_fold(0_i128, |sum, weight| sum.checked_add(*weight))
            .ok_or(Overflow)?;
        let product = quantity.checked_mul(price.numerator).ok_or(Overflow)?;
        let cost = divide_half_even(product, divisor * price.per_nano());
        let costs = allocate(cost, &weights)?;
        for (share, cost) in shares.iter().zip(costs) {
            self.charges.push(Charge {
                period: share.period,
                sku: sku.id.to_string(),
                part: part.clone(),
                account: share.account.clone(),
                unit: unit.clone(),
                quantity: share.quantity,
                divisor,
                price: price.numerator,
                price_decimals: price.decimals,
                wire_bytes: if count_bytes { share.wire_bytes } else { 0 },
                cost,
                method: method.to_owned(),
                estimated: share.estimated,
            });
        }
        self.pools.push(Pool {
            sku: sku.id.to_string(),
            part,
            price,
            quantity,
            divisor,
            cost: Nanos(cost),
        });
        Ok(())
    }

    /// The fees of one version's days, shared by that day's bytes.
    fn fixed(
        &mut self,
        version: usize,
        by_sku: &BTreeMap<usize, Vec<DayBytes>>,
    ) -> Result<(), Overflow> {
        let book = self.book;
        let sku = &book.skus[version];
        let Some(fee) = sku.fixed_per_day else {
            return Ok(());
        };
        let price = sku.price(fee);
        let none = Vec::new();
        let rows = by_sku.get(&version).unwrap_or(&none);
        for (index, (date, period)) in self.days.list.clone().into_iter().enumerate() {
            if !sku.effective.contains(date) || period.start >= self.days.until {
                continue;
            }
            let today: Vec<&DayBytes> = rows.iter().filter(|row| row.day == index).collect();
            let mut shares: Vec<Share> = today
                .iter()
                .map(|row| Share {
                    period,
                    account: row.account.clone(),
                    quantity: row.bytes,
                    wire_bytes: 0,
                    estimated: row.account.estimated,
                })
                .collect();
            if shares.is_empty() {
                shares.push(Share {
                    period,
                    account: nobody(sku),
                    quantity: 1,
                    wire_bytes: 0,
                    estimated: false,
                });
            }
            // A day in billionths, so that each share of it is an exact decimal.
            let weights: Vec<i128> = shares.iter().map(|share| share.quantity).collect();
            for (share, part) in shares.iter_mut().zip(allocate(DAY, &weights)?) {
                share.quantity = part;
            }
            self.close(
                sku,
                Part::Fixed,
                price,
                DAY,
                &shares,
                false,
                BY_BYTES,
                "Days".into(),
            )?;
        }
        Ok(())
    }
}

/// Parts of a day that a fee is shared in.
const DAY: i128 = 1_000_000_000;

/// The account of a SKU's fees that no traffic carries.
fn nobody(sku: &Sku) -> Account {
    Account {
        interface: sku.interfaces.first().cloned().unwrap_or_default(),
        side: sku.leg,
        way: match sku.direction {
            SkuDirection::Only(way) => way,
            SkuDirection::Both | SkuDirection::MaxInOut => Way::Tx,
        },
        class: sku
            .class
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        kind: Kind::Account,
        endpoint: String::new(),
        route: String::new(),
        service: String::new(),
        tenant: String::new(),
        estimated: false,
    }
}

fn unit_bytes(sku: &Sku) -> i128 {
    match sku.basis {
        Basis::Bytes { unit } => i128::from(unit.get()),
        Basis::PeakMbpsDay(_) | Basis::Percentile { .. } => super::book::BPS_PER_MBPS,
    }
}

/// What one unit costs in a part.
fn part_price(sku: &Sku, part: &Part) -> UnitPrice {
    match part {
        Part::Tier(number) => sku
            .tiers
            .get(number.saturating_sub(1))
            .map_or(UnitPrice::ZERO, |tier| tier.price),
        _ => UnitPrice::ZERO,
    }
}

/// Cuts the volume `[position, position + volume)` of a pool at its free allowance and tiers.
/// `total` is the whole pool's volume, which alone decides the tier where tiers are by whole
/// volume. All in bytes (or bit/s), of which `unit` make one unit.
fn pieces(sku: &Sku, unit: i128, position: i128, volume: i128, total: i128) -> Vec<(Part, i128)> {
    let mut pieces = Vec::new();
    let end = position + volume;
    let mut at = position;
    let free = i128::from(sku.free_units).saturating_mul(unit);
    if at < free && volume > 0 {
        let to = end.min(free);
        pieces.push((Part::Free, to - at));
        at = to;
    }
    let bound = |tier: &super::book::Tier| {
        tier.to
            .map_or(i128::MAX, |to| i128::from(to).saturating_mul(unit))
    };
    if sku.tier_mode == TierMode::WholeVolume {
        // A volume that just reaches a bound is still below it.
        let index = sku.tiers.iter().position(|tier| total <= bound(tier));
        let index = index.unwrap_or(sku.tiers.len().saturating_sub(1));
        if at < end {
            pieces.push((Part::Tier(index + 1), end - at));
        }
        return pieces;
    }
    for (index, tier) in sku.tiers.iter().enumerate() {
        let to = end.min(bound(tier));
        if at < to {
            pieces.push((Part::Tier(index + 1), to - at));
            at = to;
        }
    }
    pieces
}
