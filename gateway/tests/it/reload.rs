//! A new configuration under load: no request fails, no byte changes its owner or is lost, and a
//! bad file changes nothing.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use edgemeter::owner::{Leg, OwnerKind};
use xtask::{
    load::{self, Protocol, Template},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE},
};

use crate::harness::{ADMIN, SERVICE, Setup, Site, assert_equal_to_far_ends, bytes_of_kind};

fn generation(site: &Site) -> i64 {
    let (_, ready) = site.get("/readyz").unwrap();
    let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
    ready["configuration"]["generation"].as_i64().unwrap()
}

fn wait_for_generation(site: &Site, number: i64) {
    let started = Instant::now();
    while generation(site) != number {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "generation {number} does not come: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn reloads_under_load_lose_no_request_and_no_byte() {
    let site = Site::start("rl", &Setup::default());
    let captures = site.captures();
    let original = std::fs::read_to_string(site.config()).unwrap();
    let second = format!("[{}]:{SERVICE}", GATEWAY_TO_SERVICE.far_v6);
    // `large` moves to an upstream of its own, at an address the kernel does not know yet, and a
    // route is added.
    let moved = original.replace(
        "name = \"large\"\npath = { prefix = \"/large\" }\n\
         tenant = { header = \"x-tenant\", default = \"public\" }\nupstream = \"origin\"",
        "name = \"large\"\npath = { prefix = \"/large\" }\n\
         tenant = { header = \"x-tenant\", default = \"public\" }\nupstream = \"second\"",
    );
    assert_ne!(moved, original);
    let moved = format!(
        "{moved}[[upstreams]]\nname = \"second\"\npeers = [\"{second}\"]\n\
         [[routes]]\nname = \"added\"\npath = {{ prefix = \"/added\" }}\nupstream = \"second\"\n"
    );
    let plan = site.plan(
        GATEWAY_TO_CLIENT.v4.into(),
        false,
        Protocol::Http1,
        1_000_000,
    );
    let stop = std::sync::Arc::clone(&plan.stop);
    let summary = std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(&site.hosts.client, &plan).unwrap());
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(300));
            let text = if round % 2 == 0 { &moved } else { &original };
            std::fs::write(site.config(), text).unwrap();
            site.signal(libc::SIGHUP);
            wait_for_generation(&site, 2 + round);
        }
        std::fs::write(site.config(), &moved).unwrap();
        let (applied, said) = site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
        assert!(applied, "{said}");
        assert!(
            said.contains("routes[large].upstream: \"origin\" -> \"second\"")
                && said.contains("upstreams[second]: +"),
            "{said}"
        );
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    let mut added = site.plan(GATEWAY_TO_CLIENT.v4.into(), true, Protocol::Http2, 10);
    added.templates = vec![Template::get("added", "/added/bytes/1000")];
    assert_eq!(
        load::run(&site.hosts.client, &added).unwrap()["added"].requests,
        10,
        "a listener that was open before serves the new route"
    );
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, owners) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    let requests: u64 = summary.values().map(|route| route.requests).sum();
    assert_eq!(
        page.sum("edgemeter_requests_total", |sample| {
            sample.label("status_class") == "2xx"
        }),
        i128::from(requests) + 10,
        "every answer was right"
    );
    assert_eq!(
        page.sum("edgemeter_requests_total", |_| true),
        i128::from(requests) + 10
    );
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(
        bytes_of_kind(&site, OwnerKind::Foreign),
        0,
        "no byte lost its owner"
    );
    for (endpoint, route) in [
        ("origin", "large"),
        ("second", "large"),
        ("second", "added"),
    ] {
        let bytes: i64 = balances
            .amounts()
            .filter(|(_, _, id, _)| {
                owners.get(id).is_some_and(|owner| {
                    owner.leg == Leg::Upstream && owner.endpoint == endpoint && owner.route == route
                })
            })
            .map(|(_, _, _, amount)| amount.wire_bytes)
            .sum();
        assert!(bytes > 10_000, "{route} by {endpoint}: {bytes} B");
    }
    assert_eq!(
        page.sum("edgemeter_config_reloads_total", |sample| sample
            .label("result")
            == "applied"),
        5
    );
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let site = Site::start("rb", &Setup::default());
    let original = std::fs::read_to_string(site.config()).unwrap();
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 6);
    let serves = || {
        let summary = load::run(&site.hosts.client, &plan).unwrap();
        assert_eq!(summary["small"].requests, 2);
    };
    let reload = || site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
    let diff = |against: &[&str]| {
        let mut arguments = vec!["diff", "--config", "edgemeter.toml"];
        arguments.extend(against);
        site.edgemeter(&arguments)
    };
    serves();

    // The command reads its own file first, so only the signal brings a broken one to the gateway.
    std::fs::write(
        site.config(),
        original.replace("\"origin\"\n[[routes]]", "\"orgin\"\n[[routes]]"),
    )
    .unwrap();
    site.signal(libc::SIGHUP);
    let started = Instant::now();
    let refused = || site.scrape().sum("edgemeter_config_refused", |_| true);
    while refused() != 1 {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let (status, ready) = site.get("/readyz").unwrap();
    assert_eq!(status, 200, "it serves on");
    assert!(ready.contains("orgin"), "{ready}");
    assert!(site.log().contains("reload refused"), "{}", site.log());
    assert_eq!(generation(&site), 1);
    serves();

    // Half of this could be applied; none of it is.
    let mixed = original
        .replace("threads = 2", "threads = 1")
        .replace("/small", "/little");
    std::fs::write(site.config(), &mixed).unwrap();
    let (same, said) = diff(&[]);
    assert!(same, "{said}");
    assert!(
        said.contains("gateway.threads: 2 -> 1 (needs restart or upgrade")
            && said.contains("routes[small].path.prefix: \"/small\" -> \"/little\"")
            && said.contains("a reload would refuse them"),
        "{said}"
    );
    let (applied, said) = reload();
    assert!(!applied && said.contains("gateway.threads"), "{said}");
    assert_eq!(generation(&site), 1);
    serves();

    std::fs::write(site.directory.path().join("running.toml"), &original).unwrap();
    std::fs::write(site.config(), original.replace("/upload", "/up")).unwrap();
    let (same, said) = diff(&["--against", "running.toml"]);
    assert!(same && said.contains("a reload applies them"), "{said}");
    assert_eq!(diff(&[]), diff(&["--against", "running.toml"]));

    std::fs::write(site.config(), &original).unwrap();
    let (applied, said) = reload();
    assert!(applied && said.is_empty(), "{said}");
    assert_eq!(refused(), 0, "the good file is good again");
    serves();
}

#[test]
fn control_asks_for_the_token() {
    let site = Site::start("rt", &Setup::default());
    for path in ["/config", "/reload"] {
        let (status, said) = site.get(path).unwrap();
        assert_eq!(status, 401, "{said}");
        assert!(said.contains("admin.token_file"), "{said}");
    }
    let token = site.directory.path().join("state/admin.token");
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&token).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let token = std::fs::read_to_string(token).unwrap();
    let ask = |authorization: &str| {
        use std::io::{Read as _, Write as _};
        site.hosts
            .gateway
            .run(|| {
                let mut stream = std::net::TcpStream::connect(ADMIN).unwrap();
                write!(
                    stream,
                    "GET /config HTTP/1.1\r\nhost: x\r\nauthorization: {authorization}\r\n\
                     connection: close\r\n\r\n"
                )
                .unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            })
            .unwrap()
    };
    assert!(ask("Bearer wrong").starts_with("HTTP/1.1 401"));
    let answer = ask(&format!("Bearer {}", token.trim()));
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("[[listeners]]"),
        "{answer}"
    );
}
