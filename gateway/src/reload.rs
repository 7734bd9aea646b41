//! A new configuration while serving: read, checked whole, swapped at once, or not at all.
//!
//! On any error the configuration in force stays. Endpoints of the new configuration are known to
//! the kernel before its first connection can be made; those of an old one stay known until its
//! last request has finished and [`LINGER`] has passed, so no byte of either loses its owner.

use std::{
    collections::HashMap,
    net::{SocketAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    config::{Change, Config, ConfigError, Effect, PeerAddress},
    export::ConfigMetrics,
    kernel::{EndpointMap, KernelError, NamedEndpoint},
    proxy::{
        Shared,
        generation::{BuildError, Generation, Names},
    },
    socket_filter,
};

/// For how long endpoints of a configuration nobody uses any more stay known to the kernel: its
/// pooled connections may still close.
const LINGER: Duration = Duration::from_secs(120);

/// Why the configuration in force stays.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The file is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Parts of it cannot change in a running process; nothing was applied.
    #[error("nothing was applied, because of:\n{}", lines(.0))]
    NeedsRestart(Vec<Change>),
    /// It cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The kernel's endpoint table cannot take its endpoints.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Its interfaces or classes cannot be observed.
    #[error("{0:#}")]
    Observe(anyhow::Error),
    /// Another process takes over, and reads the file itself.
    #[error("an upgrade is under way: reload when it is over")]
    Upgrading,
}

fn lines(changes: &[Change]) -> String {
    let lines: Vec<String> = changes.iter().map(Change::to_string).collect();
    lines.join("\n")
}

/// How the last attempt ended, for /readyz.
#[derive(Clone, Debug, Default)]
pub struct LastReload {
    /// Why it was refused; None when it was applied, or there was none.
    pub refused: Option<String>,
    /// When, Unix seconds; None when there was none.
    pub unix_seconds: Option<u64>,
}

/// Names the kernel's endpoints of a generation, with the addresses that names lead to.
pub type Endpoints = fn(&Generation, &Names) -> Vec<NamedEndpoint>;

/// Brings a configuration's interfaces and classes into force in the kernel, while frames pass.
pub type Observe = Box<dyn Fn(&Config) -> anyhow::Result<()> + Send>;

/// Brings configurations into force, one at a time.
pub struct Reloader {
    path: PathBuf,
    shared: Arc<Shared>,
    metrics: ConfigMetrics,
    endpoints: Endpoints,
    background: tokio::runtime::Handle,
    inner: Mutex<Inner>,
    last: Mutex<LastReload>,
}

struct Inner {
    /// None while degraded.
    kernel: Option<EndpointMap>,
    /// None while degraded.
    observe: Option<Observe>,
    /// Configurations before the one in force.
    retired: Vec<Retired>,
    /// Another process sets the endpoints now.
    frozen: bool,
    /// What names led to the last time, and when to ask again.
    names: Names,
    /// The configuration whose access lists are on every listening socket.
    filtered: Option<u64>,
    ask_again: HashMap<(Box<str>, u16), Instant>,
}

/// Who may still connect to endpoints, while it lives.
enum User {
    Requests(Weak<Generation>),
    Process(Weak<()>),
}

impl User {
    fn is_gone(&self) -> bool {
        let count = match self {
            Self::Requests(generation) => generation.strong_count(),
            Self::Process(process) => process.strong_count(),
        };
        count == 0
    }
}

struct Retired {
    user: User,
    endpoints: Vec<NamedEndpoint>,
    /// Since when nobody uses it.
    unused: Option<Instant>,
}

impl Reloader {
    /// For the file the process was started with.
    pub fn new(
        path: &Path,
        shared: Arc<Shared>,
        metrics: ConfigMetrics,
        kernel: Option<EndpointMap>,
        endpoints: Endpoints,
        background: tokio::runtime::Handle,
    ) -> Self {
        let generation = shared.generation.load_full();
        metrics.in_force(generation.number);
        generation.start_checks(&background);
        let inner = Inner {
            kernel,
            observe: None,
            retired: Vec::new(),
            frozen: false,
            names: Names::new(),
            filtered: None,
            ask_again: HashMap::new(),
        };
        Self {
            path: path.to_owned(),
            shared,
            metrics,
            endpoints,
            background,
            inner: Mutex::new(inner),
            last: Mutex::default(),
        }
    }

    /// How interfaces and classes are brought into force.
    pub fn observe_by(&self, observe: Observe) {
        self.lock().observe = Some(observe);
    }

    /// Reads the file again and brings it into force. Returns what changed. Blocks on disk.
    ///
    /// # Errors
    /// See [`ReloadError`]; the configuration in force stays.
    pub fn reload(&self) -> Result<Vec<Change>, ReloadError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.apply(&mut inner);
        let mut last = LastReload {
            refused: None,
            unix_seconds: Some(
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_secs()),
            ),
        };
        match &result {
            Ok(changes) if changes.is_empty() => log::info!("reload: nothing has changed"),
            Ok(changes) => {
                for change in changes {
                    log::info!("reload: {change}");
                }
                let number = self.shared.generation.load().number;
                log::info!("reload: configuration {number} is in force");
            }
            Err(error) => {
                log::error!("reload refused, the configuration in force stays: {error}");
                last.refused = Some(error.to_string());
            }
        }
        self.metrics.reloaded(result.as_ref().map(Vec::len).ok());
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
        result
    }

    /// Keeps the endpoints that another process had named, for as long as it drains and
    /// [`LINGER`] after that: until `drained` is dropped.
    pub fn inherit(&self, drained: &Arc<()>) {
        let mut inner = self.lock();
        let endpoints = inner.kernel.as_ref().map(EndpointMap::all);
        inner.retired.push(Retired {
            user: User::Process(Arc::downgrade(drained)),
            endpoints: endpoints.unwrap_or_default(),
            unused: None,
        });
    }

    /// Names the endpoints in force to the kernel, and those not yet over.
    ///
    /// # Errors
    /// The table is full.
    pub fn name_endpoints(&self) -> Result<(), KernelError> {
        let mut inner = self.lock();
        let generation = self.shared.generation.load_full();
        let endpoints = (self.endpoints)(&generation, &inner.names);
        inner.set_endpoints(endpoints)
    }

    /// While frozen the kernel's endpoints are another process's to set, and no configuration is
    /// brought into force.
    pub fn freeze(&self, frozen: bool) {
        self.lock().frozen = frozen;
    }

    fn apply(&self, inner: &mut Inner) -> Result<Vec<Change>, ReloadError> {
        if inner.frozen {
            return Err(ReloadError::Upgrading);
        }
        let old = self.shared.generation.load_full();
        let config = Config::load(&self.path)?;
        let changes = old.config.diff(&config);
        let fixed: Vec<Change> = changes
            .iter()
            .filter(|change| matches!(change.effect, Effect::Restart(_)))
            .cloned()
            .collect();
        if !fixed.is_empty() {
            return Err(ReloadError::NeedsRestart(fixed));
        }
        let is_of = |change: &Change, table: &str| change.field.starts_with(table);
        let observes = changes
            .iter()
            .any(|change| is_of(change, "observe") || is_of(change, "classes"));
        if observes {
            inner.observe(&old.config, &config)?;
        }
        // Not only when the text differs: files it names may have changed.
        let brought = self.bring_into_force(inner, config);
        if brought.is_err() && observes {
            inner.observe(&old.config, &old.config)?;
        }
        brought.map(|()| changes)
    }

    fn bring_into_force(&self, inner: &mut Inner, config: Config) -> Result<(), ReloadError> {
        let old = self.shared.generation.load_full();
        let new = Arc::new(old.next(config, &self.shared.meter)?);
        let retired = Retired {
            user: User::Requests(Arc::downgrade(&old)),
            endpoints: (self.endpoints)(&old, &inner.names),
            unused: None,
        };
        inner.look_up(&new);
        inner.retired.push(retired);
        if let Err(error) = inner.set_endpoints((self.endpoints)(&new, &inner.names)) {
            inner.retired.pop();
            let _ = inner.set_endpoints((self.endpoints)(&old, &inner.names));
            return Err(error.into());
        }
        new.resolve(&inner.names);
        new.start_checks(&self.background);
        self.shared.metrics.expect(&new.config);
        self.shared.edge.expect(&new.config);
        new.edge.start(&self.shared.background, &self.shared.edge);
        self.metrics.in_force(new.number);
        self.shared.generation.store(new);
        Ok(())
    }

    /// Builds the configuration in force again, because files it names have changed. The file it
    /// was read from is not looked at.
    ///
    /// # Errors
    /// See [`ReloadError`]; everything stays.
    pub fn renew(&self) -> Result<(), ReloadError> {
        let mut inner = self.lock();
        let config = self.shared.generation.load().config.clone();
        self.bring_into_force(&mut inner, config)
    }

    /// Brings the access lists that act in the kernel onto the listening sockets, until each has the
    /// lists in force: also takes off those that came with a socket of the process before this one.
    /// Call now and then: sockets come after the configuration. Until then, and where it fails, the
    /// gateway itself turns the same clients away.
    pub fn filter_sockets(&self) {
        let generation = self.shared.generation.load_full();
        let mut inner = self.lock();
        if inner.filtered == Some(generation.number) {
            return;
        }
        match socket_filter::apply(&generation.config) {
            Ok(0) => inner.filtered = Some(generation.number),
            Ok(_) => {}
            Err(error) => {
                log::error!("an access list cannot act in the kernel: {error}; it acts here");
                inner.filtered = Some(generation.number);
            }
        }
    }

    /// Takes the endpoints of configurations that are over off the kernel. Call now and then.
    pub fn sweep(&self) {
        let mut inner = self.lock();
        if inner.frozen {
            return;
        }
        let now = Instant::now();
        let before = inner.retired.len();
        inner.retired.retain_mut(|retired| {
            if !retired.user.is_gone() {
                return true;
            }
            now.duration_since(*retired.unused.get_or_insert(now)) < LINGER
        });
        if inner.retired.len() < before {
            let generation = self.shared.generation.load();
            let endpoints = (self.endpoints)(&generation, &inner.names);
            if let Err(error) = inner.set_endpoints(endpoints) {
                log::warn!("cannot take old endpoints off the kernel: {error}");
            }
        }
    }

    /// Looks the peers' names up before anything is served. Blocks on the resolver. The kernel is
    /// told by [`Self::name_endpoints`].
    pub fn look_up(&self) {
        let mut inner = self.lock();
        let generation = self.shared.generation.load_full();
        inner.look_up(&generation);
        generation.resolve(&inner.names);
    }

    /// Looks up the peers' names whose time has come. Blocks on the resolver. The kernel knows a
    /// new address before the first connection to it; an old one stays known for [`LINGER`].
    pub fn resolve(&self) {
        let mut inner = self.lock();
        if inner.frozen {
            return;
        }
        let generation = self.shared.generation.load_full();
        let endpoints = (self.endpoints)(&generation, &inner.names);
        if !inner.look_up(&generation) {
            return;
        }
        inner.retired.push(Retired {
            user: User::Requests(Weak::new()),
            endpoints,
            unused: None,
        });
        let endpoints = (self.endpoints)(&generation, &inner.names);
        if let Err(error) = inner.set_endpoints(endpoints) {
            log::warn!("cannot name new addresses to the kernel: {error}");
        }
        generation.resolve(&inner.names);
    }

    /// How the last attempt ended.
    pub fn last(&self) -> LastReload {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }

    /// The configuration in force, as written.
    pub fn text(&self) -> Arc<str> {
        Arc::clone(&self.shared.generation.load().config.text)
    }

    /// Number of the configuration in force.
    pub fn number(&self) -> u64 {
        self.shared.generation.load().number
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Interfaces and classes, before the routes that may count on them; back to the old ones when
    /// the new ones cannot be had.
    fn observe(&self, old: &Config, new: &Config) -> Result<(), ReloadError> {
        let Some(observe) = &self.observe else {
            return Ok(());
        };
        if self.frozen {
            return Err(ReloadError::Observe(anyhow::anyhow!(
                "another process is taking over: it will observe what the file says"
            )));
        }
        observe(new).map_err(|error| {
            if let Err(again) = observe(old) {
                log::error!("cannot go back to what was observed: {again:#}");
            }
            ReloadError::Observe(error)
        })
    }

    /// True when an address has changed. A name that cannot be looked up keeps its addresses.
    fn look_up(&mut self, generation: &Generation) -> bool {
        let now = Instant::now();
        let mut changed = false;
        for upstream in &generation.config.upstreams {
            for peer in &upstream.peers {
                let PeerAddress::Name { host, port } = &peer.address else {
                    continue;
                };
                let key = (host.clone(), *port);
                if self.ask_again.get(&key).is_some_and(|at| now < *at) {
                    continue;
                }
                self.ask_again
                    .insert(key.clone(), now + upstream.resolve_interval);
                match (&**host, *port).to_socket_addrs() {
                    Ok(found) => {
                        let mut found: Vec<SocketAddr> = found.collect();
                        found.sort();
                        found.dedup();
                        if self.names.get(&key) != Some(&found) {
                            log::info!("{host}:{port} leads to {found:?}");
                            self.names.insert(key, found);
                            changed = true;
                        }
                    }
                    Err(error) => log::warn!(
                        "{}: {host} cannot be looked up: {error}; its addresses stay",
                        upstream.name
                    ),
                }
            }
        }
        changed
    }

    /// The endpoints in force and those of configurations not yet over. The newest names an
    /// address that several have.
    fn set_endpoints(&mut self, now: Vec<NamedEndpoint>) -> Result<(), KernelError> {
        let Some(kernel) = &mut self.kernel else {
            return Ok(());
        };
        let mut all: Vec<NamedEndpoint> = Vec::new();
        for retired in &self.retired {
            all.extend(&retired.endpoints);
        }
        all.extend(now);
        kernel.set(&all)
    }
}

/// A thread with a runtime for what runs beside requests: signals, checks, names.
///
/// # Errors
/// No thread or runtime could be made.
pub fn background() -> std::io::Result<tokio::runtime::Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("background".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// Reloads on SIGHUP, looks names up and sweeps, until the process ends.
///
/// # Errors
/// The signal cannot be waited for.
pub fn watch(reloader: &Arc<Reloader>) -> std::io::Result<()> {
    let background = reloader.background.clone();
    let mut hangup = {
        let _inside = background.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?
    };
    let on_signal = Arc::clone(reloader);
    background.spawn(async move {
        while hangup.recv().await.is_some() {
            let reloader = Arc::clone(&on_signal);
            let _ = tokio::task::spawn_blocking(move || reloader.reload()).await;
        }
    });
    let now_and_then = Arc::clone(reloader);
    background.spawn(async move {
        let mut each_second = tokio::time::interval(Duration::from_secs(1));
        loop {
            each_second.tick().await;
            let reloader = Arc::clone(&now_and_then);
            let work = move || {
                reloader.resolve();
                reloader.sweep();
                reloader.filter_sockets();
            };
            let _ = tokio::task::spawn_blocking(work).await;
        }
    });
    Ok(())
}
