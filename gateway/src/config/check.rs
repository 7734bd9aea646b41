//! [`RawConfig`] to [`Config`]: ranges, addresses, names, files. `traffic` does the same for what
//! refers to each other: listeners, upstreams, routes.
//!
//! A check that fails reports and returns `None`; its siblings go on, so that one run reports all.

mod field;
mod observe;
mod prices;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use super::problem::{ConfigError, Problem, Source};
use super::raw::{RawAdmin, RawConfig, RawGateway};
use super::{Admin, Config, Gateway, Lane};

pub(super) use field::Seen;

const DEFAULT_STATE_DIR: &str = "/var/lib/edgemeter";
const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);

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
}
