//! Settings of HTTP/2 after a reload: what a new connection is told, and how long it may be idle.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use xtask::exposition;

use crate::{echo::Echo, example::Example};

const CONFIGURATION: &str = r#"
[gateway]
state_dir = "state"
lane = "LANE"
[admin]
listen = "127.0.0.1:9901"
[[listeners]]
name = "public"
address = "127.0.0.1:8080"
http2 = true
[listeners.limits]
streams_max = 7
header_bytes_max = 20000
idle_timeout_ms = 60000
[[upstreams]]
name = "origin"
peers = ["127.0.0.1:9000"]
[[routes]]
name = "all"
upstream = "origin"
"#;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const MAX_HEADER_LIST_SIZE: u16 = 6;
/// Less than the idle timeout the process began with.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection without a stream, and the settings the gateway sent on it.
fn connect(gateway: &Example) -> (TcpStream, Vec<(u16, u32)>) {
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).unwrap();
        let is_settings = head[3] == 4 && head[4] & 1 == 0;
        if is_settings {
            let settings = payload.chunks_exact(6).map(|entry| {
                let id = u16::from_be_bytes([entry[0], entry[1]]);
                let value = u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]);
                (id, value)
            });
            return (stream, settings.collect());
        }
    }
}

fn new_settings_are_in_force_after_a_reload(lane: &str) {
    let origin = Echo::start("origin");
    let text = CONFIGURATION.replace("LANE", lane);
    let gateway = Example::run(&text, &[origin.address]);
    let (_, settings) = connect(&gateway);
    assert!(
        settings.contains(&(MAX_CONCURRENT_STREAMS, 7)),
        "{settings:?}"
    );
    assert!(
        settings.contains(&(MAX_HEADER_LIST_SIZE, 20_000)),
        "{settings:?}"
    );

    let path = gateway.directory.path().join("edgemeter.toml");
    let written = std::fs::read_to_string(&path).unwrap();
    let changed = written
        .replace("streams_max = 7", "streams_max = 9")
        .replace("header_bytes_max = 20000", "header_bytes_max = 30000")
        .replace("idle_timeout_ms = 60000", "idle_timeout_ms = 1000");
    std::fs::write(&path, changed).unwrap();
    gateway.signal(libc::SIGHUP);
    gateway.wait_for("second generation", || {
        matches!(exposition::get(gateway.admin, "/readyz"), Ok((200, text))
            if text.contains("\"generation\":2"))
    });
    let (mut stream, settings) = connect(&gateway);
    assert!(
        settings.contains(&(MAX_CONCURRENT_STREAMS, 9)),
        "{settings:?}"
    );
    assert!(
        settings.contains(&(MAX_HEADER_LIST_SIZE, 30_000)),
        "{settings:?}"
    );
    // Acknowledged, then GOAWAY and the end, and no time-out of ours before.
    stream.write_all(b"\0\0\0\x04\x01\0\0\0\0").unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
}

#[test]
fn new_settings_are_in_force_after_a_reload_on_the_lean_lane() {
    new_settings_are_in_force_after_a_reload("auto");
}

#[test]
fn new_settings_are_in_force_after_a_reload_on_the_full_lane() {
    new_settings_are_in_force_after_a_reload("full");
}
