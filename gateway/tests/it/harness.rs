//! A gateway between a client and a service, each in a namespace of its own, with captures at
//! both far ends. Everything is gone when it is dropped.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Child, Stdio},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use edgemeter::{
    ledger::{Balances, Ledger},
    owner::{Owner, OwnerId, OwnerKind},
};
use xtask::{
    capture::{Capture, FarEnd},
    certificate::{self, Certificate},
    exposition::{self, Exposition},
    load::{Plan, Protocol, Template},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Link, Namespace, Topology},
};

use crate::origin::Origin;

pub const PLAIN: u16 = 8080;
pub const TLS: u16 = 8443;
pub const SERVICE: u16 = 9000;
/// On the gateway's loopback, which is not observed.
pub const ADMIN: &str = "127.0.0.1:9901";
const DEADLINE: Duration = Duration::from_secs(20);

/// What differs between tests.
#[derive(Clone)]
pub struct Setup {
    pub attach: &'static str,
    pub connections_max: u32,
    pub flows_max: u32,
    pub accounts_max: u32,
    /// Address family of the upstream peer.
    pub upstream_v6: bool,
    pub upstream_http2: bool,
    pub required: bool,
    /// With prices, so that there is a cost to show.
    pub priced: bool,
    /// Added to the configuration's end.
    pub extra: String,
    /// None: a directory of the test's own on the real bpffs.
    pub bpffs: Option<PathBuf>,
    pub grace_seconds: u32,
    /// Runs a copy of the binary in the site's directory, which can be replaced.
    pub own_binary: bool,
    /// The process list of a control group that the gateway runs in.
    pub within: Option<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            attach: "auto",
            connections_max: 1024,
            flows_max: 262_144,
            accounts_max: 16_384,
            upstream_v6: false,
            upstream_http2: false,
            required: true,
            priced: false,
            extra: String::new(),
            bpffs: None,
            grace_seconds: 0,
            own_binary: false,
            within: None,
        }
    }
}

/// The three hosts, the origin and the gateway.
pub struct Site {
    gateway: Option<Child>,
    /// A process that took over: not our child.
    successor: Option<u32>,
    binary: PathBuf,
    _origin: Origin,
    pub hosts: Topology,
    pub certificate: Certificate,
    pub directory: tempfile::TempDir,
    bpffs: PathBuf,
    within: Option<PathBuf>,
}

impl Site {
    pub fn start(name: &str, setup: &Setup) -> Self {
        crate::require_root();
        xtask::host::mount_bpffs().unwrap();
        let prefix = Namespace::unique_prefix(name);
        let hosts = Topology::three_hosts(&prefix).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let addresses = [
            IpAddr::from(GATEWAY_TO_CLIENT.v4),
            GATEWAY_TO_CLIENT.v6.into(),
        ];
        let certificate = certificate::write(directory.path(), &addresses).unwrap();
        let peers: [SocketAddr; 2] = [
            (GATEWAY_TO_SERVICE.far_v4, SERVICE).into(),
            (GATEWAY_TO_SERVICE.far_v6, SERVICE).into(),
        ];
        let origin = Origin::start(&hosts.service, &peers);
        let own = PathBuf::from("/sys/fs/bpf").join(format!("edgemeter-test-{prefix}"));
        let bpffs = setup.bpffs.clone().unwrap_or(own);
        let text = configuration(setup, peers[usize::from(setup.upstream_v6)], &bpffs);
        std::fs::write(directory.path().join("edgemeter.toml"), text).unwrap();
        let mut binary = PathBuf::from(env!("CARGO_BIN_EXE_edgemeter"));
        if setup.own_binary {
            let own = directory.path().join("edgemeter");
            std::fs::copy(&binary, &own).unwrap();
            binary = own;
        }
        let mut site = Self {
            gateway: None,
            successor: None,
            binary,
            _origin: origin,
            hosts,
            certificate,
            directory,
            bpffs,
            within: setup.within.clone(),
        };
        site.launch();
        site
    }

    /// Starts a gateway process and waits until it serves.
    pub fn launch(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("gateway.log"))
            .unwrap();
        let mut command = match &self.within {
            None => self.hosts.gateway.command(&self.binary).unwrap(),
            Some(processes) => {
                let mut shell = self.hosts.gateway.command("sh").unwrap();
                shell
                    .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
                    .arg(processes)
                    .arg(&self.binary);
                shell
            }
        };
        let child = command
            .args(["run", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.gateway = Some(child);
        let started = Instant::now();
        while self.get("/readyz").is_none_or(|(status, _)| status != 200) {
            assert!(
                started.elapsed() < DEADLINE,
                "the gateway is not ready: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Which control group the next process runs in.
    pub fn within(&mut self, processes: Option<&std::path::Path>) {
        self.within = processes.map(std::path::Path::to_owned);
    }

    /// The directory that holds the pins of each schema.
    pub fn bpffs(&self) -> &std::path::Path {
        &self.bpffs
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("edgemeter.toml")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("gateway.log")).unwrap_or_default()
    }

    /// The process that serves.
    pub fn pid(&self) -> u32 {
        let child = self.gateway.as_ref().map(Child::id);
        self.successor.or(child).unwrap()
    }

    /// An upgrade has put this process in the place of the one before, which has ended.
    pub fn replaced_by(&mut self, pid: u32) {
        if let Some(mut child) = self.gateway.take() {
            let status = child.wait().unwrap();
            assert!(status.success(), "{status}: {}", self.log());
        }
        self.successor = Some(pid);
    }

    /// One request with the token: whether it was granted, and the answer.
    pub fn ask_admin(&self, method: &str, path: &str) -> (bool, String) {
        let admin = edgemeter::config::Admin {
            listen: ADMIN.parse().unwrap(),
            token_file: self.directory.path().join("state/admin.token"),
        };
        let asked = self
            .hosts
            .gateway
            .run(|| edgemeter::admin::client::ask(&admin, method, path).unwrap());
        let (status, said) = asked.unwrap();
        (status == 200, said)
    }

    /// Sends the gateway a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.pid()).unwrap();
        // SAFETY: two integers; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Runs another command of the binary beside the gateway: success, and what it printed.
    pub fn edgemeter(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = self
            .hosts
            .gateway
            .command(env!("CARGO_BIN_EXE_edgemeter"))
            .unwrap();
        let output = command
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// Ends the gateway with a signal, and waits.
    pub fn end(&mut self, signal: i32) {
        if let Some(pid) = self.successor.take() {
            // SAFETY: two integers; the process is this test's.
            unsafe { libc::kill(i32::try_from(pid).unwrap(), signal) };
            return;
        }
        let mut child = self.gateway.take().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: two integers; the child has not been waited for.
        unsafe { libc::kill(pid, signal) };
        let status = child.wait().unwrap();
        assert!(
            signal != libc::SIGTERM || status.success(),
            "{status}: {}",
            self.log()
        );
    }

    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        let address = ADMIN.parse().unwrap();
        self.hosts
            .gateway
            .run(|| exposition::get(address, path))
            .unwrap()
            .ok()
    }

    pub fn scrape(&self) -> Exposition {
        let (status, text) = self.get("/metrics").expect("/metrics answers");
        assert_eq!(status, 200);
        Exposition::parse(&text).unwrap()
    }

    /// Waits until the interfaces are silent and everything is in the ledger.
    pub fn quiet(&self) -> Exposition {
        let mut before = (-1, -1);
        for _ in 0..60 {
            std::thread::sleep(Duration::from_millis(300));
            let page = self.scrape();
            let now = (
                page.sum("edgemeter_interface_bytes_total", |_| true),
                page.sum("edgemeter_wire_bytes_total", |_| true),
            );
            if now == before {
                return page;
            }
            before = now;
        }
        panic!("the wire does not become quiet: {}", self.log());
    }

    pub fn captures(&self) -> [FarEnd; 2] {
        [
            FarEnd::start(&self.hosts.client, GATEWAY_TO_CLIENT.far_device).unwrap(),
            FarEnd::start(&self.hosts.service, GATEWAY_TO_SERVICE.far_device).unwrap(),
        ]
    }

    /// Drops a share of the gateway's segments at the client, behind the capture.
    pub fn lose_at_the_client(&self, percent: u32) {
        use std::io::Write as _;
        let rules = format!(
            "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
             tcp sport {{ {PLAIN}, {TLS} }} numgen random mod 100 < {percent} drop\n }}\n}}\n"
        );
        xtask::host::need(&[xtask::host::Tool::NFT]).unwrap();
        let mut nft = self.hosts.client.command("nft").unwrap();
        let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        nft.stdin
            .take()
            .unwrap()
            .write_all(rules.as_bytes())
            .unwrap();
        assert!(nft.wait().unwrap().success());
    }

    pub fn plan(&self, ip: IpAddr, tls: bool, protocol: Protocol, requests: u64) -> Plan {
        Plan {
            address: (ip, if tls { TLS } else { PLAIN }).into(),
            protocol,
            root: tls.then(|| self.certificate.root.clone()),
            connections: 3,
            requests,
            deadline: Duration::from_secs(60),
            per_connection: 25,
            templates: vec![
                Template::get("small", "/small/bytes/200"),
                Template::get("large", "/large/bytes/300000"),
                Template::post("upload", "/upload/bytes/10", "u".repeat(40_000), 200),
            ],
            stop: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The access log, once it has as many lines.
    pub fn access_log(&self, lines: usize) -> String {
        let started = Instant::now();
        loop {
            let path = self.directory.path().join("access.jsonl");
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.lines().count() >= lines || started.elapsed() > DEADLINE {
                return text;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the ledger on disk holds, by owner.
    pub fn ledger(&self) -> (Balances, BTreeMap<OwnerId, Owner>) {
        let ledger = Ledger::open(&self.directory.path().join("state")).unwrap();
        (
            ledger.balances().unwrap(),
            ledger.owners().unwrap().into_iter().collect(),
        )
    }
}

impl Site {
    /// Ends every process that runs with this site's configuration.
    fn kill_all(&self) {
        let config = self.config();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let ours = line
                .split(|byte| *byte == 0)
                .any(|word| word == config.as_os_str().as_encoded_bytes());
            if ours && let Ok(pid) = process.file_name().to_string_lossy().parse::<i32>() {
                // SAFETY: two integers; the process runs with this test's own file.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut child) = self.gateway.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Also a process that took over in a test which then failed.
        self.kill_all();
        if std::thread::panicking() {
            eprintln!("gateway log:\n{}", self.log());
        }
        let _ = std::fs::remove_dir_all(&self.bpffs);
    }
}

/// The ledger's totals must be what tcpdump saw at the other end of each cable, both directions,
/// in bytes and in frames.
pub fn assert_equal_to_far_ends(balances: &Balances, captures: [Capture; 2]) {
    for (link, capture) in [GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE].iter().zip(captures) {
        assert_equal_to_far_end(balances, link, &capture);
    }
    for (interface, balance) in balances.by_interface() {
        assert_eq!(balance.difference(), 0, "{interface}: {balance:?}");
    }
}

pub fn assert_equal_to_far_end(balances: &Balances, link: &Link, capture: &Capture) {
    use flow_abi::{Direction, cell};
    for (direction, mac) in [(Direction::Tx, link.mac), (Direction::Rx, link.far_mac)] {
        let truth = capture.sent_by(mac);
        let counted = balances
            .cells()
            .find(|(interface, d, number, _, _)| {
                *interface == link.device && *d == direction && *number == cell::TOTAL
            })
            .map_or((0, 0), |(_, _, _, bytes, frames)| (bytes, frames));
        assert!(
            truth.frames > 0,
            "nothing was captured on {}",
            link.far_device
        );
        assert_eq!(
            counted,
            (
                i64::try_from(truth.bytes).unwrap(),
                i64::try_from(truth.frames).unwrap()
            ),
            "{} {direction:?}: counted (bytes, frames) against captured",
            link.device
        );
    }
}

/// Sums of the ledger over owners of a kind.
pub fn bytes_of_kind(site: &Site, kind: OwnerKind) -> i64 {
    let (balances, owners) = site.ledger();
    let kind_of = |id| {
        owners
            .get(&id)
            .map_or(OwnerKind::Foreign, |owner| owner.kind)
    };
    let of_kind = balances
        .amounts()
        .filter(|(_, _, id, _)| kind_of(*id) == kind);
    of_kind.map(|(_, _, _, amount)| amount.wire_bytes).sum()
}

fn configuration(setup: &Setup, peer: SocketAddr, bpffs: &std::path::Path) -> String {
    let Setup {
        attach,
        connections_max,
        flows_max,
        accounts_max,
        upstream_http2,
        required,
        grace_seconds,
        ..
    } = setup;
    let (client, service) = (GATEWAY_TO_CLIENT.device, GATEWAY_TO_SERVICE.device);
    let bpffs = bpffs.display();
    let mut text = format!(
        r#"
[gateway]
state_dir = "state"
threads = 2
grace_seconds = {grace_seconds}
upgrade_timeout_seconds = 10
[admin]
listen = "{ADMIN}"
[observe]
interfaces = ["{client}", "{service}"]
attach = "{attach}"
bpffs = "{bpffs}"
connections_max = {connections_max}
flows_max = {flows_max}
accounts_max = {accounts_max}
collect_interval_ms = 100
required = {required}
[access_log]
path = "access.jsonl"
[[listeners]]
name = "plain"
address = "[::]:{PLAIN}"
http2 = true
[[listeners]]
name = "tls"
address = "[::]:{TLS}"
tls = {{ certificate = "cert.pem", key = "key.pem" }}
[[upstreams]]
name = "origin"
peers = ["{peer}"]
http2 = {upstream_http2}
idle_timeout_ms = 60000
"#
    );
    if setup.priced {
        text += "[prices]\ncurrency = \"USD\"\n[[prices.rates]]\nid = \"out\"\nleg = \"client\"\n\
                 direction = \"tx\"\nprice = \"0.09\"\nunit_bytes = 1073741824\n";
    }
    for route in ["small", "large", "upload"] {
        text += &format!(
            "[[routes]]\nname = \"{route}\"\npath = {{ prefix = \"/{route}\" }}\n\
             tenant = {{ header = \"x-tenant\", default = \"public\" }}\nupstream = \"origin\"\n"
        );
    }
    text + &setup.extra
}
