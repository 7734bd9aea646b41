//! Redis: a server for whoever asks.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, anyhow};

use super::{ATTEMPTS, Guard, free_port, remove, temporary};
use crate::host::{self, Tool};

/// A Redis server of its own, without persistence: what it forgets at [`Redis::restart`] is
/// what a failover loses.
#[derive(Debug)]
pub struct Redis {
    pub(super) directory: PathBuf,
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
