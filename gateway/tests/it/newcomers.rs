//! Tenants nobody has seen before: their first request waits for no disk, and a kill -9 right after
//! it takes neither their name nor a byte.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use edgemeter::owner::{Leg, OwnerKind};
use rusqlite::Connection;
use xtask::netns::GATEWAY_TO_CLIENT;

use crate::harness::{PLAIN, Setup, Site, assert_equal_to_far_ends};

const BODY: u16 = 200;

/// One request of a tenant on a kept connection; false when it was not answered whole.
fn ask(stream: &mut TcpStream, tenant: &str) -> bool {
    let request = format!(
        "GET /small/bytes/{BODY} HTTP/1.1\r\nhost: gateway.test\r\nx-tenant: {tenant}\r\n\r\n"
    );
    if stream.write_all(request.as_bytes()).is_err() {
        return false;
    }
    let (mut answer, mut piece) = (Vec::new(), [0; 2048]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return false,
            Ok(count) => answer.extend(&piece[..count]),
        }
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n");
        if head.is_some_and(|head| answer.len() == head + 4 + usize::from(BODY)) {
            assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
            return true;
        }
    }
}

fn connect() -> TcpStream {
    let stream = TcpStream::connect(SocketAddr::from((GATEWAY_TO_CLIENT.v4, PLAIN))).unwrap();
    stream.set_nodelay(true).unwrap();
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    stream
}

/// Wire bytes sent to and for each tenant, by leg.
fn by_tenant(site: &Site) -> BTreeMap<(String, Leg), i64> {
    let (balances, owners) = site.ledger();
    let mut sums = BTreeMap::new();
    for (_, _, id, amount) in balances.amounts() {
        let owner = owners.get(&id);
        let owner = owner.unwrap_or_else(|| panic!("bytes were posted under the unknown {id:?}"));
        if owner.kind == OwnerKind::Route {
            *sums.entry((owner.tenant.clone(), owner.leg)).or_insert(0) += amount.wire_bytes;
        }
    }
    sums
}

fn set_interval(site: &Site, from: u32, to: u32) {
    let text = std::fs::read_to_string(site.config()).unwrap();
    let line = |ms| format!("collect_interval_ms = {ms}\n");
    assert!(text.contains(&line(from)));
    std::fs::write(site.config(), text.replace(&line(from), &line(to))).unwrap();
}

#[test]
fn the_first_request_of_a_tenant_waits_for_no_ledger() {
    let site = Site::start("nw", &Setup::default());
    let captures = site.captures();
    let ledger = Connection::open(site.directory.path().join("state/ledger.db")).unwrap();
    // While this lasts nobody else writes to the ledger: who waits for it waits for five seconds,
    // and is refused then.
    ledger.execute_batch("BEGIN IMMEDIATE").unwrap();
    let began = Instant::now();
    let answered = site.hosts.client.run(|| ask(&mut connect(), "newcomer"));
    assert!(answered.unwrap(), "{}", site.log());
    let waited = began.elapsed();
    ledger.execute_batch("ROLLBACK").unwrap();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    for leg in [Leg::Client, Leg::Upstream] {
        let moved = by_tenant(&site)[&("newcomer".to_owned(), leg)];
        assert!(
            moved > BODY.into(),
            "{leg:?}: {moved} B, answered in {waited:?}"
        );
    }
    assert_equal_to_far_ends(&site.ledger().0, captures);
}

#[test]
fn a_kill_right_after_the_first_request_of_a_tenant_takes_no_name_and_no_byte() {
    const WORKERS: usize = 4;
    /// Of a worker: two numbers each, and the journal has room for 1,024.
    const TENANTS_MAX: usize = 120;
    const ANSWERS: usize = 150;
    let mut site = Site::start("nk", &Setup::default());
    let captures = site.captures();
    site.end(libc::SIGTERM);
    // Nothing is posted, and no name stored, between start and kill.
    set_interval(&site, 100, 60_000);
    let answered = Mutex::new(Vec::new());
    for round in 0..4 {
        site.launch();
        let known = site.ledger().1.len();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for worker in 0..WORKERS {
                let (answered, count, client) = (&answered, &count, &site.hosts.client);
                scope.spawn(move || {
                    let talk = || {
                        let mut stream = connect();
                        for number in 0..TENANTS_MAX {
                            let tenant = format!("r{round}-w{worker}-{number}");
                            if !ask(&mut stream, &tenant) {
                                return;
                            }
                            answered.lock().unwrap().push(tenant);
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    };
                    client.run(talk).unwrap();
                });
            }
            while count.load(Ordering::Relaxed) < ANSWERS {
                std::thread::yield_now();
            }
            site.signal(libc::SIGKILL);
        });
        site.end(libc::SIGKILL);
        assert_eq!(
            site.ledger().1.len(),
            known,
            "killed before a name was stored"
        );
    }
    set_interval(&site, 60_000, 100);
    site.launch();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let moved = by_tenant(&site);
    let answered = answered.into_inner().unwrap();
    assert!(answered.len() >= 4 * ANSWERS);
    for tenant in &answered {
        for leg in [Leg::Client, Leg::Upstream] {
            let bytes = moved.get(&(tenant.clone(), leg)).copied().unwrap_or(0);
            assert!(bytes > BODY.into(), "{tenant} {leg:?}: {bytes} B");
        }
    }
    assert_equal_to_far_ends(&site.ledger().0, captures);
}
