//! Network namespaces: by what number each is known in the maps, and how a thread gets into one.

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

use aya::maps::{HashMap as AyaHashMap, MapData, MapError};
use flow_abi::{interface, name};

use super::{KernelError, map_error, watch::namespace_cookie};

/// The pinned table of numbers: it lives as long as the counters that bear them.
pub struct Namespaces {
    map: AyaHashMap<MapData, u64, u32>,
    /// Cookie and name of those observed by this process.
    pub observed: Vec<(u64, String)>,
}

impl Namespaces {
    pub(super) fn new(map: AyaHashMap<MapData, u64, u32>) -> Self {
        Self {
            map,
            observed: Vec::new(),
        }
    }

    /// Observes the calling thread's namespace as number 0, the gateway's own, and no other one
    /// until it is asked for.
    ///
    /// # Errors
    /// Linux is older than 5.14, or the table cannot be written.
    pub fn begin(&mut self) -> Result<(), KernelError> {
        let cookie = namespace_cookie().map_err(|error| map_error(name::NAMESPACES, error))?;
        let entries: Vec<(u64, u32)> = self.map.iter().filter_map(Result::ok).collect();
        for (other, number) in entries {
            let number = number & !interface::OBSERVED;
            if number == 0 {
                self.map.remove(&other).map_err(fail)?;
            } else {
                self.map.insert(other, number, 0).map_err(fail)?;
            }
        }
        self.map
            .insert(cookie, interface::OBSERVED, 0)
            .map_err(fail)?;
        self.observed = vec![(cookie, String::new())];
        Ok(())
    }

    /// Observes another namespace, and says its number.
    ///
    /// # Errors
    /// It cannot be entered, it is the gateway's own, or there are too many.
    pub fn observe(&mut self, name: &str, path: &Path) -> Result<u32, KernelError> {
        let refused = |reason: String| KernelError::Attach {
            interface: format!("{name}/*"),
            reason,
        };
        let cookie = std::thread::scope(|scope| {
            let inside = scope.spawn(|| enter(path).and_then(|()| namespace_cookie()));
            inside
                .join()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        })
        .map_err(|error| refused(format!("{}: {error}", path.display())))?;
        if self.observed.iter().any(|(known, _)| *known == cookie) {
            return Err(refused("it is observed already".into()));
        }
        let known = self.map.get(&cookie, 0).ok();
        let number = match known.map(|number| number & !interface::OBSERVED) {
            Some(number) => number,
            None => {
                let numbers = self.map.iter().filter_map(Result::ok);
                let highest = numbers
                    .map(|(_, number)| number & !interface::OBSERVED)
                    .max();
                highest.unwrap_or(0) + 1
            }
        };
        if number >= interface::NAMESPACES_MAX {
            return Err(refused(
                "too many namespaces since the maps were made".into(),
            ));
        }
        self.map
            .insert(cookie, number | interface::OBSERVED, 0)
            .map_err(fail)?;
        self.observed.push((cookie, name.to_owned()));
        Ok(number)
    }
}

fn fail(error: MapError) -> KernelError {
    map_error(name::NAMESPACES, error)
}

/// Moves the calling thread into a network namespace. For threads that end there: other threads
/// do not move.
///
/// # Errors
/// There is no such namespace, or CAP_SYS_ADMIN is missing.
pub(super) fn enter(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open descriptor and a flag.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
