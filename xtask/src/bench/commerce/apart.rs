//! What each part of a case took: processor time of generator, gateway and service, and what the
//! service's own histograms say of storage and of everything between request and answer.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::bench::accounting;
use crate::exposition::Exposition;

/// From a request's arrival in the handler to its committed answer, queue included.
const DEDUCT: &str = "commerce_deduct_duration_seconds";
/// One COMMIT: the write and the sync of the log.
const COMMIT: &str = "commerce_writer_commit_duration_seconds";
const BATCH: &str = "commerce_writer_batch_commands";

/// Counters at one moment.
pub(super) struct Reading {
    generator_ns: u64,
    gateway_ns: u64,
    service_ns: u64,
    machine_ns: u64,
    page: Exposition,
}

impl Reading {
    /// Reads them. The page is the service's `/metrics`.
    pub(super) fn take(page: Exposition, service: u32, gateway: Option<u32>) -> Result<Self> {
        Ok(Self {
            generator_ns: accounting::own_ns(),
            gateway_ns: gateway.map_or(Ok(0), accounting::cpu_ns)?,
            service_ns: accounting::cpu_ns(service)?,
            machine_ns: accounting::machine_ns()?,
            page,
        })
    }

    /// What the service took in until then, minor units.
    pub(super) fn revenue_minor(&self) -> u64 {
        let sum = self
            .page
            .sum("commerce_revenue_minor_units_total", |_| true);
        u64::try_from(sum).unwrap_or(0)
    }

    /// What happened since `before`, over `took`.
    pub(super) fn since(&self, before: &Self, took: Duration) -> Result<Apart> {
        let percent = |now: u64, then: u64| {
            let whole = u64::try_from(took.as_nanos().max(1)).unwrap_or(u64::MAX);
            now.saturating_sub(then).saturating_mul(100) / whole
        };
        let between = |name| Histogram::between(&before.page, &self.page, name);
        Ok(Apart {
            generator: percent(self.generator_ns, before.generator_ns),
            gateway: percent(self.gateway_ns, before.gateway_ns),
            service: percent(self.service_ns, before.service_ns),
            machine: percent(self.machine_ns, before.machine_ns),
            deduct: between(DEDUCT)?,
            commit: between(COMMIT)?,
            batch: between(BATCH)?,
        })
    }
}

/// What happened in a case. Processor time is in percent of one processor.
pub(super) struct Apart {
    generator: u64,
    gateway: u64,
    service: u64,
    machine: u64,
    deduct: Histogram,
    commit: Histogram,
    batch: Histogram,
}

impl Apart {
    pub(super) const HEADING: &str = "generator % gateway % service % machine % | deduct mean  p99 ms | commit mean  p99 ms | orders/commit";

    /// One row of the table under [`Apart::HEADING`].
    pub(super) fn row(&self) -> String {
        let ms = |us: u64| format!("{}.{:02}", us / 1000, us % 1000 / 10);
        format!(
            "{:>11} {:>9} {:>9} {:>9} | {:>11} {:>7} | {:>11} {:>7} | {:>13}",
            self.generator,
            self.gateway,
            self.service,
            self.machine,
            ms(self.deduct.mean_micros()),
            ms(self.deduct.at_micros(990)),
            ms(self.commit.mean_micros()),
            ms(self.commit.at_micros(990)),
            self.batch.mean_micros() / 1_000_000,
        )
    }
}

/// What a histogram counted between two scrapes. Values are kept in millionths of their unit.
struct Histogram {
    /// Upper bound and how many were not above it, ascending; the last has no bound.
    buckets: Vec<(u64, u64)>,
    count: u64,
    sum: u64,
}

impl Histogram {
    fn between(before: &Exposition, after: &Exposition, name: &str) -> Result<Self> {
        let (buckets, count, sum) = (
            format!("{name}_bucket"),
            format!("{name}_count"),
            format!("{name}_sum"),
        );
        let of = |page: &Exposition, name: &str, le: Option<&str>| {
            page.named(name)
                .filter(|sample| le.is_none_or(|le| sample.label("le") == le))
                .map(|sample| micros(&sample.value))
                .sum::<u64>()
        };
        let grew =
            |name: &str, le: Option<&str>| of(after, name, le).saturating_sub(of(before, name, le));
        let mut found: Vec<(u64, u64)> = after
            .named(&buckets)
            .map(|sample| {
                let le = sample.label("le");
                let bound = if le == "+Inf" { u64::MAX } else { micros(le) };
                (bound, grew(&buckets, Some(le)) / 1_000_000)
            })
            .collect();
        found.sort_unstable();
        found
            .last()
            .with_context(|| format!("no {name} in the scrape"))?;
        Ok(Self {
            buckets: found,
            count: grew(&count, None) / 1_000_000,
            sum: grew(&sum, None),
        })
    }

    fn mean_micros(&self) -> u64 {
        self.sum / self.count.max(1)
    }

    /// The value that `per_mille` do not exceed, on a straight line within its bucket; of the
    /// last bucket, its lower bound.
    fn at_micros(&self, per_mille: u64) -> u64 {
        let rank = self.count.saturating_mul(per_mille).div_ceil(1000);
        let (mut lower, mut below) = (0, 0);
        for &(upper, within) in &self.buckets {
            if within >= rank && upper < u64::MAX {
                let inside = (within - below).max(1);
                return lower + (upper - lower) * (rank - below) / inside;
            }
            if upper < u64::MAX {
                (lower, below) = (upper, within);
            }
        }
        lower
    }
}

/// A decimal number in millionths; 0 when it is none.
fn micros(text: &str) -> u64 {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().unwrap_or(0)),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    // Digits behind the point of the result: six, moved by the exponent.
    let digits = format!("{whole}{fraction}");
    let kept = i32::try_from(whole.len()).unwrap_or(0) + exponent + 6;
    let Ok(kept) = usize::try_from(kept) else {
        return 0;
    };
    let padded = format!("{digits:0<kept$}");
    padded[..kept].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_read_to_the_millionth() {
        let cases = [
            ("0.0025", 2_500),
            ("12", 12_000_000),
            ("1e-3", 1_000),
            ("1.5e1", 15_000_000),
            ("0.1234567", 123_456),
            ("1e-9", 0),
            ("x", 0),
        ];
        for (text, expected) in cases {
            assert_eq!(micros(text), expected, "{text}");
        }
    }

    #[test]
    fn a_histogram_between_two_scrapes_is_of_what_happened_between_them() {
        let page = |low: u64, high: u64, all: u64, sum: &str| {
            let text = format!(
                "h_bucket{{le=\"0.001\"}} {low}\nh_bucket{{le=\"0.002\"}} {high}\n\
                 h_bucket{{le=\"+Inf\"}} {all}\nh_count {all}\nh_sum {sum}\n"
            );
            Exposition::parse(&text).unwrap()
        };
        let between = |after| Histogram::between(&page(10, 10, 10, "0.005"), &after, "h").unwrap();
        let histogram = between(page(60, 110, 110, "0.155"));
        assert_eq!(histogram.mean_micros(), 1_500);
        assert_eq!(histogram.at_micros(500), 1_000);
        assert_eq!(histogram.at_micros(990), 1_980);
        // Beyond the last bound all that is known is that it is beyond.
        assert_eq!(between(page(10, 10, 20, "0.5")).at_micros(990), 2_000);
    }
}
