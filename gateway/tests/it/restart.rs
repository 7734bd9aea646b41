//! kill -9, restart, upgrade: the kernel goes on counting, the next process goes on posting.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use xtask::{
    load::{self, Protocol},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE},
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends};

fn killed_under_load(name: &str, setup: &Setup, between: impl Fn(&Site)) {
    let mut site = Site::start(name, setup);
    let captures = site.captures();
    let stop = AtomicBool::new(false);
    let served = AtomicU64::new(0);
    let mut plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 20);
    plan.per_connection = 10;
    std::thread::scope(|scope| {
        let namespace = std::fs::File::open(site.hosts.client.path()).unwrap();
        let (stop, served, plan) = (&stop, &served, &plan);
        scope.spawn(move || {
            use std::os::fd::AsRawFd as _;
            // SAFETY: a descriptor of a network namespace; affects this thread only.
            let moved = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(moved, 0, "setns");
            while !stop.load(Ordering::Relaxed) {
                // Connections break when the gateway is killed: that is the point.
                match load::run_here(plan) {
                    Ok(_) => served.fetch_add(1, Ordering::Relaxed),
                    Err(_) => {
                        std::thread::sleep(Duration::from_millis(5));
                        0
                    }
                };
            }
        });
        let progress = |goal: u64| {
            let from = served.load(Ordering::Relaxed);
            for _ in 0..2000 {
                if served.load(Ordering::Relaxed) >= from + goal {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            panic!("the load makes no progress");
        };
        for signal in [libc::SIGKILL, libc::SIGKILL, libc::SIGTERM, libc::SIGKILL] {
            progress(3);
            site.end(signal);
            between(&site);
            // Refused connections are traffic too: nobody listens, the kernel counts.
            std::thread::sleep(Duration::from_millis(150));
            site.launch();
        }
        progress(3);
        stop.store(true, Ordering::Relaxed);
    });
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    assert!(
        site.log().matches("took over").count() >= 16,
        "{}",
        site.log()
    );
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(page.sum("edgemeter_counter_regressions_total", |_| true), 0);
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
}

#[test]
fn no_byte_is_lost_or_doubled_over_kill_9_with_tcx() {
    killed_under_load(
        "kt",
        &Setup {
            attach: "tcx",
            ..Setup::default()
        },
        |_| {},
    );
}

#[test]
fn no_byte_is_lost_or_doubled_over_kill_9_with_clsact() {
    killed_under_load(
        "kc",
        &Setup {
            attach: "clsact",
            ..Setup::default()
        },
        |_| {},
    );
}

/// An earlier schema's pins, under load: the same maps and links in its directory, one map of
/// another layout, one not there yet.
fn as_an_earlier_schema_left_it(site: &Site) {
    let bpffs = site.bpffs();
    let of = |schema| bpffs.join(format!("v{schema}"));
    let (now, before) = (of(flow_abi::SCHEMA), of(flow_abi::SCHEMA - 1));
    std::fs::rename(now, &before).unwrap();
    let maps = before.join("maps");
    std::fs::remove_file(maps.join("SLOTS")).unwrap();
    std::fs::rename(maps.join("CLASSES"), maps.join("SLOTS")).unwrap();
}

#[test]
fn no_byte_is_lost_or_doubled_over_upgrades_from_another_schema_with_tcx() {
    let setup = Setup {
        attach: "tcx",
        ..Setup::default()
    };
    killed_under_load("ut", &setup, as_an_earlier_schema_left_it);
}

#[test]
fn no_byte_is_lost_or_doubled_over_upgrades_from_another_schema_with_clsact() {
    let setup = Setup {
        attach: "clsact",
        ..Setup::default()
    };
    killed_under_load("uc", &setup, as_an_earlier_schema_left_it);
}

#[test]
fn detach_takes_the_programs_off() {
    let mut site = Site::start("kd", &Setup::default());
    site.end(libc::SIGTERM);
    let mut detach = site
        .hosts
        .gateway
        .command(env!("CARGO_BIN_EXE_edgemeter"))
        .unwrap();
    let done = detach
        .args(["detach", "--config"])
        .arg(site.config())
        .status()
        .unwrap();
    assert!(done.success());
    // What moves now is nobody's business: a new gateway starts new counters at zero.
    site.launch();
    assert!(!site.log().contains("took over"), "{}", site.log());
    let page = site.quiet();
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 3);
    let before = page.sum("edgemeter_interface_bytes_total", |_| true);
    load::run(&site.hosts.client, &plan).unwrap();
    let after = site
        .quiet()
        .sum("edgemeter_interface_bytes_total", |_| true);
    assert!(after > before, "the new programs count");
}

#[test]
fn a_second_gateway_on_the_same_ledger_or_pins_is_refused() {
    let site = Site::start("k2", &Setup::default());
    let text = std::fs::read_to_string(site.config()).unwrap();
    let other = site.directory.path().join("other.toml");
    let run = |text: &str, command: &str| {
        std::fs::write(&other, text).unwrap();
        let mut edgemeter = site
            .hosts
            .gateway
            .command(env!("CARGO_BIN_EXE_edgemeter"))
            .unwrap();
        let output = edgemeter
            .args([command, "--config"])
            .arg(&other)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    // It would post every byte a second time, were it to run for one tick.
    let said = run(&text, "run");
    assert!(
        said.contains("ledger.db") && said.contains("another edgemeter"),
        "{said}"
    );
    let said = run(&text.replace("\"state\"", "\"other-state\""), "run");
    assert!(
        said.contains(&format!(
            "/v{} is in use by another edgemeter",
            flow_abi::SCHEMA
        )),
        "{said}"
    );
    let said = run(&text, "detach");
    assert!(
        said.contains("in use"),
        "the programs must not be taken off a running gateway: {said}"
    );
}

#[test]
fn another_way_to_attach_does_not_count_twice() {
    let mut site = Site::start(
        "ka",
        &Setup {
            attach: "clsact",
            ..Setup::default()
        },
    );
    let captures = site.captures();
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 12);
    for attach in ["tcx", "clsact", "auto"] {
        load::run(&site.hosts.client, &plan).unwrap();
        site.quiet();
        site.end(libc::SIGTERM);
        // Let the last segments pass: changing the mechanism leaves a moment uncounted.
        std::thread::sleep(Duration::from_millis(300));
        let text = std::fs::read_to_string(site.config()).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("attach"))
            .unwrap()
            .to_owned();
        let text = text.replace(&line, &format!("attach = \"{attach}\""));
        std::fs::write(site.config(), text).unwrap();
        site.launch();
    }
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
}

#[test]
fn an_interface_no_longer_observed_loses_its_clsact_filters() {
    let setup = Setup {
        attach: "clsact",
        ..Setup::default()
    };
    let mut site = Site::start("ki", &setup);
    let filters = |site: &Site, device: &str| {
        let mut tc = site.hosts.gateway.command("tc").unwrap();
        let shown = tc
            .args(["filter", "show", "dev", device, "egress"])
            .output();
        String::from_utf8_lossy(&shown.unwrap().stdout).into_owned()
    };
    let (edge, svc) = (GATEWAY_TO_CLIENT.device, GATEWAY_TO_SERVICE.device);
    assert!(filters(&site, svc).contains("meter_egress"));
    site.end(libc::SIGTERM);
    let text = std::fs::read_to_string(site.config()).unwrap();
    let both = format!("interfaces = [\"{edge}\", \"{svc}\"]");
    assert!(text.contains(&both));
    let text = text.replace(&both, &format!("interfaces = [\"{edge}\"]"));
    std::fs::write(site.config(), text).unwrap();
    site.launch();
    assert!(filters(&site, edge).contains("meter_egress"));
    assert!(!filters(&site, svc).contains("meter_egress"));
}

#[test]
fn a_new_ledger_over_surviving_pins_begins_at_zero_and_reuses_no_number() {
    let mut site = Site::start("kn", &Setup::default());
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 12);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    site.end(libc::SIGTERM);
    let highest = site.ledger().1.keys().max().copied().unwrap();
    std::fs::remove_dir_all(site.directory.path().join("state")).unwrap();
    site.launch();
    let captures = site.captures();
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    assert!(site.log().contains("belong to another ledger"));
    let (balances, owners) = site.ledger();
    assert!(owners.keys().all(|id| *id > highest), "{owners:?}");
    // The far ends' capture began with the second ledger.
    assert_equal_to_far_ends(&balances, captures);
}

#[test]
fn connections_closed_without_a_byte_free_their_slots() {
    let site = Site::start("ks", &Setup::default());
    let address = std::net::SocketAddr::from((GATEWAY_TO_CLIENT.v4, crate::harness::PLAIN));
    site.hosts
        .client
        .run(|| {
            for number in 0..24 {
                let stream = std::net::TcpStream::connect(address).unwrap();
                if number % 2 == 0 {
                    // Linger 0: RST instead of FIN.
                    use std::os::fd::AsRawFd as _;
                    let linger = libc::linger {
                        l_onoff: 1,
                        l_linger: 0,
                    };
                    // SAFETY: a socket of ours and a plain struct of the right size.
                    let set = unsafe {
                        libc::setsockopt(
                            stream.as_raw_fd(),
                            libc::SOL_SOCKET,
                            libc::SO_LINGER,
                            (&raw const linger).cast(),
                            u32::try_from(size_of::<libc::linger>()).unwrap(),
                        )
                    };
                    assert_eq!(set, 0);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        })
        .unwrap();
    let used = || {
        site.scrape().sum("edgemeter_connection_slots", |sample| {
            sample.label("state") == "used"
        })
    };
    for _ in 0..600 {
        if used() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{} slots are still in use", used());
}
