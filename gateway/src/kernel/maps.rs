//! The only reader of the kernel's counters: whole maps, by batch, as plain values.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use aya::maps::{
    HashMap as AyaHashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues,
};
use flow_abi::{
    Account, AccountKey, Cell, Endpoint, EndpointKey, FlowCounters, FlowKey, InterfaceCells, Tally,
    cell, name, side,
};

use super::{
    KernelError, PinDirectory, batch, expiry::is_over_row, map_error, observer::second_hold,
};

/// Open maps.
pub struct Maps {
    pub(super) flows: MapData,
    pub(super) accounts: MapData,
    /// In front of accounts and interfaces ([`Tally`]): either holds a part of a counter.
    tallies: MapData,
    pub(super) interfaces: MapData,
    pub(super) orphans: MapData,
    pub(super) endpoints: MapData,
    /// The class table and its generation.
    pub(super) classes: [MapData; 2],
    possible_cpus: usize,
    /// Flows the table has room for.
    pub(super) flows_max: u32,
    /// Where flows are written down that are being taken away; None beside a gateway.
    pub(super) going: Option<MapData>,
}

/// Cumulative counters since the maps were made, read in an order that keeps sums comparable:
/// the totals before, then accounts and cells, then the totals after. See [`Reading::gap_bytes`].
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Per owner and interface.
    pub accounts: HashMap<AccountKey, Account>,
    /// Per interface; totals as of the end of the reading.
    pub interfaces: HashMap<u32, InterfaceCells>,
    /// Cells as of the start of the reading.
    before: HashMap<u32, InterfaceCells>,
    /// Frames of interfaces without cells, `[rx, tx]`.
    pub orphans: [Cell; 2],
}

impl Maps {
    pub(super) fn new(
        flows: MapData,
        [accounts, tallies]: [MapData; 2],
        interfaces: MapData,
        orphans: MapData,
        endpoints: MapData,
        classes: [MapData; 2],
    ) -> io::Result<Self> {
        let possible_cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        let flows_max = flows.info().map_err(io::Error::other)?.max_entries();
        Ok(Self {
            flows_max,
            going: None,
            flows,
            accounts,
            tallies,
            interfaces,
            orphans,
            endpoints,
            classes,
            possible_cpus,
        })
    }

    /// The maps a gateway has pinned, to be read beside it.
    ///
    /// # Errors
    /// They are not there, or of another layout.
    pub fn pinned(pins: &PinDirectory) -> Result<Self, KernelError> {
        let open = |map: &'static str| {
            MapData::from_pin(pins.map(map)).map_err(|error| map_error(map, error))
        };
        pins.check_layout()?;
        Self::new(
            open(name::FLOWS)?,
            [open(name::ACCOUNTS)?, open(name::TALLIES)?],
            open(name::INTERFACES)?,
            open(name::ORPHANS)?,
            open(name::ENDPOINTS)?,
            [open(name::CLASSES)?, open(name::CLASS_GENERATION)?],
        )
        .map_err(|error| map_error("possible CPUs", error))
    }

    /// Reads the cells, by interface.
    ///
    /// # Errors
    /// The map could not be read.
    pub fn read_cells(&self) -> io::Result<HashMap<u32, InterfaceCells>> {
        let mut all: HashMap<u32, InterfaceCells> = HashMap::new();
        // The totals first, as the programs add them last: what is total here has its place below.
        self.each_tally(|tally| {
            if tally.owner == Tally::TOTAL {
                let cells = &mut all.entry(tally.ifindex).or_default().cells;
                let [received, sent] = cells.each_mut().map(|cells| &mut cells[cell::TOTAL]);
                let account = &tally.account;
                received.bytes += account.rx_bytes;
                received.frames += account.rx_frames;
                sent.bytes += account.tx_bytes;
                sent.frames += account.tx_frames;
            }
        })?;
        self.each_interface(|number, cells| {
            let sum = all.entry(number).or_default().cells.iter_mut().flatten();
            for (to, from) in sum.zip(cells.cells.iter().flatten()) {
                to.bytes += from.bytes;
                to.frames += from.frames;
            }
        })?;
        Ok(all)
    }

    /// Reads accounts and cells.
    ///
    /// # Errors
    /// A map could not be read.
    pub fn read(&self) -> io::Result<Reading> {
        let mut reading = Reading {
            before: self.read_cells()?,
            ..Reading::default()
        };
        batch::for_each(
            self.accounts.fd().as_fd(),
            size_of::<AccountKey>(),
            size_of::<Account>() * self.possible_cpus,
            |key, values| {
                let key: AccountKey = read_pod(key);
                let sum = values
                    .chunks_exact(size_of::<Account>())
                    .map(read_pod::<Account>)
                    .fold(Account::default(), |sum, cpu| sum_accounts(&sum, &cpu));
                reading.accounts.insert(key, sum);
            },
        )?;
        self.each_tally(|tally| {
            if tally.owner != Tally::TOTAL {
                let key = AccountKey {
                    owner: tally.owner,
                    ifindex: tally.ifindex,
                    class: tally.class,
                };
                let account = reading.accounts.entry(key).or_default();
                *account = sum_accounts(account, &tally.account);
            }
        })?;
        reading.interfaces = self.read_cells()?;
        for (index, orphan) in reading.orphans.iter_mut().enumerate() {
            *orphan = self.orphan(u32::try_from(index).unwrap_or(0))?;
        }
        Ok(reading)
    }

    /// The flow table, for looking up one flow.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn flows_fd(&self) -> io::Result<OwnedFd> {
        self.flows.fd().as_fd().try_clone_to_owned()
    }

    /// A second hold on the interface table, for whoever attaches.
    ///
    /// # Errors
    /// The map cannot be opened again.
    pub fn cells_map(&self) -> Result<CellsMap, KernelError> {
        let map = second_hold(&self.interfaces, name::INTERFACES)?;
        Ok(CellsMap {
            map: map
                .try_into()
                .map_err(|error| map_error(name::INTERFACES, error))?,
            possible_cpus: self.possible_cpus,
        })
    }

    /// Makes an interface's cells: the programs count an interface without cells as orphan.
    ///
    /// # Errors
    /// The table is full.
    pub fn make_cells(&self, number: u32) -> Result<(), KernelError> {
        self.cells_map()?.make(number)
    }

    /// Makes the flows at these endpoints, and no others, the gateway's.
    ///
    /// # Errors
    /// The endpoint table is full.
    pub fn set_endpoints(&self, endpoints: &[NamedEndpoint]) -> Result<(), KernelError> {
        self.endpoint_map()?.set(endpoints)
    }

    /// A second hold on the endpoint table, for whoever changes the configuration.
    ///
    /// # Errors
    /// The map cannot be opened again.
    pub fn endpoint_map(&self) -> Result<EndpointMap, KernelError> {
        let fail = |error: MapError| map_error(name::ENDPOINTS, error);
        let data = self
            .endpoints
            .info()
            .and_then(|info| MapData::from_id(info.id()))
            .map_err(fail)?;
        let map = Map::HashMap(data).try_into().map_err(fail)?;
        Ok(EndpointMap(map))
    }

    /// Reads every flow. Cumulative counters: read as often as wanted.
    ///
    /// # Errors
    /// The map could not be read.
    pub fn read_flows(&self, mut visit: impl FnMut(FlowKey, FlowCounters)) -> io::Result<()> {
        self.read_rows(|key, flow| {
            if !is_over_row(&key) {
                visit(key, flow);
            }
        })
    }

    /// Reads every flow, and the rows of those that are over ([`is_over_row`]).
    ///
    /// # Errors
    /// The map could not be read.
    pub fn read_rows(&self, mut visit: impl FnMut(FlowKey, FlowCounters)) -> io::Result<()> {
        batch::for_each(
            self.flows.fd().as_fd(),
            size_of::<FlowKey>(),
            size_of::<FlowCounters>(),
            |key, value| visit(read_pod(key), read_pod(value)),
        )
    }

    /// One flow.
    ///
    /// # Errors
    /// The map could not be read.
    pub fn flow(&self, key: &FlowKey) -> io::Result<Option<FlowCounters>> {
        batch::look_up(self.flows.fd().as_fd(), key)
    }

    /// The highest owner and class numbers the kernel may still credit: accounts, endpoints and
    /// flows that an earlier process left. Slots are asked by [`crate::slots::Slots`].
    ///
    /// # Errors
    /// A map could not be read.
    pub fn highest_numbers(&self) -> io::Result<(u32, u32)> {
        let (mut owner, mut class) = (0, 0);
        for key in self.read()?.accounts.keys() {
            owner = owner.max(key.owner);
            class = class.max(key.class);
        }
        self.read_flows(|_, flow| {
            owner = owner.max(flow.overhead_owner).max(flow.unclaimed_owner);
            class = class.max(flow.class);
        })?;
        batch::for_each(
            self.endpoints.fd().as_fd(),
            size_of::<EndpointKey>(),
            size_of::<Endpoint>(),
            |_, value| {
                let endpoint: Endpoint = read_pod(value);
                owner = owner
                    .max(endpoint.overhead_owner)
                    .max(endpoint.unclaimed_owner);
            },
        )?;
        Ok((owner, class.max(self.highest_class()?)))
    }

    fn each_interface(&self, mut visit: impl FnMut(u32, InterfaceCells)) -> io::Result<()> {
        batch::for_each(
            self.interfaces.fd().as_fd(),
            size_of::<u32>(),
            size_of::<InterfaceCells>() * self.possible_cpus,
            |key, values| {
                let mut sum = InterfaceCells::default();
                for cpu in values.chunks_exact(size_of::<InterfaceCells>()) {
                    let cpu: InterfaceCells = read_pod(cpu);
                    for (to, from) in sum
                        .cells
                        .iter_mut()
                        .flatten()
                        .zip(cpu.cells.iter().flatten())
                    {
                        to.bytes += from.bytes;
                        to.frames += from.frames;
                    }
                }
                visit(read_pod(key), sum);
            },
        )
    }

    /// Every place that is taken, of every processor.
    fn each_tally(&self, mut visit: impl FnMut(Tally)) -> io::Result<()> {
        batch::for_each(
            self.tallies.fd().as_fd(),
            size_of::<u32>(),
            size_of::<Tally>() * self.possible_cpus,
            |_, values| {
                let tallies = values.chunks_exact(size_of::<Tally>()).map(read_pod);
                tallies
                    .filter(|tally: &Tally| tally.ifindex != 0)
                    .for_each(&mut visit);
            },
        )
    }

    fn orphan(&self, direction: u32) -> io::Result<Cell> {
        let map = Map::PerCpuArray(
            MapData::from_id(self.orphans.info().map_err(io::Error::other)?.id())
                .map_err(io::Error::other)?,
        );
        let array: PerCpuArray<_, Cell> = map.try_into().map_err(io::Error::other)?;
        let values = array.get(&direction, 0).map_err(io::Error::other)?;
        Ok(values.iter().fold(Cell::default(), |sum, cpu| Cell {
            bytes: sum.bytes + cpu.bytes,
            frames: sum.frames + cpu.frames,
        }))
    }
}

/// The interface table, to be extended.
pub struct CellsMap {
    map: PerCpuHashMap<MapData, u32, InterfaceCells>,
    possible_cpus: usize,
}

impl CellsMap {
    /// Makes an interface's cells, if it has none.
    ///
    /// # Errors
    /// The table is full.
    pub fn make(&mut self, number: u32) -> Result<(), KernelError> {
        if self.map.get(&number, 0).is_ok() {
            return Ok(());
        }
        let zero = PerCpuValues::try_from(vec![InterfaceCells::default(); self.possible_cpus])
            .map_err(|error| map_error(name::INTERFACES, error))?;
        self.map
            .insert(number, zero, 0)
            .map_err(|error| map_error(name::INTERFACES, error))
    }
}

/// Which flows are the gateway's: by the address it listens on, or of its peers.
pub struct EndpointMap(AyaHashMap<MapData, EndpointKey, Endpoint>);

/// An address, its side ([`side`]), and the owners of the connections there.
pub type NamedEndpoint = (SocketAddr, u16, Endpoint);

impl EndpointMap {
    /// What is in it: another process's, when one takes over from another.
    #[must_use]
    pub fn all(&self) -> Vec<NamedEndpoint> {
        let named = |(key, endpoint): (EndpointKey, Endpoint)| {
            let address = std::net::Ipv6Addr::from(key.address).to_canonical();
            (SocketAddr::new(address, key.port), key.side, endpoint)
        };
        self.0.iter().flatten().map(named).collect()
    }

    /// Makes the flows at these endpoints, and no others, the gateway's. Flows that exist keep
    /// their owners.
    ///
    /// # Errors
    /// The endpoint table is full; some of the new ones may be in it.
    pub fn set(&mut self, endpoints: &[NamedEndpoint]) -> Result<(), KernelError> {
        let fail = |error: MapError| map_error(name::ENDPOINTS, error);
        let map = &mut self.0;
        let mut wanted = HashSet::new();
        for (address, side, endpoint) in endpoints {
            let key = endpoint_key(*address, *side);
            map.insert(key, endpoint, 0).map_err(fail)?;
            wanted.insert(key);
        }
        let stale: Vec<EndpointKey> = map
            .keys()
            .flatten()
            .filter(|key| !wanted.contains(key))
            .collect();
        for key in stale {
            map.remove(&key).map_err(fail)?;
        }
        Ok(())
    }
}

impl Reading {
    /// Bytes by which the parts (accounts and cells) miss the interface's total, summed over
    /// interfaces and directions; 0 when every byte has its place.
    ///
    /// Frames pass while the maps are read, so the parts are held against the total before and
    /// the total after: only what lies outside both is a gap. With the interface at rest the two
    /// are equal and the comparison is exact.
    #[must_use]
    pub fn gap_bytes(&self) -> u64 {
        let mut gap = 0;
        for (ifindex, cells) in &self.interfaces {
            let before = self.before.get(ifindex).copied().unwrap_or_default();
            for direction in 0..2 {
                let accounts: u64 = self
                    .accounts
                    .iter()
                    .filter(|(key, _)| key.ifindex == *ifindex)
                    .map(|(_, account)| [account.rx_bytes, account.tx_bytes][direction])
                    .sum();
                // The programs add the total last, so the cells read with the first total are
                // at least its share and at most the second total's.
                let parts = accounts + unaccounted(&before.cells[direction]);
                let low = before.cells[direction][cell::TOTAL].bytes;
                let high = cells.cells[direction][cell::TOTAL].bytes;
                gap += low.saturating_sub(parts) + parts.saturating_sub(high);
            }
        }
        gap
    }
}

/// Bytes of a direction that are in no account.
#[must_use]
pub fn unaccounted(cells: &[Cell; cell::COUNT]) -> u64 {
    cells[1..].iter().map(|cell| cell.bytes).sum()
}

fn endpoint_key(address: SocketAddr, side: u16) -> EndpointKey {
    EndpointKey {
        address: match address.ip() {
            // Any local address: the programs ask for all zero first.
            ip if ip.is_unspecified() && side == side::LISTENER => [0; 16],
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        },
        port: address.port(),
        side,
    }
}

fn sum_accounts(a: &Account, b: &Account) -> Account {
    Account {
        tx_bytes: a.tx_bytes + b.tx_bytes,
        tx_frames: a.tx_frames + b.tx_frames,
        tx_payload_bytes: a.tx_payload_bytes + b.tx_payload_bytes,
        tx_retransmit_bytes: a.tx_retransmit_bytes + b.tx_retransmit_bytes,
        tx_retransmit_frames: a.tx_retransmit_frames + b.tx_retransmit_frames,
        tx_retransmit_payload_bytes: a.tx_retransmit_payload_bytes + b.tx_retransmit_payload_bytes,
        rx_bytes: a.rx_bytes + b.rx_bytes,
        rx_frames: a.rx_frames + b.rx_frames,
        rx_payload_bytes: a.rx_payload_bytes + b.rx_payload_bytes,
    }
}

pub(super) fn read_pod<T: aya::Pod>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: the length was checked, T is Pod, and the read is unaligned.
    unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
}
