//! Real servers for tests: PostgreSQL and Redis, each with a directory and a free port of its
//! own, gone when dropped.
//!
//! A small shell stands between us and the server and waits on a pipe. When the pipe closes,
//! because the guard was dropped or because this process ended in whatever way, the shell stops
//! the server and removes its directory. So a server in a `static` is cleaned up as well.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::host::{self, Tool};

/// The system account that Debian's package creates. The server refuses to run as root.
const POSTGRES_USER: &str = "postgres";
/// Attempts with another port: a free port can be taken before the server binds it.
const ATTEMPTS: u32 = 5;
/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// A PostgreSQL cluster of its own.
#[derive(Debug)]
pub struct Postgres {
    directory: PathBuf,
    settings: Vec<String>,
    port: u16,
    guard: Option<Guard>,
    databases: AtomicU64,
}

impl Postgres {
    /// Makes a cluster and starts it on a free port of 127.0.0.1, installing PostgreSQL when
    /// root and absent.
    ///
    /// # Errors
    /// When it cannot be installed, initialised or started; carries the server's log.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// As [`Postgres::start`], with `name=value` settings.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn start_with(settings: &[&str]) -> Result<Self> {
        host::need(&[Tool::POSTGRES])?;
        let directory = temporary("edgemeter-postgres-")?;
        own(&directory)?;
        let mut initdb = Command::new(postgres_program("initdb")?);
        initdb
            .args([
                "--auth=trust",
                "--no-sync",
                "--no-locale",
                "--encoding=UTF8",
            ])
            .args(["--username", POSTGRES_USER, "--pgdata"])
            .arg(directory.join("data"))
            .current_dir(&directory);
        as_postgres(&mut initdb)?;
        host::output(&mut initdb)?;
        let mut server = Self {
            directory,
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            port: 0,
            guard: None,
            databases: AtomicU64::new(0),
        };
        server.launch()?;
        Ok(server)
    }

    /// One server for all tests of a process; each takes a database of its own by
    /// [`Postgres::create_database`].
    ///
    /// # Errors
    /// As [`Postgres::start`], the same one for everybody.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<Postgres>> = OnceLock::new();
        SHARED
            .get_or_init(Self::start)
            .as_ref()
            .map_err(|error| anyhow!("{error:#}"))
    }

    /// Where the database `name` is: `postgres://postgres@127.0.0.1:PORT/NAME`.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("postgres://{POSTGRES_USER}@127.0.0.1:{}/{name}", self.port)
    }

    /// The port on 127.0.0.1. It stays the same over [`Postgres::restart`].
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A new empty database; returns its URL.
    ///
    /// # Errors
    /// What the server says.
    pub fn create_database(&self) -> Result<String> {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.query("postgres", &format!("CREATE DATABASE {name}"))?;
        Ok(self.url(&name))
    }

    /// Runs SQL with psql and returns the rows, one a line, columns separated by `|`.
    ///
    /// # Errors
    /// What the server says.
    pub fn query(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = Command::new(postgres_program("psql")?);
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(self.url(database))
            .args(["-c", sql]);
        host::output(&mut psql)
    }

    /// Kills every process of the server with SIGKILL: a crash.
    ///
    /// # Errors
    /// When it was not running.
    pub fn kill(&mut self) -> Result<()> {
        let guard = self.guard.take().context("PostgreSQL is not running")?;
        // The postmaster first, so that it cannot restart the others; they end by themselves.
        guard.kill()
    }

    /// Starts it again on the same port and data after [`Postgres::kill`].
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.guard = None;
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Orphans of a killed postmaster hold shared memory until they notice.
            match self.launch_on(self.port) {
                Ok(guard) => {
                    self.guard = Some(guard);
                    return Ok(());
                }
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn launch(&mut self) -> Result<()> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port()?;
            match self.launch_on(port) {
                Ok(guard) => {
                    self.port = port;
                    self.guard = Some(guard);
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow!("no attempt was made")))
    }

    fn launch_on(&self, port: u16) -> Result<Guard> {
        let mut server: Vec<OsString> = vec![
            postgres_program("postgres")?.into(),
            "-D".into(),
            self.directory.join("data").into(),
            "-p".into(),
            port.to_string().into(),
            "-c".into(),
            "listen_addresses=127.0.0.1".into(),
            "-c".into(),
            "unix_socket_directories=".into(),
            "-c".into(),
            "max_connections=100".into(),
        ];
        for setting in &self.settings {
            server.extend(["-c".into(), setting.into()]);
        }
        let guard = Guard::start(&server, "INT", &self.directory, as_postgres)?;
        let ready = postgres_program("pg_isready")?;
        guard.wait_until(port, || {
            let mut probe = Command::new(&ready);
            probe.args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]);
            probe.status().is_ok_and(|status| status.success())
        })?;
        Ok(guard)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.guard = None;
        remove(&self.directory);
    }
}

/// A Redis server of its own, without persistence: what it forgets at [`Redis::restart`] is
/// what a failover loses.
#[derive(Debug)]
pub struct Redis {
    directory: PathBuf,
    port: u16,
    guard: Option<Guard>,
}

impl Redis {
    /// Starts it on a free port of 127.0.0.1, installing Redis when root and absent.
    ///
    /// # Errors
    /// When it cannot be installed or started; carries the server's log.
    pub fn start() -> Result<Self> {
        host::need(&[Tool::REDIS])?;
        let directory = temporary("edgemeter-redis-")?;
        let mut server = Self {
            directory,
            port: 0,
            guard: None,
        };
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port()?;
            match server.launch_on(port) {
                Ok(guard) => {
                    server.port = port;
                    server.guard = Some(guard);
                    return Ok(server);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow!("no attempt was made")))
    }

    /// Where it is: `redis://127.0.0.1:PORT/`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Runs one command with redis-cli and returns what it prints.
    ///
    /// # Errors
    /// When the client fails.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let mut client = Command::new("redis-cli");
        client.args(["-p", &self.port.to_string()]).args(arguments);
        host::output(&mut client)
    }

    /// Kills it with SIGKILL: a crash.
    ///
    /// # Errors
    /// When it was not running.
    pub fn kill(&mut self) -> Result<()> {
        self.guard.take().context("Redis is not running")?.kill()
    }

    /// Starts it again on the same port, empty.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.guard = None;
        self.guard = Some(self.launch_on(self.port)?);
        Ok(())
    }

    fn launch_on(&self, port: u16) -> Result<Guard> {
        let server: Vec<OsString> = [
            "redis-server",
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        .map(OsString::from)
        .into();
        let guard = Guard::start(&server, "TERM", &self.directory, |_| Ok(()))?;
        guard.wait_until(port, || {
            let mut probe = Command::new("redis-cli");
            probe.args(["-p", &port.to_string(), "ping"]);
            probe
                .output()
                .is_ok_and(|output| output.stdout.starts_with(b"PONG"))
        })?;
        Ok(guard)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.guard = None;
        remove(&self.directory);
    }
}

/// A server process behind its shell.
#[derive(Debug)]
struct Guard {
    shell: Child,
    pid: u32,
    log: PathBuf,
}

impl Guard {
    /// `signal` asks the server to stop without waiting for its clients.
    fn start(
        server: &[OsString],
        signal: &str,
        directory: &Path,
        prepare: impl FnOnce(&mut Command) -> Result<()>,
    ) -> Result<Self> {
        // $1 signal, $2 our process, $3 directory. The directory goes only when we are gone:
        // a guard that is dropped may be followed by another one over the same data.
        const SCRIPT: &str = r#"
signal=$1; owner=$2; directory=$3; shift 3
"$@" >>"$directory/log" 2>&1 &
server=$!
echo "$server"
read -r _
kill -"$signal" "$server" 2>/dev/null
wait "$server"
[ -d "/proc/$owner" ] || rm -rf "$directory"
"#;
        let mut shell = Command::new("sh");
        shell
            .args(["-c", SCRIPT, "server", signal])
            .arg(std::process::id().to_string())
            .arg(directory)
            .args(server)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A signal for the test's terminal must not reach the server before the pipe closes.
            .process_group(0);
        prepare(&mut shell)?;
        let mut shell = shell.spawn().context("starting sh")?;
        let output = shell.stdout.take().context("the shell has no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let pid = line.trim().parse().context("the server's process id")?;
        let log = directory.join("log");
        Ok(Self { shell, pid, log })
    }

    /// Waits until `probe` succeeds, or the server has ended.
    fn wait_until(&self, port: u16, probe: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        loop {
            let connects = TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
            // Another program may own the port: then ours has ended.
            if !is_running(self.pid) {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("the server ended: {}", log.trim());
            }
            if connects && probe() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("the server did not become ready: {}", log.trim());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(mut self) -> Result<()> {
        host::run(Command::new("kill").args(["-KILL", &self.pid.to_string()]))?;
        drop(self.shell.stdin.take());
        self.shell.wait().context("waiting for the server")?;
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // Nothing else can be done about a shell that does not end.
        let _ = self.shell.wait();
    }
}

/// A process that exists and is no zombie.
fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        !state.starts_with('Z')
    })
}

/// The newest version's program: Debian keeps several side by side and off PATH.
fn postgres_program(name: &str) -> Result<PathBuf> {
    postgres_directory()
        .map(|directory| directory.join(name))
        .filter(|program| program.is_file())
        .with_context(|| format!("no {name} under /usr/lib/postgresql/*/bin"))
}

/// Where the newest installed version's programs are.
pub(crate) fn postgres_directory() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut versions: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let version = path.file_name()?.to_str()?.parse().ok()?;
            Some((version, path.join("bin")))
        })
        .filter(|(_, programs)| programs.join("postgres").is_file())
        .collect();
    versions.sort();
    versions.pop().map(|(_, programs)| programs)
}

/// Root gives the server's rights away; anyone else runs it as themselves.
fn as_postgres(command: &mut Command) -> Result<()> {
    if host::is_root() {
        let (uid, gid) = account(POSTGRES_USER)?;
        command.uid(uid).gid(gid);
    }
    Ok(())
}

fn own(directory: &Path) -> Result<()> {
    if host::is_root() {
        let (uid, gid) = account(POSTGRES_USER)?;
        std::os::unix::fs::chown(directory, Some(uid), Some(gid))
            .with_context(|| format!("giving {} to {POSTGRES_USER}", directory.display()))?;
    }
    Ok(())
}

/// User and group numbers of a local account.
fn account(name: &str) -> Result<(u32, u32)> {
    let accounts = std::fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    let find = |line: &str| {
        let mut fields = line.split(':');
        let is_it = fields.next()? == name;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        is_it.then_some((uid, gid))
    };
    accounts
        .lines()
        .find_map(find)
        .with_context(|| format!("there is no account {name}"))
}

fn temporary(prefix: &str) -> Result<PathBuf> {
    let directory = tempfile::Builder::new()
        .prefix(prefix)
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
        .context("making a temporary directory")?;
    Ok(directory.keep())
}

/// Removes what a server leaves. A directory that stays harms nobody.
fn remove(directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_answers_survives_a_crash_and_leaves_nothing() {
        let mut server = Postgres::start().unwrap();
        let url = server.create_database().unwrap();
        let name = url.rsplit('/').next().unwrap().to_owned();
        server
            .query(&name, "CREATE TABLE t (n int); INSERT INTO t VALUES (7)")
            .unwrap();
        server.kill().unwrap();
        assert!(server.query(&name, "SELECT 1").is_err());
        server.restart().unwrap();
        assert_eq!(server.query(&name, "SELECT n FROM t").unwrap().trim(), "7");
        let (directory, port) = (server.directory.clone(), server.port());
        drop(server);
        assert!(!directory.exists());
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    }

    #[test]
    fn redis_answers_and_forgets_at_a_crash() {
        let mut server = Redis::start().unwrap();
        server.command(&["set", "k", "v"]).unwrap();
        assert_eq!(server.command(&["get", "k"]).unwrap().trim(), "v");
        server.kill().unwrap();
        server.restart().unwrap();
        assert_eq!(server.command(&["get", "k"]).unwrap().trim(), "");
        let directory = server.directory.clone();
        drop(server);
        assert!(!directory.exists());
    }
}
