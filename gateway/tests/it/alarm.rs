//! The desync alarm: what arrives and is in no request is counted by who sent it, in the kernel's
//! bytes where the kernel can see it.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use xtask::netns::GATEWAY_TO_CLIENT;

use crate::{
    harness::{PLAIN, Setup, Site, TLS},
    local::read_to_end,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Sends bytes from the client's host and nothing after them; what came back.
fn send(site: &Site, port: u16, bytes: &[u8]) -> String {
    exchange(site, port, bytes, true)
}

/// Sends bytes, says with `shut` that these were all, and waits for the end of the connection.
fn exchange(site: &Site, port: u16, bytes: &[u8], shut: bool) -> String {
    let address = SocketAddr::from((GATEWAY_TO_CLIENT.v4, port));
    let sent = site.hosts.client.run(|| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        if shut {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        read_to_end(&mut stream)
    });
    sent.unwrap()
}

fn desync(site: &Site, listener: &str, reason: &str) -> i128 {
    site.scrape().sum("edgemeter_desync_bytes_total", |sample| {
        sample.label("listener") == listener && sample.label("reason") == reason
    })
}

/// Of the client's address, in the series by peer.
fn of_the_client(site: &Site) -> i128 {
    let client = IpAddr::from(GATEWAY_TO_CLIENT.far_v4).to_string();
    site.scrape().sum("edgemeter_desync_peer_bytes", |sample| {
        sample.label("peer") == client
    })
}

fn until(site: &Site, what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "no {what}: {}", site.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn scans_failed_handshakes_and_smuggling_are_counted_by_who_sent_them() {
    let site = Site::start("al", &Setup::default());
    // What belongs to requests raises nothing.
    let good = b"GET /small/bytes/10 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert!(exchange(&site, PLAIN, good, false).starts_with("HTTP/1.1 200"));
    for listener in ["plain", "tls"] {
        for reason in ["handshake", "no_request", "refused", "leftover"] {
            assert_eq!(desync(&site, listener, reason), 0, "{listener} {reason}");
        }
    }
    assert_eq!(of_the_client(&site), 0);
    assert!(!site.log().contains("are in no request"));

    // A scan: bytes that never become a request.
    send(&site, PLAIN, b"GET /half");
    until(&site, "scan", || desync(&site, "plain", "no_request") >= 9);
    // A handshake that fails: what was read of it.
    let hello = [b'x'; 500];
    send(&site, TLS, &hello);
    until(&site, "handshake", || {
        desync(&site, "tls", "handshake") >= 400
    });
    // Smuggling: a second request hidden behind two lengths. All of its bytes are the alarm's.
    let hidden = "GET /hidden HTTP/1.1\r\nHost: b\r\n\r\n".repeat(40);
    let smuggled = format!(
        "POST /small/bytes/10 HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
    );
    let answer = send(&site, PLAIN, smuggled.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let length = i128::try_from(smuggled.len()).unwrap();
    until(&site, "smuggling", || {
        desync(&site, "plain", "refused") >= length
    });
    // In frames, with their headers, and not more than a few of those.
    let refused = desync(&site, "plain", "refused");
    assert!(refused < length + 1000, "{refused} of {length}");
    // After a whole request, something that is none.
    let trailing = [&good[..good.len() - 2], b"\r\n\x16\x03\x01nonsense"].concat();
    send(&site, PLAIN, &trailing);
    until(&site, "leftover", || desync(&site, "plain", "leftover") > 0);

    // The series by peer has them all, and the log names the peer and the last reason.
    let all: i128 = [
        desync(&site, "plain", "no_request"),
        desync(&site, "tls", "handshake"),
        desync(&site, "plain", "refused"),
        desync(&site, "plain", "leftover"),
    ]
    .iter()
    .sum();
    assert_eq!(of_the_client(&site), all);
    let client = IpAddr::from(GATEWAY_TO_CLIENT.far_v4);
    let first = format!("plain: {client}: ");
    let log = site.log();
    let line = log.lines().find(|line| line.contains(&first));
    let line = line.unwrap_or_else(|| panic!("no line for {client}: {log}"));
    assert!(line.contains("the last for: no_request"), "{line}");
}
