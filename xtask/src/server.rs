//! Real servers for tests: PostgreSQL and Redis, each with a directory and a free port of its
//! own, gone when dropped.
//!
//! A small shell stands between us and the server and waits on a pipe. When the pipe closes,
//! because the guard was dropped or because this process ended in whatever way, the shell stops
//! the server and removes its directory. So a server in a `static` is cleaned up as well.

mod postgres;
mod redis;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::host;

pub use postgres::Postgres;
pub(crate) use postgres::postgres_directory;
pub use redis::Redis;

/// Attempts with another port: a free port can be taken before the server binds it.
const ATTEMPTS: u32 = 5;
/// Only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

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
