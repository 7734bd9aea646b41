//! The composition root: the one place that knows every part.
//!
//! Start: ledger → owners → kernel programs loaded → endpoints named → attached → proxy listens.
//! Stop: proxy drains → last counters posted → ledger synced → access log written. The programs
//! stay attached: what happens until the next start is counted and posted then.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use flow_abi::{Connection, Endpoint, side};
use pingora::{
    apps::http_app::ServeHttp,
    listeners::{L4BufferSettings, ListenerConfig},
    proxy::http_proxy,
    server::{RunArgs, Server, configuration::ServerConf},
    services::listening::Service,
};
use prometheus_client::registry::Registry;

use crate::{
    access_log::AccessLog,
    admin::{Admin, token::Token},
    attribution::{Claims, Watermarks},
    budget::{BudgetThread, Budgets},
    cache::{Bounds, Store},
    class::Classes,
    collector::{Collector, CollectorThread},
    config::{
        self, Attach, Config, KernelLog, Limits, ListenerIndex, Observe, PeerAddress, PushSink,
        UpstreamIndex,
    },
    connections::{self, Connections, Watcher, WatcherThread},
    export::{
        BudgetMetrics, ConfigMetrics, ConnectionMetrics, EdgeMetrics, KernelTables, LevelMetrics,
        PushMetrics, RequestMetrics, UpstreamMetrics, WireMetrics, WireView,
    },
    kernel::{
        AttachMode, Kernel, NamedEndpoint, Observer, ObserverThread, Options, Selection, Watch,
    },
    ledger::{Fault, Ledger},
    owner::Owners,
    proxy::{
        Gateway, ResponseCache, Shared,
        alarm::Alarm,
        app::MeteredApp,
        generation::{Generation, Names},
        hints::Learned,
        lane::{Lane, Pools},
        meter::{EndpointId, Meter},
        mirror::Mirroring,
    },
    push::{PushView, Pushes},
    reload::{self, Reloader},
    retention::RetentionThread,
    slots::Slots,
};

/// Serves until SIGTERM (drains) or SIGINT (at once).
///
/// # Errors
/// The configuration is wrong, the ledger or the access log cannot be opened, a certificate cannot be loaded, or the kernel
/// side is required and does not work.
pub fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    std::fs::create_dir_all(&config.gateway.state_dir).with_context(|| {
        format!(
            "gateway.state_dir: cannot make {}",
            config.gateway.state_dir.display()
        )
    })?;
    let (ledger, unusable) = open_ledger(&config)?;
    let _posting_alone = match &unusable {
        None => Some(ledger.take()?),
        Some(_) => None,
    };
    ledger.push_to(config.push.iter().map(PushSink::outbox).collect());
    let push_view = PushView::default();
    let owners = Arc::new(Owners::new(ledger.owners()?, Box::new(ledger.clone())));
    let classes = Arc::new(Classes::new(ledger.classes()?, Box::new(ledger.clone())));
    let claims = Arc::new(Claims::default());
    let view = Arc::new(Mutex::new(WireView::default()));

    let observed = match unusable {
        // The programs of an earlier start count on, and nobody takes them over.
        Some(reason) => {
            lock(&view).ledger_error = Some(reason.clone());
            Err(reason)
        }
        None => observe(&config, &ledger, &owners, &classes, &claims)?,
    };
    if let Err(reason) = &observed {
        lock(&view).degraded = Some(reason.clone());
        lock(&view).balances = ledger.balances()?;
    }
    let (kernel, slots, meter, watch, observers) = match observed {
        Ok(Observed {
            kernel,
            slots,
            meter,
            watch,
            observers,
        }) => (Some(kernel), Some(slots), meter, watch, observers),
        Err(reason) => {
            log::warn!("running degraded, wire bytes are not counted: {reason}");
            let meter = Meter::new(None, Arc::clone(&owners), Arc::clone(&claims));
            (None, None, meter, None, Vec::new())
        }
    };

    let mut registry = Registry::default();
    let metrics = RequestMetrics::new(&mut registry);
    metrics.expect(&config);
    let edge = EdgeMetrics::new(&config, &mut registry);
    let config_metrics = ConfigMetrics::new(&mut registry);
    registry.register_collector(Box::new(WireMetrics::new(
        Arc::clone(&view),
        Arc::clone(&owners),
        Arc::clone(&classes),
        config.prices.clone(),
    )));
    if !config.push.is_empty() {
        registry.register_collector(Box::new(PushMetrics::new(Arc::clone(&push_view))));
    }
    let pushes = Pushes::start(&config.push, &ledger, &push_view)?;
    let budgets = Arc::new(Budgets::new(config.budgets.clone()));
    let budget_thread = if config.budgets.is_empty() {
        None
    } else {
        registry.register_collector(Box::new(BudgetMetrics::new(Arc::clone(&budgets))));
        let prices = config.prices.clone();
        let started = BudgetThread::start(
            Arc::clone(&budgets),
            ledger.clone(),
            prices,
            Arc::clone(&view),
        );
        Some(started.context("cannot start the budget thread")?)
    };
    ledger.begin_by_second(!config.retention.seconds.is_zero());
    let retention = RetentionThread::start(ledger.clone(), config.retention, Arc::clone(&view))
        .context("cannot start the retention thread")?;
    let access_log = config
        .access_log
        .as_ref()
        .map(AccessLog::start)
        .transpose()
        .context("access_log.path")?;
    let bounds = Bounds {
        memory_bytes_max: config.cache.memory_bytes_max,
        disk: (config.cache.directory.clone()).map(|path| (path, config.cache.disk_bytes_max)),
    };
    let cache = Store::open(&bounds).context("cache.directory")?;
    let shared = Arc::new(Shared {
        generation: ArcSwap::from_pointee(Generation::first(config, &meter)?),
        meter,
        metrics,
        mirroring: Mirroring::default(),
        access_log,
        budgets,
        gate: Arc::default(),
        alarm: Alarm::default(),
        edge,
        background: background()?,
        cache: ResponseCache::new(cache),
        learned: Learned::default(),
    });
    registry.register_collector(Box::new(UpstreamMetrics(Arc::clone(&shared))));
    {
        let generation = shared.generation.load();
        generation.edge.start(&shared.background, &shared.edge);
    }
    registry.register_collector(Box::new(LevelMetrics(Arc::clone(&shared))));
    let config = shared.generation.load().config.clone();
    let namespaces = kernel.as_ref().map(|kernel| &kernel.namespaces.observed);
    let namespaces = namespaces.into_iter().flatten().cloned().collect();
    let (connections, watcher) = watch_connections(&shared, watch, namespaces, &mut registry)?;
    let endpoint_map = kernel
        .as_ref()
        .map(|kernel| kernel.maps.endpoint_map())
        .transpose()?;
    let reloader = Arc::new(Reloader::new(
        path,
        Arc::clone(&shared),
        config_metrics,
        endpoint_map,
        kernel_endpoints,
        reload::background().context("cannot start the background thread")?,
    ));
    // Before the first request: peers' names lead somewhere.
    reloader.resolve();
    reload::watch(&reloader).context("cannot wait for SIGHUP")?;
    let collector = start_collector(kernel, slots, claims, ledger, &shared, &view, &config)?;

    let admin = Admin {
        registry,
        view: Arc::clone(&view),
        connections,
        // Port 0 is the kernel's choice, which nobody can wait for.
        listeners: config
            .listeners
            .iter()
            .map(|listener| listener.address)
            .filter(|address| address.port() != 0)
            .collect(),
        listening: AtomicBool::new(false),
        token: Token::load_or_make(&config.admin.token_file)?,
        reloader,
        cache: shared.cache.store,
    };
    serve(&shared, &config, admin)?;

    for observer in observers {
        observer.stop();
    }
    if let Some(collector) = collector {
        collector.stop();
        log::info!("posted; the kernel keeps counting until `edgemeter detach`");
    }
    if let Some(watcher) = watcher {
        watcher.stop();
    }
    pushes.stop();
    if let Some(thread) = budget_thread {
        thread.stop();
    }
    retention.stop();
    if let Some(log) = &shared.access_log {
        log.close();
    }
    log::info!("stopped");
    Ok(())
}

/// The ledger; or one that stands in for it, and why: then the gateway serves and meters nothing.
fn open_ledger(config: &Config) -> anyhow::Result<(Ledger, Option<String>)> {
    let config::Gateway { ledger, id, .. } = &config.gateway;
    let required = config
        .observe
        .as_ref()
        .is_none_or(|observe| observe.required);
    match Ledger::open_at(ledger, id) {
        Ok(ledger) => Ok((ledger, None)),
        Err(error) if !required && error.fault != Fault::Other => {
            log::error!("{error}");
            Ok((Ledger::stand_in(ledger, id)?, Some(error.to_string())))
        }
        Err(error) => Err(error.into()),
    }
}

struct Observed {
    kernel: Kernel,
    slots: Arc<Slots>,
    meter: Meter,
    watch: Option<Watch>,
    observers: Vec<ObserverThread>,
}

/// Starts the kernel side; the inner error is why the gateway runs degraded.
fn observe(
    config: &Config,
    ledger: &Ledger,
    owners: &Arc<Owners>,
    classes: &Classes,
    claims: &Arc<Claims>,
) -> anyhow::Result<Result<Observed, String>> {
    let Some(observe) = &config.observe else {
        return Ok(Err(
            "observe is absent or disabled in the configuration".into()
        ));
    };
    match observe_interfaces(config, observe, ledger, owners, classes, claims) {
        Ok(observed) => Ok(Ok(observed)),
        Err(error) if observe.required => {
            Err(error.context("observe.required is true and the kernel side does not work"))
        }
        Err(error) => Ok(Err(format!("{error:#}"))),
    }
}

fn observe_interfaces(
    config: &Config,
    observe: &Observe,
    ledger: &Ledger,
    owners: &Arc<Owners>,
    classes: &Classes,
    claims: &Arc<Claims>,
) -> anyhow::Result<Observed> {
    let mut kernel = Kernel::load(&kernel_options(observe))?;
    for notice in &kernel.notices {
        log::warn!("{notice}");
    }
    // Before the listeners are made: their accepted connections inherit whose they are.
    kernel.namespaces.begin()?;
    let watch = Some(kernel.watch()?);
    let (socket_slots, flows) = (kernel.socket_slots.try_clone()?, kernel.flows.try_clone()?);
    let slots = Slots::open(&kernel.slots, socket_slots, flows, kernel.slots_len)
        .context("cannot map the connection slots")?;
    begin_epoch(&kernel, &slots, ledger, owners, classes)?;
    set_classes(&kernel, config, classes)?;
    let meter = Meter::new(
        Some(Arc::clone(&slots)),
        Arc::clone(owners),
        Arc::clone(claims),
    );
    // Numbers are the same however often they are asked for.
    let generation = Generation::first(config.clone(), &meter)?;
    kernel
        .maps
        .set_endpoints(&kernel_endpoints(&generation, &Names::new()))?;
    let mode = match observe.attach {
        Attach::Auto => AttachMode::Auto,
        Attach::Tcx => AttachMode::Tcx,
        Attach::Clsact => AttachMode::Clsact,
    };
    let selection = selection(observe);
    let mut own = kernel.observer(selection.clone(), mode)?;
    own.begin()?;
    let names = Arc::clone(&kernel.names);
    slots.observe(Box::new(move || names.own_numbers()));
    let mut observers = vec![own.start().context("cannot follow interfaces")?];
    let named: Vec<&str> = observe.namespaces.iter().map(|n| n.name.as_str()).collect();
    kernel.keep_namespaces(&named)?;
    for namespace in &observe.namespaces {
        let place = (namespace.name.as_str(), namespace.path.as_path());
        let started = kernel
            .observer_in(&kernel_options(observe), place, selection.clone(), mode)
            .and_then(Observer::start_inside);
        match started {
            Ok(observer) => observers.push(observer),
            Err(error) if observe.required => return Err(error.into()),
            Err(error) => log::warn!("{error}; the other namespaces are observed"),
        }
    }
    Ok(Observed {
        kernel,
        slots,
        meter,
        watch,
        observers,
    })
}

/// Which interfaces the configuration asks for.
#[must_use]
pub fn selection(observe: &Observe) -> Selection {
    Selection {
        include: observe.interfaces.clone(),
        exclude: observe.exclude.clone(),
        boundary: observe.boundary.clone(),
    }
}

/// Starts listening to the socket programs; what does not work here is said.
fn watch_connections(
    shared: &Arc<Shared>,
    watch: Option<Watch>,
    namespaces: HashMap<u64, String>,
    registry: &mut Registry,
) -> anyhow::Result<(Arc<Connections>, Option<WatcherThread>)> {
    let metrics = ConnectionMetrics::new(registry);
    let (features, ring, maps, reasons) = match watch {
        Some(watch) => (
            watch.features,
            watch.events,
            Some(watch.maps),
            watch.types.drop_reasons,
        ),
        None => Default::default(),
    };
    for feature in &features {
        match &feature.result {
            Ok(place) => log::info!("{}: {place}", feature.name),
            Err(why) => log::warn!(
                "{} does not work: {why}; lost: {}",
                feature.name,
                feature.lost
            ),
        }
    }
    let shared = Arc::clone(shared);
    let place = move |connection: &Connection| {
        let generation = shared.generation.load();
        let peers = |index: usize| generation.pools[index].addresses();
        connections::place(&generation.config, peers, connection)
    };
    let connections = Arc::new(Connections::new(
        Box::new(place),
        namespaces,
        features,
        reasons,
        maps,
    ));
    registry.register_collector(Box::new(KernelTables(Arc::clone(&connections))));
    let watcher = ring
        .map(|ring| Watcher::new(Arc::clone(&connections), metrics, ring).start())
        .transpose()
        .context("cannot start the reader of kernel events")?;
    Ok((connections, watcher))
}

/// Ties the ledger to the kernel's counters before anything new is counted: what they held under
/// another ledger is not posted to this one, and the numbers they bear are not given again.
fn begin_epoch(
    kernel: &Kernel,
    slots: &Slots,
    ledger: &Ledger,
    owners: &Owners,
    classes: &Classes,
) -> anyhow::Result<()> {
    let reading = kernel.maps.read()?;
    let opening = Watermarks {
        accounts: reading.accounts,
        interfaces: reading.interfaces,
    };
    let used = opening != Watermarks::default();
    if ledger.begin_epoch(&kernel.epoch, &opening)? && used {
        log::warn!(
            "the kernel's counters belong to another ledger: this one begins with what they gain \
             from now on"
        );
    }
    let (owner, class) = kernel.maps.highest_numbers()?;
    owners.start_above(owner.max(slots.highest_owner()));
    classes.start_above(crate::class::ClassId(class));
    Ok(())
}

/// Numbers the configured classes and tells the kernel their prefixes.
fn set_classes(kernel: &Kernel, config: &Config, classes: &Classes) -> anyhow::Result<()> {
    let mut prefixes = Vec::new();
    for class in &config.classes {
        let id = classes.intern(class.name.as_str())?;
        prefixes.extend(class.cidrs.iter().map(|cidr| (*cidr, id)));
    }
    kernel.maps.set_classes(&prefixes)?;
    Ok(())
}

/// What the configuration asks of the kernel side.
#[must_use]
pub fn kernel_options(observe: &Observe) -> Options {
    Options {
        bpffs: Some(observe.bpffs.clone()),
        flows_max: observe.flows_max,
        connections_max: observe.connections_max,
        accounts_max: observe.accounts_max,
        log_level: match observe.kernel_log {
            KernelLog::Off => 0,
            KernelLog::Error => 1,
            KernelLog::Warn => 2,
            KernelLog::Info => 3,
            KernelLog::Debug => 4,
        },
    }
}

/// The addresses that make a flow a listener's or an upstream's, with the owners of its bytes.
fn kernel_endpoints(generation: &Generation, names: &Names) -> Vec<NamedEndpoint> {
    let config = &generation.config;
    let owners = |id| {
        let owners = generation.endpoints.owners(id)?;
        Some(Endpoint {
            overhead_owner: owners.overhead.0,
            unclaimed_owner: owners.unclaimed.0,
        })
    };
    let mut named = Vec::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        let owners = owners(EndpointId::Listener(ListenerIndex(index)));
        named.extend(owners.map(|owners| (listener.address, side::LISTENER, owners)));
    }
    for (index, upstream) in config.upstreams.iter().enumerate() {
        let owners = owners(EndpointId::Upstream(UpstreamIndex(index)));
        let addresses = upstream.peers.iter().flat_map(|peer| match &peer.address {
            PeerAddress::Socket(address) => vec![*address],
            PeerAddress::Name { host, port } => {
                let found = names.get(&(host.clone(), *port));
                found.cloned().unwrap_or_default()
            }
        });
        for address in addresses {
            named.extend(owners.map(|owners| (address, side::PEER, owners)));
        }
    }
    named
}

fn start_collector(
    kernel: Option<Kernel>,
    slots: Option<Arc<Slots>>,
    claims: Arc<Claims>,
    ledger: Ledger,
    shared: &Arc<Shared>,
    view: &Arc<Mutex<WireView>>,
    config: &Config,
) -> anyhow::Result<Option<CollectorThread>> {
    let Some((kernel, slots)) = kernel.zip(slots) else {
        return Ok(None);
    };
    let Some(observe) = &config.observe else {
        return Ok(None);
    };
    let interval = observe.collect_interval;
    let collector = Collector::new(
        kernel,
        slots,
        claims,
        ledger,
        Arc::clone(shared),
        Arc::clone(view),
    )?;
    Ok(Some(
        collector
            .start(interval)
            .context("cannot start the collector")?,
    ))
}

/// Runs pingora until a signal.
fn serve(shared: &Arc<Shared>, config: &Config, admin: Admin) -> anyhow::Result<()> {
    let conf = ServerConf {
        threads: config.gateway.threads.get(),
        // Requests stay on the worker that accepted them: 15 % less CPU on small requests.
        work_stealing: false,
        grace_period_seconds: Some(config.gateway.grace.as_secs()),
        graceful_shutdown_timeout_seconds: Some(1),
        max_retries: 6,
        upstream_keepalive_pool_size: 1024,
        ..ServerConf::default()
    };
    let admin_address = ("admin.listen".to_owned(), config.admin.listen);
    let listeners = config.listeners.iter();
    let listeners = listeners.map(|l| (format!("listener {}", l.name), l.address));
    for (name, address) in listeners.chain([admin_address]) {
        // pingora panics where it cannot bind: find out first, and say which.
        std::net::TcpListener::bind(address)
            .with_context(|| format!("{name}: cannot listen on {address}"))?;
    }
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let conf = Arc::clone(&server.configuration);
    let pools = Arc::new(Pools::default());
    for (index, listener) in config.listeners.iter().enumerate() {
        let listener_index = ListenerIndex(index);
        let gateway = Gateway {
            shared: Arc::clone(shared),
            listener: listener_index,
        };
        let mut proxy = http_proxy(&conf, gateway);
        let mut options = pingora::apps::HttpServerOptions::default();
        // The guard answers whether plain text may be HTTP/2, by the configuration in force.
        options.h2c = true;
        options.h2_idle_timeout = Some(listener.protection.limits.idle_timeout);
        let mut h2 = pingora::protocols::http::v2::server::default_h2_options();
        h2.max_concurrent_streams(listener.protection.limits.streams_max);
        h2.max_header_list_size(header_list_size(&listener.protection.limits));
        proxy.h2_options = Some(h2);
        proxy.server_options = Some(options);
        let app = MeteredApp {
            proxy: Arc::new(proxy),
            lane: Lane {
                shared: Arc::clone(shared),
                listener: listener_index,
                pools: Arc::clone(&pools),
            },
            shared: Arc::clone(shared),
            listener: listener_index,
        };
        let mut service = Service::new(format!("listener {}", listener.name), app);
        let address = listener.address.to_string();
        // TLS is the guard's: a reload may change it. Each lane has buffers of its own, and only
        // while data moves: pingora's is 64 KiB a connection.
        let unbuffered = L4BufferSettings::default().read(0);
        service.add_listener(ListenerConfig::tcp(address).l4_buffer(unbuffered));
        server.add_service(service);
    }
    let mut service = Service::new("admin".into(), admin);
    service.add_tcp(&config.admin.listen.to_string());
    server.add_service(service);
    server.run(RunArgs::default());
    Ok(())
}

/// A thread of its own for what no request waits for: keys, certificates.
fn background() -> anyhow::Result<tokio::runtime::Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("background".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

fn header_list_size(limits: &Limits) -> u32 {
    u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX)
}

// The admin service is a ServeHttp; this keeps the bound next to its use.
const _: fn() = || {
    fn serves<T: ServeHttp>() {}
    serves::<Admin>();
};

fn lock(view: &Mutex<WireView>) -> std::sync::MutexGuard<'_, WireView> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}
