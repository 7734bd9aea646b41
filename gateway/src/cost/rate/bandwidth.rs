//! Daily peaks and 95th percentiles: samples, which of them are billed, and who was in them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    DayBytes, Rating, Share,
    days::{Sample, has_gap},
    nobody, part_price, pieces,
};
use crate::{
    cost::{
        bill::Part,
        book::{BPS_PER_MBPS, Basis, Commit, Method, Sampling, Sku, SkuDirection},
        calendar::Period,
        exact::{allocate, divide_half_even},
        usage::{Account, Usage, Way},
    },
    money::Overflow,
};

/// Recorded in rows that share a day's peak.
const BY_PEAK: &str = "edgemeter.day-peak.share.v1";

/// What is billed: bit/s, and the bytes that were in the samples it comes from.
struct Billable {
    bps: i128,
    weights: BTreeMap<Account, i128>,
}

impl Rating<'_> {
    pub(super) fn bandwidth(
        &mut self,
        version: usize,
        rows: &[DayBytes],
        usage: &Usage,
    ) -> Result<(), Overflow> {
        let book = self.book;
        let sku = &book.skus[version];
        let interfaces: BTreeSet<String> = rows
            .iter()
            .map(|row| row.account.interface.clone())
            .collect();
        let gap = |period: Period| has_gap(usage, interfaces.iter().map(String::as_str), period);
        for row in rows {
            self.unpriced(row.clone(), &sku.id, Part::Measured);
        }
        match &sku.basis {
            Basis::Bytes { .. } => Ok(()),
            Basis::PeakMbpsDay(sampling) => {
                let samples = self.samples(version, *sampling, usage)?;
                for (day, samples) in samples {
                    let period = self.days.list[day].1;
                    let Some((value, sample)) = ranked(sku, &samples).into_iter().next() else {
                        continue;
                    };
                    let bps = rounded(value * 8, i128::from(sampling.seconds), *sampling);
                    let billable = Billable {
                        bps,
                        weights: counted(sku, sample),
                    };
                    self.share(sku, period, &billable, BY_PEAK, gap(period))?;
                }
                Ok(())
            }
            Basis::Percentile {
                sampling,
                method,
                commit,
                valid_days,
            } => {
                let samples = self.samples(version, *sampling, usage)?;
                let in_force: Vec<usize> = (0..self.days.list.len())
                    .filter(|&day| sku.effective.contains(self.days.list[day].0))
                    .collect();
                let (Some(first), Some(last)) = (in_force.first(), in_force.last()) else {
                    return Ok(());
                };
                let period = Period {
                    start: self.days.list[*first].1.start,
                    end: self.days.list[*last].1.end,
                };
                let counted_days: Vec<usize> = in_force
                    .iter()
                    .copied()
                    .filter(|day| !valid_days || samples.contains_key(day))
                    .collect();
                let mut billable =
                    self.percentile(sku, *sampling, *method, &samples, &counted_days)?;
                let floor = self.floor(commit.as_ref(), *sampling, &in_force)?;
                billable.bps = billable.bps.max(floor);
                self.share(sku, period, &billable, &method.id(), gap(period))
            }
        }
    }

    /// This version's samples with traffic, by day.
    fn samples(
        &self,
        version: usize,
        sampling: Sampling,
        usage: &Usage,
    ) -> Result<BTreeMap<usize, BTreeMap<i64, Sample>>, Overflow> {
        let mut samples: BTreeMap<usize, BTreeMap<i64, Sample>> = BTreeMap::new();
        for row in &usage.rows {
            let cuts = self.days.cut(row).map_err(|_| Overflow)?;
            for (day, piece, bytes) in cuts {
                let (date, whole) = self.days.list[day];
                if self.book.find(&row.account, date) != Some(version) {
                    continue;
                }
                // Samples begin with the day, so that 23 and 25 hours are whole samples too.
                let begin = |at: i64| at - (at - whole.start).rem_euclid(sampling.seconds);
                let mut parts = Vec::new();
                let mut at = begin(piece.start);
                while at < piece.end {
                    let slot = Period {
                        start: at,
                        end: at + sampling.seconds,
                    };
                    if let Some(part) = slot.meet(piece) {
                        parts.push((at, i128::from(part.seconds())));
                    }
                    at = slot.end;
                }
                let weights: Vec<i128> = parts.iter().map(|(_, seconds)| *seconds).collect();
                let shares = allocate(bytes, &weights)?;
                let spread = parts.len() > 1 || piece != row.period;
                for ((at, _), share) in parts.into_iter().zip(shares) {
                    let mut account = row.account.clone();
                    account.estimated |= spread;
                    let sample = samples.entry(day).or_default().entry(at).or_default();
                    *sample.accounts.entry(account).or_default() += share;
                }
            }
        }
        Ok(samples)
    }

    fn percentile(
        &self,
        sku: &Sku,
        sampling: Sampling,
        method: Method,
        samples: &BTreeMap<usize, BTreeMap<i64, Sample>>,
        days: &[usize],
    ) -> Result<Billable, Overflow> {
        let mut chosen: Vec<(i128, &Sample)> = Vec::new();
        // How many samples the figure is the mean of; those without traffic count as zero.
        let mut of: usize = 1;
        match method {
            Method::DropTop { percent } => {
                let mut all: Vec<(i128, &Sample)> = Vec::new();
                let mut count: usize = 0;
                for day in days {
                    let whole = self.days.list[*day].1;
                    let known = whole.end.min(self.days.until) - whole.start;
                    count += usize::try_from(known.max(0) / sampling.seconds).unwrap_or(0);
                    if let Some(samples) = samples.get(day) {
                        all.extend(ranked(sku, samples));
                    }
                }
                // Stable: of equal samples the earlier one counts as larger.
                all.sort_by_key(|found| std::cmp::Reverse(found.0));
                chosen.extend(all.get(count * percent / 100));
            }
            Method::DayRank {
                day_rank,
                month_mean_top,
            } => {
                let mut ranks: Vec<(i128, &Sample)> = days
                    .iter()
                    .filter_map(|day| ranked(sku, samples.get(day)?).into_iter().nth(day_rank - 1))
                    .collect();
                ranks.sort_by_key(|found| std::cmp::Reverse(found.0));
                ranks.truncate(month_mean_top);
                of = month_mean_top.min(days.len()).max(1);
                chosen = ranks;
            }
        }
        let mut weights: BTreeMap<Account, i128> = BTreeMap::new();
        let mut sum: i128 = 0;
        for (value, sample) in &chosen {
            sum += value;
            for (account, bytes) in counted(sku, sample) {
                *weights.entry(account).or_default() += bytes;
            }
        }
        let month = self.month_days();
        let numerator = sum
            .checked_mul(8)
            .and_then(|bits| bits.checked_mul(int(days.len())))
            .ok_or(Overflow)?;
        let bps = rounded(
            numerator,
            i128::from(sampling.seconds) * int(of) * month,
            sampling,
        );
        Ok(Billable { bps, weights })
    }

    /// The commitment's floor in bit/s, for the days on which it was in force.
    fn floor(
        &self,
        commit: Option<&Commit>,
        sampling: Sampling,
        in_force: &[usize],
    ) -> Result<i128, Overflow> {
        let Some(commit) = commit else {
            return Ok(0);
        };
        let days = in_force
            .iter()
            .map(|&day| self.days.list[day])
            .filter(|(date, day)| commit.effective.contains(*date) && day.start < self.days.until)
            .count();
        let numerator = i128::from(commit.cap_mbps)
            .checked_mul(i128::from(commit.floor_pct) * BPS_PER_MBPS)
            .and_then(|cap| cap.checked_mul(int(days)))
            .ok_or(Overflow)?;
        Ok(rounded(numerator, 100 * self.month_days(), sampling))
    }

    fn month_days(&self) -> i128 {
        int(self.days.list.len()).max(1)
    }

    /// Prices a bandwidth and shares it by who was in its samples.
    fn share(
        &mut self,
        sku: &Sku,
        period: Period,
        billable: &Billable,
        method: &str,
        gap: bool,
    ) -> Result<(), Overflow> {
        let mut accounts: Vec<(Account, i128)> = billable
            .weights
            .iter()
            .filter(|(_, bytes)| **bytes > 0)
            .map(|(account, bytes)| (account.clone(), *bytes))
            .collect();
        if accounts.is_empty() {
            // A commitment that nobody used is the account's own.
            accounts.push((nobody(sku), 1));
        }
        let weights: Vec<i128> = accounts.iter().map(|(_, bytes)| *bytes).collect();
        for (part, piece) in pieces(sku, BPS_PER_MBPS, 0, billable.bps, billable.bps) {
            let shares: Vec<Share> = allocate(piece, &weights)?
                .into_iter()
                .zip(&accounts)
                .map(|(quantity, (account, _))| Share {
                    period,
                    account: account.clone(),
                    quantity,
                    wire_bytes: 0,
                    estimated: gap || account.estimated,
                })
                .collect();
            let price = sku.price(part_price(sku, &part));
            self.close(
                sku,
                part,
                price,
                BPS_PER_MBPS,
                &shares,
                false,
                method,
                sku.unit(),
            )?;
        }
        Ok(())
    }
}

/// A day's samples by value, largest first, of equal ones the earlier first.
fn ranked<'s>(sku: &Sku, samples: &'s BTreeMap<i64, Sample>) -> Vec<(i128, &'s Sample)> {
    let mut all: Vec<(i128, &Sample)> = samples
        .values()
        .map(|sample| (value(sku, sample), sample))
        .collect();
    all.sort_by_key(|found| std::cmp::Reverse(found.0));
    all
}

/// What a sample counts for, in bytes.
fn value(sku: &Sku, sample: &Sample) -> i128 {
    match sku.direction {
        SkuDirection::Only(_) | SkuDirection::Both => sample.sum(None),
        SkuDirection::MaxInOut => sample.sum(Some(Way::Tx)).max(sample.sum(Some(Way::Rx))),
    }
}

/// The accounts that make up a sample's value.
fn counted(sku: &Sku, sample: &Sample) -> BTreeMap<Account, i128> {
    let only = match sku.direction {
        SkuDirection::MaxInOut => {
            let sent = sample.sum(Some(Way::Tx)) >= sample.sum(Some(Way::Rx));
            Some(if sent { Way::Tx } else { Way::Rx })
        }
        SkuDirection::Only(_) | SkuDirection::Both => None,
    };
    sample
        .accounts
        .iter()
        .filter(|(account, _)| only.is_none_or(|way| account.way == way))
        .map(|(account, bytes)| (account.clone(), *bytes))
        .collect()
}

/// A bandwidth in bit/s, rounded half to even to the decimals of a Mbps that the SKU keeps.
fn rounded(bits: i128, seconds: i128, sampling: Sampling) -> i128 {
    let step = 10_i128.pow(6 - u32::from(sampling.decimals.min(6)));
    divide_half_even(bits, seconds * step) * step
}

fn int(count: usize) -> i128 {
    i128::try_from(count).unwrap_or(i128::MAX)
}
