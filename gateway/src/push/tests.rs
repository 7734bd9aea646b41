//! A real HTTP sink that misbehaves in every way, a ledger that fails at every step, and a total
//! that is right all the same.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;

use super::{
    delivery::{Next, backoff},
    *,
};
use crate::{
    attribution::Counters,
    config::Name,
    ledger::{
        Poster,
        invariants::Breach,
        tests::backend::{Backend, Plan},
    },
    owner::{Leg, Owner, OwnerId, OwnerKind, OwnerStore as _},
};
use flow_abi::{Account, AccountKey};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const EPOCH: &str = "2b1f:77";

/// What the sink does with the next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Good,
    /// Processes, then answers 500.
    ProcessesAndFails,
    /// Answers 503 without processing.
    Fails,
    /// Processes, then closes without an answer.
    ProcessesAndHangsUp,
    /// Closes without an answer or processing.
    HangsUp,
    /// Processes, and answers too late.
    ProcessesAndSleeps,
    /// 429 with Retry-After.
    Busy,
}

/// What the sink holds.
#[derive(Default)]
struct Memory {
    manners: VecDeque<Manner>,
    /// Refuses any batch with an event of this tenant.
    poison: Option<String>,
    /// Ids it still recognises.
    seen: BTreeSet<String>,
    /// Bytes by route.
    totals: BTreeMap<String, i128>,
    /// Every id ever processed, and with what.
    history: BTreeMap<String, Value>,
    webhook_ids: Vec<String>,
    requests: usize,
}

struct Sink {
    address: SocketAddr,
    memory: Arc<Mutex<Memory>>,
}

impl Sink {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let memory = Arc::<Mutex<Memory>>::default();
        let shared = Arc::clone(&memory);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(&stream.unwrap(), &shared));
            }
        });
        Self { address, memory }
    }

    fn forget(&self) {
        self.memory.lock().unwrap().seen.clear();
    }

    fn will(&self, manners: &[Manner]) {
        self.memory.lock().unwrap().manners.extend(manners);
    }

    fn total(&self) -> i128 {
        self.memory.lock().unwrap().totals.values().sum()
    }
}

/// Requests of one connection, until it is closed.
fn serve(stream: &TcpStream, memory: &Mutex<Memory>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_owned());
        }
        let header = |name: &str| {
            let lines = head.iter().filter_map(|line| line.split_once(": "));
            lines
                .clone()
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_owned())
        };
        let length = header("content-length").map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let body = String::from_utf8(body).unwrap();
        let mut memory = memory.lock().unwrap();
        if head[0].starts_with("GET ") {
            let id = head[0]
                .split(' ')
                .nth(1)
                .unwrap()
                .trim_start_matches("/events/");
            let known = memory.history.contains_key(&id.replace("%3A", ":"));
            answer(stream, if known { "200 OK" } else { "404 Not Found" }, "");
            continue;
        }
        memory.requests += 1;
        let id = header("webhook-id").unwrap();
        let timestamp = header("webhook-timestamp").unwrap().parse().unwrap();
        let signature = header("webhook-signature").unwrap();
        assert!(verify(
            &Secrets::parse(SECRET).unwrap(),
            &id,
            timestamp,
            &body,
            &signature
        ));
        assert!(
            header("content-type")
                .unwrap()
                .starts_with("application/cloudevents-batch+json")
        );
        memory.webhook_ids.push(id);
        let events: Vec<Value> = serde_json::from_str(&body).unwrap();
        let poisoned = events
            .iter()
            .any(|event| event["subject"].as_str() == memory.poison.as_deref());
        if poisoned && memory.poison.is_some() {
            answer(stream, "422 Unprocessable Content", "unknown customer");
            continue;
        }
        let manner = memory.manners.pop_front().unwrap_or(Manner::Good);
        if !matches!(manner, Manner::Fails | Manner::HangsUp | Manner::Busy) {
            process(&mut memory, &events);
        }
        drop(memory);
        match manner {
            Manner::Good => answer(stream, "202 Accepted", ""),
            Manner::ProcessesAndFails => answer(stream, "500 Internal Server Error", "oh"),
            Manner::Fails => answer(stream, "503 Service Unavailable", ""),
            Manner::Busy => answer(stream, "429 Too Many Requests\r\nretry-after: 7", ""),
            Manner::ProcessesAndHangsUp | Manner::HangsUp => {
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return;
            }
            Manner::ProcessesAndSleeps => std::thread::sleep(Duration::from_secs(2)),
        }
    }
}

fn process(memory: &mut Memory, events: &[Value]) {
    for event in events {
        assert_eq!(event["specversion"], "1.0");
        let id = event["id"].as_str().unwrap().to_owned();
        let bytes = event["data"]["wire_bytes"].as_str().unwrap().to_owned();
        let before = memory.history.insert(id.clone(), event.clone());
        assert!(before.is_none_or(|before| before == *event), "{id} changed");
        if memory.seen.insert(id) {
            let route = event["data"]["route"].as_str().unwrap().to_owned();
            *memory.totals.entry(route).or_default() += bytes.parse::<i128>().unwrap();
        }
    }
}

fn answer(mut stream: &TcpStream, status: &str, body: &str) {
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
}

/// A gateway's ledger with routes, and the deliverer of one sink.
struct World<'b> {
    backend: &'b Backend,
    plan: Plan,
    ledger: Ledger,
    delivery: Delivery,
    config: PushSink,
    counters: Counters,
    _secret: tempfile::TempDir,
    now: i64,
}

impl<'b> World<'b> {
    fn new(backend: &'b Backend, sink: &Sink, change: impl FnOnce(&mut PushSink)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let secret_file = directory.path().join("secret");
        std::fs::write(&secret_file, SECRET).unwrap();
        let mut config = PushSink {
            name: Name::new("bill").unwrap(),
            url: format!("http://{}/", sink.address),
            secret_file: Some(secret_file),
            token_file: None,
            ca_file: None,
            confirm_url: None,
            tenants: None,
            unattributed: false,
            batch: 2,
            window_seconds: 60,
            timeout: Duration::from_millis(700),
            dedupe: Duration::from_secs(86_400),
            keep: Duration::from_secs(3 * 86_400),
        };
        change(&mut config);
        let plan = Plan::never();
        let ledger = backend.open_failing(&plan);
        for route in 2..5 {
            let owner = Owner {
                kind: OwnerKind::Route,
                route: format!("route-{route}"),
                tenant: format!("tenant-{route}"),
                ..Owner::connection(OwnerKind::Route, Leg::Client, "public")
            };
            ledger.store(&[(OwnerId(route), owner)]).unwrap();
        }
        ledger.push_to(vec![config.outbox()]);
        let sender = Sender::new(&config).unwrap();
        let delivery = Delivery::new(config.clone(), ledger.clone(), sender, PushView::default());
        Self {
            backend,
            plan,
            ledger,
            delivery,
            config,
            counters: Counters::default(),
            _secret: directory,
            now: 1_790_000_000,
        }
    }

    /// kill -9 and a new process.
    fn crash(&mut self) {
        self.plan = Plan::never();
        self.ledger = self.backend.open_failing(&self.plan);
        self.ledger.push_to(vec![self.config.outbox()]);
        let sender = Sender::new(&self.config).unwrap();
        self.delivery = Delivery::new(
            self.config.clone(),
            self.ledger.clone(),
            sender,
            PushView::default(),
        );
    }

    /// A minute of traffic on every route, posted.
    fn minute(&mut self, bytes: u64) {
        for owner in 2..5 {
            let key = AccountKey {
                owner,
                ifindex: 7,
                class: 0,
            };
            let account: &mut Account = self.counters.accounts.entry(key).or_default();
            account.tx_bytes += bytes * u64::from(owner);
        }
        self.now += 60;
        let interfaces = std::collections::HashMap::from([(7, "edge0".to_owned())]);
        let mut poster = Poster::resume(self.ledger.clone(), EPOCH).unwrap();
        let posted = poster.post(&self.counters, &[], self.now, &interfaces);
        assert!(posted.failure.is_none(), "{:?}", posted.failure);
    }

    fn posted(&self) -> i128 {
        let sums = self.ledger.balances().unwrap().by_owner();
        let amounts = sums.values().flatten();
        amounts.map(|amount| i128::from(amount.wire_bytes)).sum()
    }

    /// Closes the last window and delivers until nothing waits.
    fn drain(&mut self) {
        self.now += 3_600;
        self.minute(0);
        for _ in 0..200 {
            let backlog = self.ledger.backlog("bill").unwrap();
            if backlog.waiting + backlog.sent == 0 {
                return;
            }
            self.delivery.step(self.now);
            self.now += 1;
        }
        panic!("not drained: {:?}", self.ledger.backlog("bill").unwrap());
    }
}

#[test]
fn whatever_the_sink_does_its_total_is_the_ledgers() {
    let sink = Sink::start();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |_| {});
    for manner in [
        Manner::ProcessesAndFails,
        Manner::Fails,
        Manner::ProcessesAndHangsUp,
        Manner::HangsUp,
        Manner::ProcessesAndSleeps,
        Manner::Busy,
    ] {
        sink.will(&[manner, manner, Manner::Good]);
        world.minute(1_000_003);
        world.minute(17);
        for _ in 0..6 {
            world.delivery.step(world.now);
        }
    }
    world.drain();
    assert_eq!(sink.total(), world.posted());
    let memory = sink.memory.lock().unwrap();
    assert!(memory.requests > memory.webhook_ids.iter().collect::<BTreeSet<_>>().len());
}

#[test]
fn three_replays_of_everything_in_any_order_change_nothing() {
    let sink = Sink::start();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |_| {});
    for minute in 0..6 {
        world.minute(1_000 + minute);
    }
    world.drain();
    let total = sink.total();
    assert_eq!(total, world.posted());
    let mut memory = sink.memory.lock().unwrap();
    let mut all: Vec<Value> = memory.history.values().cloned().collect();
    for _ in 0..3 {
        all.reverse();
        process(&mut memory, &all);
    }
    assert_eq!(memory.totals.values().sum::<i128>(), total);
}

#[test]
fn a_crash_at_each_step_of_each_delivery_doubles_and_loses_nothing() {
    for backend in [Backend::file(), Backend::shared()] {
        let sink = Sink::start();
        let mut world = World::new(&backend, &sink, |_| {});
        for step in 0..24_i64 {
            sink.will(&[Manner::ProcessesAndHangsUp, Manner::Good, Manner::Good]);
            world.minute(10_000 + step.unsigned_abs());
            world.minute(7);
            for _ in 0..3 {
                world.plan.fail_after(step);
                world.delivery.step(world.now);
                world.crash();
            }
        }
        world.drain();
        assert_eq!(sink.total(), world.posted(), "on {}", backend.name);
    }
}

#[test]
fn days_without_the_sink_lose_nothing_and_nothing_is_in_doubt() {
    let sink = Sink::start();
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |config| {
        config.url = format!("http://{closed}/");
        config.batch = 100;
    });
    for _ in 0..5 {
        world.minute(123_456_789);
        assert!(matches!(world.delivery.step(world.now), Next::Wait(_)));
        // Far beyond what the sink remembers.
        world.now += 2 * 86_400;
    }
    world.config.url = format!("http://{}/", sink.address);
    world.crash();
    world.drain();
    assert_eq!(sink.total(), world.posted());
    assert_eq!(world.ledger.backlog("bill").unwrap().in_doubt, 0);
}

#[test]
fn past_the_sinks_memory_an_unanswered_batch_is_asked_about() {
    for manner in [Manner::ProcessesAndHangsUp, Manner::HangsUp] {
        let sink = Sink::start();
        let backend = Backend::file();
        let confirm = format!("http://{}/events/{{id}}", sink.address);
        let mut world = World::new(&backend, &sink, |config| config.confirm_url = Some(confirm));
        world.minute(5_000);
        world.minute(0);
        sink.will(&[manner]);
        world.delivery.step(world.now);
        // The answer is lost, then the way to the sink is, and the sink forgets.
        world.now += 3 * 86_400;
        sink.forget();
        world.drain();
        assert_eq!(sink.total(), world.posted(), "{manner:?}");
    }
}

#[test]
fn past_the_sinks_memory_without_an_answer_a_person_decides() {
    for (manner, arrived) in [
        (Manner::ProcessesAndHangsUp, true),
        (Manner::HangsUp, false),
    ] {
        let sink = Sink::start();
        let backend = Backend::file();
        let mut world = World::new(&backend, &sink, |_| {});
        world.minute(5_000);
        world.minute(0);
        sink.will(&[manner]);
        world.delivery.step(world.now);
        world.now += 3 * 86_400;
        sink.forget();
        world.drain();
        let backlog = world.ledger.backlog("bill").unwrap();
        assert_eq!(
            backlog.in_doubt, 2,
            "not sent again, not given up: {backlog:?}"
        );
        assert_eq!(world.ledger.decide("bill", arrived).unwrap(), 2);
        world.drain();
        assert_eq!(sink.total(), world.posted(), "{manner:?}");
    }
}

#[test]
fn an_event_the_sink_will_not_have_stops_nobody_elses() {
    let sink = Sink::start();
    sink.memory.lock().unwrap().poison = Some("tenant-3".into());
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |config| config.batch = 50);
    for _ in 0..4 {
        world.minute(100);
    }
    world.drain();
    let backlog = world.ledger.backlog("bill").unwrap();
    assert_eq!(backlog.refused, 4, "{backlog:?}");
    assert_eq!(sink.total(), i128::from(4 * 100 * (2 + 4)));
    // The customer exists now.
    sink.memory.lock().unwrap().poison = None;
    world.ledger.decide("bill", false).unwrap();
    world.drain();
    assert_eq!(sink.total(), world.posted());
}

#[test]
fn bytes_for_a_window_that_was_closed_come_as_a_difference() {
    let sink = Sink::start();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |_| {});
    world.minute(1_000);
    world.minute(1);
    world.drain();
    let before = sink.memory.lock().unwrap().history.len();
    // The clock was wrong by an hour and is set back.
    world.now -= 3_600;
    world.minute(500);
    world.drain();
    assert_eq!(sink.total(), world.posted());
    assert!(sink.memory.lock().unwrap().history.len() > before);
}

#[test]
fn only_the_named_tenants_are_told() {
    let sink = Sink::start();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |config| {
        config.tenants = Some(vec!["tenant-2".into(), "tenant-4".into()]);
    });
    world.minute(1_000);
    world.drain();
    assert_eq!(sink.total(), 6_000);
    assert_eq!(world.ledger.backlog("bill").unwrap().open_bytes, 0);
}

#[test]
fn acknowledged_events_are_summed_up_in_the_end() {
    let sink = Sink::start();
    let backend = Backend::file();
    let mut world = World::new(&backend, &sink, |_| {});
    world.minute(1_000);
    world.drain();
    let before = world.ledger.backlog("bill").unwrap();
    world.now += 30 * 86_400;
    assert_eq!(world.delivery.step(world.now), Next::GoOn);
    assert!(matches!(world.delivery.step(world.now), Next::Wait(_)));
    let after = world.ledger.backlog("bill").unwrap();
    assert_eq!(after.acknowledged_bytes, before.acknowledged_bytes);
    assert_eq!(after.acknowledged, before.acknowledged);
    let breaches = world.ledger.breaches().unwrap();
    let oversold = |breach: &Breach| matches!(breach, Breach::Oversold { .. });
    assert!(!breaches.iter().any(oversold), "{breaches:?}");
}

#[test]
fn waits_grow_are_jittered_and_bounded() {
    let seconds = |failures, random| backoff(failures, random).as_millis();
    assert!((500..1_000).contains(&seconds(0, 499)));
    assert!((4_000..8_000).contains(&seconds(3, u64::MAX)));
    assert!((150_000..300_000).contains(&seconds(60, 77)));
    assert_ne!(seconds(5, 1), seconds(5, 9_999));
}
