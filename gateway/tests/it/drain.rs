//! The way out on SIGTERM, and what is alive: a request under way ends well, a connection is told,
//! and a stuck one is seen before it is.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use xtask::exposition;

use crate::{echo::Echo, example::Example};

const DEADLINE: Duration = Duration::from_secs(30);

/// `examples/operations.toml`, and what a test changes of it. A stuck request ends by the
/// upstream's time-out: until then it is seen.
fn start(origin: &Echo, lane: &str, grace: u32, delay: u32, http2: bool) -> Example {
    let path = xtask::host::workspace_root().join("gateway/examples/operations.toml");
    let text = std::fs::read_to_string(path)
        .unwrap()
        .replace("grace_seconds = 20", &format!("grace_seconds = {grace}"))
        .replace(
            "drain_delay_seconds = 1",
            &format!("drain_delay_seconds = {delay}\nlane = \"{lane}\""),
        )
        .replace("http2 = true", &format!("http2 = {http2}"));
    Example::run(&text, &[origin.address])
}

/// A connection that is kept.
struct Kept(TcpStream);

impl Kept {
    fn connect(gateway: &Example) -> Self {
        let stream = TcpStream::connect(gateway.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(stream)
    }

    fn send(&mut self, path: &str) {
        write!(self.0, "GET {path} HTTP/1.1\r\nhost: shop.example\r\n\r\n").unwrap();
    }

    /// The head of one answer in lower case; its body is read as well.
    fn answer(&mut self) -> String {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let head = head.to_lowercase();
                let length = head
                    .split("content-length: ")
                    .nth(1)
                    .and_then(|rest| rest.lines().next())
                    .map_or(0, |length| length.trim().parse::<usize>().unwrap());
                if body.len() >= length {
                    return head;
                }
            }
            let read = self.0.read(&mut piece).unwrap();
            assert!(read > 0, "closed after {text:?}");
            bytes.extend_from_slice(&piece[..read]);
        }
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 16]), Ok(0))
    }
}

fn requests_under_way_end_well(lane: &str) {
    let origin = Echo::start("origin");
    let mut gateway = start(&origin, lane, 20, 1, false);
    let mut idle = Kept::connect(&gateway);
    idle.send("/before");
    assert!(!idle.answer().contains("connection: close"));
    origin.mood.delay_ms.store(2_500, Ordering::SeqCst);
    let mut busy = Kept::connect(&gateway);
    busy.send("/slow");
    gateway.wait_for("request", || origin.requests() == 2);
    origin.mood.delay_ms.store(0, Ordering::SeqCst);

    gateway.signal(libc::SIGTERM);
    // Said first, while clients are still accepted.
    gateway.wait_for("unreadiness", || {
        matches!(exposition::get(gateway.admin, "/readyz"), Ok((503, text)) if text.contains("leaving"))
    });
    let late = gateway.get("shop.example", "/late", &[]);
    assert_eq!(late.status, 200, "accepted until the delay is over");
    gateway.wait_for("closed door", || {
        TcpStream::connect(gateway.address).is_err()
    });
    let (status, _) = exposition::get(gateway.admin, "/livez").unwrap();
    assert_eq!(status, 200, "the admin port answers to the end");
    // One that waits for its next request gets an answer and is told.
    idle.send("/after");
    let answer = idle.answer();
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    assert!(idle.is_closed());
    let answer = busy.answer();
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
    assert!(busy.is_closed());
    let ended = gateway.wait_for_exit();
    assert!(ended.success(), "{ended}: {}", gateway.log());
    assert!(gateway.log().contains("drained in"), "{}", gateway.log());
    let log = gateway.access_log(4);
    assert!(log.iter().all(|line| line["status"] == 200), "{log:?}");
    assert_eq!(log.len(), 4);
}

#[test]
fn requests_under_way_end_well_on_the_lean_lane() {
    requests_under_way_end_well("auto");
}

#[test]
fn requests_under_way_end_well_on_the_full_lane() {
    requests_under_way_end_well("full");
}

#[test]
fn an_http2_connection_gets_goaway_and_its_streams_end_on_the_lean_lane() {
    an_http2_connection_gets_goaway_and_its_streams_end("auto");
}

#[test]
fn an_http2_connection_gets_goaway_and_its_streams_end_on_the_full_lane() {
    an_http2_connection_gets_goaway_and_its_streams_end("full");
}

fn an_http2_connection_gets_goaway_and_its_streams_end(lane: &str) {
    let origin = Echo::start("origin");
    let mut gateway = start(&origin, lane, 20, 0, true);
    origin.mood.delay_ms.store(1_500, Ordering::SeqCst);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(gateway.address)
            .await
            .unwrap();
        let (sender, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut sender = sender.ready().await.unwrap();
        let request = |path: &str| {
            http::Request::builder()
                .uri(format!("http://shop.example{path}"))
                .body(())
                .unwrap()
        };
        let (under_way, _) = sender.send_request(request("/slow"), true).unwrap();
        let asked = async {
            while origin.requests() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, asked).await.unwrap();
        gateway.signal(libc::SIGTERM);
        let response = tokio::time::timeout(DEADLINE, under_way)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(response.status(), 200);
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            let _ = body.flow_control().release_capacity(data.unwrap().len());
        }
        // GOAWAY without an error, and then the end.
        tokio::time::timeout(DEADLINE, driver)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(sender.ready().await.is_err(), "no more streams");
    });
    assert!(gateway.wait_for_exit().success());
    assert_eq!(gateway.access_log(1)[0]["status"], 200);
}

#[test]
fn what_does_not_end_is_ended_after_the_grace() {
    let origin = Echo::start("origin");
    let mut gateway = start(&origin, "full", 1, 0, false);
    // A tunnel that nobody closes, as a WebSocket would be, is a request that does not end.
    origin.mood.delay_ms.store(120_000, Ordering::SeqCst);
    let mut stuck = Kept::connect(&gateway);
    stuck.send("/stuck");
    gateway.wait_for("request", || origin.requests() == 1);
    gateway.signal(libc::SIGTERM);
    assert!(gateway.wait_for_exit().success());
    assert!(
        gateway.log().contains("1 connections are still open"),
        "{}",
        gateway.log()
    );
    assert!(stuck.is_closed());
    assert_eq!(
        gateway.access_log(1).len(),
        1,
        "it is accounted all the same"
    );
}

#[test]
fn a_stuck_request_is_seen_and_load_leaves_nothing_behind() {
    let origin = Echo::start("origin");
    let gateway = start(&origin, "auto", 0, 0, false);
    let alive = |kind: &str, older_than: &str| {
        gateway.scrape().sum("edgemeter_tasks", |sample| {
            sample.label("kind") == kind && sample.label("older_than") == older_than
        })
    };
    for _ in 0..50 {
        assert_eq!(gateway.get("shop.example", "/a", &[]).status, 200);
    }
    gateway.wait_for("nothing alive", || {
        alive("connection", "0") == 0 && alive("request", "0") == 0
    });
    // As when an upstream takes requests and never answers.
    origin.mood.delay_ms.store(600_000, Ordering::SeqCst);
    let mut stuck = Kept::connect(&gateway);
    stuck.send("/stuck");
    gateway.wait_for("an old request", || alive("request", "1") == 1);
    assert_eq!(alive("connection", "1"), 1);
    let token = std::fs::read_to_string(gateway.directory.path().join("state/admin.token"));
    assert!(token.is_ok());
    let admin = edgemeter::config::Admin {
        listen: gateway.admin,
        token_file: gateway.directory.path().join("state/admin.token"),
    };
    let (status, said) = edgemeter::admin::client::ask(&admin, "GET", "/tasks").unwrap();
    assert_eq!(status, 200, "{said}");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let oldest = said["oldest"].as_array().unwrap();
    let request = oldest
        .iter()
        .find(|task| task["kind"] == "request")
        .unwrap();
    assert_eq!(request["what"], "public");
    assert!(request["age_ms"].as_u64().unwrap() >= 1_000, "{said}");
    // Its time is up: so is everything that was held for it.
    assert!(stuck.answer().starts_with("http/1.1 504"));
    drop(stuck);
    let started = Instant::now();
    while alive("request", "0") + alive("connection", "0") > 0 {
        assert!(started.elapsed() < DEADLINE, "{}", gateway.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_copy_that_a_mirror_keeps_waiting_is_seen_and_nobody_waits_for_it() {
    let servers = ["orders", "orders-next", "shadow"].map(Echo::start);
    let addresses = servers.each_ref().map(|server| server.address);
    let gateway = Example::start("routing", &addresses);
    let alive = |kind: &str, older_than: &str| {
        gateway.scrape().sum("edgemeter_tasks", |sample| {
            sample.label("kind") == kind && sample.label("older_than") == older_than
        })
    };
    servers[2].mood.delay_ms.store(6_000, Ordering::SeqCst);
    let answer = gateway.get("shop.example", "/items/13?view=short", &[]);
    assert_eq!(answer.status, 200);
    gateway.wait_for("an old copy", || alive("mirror", "1") == 1);
    assert_eq!(alive("request", "0"), 0, "its request is over");
    gateway.wait_for("no copy", || alive("mirror", "0") == 0);
}
