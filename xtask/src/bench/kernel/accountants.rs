//! Whoever else counts an interface's traffic: started on it, and asked at the end what it saw.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::observer::Observer;
use crate::bench::site::{Process, Site};
use crate::host;
use crate::netns::{GATEWAY_TO_CLIENT, Topology};

/// Bytes of the ring or socket buffer that packets wait in, for those that have one: with their
/// defaults they lose packets of any fast stream.
const RING: u32 = 32 << 20;
const EXPORT_PORT: u16 = 9995;

/// Who counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accountant {
    Nobody,
    Edgemeter,
    Conntrack,
    Softflowd,
    Pmacctd,
}

/// What it says it saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// Both directions. Of wire bytes for edgemeter, of IP packets for all others.
    pub(super) bytes: u64,
    /// 5-tuples, both directions being one.
    pub(super) flows: u64,
}

/// One that is running.
pub(super) enum Running {
    Nobody,
    Edgemeter(Observer),
    Conntrack,
    Softflowd(Process, Export),
    Pmacctd(Process),
}

impl Accountant {
    pub(super) const ALL: [Self; 5] = [
        Self::Nobody,
        Self::Edgemeter,
        Self::Conntrack,
        Self::Softflowd,
        Self::Pmacctd,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Edgemeter => "edgemeter",
            Self::Conntrack => "conntrack accounting",
            Self::Softflowd => "softflowd, 32 MB ring",
            Self::Pmacctd => "pmacctd, 32 MB ring",
        }
    }

    /// Debian's version of it.
    pub(super) fn version(self) -> Result<String> {
        let package = match self {
            Self::Nobody => return Ok(String::new()),
            Self::Edgemeter => return crate::bench::edgemeter::version(),
            Self::Conntrack => "conntrack",
            Self::Softflowd => "softflowd",
            Self::Pmacctd => "pmacct",
        };
        let mut query = Command::new("dpkg-query");
        host::output(query.args(["-W", "-f", "${Version}", package]))
    }

    /// Starts it on the host's interface towards the client.
    pub(super) fn start(self, site: &Site) -> Result<Running> {
        let (hosts, directory) = (&site.hosts, site.directory.path());
        match self {
            Self::Nobody => Ok(Running::Nobody),
            Self::Edgemeter => Observer::start(site, 1 << 18).map(Running::Edgemeter),
            Self::Conntrack => {
                conntrack(hosts, true)?;
                Ok(Running::Conntrack)
            }
            Self::Softflowd => {
                let export = Export::listen(hosts)?;
                let mut command = hosts.gateway.command("softflowd")?;
                command
                    .args(["-d", "-N", "-v", "5", "-m", "1000000"])
                    .args(["-i", GATEWAY_TO_CLIENT.device, "-B", &RING.to_string()])
                    .args(["-n", &format!("127.0.0.1:{EXPORT_PORT}")])
                    .args(["-c", "softflowd.ctl", "-p", "softflowd.pid"]);
                let process = Process::start("softflowd", &mut command, directory)?;
                appears(&directory.join("softflowd.ctl"), &process)?;
                Ok(Running::Softflowd(process, export))
            }
            Self::Pmacctd => {
                fs::write(
                    directory.join("pmacctd.conf"),
                    format!(
                        "daemonize: false\npcap_interface: {}\npromisc: false\n\
                         pmacctd_pipe_size: {RING}\nplugins: memory[all]\n\
                         aggregate[all]: src_host, dst_host, src_port, dst_port, proto\n\
                         imt_path[all]: {}\nimt_buckets[all]: 262147\n\
                         imt_mem_pools_number[all]: 0\nimt_mem_pools_size[all]: 4096000\n\
                         plugin_pipe_size[all]: {RING}\nplugin_buffer_size[all]: 65536\n",
                        GATEWAY_TO_CLIENT.device,
                        directory.join("pmacctd.pipe").display(),
                    ),
                )?;
                let mut command = hosts.gateway.command("pmacctd")?;
                command.args(["-f", "pmacctd.conf"]);
                let process = Process::start("pmacctd", &mut command, directory)?;
                appears(&directory.join("pmacctd.pipe"), &process)?;
                Ok(Running::Pmacctd(process))
            }
        }
    }
}

impl Running {
    /// The processes to be charged.
    pub(super) fn pids(&self) -> Vec<u32> {
        match self {
            Self::Nobody | Self::Conntrack => Vec::new(),
            Self::Edgemeter(observer) => vec![observer.pid()],
            Self::Softflowd(process, _) | Self::Pmacctd(process) => vec![process.pid()],
        }
    }

    /// Asks what it saw, and ends it.
    pub(super) fn finish(self, hosts: &Topology, directory: &Path) -> Result<Seen> {
        match self {
            Self::Nobody => Ok(Seen::default()),
            Self::Edgemeter(observer) => {
                let listing = observer.flows()?;
                let bytes = listing
                    .identities
                    .iter()
                    .map(|identity| identity.total)
                    .sum();
                Ok(Seen {
                    bytes,
                    flows: listing.count,
                })
            }
            Self::Conntrack => {
                let mut list = hosts.gateway.command("conntrack")?;
                let said = host::output(list.arg("-L"))?;
                conntrack(hosts, false)?;
                Ok(tracked(&said))
            }
            Self::Softflowd(process, export) => {
                let mut end = Command::new("softflowctl");
                end.current_dir(directory);
                host::output(end.args(["-c", "softflowd.ctl", "shutdown"]))?;
                // It exports what it holds before it goes.
                gone(process.pid())?;
                let seen = export.finish();
                drop(process);
                seen
            }
            Self::Pmacctd(process) => {
                // The plugin takes its buffer in once a second.
                std::thread::sleep(Duration::from_millis(1500));
                let mut ask = Command::new("pmacct");
                ask.args(["-s", "-O", "json", "-p"]);
                let said = host::output(ask.arg(directory.join("pmacctd.pipe")))?;
                drop(process);
                let _ = fs::remove_file(directory.join("pmacctd.pipe"));
                accounted(&said)
            }
        }
    }
}

fn appears(path: &Path, process: &Process) -> Result<()> {
    let began = Instant::now();
    while !path.exists() {
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "{}",
            process.last_words()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    // It captures a moment later than it listens.
    std::thread::sleep(Duration::from_millis(300));
    Ok(())
}

fn gone(pid: u32) -> Result<()> {
    let state = format!("/proc/{pid}/stat");
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(&state).unwrap_or_default();
        // Ended, though its parent has not been told: state Z after the name in parentheses.
        let ended = text
            .rsplit_once(')')
            .is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'));
        if ended {
            return Ok(());
        }
        ensure!(
            began.elapsed() < Duration::from_secs(20),
            "process {pid} does not end"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Tracking begins where a rule asks for a connection's state.
fn conntrack(hosts: &Topology, on: bool) -> Result<()> {
    hosts.gateway.run(|| {
        let path = "/proc/sys/net/netfilter/nf_conntrack_acct";
        fs::write(path, if on { "1" } else { "0" }).with_context(|| format!("setting {path}"))
    })??;
    let rules = if on {
        "table inet bench { chain in { type filter hook input priority 0; ct state new accept; }; \
         chain out { type filter hook output priority 0; ct state new accept; }; }"
    } else {
        "delete table inet bench"
    };
    let mut nft = hosts.gateway.command("nft")?;
    host::output(nft.arg(rules))?;
    if !on {
        let mut flush = hosts.gateway.command("conntrack")?;
        host::output(flush.arg("-F"))?;
    }
    Ok(())
}

/// `tcp 6 431999 ESTABLISHED src=… packets=4 bytes=200 src=… packets=3 bytes=1200 …`
fn tracked(said: &str) -> Seen {
    let lines = said.lines().filter(|line| line.contains("src="));
    lines.fold(Seen::default(), |seen, line| {
        let bytes = line.split_whitespace();
        let bytes = bytes.filter_map(|word| word.strip_prefix("bytes=")?.parse::<u64>().ok());
        Seen {
            bytes: seen.bytes + bytes.sum::<u64>(),
            flows: seen.flows + 1,
        }
    })
}

/// One JSON object a line and direction.
fn accounted(said: &str) -> Result<Seen> {
    let mut tuples = HashSet::new();
    let mut bytes = 0;
    for line in said.lines().filter(|line| line.starts_with('{')) {
        let row: serde_json::Value = serde_json::from_str(line).context("pmacct's answer")?;
        bytes += row["bytes"].as_u64().context("a row without bytes")?;
        let end = |address: &str, port: &str| format!("{}:{}", row[address], row[port]);
        let mut ends = [end("ip_src", "port_src"), end("ip_dst", "port_dst")];
        ends.sort();
        tuples.insert((ends, row["ip_proto"].to_string()));
    }
    Ok(Seen {
        bytes,
        flows: tuples.len() as u64,
    })
}

/// A collector of NetFlow version 5.
pub(super) struct Export {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(Seen, HashSet<Tuple>)>>,
}

type Tuple = ([(Ipv4Addr, u16); 2], u8);

impl Export {
    fn listen(hosts: &Topology) -> Result<Self> {
        let socket = hosts
            .gateway
            .run(|| UdpSocket::bind(("127.0.0.1", EXPORT_PORT)))??;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = (Seen::default(), HashSet::new());
            let mut datagram = [0; 2048];
            loop {
                match socket.recv(&mut datagram) {
                    Ok(length) => exported(&datagram[..length], &mut seen)?,
                    Err(_) if stopped.load(Ordering::Relaxed) => return Ok(seen),
                    Err(_) => {}
                }
            }
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let (mut seen, tuples) = self
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the collector panicked"))??;
        seen.flows = tuples.len() as u64;
        Ok(seen)
    }
}

/// A header of 24 bytes with the number of records at 2, records of 48.
fn exported(datagram: &[u8], (seen, tuples): &mut (Seen, HashSet<Tuple>)) -> Result<()> {
    ensure!(
        datagram.len() >= 24 && datagram[..2] == [0, 5],
        "not NetFlow version 5"
    );
    for record in datagram[24..].chunks_exact(48) {
        let word = |at: usize| {
            u32::from_be_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
        };
        let port = |at: usize| u16::from_be_bytes([record[at], record[at + 1]]);
        seen.bytes += u64::from(word(20));
        let mut ends = [
            (Ipv4Addr::from(word(0)), port(32)),
            (Ipv4Addr::from(word(4)), port(34)),
        ];
        ends.sort_unstable();
        tuples.insert((ends, record[38]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() -> Result<()> {
        let line = "tcp 6 119 TIME_WAIT src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 packets=5 bytes=460 \
                    src=10.0.0.2 dst=10.0.0.1 sport=2 dport=1 packets=4 bytes=1216 [ASSURED] use=1";
        let seen = tracked(&format!("{line}\n{line}\n"));
        assert_eq!((seen.bytes, seen.flows), (2 * 1676, 2));
        let rows = r#"{"ip_src":"10.0.0.1","ip_dst":"10.0.0.2","port_src":1,"port_dst":2,"ip_proto":"tcp","packets":5,"bytes":460}
{"ip_src":"10.0.0.2","ip_dst":"10.0.0.1","port_src":2,"port_dst":1,"ip_proto":"tcp","packets":4,"bytes":1216}"#;
        let seen = accounted(rows)?;
        assert_eq!((seen.bytes, seen.flows), (1676, 1));
        let mut datagram = vec![0; 24 + 48];
        datagram[..4].copy_from_slice(&[0, 5, 0, 1]);
        datagram[24 + 20..24 + 24].copy_from_slice(&460u32.to_be_bytes());
        let mut sums = (Seen::default(), HashSet::new());
        exported(&datagram, &mut sums)?;
        assert_eq!((sums.0.bytes, sums.1.len()), (460, 1));
        assert!(exported(&[0; 10], &mut sums).is_err());
        Ok(())
    }
}
