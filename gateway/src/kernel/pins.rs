//! Where maps and links live between processes.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::maps::{MapInfo, MapType};
use flow_abi::{
    Account, AccountKey, Cell, ClassKey, Endpoint, EndpointKey, FlowCounters, FlowKey,
    InterfaceCells, SCHEMA, Slot, SocketSlot, Tally, name,
};

use super::{Options, going, journal};
use crate::owner::Entry;

/// Maps of the object that outlive the process.
pub(super) const PINNED: [&str; 11] = [
    name::FLOWS,
    name::ACCOUNTS,
    name::TALLIES,
    name::INTERFACES,
    name::ENDPOINTS,
    name::CLASSES,
    name::CLASS_GENERATION,
    name::SLOTS,
    name::SOCKET_SLOTS,
    name::ORPHANS,
    name::NAMESPACES,
];

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Why the pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Not a bpffs.
    #[error("{path} is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The configured directory.
        path: PathBuf,
    },
    /// It cannot be made or read.
    #[error("cannot use the pin directory {path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("{path} is in use by another edgemeter; stop it first, or give this one another bpffs")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The process that is to be taken over from uses others.
    #[error(
        "the running gateway's maps are pinned in {theirs}, this program's would be in {ours}: \
         another map schema, or another observe.bpffs; an upgrade does not cross that. Stop the \
         running gateway and start this one: counters of an earlier schema are taken over then, \
         and nothing is lost"
    )]
    Others {
        /// Where they are.
        theirs: PathBuf,
        /// Where this program looks.
        ours: PathBuf,
    },
    /// A pinned map is not of this program's layout.
    #[error(
        "the pinned map {path} is not this version's ({what}: found {found}, need {need}); \
         another program made it: remove it with `edgemeter detach`"
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// Its value.
        found: u32,
        /// The ABI's value.
        need: u32,
    },
}

/// `<bpffs>/v<schema>/{maps,links}`.
#[derive(Clone, Debug)]
pub struct PinDirectory {
    root: PathBuf,
}

impl PinDirectory {
    /// Makes the directories.
    ///
    /// # Errors
    /// The path is not on a bpffs or cannot be written.
    pub fn open(bpffs: &PathBuf) -> Result<Self, PinError> {
        let Self { root } = Self::of(bpffs);
        let mut existing: &Path = bpffs;
        while !existing.exists() {
            existing = existing.parent().unwrap_or(Path::new("/"));
        }
        if !is_bpffs(existing) {
            return Err(PinError::NotBpffs {
                path: bpffs.clone(),
            });
        }
        for kind in ["maps", "links", "clsact"] {
            let path = root.join(kind);
            fs::create_dir_all(&path).map_err(|source| PinError::Io { path, source })?;
        }
        Ok(Self { root })
    }

    /// As it is, or would be.
    pub(super) fn of(bpffs: &Path) -> Self {
        Self {
            root: bpffs.join(format!("v{SCHEMA}")),
        }
    }

    /// Whether it is the directory behind another process's lock.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn expect_locked_by(&self, lock: &File) -> Result<(), PinError> {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let theirs = lock.metadata().map(identity).ok();
        let ours = fs::metadata(&self.root).map(identity).ok();
        if theirs.is_some() && theirs == ours {
            return Ok(());
        }
        let name = format!("/proc/self/fd/{}", lock.as_raw_fd());
        Err(PinError::Others {
            theirs: fs::read_link(name).unwrap_or_else(|_| "a directory that is gone".into()),
            ours: self.root.clone(),
        })
    }

    /// Another schema's, as it is.
    pub(super) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Takes the directory for this process alone: two would share slots and fight over links.
    /// The kernel gives it back when the process ends, however it ends.
    ///
    /// # Errors
    /// Another process has it.
    pub fn lock(&self) -> Result<File, PinError> {
        let path = self.root.clone();
        let file = File::open(&path).map_err(|source| PinError::Io {
            path: path.clone(),
            source,
        })?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(PinError::InUse { path }),
            Err(TryLockError::Error(source)) => Err(PinError::Io { path, source }),
        }
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    pub(super) fn link(&self, interface: &str, direction: &str) -> PathBuf {
        // A dot is not allowed in a bpffs name, and VLAN interfaces have one.
        self.root
            .join("links")
            .join(format!("{}-{direction}", interface.replace('.', "_")))
    }

    /// Compares the pinned maps with the ABI, because aya opens them unchecked. Returns notices
    /// about sizes that differ from the configuration: a pinned map keeps its size.
    ///
    /// # Errors
    /// A map of another layout.
    pub fn check(&self, options: &Options) -> Result<Vec<String>, PinError> {
        self.compare(Some(options))
    }

    /// The same for whoever only reads.
    ///
    /// # Errors
    /// A map of another layout.
    pub(super) fn check_layout(&self) -> Result<(), PinError> {
        self.compare(None).map(drop)
    }

    fn compare(&self, options: Option<&Options>) -> Result<Vec<String>, PinError> {
        let mut notices = Vec::new();
        for layout in layouts() {
            let map = layout.name;
            let path = self.map(map);
            if !path.exists() {
                continue;
            }
            let info = info(&path).map_err(|source| PinError::Io {
                path: path.clone(),
                source,
            })?;
            if let Some((what, found, need)) = layout.differs(&info) {
                return Err(PinError::Layout {
                    path,
                    what,
                    found,
                    need,
                });
            }
            let entries = options.map_or(0, |options| match map {
                name::FLOWS => options.flows_max,
                name::ACCOUNTS => options.accounts_max,
                name::SLOTS => options.connections_max,
                _ => 0,
            });
            if entries != 0 && info.max_entries() != entries {
                notices.push(format!(
                    "map {map} is pinned with {} entries and keeps them (configured: {entries}); \
                     `edgemeter detach` and a restart apply the new size and start new counters",
                    info.max_entries()
                ));
            }
        }
        Ok(notices)
    }

    /// Removes the links of interfaces that are not observed any more: they would go on counting
    /// into the same accounts. With a prefix: only of those whose name begins so, another
    /// network namespace's; without: of all others.
    ///
    /// # Errors
    /// The directory cannot be read or changed.
    pub fn keep_links(&self, interfaces: &[String], prefix: Option<&str>) -> io::Result<()> {
        let wanted: Vec<PathBuf> = interfaces
            .iter()
            .flat_map(|name| ["ingress", "egress"].map(|direction| self.link(name, direction)))
            .collect();
        for entry in fs::read_dir(self.root.join("links"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let ours = match prefix {
                Some(prefix) => name.starts_with(prefix),
                None => !name.contains('@'),
            };
            if ours && !wanted.contains(&path) {
                log::info!("{}: not observed any more, detached", path.display());
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Removes an interface's links, if it has any.
    pub fn remove_link(&self, interface: &str) {
        for direction in ["ingress", "egress"] {
            let _ = fs::remove_file(self.link(interface, direction));
        }
    }

    /// Removes the links of network namespaces that are not observed any more.
    ///
    /// # Errors
    /// The directory cannot be read or changed.
    pub fn keep_namespaces(&self, names: &[&str]) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join("links"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some((namespace, _)) = name.split_once('@')
                && !names.contains(&namespace)
            {
                log::info!("{}: not observed any more, detached", path.display());
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Interfaces, by their names among the pins, on which clsact filters of ours may be: they
    /// have no link whose pin would tell.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn clsact_interfaces(&self) -> io::Result<Vec<String>> {
        fs::read_dir(self.root.join("clsact"))?
            .map(|entry| Ok(fs::read_link(entry?.path())?.to_string_lossy().into_owned()))
            .collect()
    }

    /// Remembers that clsact filters are on an interface; before they are.
    pub(super) fn mark_clsact(&self, interface: &str) -> io::Result<()> {
        match std::os::unix::fs::symlink(interface, self.clsact(interface)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// They are off.
    pub(super) fn unmark_clsact(&self, interface: &str) {
        let _ = fs::remove_file(self.clsact(interface));
    }

    /// A symbolic link to the interface's name: a bpffs holds no files, and no dots in names.
    fn clsact(&self, interface: &str) -> PathBuf {
        self.root.join("clsact").join(interface.replace('.', "_"))
    }

    /// Removes the directory and what is left in it.
    pub(super) fn remove_root(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.root)
    }

    /// Removes every pin: programs detach when their last link goes, maps when the last process
    /// closes them.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }?;
        if let Some(parent) = self.root.parent() {
            // Only when no other schema is left in it.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// A pinned map as this version lays it out.
pub(super) struct MapLayout {
    pub(super) name: &'static str,
    kind: MapType,
    sizes: SizeOf,
}

impl MapLayout {
    /// Whether the map behind a pin is laid out like this.
    pub(super) fn is_of(&self, pin: &Path) -> io::Result<bool> {
        Ok(self.differs(&info(pin)?).is_none())
    }

    /// What differs, its value there, and here.
    fn differs(&self, info: &MapInfo) -> Option<(&'static str, u32, u32)> {
        let kind = info.map_type().map_or(u32::MAX, |kind| kind as u32);
        [
            ("map type", kind, self.kind as u32),
            ("key size", info.key_size(), self.sizes.key),
            ("value size", info.value_size(), self.sizes.value),
        ]
        .into_iter()
        .find(|(_, found, need)| found != need)
    }
}

/// Every map of [`PINNED`], and those that are no program's.
pub(super) fn layouts() -> [MapLayout; PINNED.len() + 2] {
    let of = |name, kind, sizes| MapLayout { name, kind, sizes };
    let flows = SizeOf::of::<FlowKey, FlowCounters>();
    let endpoints = SizeOf::of::<EndpointKey, Endpoint>();
    [
        of(name::FLOWS, MapType::Hash, flows),
        of(
            name::ACCOUNTS,
            MapType::PerCpuHash,
            SizeOf::of::<AccountKey, Account>(),
        ),
        of(
            name::TALLIES,
            MapType::PerCpuArray,
            SizeOf::of::<u32, Tally>(),
        ),
        of(
            name::INTERFACES,
            MapType::PerCpuHash,
            SizeOf::of::<u32, InterfaceCells>(),
        ),
        of(name::ENDPOINTS, MapType::Hash, endpoints),
        of(
            name::CLASSES,
            MapType::LpmTrie,
            SizeOf::of::<ClassKey, u32>(),
        ),
        of(
            name::CLASS_GENERATION,
            MapType::Array,
            SizeOf::of::<u32, u32>(),
        ),
        of(name::SLOTS, MapType::Array, SizeOf::of::<u32, Slot>()),
        of(
            name::SOCKET_SLOTS,
            MapType::SkStorage,
            SizeOf::of::<i32, SocketSlot>(),
        ),
        of(
            name::ORPHANS,
            MapType::PerCpuArray,
            SizeOf::of::<u32, Cell>(),
        ),
        of(name::NAMESPACES, MapType::Hash, SizeOf::of::<u64, u32>()),
        of(journal::NAME, MapType::Array, SizeOf::of::<u32, Entry>()),
        of(
            going::NAME,
            MapType::Array,
            SizeOf::of::<u32, going::Going>(),
        ),
    ]
}

fn info(pin: &Path) -> io::Result<MapInfo> {
    MapInfo::from_pin(pin).map_err(io::Error::other)
}

#[derive(Clone, Copy)]
struct SizeOf {
    key: u32,
    value: u32,
}

impl SizeOf {
    fn of<K, V>() -> Self {
        let narrow = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        Self {
            key: narrow(size_of::<K>()),
            value: narrow(size_of::<V>()),
        }
    }
}

fn is_bpffs(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: statfs is plain data, valid when zeroed.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is NUL-terminated and `stat` is writable.
    let result = unsafe { libc::statfs(path.as_ptr(), &raw mut stat) };
    result == 0 && stat.f_type == BPF_FS_MAGIC
}
