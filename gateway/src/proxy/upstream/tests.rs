use std::time::Duration;

use super::*;
use crate::config::{Config, HashKey};

fn pool_with(peers: &str, more: &str) -> Arc<Pool> {
    let text = format!(
        "listeners = [{{ name = \"a\", address = \"127.0.0.1:80\" }}]\n\
         [[routes]]\nname = \"r\"\nupstream = \"up\"\n\
         [[upstreams]]\nname = \"up\"\npeers = [{peers}]\n{more}\n"
    );
    match Config::parse(&text, "pool.toml") {
        Ok(config) => Arc::new(Pool::new(&config.upstreams[0])),
        Err(error) => panic!("{error}"),
    }
}

fn peers(weights: &[u16]) -> String {
    let peers = weights
        .iter()
        .zip(1..)
        .map(|(weight, port)| format!("{{ address = \"10.0.0.1:{port}\", weight = {weight} }}"));
    peers.collect::<Vec<_>>().join(", ")
}

fn pool(weights: &[u16]) -> Arc<Pool> {
    pool_with(&peers(weights), "balance = \"round-robin\"")
}

/// Ports, each attempt over before the next begins.
fn picks(pool: &Arc<Pool>, count: usize, now: Instant) -> Vec<u16> {
    let pick = |_| pool.pick(None, &[], now).unwrap().address().port();
    (0..count).map(pick).collect()
}

fn counts(pool: &Arc<Pool>, count: usize, now: Instant) -> HashMap<u16, usize> {
    let mut counts = HashMap::new();
    for port in picks(pool, count, now) {
        *counts.entry(port).or_default() += 1;
    }
    counts
}

/// An attempt at a given peer.
fn attempt(pool: &Arc<Pool>, port: u16) -> Attempt {
    let peers = pool.peers();
    let peer = peers
        .iter()
        .find(|peer| peer.address.port() == port)
        .unwrap();
    peer.active.fetch_add(1, Ordering::Relaxed);
    Attempt {
        pool: Arc::clone(pool),
        peer: Arc::clone(peer),
        waiting: false,
    }
}

fn fail(pool: &Arc<Pool>, port: u16, times: u32, now: Instant) {
    for _ in 0..times {
        attempt(pool, port).broke(now);
    }
}

fn ejected(pool: &Pool, now: Instant) -> usize {
    let states = pool.states(now);
    states.iter().filter(|(_, state)| !state.available).count()
}

const BASE: Duration = Duration::from_secs(1);

#[test]
fn turns_keep_the_weights() {
    let now = Instant::now();
    let counted = counts(&pool(&[5, 1, 1]), 70, now);
    assert_eq!(counted, HashMap::from([(1, 50), (2, 10), (3, 10)]));
}

#[test]
fn the_less_busy_of_two_is_picked() {
    let now = Instant::now();
    let pool = pool_with(&peers(&[1, 1]), "");
    assert_eq!(pool.settings.balance, Balance::LeastRequest);
    // With two peers both are always compared.
    let held: Vec<Attempt> = (0..10)
        .map(|_| pool.pick(None, &[], now).unwrap())
        .collect();
    let first = held
        .iter()
        .filter(|held| held.address().port() == 1)
        .count();
    assert_eq!(first, 5);
    let busy = attempt(&pool, 1);
    assert_eq!(pool.pick(None, &[], now).unwrap().address().port(), 2);
    drop((held, busy));
    let states = pool.states(now);
    assert!(
        states.iter().all(|(_, state)| state.active == 0),
        "given back"
    );
}

#[test]
fn busy_is_in_proportion_to_the_weight() {
    let now = Instant::now();
    let pool = pool_with(&peers(&[3, 1]), "");
    let held: Vec<Attempt> = (0..40)
        .map(|_| pool.pick(None, &[], now).unwrap())
        .collect();
    let first = held
        .iter()
        .filter(|held| held.address().port() == 1)
        .count();
    assert!((29..=31).contains(&first), "{first} of 40");
}

#[test]
fn the_same_key_goes_to_the_same_peer_while_it_is_there() {
    let now = Instant::now();
    let pool = pool_with(&peers(&[1, 1, 1]), "hash = { cookie = \"uid\" }");
    assert_eq!(
        pool.settings.balance,
        Balance::Hash(HashKey::Cookie("uid".into()))
    );
    let of = |key: &str| {
        let key = Some(hash_key(key.as_bytes()));
        pool.pick(key, &[], now).unwrap().address().port()
    };
    let before: Vec<u16> = (0..300).map(|n| of(&format!("user{n}"))).collect();
    assert!((1..=3).all(|port| before.iter().filter(|p| **p == port).count() > 60));
    fail(&pool, 2, 3, now);
    for (n, &port) in before.iter().enumerate() {
        let after = of(&format!("user{n}"));
        assert!(
            after != 2 && (port == 2 || after == port),
            "{port} -> {after}"
        );
    }
}

#[test]
fn tried_peers_are_not_picked_while_there_are_others() {
    let now = Instant::now();
    let pool = pool(&[9, 1]);
    let first = pool.pick(None, &[], now).unwrap();
    let second = pool.pick(None, &[first.address()], now).unwrap();
    assert_ne!(first.address(), second.address());
    let both = [first.address(), second.address()];
    assert!(!second.others_left(&both));
    assert!(pool.pick(None, &both, now).is_ok(), "better than nobody");
}

#[test]
fn three_failures_in_a_row_eject_for_a_second() {
    let now = Instant::now();
    let pool = pool(&[1, 1]);
    fail(&pool, 1, 2, now);
    attempt(&pool, 1).connected(false);
    fail(&pool, 1, 2, now);
    attempt(&pool, 1).connected(true);
    assert_eq!(ejected(&pool, now), 0);
    fail(&pool, 1, 1, now);
    assert_eq!(ejected(&pool, now), 1, "a pooled connection says nothing");
    assert_eq!(picks(&pool, 3, now), [2, 2, 2]);
    let almost = now + BASE - Duration::from_nanos(1);
    assert_eq!(picks(&pool, 1, almost), [2]);
    assert!(picks(&pool, 2, now + BASE).contains(&1));
}

#[test]
fn ejections_double_up_to_the_limit_and_an_answer_forgives() {
    let mut now = Instant::now();
    let pool = pool(&[1, 1]);
    fail(&pool, 1, 3, now);
    for seconds in [1, 2, 4, 8, 16, 30, 30] {
        let over = now + Duration::from_secs(seconds);
        assert_eq!(
            ejected(&pool, over - Duration::from_nanos(1)),
            1,
            "{seconds}"
        );
        assert_eq!(ejected(&pool, over), 0, "{seconds}");
        now = over;
        // The rest of those in flight change nothing.
        fail(&pool, 1, 50, now);
    }
    let over = now + Duration::from_secs(30);
    attempt(&pool, 1).answered(200, over);
    fail(&pool, 1, 3, over);
    assert_eq!(ejected(&pool, over + BASE), 0, "from the beginning again");
}

#[test]
fn server_errors_in_a_row_eject() {
    let now = Instant::now();
    let pool = pool(&[1, 1, 1]);
    for status in [500, 503, 200, 500, 500, 502, 504] {
        attempt(&pool, 1).answered(status, now);
    }
    assert_eq!(ejected(&pool, now), 0);
    attempt(&pool, 1).answered(500, now);
    assert_eq!(ejected(&pool, now), 1);
    let counts = &pool.peers()[0].counts.ejections;
    assert_eq!(
        counts[Cause::ServerError as usize].load(Ordering::Relaxed),
        1
    );
}

#[test]
fn with_too_few_left_all_are_used() {
    let now = Instant::now();
    let pool = pool(&[1, 1, 1]);
    fail(&pool, 1, 3, now);
    assert_eq!(counts(&pool, 6, now).len(), 2);
    fail(&pool, 2, 3, now);
    // One of three is 33 %, below the threshold of 34 %.
    assert_eq!(counts(&pool, 6, now).len(), 3);
    assert!(pool.panics.load(Ordering::Relaxed) > 0);
    let single = self::pool(&[1]);
    fail(&single, 1, 10, now);
    assert_eq!(picks(&single, 2, now), [1, 1]);
}

#[test]
fn checks_take_a_peer_out_and_bring_it_back() {
    let now = Instant::now();
    let check = "check = { path = \"/livez\", healthy = 2, unhealthy = 3 }\n\
                 balance = \"round-robin\"";
    let pool = pool_with(&peers(&[1, 1]), check);
    let peer = pool.peers()[0].clone();
    for good in [false, false, true, false, false] {
        pool.checked(&peer, good);
    }
    assert_eq!(ejected(&pool, now), 0, "never three in a row");
    pool.checked(&peer, false);
    assert_eq!(picks(&pool, 2, now), [2, 2]);
    pool.checked(&peer, true);
    assert_eq!(ejected(&pool, now), 1);
    pool.checked(&peer, true);
    assert_eq!(ejected(&pool, now), 0);
}

#[test]
fn the_kernels_verdict_moves_the_share() {
    let now = Instant::now();
    for balance in ["least-request", "round-robin"] {
        let pool = pool_with(&peers(&[1, 1]), &format!("balance = \"{balance}\""));
        let lossy = PeerSample {
            sent_frames: 1_000,
            retransmitted_frames: 30,
            ..PeerSample::default()
        };
        let samples = HashMap::from([(pool.addresses()[0], lossy)]);
        for _ in 0..3 {
            pool.observe(&samples, now);
        }
        let counted = counts(&pool, 1_000, now);
        let lossy = counted.get(&1).copied().unwrap_or(0);
        assert!(lossy < 40, "{balance}: {counted:?}");
        let off = pool_with(&peers(&[1, 1]), "kernel_informed = false");
        off.observe(&samples, now);
        assert_eq!(off.states(now)[0].1.share, SHARE_WHOLE);
    }
}

#[test]
fn resets_the_kernel_saw_eject() {
    let now = Instant::now();
    let pool = pool(&[1, 1]);
    let resets = PeerSample {
        resets: 7,
        ..PeerSample::default()
    };
    pool.observe(&HashMap::from([(pool.addresses()[1], resets)]), now);
    assert_eq!(picks(&pool, 3, now), [1, 1, 1]);
}

#[test]
fn names_become_peers_and_what_stays_is_remembered() {
    let now = Instant::now();
    let pool = pool_with("\"orders.internal:9000\"", "balance = \"round-robin\"");
    assert_eq!(pool.pick(None, &[], now).unwrap_err(), Refused::Unresolved);
    let key = (Box::from("orders.internal"), 9000);
    let at = |last| SocketAddr::from(([10, 0, 0, last], 9000));
    pool.resolve(&HashMap::from([(key.clone(), vec![at(1), at(2)])]));
    let first = pool.peers()[1].clone();
    let held = pool.pick(None, &[at(1)], now).unwrap();
    assert_eq!(held.address(), at(2));
    pool.resolve(&HashMap::from([(key, vec![at(2), at(3)])]));
    assert!(Arc::ptr_eq(&pool.peers()[0], &first));
    assert_eq!(pool.states(now)[0].1.active, 1);
    drop(held);
    assert_eq!(pool.states(now)[0].1.active, 0);
}

#[test]
fn limits_refuse_and_say_which() {
    let now = Instant::now();
    let limits = "[upstreams.limits]\nrequests = 3\npending = 2\nper_peer = 1";
    let pool = pool_with(&peers(&[1, 1, 1]), limits);
    let mut first = pool.pick(None, &[], now).unwrap();
    let mut second = pool.pick(None, &[], now).unwrap();
    assert_eq!(pool.pick(None, &[], now).unwrap_err(), Refused::Pending);
    first.connected(false);
    second.connected(false);
    let _third = pool.pick(None, &[], now).unwrap();
    assert_eq!(pool.pick(None, &[], now).unwrap_err(), Refused::PerPeer);
    drop(first);
    assert!(pool.pick(None, &[], now).is_ok());
    let admitted: Vec<Admission> = (0..3).map(|_| pool.admit().unwrap()).collect();
    assert_eq!(pool.admit().unwrap_err(), Refused::Requests);
    drop(admitted);
    assert!(pool.admit().is_ok());
}
