//! The demo's machines: namespaces, the order service, the gateway; gone when dropped.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::certificate::{self, Certificate};
use crate::exposition::{self, Exposition};
use crate::host;
use crate::netns::{
    GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, MANAGEMENT_GATEWAY, Namespace, Topology,
};

/// Fixed, so that a later run finds what `--keep` left.
const DIRECTORY: &str = "/run/edgemeter-demo";
const BPFFS: &str = "/sys/fs/bpf/edgemeter-demo";
const PREFIX: &str = "em-demo";
pub const PLAIN_PORT: u16 = 8080;
pub const TLS_PORT: u16 = 8443;
const SERVICE_PORT: u16 = 9000;
const ADMIN_PORT: u16 = 9901;
const START_DEADLINE: Duration = Duration::from_secs(20);
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// Everything that runs.
pub struct Site {
    // Fields drop in order: processes before the namespaces they live in.
    gateway: Process,
    service: Process,
    pub hosts: Topology,
    pub certificate: Certificate,
    config: PathBuf,
    _pins: Pins,
}

/// Builds what the demo runs, with the profile the tests use, so that neither builds twice.
pub fn build() -> Result<()> {
    host::run(host::cargo().args([
        "build",
        "--locked",
        "--package",
        "edgemeter",
        "--package",
        "commerce",
    ]))
}

/// Removes what an earlier run left, also one that was killed.
pub fn clean() -> Result<()> {
    let directory = Path::new(DIRECTORY);
    for name in ["gateway.pid", "service.pid"] {
        if let Ok(text) = fs::read_to_string(directory.join(name))
            && let Ok(pid) = text.trim().parse::<i32>()
            && runs_from(pid, directory)
        {
            // SAFETY: two integers; the process was checked to be ours.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    Namespace::sweep(PREFIX)?;
    let _ = fs::remove_dir_all(BPFFS);
    if directory.exists() {
        fs::remove_dir_all(directory).context("removing the earlier demo's directory")?;
    }
    Ok(())
}

/// A pid may have been given to somebody else: ours works in the demo's directory.
fn runs_from(pid: i32, directory: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == directory)
}

impl Site {
    /// Starts it all and waits until it serves.
    pub fn start() -> Result<Self> {
        let directory = PathBuf::from(DIRECTORY);
        fs::create_dir_all(&directory).context("making the demo's directory")?;
        let mut hosts = Topology::three_hosts(PREFIX)?;
        hosts.add_management_link()?;
        let addresses = [GATEWAY_TO_CLIENT.v4.into(), GATEWAY_TO_CLIENT.v6.into()];
        let certificate = certificate::write(&directory, &addresses)?;
        let config = directory.join("edgemeter.toml");
        fs::write(&config, configuration(&directory)).context("writing the configuration")?;
        let pins = Pins;
        let service = Process::start(
            "service",
            &hosts.service,
            &binary("commerce"),
            &[
                "serve",
                "--listen",
                &format!("{}:{SERVICE_PORT}", GATEWAY_TO_SERVICE.far_v4),
                "--database",
                &directory.join("commerce.db").to_string_lossy(),
            ],
        )?;
        let gateway = Process::start(
            "gateway",
            &hosts.gateway,
            &binary("edgemeter"),
            &["run", "--config", &config.to_string_lossy()],
        )?;
        let site = Self {
            gateway,
            service,
            hosts,
            certificate,
            config,
            _pins: pins,
        };
        site.wait_until_ready()?;
        Ok(site)
    }

    /// The gateway's metrics, over the management link.
    pub fn scrape(&self) -> Result<Exposition> {
        exposition::scrape(admin()).with_context(|| self.gateway.last_words())
    }

    /// Drops two of a hundred of the gateway's segments after the capture has seen them.
    pub fn lose_two_percent_at_the_client(&self) -> Result<()> {
        let rules = format!(
            "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
             tcp sport {{ {PLAIN_PORT}, {TLS_PORT} }} numgen random mod 100 < 2 drop\n }}\n}}\n"
        );
        let mut nft = self
            .hosts
            .client
            .command("nft")?
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("starting nft")?;
        nft.stdin
            .take()
            .context("nft's input")?
            .write_all(rules.as_bytes())?;
        ensure!(nft.wait()?.success(), "nft refused the loss rule");
        Ok(())
    }

    /// Stops the processes in order and returns the ledger's report.
    pub fn stop(mut self) -> Result<String> {
        self.gateway.stop()?;
        let config = self.config.to_string_lossy().into_owned();
        let report = |command: &str| -> Result<String> {
            let mut edgemeter = self.hosts.gateway.command(binary("edgemeter"))?;
            host::output(edgemeter.args([command, "--config", &config]))
        };
        let text = report("report")?;
        report("detach")?;
        self.service.stop()?;
        drop(self);
        fs::remove_dir_all(DIRECTORY).context("removing the demo's directory")?;
        Ok(text)
    }

    /// Leaves everything running.
    pub fn keep(self) {
        let (plain, tls) = (GATEWAY_TO_CLIENT.v4, GATEWAY_TO_CLIENT.v4);
        println!("\nleft running:");
        println!("  metrics    http://{}/metrics", admin());
        println!("  page       http://{}/", admin());
        println!(
            "  gateway    http://{plain}:{PLAIN_PORT} and https://{tls}:{TLS_PORT}, from the client:"
        );
        println!(
            "             nsenter --net=/run/netns/{PREFIX}-client curl http://{plain}:{PLAIN_PORT}/api/v1/products"
        );
        println!("  log        {DIRECTORY}/gateway.log, {DIRECTORY}/access.jsonl");
        println!("  to end it  cargo xtask demo --clean");
        std::mem::forget(self);
    }

    fn wait_until_ready(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Ok((200, body)) = exposition::get(admin(), "/readyz") {
                ensure!(
                    body.contains("attached"),
                    "the gateway runs degraded: {body}{}",
                    self.gateway.last_words()
                );
                return Ok(());
            }
            ensure!(
                started.elapsed() < START_DEADLINE,
                "the gateway is not ready after {START_DEADLINE:?}{}",
                self.gateway.last_words()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn admin() -> SocketAddr {
    (MANAGEMENT_GATEWAY, ADMIN_PORT).into()
}

fn binary(name: &str) -> PathBuf {
    host::target_directory().join("debug").join(name)
}

fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    let (client, service) = (GATEWAY_TO_CLIENT.device, GATEWAY_TO_SERVICE.device);
    let peer = GATEWAY_TO_SERVICE.far_v4;
    format!(
        r#"# Made by `cargo xtask demo`.
[gateway]
state_dir = "{directory}/state"
grace_seconds = 1

[admin]
listen = "{MANAGEMENT_GATEWAY}:{ADMIN_PORT}"

[observe]
interfaces = ["{client}", "{service}"]
bpffs = "{BPFFS}"
collect_interval_ms = 250
required = true

[access_log]
path = "{directory}/access.jsonl"

[[listeners]]
name = "plain"
address = "0.0.0.0:{PLAIN_PORT}"

[[listeners]]
name = "tls"
address = "0.0.0.0:{TLS_PORT}"
tls = {{ certificate = "cert.pem", key = "key.pem" }}

[[upstreams]]
name = "orders"
peers = ["{peer}:{SERVICE_PORT}"]
idle_timeout_ms = 120000

[[routes]]
name = "orders"
service = "commerce"
tenant = {{ header = "x-tenant", default = "public" }}
path = {{ prefix = "/api/v1/orders" }}
upstream = "orders"

[[routes]]
name = "catalogue"
service = "commerce"
path = {{ prefix = "/api/v1/products" }}
upstream = "orders"

[[routes]]
name = "product-page"
service = "commerce"
path = {{ prefix = "/products" }}
upstream = "orders"

# Example prices, not a provider's.
[prices]
currency = "USD"

[[prices.rates]]
id = "internet-out"
leg = "client"
direction = "tx"
price = "0.09"
unit_bytes = 1073741824

[[prices.rates]]
id = "zone-crossing"
leg = "upstream"
direction = "rx"
price = "0.01"
unit_bytes = 1073741824
"#
    )
}

/// Takes the pins away, so that the programs detach.
struct Pins;

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(BPFFS);
    }
}

/// A child with a log file; killed when dropped.
struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(
        name: &'static str,
        host: &Namespace,
        program: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let directory = Path::new(DIRECTORY);
        let log = directory.join(format!("{name}.log"));
        let file = fs::File::create(&log).context("making a log file")?;
        let child = host
            .command(program)?
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        fs::write(
            directory.join(format!("{name}.pid")),
            child.id().to_string(),
        )?;
        Ok(Self { name, child, log })
    }

    fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        // SAFETY: two integers; the child has not been waited for, so the id is its.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let started = Instant::now();
        while started.elapsed() < STOP_DEADLINE {
            if let Some(status) = self.child.try_wait()? {
                ensure!(
                    status.success(),
                    "the {} ended with {status}{}",
                    self.name,
                    self.last_words()
                );
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "the {} does not end on SIGTERM{}",
            self.name,
            self.last_words()
        )
    }

    /// The end of its log, for an error message.
    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(8).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!("\n{} said:\n{}", self.name, lines.join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
