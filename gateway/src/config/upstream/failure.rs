//! What is done about servers that fail: retries, ejection, checks and limits.

use std::ops::Range;
use std::time::Duration;

use super::raw::{RawCheck, RawEjection, RawLimits, RawUpstream};
use super::{CheckKind, Ejection, HealthCheck, Retry, UpstreamLimits};
use crate::config::check::Checker;
use crate::config::pattern::PathPattern;
use crate::config::raw::Number;

impl Checker<'_> {
    pub(super) fn retry(&mut self, raw: &RawUpstream, here: &str) -> Option<Retry> {
        let attempts = raw.retries.as_ref();
        let attempts = self.number(attempts, &format!("{here}.retries"), 0..=5, 1);
        let raw = &raw.retry;
        let here = format!("{here}.retry");
        let statuses = match &raw.statuses {
            None => Some(vec![502, 503, 504]),
            Some(list) => {
                let checked = list.iter().enumerate().map(|(index, number)| {
                    let field = format!("{here}.statuses[{index}]");
                    self.number(Some(number), &field, 500..=599, 503)
                });
                checked.collect::<Vec<_>>().into_iter().collect()
            }
        };
        let percent = raw.budget_percent.as_ref();
        let percent = self.number(percent, &format!("{here}.budget_percent"), 0..=1_000, 20);
        let reserve = raw.budget_reserve.as_ref();
        let field = format!("{here}.budget_reserve");
        let reserve = self.number(reserve, &field, 0..=1_000_000, 100);
        Some(Retry {
            attempts: attempts?,
            statuses: statuses?,
            budget_percent: percent?,
            budget_reserve: reserve?,
            idempotency_key: raw.idempotency_key.unwrap_or(true),
        })
    }

    pub(super) fn ejection(&mut self, raw: &RawEjection, here: &str) -> Option<Ejection> {
        let mut number = |raw: &Option<Number>, key: &str, default: i64, most: i64| {
            self.number::<u32>(raw.as_ref(), &format!("{here}.{key}"), 0..=most, default)
        };
        let connect_failures = number(&raw.connect_failures, "connect_failures", 3, 1_000);
        let server_errors = number(&raw.server_errors, "server_errors", 5, 1_000);
        let base = number(&raw.base_ms, "base_ms", 1_000, 3_600_000);
        let max = number(&raw.max_ms, "max_ms", 30_000, 3_600_000);
        let panic_percent = number(&raw.panic_percent, "panic_percent", 34, 100);
        let base = Duration::from_millis(base?.into());
        Some(Ejection {
            connect_failures: connect_failures?,
            server_errors: server_errors?,
            base,
            max: Duration::from_millis(max?.into()).max(base),
            panic_percent: panic_percent?,
        })
    }

    pub(super) fn health_check(
        &mut self,
        raw: &RawCheck,
        at: Range<usize>,
        here: &str,
    ) -> Option<HealthCheck> {
        let kind = match (&raw.path, &raw.grpc, raw.tcp) {
            (Some(text), None, None) => {
                let field = format!("{here}.path");
                let path = PathPattern::exact(text.get_ref());
                let host = raw.host.as_ref().map(|host| host.get_ref().as_str().into());
                self.accepted(path, text, &field).map(|_| CheckKind::Http {
                    path: text.get_ref().as_str().into(),
                    host,
                })
            }
            (None, Some(text), None) => Some(CheckKind::Grpc {
                service: text.get_ref().as_str().into(),
            }),
            (None, None, Some(true)) => Some(CheckKind::Tcp),
            _ => {
                let fix = "write one of `path`, `grpc` and `tcp = true`";
                self.report(at, here, "does not say what to ask", fix);
                None
            }
        };
        let mut number = |raw: &Option<Number>, key: &str, least: i64, most: i64, default: i64| {
            self.number::<u32>(
                raw.as_ref(),
                &format!("{here}.{key}"),
                least..=most,
                default,
            )
        };
        let interval = number(&raw.interval_ms, "interval_ms", 10, 3_600_000, 1_000);
        let timeout = number(&raw.timeout_ms, "timeout_ms", 1, 60_000, 1_000);
        let healthy = number(&raw.healthy, "healthy", 1, 100, 2);
        let unhealthy = number(&raw.unhealthy, "unhealthy", 1, 100, 3);
        Some(HealthCheck {
            kind: kind?,
            interval: Duration::from_millis(interval?.into()),
            timeout: Duration::from_millis(timeout?.into()),
            healthy: healthy?,
            unhealthy: unhealthy?,
        })
    }

    pub(super) fn upstream_limits(
        &mut self,
        raw: &RawLimits,
        here: &str,
    ) -> Option<UpstreamLimits> {
        let mut number = |raw: &Option<Number>, key: &str| {
            let field = format!("{here}.{key}");
            self.number::<u32>(raw.as_ref(), &field, 1..=10_000_000, 10_000_000)
        };
        let requests = number(&raw.requests, "requests");
        let pending = number(&raw.pending, "pending");
        let per_peer = number(&raw.per_peer, "per_peer");
        Some(UpstreamLimits {
            requests: requests?,
            pending: pending?,
            per_peer: per_peer?,
        })
    }
}
