//! The upstreams example, on real sockets: what a client sees when servers do not do their part.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{
    echo::Echo,
    example::{Example, try_ask},
};

fn servers() -> Vec<Echo> {
    ["a", "b", "c", "carts"].map(Echo::start).into()
}

fn start(servers: &[Echo]) -> Example {
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    Example::start("upstreams", &addresses)
}

fn available(site: &Example, server: &Echo) -> i128 {
    let peer = server.address.to_string();
    site.scrape().sum("edgemeter_peer_available", |sample| {
        sample.label("peer") == peer
    })
}

fn sum(site: &Example, metric: &str, reason: &str) -> i128 {
    let page = site.scrape();
    page.sum(metric, |sample| sample.label("reason") == reason)
}

/// One of three servers dies under load: no idempotent request is lost, and the window in which
/// the gateway still tried the dead one is measured from the access log.
#[test]
fn one_of_three_dies_and_no_client_notices() {
    let mut servers = servers();
    let site = start(&servers);
    let (stop, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let bad = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (site, stop, asked) = (&site, &stop, &asked);
                scope.spawn(move || {
                    let mut bad = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        // A POST with a key is as repeatable as a GET.
                        let n = asked.fetch_add(1, Ordering::Relaxed);
                        let key = format!("k{n}");
                        let (method, body) = if client % 2 == 0 {
                            ("GET", "")
                        } else {
                            ("POST", "order")
                        };
                        let headers = [("idempotency-key", key.as_str())];
                        match try_ask(site.address, method, "h", "/orders/1", &headers, body) {
                            Ok(answer) if answer.status == 200 => {}
                            other => bad.push(format!("{method}: {other:?}")),
                        }
                    }
                    bad
                })
            })
            .collect();
        let wait_until = |count: u64| {
            let started = Instant::now();
            while asked.load(Ordering::Relaxed) < count {
                assert!(
                    started.elapsed() < Duration::from_secs(30),
                    "the load stands still"
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        wait_until(300);
        servers[1].kill();
        let at = asked.load(Ordering::Relaxed);
        wait_until(at + 600);
        site.wait_for("the verdict", || available(&site, &servers[1]) == 0);
        let at = asked.load(Ordering::Relaxed);
        wait_until(at + 300);
        stop.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .flat_map(|client| client.join().unwrap())
            .collect::<Vec<String>>()
    });
    assert!(
        bad.is_empty(),
        "{} of {}: {bad:?}",
        bad.len(),
        asked.load(Ordering::Relaxed)
    );
    let made = sum(&site, "edgemeter_upstream_retries_total", "made");
    assert!(made > 0, "nothing was retried: the test proved nothing");
    let log = site.access_log(usize::try_from(asked.load(Ordering::Relaxed)).unwrap());
    let dead = servers[1].address.to_string();
    let failed: Vec<u64> = log
        .iter()
        .filter(|line| {
            let attempts = line["upstream"].as_array().unwrap();
            attempts
                .iter()
                .any(|at| at["peer"] == dead && !at["error"].is_null())
        })
        .map(|line| line["unix_ms"].as_u64().unwrap())
        .collect();
    assert!(!failed.is_empty(), "no attempt met the dead server");
    let window = failed.iter().max().unwrap() - failed.iter().min().unwrap();
    println!(
        "{} requests, 0 errors at clients; {} attempts met the dead server, within {window} ms",
        log.len(),
        failed.len()
    );
    let errors = log
        .iter()
        .filter(|line| line["status"].as_u64().unwrap() >= 500);
    assert_eq!(errors.count(), 0, "5xx window at the client");
}

#[test]
fn an_answer_worth_another_attempt_is_retried_and_a_bad_server_ejected() {
    let servers = servers();
    let site = start(&servers);
    servers[0].mood.status.store(503, Ordering::SeqCst);
    for _ in 0..60 {
        assert_eq!(site.get("h", "/orders", &[]).status, 200);
    }
    assert!(servers[0].requests() >= 5);
    let ejected = sum(&site, "edgemeter_peer_ejections_total", "server_error");
    assert!(ejected >= 1, "{ejected}");
    // The answer the client gets when nobody has a better one is the server's own.
    for server in &servers {
        server.mood.status.store(503, Ordering::SeqCst);
    }
    let answer = site.get("h", "/orders", &[]);
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("\"server\""), "{answer:?}");
}

#[test]
fn a_post_is_sent_once_unless_it_has_a_key() {
    let servers = servers();
    let site = start(&servers);
    for server in &servers {
        server.mood.status.store(503, Ordering::SeqCst);
    }
    let attempts = |headers: &[(&str, &str)]| {
        let before: u64 = servers.iter().map(Echo::requests).sum();
        assert_eq!(
            site.ask("POST", "h", "/orders", headers, "order").status,
            503
        );
        servers.iter().map(Echo::requests).sum::<u64>() - before
    };
    assert_eq!(attempts(&[]), 1);
    assert_eq!(attempts(&[("idempotency-key", "k")]), 3);
    // The body went out whole each time.
    let seen: Vec<String> = servers
        .iter()
        .flat_map(|server| server.mood.seen.lock().unwrap().clone())
        .collect();
    assert!(seen.iter().all(|line| line == "POST /orders 5"), "{seen:?}");
}

#[test]
fn a_check_takes_a_server_out_and_brings_it_back() {
    let servers = servers();
    let site = start(&servers);
    servers[2].mood.health.store(500, Ordering::SeqCst);
    site.wait_for("the check", || available(&site, &servers[2]) == 0);
    let before = servers[2].requests();
    for _ in 0..30 {
        assert_eq!(site.get("h", "/orders", &[]).status, 200);
    }
    assert_eq!(servers[2].requests(), before);
    servers[2].mood.health.store(0, Ordering::SeqCst);
    site.wait_for("recovery", || available(&site, &servers[2]) == 1);
    for _ in 0..60 {
        site.get("h", "/orders", &[]);
    }
    assert!(servers[2].requests() > before);
}

#[test]
fn tcp_and_grpc_checks() {
    let mut servers = servers();
    let text = std::fs::read_to_string(
        xtask::host::workspace_root().join("gateway/examples/upstreams.toml"),
    )
    .unwrap();
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let grpc = text.replace("path = \"/livez\"", "grpc = \"orders.Orders\"");
    let site = Example::run(&grpc, &addresses);
    site.wait_for("grpc checks", || {
        servers[0].mood.checks.load(Ordering::SeqCst) > 3
    });
    assert_eq!(available(&site, &servers[0]), 1);
    servers[0].mood.health.store(1, Ordering::SeqCst);
    site.wait_for("NOT_SERVING", || available(&site, &servers[0]) == 0);
    drop(site);
    let tcp = text.replace("path = \"/livez\"", "tcp = true");
    let site = Example::run(&tcp, &addresses);
    let good = || {
        let page = site.scrape();
        page.sum("edgemeter_peer_checks_total", |sample| {
            sample.label("result") == "good"
        })
    };
    site.wait_for("tcp checks", || good() > 6);
    assert_eq!(available(&site, &servers[1]), 1);
    servers[1].kill();
    site.wait_for("refusal", || available(&site, &servers[1]) == 0);
}

#[test]
fn a_deadline_ends_a_request_and_goes_on_to_the_service() {
    let servers = servers();
    let site = start(&servers);
    let said = site.get("h", "/carts", &[]).json();
    let left: u64 = said["headers"]["x-edgemeter-timeout-ms"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(left <= 300, "{left}");
    let said = site
        .get("h", "/carts", &[("x-edgemeter-timeout-ms", "200")])
        .json();
    let left: u64 = said["headers"]["x-edgemeter-timeout-ms"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(left <= 200, "{left}");
    servers[3].mood.delay_ms.store(5_000, Ordering::SeqCst);
    let answer = site.get("h", "/carts", &[]);
    assert_eq!(answer.status, 504);
    assert_eq!(answer.header("content-type"), "application/problem+json");
    let line = site.access_log(3).pop().unwrap();
    assert_eq!(line["status"], 504);
    assert!(
        line["upstream"][0]["error"]
            .as_str()
            .unwrap()
            .contains("ReadTimedout"),
        "{line}"
    );
}

#[test]
fn what_would_only_queue_is_refused() {
    let servers = servers();
    let site = start(&servers);
    servers[3].mood.delay_ms.store(700, Ordering::SeqCst);
    let statuses: BTreeMap<u16, usize> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| site.get("h", "/slow", &[])))
            .collect();
        let mut statuses = BTreeMap::new();
        for answer in asked {
            let answer = answer.join().unwrap();
            if answer.status == 503 {
                assert_eq!(answer.header("retry-after"), "1");
            }
            *statuses.entry(answer.status).or_default() += 1;
        }
        statuses
    });
    assert!(statuses[&200] >= 2 && statuses[&503] >= 1, "{statuses:?}");
    assert_eq!(statuses.values().sum::<usize>(), 8);
    let refused = sum(&site, "edgemeter_upstream_refused_total", "requests");
    assert_eq!(refused, i128::try_from(statuses[&503]).unwrap());
    servers[3].mood.delay_ms.store(0, Ordering::SeqCst);
    assert_eq!(
        site.get("h", "/slow", &[]).status,
        200,
        "places are given back"
    );
}

#[test]
fn the_same_cookie_goes_to_the_same_server() {
    let servers = servers();
    let text = std::fs::read_to_string(
        xtask::host::workspace_root().join("gateway/examples/upstreams.toml"),
    )
    .unwrap();
    let text = text.replace("balance = \"least-request\"", "hash = { cookie = \"uid\" }");
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let site = Example::run(&text, &addresses);
    let server_of = |user: usize| {
        let answer = site.get("h", "/orders", &[("cookie", &format!("uid=u{user}"))]);
        answer.header("x-server").to_owned()
    };
    let first: Vec<String> = (0..30).map(server_of).collect();
    let again: Vec<String> = (0..30).map(server_of).collect();
    assert_eq!(first, again);
    for name in ["a", "b", "c"] {
        assert!(first.iter().any(|server| server == name), "{first:?}");
    }
}
