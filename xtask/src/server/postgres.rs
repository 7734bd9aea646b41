//! PostgreSQL: a cluster for whoever asks.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::{ATTEMPTS, Guard, PATIENCE, free_port, remove, temporary};
use crate::host::{self, Tool};

/// The system account that Debian's package creates. The server refuses to run as root.
const POSTGRES_USER: &str = "postgres";

/// A PostgreSQL cluster of its own.
#[derive(Debug)]
pub struct Postgres {
    pub(super) directory: PathBuf,
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
