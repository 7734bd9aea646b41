//! The lean lane against the full one: the same bytes from the same client through both, compared
//! at both ends. What the origin was sent and what the client was answered must mean the same.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use xtask::{exposition, netns::Namespace};

const ORIGIN: &str = "127.0.0.1:9000";
const GATEWAY: &str = "127.0.0.1:8080";
const ADMIN: &str = "127.0.0.1:9901";
const DEADLINE: Duration = Duration::from_secs(20);

/// What a client sends, and how many answers it waits for.
struct Case {
    name: &'static str,
    sent: Vec<u8>,
    answers: usize,
}

fn case(name: &'static str, sent: impl Into<Vec<u8>>, answers: usize) -> Case {
    Case {
        name,
        sent: sent.into(),
        answers,
    }
}

fn cases() -> Vec<Case> {
    let get = |path: &str, lines: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: 1\r\n{lines}\r\n")
    };
    let post = |body: &str, lines: &str| {
        format!(
            "POST /echo HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: 1\r\n{lines}\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    vec![
        case("a plain request", get("/length", ""), 1),
        case(
            "part of a trace",
            "GET /length HTTP/1.1\r\nHost: shop.example\r\n\
             Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\r\n",
            1,
        ),
        case("a query and odd bytes", get("/length?a=b&c=%20d;e", ""), 1),
        case("chunks", get("/chunked", ""), 1),
        case("chunks with trailers", get("/trailers", ""), 1),
        case("until the connection closes", get("/close", ""), 1),
        case("no content", get("/204", ""), 1),
        case("not modified", get("/304", ""), 1),
        case("a head", get("/length", "").replacen("GET", "HEAD", 1), 1),
        case("an error of the origin's", get("/500", ""), 1),
        case("a large answer", get("/large", ""), 1),
        case("early hints", get("/103", ""), 1),
        case("no route", get("/nowhere", ""), 1),
        case("a body", post("{\"n\":1}", ""), 1),
        case("a larger body", post(&"x".repeat(40_000), ""), 1),
        case(
            "a body for the full lane",
            post(&"x".repeat(200_000), ""),
            1,
        ),
        case(
            "a chunked body",
            "POST /echo HTTP/1.1\r\nHost: shop.example\r\nX-Request-Id: 1\r\n\
             Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            1,
        ),
        case(
            "forwarded before",
            get(
                "/length",
                "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: 192.0.2.2\r\n",
            ),
            1,
        ),
        case(
            "forged",
            get(
                "/length",
                "X-Forwarded-Host: evil\r\nX-Forwarded-Proto: https\r\n",
            ),
            1,
        ),
        case(
            "lines of the connection's",
            get(
                "/length",
                "Connection: X-Private\r\nX-Private: 1\r\nTE: gzip\r\nKeep-Alive: 5\r\n",
            ),
            1,
        ),
        case(
            "several of a name",
            get("/cookies", "Cookie: a=1\r\nCookie: b=2\r\n"),
            1,
        ),
        case("closing", get("/length", "Connection: close\r\n"), 1),
        case(
            "one after the other",
            [get("/length", ""), get("/chunked", ""), get("/204", "")].concat(),
            3,
        ),
        case(
            "a body and the next request behind it",
            [post("{\"n\":1}", ""), get("/length", "")].concat(),
            2,
        ),
        case(
            "an empty line first",
            format!("\r\n{}", get("/length", "")),
            1,
        ),
        case(
            "expecting",
            post("{\"n\":1}", "Expect: 100-continue\r\n"),
            1,
        ),
        case(
            "a bare line feed",
            "GET /length HTTP/1.1\nHost: shop.example\r\n\r\n",
            1,
        ),
        case("a control byte", get("/length", "X-Odd: a\u{1}b\r\n"), 1),
        case("two lengths", post("abc", "Content-Length: 3\r\n"), 1),
        case("many lines", get("/length", &"X-Many: 1\r\n".repeat(90)), 1),
        case("a tenant", get("/length", "X-Tenant: acme\r\n"), 1),
        case(
            "a tenant that is none",
            get("/length", "X-Tenant: A C\r\n"),
            1,
        ),
        case(
            "HTTP/1.0",
            "GET /length HTTP/1.0\r\nHost: shop.example\r\nX-Request-Id: 1\r\n\r\n",
            1,
        ),
    ]
}

#[test]
fn both_lanes_say_the_same_to_both_sides() {
    let full = through("full");
    let auto = through("auto");
    for (full, auto) in full.iter().zip(&auto) {
        let name = full.name;
        assert_eq!(
            auto.answers, full.answers,
            "{name}: what the client was answered"
        );
        assert_eq!(
            auto.received, full.received,
            "{name}: what the origin was sent"
        );
    }
    assert_eq!(full.len(), auto.len());
}

/// A client that asks for nothing more is let go, on either lane, after the same time.
#[test]
fn both_lanes_let_an_idle_client_go() {
    for lane in ["full", "auto"] {
        let ended = with_gateway(lane, |_| {
            let mut stream = TcpStream::connect(GATEWAY).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let request = "GET /length HTTP/1.1\r\nHost: shop.example\r\n\r\n";
            stream.write_all(request.as_bytes()).unwrap();
            let mut wire = Wire {
                stream,
                bytes: Vec::new(),
            };
            assert!(wire.message(false).is_some(), "{lane}: no answer");
            // The end of the stream, not the test's deadline.
            let mut byte = [0];
            wire.stream.read(&mut byte)
        });
        assert_eq!(ended.unwrap(), 0, "{lane}: the connection was not closed");
    }
}

#[derive(Debug)]
struct Observed {
    name: &'static str,
    received: Vec<Message>,
    answers: Vec<Message>,
}

/// A message, without what may differ: the order and the case of header lines, and how a body of
/// unknown length is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub start: String,
    pub lines: BTreeSet<(String, String)>,
    pub body: Vec<u8>,
}

/// Sends every case through a gateway with the lane.
fn through(lane: &str) -> Vec<Observed> {
    with_gateway(lane, |received| {
        let observed = |case: &Case, pieces: usize| {
            received.lock().unwrap().clear();
            let answers = ask(case, pieces);
            let received = std::mem::take(&mut *received.lock().unwrap());
            Observed {
                name: case.name,
                received,
                answers,
            }
        };
        let cases = cases();
        // Whole, and as a slow client sends it.
        let whole = cases.iter().map(|case| observed(case, 1));
        let short = cases.iter().filter(|case| case.sent.len() < 2_000);
        whole
            .chain(short.map(|case| observed(case, 3)))
            .collect::<Vec<_>>()
    })
}

/// Runs work beside a gateway with the lane; it is given what the origin received.
fn with_gateway<T: Send>(lane: &str, work: impl FnOnce(&Mutex<Vec<Message>>) -> T + Send) -> T {
    crate::require_root();
    let host = Namespace::create(&Namespace::unique_prefix("ln")).unwrap();
    let received = Arc::new(Mutex::new(Vec::new()));
    let origin = host.run(|| TcpListener::bind(ORIGIN).unwrap()).unwrap();
    let log = Arc::clone(&received);
    std::thread::spawn(move || {
        for stream in origin.incoming().flatten() {
            let log = Arc::clone(&log);
            std::thread::spawn(move || serve(stream, &log));
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("edgemeter.toml");
    std::fs::write(&config, configuration(lane)).unwrap();
    let child = host
        .command(env!("CARGO_BIN_EXE_edgemeter"))
        .unwrap()
        .args(["run", "--config"])
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(directory.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let _gateway = Killed(child);
    host.run(|| {
        let started = Instant::now();
        while !matches!(
            exposition::get(ADMIN.parse().unwrap(), "/readyz"),
            Ok((200, _))
        ) {
            let log = std::fs::read_to_string(directory.path().join("log"));
            assert!(started.elapsed() < DEADLINE, "not ready: {log:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        work(&received)
    })
    .unwrap()
}

fn ask(case: &Case, pieces: usize) -> Vec<Message> {
    let mut stream = TcpStream::connect(GATEWAY).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    for piece in case.sent.chunks(case.sent.len().div_ceil(pieces)) {
        // A refused client is answered before it has sent everything.
        if stream.write_all(piece).is_err() {
            break;
        }
        if pieces > 1 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let to_head = case.sent.starts_with(b"HEAD");
    let mut wire = Wire {
        stream,
        bytes: Vec::new(),
    };
    let mut answers = Vec::new();
    let mut left = case.answers;
    while left > 0 {
        let Some(message) = wire.message(to_head) else {
            panic!(
                "{}: {} of {} answers",
                case.name,
                answers.len(),
                case.answers
            );
        };
        // An interim response is not the answer, and a proxy may keep it to itself.
        if message.start.starts_with("HTTP/1.1 1") {
            continue;
        }
        left -= 1;
        answers.push(message);
    }
    answers
}

/// One side of a connection, read message by message.
struct Wire {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Wire {
    fn more(&mut self) -> bool {
        let mut buffer = [0; 65_536];
        match self.stream.read(&mut buffer) {
            Ok(read @ 1..) => {
                self.bytes.extend_from_slice(&buffer[..read]);
                true
            }
            _ => false,
        }
    }

    /// The next message, its body whole; None at the end.
    fn message(&mut self, to_head: bool) -> Option<Message> {
        let end = loop {
            match self
                .bytes
                .windows(4)
                .position(|window| window == b"\r\n\r\n")
            {
                Some(at) => break at + 4,
                None if self.more() => {}
                None => return None,
            }
        };
        let head = String::from_utf8(self.bytes.drain(..end).collect()).unwrap();
        let mut parts = head.trim_end().split("\r\n");
        let start = parts.next().unwrap().to_owned();
        let mut lines: BTreeSet<(String, String)> = parts
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap();
                (name.to_ascii_lowercase(), value.trim().to_owned())
            })
            .collect();
        let value = |name: &str| {
            let found = lines.iter().find(|(other, _)| other == name);
            found.map(|(_, value)| value.clone())
        };
        let response = start.starts_with("HTTP/");
        let status = start.split(' ').nth(1).unwrap_or_default();
        let bodiless =
            response && (to_head || status.starts_with('1') || ["204", "304"].contains(&status));
        let body = if bodiless {
            Vec::new()
        } else if value("transfer-encoding").is_some() {
            self.chunks()
        } else if let Some(length) = value("content-length") {
            let length: usize = length.parse().unwrap();
            while self.bytes.len() < length && self.more() {}
            self.bytes.drain(..length.min(self.bytes.len())).collect()
        } else if response {
            while self.more() {}
            std::mem::take(&mut self.bytes)
        } else {
            Vec::new()
        };
        // Each lane may say in its way that the connection stays, or how it delimits what the
        // origin ended by closing.
        lines.retain(|(name, _)| {
            !["connection", "transfer-encoding", "date", "keep-alive"].contains(&name.as_str())
        });
        Some(Message { start, lines, body })
    }

    fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let size = line.split(';').next().unwrap().trim();
            let size = usize::from_str_radix(size, 16).unwrap();
            while self.bytes.len() < size && self.more() {}
            body.extend(self.bytes.drain(..size));
            if size == 0 {
                // Trailers may be dropped on the way (RFC 9110, section 6.5.1).
                while !self.line().is_empty() {}
                return body;
            }
            assert_eq!(self.line(), "");
        }
    }

    fn line(&mut self) -> String {
        loop {
            if let Some(at) = self.bytes.windows(2).position(|window| window == b"\r\n") {
                let line = String::from_utf8(self.bytes[..at].to_vec()).unwrap();
                self.bytes.drain(..at + 2);
                return line;
            }
            assert!(self.more(), "the connection ended inside a line");
        }
    }
}

/// Answers by path, in raw bytes, and notes what it was sent.
pub fn serve(stream: TcpStream, log: &Mutex<Vec<Message>>) {
    let mut answer_to = stream.try_clone().unwrap();
    let mut wire = Wire {
        stream,
        bytes: Vec::new(),
    };
    while let Some(request) = wire.message(false) {
        let path = request.start.split(' ').nth(1).unwrap().to_owned();
        let head = request.start.starts_with("HEAD");
        log.lock().unwrap().push(request.clone());
        let path = path.split('?').next().unwrap();
        let ok = |lines: &str, body: &[u8]| {
            let body = if head { &[] } else { body };
            [format!("HTTP/1.1 200 OK\r\n{lines}\r\n").as_bytes(), body].concat()
        };
        let (bytes, close) = match path {
            "/chunked" => (
                ok(
                    "Transfer-Encoding: chunked\r\n",
                    b"4\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n",
                ),
                false,
            ),
            "/trailers" => (
                ok(
                    "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n",
                    b"4\r\nWiki\r\n0\r\nX-Sum: 9\r\n\r\n",
                ),
                false,
            ),
            "/close" => (ok("X-Until: close\r\n", b"all there is"), true),
            "/204" => (b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n".to_vec(), false),
            "/304" => (
                b"HTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\nContent-Length: 9\r\n\r\n".to_vec(),
                false,
            ),
            "/500" => (
                b"HTTP/1.1 500 Oh No\r\nContent-Length: 3\r\n\r\nno\n".to_vec(),
                false,
            ),
            "/103" => (
                [
                    &b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"[..],
                    &ok("Content-Length: 2\r\n", b"ok"),
                ]
                .concat(),
                false,
            ),
            "/large" => {
                let body = vec![b'y'; 3_000_000];
                (ok("Content-Length: 3000000\r\n", &body), false)
            }
            "/cookies" => (
                ok(
                    "Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nConnection: X-Own\r\nX-Own: 1\r\n\
                     Content-Length: 0\r\n",
                    b"",
                ),
                false,
            ),
            "/echo" => {
                let length = format!("Content-Length: {}\r\n", request.body.len());
                (ok(&length, &request.body), false)
            }
            _ => (ok("Content-Length: 5\r\nX-Up: 1\r\n", b"hello"), false),
        };
        if answer_to.write_all(&bytes).is_err() || close {
            return;
        }
    }
}

fn configuration(lane: &str) -> String {
    let routed = [
        "/length",
        "/chunked",
        "/trailers",
        "/close",
        "/204",
        "/304",
        "/500",
        "/large",
    ]
    .iter()
    .chain(&["/103", "/cookies", "/echo"])
    .map(|path| {
        let name = &path[1..];
        format!(
            "[[routes]]\nname = \"{name}\"\npath = {{ prefix = \"{path}\" }}\n\
                 tenant = {{ header = \"x-tenant\", default = \"public\" }}\nupstream = \"o\"\n\n"
        )
    })
    .collect::<String>();
    format!(
        "[gateway]\nstate_dir = \"state\"\nlane = \"{lane}\"\ngrace_seconds = 1\n\n\
         [admin]\nlisten = \"{ADMIN}\"\n\n[[listeners]]\nname = \"plain\"\naddress = \"{GATEWAY}\"\n\
         limits = {{ idle_timeout_ms = 1500 }}\n\n\
         [[upstreams]]\nname = \"o\"\npeers = [\"{ORIGIN}\"]\n\n{routed}"
    )
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
