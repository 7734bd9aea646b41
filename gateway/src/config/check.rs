//! [`RawConfig`] to [`Config`]: ranges, addresses, names, files. `traffic` does the same for what
//! refers to each other: listeners, upstreams, routes.
//!
//! A check that fails reports and returns `None`; its siblings go on, so that one run reports all.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::book::shorthand_book;
use super::fields::example;
use super::problem::{ConfigError, Problem, Source, invalid, nearest, quoted};
use super::raw::{
    Number, RawAccessLog, RawAdmin, RawConfig, RawGateway, RawObserve, RawPrices, Text,
};
use super::{
    AccessLog, AccessLogTarget, Admin, Attach, Config, Direction, Gateway, KernelLog, Lane, Leg,
    Name, NetworkNamespace, Observe, Price, Prices,
};
use crate::cost::book::Book;
use crate::cost::exact::is_finite;
use crate::money::{Currency, Rate, UnitPrice};

const DEFAULT_STATE_DIR: &str = "/var/lib/edgemeter";
const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);
/// Where `ip netns` keeps the names.
const NAMESPACE_DIRECTORY: &str = "/run/netns";
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/edgemeter";
/// The longest interface name Linux allows (`IFNAMSIZ` less its NUL).
const INTERFACE_LENGTH_MAX: usize = 15;

pub(super) fn check(
    source: &Source<'_>,
    base: &Path,
    raw: &RawConfig,
) -> Result<Config, ConfigError> {
    let mut checker = Checker::new(source, base);
    let config = checker.config(raw);
    checker.finish(config)
}

pub(super) struct Checker<'a> {
    source: &'a Source<'a>,
    base: &'a Path,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn config(&mut self, raw: &RawConfig) -> Option<Config> {
        let gateway = self.gateway(&raw.gateway);
        let state_dir = gateway.as_ref().map(|gateway| gateway.state_dir.as_path());
        let admin = self.admin(&raw.admin, state_dir);
        let observe = match &raw.observe {
            Some(raw) => self.observe(raw.span(), raw.get_ref()),
            None => Some(None),
        };
        let access_log = match &raw.access_log {
            Some(raw) => self.access_log(raw).map(Some),
            None => Some(None),
        };
        let tokens = self.tokens(&raw.tokens);
        let forward_auth = self.forward_auth(&raw.forward_auth);
        let cache = self.cache(raw.cache.as_ref());
        let rate_store = match &raw.rate_limit_store {
            Some(raw) => self.rate_store(raw).map(Some),
            None => Some(None),
        };
        let traffic = self.traffic(raw, admin.as_ref().map(|admin| admin.listen), state_dir);
        let retention = self.retention(&raw.retention);
        let push = self.push(&raw.push);
        let budgets = self.budgets(raw);
        let prices = match &raw.prices {
            Some(raw) => self.prices(raw.span(), raw.get_ref()).map(Some),
            None => Some(None),
        };
        let classes = self.classes(&raw.classes);
        let tracing = match &raw.tracing {
            Some(raw) => self.tracing(raw).map(Some),
            None => Some(None),
        };
        let traffic = traffic?;
        Some(Config {
            gateway: gateway?,
            admin: admin?,
            observe: observe?,
            access_log: access_log?,
            listeners: traffic.listeners,
            upstreams: traffic.upstreams,
            experiments: traffic.experiments,
            routes: traffic.routes,
            classes: classes?,
            tokens: tokens?,
            forward_auth: forward_auth?,
            rate_store: rate_store?,
            cache: cache?,
            prices: prices?,
            retention: retention?,
            push: push?,
            budgets: budgets?,
            tracing: tracing?,
            text: self.source.text.into(),
        })
    }

    fn gateway(&mut self, raw: &RawGateway) -> Option<Gateway> {
        let state_dir = raw.state_dir.as_ref();
        let state_dir = match state_dir {
            Some(text) => self.path(text, "gateway.state_dir"),
            None => Some(DEFAULT_STATE_DIR.into()),
        };
        let threads = match &raw.threads {
            Some(number) => self
                .number::<usize>(Some(number), "gateway.threads", 1..=1024, 1)
                .and_then(NonZeroUsize::new),
            None => Some(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)),
        };
        let grace = raw.grace_seconds.as_ref();
        let grace = self.number(grace, "gateway.grace_seconds", 0..=3_600, 10);
        let delay = raw.drain_delay_seconds.as_ref();
        let delay = self.number(delay, "gateway.drain_delay_seconds", 0..=600, 0);
        let upgrade = raw.upgrade_timeout_seconds.as_ref();
        let upgrade = self.number(upgrade, "gateway.upgrade_timeout_seconds", 1..=3_600, 60);
        let id = self.gateway_id(raw.id.as_ref());
        let ledger = self.ledger(raw.ledger.as_ref(), state_dir.as_deref());
        let lane = self.choice_or(
            raw.lane.as_ref(),
            "gateway.lane",
            &[("auto", Lane::Auto), ("full", Lane::Full)],
        );
        Some(Gateway {
            lane: lane?,
            id: id?,
            ledger: ledger?,
            state_dir: state_dir?,
            threads: threads?,
            grace: Duration::from_secs(grace?),
            drain_delay: Duration::from_secs(delay?),
            upgrade_timeout: Duration::from_secs(upgrade?),
        })
    }

    fn admin(&mut self, raw: &RawAdmin, state_dir: Option<&Path>) -> Option<Admin> {
        let listen = match &raw.listen {
            Some(text) => self.address(text.get_ref(), text.span(), "admin.listen"),
            None => Some(DEFAULT_ADMIN),
        };
        let token_file = match &raw.token_file {
            Some(text) => self.path(text, "admin.token_file"),
            None => state_dir.map(|folder| folder.join("admin.token")),
        };
        Some(Admin {
            listen: listen?,
            token_file: token_file?,
        })
    }

    /// `Some(None)` when disabled; the rest of the table is checked all the same.
    fn observe(&mut self, at: Range<usize>, raw: &RawObserve) -> Option<Option<Observe>> {
        let enabled = raw.enabled.unwrap_or(true);
        let interfaces = match &raw.interfaces {
            Some(interfaces) => {
                let mut seen = Seen::default();
                let names: Vec<Option<String>> = interfaces
                    .get_ref()
                    .iter()
                    .enumerate()
                    .map(|(index, text)| {
                        let field = format!("observe.interfaces[{index}]");
                        self.interface(text, &field, &mut seen)
                    })
                    .collect();
                if names.is_empty() && enabled {
                    let fix = r#"write `interfaces = ["eth0"]` or `enabled = false`"#;
                    self.report(interfaces.span(), "observe.interfaces", "is empty", fix);
                }
                names.into_iter().collect()
            }
            None if enabled => {
                let fix = r#"add `interfaces = ["eth0"]` or `enabled = false`"#;
                self.report(at, "observe.interfaces", "is missing", fix);
                None
            }
            None => Some(Vec::new()),
        };
        let exclude = self.interface_patterns(&raw.exclude, "observe.exclude");
        let boundary = self.interface_patterns(&raw.boundary, "observe.boundary");
        let namespaces = self.network_namespaces(&raw.namespaces);
        let attach = self.choice_or(
            raw.attach.as_ref(),
            "observe.attach",
            &[
                ("auto", Attach::Auto),
                ("tcx", Attach::Tcx),
                ("clsact", Attach::Clsact),
            ],
        );
        let kernel_log = self.choice_or(
            raw.kernel_log.as_ref(),
            "observe.kernel_log",
            &[
                ("off", KernelLog::Off),
                ("error", KernelLog::Error),
                ("warn", KernelLog::Warn),
                ("info", KernelLog::Info),
                ("debug", KernelLog::Debug),
            ],
        );
        let bpffs = match &raw.bpffs {
            Some(text) if !text.get_ref().starts_with('/') => {
                let fix = format!("write `bpffs = \"{DEFAULT_BPFFS}\"`");
                self.report(text.span(), "observe.bpffs", "is not an absolute path", fix);
                None
            }
            Some(text) => Some(text.get_ref().into()),
            None => Some(PathBuf::from(DEFAULT_BPFFS)),
        };
        let flows = raw.flows_max.as_ref();
        let flows_max = self.number(flows, "observe.flows_max", 1_024..=16_777_216, 262_144);
        let slots = 64..=1_048_576;
        let connections = raw.connections_max.as_ref();
        let connections_max = self.number(
            connections,
            "observe.connections_max",
            slots.clone(),
            16_384,
        );
        let accounts = raw.accounts_max.as_ref();
        let accounts_max = self.number(accounts, "observe.accounts_max", slots, 16_384);
        let interval = raw.collect_interval_ms.as_ref();
        let interval = self.number(interval, "observe.collect_interval_ms", 50..=60_000, 1_000);
        let observe = Observe {
            interfaces: interfaces?,
            exclude: exclude?,
            boundary: boundary?,
            namespaces: namespaces?,
            attach: attach?,
            bpffs: bpffs?,
            flows_max: flows_max?,
            connections_max: connections_max?,
            accounts_max: accounts_max?,
            collect_interval: Duration::from_millis(interval?),
            required: raw.required.unwrap_or(false),
            kernel_log: kernel_log?,
        };
        Some(enabled.then_some(observe))
    }

    fn interface_patterns(&mut self, texts: &[Text], list: &str) -> Option<Vec<String>> {
        let mut seen = Seen::default();
        let names: Vec<Option<String>> = texts
            .iter()
            .enumerate()
            .map(|(index, text)| self.interface(text, &format!("{list}[{index}]"), &mut seen))
            .collect();
        names.into_iter().collect()
    }

    /// A name below `/run/netns`, or a path such as `/proc/4711/ns/net`.
    fn network_namespaces(&mut self, texts: &[Text]) -> Option<Vec<NetworkNamespace>> {
        let mut seen = Seen::default();
        let mut namespaces = Vec::new();
        let mut good = true;
        for (index, text) in texts.iter().enumerate() {
            let field = format!("observe.namespaces[{index}]");
            let word = text.get_ref();
            let path = if word.starts_with('/') {
                PathBuf::from(word)
            } else {
                Path::new(NAMESPACE_DIRECTORY).join(word)
            };
            // /proc/4711/ns/net is called proc-4711-ns-net.
            let name = word.trim_start_matches('/').replace('/', "-");
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
            let is_path = word.starts_with('/');
            if name.is_empty() || !name.chars().all(plain) || (!is_path && word.contains('/')) {
                let wrong = format!("\"{word}\" cannot name a network namespace");
                let fix = "write a name that `ip netns` lists, of letters, digits, - and _, or an \
                           absolute path";
                self.report(text.span(), field, wrong, fix);
                good = false;
                continue;
            }
            let unique = self.unique(&mut seen, name.clone(), text.span(), &field, "delete it");
            good &= unique.is_some();
            namespaces.push(NetworkNamespace { name, path });
        }
        good.then_some(namespaces)
    }

    fn interface<'r>(
        &mut self,
        text: &'r Text,
        field: &str,
        seen: &mut Seen<&'r str>,
    ) -> Option<String> {
        let name = text.get_ref();
        let valid = (1..=INTERFACE_LENGTH_MAX).contains(&name.len())
            && !matches!(name.as_str(), "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0');
        if !valid {
            let wrong = format!("\"{name}\" cannot be the name of a network interface");
            let fix = "write a name that `ip link` lists, such as \"eth0\"";
            self.report(text.span(), field, wrong, fix);
            return None;
        }
        self.unique(seen, name.as_str(), text.span(), field, "delete it")?;
        Some(name.clone())
    }

    fn access_log(&mut self, raw: &RawAccessLog) -> Option<AccessLog> {
        let target = match raw.path.get_ref().as_str() {
            "-" => Some(AccessLogTarget::StandardOutput),
            _ => self
                .path(&raw.path, "access_log.path")
                .map(AccessLogTarget::File),
        };
        let queue = raw.queue.as_ref();
        let queue = self.number(queue, "access_log.queue", 1..=16_777_216, 65_536);
        let settle = raw.settle_ms.as_ref();
        let settle = self.number(settle, "access_log.settle_ms", 0..=600_000, 5_000);
        Some(AccessLog {
            target: target?,
            queue: queue?,
            settle: Duration::from_millis(settle?),
        })
    }

    fn prices(&mut self, at: Range<usize>, raw: &RawPrices) -> Option<Prices> {
        if let Some(book) = &raw.book {
            return self.price_book(raw, book);
        }
        let Some(currency) = &raw.currency else {
            let fix = "add `currency = \"USD\"` with [[prices.rates]], or `book = \"prices.toml\"`";
            self.report(at, "prices.currency", "is missing, and so is `book`", fix);
            return None;
        };
        let currency = self.parsed::<Currency>(currency, "prices.currency");
        let mut ids = Seen::default();
        let mut covered: Seen<(Leg, Direction)> = Seen::default();
        let mut rates = Vec::new();
        for (index, raw) in raw.rates.iter().enumerate() {
            let here = format!("prices.rates[{index}]");
            let at = raw.span();
            let raw = raw.get_ref();
            let id = self.unique_name(&mut ids, &raw.id, &format!("{here}.id"));
            let leg = self.choice(
                &raw.leg,
                &format!("{here}.leg"),
                &[("client", Leg::Client), ("upstream", Leg::Upstream)],
            );
            let direction = self.choice(
                &raw.direction,
                &format!("{here}.direction"),
                &[("tx", Direction::Tx), ("rx", Direction::Rx)],
            );
            let price = self.parsed::<UnitPrice>(&raw.price, &format!("{here}.price"));
            let unit = format!("{here}.unit_bytes");
            let unit = self
                .number::<u64>(Some(&raw.unit_bytes), &unit, 1..=i64::MAX, 1)
                .and_then(NonZeroU64::new);
            if unit.is_some_and(|unit| !is_finite(unit.get())) {
                let wrong = "has other prime factors than 2 and 5: a quantity would have no \
                             exact decimal";
                let field = format!("{here}.unit_bytes");
                let fix = "write such as 1000000000 or 1073741824";
                self.report(raw.unit_bytes.span(), field, wrong, fix);
            }
            if let (Some(leg), Some(direction)) = (leg, direction)
                && let Some(first) = covered.insert((leg, direction), here.clone())
            {
                let wrong = format!(
                    "overlaps {first}: both price `{}` `{}`",
                    raw.leg.get_ref(),
                    raw.direction.get_ref()
                );
                let fix = "keep one rate for each leg and direction";
                self.report(at, &here, wrong, fix);
            }
            rates.push((|| {
                Some(Price {
                    id: id?,
                    leg: leg?,
                    direction: direction?,
                    rate: Rate {
                        price: price?,
                        unit_bytes: unit?,
                    },
                })
            })());
        }
        let (currency, rates) = (currency?, rates.into_iter().collect::<Option<Vec<_>>>()?);
        Some(Prices {
            currency,
            book: Arc::new(shorthand_book(currency, &rates)),
            rates,
        })
    }

    /// A price book of its own file; its problems are this file's too.
    fn price_book(&mut self, raw: &RawPrices, written: &Text) -> Option<Prices> {
        if let Some(currency) = &raw.currency {
            let fix = "delete it: the book says its currency";
            self.report(
                currency.span(),
                "prices.currency",
                "stands beside `book`",
                fix,
            );
        }
        if let Some(rate) = raw.rates.first() {
            let fix = "keep `book` or [[prices.rates]]";
            self.report(rate.span(), "prices.rates", "stands beside `book`", fix);
        }
        let path = self.path(written, "prices.book")?;
        match Book::load(&path) {
            Ok(book) => Some(Prices::of(book)),
            Err(ConfigError::Invalid(problems)) => {
                self.problems.extend(problems);
                None
            }
            Err(ConfigError::Read { path, source }) => {
                let wrong = format!("\"{}\" cannot be read: {source}", path.display());
                let fix = "name a readable price book; relative paths start at the configuration \
                           file's folder";
                self.report(written.span(), "prices.book", wrong, fix);
                None
            }
        }
    }
}

/// Checks every part of the file shares.
impl<'a> Checker<'a> {
    pub(super) fn new(source: &'a Source<'a>, base: &'a Path) -> Self {
        Self {
            source,
            base,
            problems: Vec::new(),
        }
    }

    /// The checked value, or every problem found.
    pub(super) fn finish<T>(self, checked: Option<T>) -> Result<T, ConfigError> {
        match checked {
            Some(value) if self.problems.is_empty() => Ok(value),
            _ => {
                debug_assert!(!self.problems.is_empty(), "refused without a reason");
                Err(invalid(self.problems))
            }
        }
    }

    pub(super) fn report(
        &mut self,
        at: Range<usize>,
        field: impl Into<String>,
        wrong: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let problem = self.source.problem(at, field, wrong, fix);
        self.problems.push(problem);
    }

    pub(super) fn number<T: TryFrom<i64>>(
        &mut self,
        raw: Option<&Number>,
        field: &str,
        range: RangeInclusive<i64>,
        default: i64,
    ) -> Option<T> {
        let Some(number) = raw else {
            return T::try_from(default).ok();
        };
        let value = *number.get_ref();
        if range.contains(&value) {
            return T::try_from(value).ok();
        }
        let (low, high) = range.into_inner();
        let wrong = format!("{value} is out of range");
        self.report(
            number.span(),
            field,
            wrong,
            format!("write a number from {low} to {high}"),
        );
        None
    }

    /// The first choice is the default.
    pub(super) fn choice_or<T: Copy>(
        &mut self,
        raw: Option<&Text>,
        field: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        match raw {
            Some(text) => self.choice(text, field, choices),
            None => choices.first().map(|&(_, value)| value),
        }
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        text: &Text,
        field: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let written = text.get_ref();
        if let Some(&(_, value)) = choices.iter().find(|&&(name, _)| name == written) {
            return Some(value);
        }
        let names = choices.iter().map(|&(name, _)| name);
        let fix = match nearest(written, names.clone()) {
            Some(meant) => format!("write \"{meant}\""),
            None => format!("write one of {}", quoted(names.clone())),
        };
        let wrong = format!("\"{written}\" is not one of {}", quoted(names));
        self.report(text.span(), field, wrong, fix);
        None
    }

    /// For types whose own error says what is wrong and whose example says how it looks.
    pub(super) fn parsed<T: FromStr<Err: std::fmt::Display>>(
        &mut self,
        text: &Text,
        field: &str,
    ) -> Option<T> {
        match text.get_ref().parse() {
            Ok(value) => Some(value),
            Err(error) => {
                let fix = format!("write such as `{}`", example(field).unwrap_or_default());
                let wrong = format!("\"{}\" {error}", text.get_ref());
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }

    pub(super) fn name(&mut self, text: &str, at: Range<usize>, field: &str) -> Option<Name> {
        let name = Name::new(text);
        if name.is_none() {
            self.report(
                at,
                field,
                format!("\"{text}\" is not a name"),
                format!(
                    "write at most {} of a-z 0-9 . _ -, beginning with a letter or digit",
                    Name::LENGTH_MAX
                ),
            );
        }
        name
    }

    pub(super) fn unique_name<'r>(
        &mut self,
        seen: &mut Seen<&'r str>,
        text: &'r Text,
        field: &str,
    ) -> Option<Name> {
        let written = text.get_ref().as_str();
        let name = self.name(written, text.span(), field)?;
        self.unique(seen, written, text.span(), field, "write another name")?;
        Some(name)
    }

    /// `None`, and a problem, when the value was seen before.
    pub(super) fn unique<K: Hash + Eq + std::fmt::Display + Clone>(
        &mut self,
        seen: &mut Seen<K>,
        value: K,
        at: Range<usize>,
        field: &str,
        fix: &str,
    ) -> Option<()> {
        let Some(first) = seen.insert(value.clone(), field.to_owned()) else {
            return Some(());
        };
        self.report(at, field, format!("\"{value}\" is already in {first}"), fix);
        None
    }

    pub(super) fn address(
        &mut self,
        text: &str,
        at: Range<usize>,
        field: &str,
    ) -> Option<SocketAddr> {
        let address = text.parse().ok();
        if address.is_none() {
            let fix = if text.parse::<IpAddr>().is_ok() {
                "add a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"".to_owned()
            } else if let Some(port) = text.strip_prefix("localhost:") {
                format!("write \"127.0.0.1:{port}\"")
            } else if let Some(port) = text.strip_prefix(':') {
                format!("write \"0.0.0.0:{port}\"")
            } else {
                "write IP:port, such as \"127.0.0.1:8080\"; names are not resolved".to_owned()
            };
            let wrong = format!("\"{text}\" is not a socket address");
            self.report(at, field, wrong, fix);
        }
        address
    }

    /// Relative to the configuration file's folder.
    pub(super) fn path(&mut self, text: &Text, field: &str) -> Option<PathBuf> {
        if text.get_ref().is_empty() {
            let fix = format!("write such as `{}`", example(field).unwrap_or_default());
            self.report(text.span(), field, "is empty", fix);
            return None;
        }
        Some(self.base.join(text.get_ref()))
    }

    /// A file that can be read now and holds this kind of PEM block.
    pub(super) fn pem_file(&mut self, text: &Text, field: &str, kind: &str) -> Option<PathBuf> {
        let path = self.path(text, field)?;
        let shown = path.display();
        let (wrong, fix) = match std::fs::read_to_string(&path) {
            Ok(pem) if pem.contains(&format!("{kind}-----")) => return Some(path),
            Ok(_) => (
                format!("\"{shown}\" holds no PEM block ending in `{kind}-----`"),
                format!("name a PEM file with a {}", kind.to_lowercase()),
            ),
            Err(error) => (
                format!("\"{shown}\" cannot be read: {error}"),
                "name an existing PEM file; relative paths start at the configuration file's folder"
                    .to_owned(),
            ),
        };
        self.report(text.span(), field, wrong, fix);
        None
    }
}

/// Values met so far and the field each was first met in.
pub(super) struct Seen<K>(HashMap<K, String>);

impl<K> Default for Seen<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Seen<K> {
    /// The field this value was met in before, if any; that one stays the first.
    pub(super) fn insert(&mut self, value: K, field: String) -> Option<String> {
        match self.0.get(&value) {
            Some(first) => Some(first.clone()),
            None => {
                self.0.insert(value, field);
                None
            }
        }
    }
}
