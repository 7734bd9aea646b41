//! The configuration file: read once, checked whole, then carried as types that need no re-checking.
//!
//! Text becomes a [`Config`] in three phases, each reporting everything it can see before the next
//! one starts: TOML syntax, shape (`raw`: fields and their types), meaning (`check`: names,
//! addresses, references, conflicts). Afterwards a name is an index, an address is a `SocketAddr`
//! and a price is an integer; nothing downstream parses a string again.
//!
//! Every complaint is a [`Problem`]: `file:line:column: field: what is wrong; fix: what to write`.
//!
//! Deliberately absent: environment variables and includes. What runs is what the file says.

mod acme;
mod auth;
mod billing;
mod book;
mod check;
mod class;
mod content;
mod diff;
mod experiment;
mod fields;
mod listing;
mod name;
mod pattern;
mod problem;
mod protect;
mod raw;
mod route;
mod shape;
mod tenant;
#[cfg(test)]
mod tests;
mod tls;
mod tracing;
mod traffic;
mod upstream;
mod value;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use flow_abi::Direction;

use crate::budget::Budget;
use crate::cost::{book::Book, usage::Way};
use crate::ledger::{Place, Retention};
use crate::money::{Currency, Rate};
pub use crate::owner::Leg;

pub use self::acme::Acme;
pub use self::auth::{
    Algorithm, Authentication, ForwardAuth, ForwardAuthIndex, KeySource, RateStore, TokenIndex,
    TokenIssuer,
};
pub use self::billing::PushSink;
pub use self::class::{Cidr, CidrError};
pub use self::content::{Cache, CachePolicy, Compression, Early, Hint, Hints};
pub use self::diff::{Change, Effect};
pub use self::experiment::{Experiment, ExperimentIndex, Unit, Variant, WHOLE};
pub use self::name::Name;
pub use self::pattern::{CertificatePart, HostPattern, PathPattern, Regex, TenantRule};
pub use self::problem::{ConfigError, Problem};
pub use self::protect::{Access, Limits, NETWORKS_MAX, Protection, RateKey, RateLimit};
pub use self::route::{
    Action, Backend, HeaderEdits, Match, Mirror, PathEdit, Redirect, Rewrite, Route, ValuePattern,
};
pub use self::tenant::{HostTemplate, PathTemplate};
pub use self::tls::{ClientCertificates, KeyPair, ProxyVersion, Tls, TlsVersion, UpstreamTls};
pub use self::tracing::Tracing;
pub use self::upstream::{
    Balance, CheckKind, Ejection, HashKey, HealthCheck, Peer, PeerAddress, Retry, Upstream,
    UpstreamLimits,
};

/// A whole, valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Process-wide settings.
    pub gateway: Gateway,
    /// The admin endpoint.
    pub admin: Admin,
    /// The kernel observer; `None` when absent from the file or disabled there.
    pub observe: Option<Observe>,
    /// The access log; `None` when absent.
    pub access_log: Option<AccessLog>,
    /// At least one; a [`ListenerIndex`] points here.
    pub listeners: Vec<Listener>,
    /// An [`UpstreamIndex`] points here.
    pub upstreams: Vec<Upstream>,
    /// An [`ExperimentIndex`] points here.
    pub experiments: Vec<Experiment>,
    /// At least one; a [`RouteIndex`] points here.
    pub routes: Vec<Arc<Route>>,
    /// Classes of remote addresses. Longest prefix wins over all of them; an address in none is
    /// of class [`crate::class::DEFAULT_NAME`].
    pub classes: Vec<Class>,
    /// A [`TokenIndex`] points here.
    pub tokens: Vec<TokenIssuer>,
    /// A [`ForwardAuthIndex`] points here.
    pub forward_auth: Vec<ForwardAuth>,
    /// The store of responses.
    pub cache: Cache,
    /// Where shared rate limits are counted.
    pub rate_store: Option<RateStore>,
    /// What bytes cost; `None` when absent: bytes are counted but not priced.
    pub prices: Option<Prices>,
    /// For how long rows of the ledger keep their grain.
    pub retention: Retention,
    /// Where usage events are pushed to.
    pub push: Vec<PushSink>,
    /// What may be used, and what happens past it.
    pub budgets: Vec<Budget>,
    /// Where spans and metrics go; None: nowhere.
    pub tracing: Option<Tracing>,
    /// The file as it was written: what two configurations are compared by, and what the admin
    /// port shows.
    pub text: Arc<str>,
}

impl Config {
    /// Reads and checks the file. Relative paths inside it are relative to its folder.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks a text as if it had been read from `file_name`. Certificate files are looked at.
    pub fn parse(text: &str, file_name: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let file_name = file_name.as_ref();
        let source = problem::Source::new(file_name, text);
        let raw = shape::read(&source)?;
        let base = file_name.parent().unwrap_or(Path::new(""));
        check::check(&source, base, &raw)
    }

    /// What would change if `new` came into force instead, and whether it could without a restart.
    pub fn diff(&self, new: &Self) -> Vec<Change> {
        diff::changes(&self.text, &new.text)
    }

    /// The same configuration with its listeners in the order of another one that has the same
    /// ones: an open socket keeps its place.
    #[must_use]
    pub fn with_listeners_ordered_as(mut self, other: &Self) -> Self {
        let place = |listener: &Listener| {
            let names = other.listeners.iter().map(|known| &known.name);
            names.clone().position(|name| *name == listener.name)
        };
        let places: Vec<usize> = self
            .listeners
            .iter()
            .map(|listener| place(listener).unwrap_or(usize::MAX))
            .collect();
        for route in &mut self.routes {
            for listener in &mut Arc::make_mut(route).listeners {
                if let Some(&place) = places.get(listener.0) {
                    *listener = ListenerIndex(place);
                }
            }
        }
        self.listeners
            .sort_by_key(|listener| place(listener).unwrap_or(usize::MAX));
        self
    }

    /// A short summary for people, one line per thing configured.
    pub fn listing(&self) -> String {
        listing::Listing(self).to_string()
    }
}

/// Position in [`Config::listeners`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerIndex(pub usize);

/// Position in [`Config::upstreams`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UpstreamIndex(pub usize);

/// Position in [`Config::routes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteIndex(pub usize);

/// Process-wide settings.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// Folder of the ledger and the owner numbers.
    pub state_dir: PathBuf,
    /// This gateway's name in a ledger that several share, and at sinks.
    pub id: String,
    /// Where the ledger is.
    pub ledger: Place,
    /// Worker threads.
    pub threads: NonZeroUsize,
    /// How long connections may finish once no new ones are accepted.
    pub grace: Duration,
    /// How long the gateway says that it is not ready and accepts all the same, after SIGTERM.
    pub drain_delay: Duration,
    /// How long a process that is to take over may take until it is ready.
    pub upgrade_timeout: Duration,
    /// Which ways of moving bytes there are.
    pub lane: Lane,
}

/// How requests are moved. Routing, records and attribution are the same on either lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The lean lane where a request needs nothing that it lacks, else the full one.
    Auto,
    /// The full lane for every request.
    Full,
}

/// The admin endpoint.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where health, readiness and metrics are served.
    pub listen: SocketAddr,
    /// Holds the token that whatever changes or shows more than health and metrics asks for.
    /// Made at start when there is none.
    pub token_file: PathBuf,
}

/// The kernel observer.
#[derive(Clone, Debug)]
pub struct Observe {
    /// Network interfaces to attach to, names and patterns; not empty, no duplicates.
    pub interfaces: Vec<String>,
    /// Not these, though `interfaces` may match them.
    pub exclude: Vec<String>,
    /// Interfaces where bytes are credited to routes; empty: the lowest of each stack.
    pub boundary: Vec<String>,
    /// Other network namespaces in which interfaces are observed.
    pub namespaces: Vec<NetworkNamespace>,
    /// How programs are attached.
    pub attach: Attach,
    /// Where maps are pinned; an absolute path.
    pub bpffs: PathBuf,
    /// Slots of the flow map.
    pub flows_max: u32,
    /// Slots of the connection map.
    pub connections_max: u32,
    /// Slots of the account map.
    pub accounts_max: u32,
    /// Time between two readings of the maps.
    pub collect_interval: Duration,
    /// Refuse to start when the programs cannot be loaded, instead of running degraded.
    pub required: bool,
    /// What the programs themselves log.
    pub kernel_log: KernelLog,
}

/// A network namespace: `ip netns` name, and where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkNamespace {
    /// Unique; its interfaces are named `name/interface`.
    pub name: String,
    /// An absolute path.
    pub path: PathBuf,
}

/// How programs are attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// tcx where the kernel has it, else clsact.
    Auto,
    /// tcx links (Linux 6.6 and newer).
    Tcx,
    /// A clsact qdisc with filters.
    Clsact,
}

/// Severity from which the kernel side logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelLog {
    /// Nothing.
    Off,
    /// Errors.
    Error,
    /// Warnings and worse.
    Warn,
    /// Information and worse.
    Info,
    /// Everything.
    Debug,
}

/// The access log.
#[derive(Clone, Debug)]
pub struct AccessLog {
    /// Where lines go.
    pub target: AccessLogTarget,
    /// Lines that may wait to be written; more are dropped and counted.
    pub queue: usize,
    /// How long a line may wait for its last bytes to leave the kernel.
    pub settle: Duration,
}

/// Where access log lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// `path = "-"`.
    StandardOutput,
    /// Appended to this file.
    File(PathBuf),
}

/// One address the gateway accepts clients on.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Unique among listeners.
    pub name: Name,
    /// Port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// ALPN h2 on a TLS listener (the default there), h2c on a plain one.
    pub http2: bool,
    /// Absent on a plain listener.
    pub tls: Option<Tls>,
    /// What clients may do.
    pub protection: Protection,
}

/// Who may use a route, how often and how much.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// By client address.
    pub access: Access,
    /// A request body; None: the listener's limit.
    pub body_bytes_max: Option<u64>,
    /// All of them apply.
    pub rate_limits: Vec<RateLimit>,
    /// Who a client must be.
    pub authentication: Authentication,
    /// None: responses are not stored.
    pub cache: Option<CachePolicy>,
    /// None: responses are passed on as they come.
    pub compression: Option<Compression>,
    /// What clients are told they will need.
    pub hints: Hints,
}

/// What stands for the file name of a book that `[prices]` itself is.
pub(crate) const SHORTHAND: &str = "[prices]";

/// A class of remote addresses: what a byte costs depends on where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Unique among classes.
    pub name: Name,
    /// Not empty; no prefix is in two classes.
    pub cidrs: Vec<Cidr>,
}

/// What bytes cost.
#[derive(Clone, Debug)]
pub struct Prices {
    /// Of every rate.
    pub currency: Currency,
    /// What bills are made from: the file `prices.book`, or the rates below as one.
    pub book: Arc<Book>,
    /// At most one for each leg and direction. Of a book, the price per byte where it has one:
    /// the first tier that costs something. Enough for a view, not for a bill.
    pub rates: Vec<Price>,
}

impl Prices {
    /// Whether one rate for each leg and direction is all there is.
    pub fn is_flat(&self) -> bool {
        self.book.file == SHORTHAND
    }

    /// The prices of a book.
    pub fn of(book: Book) -> Self {
        let mut rates: Vec<Price> = Vec::new();
        for way in [Way::Rx, Way::Tx] {
            for price in book
                .skus
                .iter()
                .filter_map(|sku| book::first_rate(sku, way))
            {
                let known =
                    |rate: &Price| (rate.leg, rate.direction) == (price.leg, price.direction);
                if !rates.iter().any(known) {
                    rates.push(price);
                }
            }
        }
        Self {
            currency: book.currency,
            book: Arc::new(book),
            rates,
        }
    }

    /// The rate for bytes on this leg in this direction, if they cost anything.
    pub fn find(&self, leg: Leg, direction: Direction) -> Option<&Price> {
        self.rates
            .iter()
            .find(|price| price.leg == leg && price.direction == direction)
    }
}

/// A rate and the bytes it applies to.
#[derive(Clone, Debug)]
pub struct Price {
    /// Unique among rates.
    pub id: Name,
    /// Which side of the gateway.
    pub leg: Leg,
    /// Which way.
    pub direction: Direction,
    /// How much.
    pub rate: Rate,
}
