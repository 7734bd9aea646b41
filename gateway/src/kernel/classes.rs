//! The class table: address prefixes → class numbers, changed without a wrong answer in between.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use aya::maps::{Array, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use flow_abi::name;

use super::{KernelError, map_error, maps::Maps};
use crate::{class::ClassId, config::Cidr};

type Prefix = (u32, [u8; 16]);

/// A second hold on the class table, for whoever changes the configuration.
pub struct ClassMap([MapData; 2]);

impl Maps {
    /// A second hold on the class table.
    ///
    /// # Errors
    /// The maps cannot be opened again.
    pub fn class_map(&self) -> Result<ClassMap, KernelError> {
        let again = |at: usize, name: &'static str| {
            let data: &MapData = &self.classes[at];
            let info = data.info().map_err(|error| map_error(name, error))?;
            MapData::from_id(info.id()).map_err(|error| map_error(name, error))
        };
        Ok(ClassMap([
            again(0, name::CLASSES)?,
            again(1, name::CLASS_GENERATION)?,
        ]))
    }

    /// See [`ClassMap::set`].
    ///
    /// # Errors
    /// The table is full or cannot be written.
    pub fn set_classes(&self, wanted: &[(Cidr, ClassId)]) -> Result<(), KernelError> {
        self.class_map()?.set(wanted)
    }

    /// The highest class number in the table.
    pub(super) fn highest_class(&self) -> io::Result<u32> {
        let map = self.class_map().map_err(io::Error::other)?;
        let table = map.table().map_err(io::Error::other)?;
        let mut highest = 0;
        for entry in table.iter() {
            highest = highest.max(entry.map_err(io::Error::other)?.1);
        }
        Ok(highest)
    }
}

impl ClassMap {
    /// Makes these prefixes, and no others, the class table. Flows ask anew when it has changed;
    /// a gateway connection keeps the class it began with.
    ///
    /// While it changes, an address has its old class or its new one and never a third: longer
    /// prefixes come first and go last.
    ///
    /// # Errors
    /// The table is full or cannot be written.
    pub fn set(&self, wanted: &[(Cidr, ClassId)]) -> Result<(), KernelError> {
        let fail = |error: MapError| map_error(name::CLASSES, error);
        let mut table = self.table().map_err(fail)?;
        let mut generation = self.generation().map_err(fail)?;
        let mut new: BTreeMap<Prefix, u32> = wanted
            .iter()
            .map(|(cidr, class)| ((cidr.length(), cidr.octets()), class.0))
            .collect();
        // An IPv6 prefix, `::/0` above all, must not hold the mapped IPv4 addresses.
        let ipv4 = (Cidr::IPV4.length(), Cidr::IPV4.octets());
        new.entry(ipv4).or_insert(ClassId::DEFAULT.0);
        let mut old: BTreeMap<Prefix, u32> = BTreeMap::new();
        for entry in table.iter() {
            let (key, class) = entry.map_err(fail)?;
            old.insert((key.prefix_len(), key.data()), class);
        }
        let now = generation.get(&0, 0).map_err(fail)?;
        if old == new && now != 0 {
            return Ok(());
        }
        for ((length, address), class) in new.iter().rev() {
            table
                .insert(&Key::new(*length, *address), class, 0)
                .map_err(fail)?;
        }
        let stale: BTreeSet<&Prefix> = old.keys().filter(|key| !new.contains_key(*key)).collect();
        for (length, address) in stale {
            table.remove(&Key::new(*length, *address)).map_err(fail)?;
        }
        // 0 is what a flow has that never asked.
        generation
            .set(0, now.wrapping_add(1).max(1), 0)
            .map_err(fail)
    }

    fn table(&self) -> Result<LpmTrie<MapData, [u8; 16], u32>, MapError> {
        Map::LpmTrie(MapData::from_id(self.0[0].info()?.id())?).try_into()
    }

    fn generation(&self) -> Result<Array<MapData, u32>, MapError> {
        Map::Array(MapData::from_id(self.0[1].info()?.id())?).try_into()
    }
}
