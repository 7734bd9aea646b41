//! An access list that acts in the kernel: no connection comes about, and the bytes of those
//! turned away are counted all the same.

use std::{
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{PLAIN, Setup, Site, assert_equal_to_far_ends};

const PATIENCE: Duration = Duration::from_secs(30);

fn connect(site: &Site) -> std::io::Result<TcpStream> {
    let address = SocketAddr::from((GATEWAY_TO_CLIENT.v4, PLAIN));
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(500));
    site.hosts.client.run(connect).unwrap()
}

fn drops(site: &Site) -> i128 {
    let page = site.scrape();
    page.sum("edgemeter_listener_kernel_drops_total", |sample| {
        sample.label("listener") == "plain"
    })
}

/// Writes another list for the plain listener and has it read.
fn change(site: &Site, from: &str, to: &str) {
    let text = std::fs::read_to_string(site.config()).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(site.config(), text.replace(from, to)).unwrap();
    site.signal(libc::SIGHUP);
}

fn until(site: &Site, what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "no {what}: {}", site.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_list_in_the_kernel_turns_a_syn_away_and_its_bytes_are_counted() {
    let mut site = Site::start("ka", &Setup::default());
    let captures = site.captures();
    // Nobody is denied yet.
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 10);
    load::run(&site.hosts.client, &plan).unwrap();
    let client = GATEWAY_TO_CLIENT.far_v4;
    let open = "name = \"plain\"\n";
    let closed = format!("name = \"plain\"\naccess = {{ deny = [\"{client}\"], kernel = true }}\n");
    change(&site, open, &closed);
    // Not accepted and closed, as the gateway itself would do it: never answered.
    until(&site, "silence", || {
        connect(&site).is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut)
    });
    until(&site, "a count", || drops(&site) > 0);
    let before = drops(&site);
    assert!(connect(&site).is_err());
    until(&site, "another", || drops(&site) > before);
    // Another client is served: the list is the gateway's own address' denial no more.
    let other = format!("deny = [\"{client}\"]");
    change(&site, &other, "deny = [\"203.0.113.0/24\"]");
    until(&site, "a connection", || connect(&site).is_ok());
    // And without the word the kernel lets everybody in again.
    change(&site, "deny = [\"203.0.113.0/24\"]", &other);
    until(&site, "silence", || connect(&site).is_err());
    change(&site, &closed, open);
    until(&site, "a connection", || connect(&site).is_ok());
    site.quiet();
    site.end(libc::SIGTERM);
    let captures = captures.map(|capture| capture.stop().unwrap());
    // The SYNs that got no answer as well, to the byte and to the frame.
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
}
