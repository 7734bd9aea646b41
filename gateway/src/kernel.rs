//! The kernel side of the gateway: load the TC programs, keep their maps and links across
//! restarts, read their counters.
//!
//! Programs and maps outlive this process on purpose: they are pinned under
//! `<bpffs>/v<schema>/`, so that a crash, a restart or an upgrade loses no byte.

mod array;
mod attach;
pub(crate) mod batch;
mod classes;
mod devices;
pub mod diag;
pub mod events;
mod expiry;
mod going;
mod journal;
mod layout;
mod maps;
mod namespaces;
mod object;
mod observer;
mod pins;
mod selection;
mod syscall;
mod upgrade;
mod watch;

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData},
    programs::SchedClassifier,
};
use flow_abi::name;

pub use attach::{AttachMode, AttachedLink, remove_clsact};
pub use classes::ClassMap;
pub use devices::{Device, Framing, devices};
pub use expiry::{FlowWalk, PROTOCOLS, is_over_row, protocol};
pub use journal::OwnerJournal;
pub use layout::KernelTypes;
pub use maps::{EndpointMap, Maps, NamedEndpoint, Reading, unaccounted};
pub use namespaces::Namespaces;
pub use object::OBJECT_VARIABLE;
pub use observer::{InterfaceNames, Observer, ObserverThread, Place, Selector};
pub use pins::PinDirectory;
pub use selection::{Selection, is_pattern};
pub(crate) use watch::cgroup2;
pub use watch::{Feature, Watch, WatchMaps, namespace_cookie};

/// What the kernel side needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a bpffs; the schema version is appended. None keeps nothing after exit.
    pub bpffs: Option<PathBuf>,
    /// Flow table entries.
    pub flows_max: u32,
    /// Slots: connections whose sent bytes can be split by request.
    pub connections_max: u32,
    /// Account table entries: owners times interfaces.
    pub accounts_max: u32,
    /// Kernel log level, aya's numbering (0 off … 5 trace).
    pub log_level: u8,
}

/// Why the kernel side cannot work; the gateway then runs degraded and says so.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The object could not be read.
    #[error("cannot read the BPF object named by {OBJECT_VARIABLE}: {0}")]
    Object(std::io::Error),
    /// The pin directory cannot be used.
    #[error(transparent)]
    Pins(#[from] pins::PinError),
    /// The kernel refused the object.
    #[error("cannot load the BPF programs: {0}; {advice}", advice = advice(.0))]
    Load(String),
    /// An interface could not be observed.
    #[error("cannot observe interface {interface}: {reason}")]
    Attach {
        /// Its name.
        interface: String,
        /// The kernel's or aya's words.
        reason: String,
    },
    /// A map operation failed.
    #[error("BPF map {map}: {reason}")]
    Map {
        /// Its name.
        map: &'static str,
        /// The kernel's or aya's words.
        reason: String,
    },
}

/// What to do about the kernel's answer.
fn advice(answer: &str) -> &'static str {
    // ENOMEM: maps are charged to the memory limit of the cgroup of whoever makes them.
    if answer.contains("(os error 12)") {
        return "there is no memory for the maps: raise the memory limit of the gateway's cgroup \
                (memory.max), or lower observe.flows_max and observe.connections_max";
    }
    "they need CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or root) and Linux 5.15 or newer with BTF"
}

/// The loaded, attached kernel side.
pub struct Kernel {
    /// Counters.
    pub maps: Maps,
    /// The slots' map, to be memory-mapped.
    pub slots: OwnedFd,
    /// The per-socket storage's map.
    pub socket_slots: OwnedFd,
    /// The flow table, for looking up one flow.
    pub flows: OwnedFd,
    /// Number of slots really there (a pinned map keeps its size).
    pub slots_len: u32,
    /// Where new owners wait for the ledger; None once the owners have it.
    pub journal: Option<OwnerJournal>,
    /// Names of interfaces, by their number in the maps.
    pub names: Arc<InterfaceNames>,
    /// Numbers of network namespaces.
    pub namespaces: Namespaces,
    /// Names the maps' lifetime: boot id and map id. Counters restart exactly when it changes.
    pub epoch: String,
    /// Things an operator should know (a pinned map whose size differs from the configuration).
    pub notices: Vec<String>,
    pins: Option<PinDirectory>,
    lock: Option<std::fs::File>,
    // Holds the programs, and the links where nothing is pinned; the observer's once there is one.
    ebpf: Option<Ebpf>,
    types: KernelTypes,
    /// Prints the programs' own log lines while it lives.
    pub log: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

impl Kernel {
    /// Loads the programs over the pinned maps, making them at first. Nothing is attached yet.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub fn load(options: &Options) -> Result<Self, KernelError> {
        let pins = options.bpffs.as_ref().map(PinDirectory::open).transpose()?;
        let lock = pins.as_ref().map(PinDirectory::lock).transpose()?;
        Self::load_over(options, pins, lock, false)
    }

    /// The same beside the process that uses the pins now, with a hold on its lock.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub fn load_beside(options: &Options, lock: OwnedFd) -> Result<Self, KernelError> {
        let lock = std::fs::File::from(lock);
        if let Some(bpffs) = &options.bpffs {
            // Before anything is made there.
            PinDirectory::of(bpffs).expect_locked_by(&lock)?;
        }
        let pins = options.bpffs.as_ref().map(PinDirectory::open).transpose()?;
        Self::load_over(options, pins, Some(lock), true)
    }

    /// Another hold on the lock on the pins, for the process that takes over: they stay locked as
    /// long as any hold lives.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn second_hold(&self) -> std::io::Result<Option<OwnedFd>> {
        let lock = self.lock.as_ref();
        lock.map(|lock| lock.as_fd().try_clone_to_owned())
            .transpose()
    }

    fn load_over(
        options: &Options,
        pins: Option<PinDirectory>,
        lock: Option<std::fs::File>,
        beside: bool,
    ) -> Result<Self, KernelError> {
        let object = object::bytes().map_err(KernelError::Object)?;
        let mut notices = Vec::new();
        if let (Some(pins), Some(bpffs)) = (&pins, &options.bpffs) {
            notices = upgrade::carry_over(bpffs, pins)?;
            notices.extend(pins.check(options)?);
        }
        let types = kernel_types();
        let mut ebpf = load(&object, options, pins.as_ref(), &types)?;
        let log = (options.log_level > 0)
            .then(|| aya_log::EbpfLogger::init(&mut ebpf))
            .transpose()
            .map_err(|error| KernelError::Load(error.to_string()))?;
        load_tc(&mut ebpf)?;
        let mut maps = open_maps(&ebpf)?;
        match going::open(pins.as_ref()) {
            Ok(going) => maps.going = Some(going),
            Err(error) => notices.push(format!(
                "{error}: a kill may lose a few flows that are over from the flow table"
            )),
        }
        if !beside {
            maps.finish_leaving()
                .map_err(|error| map_error(going::NAME, error))?;
        }
        let slots = data(&ebpf, name::SLOTS)?;
        let slots_len = slots
            .info()
            .map_err(|error| map_error(name::SLOTS, error))?
            .max_entries();
        let socket_slots = data(&ebpf, name::SOCKET_SLOTS)?;
        let accounts_id = maps
            .accounts
            .info()
            .map_err(|error| map_error(name::ACCOUNTS, error))?
            .id();
        let flows = own(&maps.flows, name::FLOWS)?;
        let namespaces = hold(&ebpf, name::NAMESPACES)?
            .try_into()
            .map_err(|error| map_error(name::NAMESPACES, error))?;
        let journal = match OwnerJournal::open(pins.as_ref()) {
            Ok(journal) => Some(journal),
            Err(error) => {
                notices.push(format!(
                    "{error}: the first request of a new tenant waits for the ledger"
                ));
                None
            }
        };
        Ok(Self {
            journal,
            maps,
            flows,
            slots: own(&slots, name::SLOTS)?,
            socket_slots: own(&socket_slots, name::SOCKET_SLOTS)?,
            slots_len,
            names: Arc::default(),
            namespaces: Namespaces::new(namespaces),
            epoch: format!("{}:{accounts_id}", boot_id()),
            notices,
            pins,
            lock,
            ebpf: Some(ebpf),
            types,
            log,
        })
    }

    /// What puts the programs on the interfaces of the gateway's own network namespace.
    ///
    /// # Errors
    /// There is one already.
    pub fn observer(
        &mut self,
        selection: Selection,
        mode: AttachMode,
    ) -> Result<Observer, KernelError> {
        let ebpf = self
            .ebpf
            .take()
            .ok_or_else(|| KernelError::Load("the programs are attached already".into()))?;
        self.observer_of(ebpf, Place::default(), selection, mode)
    }

    /// The same for another network namespace: programs of its own over the same maps, so that
    /// its interfaces have numbers of their own.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub fn observer_in(
        &mut self,
        options: &Options,
        (name, path): (&str, &Path),
        selection: Selection,
        mode: AttachMode,
    ) -> Result<Observer, KernelError> {
        let place = Place {
            number: self.namespaces.observe(name, path)?,
            name: name.to_owned(),
            path: Some(path.to_owned()),
        };
        let object = object::bytes().map_err(KernelError::Object)?;
        let mut ebpf = load_at(
            &object,
            options,
            self.pins.as_ref(),
            &self.types,
            place.number,
        )?;
        load_tc(&mut ebpf)?;
        self.observer_of(ebpf, place, selection, mode)
    }

    /// Takes the programs off namespaces that are not among these any more.
    ///
    /// # Errors
    /// The pins cannot be read or changed.
    pub fn keep_namespaces(&self, names: &[&str]) -> Result<(), KernelError> {
        let Some(pins) = &self.pins else {
            return Ok(());
        };
        pins.keep_namespaces(names).map_err(|source| {
            pins::PinError::Io {
                path: pins.root().to_owned(),
                source,
            }
            .into()
        })
    }

    fn observer_of(
        &self,
        ebpf: Ebpf,
        place: Place,
        selection: Selection,
        mode: AttachMode,
    ) -> Result<Observer, KernelError> {
        Ok(Observer {
            ebpf,
            pins: self.pins.clone(),
            mode,
            selection,
            place,
            cells: self.maps.cells_map()?,
            names: Arc::clone(&self.names),
            attached: BTreeMap::new(),
        })
    }
}

/// Loads the programs without attaching anything: for tests through `BPF_PROG_TEST_RUN`.
///
/// # Errors
/// See [`KernelError`].
pub fn load_for_test(options: &Options) -> Result<(Ebpf, Maps), KernelError> {
    let object = object::bytes().map_err(KernelError::Object)?;
    let mut ebpf = load(&object, options, None, &kernel_types())?;
    load_tc(&mut ebpf)?;
    for program in [name::INGRESS_BARE, name::EGRESS_BARE] {
        load_program(&mut ebpf, program)?;
    }
    let maps = open_maps(&ebpf)?;
    Ok((ebpf, maps))
}

/// Loads and attaches the socket programs, sees whether each works, and takes them off again.
///
/// # Errors
/// See [`KernelError`].
pub fn try_features(options: &Options) -> Result<Vec<Feature>, KernelError> {
    let object = object::bytes().map_err(KernelError::Object)?;
    let mut ebpf = match load(&object, options, None, &kernel_types()) {
        Ok(ebpf) => ebpf,
        Err(error) => return Ok(watch::without(&error.to_string())),
    };
    let mut features = watch::attach(&mut ebpf);
    features.push(watch::tunnels(&mut ebpf));
    Ok(features)
}

/// Without them, what depends on kernel structures is off, and says so.
fn kernel_types() -> KernelTypes {
    KernelTypes::read().unwrap_or_else(|error| {
        log::warn!("the kernel's types cannot be read: {error}");
        KernelTypes::default()
    })
}

/// What every gateway needs. The programs for interfaces without an Ethernet header are loaded
/// with the first of these: the kernel takes as long to verify them as it does for all others.
fn load_tc(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    for program in [name::INGRESS, name::EGRESS] {
        load_program(ebpf, program)?;
    }
    Ok(())
}

/// Loads a program, if it is not.
fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), KernelError> {
    let program = program_mut(ebpf, name)?;
    if program.fd().is_ok() {
        return Ok(());
    }
    program
        .load()
        .map_err(|error| KernelError::Load(format!("{name}: {}", chain(&error))))
}

fn open_maps(ebpf: &Ebpf) -> Result<Maps, KernelError> {
    let maps = Maps::new(
        data(ebpf, name::FLOWS)?,
        [data(ebpf, name::ACCOUNTS)?, data(ebpf, name::TALLIES)?],
        data(ebpf, name::INTERFACES)?,
        data(ebpf, name::ORPHANS)?,
        data(ebpf, name::ENDPOINTS)?,
        [
            data(ebpf, name::CLASSES)?,
            data(ebpf, name::CLASS_GENERATION)?,
        ],
    )
    .map_err(|error| map_error("possible CPUs", error))?;
    // While there is room.
    maps.make_over_rows()
        .map_err(|error| map_error(name::FLOWS, error))?;
    Ok(maps)
}

fn load(
    object: &[u8],
    options: &Options,
    pins: Option<&PinDirectory>,
    types: &KernelTypes,
) -> Result<Ebpf, KernelError> {
    load_at(object, options, pins, types, 0)
}

/// For a network namespace of this number.
fn load_at(
    object: &[u8],
    options: &Options,
    pins: Option<&PinDirectory>,
    types: &KernelTypes,
    namespace: u32,
) -> Result<Ebpf, KernelError> {
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(name::CONNECTIONS, options.flows_max)
        .override_global(name::NAMESPACE, &namespace, true)
        .override_global(name::KERNEL_LAYOUT, &types.layout, true)
        .map_max_entries(name::FLOWS, options.flows_max)
        .map_max_entries(name::ACCOUNTS, options.accounts_max)
        .map_max_entries(name::SLOTS, options.connections_max)
        .override_global(aya_log::LEVEL, &options.log_level, false);
    if let Some(pins) = pins {
        for map in pins::PINNED {
            loader.map_pin_path(map, pins.map(map));
        }
    }
    loader
        .load(object)
        .map_err(|error| KernelError::Load(chain(&error)))
}

fn program_mut<'a>(
    ebpf: &'a mut Ebpf,
    program: &'static str,
) -> Result<&'a mut SchedClassifier, KernelError> {
    ebpf.program_mut(program)
        .ok_or_else(|| KernelError::Load(format!("the object has no program {program}")))?
        .try_into()
        .map_err(|error| KernelError::Load(format!("{program}: {error}")))
}

/// A second hold on a map. The object keeps its own: a program knows its maps by descriptor only
/// until it is loaded, and a closed descriptor's number is soon another map's.
fn hold(ebpf: &Ebpf, map: &'static str) -> Result<Map, KernelError> {
    let again = |data: &MapData| {
        own(data, map).and_then(|fd| MapData::from_fd(fd).map_err(|error| map_error(map, error)))
    };
    match ebpf.map(map) {
        None => Err(map_error(map, "not in the object")),
        Some(Map::HashMap(data)) => again(data).map(Map::HashMap),
        Some(Map::PerCpuHashMap(data)) => again(data).map(Map::PerCpuHashMap),
        Some(Map::Array(data)) => again(data).map(Map::Array),
        Some(Map::PerCpuArray(data)) => again(data).map(Map::PerCpuArray),
        Some(Map::LpmTrie(data)) => again(data).map(Map::LpmTrie),
        Some(Map::SkStorage(data)) => again(data).map(Map::SkStorage),
        Some(Map::RingBuf(data)) => again(data).map(Map::RingBuf),
        Some(other) => Err(map_error(map, format!("has an unexpected type: {other:?}"))),
    }
}

fn data(ebpf: &Ebpf, map: &'static str) -> Result<MapData, KernelError> {
    match hold(ebpf, map)? {
        Map::HashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::LpmTrie(data)
        | Map::SkStorage(data) => Ok(data),
        other => Err(map_error(map, format!("has an unexpected type: {other:?}"))),
    }
}

fn own(data: &MapData, map: &'static str) -> Result<OwnedFd, KernelError> {
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| map_error(map, error))
}

fn map_error(map: &'static str, reason: impl ToString) -> KernelError {
    KernelError::Map {
        map,
        reason: reason.to_string(),
    }
}

/// An error with its causes: aya keeps the kernel's own words in the source.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".into(), |id| id.trim().to_owned())
}
