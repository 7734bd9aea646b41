//! A new configuration under load: no request fails, no byte changes its owner or is lost, and a
//! bad file changes nothing.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use edgemeter::owner::{Leg, OwnerKind};
use flow_abi::cell;
use xtask::{
    load::{self, Protocol, Template},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE},
};

use crate::harness::{
    ADMIN, SERVICE, Setup, Site, assert_equal_to_far_end, assert_equal_to_far_ends, bytes_of_kind,
};

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

/// What an interface has moved, by the ledger.
fn moved(site: &Site, device: &str) -> i64 {
    let (balances, _) = site.ledger();
    let totals = balances
        .cells()
        .filter(|(interface, _, number, _, _)| *interface == device && *number == cell::TOTAL);
    totals.map(|(_, _, _, bytes, _)| bytes).sum()
}

fn other_interfaces_and_classes(name: &str, attach: &'static str) {
    let setup = Setup {
        attach,
        ..Setup::default()
    };
    let site = Site::start(name, &setup);
    let original = std::fs::read_to_string(site.config()).unwrap();
    let both = "interfaces = [\"edge0\", \"svc0\"]";
    assert!(original.contains(both), "{original}");
    let bring = |text: &str| {
        std::fs::write(site.config(), text).unwrap();
        let (applied, said) = site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
        assert!(applied, "{said}");
    };
    let classed = |interfaces: &str, prefix: &str| {
        let text = original.replace(both, &format!("interfaces = [{interfaces}]"));
        format!("{text}[[classes]]\nname = \"near\"\ncidrs = [\"{prefix}\"]\n")
    };
    let capture = |site: &Site| {
        let (host, device) = (&site.hosts.client, GATEWAY_TO_CLIENT.far_device);
        xtask::capture::FarEnd::start(host, device).unwrap()
    };
    let plan = site.plan(
        GATEWAY_TO_CLIENT.v4.into(),
        false,
        Protocol::Http1,
        1_000_000,
    );
    let client = capture(&site);
    let stop = std::sync::Arc::clone(&plan.stop);
    // The client's interface is observed throughout; the service's comes, goes, and comes back.
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(&site.hosts.client, &plan).unwrap());
        for _ in 0..3 {
            bring(&classed("\"edge0\"", "10.0.0.0/8"));
            std::thread::sleep(Duration::from_millis(300));
            bring(&classed("\"edge0\", \"svc*\", \"lo\"", "192.0.2.0/24"));
            std::thread::sleep(Duration::from_millis(300));
        }
        bring(&classed("\"edge0\"", "10.0.0.0/8"));
        stop.store(true, Ordering::Relaxed);
        let summary = load.join().unwrap();
        assert!(summary.values().map(|route| route.requests).sum::<u64>() > 100);
    });
    let page = site.quiet();
    let client = client.stop().unwrap();
    let (balances, _) = site.ledger();
    assert_equal_to_far_end(&balances, &GATEWAY_TO_CLIENT, &client);
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    for class in ["near", "default"] {
        let bytes = page.sum("edgemeter_wire_bytes_total", |s| s.label("class") == class);
        assert!(bytes > 10_000, "{class}: {bytes}");
    }
    // Not observed: nothing more is counted there, and what was is kept.
    let before = moved(&site, "svc0");
    assert!(before > 0 && moved(&site, "lo") > 0);
    let more = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 30);
    load::run(&site.hosts.client, &more).unwrap();
    site.quiet();
    assert_eq!(moved(&site, "svc0"), before);
    // Observed again: every byte from there on.
    bring(&original);
    site.quiet();
    let before = moved(&site, "svc0");
    let device = GATEWAY_TO_SERVICE.far_device;
    let service = xtask::capture::FarEnd::start(&site.hosts.service, device).unwrap();
    load::run(&site.hosts.client, &more).unwrap();
    site.quiet();
    let seen = service.stop().unwrap().total().bytes;
    assert_eq!(moved(&site, "svc0") - before, i64::try_from(seen).unwrap());

    // An interface that is not there refuses everything.
    std::fs::write(site.config(), classed("\"edge0\", \"eth77\"", "::/0")).unwrap();
    let (applied, said) = site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
    assert!(!applied && said.contains("eth77"), "{said}");
    let at = moved(&site, "svc0");
    load::run(&site.hosts.client, &more).unwrap();
    site.quiet();
    assert!(moved(&site, "svc0") > at, "what was observed is observed");
}

#[test]
fn other_interfaces_and_classes_under_load_lose_no_byte_with_tcx() {
    other_interfaces_and_classes("ot", "tcx");
}

#[test]
fn other_interfaces_and_classes_under_load_lose_no_byte_with_clsact() {
    other_interfaces_and_classes("oc", "clsact");
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
