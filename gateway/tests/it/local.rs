//! A gateway on loopback, without the kernel side, from one of the example configurations: what a
//! test needs that is not about bytes on a wire.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use xtask::{
    exposition::{self, Exposition},
    host,
};

/// Only turns a hang into a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A gateway process.
pub struct Local {
    child: Child,
    /// Its configuration, its log and its files.
    pub directory: tempfile::TempDir,
    admin: SocketAddr,
}

/// An address nobody listens on now.
pub fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// An example configuration, with texts replaced that must be in it.
pub fn example(name: &str, replace: &[(&str, &str)]) -> String {
    let path = host::workspace_root().join("gateway/examples").join(name);
    let mut text = std::fs::read_to_string(&path).unwrap();
    for (from, to) in replace {
        assert!(text.contains(from), "{}: no {from}", path.display());
        text = text.replace(from, to);
    }
    text
}

impl Local {
    /// Starts it with this configuration; `files` are written beside it.
    pub fn start(text: &str, files: impl FnOnce(&Path)) -> Self {
        Self::start_with("", text, files)
    }

    /// The same, with more lines in its `[gateway]`.
    pub fn start_with(gateway: &str, text: &str, files: impl FnOnce(&Path)) -> Self {
        Self::start_by(&[], gateway, text, files)
    }

    /// The same, started by a program that becomes it.
    pub fn start_by(
        launcher: &[&str],
        gateway: &str,
        text: &str,
        files: impl FnOnce(&Path),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        files(directory.path());
        let admin = free();
        let grace = if gateway.contains("grace_seconds") {
            ""
        } else {
            "grace_seconds = 0\n"
        };
        let text = format!(
            "[gateway]\nstate_dir = \"state\"\nthreads = 2\n{grace}{gateway}\n\
             [admin]\nlisten = \"{admin}\"\n[access_log]\npath = \"access.jsonl\"\nsettle_ms = 0\n{text}"
        );
        std::fs::write(directory.path().join("edgemeter.toml"), text).unwrap();
        let log = std::fs::File::create(directory.path().join("gateway.log")).unwrap();
        let mut words = launcher
            .iter()
            .copied()
            .chain([env!("CARGO_BIN_EXE_edgemeter")]);
        let child = Command::new(words.next().unwrap())
            .args(words)
            .args(["run", "--config"])
            .arg(directory.path().join("edgemeter.toml"))
            .env("RUST_LOG", "info,edgemeter=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut local = Self {
            child,
            directory,
            admin,
        };
        let started = Instant::now();
        while !matches!(exposition::get(admin, "/readyz"), Ok((200, _))) {
            if let Some(status) = local.child.try_wait().unwrap() {
                panic!("the gateway ended: {status}: {}", local.log());
            }
            assert!(started.elapsed() < PATIENCE, "not ready: {}", local.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        local
    }

    /// Replaces a text in its configuration and has it reloaded.
    pub fn reload(&self, from: &str, to: &str) {
        let path = self.directory.path().join("edgemeter.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "no {from}");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        self.hang_up();
    }

    /// Has it read its configuration and its files again.
    pub fn hang_up(&self) {
        let before = self
            .scrape()
            .sum("edgemeter_config_reloads_total", |_| true);
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: two integers; the child has not been waited for.
        unsafe { libc::kill(pid, libc::SIGHUP) };
        self.until("a reload", || {
            self.scrape()
                .sum("edgemeter_config_reloads_total", |_| true)
                > before
        });
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("gateway.log")).unwrap_or_default()
    }

    pub fn access_log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("access.jsonl")).unwrap_or_default()
    }

    pub fn scrape(&self) -> Exposition {
        exposition::scrape(self.admin).unwrap()
    }

    /// Empties the cache by the admin port; returns the answer.
    pub fn purge(&self, query: &str) -> String {
        let token = self.directory.path().join("state/admin.token");
        let token = std::fs::read_to_string(token).unwrap();
        let request = format!(
            "POST /cache/purge?{query} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            token.trim()
        );
        exchange(self.admin, request.as_bytes())
    }

    /// Asks it to stop, and goes on.
    pub fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: two integers; the child has not been waited for.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }

    /// A counter whose samples have this label value.
    pub fn count(&self, metric: &str, label: &str, value: &str) -> i128 {
        self.scrape()
            .sum(metric, |sample| sample.label(label) == value)
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.child.id());
        let pages = std::fs::read_to_string(path).unwrap();
        let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
        resident * 4096
    }

    /// Waits for what must come.
    pub fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(
                started.elapsed() < PATIENCE,
                "{what} does not come: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("gateway log:\n{}", self.log());
        }
    }
}

/// A connection to write bytes on.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Everything until the other side closes. A reset is a close.
pub fn read_to_end(stream: &mut impl std::io::Read) -> String {
    let mut all = Vec::new();
    let mut space = [0; 4096];
    loop {
        match stream.read(&mut space) {
            Ok(0) => break,
            Ok(read) => all.extend_from_slice(&space[..read]),
            Err(error) => {
                assert!(
                    !matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ),
                    "the connection stays open after {}",
                    String::from_utf8_lossy(&all)
                );
                break;
            }
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Sends bytes and returns all that comes until the connection closes.
pub fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    // A refusal may come, and the connection go, before everything is sent.
    let _ = stream.write_all(bytes);
    read_to_end(&mut stream)
}

/// One response with its body, by Content-Length.
pub fn read_response(stream: &mut impl std::io::Read) -> (u16, String, String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "closed after {head:?}");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, String::from_utf8_lossy(&body).into_owned())
}

/// One GET on a connection of its own; `headers` end in CRLF each.
pub fn get(address: SocketAddr, path: &str, headers: &str) -> (u16, String, String) {
    let mut stream = connect(address);
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n{headers}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    read_response(&mut stream)
}

/// A TLS connection, handshake done or failed.
pub fn tls(
    stream: TcpStream,
    config: &Arc<ClientConfig>,
    name: &str,
) -> Result<StreamOwned<ClientConnection, TcpStream>, std::io::Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let session = ClientConnection::new(Arc::clone(config), name).unwrap();
    let mut stream = StreamOwned::new(session, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// An HTTP/1 service on a thread for each connection: answers with what it was asked, and keeps
/// every request's header as received.
pub struct Echo {
    pub address: SocketAddr,
    seen: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Echo {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let log = Arc::clone(&log);
                std::thread::spawn(move || echo(stream, &log));
            }
        });
        Self { address, seen }
    }

    /// Headers of all requests so far.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

fn echo(mut stream: TcpStream, log: &std::sync::Mutex<Vec<String>>) {
    let _ = stream.set_nodelay(true);
    loop {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        log.lock().unwrap().push(head.clone());
        let lower = head.to_ascii_lowercase();
        let length = lower
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        if lower.contains("transfer-encoding: chunked") {
            let mut end = Vec::new();
            while !end.ends_with(b"0\r\n\r\n") {
                match stream.read(&mut byte) {
                    Ok(1) => end.push(byte[0]),
                    _ => return,
                }
            }
        }
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n{head}",
            head.len()
        );
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
