//! The composition root: the one place that knows every part.
//!
//! Start: ledger → owners → kernel programs loaded → endpoints named → attached → proxy listens.
//! Stop: proxy drains → last counters posted → ledger synced → access log written. The programs
//! stay attached: what happens until the next start is counted and posted then.

mod listening;
mod observing;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use flow_abi::{Connection, Endpoint, side};
use prometheus_client::registry::Registry;

use crate::{
    access_log::AccessLog,
    acme,
    admin::{Admin, token::Token},
    attribution::Claims,
    budget::{BudgetThread, Budgets},
    cache::{Bounds, Store},
    census::Census,
    class::{Classes, ClassesInForce},
    collector::{Collector, CollectorThread},
    config::{self, Config, ListenerIndex, PeerAddress, PushSink, UpstreamIndex},
    connections::{self, Connections, Watcher, WatcherThread},
    descriptors,
    duties::Duties,
    export::{
        AcmeMetrics, BudgetMetrics, CensusMetrics, ConfigMetrics, ConnectionMetrics, EdgeMetrics,
        KernelTables, LevelMetrics, OtlpMetrics, ProfileMetrics, PushMetrics, RequestMetrics,
        UpstreamMetrics, WireMetrics, WireView,
    },
    kernel::{Kernel, NamedEndpoint, ObserverThread, Watch},
    ledger::{Fault, Ledger, Taken},
    otlp::Exporter,
    owner::Owners,
    profile::Profiler,
    proxy::{
        ResponseCache, Shared,
        alarm::Alarm,
        generation::{Generation, Names},
        hints::Learned,
        meter::{EndpointId, Meter},
        mirror::Mirroring,
    },
    push::PushView,
    reload::{self, Reloader},
    serve::{Serving, Sockets},
    slots::Slots,
    trace::Sampler,
    upgrade::{self, Giver, GiverParts, Predecessor},
};
use observing::{Site, attach_beside, name_beside, number_classes};
pub use observing::{kernel_options, selection};

/// Serves until SIGTERM (drains), SIGINT (at once) or an upgrade; with `take_over` in place of the
/// process that started this one ([`crate::upgrade`]).
///
/// # Errors
/// The configuration is wrong, the ledger or the access log cannot be opened, a certificate cannot be loaded, or the kernel
/// side is required and does not work.
pub fn run(path: &Path, take_over: bool) -> anyhow::Result<()> {
    if !take_over {
        return serve_until_end(path, None);
    }
    let predecessor = Predecessor::at_standard_input()?;
    let said = predecessor.excuse()?;
    let result = serve_until_end(path, Some(predecessor));
    if let Err(error) = &result {
        // Too late for it once this process serves.
        said.refuse(error);
    }
    result
}

/// A gateway that runs out of files accepts nobody.
fn raise_open_files(config: &Config) {
    match descriptors::Limit::raise() {
        Ok(limit) => match limit.complaint(connections_max(config)) {
            Some(complaint) => log::warn!("{complaint}"),
            None => log::info!("at most {} open files", limit.soft),
        },
        Err(error) => log::warn!("the limit of open files cannot be raised: {error}"),
    }
}

/// Over all listeners.
pub(crate) fn connections_max(config: &Config) -> u64 {
    let listeners = config.listeners.iter();
    listeners
        .map(|listener| listener.protection.limits.connections_max as u64)
        .sum()
}

fn serve_until_end(path: &Path, mut predecessor: Option<Predecessor>) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    raise_open_files(&config);
    std::fs::create_dir_all(&config.gateway.state_dir).with_context(|| {
        format!(
            "gateway.state_dir: cannot make {}",
            config.gateway.state_dir.display()
        )
    })?;
    let (ledger, unusable) = open_ledger(&config, predecessor.as_ref())?;
    let taken_ledger = take_ledger(&ledger, unusable.is_some(), predecessor.as_mut())?;
    ledger.push_to(config.push.iter().map(PushSink::outbox).collect());
    let push_view = PushView::default();
    let owners = Arc::new(Owners::new(ledger.owners()?, Box::new(ledger.clone())));
    owners.share(predecessor.is_some());
    let classes = Arc::new(Classes::new(ledger.classes()?, Box::new(ledger.clone())));
    let claims = Arc::new(Claims::default());
    let view = Arc::new(Mutex::new(WireView::default()));

    let prepared = match unusable.clone() {
        // The programs of an earlier start count on, and nobody takes them over.
        Some(reason) => {
            lock(&view).ledger_error = Some(reason.clone());
            Err(reason)
        }
        None => {
            let site = Site {
                config: &config,
                ledger: &ledger,
                owners: &owners,
                classes: &classes,
                claims: &claims,
            };
            site.prepare(predecessor.as_mut())?
        }
    };
    let (mut kernel_side, meter, watch) = match prepared {
        Ok(prepared) => {
            let side = KernelSide {
                kernel: prepared.kernel,
                slots: prepared.slots,
                classes: ClassesInForce::new(prepared.classes),
                observers: prepared.observers,
            };
            (Some(side), prepared.meter, prepared.watch)
        }
        Err(reason) => {
            log::warn!("running degraded, wire bytes are not counted: {reason}");
            lock(&view).degraded = Some(reason);
            lock(&view).balances = ledger.balances()?;
            let meter = Meter::new(None, Arc::clone(&owners), Arc::clone(&claims));
            (None, meter, None)
        }
    };

    let mut registry = Registry::default();
    let metrics = RequestMetrics::new(&mut registry);
    metrics.expect(&config);
    let edge = EdgeMetrics::new(&config, &mut registry);
    let config_metrics = ConfigMetrics::new(&mut registry);
    let acme_metrics = AcmeMetrics::new(&mut registry);
    registry.register_collector(Box::new(WireMetrics::new(
        Arc::clone(&view),
        Arc::clone(&owners),
        Arc::clone(&classes),
        config.prices.clone(),
    )));
    if !config.push.is_empty() {
        registry.register_collector(Box::new(PushMetrics::new(Arc::clone(&push_view))));
    }
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
    let tracing = config.tracing.clone();
    let exporter = tracing
        .as_ref()
        .map(|tracing| Exporter::start(tracing, &config.gateway.id))
        .transpose()
        .context("cannot start the exporter of traces")?;
    if let Some(exporter) = &exporter {
        registry.register_collector(Box::new(OtlpMetrics(Arc::clone(&exporter.counts))));
    }
    let census = Arc::new(Census::default());
    registry.register_collector(Box::new(CensusMetrics(Arc::clone(&census))));
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
        census: Arc::clone(&census),
        challenges: acme::Challenges::default(),
        sampler: Sampler::new(tracing.as_ref().map(|tracing| tracing.parts_per_million)),
        exporter,
    });
    registry.register_collector(Box::new(UpstreamMetrics(Arc::clone(&shared))));
    {
        let generation = shared.generation.load();
        generation.edge.start(&shared.background, &shared.edge);
    }
    registry.register_collector(Box::new(LevelMetrics(Arc::clone(&shared))));
    let config = shared.generation.load().config.clone();
    let endpoint_map = kernel_side
        .as_ref()
        .map(|side| side.kernel.maps.endpoint_map())
        .transpose()?;
    let reloader = Arc::new(Reloader::new(
        path,
        Arc::clone(&shared),
        config_metrics.clone(),
        endpoint_map,
        kernel_endpoints,
        reload::background().context("cannot start the background thread")?,
    ));
    let inherited = predecessor
        .as_mut()
        .map(|other| std::mem::take(&mut other.sockets));
    let sockets = Sockets::bind(&config, inherited.unwrap_or_default())?;
    let serving = Serving::new(&config, sockets, census)?;
    let token = Token::load_or_make(&config.admin.token_file)?;

    // Before the first request: peers' names lead somewhere.
    reloader.look_up();
    let drained = Arc::new(());
    if let Some(other) = &predecessor {
        let slots = other.ready()?;
        // From here on the other process neither posts nor changes anything in the kernel.
        if let Some(side) = &mut kernel_side {
            if other.meters() {
                side.slots.receive(slots);
            }
            name_beside(&reloader, &drained)?;
            side.observers = attach_beside(
                &config,
                &mut side.kernel,
                &side.slots,
                &side.classes.get(),
                &shared.meter,
            )?;
        }
        if unusable.is_none() && ledger.place().is_shared() {
            ledger.take()?;
        }
    } else {
        reloader.name_endpoints()?;
    }
    if let Some(side) = &kernel_side {
        reloader.observe_by(side.observe_anew(&classes)?);
    }
    reload::watch(&reloader).context("cannot wait for SIGHUP")?;

    let namespaces = kernel_side.as_ref();
    let namespaces = namespaces.map(|side| &side.kernel.namespaces.observed);
    let namespaces = namespaces.into_iter().flatten().cloned().collect();
    let (connections, watcher) = watch_connections(&shared, watch, namespaces, &mut registry)?;
    let duties = Arc::new(Duties::new(
        ledger.clone(),
        unusable.is_none(),
        config.push.clone(),
        push_view,
        config.retention,
        Arc::clone(&view),
    ));
    let slots = kernel_side.as_ref().map(|side| Arc::clone(&side.slots));
    let parts = GiverParts {
        config: path.to_owned(),
        ready_limit: config.gateway.upgrade_timeout,
        serving: Arc::clone(&serving),
        reloader: Arc::clone(&reloader),
        duties: Arc::clone(&duties),
        slots: slots.clone(),
        owners: Arc::clone(&owners),
        epoch: kernel_side.as_ref().map(|side| side.kernel.epoch.clone()),
        ledger: unusable.is_none().then(|| ledger.place().to_string()),
        pins_lock: match &kernel_side {
            Some(side) => side.kernel.second_hold()?,
            None => None,
        },
        ledger_lock: match &taken_ledger {
            Some(taken) => taken.second_hold()?,
            None => None,
        },
        attach_again: kernel_side
            .iter()
            .flat_map(|side| &side.observers)
            .map(ObserverThread::again)
            .collect(),
        taken: None,
        metrics: config_metrics,
    };
    let (collector, observers) = match kernel_side {
        Some(side) => {
            let (collector, observers) =
                side.start_collector(&claims, &ledger, &shared, &view, &config)?;
            (collector, observers)
        }
        None => (None, Vec::new()),
    };
    duties.begin(collector)?;
    let taken = predecessor
        .map(|other| other.succeed(Arc::clone(&serving), claims, owners, slots, drained))
        .transpose()
        .context("cannot start the thread that follows the process before this one")?;
    let giver = Arc::new(Giver::new(GiverParts { taken, ..parts }).context("own program")?);
    upgrade::watch(&giver, &shared.background).context("cannot wait for SIGUSR2")?;
    shared.background.spawn(acme::look_after(
        Arc::clone(&shared),
        Arc::clone(&reloader),
        Arc::clone(&serving),
        acme_metrics,
    ));

    let profiler = Arc::new(Profiler::default());
    registry.register_collector(Box::new(ProfileMetrics(Arc::clone(&profiler))));
    let registry = Arc::new(registry);
    if let Some(exporter) = &shared.exporter {
        exporter.export_metrics(&registry);
    }
    let admin = Admin {
        registry,
        view: Arc::clone(&view),
        connections,
        serving: Arc::clone(&serving),
        token,
        reloader,
        giver,
        cache: shared.cache.store,
        census: Arc::clone(&shared.census),
        profiler,
    };
    listening::serve(&shared, &config, &serving, admin);

    for observer in observers {
        observer.stop();
    }
    duties.end();
    if let Some(watcher) = watcher {
        watcher.stop();
    }
    if let Some(thread) = budget_thread {
        thread.stop();
    }
    if let Some(log) = &shared.access_log {
        log.close();
    }
    if let Some(exporter) = &shared.exporter {
        exporter.close();
    }
    log::info!("stopped; the kernel keeps counting until `edgemeter detach`");
    Ok(())
}

/// What of the kernel side the process keeps in hand until the collector has it.
struct KernelSide {
    kernel: Kernel,
    slots: Arc<Slots>,
    classes: ClassesInForce,
    observers: Vec<ObserverThread>,
}

impl KernelSide {
    /// How a reload brings interfaces and classes into force.
    fn observe_anew(&self, known: &Arc<Classes>) -> anyhow::Result<reload::Observe> {
        let table = self.kernel.maps.class_map()?;
        let selectors: Vec<_> = self
            .observers
            .iter()
            .map(ObserverThread::selector)
            .collect();
        let (known, in_force) = (Arc::clone(known), self.classes.clone());
        Ok(Box::new(move |config| {
            let prefixes = number_classes(config, &known)?;
            table.set(&prefixes)?;
            in_force.set(prefixes);
            if let Some(observe) = &config.observe {
                for selector in &selectors {
                    selector.select(selection(observe))?;
                }
            }
            Ok(())
        }))
    }

    fn start_collector(
        self,
        claims: &Arc<Claims>,
        ledger: &Ledger,
        shared: &Arc<Shared>,
        view: &Arc<Mutex<WireView>>,
        config: &Config,
    ) -> anyhow::Result<(Option<CollectorThread>, Vec<ObserverThread>)> {
        let Some(observe) = &config.observe else {
            return Ok((None, self.observers));
        };
        let collector = Collector::new(
            self.kernel,
            self.slots,
            Arc::clone(claims),
            ledger.clone(),
            Arc::clone(shared),
            Arc::clone(view),
            self.classes,
        )?;
        let started = collector.start(observe.collect_interval);
        Ok((
            Some(started.context("cannot start the collector")?),
            self.observers,
        ))
    }
}

/// The right to post, at once or from a process that lets go of it later.
fn take_ledger(
    ledger: &Ledger,
    is_stand_in: bool,
    predecessor: Option<&mut Predecessor>,
) -> anyhow::Result<Option<Taken>> {
    if is_stand_in {
        return Ok(None);
    }
    let Some(other) = predecessor else {
        return Ok(Some(ledger.take()?));
    };
    match other.ledger_lock.take() {
        Some(hold) => Ok(Some(Taken::from_hold(hold))),
        // Shared: when it has let go. Or it had no use for the ledger.
        None if ledger.place().is_shared() => Ok(None),
        None => Ok(Some(ledger.take()?)),
    }
}

/// The ledger; or one that stands in for it, and why: then the gateway serves and meters nothing.
fn open_ledger(
    config: &Config,
    predecessor: Option<&Predecessor>,
) -> anyhow::Result<(Ledger, Option<String>)> {
    let config::Gateway { ledger, id, .. } = &config.gateway;
    if let Some(other) = predecessor {
        other.expect_ledger(&ledger.to_string())?;
        return Ok((Ledger::open_beside(ledger, id)?, None));
    }
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
    connections.meet_earlier();
    registry.register_collector(Box::new(KernelTables(Arc::clone(&connections))));
    let watcher = ring
        .map(|ring| Watcher::new(Arc::clone(&connections), metrics, ring).start())
        .transpose()
        .context("cannot start the reader of kernel events")?;
    Ok((connections, watcher))
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

fn lock(view: &Mutex<WireView>) -> std::sync::MutexGuard<'_, WireView> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}
