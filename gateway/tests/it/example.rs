//! An example configuration, run as it is except for its addresses: on loopback, without eBPF.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use xtask::exposition::{self, Exposition};

const DEADLINE: Duration = Duration::from_secs(30);

/// A running gateway.
pub struct Example {
    child: Child,
    pub directory: tempfile::TempDir,
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

/// A port nobody has now.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// What an [`Echo`](crate::echo::Echo) said.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Example {
    /// Runs `examples/NAME.toml` with `127.0.0.1:9000 + n` replaced by the n-th upstream.
    pub fn start(name: &str, upstreams: &[SocketAddr]) -> Self {
        let path = xtask::host::workspace_root()
            .join("gateway/examples")
            .join(format!("{name}.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        Self::run(&text, upstreams)
    }

    /// Runs a text in the same way.
    pub fn run(text: &str, upstreams: &[SocketAddr]) -> Self {
        Self::run_with(text, upstreams, &[])
    }

    /// Runs a text with environment variables.
    pub fn run_with(text: &str, upstreams: &[SocketAddr], env: &[(&str, &Path)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (address, admin) = (free_address(), free_address());
        let mut text = text
            .replace("127.0.0.1:8080", &address.to_string())
            .replace("127.0.0.1:9901", &admin.to_string());
        for (n, upstream) in upstreams.iter().enumerate() {
            let port = format!("{}", 9_000 + n);
            text = text
                .replace(&format!("127.0.0.1:{port}"), &upstream.to_string())
                .replace(
                    &format!("localhost:{port}"),
                    &format!("localhost:{}", upstream.port()),
                );
        }
        let path = directory.path().join("edgemeter.toml");
        std::fs::write(&path, text).unwrap();
        let log = std::fs::File::create(directory.path().join("gateway.log")).unwrap();
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_edgemeter"))
            .args(["run", "--config"])
            .arg(&path)
            .current_dir(directory.path())
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let example = Self {
            child,
            directory,
            address,
            admin,
        };
        example.wait_for("readiness", || {
            matches!(exposition::get(admin, "/readyz"), Ok((200, _)))
        });
        example
    }

    /// One command of the program, with this configuration: whether it succeeded, and its output.
    pub fn command(&self, command: &str) -> (bool, String) {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_edgemeter"))
            .args([command, "--config", "edgemeter.toml"])
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(started.elapsed() < DEADLINE, "no {what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends the gateway a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: two integers; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits until the gateway has ended.
    pub fn wait_for_exit(&mut self) -> std::process::ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "it lives on: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("gateway.log")).unwrap_or_default()
    }

    pub fn scrape(&self) -> Exposition {
        let (_, text) = exposition::get(self.admin, "/metrics").unwrap();
        Exposition::parse(&text).unwrap()
    }

    pub fn access_log(&self, lines: usize) -> Vec<serde_json::Value> {
        let path = self.directory.path().join("access.jsonl");
        let read = || std::fs::read_to_string(&path).unwrap_or_default();
        self.wait_for("access log", || read().lines().count() >= lines);
        read()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub fn get(&self, host: &str, target: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask("GET", host, target, headers, "")
    }

    pub fn ask(
        &self,
        method: &str,
        host: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        try_ask(self.address, method, host, target, headers, body)
            .unwrap_or_else(|error| panic!("{method} {target}: {error}: {}", self.log()))
    }
}

/// One request on a connection of its own.
pub fn try_ask(
    address: SocketAddr,
    method: &str,
    host: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut request =
        format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        request += &format!("content-length: {}\r\n", body.len());
    }
    request += "\r\n";
    request += body;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let wrong = || std::io::Error::other(format!("not an answer: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(wrong)?;
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .ok_or_else(wrong)?;
    let mut fields = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ").ok_or_else(wrong)?;
        fields.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let chunked = fields
        .get("transfer-encoding")
        .is_some_and(|coding| coding == "chunked");
    Ok(Answer {
        status: status.parse().map_err(|_| wrong())?,
        headers: fields,
        body: if chunked {
            unchunk(body)
        } else {
            body.to_owned()
        },
    })
}

fn unchunk(mut rest: &str) -> String {
    let mut whole = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        whole += &after[..size];
        rest = after.get(size + 2..).unwrap_or_default();
    }
    whole
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("gateway log:\n{}", self.log());
        }
    }
}
