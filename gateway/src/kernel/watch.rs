//! Programs that know sockets: put on the cgroup root and on tracepoints, each for itself. What
//! does not work is said, and what it would have told is missing; nothing else.
//!
//! They do not outlive the process: nothing is billed from them.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Btf, Ebpf, Endianness,
    maps::{Array, HashMap as AyaHashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{
        BtfTracePoint, CgroupAttachMode, CgroupSock, CgroupSockAddr, SchedClassifier, SockOps,
    },
};
use flow_abi::{Connection, DropCount, DropKey, kind, name};

use super::{
    Kernel, KernelError, batch, chain, data,
    events::Ring,
    hold,
    layout::{self, KernelTypes},
    map_error, own,
};

/// One program, or a pair that is useful together.
#[derive(Clone, Debug)]
pub struct Feature {
    /// A word for metrics.
    pub name: &'static str,
    /// What is lost without it.
    pub lost: &'static str,
    /// Where it is attached, or why not.
    pub result: Result<String, String>,
}

/// The socket programs' maps.
pub struct Watch {
    /// What works.
    pub features: Vec<Feature>,
    /// Events; None when the ring buffer could not be mapped.
    pub events: Option<Ring>,
    /// Connections, drops, losses.
    pub maps: WatchMaps,
    /// The kernel's words for why frames were dropped.
    pub types: KernelTypes,
}

/// Readers of the socket programs' maps.
pub struct WatchMaps {
    /// The same map as `connections`, for reading it whole.
    connections_fd: OwnedFd,
    connections: AyaHashMap<MapData, u64, Connection>,
    drops: AyaHashMap<MapData, DropKey, DropCount>,
    events_lost: PerCpuArray<MapData, u64>,
    connections_lost: PerCpuArray<MapData, u64>,
}

const LIFE: (&str, &str) = (
    "connection_life",
    "connections: handshake, round trips, retransmits, how they ended",
);
const OWNERS: (&str, &str) = (
    "socket_owner",
    "process, command and cgroup of a connection's local end",
);
const RESETS: (&str, &str) = ("resets", "which side reset a connection");
const TUNNELS: (&str, &str) = (
    "tunnels",
    "the bytes of interfaces without an Ethernet header (tun, WireGuard, GRE)",
);
const DROPS: (&str, &str) = ("drops", "frames this host dropped, and why");

impl Kernel {
    /// Attaches the socket programs, as far as they work here, for connections of the observed
    /// network namespaces.
    ///
    /// # Errors
    /// A map is missing from the object; programs that do not work are [`Feature`]s.
    pub fn watch(&mut self) -> Result<Watch, KernelError> {
        let ebpf = self
            .ebpf
            .as_mut()
            .ok_or_else(|| KernelError::Load("the programs are attached already".into()))?;
        let maps = WatchMaps::of(ebpf)?;
        let awake: Array<MapData, u32> = typed(ebpf, name::EVENTS_AWAKE)?;
        let events = hold(ebpf, name::EVENTS)?;
        let events = RingBuf::try_from(events).ok();
        let events = events.map(|ring| Ring::new(ring, awake));
        Ok(Watch {
            features: attach(ebpf),
            events,
            maps,
            types: self.types.clone(),
        })
    }
}

/// All of them, where nothing loads.
pub(super) fn without(why: &str) -> Vec<Feature> {
    [LIFE, OWNERS, RESETS, DROPS, TUNNELS]
        .into_iter()
        .map(|(name, lost)| Feature {
            name,
            lost,
            result: Err(why.to_owned()),
        })
        .collect()
}

/// The programs for frames that begin with the IP header; those of Ethernet are no feature.
pub(super) fn tunnels(ebpf: &mut Ebpf) -> Feature {
    let mut load = || {
        for bare in [name::INGRESS_BARE, name::EGRESS_BARE] {
            let program: &mut SchedClassifier = program(ebpf, bare)?;
            program.load().map_err(text)?;
        }
        Ok("programs for frames without an Ethernet header".to_owned())
    };
    Feature {
        name: TUNNELS.0,
        lost: TUNNELS.1,
        result: load(),
    }
}

/// Attaches and detaches: what would work here.
pub(super) fn attach(ebpf: &mut Ebpf) -> Vec<Feature> {
    let cgroup = cgroup2().and_then(|path| {
        let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok((path, file))
    });
    let on_cgroup = |attach: &mut dyn FnMut(&File) -> Result<(), String>| {
        let (path, file) = cgroup.as_ref().map_err(Clone::clone)?;
        attach(file)?;
        Ok(format!("cgroup {}", path.display()))
    };
    let life = on_cgroup(&mut |cgroup| {
        let program: &mut SockOps = program(ebpf, name::CONNECTION_LIFE)?;
        program.load().map_err(text)?;
        // A BPF link always shares the hook; it is refused only where another agent took the
        // hook for itself alone, which we do not undo.
        program
            .attach(cgroup, CgroupAttachMode::Single)
            .map_err(text)
            .map(drop)
    });
    let owner = on_cgroup(&mut |cgroup| {
        let made: &mut CgroupSock = program(ebpf, name::SOCKET_MADE)?;
        made.load().map_err(text)?;
        made.attach(cgroup, CgroupAttachMode::Single)
            .map_err(text)?;
        for connect in [name::CONNECT_V4, name::CONNECT_V6] {
            let connect: &mut CgroupSockAddr = program(ebpf, connect)?;
            connect.load().map_err(text)?;
            connect
                .attach(cgroup, CgroupAttachMode::Single)
                .map_err(text)?;
        }
        Ok(())
    });
    let btf = layout::types()
        .map_err(|error| error.to_string())
        .and_then(|types| Btf::parse(&types, Endianness::default()).map_err(|e| e.to_string()));
    let mut on_tracepoints = |pairs: &[(&'static str, &str)]| {
        let btf = btf.as_ref().map_err(Clone::clone)?;
        for (number, tracepoint) in pairs {
            let program: &mut BtfTracePoint = program(ebpf, number)?;
            program
                .load(tracepoint, btf)
                .map_err(|error| format!("{tracepoint}: {}", text(error)))?;
            program
                .attach()
                .map_err(|error| format!("{tracepoint}: {}", text(error)))?;
        }
        let names: Vec<&str> = pairs.iter().map(|(_, tracepoint)| *tracepoint).collect();
        Ok(format!("tracepoint {}", names.join(", ")))
    };
    let resets = on_tracepoints(&[
        (name::RESET_SENT, "tcp_send_reset"),
        (name::RESET_RECEIVED, "tcp_receive_reset"),
    ]);
    let drops = on_tracepoints(&[(name::FRAME_DROPPED, "kfree_skb")]);
    [
        (LIFE, life),
        (OWNERS, owner),
        (RESETS, resets),
        (DROPS, drops),
    ]
    .into_iter()
    .map(|((name, lost), result)| Feature { name, lost, result })
    .collect()
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut T, String>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| format!("the object has no program {name}"))?
        .try_into()
        .map_err(text)
}

fn text(error: aya::programs::ProgramError) -> String {
    // A verifier's log is for developers: its last lines say why.
    let words = chain(&error);
    let lines: Vec<&str> = words.lines().rev().take(4).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// Where the cgroup v2 hierarchy is mounted: `/sys/fs/cgroup`, or `…/unified` beside version 1.
pub(crate) fn cgroup2() -> Result<PathBuf, String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
    cgroup2_mount(&table)
        .map(Path::to_owned)
        .ok_or_else(|| "no cgroup2 file system is mounted".into())
}

fn cgroup2_mount(table: &str) -> Option<&Path> {
    table.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let kind = after.split(' ').next()?;
        (kind == "cgroup2").then(|| before.split(' ').nth(4).map(Path::new))?
    })
}

impl WatchMaps {
    fn of(ebpf: &Ebpf) -> Result<Self, KernelError> {
        let connections = data(ebpf, name::CONNECTIONS)?;
        Ok(Self {
            connections_fd: own(&connections, name::CONNECTIONS)?,
            connections: Map::HashMap(connections)
                .try_into()
                .map_err(|error| map_error(name::CONNECTIONS, error))?,
            drops: typed(ebpf, name::DROPS)?,
            events_lost: typed(ebpf, name::EVENTS_LOST)?,
            connections_lost: typed(ebpf, name::CONNECTIONS_LOST)?,
        })
    }

    /// One connection; None when it is not in the table.
    #[must_use]
    pub fn connection(&self, cookie: u64) -> Option<Connection> {
        self.connections.get(&cookie, 0).ok()
    }

    /// Takes a connection out of the table, once it is over.
    pub fn forget(&mut self, cookie: u64) {
        // Another connect() on the same socket may have replaced it, or it is gone already.
        let _ = self.connections.remove(&cookie);
    }

    /// Every connection in the table.
    ///
    /// # Errors
    /// The map could not be read.
    pub fn each_connection(&self, mut visit: impl FnMut(Connection)) -> io::Result<()> {
        batch::for_each(
            self.connections_fd.as_fd(),
            size_of::<u64>(),
            size_of::<Connection>(),
            |_, value| visit(super::maps::read_pod(value)),
        )
    }

    /// Frames dropped so far.
    #[must_use]
    pub fn drops(&self) -> Vec<(DropKey, DropCount)> {
        self.drops.iter().filter_map(Result::ok).collect()
    }

    /// Events lost to a full ring, by [`kind`].
    #[must_use]
    pub fn events_lost(&self) -> [u64; kind::COUNT] {
        std::array::from_fn(|kind| {
            let index = u32::try_from(kind).unwrap_or(0);
            sum(&self.events_lost, index)
        })
    }

    /// Connections that found the table full.
    #[must_use]
    pub fn connections_lost(&self) -> u64 {
        sum(&self.connections_lost, 0)
    }
}

fn typed<T>(ebpf: &Ebpf, map: &'static str) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    hold(ebpf, map)?
        .try_into()
        .map_err(|error| map_error(map, error))
}

fn sum(array: &PerCpuArray<MapData, u64>, index: u32) -> u64 {
    array
        .get(&index, 0)
        .map_or(0, |values| values.iter().sum::<u64>())
}

/// The cookie of this thread's network namespace.
///
/// # Errors
/// The kernel is older than 5.14.
pub fn namespace_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    // SAFETY: no pointers; the descriptor is closed below.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes of plain data.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    let error = io::Error::last_os_error();
    // SAFETY: opened above.
    unsafe { libc::close(socket) };
    if result == 0 { Ok(cookie) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_beside_version_1_and_alone() {
        let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let alone = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            cgroup2_mount(hybrid),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        assert_eq!(cgroup2_mount(alone), Some(Path::new("/sys/fs/cgroup")));
        assert_eq!(cgroup2_mount(""), None);
    }
}
