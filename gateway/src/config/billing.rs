//! Where the ledger is, for how long it keeps what, and whom it tells.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::Name;
use super::check::{Checker, Seen};
use super::raw::{Number, RawBudget, RawConfig, RawPush, RawRetention, Text};
use crate::budget::{Action, Budget, Limit, PeriodKind, Scope};
use crate::cost::calendar::Zone;
use crate::ledger::{Place, Retention, outbox::Sink};
use crate::money::Nanos;
use crate::push::Secrets;

const SECONDS_A_DAY: u64 = 86_400;

/// A sink of usage events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushSink {
    /// Unique among sinks; what it has acknowledged is remembered under it.
    pub name: Name,
    /// Where batches are posted.
    pub url: String,
    /// Signing secrets, `whsec_…`, one a line, newest first.
    pub secret_file: Option<PathBuf>,
    /// A bearer token.
    pub token_file: Option<PathBuf>,
    /// The only certificate authority to trust, PEM.
    pub ca_file: Option<PathBuf>,
    /// Answers 200 when the sink has `{id}` (of `{source}`), 404 when not.
    pub confirm_url: Option<String>,
    /// Only these tenants' requests.
    pub tenants: Option<Vec<String>>,
    /// Also bytes that are nobody's.
    pub unattributed: bool,
    /// Events sent together at most.
    pub batch: i64,
    /// Length of a window, seconds.
    pub window_seconds: i64,
    /// For one attempt.
    pub timeout: Duration,
    /// For how long the sink recognises an event it has seen.
    pub dedupe: Duration,
    /// For how long acknowledged events are kept one by one.
    pub keep: Duration,
}

impl PushSink {
    /// What the ledger needs to know of it.
    #[must_use]
    pub fn outbox(&self) -> Sink {
        Sink {
            name: self.name.to_string(),
            window_seconds: self.window_seconds,
            tenants: self.tenants.clone(),
            unattributed: self.unattributed,
        }
    }
}

impl Checker<'_> {
    /// The machine's name unless given.
    pub(super) fn gateway_id(&mut self, raw: Option<&Text>) -> Option<String> {
        match raw {
            Some(text) => self
                .name(text.get_ref(), text.span(), "gateway.id")
                .map(|name| name.to_string()),
            None => {
                let host = std::fs::read_to_string("/proc/sys/kernel/hostname");
                let host = host.unwrap_or_default().trim().to_ascii_lowercase();
                Some(Name::new(&host).map_or_else(|| "local".into(), |name| name.to_string()))
            }
        }
    }

    pub(super) fn ledger(&mut self, raw: Option<&Text>, state_dir: Option<&Path>) -> Option<Place> {
        let Some(text) = raw else {
            return state_dir.map(Place::in_directory);
        };
        let fix = "write such as `postgres://user:password@host:5432/database`, or leave it out \
                   for a file in gateway.state_dir";
        let url = text.get_ref();
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            self.report(
                text.span(),
                "gateway.ledger",
                "is not a postgres:// URL",
                fix,
            );
            return None;
        }
        match Place::shared(url) {
            Ok(place) => Some(place),
            Err(wrong) => {
                self.report(text.span(), "gateway.ledger", wrong, fix);
                None
            }
        }
    }

    pub(super) fn retention(&mut self, raw: &RawRetention) -> Option<Retention> {
        let seconds = raw.seconds_for_minutes.as_ref();
        let seconds = self.number::<u64>(seconds, "retention.seconds_for_minutes", 0..=1_440, 0)?;
        let mut days = |raw: Option<&Number>, key: &str, default: Duration| {
            let default = i64::try_from(default.as_secs() / SECONDS_A_DAY).unwrap_or(1);
            let field = format!("retention.{key}");
            self.number::<u64>(raw, &field, 1..=36_500, default)
        };
        let default = Retention::default();
        let minutes = days(
            raw.minutes_for_days.as_ref(),
            "minutes_for_days",
            default.minutes,
        )?;
        let hours = days(raw.hours_for_days.as_ref(), "hours_for_days", default.hours)?;
        let kept = days(raw.days_for_days.as_ref(), "days_for_days", default.days)?;
        for (key, number, finer, coarser) in [
            ("hours_for_days", &raw.hours_for_days, minutes, hours),
            ("days_for_days", &raw.days_for_days, hours, kept),
        ] {
            if coarser < finer {
                let at = number.as_ref().map_or(0..0, Spanned::span);
                let wrong = format!("{coarser} days is shorter than the finer rows are kept");
                let fix = format!("write at least {finer}");
                self.report(at, format!("retention.{key}"), wrong, fix);
                return None;
            }
        }
        let days = |days: u64| Duration::from_secs(days * SECONDS_A_DAY);
        Some(Retention {
            seconds: Duration::from_secs(seconds * 60),
            minutes: days(minutes),
            hours: days(hours),
            days: days(kept),
        })
    }

    pub(super) fn push(&mut self, raw: &[Spanned<RawPush>]) -> Option<Vec<PushSink>> {
        let mut names = Seen::default();
        let mut urls: Seen<&str> = Seen::default();
        let mut sinks = Vec::new();
        for (index, raw) in raw.iter().enumerate() {
            let here = format!("push[{index}]");
            let raw = raw.get_ref();
            let name = self.unique_name(&mut names, &raw.name, &format!("{here}.name"));
            let url = self.url(&raw.url, &format!("{here}.url"));
            // The same events twice, under the same ids: one of the two would be dropped.
            let field = format!("{here}.url");
            let at = raw.url.span();
            let fix = "name each sink once; leave `tenants` out to send it everybody's";
            let once = self.unique(&mut urls, raw.url.get_ref().as_str(), at, &field, fix);
            sinks.push(self.sink(raw, &here, name, url.filter(|_| once.is_some())));
        }
        sinks.into_iter().collect()
    }

    fn sink(
        &mut self,
        raw: &RawPush,
        here: &str,
        name: Option<Name>,
        url: Option<String>,
    ) -> Option<PushSink> {
        let secret_file =
            self.secret_file(raw.secret_file.as_ref(), &format!("{here}.secret_file"));
        let token_file = match &raw.token_file {
            Some(text) => self.readable(text, &format!("{here}.token_file")).map(Some),
            None => Some(None),
        };
        let ca_file = match &raw.ca_file {
            Some(text) => {
                let field = format!("{here}.ca_file");
                self.pem_file(text, &field, "CERTIFICATE").map(Some)
            }
            None => Some(None),
        };
        let confirm_url = match &raw.confirm_url {
            Some(text) => self
                .confirm_url(text, &format!("{here}.confirm_url"))
                .map(Some),
            None => Some(None),
        };
        let tenants = match &raw.tenants {
            Some(list) => {
                let field = format!("{here}.tenants");
                let list = self.list(
                    list.get_ref(),
                    list.span(),
                    &field,
                    |checker, text, field| {
                        let name = checker.name(text.get_ref(), text.span(), field);
                        name.map(|name| name.to_string())
                    },
                );
                list.map(Some)
            }
            None => Some(None),
        };
        let unattributed = raw.unattributed.unwrap_or(false);
        if let Some(list) = raw.tenants.as_ref().filter(|_| unattributed) {
            let wrong = "`unattributed` bytes are no tenant's";
            let fix = "delete one of `tenants` and `unattributed`";
            self.report(list.span(), format!("{here}.tenants"), wrong, fix);
        }
        let mut number = |raw: Option<&Number>, key: &str, low, high, default| {
            self.number::<i64>(raw, &format!("{here}.{key}"), low..=high, default)
        };
        let batch = number(raw.batch.as_ref(), "batch", 1, 10_000, 100);
        let window = number(raw.window_seconds.as_ref(), "window_seconds", 1, 86_400, 60);
        let timeout = number(raw.timeout_ms.as_ref(), "timeout_ms", 100, 600_000, 10_000);
        let dedupe = number(
            raw.dedupe_seconds.as_ref(),
            "dedupe_seconds",
            60,
            315_360_000,
            86_400,
        );
        let keep = number(raw.keep_days.as_ref(), "keep_days", 1, 3_660, 35);
        Some(PushSink {
            name: name?,
            url: url?,
            secret_file: secret_file?,
            token_file: token_file?,
            ca_file: ca_file?,
            confirm_url: confirm_url?,
            tenants: tenants?,
            unattributed,
            batch: batch?,
            window_seconds: window?,
            timeout: Duration::from_millis(timeout?.unsigned_abs()),
            dedupe: Duration::from_secs(dedupe?.unsigned_abs()),
            keep: Duration::from_secs(keep?.unsigned_abs() * SECONDS_A_DAY),
        })
    }

    pub(super) fn budgets(&mut self, raw: &RawConfig) -> Option<Vec<Budget>> {
        let mut names = Seen::default();
        let mut budgets = Vec::new();
        for (index, budget) in raw.budgets.iter().enumerate() {
            let here = format!("budgets[{index}]");
            let name =
                self.unique_name(&mut names, &budget.get_ref().name, &format!("{here}.name"));
            budgets.push(self.budget(raw, budget, &here, name));
        }
        budgets.into_iter().collect()
    }

    fn budget(
        &mut self,
        all: &RawConfig,
        raw: &Spanned<RawBudget>,
        here: &str,
        name: Option<Name>,
    ) -> Option<Budget> {
        let at = raw.span();
        let raw = raw.get_ref();
        let kinds = [("day", PeriodKind::Day), ("month", PeriodKind::Month)];
        let period = self.choice(&raw.period, &format!("{here}.period"), &kinds);
        let limit = self.limit(all, raw, at, here);
        let known = all
            .routes
            .iter()
            .map(|route| route.get_ref().name.get_ref().as_str());
        let known: Vec<&str> = known.collect();
        let routes = self.names(raw.routes.as_ref(), &format!("{here}.routes"), Some(&known));
        let services = self.names(raw.services.as_ref(), &format!("{here}.services"), None);
        let tenants = self.names(raw.tenants.as_ref(), &format!("{here}.tenants"), None);
        let zone = self.zone(raw.timezone.as_ref(), &format!("{here}.timezone"));
        let warn_percent =
            self.percents(raw.warn_percent.as_ref(), &format!("{here}.warn_percent"));
        let action = self.choice_or(
            raw.action.as_ref(),
            &format!("{here}.action"),
            &[
                ("none", Action::None),
                ("warn", Action::Warn),
                ("throttle", Action::Throttle),
                ("refuse", Action::Refuse),
            ],
        );
        let field = format!("{here}.throttle_bytes_per_second");
        let throttle = raw.throttle_bytes_per_second.as_ref();
        if let Some(number) = throttle.filter(|_| action.is_some_and(|a| a != Action::Throttle)) {
            let fix = "write `action = \"throttle\"` or delete it";
            self.report(number.span(), &field, "is not used by this action", fix);
        }
        let throttle = self.number(throttle, &field, 1_000..=1_000_000_000_000, 1_000_000);
        Some(Budget {
            name: name?,
            scope: Scope {
                routes: routes?,
                services: services?,
                tenants: tenants?,
            },
            limit: limit?,
            period: period?,
            zone: zone?,
            warn_percent: warn_percent?,
            action: action?,
            throttle_bytes_per_second: throttle?,
        })
    }

    fn limit(
        &mut self,
        all: &RawConfig,
        raw: &RawBudget,
        at: Range<usize>,
        here: &str,
    ) -> Option<Limit> {
        match (&raw.limit_bytes, &raw.limit_money) {
            (Some(number), None) => {
                let field = format!("{here}.limit_bytes");
                let bytes = self.number::<i64>(Some(number), &field, 1..=i64::MAX, 1);
                bytes.map(|bytes| Limit::Bytes(bytes.into()))
            }
            (None, Some(text)) => {
                let field = format!("{here}.limit_money");
                if all.prices.is_none() {
                    let fix = "add a [prices] table, or write `limit_bytes`";
                    self.report(text.span(), field, "has no prices to be reached by", fix);
                    return None;
                }
                let money = self.parsed::<Nanos>(text, &field)?;
                if money.0 <= 0 {
                    self.report(text.span(), field, "is not more than nothing", "write more");
                    return None;
                }
                Some(Limit::Money(money))
            }
            _ => {
                let wrong = "needs exactly one of `limit_bytes` and `limit_money`";
                let fix = "write such as `limit_bytes = 1000000000000`";
                self.report(at, here, wrong, fix);
                None
            }
        }
    }

    fn names(
        &mut self,
        list: Option<&Spanned<Vec<Text>>>,
        field: &str,
        known: Option<&[&str]>,
    ) -> Option<Vec<Name>> {
        let Some(list) = list else {
            return Some(Vec::new());
        };
        self.list(
            list.get_ref(),
            list.span(),
            field,
            |checker, text, field| {
                if let Some(known) = known {
                    checker.reference(text, field, "route", known)?;
                }
                checker.name(text.get_ref(), text.span(), field)
            },
        )
    }

    fn zone(&mut self, text: Option<&Text>, field: &str) -> Option<Zone> {
        let Some(text) = text else {
            return Some(Zone::utc());
        };
        let zone = Zone::new(text.get_ref());
        if zone.is_none() {
            let wrong = format!("\"{}\" is not a time zone", text.get_ref());
            let fix = "write a name of the IANA database, such as \"Asia/Shanghai\"";
            self.report(text.span(), field, wrong, fix);
        }
        zone
    }

    fn percents(&mut self, list: Option<&Spanned<Vec<Number>>>, field: &str) -> Option<Vec<i64>> {
        let Some(list) = list else {
            return Some(vec![80]);
        };
        let numbers = list.get_ref().iter().enumerate();
        let numbers: Vec<Option<i64>> = numbers
            .map(|(index, number)| {
                self.number(Some(number), &format!("{field}[{index}]"), 1..=100, 1)
            })
            .collect();
        let mut numbers = numbers.into_iter().collect::<Option<Vec<i64>>>()?;
        numbers.sort_unstable();
        numbers.dedup();
        Some(numbers)
    }

    fn url(&mut self, text: &Text, field: &str) -> Option<String> {
        let url: Option<http::Uri> = text.get_ref().parse().ok();
        let web = |uri: &http::Uri| {
            uri.host().is_some() && matches!(uri.scheme_str(), Some("http" | "https"))
        };
        if url.as_ref().is_some_and(web) {
            return Some(text.get_ref().clone());
        }
        let wrong = format!("\"{}\" is not an http or https URL", text.get_ref());
        let fix = "write such as \"https://meter.example/api/v1/events\"";
        self.report(text.span(), field, wrong, fix);
        None
    }

    fn confirm_url(&mut self, text: &Text, field: &str) -> Option<String> {
        if !text.get_ref().contains("{id}") {
            let fix = "write such as \"https://meter.example/api/v1/events/{id}\"";
            self.report(
                text.span(),
                field,
                "does not say where the event's `{id}` goes",
                fix,
            );
            return None;
        }
        // Braces are no URL yet.
        let filled = text
            .get_ref()
            .replace("{id}", "id")
            .replace("{source}", "source");
        let filled = Spanned::new(text.span(), filled);
        self.url(&filled, field).map(|_| text.get_ref().clone())
    }

    fn secret_file(&mut self, text: Option<&Text>, field: &str) -> Option<Option<PathBuf>> {
        let Some(text) = text else { return Some(None) };
        let path = self.path(text, field)?;
        match Secrets::read(&path) {
            Ok(_) => Some(Some(path)),
            Err(wrong) => {
                let fix = "put `whsec_` and `openssl rand -base64 32` into it";
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }

    fn readable(&mut self, text: &Text, field: &str) -> Option<PathBuf> {
        let path = self.path(text, field)?;
        match std::fs::read(&path) {
            Ok(_) => Some(path),
            Err(error) => {
                let wrong = format!("\"{}\" cannot be read: {error}", path.display());
                self.report(text.span(), field, wrong, "name an existing file");
                None
            }
        }
    }
}
