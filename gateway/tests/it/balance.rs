//! A backend whose path loses packets, as the kernel sees it: its share falls, and comes back.

use std::{
    io::Write as _,
    net::SocketAddr,
    process::Stdio,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use xtask::{
    exposition::Exposition,
    host::{self, Tool},
    load::{self, Plan, Protocol, Template},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE, Namespace},
};

use crate::{
    harness::{Setup, Site},
    origin::Origin,
};

const PATIENCE: Duration = Duration::from_secs(90);
/// The first is the lossy one.
const PORTS: [u16; 3] = [9100, 9101, 9102];

fn nft(host: &Namespace, rules: &str) {
    let mut nft = host.command("nft").unwrap();
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = nft.stdin.take().unwrap();
    input.write_all(rules.as_bytes()).unwrap();
    drop(input);
    assert!(nft.wait().unwrap().success(), "{rules}");
}

/// A share of the packets to and from the first backend vanishes at the receiving ends, so that
/// neither sender's kernel knows of it.
fn lose(site: &Site, percent: u32) {
    for (host, side) in [
        (&site.hosts.service, "dport"),
        (&site.hosts.gateway, "sport"),
    ] {
        let rules = format!(
            "table inet loss {{\n chain input {{\n type filter hook input priority 0;\n \
             tcp {side} {} numgen random mod 100 < {percent} drop\n }}\n}}\n",
            PORTS[0]
        );
        nft(host, &rules);
    }
}

fn lose_no_more(site: &Site) {
    for host in [&site.hosts.service, &site.hosts.gateway] {
        nft(host, "delete table inet loss\n");
    }
}

fn of(page: &Exposition, metric: &str, port: u16) -> i128 {
    let suffix = format!(":{port}");
    page.sum(metric, |sample| sample.label("peer").ends_with(&suffix))
}

fn share(site: &Site) -> i128 {
    of(
        &site.scrape(),
        "edgemeter_peer_kernel_share_permille",
        PORTS[0],
    )
}

/// In a thousand, of the requests that `during` lets through.
fn picked(site: &Site, during: impl FnOnce()) -> i128 {
    let picks = || PORTS.map(|port| of(&site.scrape(), "edgemeter_peer_picks_total", port));
    let before = picks();
    during();
    let after = picks();
    let made: Vec<i128> = before.iter().zip(after).map(|(b, a)| a - b).collect();
    let all: i128 = made.iter().sum();
    assert!(all > 200, "too few requests to speak of shares: {made:?}");
    made[0] * 1000 / all
}

fn until(site: &Site, what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(
            started.elapsed() < PATIENCE,
            "{what} does not come: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_kernel_sees_loss_takes_requests_away_and_gives_them_back() {
    host::need(&[Tool::NFT]).unwrap();
    let peers: Vec<String> = PORTS
        .iter()
        .map(|port| format!("\"{}:{port}\"", GATEWAY_TO_SERVICE.far_v4))
        .collect();
    let extra = format!(
        "[[upstreams]]\nname = \"three\"\npeers = [{}]\nretries = 2\n\
         [[routes]]\nname = \"three\"\npath = {{ prefix = \"/three\" }}\nupstream = \"three\"\n",
        peers.join(", ")
    );
    let site = Site::start(
        "ba",
        &Setup {
            extra,
            ..Setup::default()
        },
    );
    let addresses = PORTS.map(|port| SocketAddr::from((GATEWAY_TO_SERVICE.far_v4, port)));
    let _backends = Origin::start(&site.hosts.service, &addresses);
    let plan = Plan {
        connections: 20,
        requests: u64::MAX,
        deadline: PATIENCE * 3,
        per_connection: 1000,
        templates: vec![Template::get("three", "/three/bytes/200")],
        ..site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 0)
    };
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(&site.hosts.client, &plan));
        let stop = StopOnDrop(&plan);
        let some_time = || std::thread::sleep(Duration::from_secs(1));
        until(&site, "a first look", || {
            of(&site.scrape(), "edgemeter_peer_picks_total", PORTS[0]) > 100
        });
        let even = picked(&site, some_time);
        assert!((200..470).contains(&even), "{even} of 1000 to begin with");
        lose(&site, 5);
        until(&site, "the verdict", || share(&site) < 200);
        let lowered = picked(&site, some_time);
        assert!(lowered < 150, "{lowered} of 1000 while it loses packets");
        lose_no_more(&site);
        until(&site, "forgiveness", || share(&site) > 900);
        let again = picked(&site, some_time);
        assert!(again > 200, "{again} of 1000 after the loss has ended");
        drop(stop);
        load.join().unwrap().unwrap();
    });
}

/// A failed assertion must end the load, or the scope waits for it.
struct StopOnDrop<'p>(&'p Plan);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}
