//! edgemeter without traffic of its own, observing the host's interface towards the client.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{MapInfo, MapType};
use serde::Deserialize;

use super::programs;
use crate::bench::edgemeter;
use crate::bench::site::{Process, Site};
use crate::host;
use crate::netns::GATEWAY_TO_CLIENT;

/// A running observer; what it pinned goes with it.
pub(super) struct Observer {
    process: Option<Process>,
    configuration: PathBuf,
    bpffs: PathBuf,
    /// Programs of others.
    pub(super) others: HashSet<u32>,
    asker: Asker,
}

/// `edgemeter flows` in the host's network namespace, where interfaces have their names.
type Asker = Box<dyn Fn(&Path) -> Result<String> + Send + Sync>;

/// What `edgemeter flows --json` says.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Listing {
    pub(super) count: u64,
    pub(super) read_us: u64,
    pub(super) identities: Vec<Identity>,
}

/// Where an interface's bytes are, in one direction.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Identity {
    pub(super) direction: String,
    pub(super) total: u64,
    pub(super) flows: u64,
    pub(super) cells: BTreeMap<String, u64>,
    pub(super) difference: u64,
}

impl Listing {
    /// The identity's remainder over interfaces and directions; 0 when every byte has its place.
    pub(super) fn difference(&self) -> u64 {
        self.identities
            .iter()
            .map(|identity| identity.difference)
            .sum()
    }

    /// "flows_full 120 B, icmp 60 B", or "none".
    pub(super) fn cells(&self) -> String {
        let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, bytes) in self.identities.iter().flat_map(|identity| &identity.cells) {
            *sums.entry(name).or_default() += bytes;
        }
        if sums.is_empty() {
            return "none".into();
        }
        let parts: Vec<String> = sums
            .iter()
            .map(|(name, bytes)| format!("{name} {bytes} B"))
            .collect();
        parts.join(", ")
    }

    /// Bytes of one direction.
    pub(super) fn of(&self, direction: &str) -> Option<&Identity> {
        self.identities
            .iter()
            .find(|identity| identity.direction == direction)
    }
}

impl Observer {
    /// Starts it with a new ledger and new counters, and waits until it counts.
    pub(super) fn start(site: &Site, flows_max: u32) -> Result<Self> {
        let (hosts, directory) = (&site.hosts, site.directory.path());
        let binary = site.edgemeter.clone();
        let bpffs = edgemeter::bpffs().join("observer");
        let directory = tempfile::Builder::new()
            .prefix("observer-")
            .tempdir_in(directory)?
            .keep();
        let configuration = directory.join("edgemeter.toml");
        fs::write(
            &configuration,
            format!(
                "[gateway]\nstate_dir = \"state\"\nthreads = 1\ngrace_seconds = 0\n\n\
                 [admin]\nlisten = \"127.0.0.1:9911\"\n\n\
                 [observe]\ninterfaces = [\"{}\"]\nbpffs = \"{}\"\nrequired = true\n\
                 flows_max = {flows_max}\n\n\
                 [[listeners]]\nname = \"unused\"\naddress = \"127.0.0.1:9912\"\n\n\
                 [[upstreams]]\nname = \"unused\"\npeers = [\"127.0.0.1:9913\"]\n\n\
                 [[routes]]\nname = \"unused\"\npath = {{ prefix = \"/\" }}\nupstream = \"unused\"\n",
                GATEWAY_TO_CLIENT.device,
                bpffs.display(),
            ),
        )?;
        let others = programs::present()?;
        let mut command = hosts.gateway.command(&binary)?;
        command.args(["run", "--config"]).arg(&configuration);
        let process = Process::start("observer", &mut command, &directory)?;
        let namespace = hosts.gateway.path();
        let observer = Self {
            process: Some(process),
            configuration,
            bpffs,
            others,
            asker: Box::new(move |configuration| {
                let mut ask = std::process::Command::new("nsenter");
                ask.arg(format!("--net={}", namespace.display()));
                ask.arg(&binary);
                ask.args(["flows", "--json", "--top", "0", "--config"]);
                host::output(ask.arg(configuration))
            }),
        };
        observer.await_links()?;
        Ok(observer)
    }

    fn await_links(&self) -> Result<()> {
        let began = Instant::now();
        let link = format!("{}-egress", GATEWAY_TO_CLIENT.device);
        loop {
            let found =
                schema(&self.bpffs).is_some_and(|root| root.join("links").join(&link).exists());
            if found {
                return Ok(());
            }
            let said = || self.process.as_ref().map(Process::last_words);
            ensure!(
                began.elapsed() < Duration::from_secs(20),
                "{}",
                said().unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::pid)
    }

    /// The flow table and the identity, read by the product itself.
    pub(super) fn flows(&self) -> Result<Listing> {
        let said = (self.asker)(&self.configuration)?;
        serde_json::from_str(&said).with_context(|| format!("edgemeter flows said: {said}"))
    }

    /// Memory of the pinned maps by name, bytes, as the kernel accounts for it.
    pub(super) fn memory(&self) -> Result<BTreeMap<String, u64>> {
        let root = schema(&self.bpffs).context("nothing is pinned")?;
        let mut memory = BTreeMap::new();
        for entry in fs::read_dir(root.join("maps"))? {
            let path = entry?.path();
            let info = MapInfo::from_pin(&path).with_context(|| path.display().to_string())?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // What is in socket storage is the sockets'.
            if info.map_type().is_ok_and(|kind| kind != MapType::SkStorage) {
                memory.insert(name.into_owned(), locked(&path)?);
            }
        }
        Ok(memory)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        drop(self.process.take());
        let _ = fs::remove_dir_all(&self.bpffs);
    }
}

/// `<bpffs>/v<schema>`.
fn schema(bpffs: &Path) -> Option<PathBuf> {
    let entry = fs::read_dir(bpffs).ok()?.flatten().next()?;
    Some(entry.path())
}

/// `memlock` of the map's descriptor.
fn locked(pin: &Path) -> Result<u64> {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let data = aya::maps::MapData::from_pin(pin).context("opening a map")?;
    let path = format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .context("no memlock in a map's fdinfo")
}
