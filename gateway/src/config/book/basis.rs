//! What a SKU's quantity is measured in: bytes, or megabits per second sampled over the month.

use std::num::NonZeroU64;
use std::ops::Range;

use toml::Spanned;

use super::raw::RawSku;
use crate::config::check::Checker;
use crate::cost::book::{Basis, Commit, Method, Sampling};
use crate::cost::exact::is_finite;

impl Checker<'_> {
    pub(super) fn basis(&mut self, at: Range<usize>, raw: &RawSku, here: &str) -> Option<Basis> {
        #[derive(Clone, Copy, PartialEq)]
        enum Word {
            Bytes,
            Peak,
            Percentile,
        }
        let field = |name: &str| format!("{here}.{name}");
        let word = match &raw.basis {
            None => Word::Bytes,
            Some(text) => self.choice(
                text,
                &field("basis"),
                &[
                    ("bytes", Word::Bytes),
                    ("peak_mbps_day", Word::Peak),
                    ("p95", Word::Percentile),
                ],
            )?,
        };
        let sampled = word != Word::Bytes;
        let only = [
            (
                "sample_s",
                raw.sample_s.as_ref().map(Spanned::span),
                sampled,
            ),
            (
                "mbps_decimals",
                raw.mbps_decimals.as_ref().map(Spanned::span),
                sampled,
            ),
            (
                "unit_bytes",
                raw.unit_bytes.as_ref().map(Spanned::span),
                !sampled,
            ),
            (
                "method",
                raw.method.as_ref().map(Spanned::span),
                word == Word::Percentile,
            ),
            (
                "prorate",
                raw.prorate.as_ref().map(Spanned::span),
                word == Word::Percentile,
            ),
            (
                "commit",
                raw.commit.as_ref().map(|commit| commit.cap_mbps.span()),
                word == Word::Percentile,
            ),
        ];
        let mut fits = Some(());
        for (name, written, belongs) in only {
            if let Some(span) = written
                && !belongs
            {
                let wrong = "has no meaning with this basis";
                self.report(span, field(name), wrong, "delete it, or change `basis`");
                fits = None;
            }
        }
        fits?;
        if word == Word::Bytes {
            let Some(unit) = &raw.unit_bytes else {
                let wrong = "is missing, and 1 GiB is 7.37 % more than 1 GB";
                let fix = "add `unit_bytes = 1073741824` or `unit_bytes = 1000000000`, as the \
                           provider bills";
                self.report(at, field("unit_bytes"), wrong, fix);
                return None;
            };
            let range = 1..=1_i64 << 60;
            let bytes = self.number::<u64>(Some(unit), &field("unit_bytes"), range, 1)?;
            if !is_finite(bytes) {
                let wrong = format!(
                    "{bytes} has other prime factors than 2 and 5: a quantity \
                                     would have no exact decimal"
                );
                let fix = "write such as 1000000000 or 1073741824";
                self.report(unit.span(), field("unit_bytes"), wrong, fix);
                return None;
            }
            return NonZeroU64::new(bytes).map(|unit| Basis::Bytes { unit });
        }
        let sample = raw.sample_s.as_ref();
        let seconds = self.number::<i64>(sample, &field("sample_s"), 60..=3_600, 300);
        let decimals = raw.mbps_decimals.as_ref();
        let decimals = self.number::<u8>(decimals, &field("mbps_decimals"), 0..=6, 6);
        let sampling = Sampling {
            seconds: seconds?,
            decimals: decimals?,
        };
        if 3_600 % sampling.seconds != 0 || sampling.seconds % 60 != 0 {
            let span = sample.map_or(at, Spanned::span);
            let wrong = format!(
                "{} s is not whole minutes that divide an hour",
                sampling.seconds
            );
            self.report(span, field("sample_s"), wrong, "write such as 300");
            return None;
        }
        if word == Word::Peak {
            return Some(Basis::PeakMbpsDay(sampling));
        }
        let method = self.sampled_method(at, raw, here)?;
        let commit = match &raw.commit {
            None => None,
            Some(raw) => {
                let here = field("commit");
                let cap = format!("{here}.cap_mbps");
                let cap = self.number::<u64>(Some(&raw.cap_mbps), &cap, 1..=1_000_000_000, 1);
                let floor = format!("{here}.floor_pct");
                let floor = self.number::<u64>(Some(&raw.floor_pct), &floor, 0..=100, 0);
                let effective = self.dates(raw.from.as_ref(), raw.until.as_ref(), &here);
                Some(Commit {
                    cap_mbps: cap?,
                    floor_pct: floor?,
                    effective: effective?,
                })
            }
        };
        let valid_days = match &raw.prorate {
            None => false,
            Some(text) => self.choice(
                text,
                &field("prorate"),
                &[("valid_days", true), ("none", false)],
            )?,
        };
        Some(Basis::Percentile {
            sampling,
            method,
            commit,
            valid_days,
        })
    }

    fn sampled_method(&mut self, at: Range<usize>, raw: &RawSku, here: &str) -> Option<Method> {
        let here = format!("{here}.method");
        let Some(method) = &raw.method else {
            let wrong = "is missing: providers count differently";
            let fix = "add `method = { drop_top_pct = 5 }` or \
                       `method = { day_rank = 5, month_mean_top = 5 }`";
            self.report(at, here, wrong, fix);
            return None;
        };
        let raw = method.get_ref();
        match (&raw.day_rank, &raw.month_mean_top, &raw.drop_top_pct) {
            (Some(rank), Some(top), None) => {
                let rank = self.number(Some(rank), &format!("{here}.day_rank"), 1..=60, 1);
                let top = self.number(Some(top), &format!("{here}.month_mean_top"), 1..=31, 1);
                Some(Method::DayRank {
                    day_rank: rank?,
                    month_mean_top: top?,
                })
            }
            (None, None, Some(percent)) => {
                let field = format!("{here}.drop_top_pct");
                let percent = self.number(Some(percent), &field, 0..=99, 5)?;
                Some(Method::DropTop { percent })
            }
            _ => {
                let wrong = "is neither a day's rank with a month's mean, nor a share to drop";
                let fix = "write `{ drop_top_pct = 5 }` or `{ day_rank = 5, month_mean_top = 5 }`";
                self.report(method.span(), here, wrong, fix);
                None
            }
        }
    }
}
