//! Another process takes over under load: no request fails, no byte is lost or doubled. And where
//! it cannot, the old one serves on.

use std::{
    os::unix::fs::PermissionsExt as _,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use edgemeter::owner::OwnerKind;
use xtask::{
    load::{self, Plan, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends, bytes_of_kind};

const DEADLINE: Duration = Duration::from_secs(60);

/// A gateway whose binary is a copy that can be replaced.
fn site(name: &str, setup: Setup) -> Site {
    Site::start(
        name,
        &Setup {
            grace_seconds: 20,
            own_binary: true,
            ..setup
        },
    )
}

fn upgrade(site: &Site) -> (bool, String) {
    site.edgemeter(&["upgrade", "--config", "edgemeter.toml"])
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A process nobody has waited for is over all the same.
    !stat.is_empty() && !stat.contains(") Z ")
}

fn wait_for_end(site: &Site, pid: u32) {
    let started = Instant::now();
    while is_alive(pid) {
        assert!(
            started.elapsed() < DEADLINE,
            "process {pid} does not end: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// HTTP/1 plain, and HTTP/1 and HTTP/2 over TLS, all at once, without an end.
fn plans(site: &Site) -> [Plan; 3] {
    let ip = GATEWAY_TO_CLIENT.v4.into();
    [
        (false, Protocol::Http1),
        (true, Protocol::Http1),
        (true, Protocol::Http2),
    ]
    .map(|(tls, protocol)| {
        let mut plan = site.plan(ip, tls, protocol, u64::MAX);
        plan.connections = 2;
        plan
    })
}

/// What was answered while `work` went on; a request that fails ends the test.
fn under_load(site: &Site, work: impl FnOnce()) -> u64 {
    let plans = plans(site);
    std::thread::scope(|scope| {
        let loads = plans
            .each_ref()
            .map(|plan| scope.spawn(|| load::run(&site.hosts.client, plan)));
        std::thread::sleep(Duration::from_millis(300));
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        std::thread::sleep(Duration::from_millis(300));
        for plan in &plans {
            plan.stop.store(true, Ordering::Relaxed);
        }
        let answers = loads.map(|load| load.join().unwrap().unwrap());
        if let Err(panic) = worked {
            std::panic::resume_unwind(panic);
        }
        let answers = answers.iter().flat_map(|summary| summary.values());
        answers.map(|answers| answers.requests).sum()
    })
}

fn upgrades_under_load(name: &str, attach: &'static str) {
    let mut site = site(
        name,
        Setup {
            attach,
            ..Setup::default()
        },
    );
    let captures = site.captures();
    let mut pids = vec![site.pid()];
    let mut replaced = Vec::new();
    let answered = under_load(&site, || {
        for _ in 0..4 {
            let started = Instant::now();
            let said = loop {
                let (done, said) = upgrade(&site);
                if done {
                    break said;
                }
                // One at a time.
                assert!(
                    said.contains("still drains") && started.elapsed() < DEADLINE,
                    "{said}: {}",
                    site.log()
                );
                std::thread::sleep(Duration::from_millis(50));
            };
            let words: Vec<&str> = said.split(' ').collect();
            assert_eq!((words[0], words[2]), ("process", "serves;"), "{said}");
            let pid = words[1].parse().unwrap();
            replaced.push(*pids.last().unwrap());
            pids.push(pid);
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    for pid in replaced {
        wait_for_end(&site, pid);
    }
    site.replaced_by(*pids.last().unwrap());
    assert!(answered > 500, "{answered} requests");
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(page.sum("edgemeter_counter_regressions_total", |_| true), 0);
    assert_eq!(page.sum("edgemeter_slots_exhausted_total", |_| true), 0);
    assert_eq!(
        bytes_of_kind(&site, OwnerKind::Foreign),
        0,
        "no byte lost its owner"
    );
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    // What the old processes' last requests received was claimed through the new one.
    let log = site.access_log(usize::try_from(answered).unwrap());
    assert_eq!(log.lines().count() as u64, answered, "a line a request");
    let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    for entry in log.lines().map(line) {
        assert_eq!(entry["status"], 200, "{entry}");
    }
    let unclaimed = bytes_of_kind(&site, OwnerKind::Unclaimed);
    let received: i64 = balances
        .amounts()
        .map(|(_, _, _, amount)| amount.wire_bytes)
        .sum();
    assert!(
        unclaimed * 50 < received,
        "{unclaimed} of {received} B are claimed by no request"
    );
    site.end(libc::SIGTERM);
}

#[test]
fn upgrades_under_load_lose_no_request_and_no_byte_with_tcx() {
    upgrades_under_load("ut", "tcx");
}

#[test]
fn upgrades_under_load_lose_no_request_and_no_byte_with_clsact() {
    upgrades_under_load("uc", "clsact");
}

/// Puts a program in the binary's place, as a package manager does: beside, and renamed.
fn replace_binary(site: &Site, content: &[u8]) {
    let binary = site.directory.path().join("edgemeter");
    let beside = binary.with_extension("new");
    std::fs::write(&beside, content).unwrap();
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(beside, binary).unwrap();
}

#[test]
fn a_handover_that_fails_leaves_the_old_process_serving_every_byte() {
    let mut site = site("uf", Setup::default());
    let captures = site.captures();
    let good_binary = std::fs::read(env!("CARGO_BIN_EXE_edgemeter")).unwrap();
    let good_config = std::fs::read_to_string(site.config()).unwrap();
    let pid = site.pid();
    // In the middle of getting ready: the programs take the kernel a while.
    let kill_the_new_one = |from: usize| {
        let started = Instant::now();
        loop {
            let log = site.log();
            let said = log[from..].split("upgrade: process ").nth(1);
            if let Some(new) = said.and_then(|rest| rest.split(' ').next()?.parse().ok()) {
                // SAFETY: two integers; the process is the gateway's child, and not waited for.
                assert_eq!(unsafe { libc::kill(new, libc::SIGKILL) }, 0);
                return;
            }
            assert!(started.elapsed() < DEADLINE, "{}", &log[from..]);
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let mut answered = 0;
    for (what, binary, config, expected) in [
        (
            "it ends at once",
            "#!/bin/sh\nexit 7\n".to_owned(),
            None,
            "exit status: 7",
        ),
        (
            "it is no program",
            "\x7fELF not".to_owned(),
            None,
            "cannot start",
        ),
        (
            "its configuration is wrong",
            String::new(),
            Some(good_config.replace("\"origin\"\n[[routes]]", "\"orgin\"\n[[routes]]")),
            "orgin",
        ),
        (
            "its port is taken",
            String::new(),
            Some(good_config.replace("[::]:8080", "127.0.0.1:9902")),
            "cannot listen on 127.0.0.1:9902",
        ),
        (
            "its ledger is another",
            String::new(),
            Some(good_config.replace("\"state\"", "\"other\"")),
            "stop it and start this one",
        ),
        (
            // Known only when the programs are attached: the old process has let go by then.
            "its interface is missing",
            String::new(),
            Some(good_config.replace("interfaces = [", "interfaces = [\"nowhere0\", ")),
            "nowhere0",
        ),
        ("it is killed", String::new(), None, "signal: 9"),
    ] {
        let blocker = site
            .hosts
            .gateway
            .run(|| std::net::TcpListener::bind("127.0.0.1:9902").unwrap())
            .unwrap();
        let from = site.log().len();
        let binary = if binary.is_empty() {
            good_binary.clone()
        } else {
            binary.into_bytes()
        };
        replace_binary(&site, &binary);
        std::fs::write(site.config(), &good_config).unwrap();
        let bad = config.map(|text| {
            std::fs::write(site.config(), text).unwrap();
        });
        answered += under_load(&site, || {
            let (done, said) = std::thread::scope(|scope| {
                if what == "it is killed" {
                    scope.spawn(|| kill_the_new_one(from));
                }
                match bad {
                    // The command would find the mistake itself.
                    Some(()) => site.ask_admin("POST", "/upgrade"),
                    None => upgrade(&site),
                }
            });
            assert!(
                !done && said.contains(expected),
                "{what}: {said}: {}",
                site.log()
            );
        });
        drop(blocker);
        assert!(is_alive(pid), "{what}: {}", site.log());
        let (status, _) = site.get("/readyz").unwrap();
        assert_eq!(status, 200, "{what}: {}", site.log());
    }
    let page = site.quiet();
    let failed = page.sum("edgemeter_upgrades_total", |sample| {
        sample.label("result") == "failed"
    });
    assert_eq!(failed, 7);
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(
        page.sum("edgemeter_requests_total", |sample| sample
            .label("status_class")
            == "2xx"),
        i128::from(answered),
        "the old process answered all of them"
    );
    // It can still do what it is asked.
    std::fs::write(site.config(), &good_config).unwrap();
    let (reloaded, said) = site.edgemeter(&["reload", "--config", "edgemeter.toml"]);
    assert!(reloaded, "{said}");
    replace_binary(&site, &good_binary);
    let (done, said) = upgrade(&site);
    assert!(done, "{said}");
    wait_for_end(&site, pid);
    let pid = said.split(' ').nth(1).unwrap().parse().unwrap();
    site.replaced_by(pid);
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    assert_eq!(bytes_of_kind(&site, OwnerKind::Foreign), 0);
}

#[test]
fn a_new_process_that_hangs_is_killed() {
    let site = site("uh", Setup::default());
    replace_binary(&site, b"#!/bin/sh\nexec sleep 600\n");
    let (done, said) = upgrade(&site);
    assert!(!done && said.contains("did not get ready within"), "{said}");
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 6);
    load::run(&site.hosts.client, &plan).unwrap();
    assert!(
        site.log().contains("this process serves on"),
        "{}",
        site.log()
    );
}

/// To the running gateway nothing changes: it holds its maps and links by descriptor.
fn rename_pins(site: &Site, from: u32, to: u32) {
    let of = |schema| site.bpffs().join(format!("v{schema}"));
    std::fs::rename(of(from), of(to)).unwrap();
}

#[test]
fn a_program_of_another_map_schema_is_refused_and_leaves_nothing_behind() {
    let mut site = site("us", Setup::default());
    let captures = site.captures();
    let pid = site.pid();
    let schema = flow_abi::SCHEMA;
    let mut answered = 0;
    // The running gateway is of an earlier schema than the new program, and of a later one.
    for other in [schema - 1, schema + 1] {
        rename_pins(&site, schema, other);
        answered += under_load(&site, || {
            let (done, said) = upgrade(&site);
            let theirs = format!("/v{other}, this program's would be in ");
            assert!(
                !done && said.contains(&theirs) && said.contains("Stop the running gateway"),
                "{said}: {}",
                site.log()
            );
        });
        assert!(is_alive(pid), "{}", site.log());
        assert!(!site.bpffs().join(format!("v{schema}")).exists());
        rename_pins(&site, other, schema);
    }
    let page = site.quiet();
    let requests = page.sum("edgemeter_requests_total", |sample| {
        sample.label("status_class") == "2xx"
    });
    assert_eq!(
        requests,
        i128::from(answered),
        "the old process answered all"
    );
    let (done, said) = upgrade(&site);
    assert!(done, "{said}: {}", site.log());
    wait_for_end(&site, pid);
    site.replaced_by(said.split(' ').nth(1).unwrap().parse().unwrap());
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    assert_equal_to_far_ends(&site.ledger().0, captures);
}
