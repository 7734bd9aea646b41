//! Keeps the programs on the interfaces that are to be observed, as these come and go. One
//! observer a network namespace, each on a thread that lives in it.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap as AyaHashMap, Map, MapData},
};
use flow_abi::{interface, name};

use super::{
    AttachMode, AttachedLink, KernelError, PinDirectory, attach,
    devices::{Device, Netlink, devices},
    map_error,
    maps::CellsMap,
    pins,
    selection::Selection,
};

/// How long a notification is waited for before the thread looks whether it must end.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long an answer to a new selection is waited for.
const ANSWER: Duration = Duration::from_secs(10);

/// Names by interface number, of every interface ever observed by this process: a counter may
/// be read after its interface is gone.
#[derive(Debug, Default)]
pub struct InterfaceNames(Mutex<HashMap<u32, Known>>);

#[derive(Clone, Debug)]
struct Known {
    name: String,
    inner: bool,
}

impl InterfaceNames {
    /// All of them.
    #[must_use]
    pub fn snapshot(&self) -> HashMap<u32, String> {
        let known = self.lock();
        let names = known.iter();
        names
            .map(|(number, known)| (*number, known.name.clone()))
            .collect()
    }

    /// Numbers of those in the gateway's own network namespace where its flows are credited.
    #[must_use]
    pub fn own_numbers(&self) -> Vec<u32> {
        let known = self.lock();
        let own = known
            .iter()
            .filter(|(number, known)| *number >> interface::NAMESPACE_SHIFT == 0 && !known.inner);
        own.map(|(number, _)| *number).collect()
    }

    fn set(&self, number: u32, name: String, inner: bool) {
        self.lock().insert(number, Known { name, inner });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The network namespace an observer is for.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// 0 is the gateway's own.
    pub number: u32,
    /// Empty for the gateway's own.
    pub name: String,
    /// Where its name is mounted; None for the gateway's own.
    pub path: Option<PathBuf>,
}

impl Place {
    fn shown(&self, interface: &str) -> String {
        if self.name.is_empty() {
            interface.to_owned()
        } else {
            format!("{}/{interface}", self.name)
        }
    }

    /// For the names of pins: `@` is in no interface's name that we attach to.
    fn pinned(&self, interface: &str) -> String {
        if self.name.is_empty() {
            interface.to_owned()
        } else {
            format!("{}@{interface}", self.name)
        }
    }
}

/// What an observer works with.
pub struct Observer {
    pub(super) ebpf: Ebpf,
    pub(super) pins: Option<PinDirectory>,
    pub(super) mode: AttachMode,
    pub(super) selection: Selection,
    pub(super) place: Place,
    pub(super) cells: CellsMap,
    pub(super) names: Arc<InterfaceNames>,
    /// By interface index: the name, and whether it is inner.
    pub(super) attached: BTreeMap<u32, (String, bool)>,
}

/// The thread that follows.
pub struct ObserverThread {
    stop: Arc<AtomicBool>,
    again: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    selector: Selector,
}

/// Tells an observer's thread what is to be observed from now on.
#[derive(Clone)]
pub struct Selector(Sender<Selecting>);

type Selecting = (Selection, SyncSender<Result<(), KernelError>>);

/// What a running observer is told.
struct Told {
    stopped: Arc<AtomicBool>,
    again: Arc<AtomicBool>,
    selections: Receiver<Selecting>,
}

impl Selector {
    /// Observes these interfaces and no others. Interfaces in both selections are not touched.
    ///
    /// # Errors
    /// One that is named is not there, or cannot be observed; then the selection is as before.
    pub fn select(&self, selection: Selection) -> Result<(), KernelError> {
        let (answer, answers) = sync_channel(1);
        let failed = |reason: &str| KernelError::Attach {
            interface: "*".into(),
            reason: reason.into(),
        };
        if self.0.send((selection, answer)).is_err() {
            return Err(failed("interfaces are not followed any more"));
        }
        answers
            .recv_timeout(ANSWER)
            .map_err(|_| failed("the thread that follows interfaces does not answer"))?
    }
}

fn told() -> (Selector, Told) {
    let (selector, selections) = channel();
    let told = Told {
        stopped: Arc::default(),
        again: Arc::default(),
        selections,
    };
    (Selector(selector), told)
}

impl Observer {
    /// Attaches to what there is now, in place of an earlier process and without a gap. Set the
    /// endpoints before: a flow asks for its owner once.
    ///
    /// # Errors
    /// An interface the configuration names is not there (in the gateway's own namespace) or
    /// cannot be observed; those before it stay attached.
    pub fn begin(&mut self) -> Result<Vec<AttachedLink>, KernelError> {
        let devices = devices().map_err(|error| KernelError::Attach {
            interface: "*".into(),
            reason: format!("cannot list interfaces: {error}"),
        })?;
        self.all_there(&self.selection, &devices)?;
        let chosen = self.selection.choose(&devices);
        self.keep_links(&chosen)?;
        let mut links = Vec::new();
        for (device, inner) in &chosen {
            match self.attach(device, *inner) {
                Ok(more) => links.extend(more),
                Err(error) if self.selection.named().any(|name| *name == device.name) => {
                    return Err(error);
                }
                Err(error) => log::warn!("{error}"),
            }
        }
        Ok(links)
    }

    /// In the gateway's own namespace every interface the configuration names must be there.
    fn all_there(&self, selection: &Selection, devices: &[Device]) -> Result<(), KernelError> {
        let own = self.place.path.is_none();
        let mut named = selection.named();
        let missing = named.find(|name| !devices.iter().any(|device| device.name == *name));
        match missing.filter(|_| own) {
            Some(missing) => Err(attach::no_interface(missing)),
            None => Ok(()),
        }
    }

    /// Another selection, while frames pass: what is in both goes on as it is.
    fn select(&mut self, selection: Selection) -> Result<(), KernelError> {
        let devices = devices().map_err(|error| KernelError::Attach {
            interface: "*".into(),
            reason: format!("cannot list interfaces: {error}"),
        })?;
        self.all_there(&selection, &devices)?;
        for (device, inner) in selection.choose(&devices) {
            if self.attached.contains_key(&device.index) {
                continue;
            }
            match self.attach(&device, inner) {
                Ok(_) => {}
                Err(error) if selection.named().any(|name| *name == device.name) => {
                    // What has been attached until here goes.
                    self.look();
                    return Err(error);
                }
                Err(error) => log::warn!("{error}"),
            }
        }
        self.selection = selection;
        self.look();
        Ok(())
    }

    /// Removes the pinned links of interfaces that are not observed any more: they would go on
    /// counting.
    fn keep_links(&self, chosen: &[(Device, bool)]) -> Result<(), KernelError> {
        let Some(pins) = &self.pins else {
            return Ok(());
        };
        let wanted: Vec<String> = chosen
            .iter()
            .map(|(device, _)| self.place.pinned(&device.name))
            .collect();
        let prefix = (!self.place.name.is_empty()).then(|| format!("{}@", self.place.name));
        let failed = |source| pins::PinError::Io {
            path: pins.root().to_owned(),
            source,
        };
        pins.keep_links(&wanted, prefix.as_deref())
            .map_err(failed)?;
        for gone in pins.clsact_interfaces().map_err(failed)? {
            let interface = match (&prefix, gone.split_once('@')) {
                (None, None) => gone.as_str(),
                (Some(prefix), Some((_, interface))) if gone.starts_with(prefix) => interface,
                // Another namespace's.
                _ => continue,
            };
            if !wanted.contains(&gone) {
                log::info!("{gone}: not observed any more, clsact filters removed");
                attach::remove_clsact(interface);
                pins.unmark_clsact(&gone);
            }
        }
        Ok(())
    }

    fn attach(&mut self, device: &Device, inner: bool) -> Result<Vec<AttachedLink>, KernelError> {
        let number = self.place.number << interface::NAMESPACE_SHIFT | device.index;
        // The cells first: the programs do not make them. The name before both: nothing is
        // posted without one.
        self.names
            .set(number, self.place.shown(&device.name), inner);
        self.cells.make(number)?;
        self.set_inner(number, inner)?;
        let pinned = self.place.pinned(&device.name);
        let links = attach::attach(
            &mut self.ebpf,
            device,
            &pinned,
            number,
            self.mode,
            self.pins.as_ref(),
        )?;
        for link in &links {
            let how = if link.replaced {
                "took over"
            } else {
                "attached"
            };
            let shown = self.place.shown(&device.name);
            let inner = if inner {
                ", inner: no route is credited here"
            } else {
                ""
            };
            log::info!(
                "{how} {shown} {} ({}{inner})",
                link.direction,
                link.mechanism
            );
        }
        self.attached
            .insert(device.index, (device.name.clone(), inner));
        Ok(links)
    }

    fn set_inner(&mut self, number: u32, inner: bool) -> Result<(), KernelError> {
        let fail = |error: aya::maps::MapError| map_error(name::INNER, error);
        let map = self
            .ebpf
            .map_mut(name::INNER)
            .ok_or_else(|| map_error(name::INNER, "not in the object"))?;
        let mut map: AyaHashMap<&mut MapData, u32, u32> = map.try_into().map_err(fail)?;
        if inner {
            map.insert(number, 1, 0).map_err(fail)
        } else {
            // Mostly it is not there.
            let _ = map.remove(&number);
            Ok(())
        }
    }

    /// Compares what there is with what is attached.
    fn look(&mut self) {
        let devices = match devices() {
            Ok(devices) => devices,
            Err(error) => return log::warn!("cannot list interfaces: {error}"),
        };
        let chosen = self.selection.choose(&devices);
        let still = |index: u32, name: &str| {
            chosen
                .iter()
                .any(|(device, _)| device.index == index && device.name == name)
        };
        let gone: Vec<(u32, String)> = self
            .attached
            .iter()
            .filter(|(index, (name, _))| !still(**index, name))
            .map(|(index, (name, _))| (*index, name.clone()))
            .collect();
        for (index, name) in gone {
            self.attached.remove(&index);
            let pinned = self.place.pinned(&name);
            if devices.iter().any(|device| device.index == index) {
                attach::remove_clsact(&name);
            }
            if let Some(pins) = &self.pins {
                // A severed link leaves its pin behind.
                pins.remove_link(&pinned);
                pins.unmark_clsact(&pinned);
            }
            log::info!(
                "{}: gone or not to be observed any more; what it counted is kept",
                self.place.shown(&name)
            );
        }
        for (device, inner) in &chosen {
            let number = self.place.number << interface::NAMESPACE_SHIFT | device.index;
            if let Some((name, was_inner)) = self.attached.get(&device.index).cloned() {
                if was_inner == *inner {
                    continue;
                }
                // A port joined a bridge, or left it. Flows that exist keep their owners.
                if let Err(error) = self.set_inner(number, *inner) {
                    log::warn!("{error}");
                    continue;
                }
                let shown = self.place.shown(&name);
                self.names.set(number, shown.clone(), *inner);
                let now = if *inner { "inner" } else { "boundary" };
                log::info!("{shown}: {now} now");
                self.attached.insert(device.index, (name, *inner));
            } else if let Err(error) = self.attach(device, *inner) {
                log::warn!("{error}");
            }
        }
    }

    /// Follows changes on a thread, which must already be in the namespace: call this on it.
    fn follow(mut self, netlink: &Netlink, told: &Told) {
        let identity = self.place.path.as_deref().and_then(identity);
        // What changed between the first look and the subscription.
        self.look();
        while !told.stopped.load(Ordering::Relaxed) {
            for (selection, answer) in told.selections.try_iter() {
                let _ = answer.send(self.select(selection));
            }
            if told.again.swap(false, Ordering::Relaxed)
                && let Err(error) = self.begin()
            {
                log::error!("cannot attach anew: {error}");
            }
            match netlink.wait(PATIENCE) {
                Ok(true) => self.look(),
                Ok(false) => {}
                Err(error) => {
                    log::error!("interfaces are not followed any more: {error}");
                    return;
                }
            }
            if let Some(path) = &self.place.path
                && self::identity(path) != identity
            {
                // Our thread would keep it alive.
                log::info!("network namespace {}: gone", self.place.name);
                if let Some(pins) = &self.pins {
                    for (name, _) in self.attached.values() {
                        pins.remove_link(&self.place.pinned(name));
                    }
                }
                return;
            }
        }
    }

    /// Starts following in the calling process's own namespace.
    ///
    /// # Errors
    /// No thread could be started, or there is no netlink.
    pub fn start(self) -> io::Result<ObserverThread> {
        let netlink = Netlink::open()?;
        let (selector, told) = told();
        let (stop, again) = (Arc::clone(&told.stopped), Arc::clone(&told.again));
        let thread = std::thread::Builder::new()
            .name("interfaces".into())
            .spawn(move || self.follow(&netlink, &told))?;
        Ok(ObserverThread {
            stop,
            again,
            thread,
            selector,
        })
    }

    /// Enters the observer's namespace on a thread of its own, begins there, and follows.
    ///
    /// # Errors
    /// The namespace cannot be entered (CAP_SYS_ADMIN), or nothing can be attached there.
    pub fn start_inside(mut self) -> Result<ObserverThread, KernelError> {
        let (selector, told) = told();
        let (stop, again) = (Arc::clone(&told.stopped), Arc::clone(&told.again));
        let (said, says) = sync_channel(1);
        let name = self.place.name.clone();
        let failed = |reason: String| KernelError::Attach {
            interface: format!("{name}/*"),
            reason,
        };
        let thread = std::thread::Builder::new()
            .name("interfaces".into())
            .spawn(move || {
                let begun = self
                    .place
                    .path
                    .as_deref()
                    .map_or(Ok(()), super::namespaces::enter)
                    .and_then(|()| Netlink::open())
                    .map_err(|error| error.to_string())
                    .and_then(|netlink| {
                        self.begin().map_err(|error| error.to_string())?;
                        Ok(netlink)
                    });
                match begun {
                    Ok(netlink) => {
                        let _ = said.send(Ok(()));
                        self.follow(&netlink, &told);
                    }
                    Err(error) => drop(said.send(Err(error))),
                }
            })
            .map_err(|error| failed(error.to_string()))?;
        match says.recv() {
            Ok(Ok(())) => Ok(ObserverThread {
                stop,
                again,
                thread,
                selector,
            }),
            Ok(Err(reason)) => Err(failed(reason)),
            Err(_) => Err(failed("the thread ended".into())),
        }
    }
}

impl ObserverThread {
    /// Tells it what to observe.
    #[must_use]
    pub fn selector(&self) -> Selector {
        self.selector.clone()
    }

    /// Setting it makes the thread put its programs in place of whoever's are there now: another
    /// process had begun to take over, and failed.
    #[must_use]
    pub fn again(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.again)
    }

    /// Stops following. The programs stay attached.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            log::error!("an interface observer panicked; what it attached stays attached");
        }
    }
}

/// Which namespace a path stands for.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// A map as an owned handle, for a part that lives on another thread.
pub(super) fn second_hold(data: &MapData, map: &'static str) -> Result<Map, KernelError> {
    let id = data.info().map_err(|error| map_error(map, error))?.id();
    let data = MapData::from_id(id).map_err(|error| map_error(map, error))?;
    Ok(Map::PerCpuHashMap(data))
}
