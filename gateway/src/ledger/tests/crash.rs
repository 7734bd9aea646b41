//! Random sequences of traffic, claims, ticks, roll-ups and deliveries, with a failure at any
//! step of any transaction, against sums kept in 128 bits beside them.

use std::collections::{BTreeMap, HashMap};

use flow_abi::{Account, AccountKey, Cell, Direction, InterfaceCells, cell};

use super::backend::{Backend, Plan};
use crate::{
    attribution::{Claim, ClaimKey, Counters},
    cost::calendar::Period,
    ledger::{Fault, Ledger, Posted, Poster, Retention, outbox::Sink},
    owner::{Leg, Owner, OwnerId, OwnerKind, OwnerStore as _},
};

const UNCLAIMED: u32 = 1;
const ROUTES: [u32; 3] = [2, 3, 4];
const IFINDEX: u32 = 7;
const EPOCH: &str = "boot:9";

/// xorshift: the same sequence for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn is_uncertain(posted: &Posted) -> bool {
    posted
        .failure
        .as_ref()
        .is_some_and(|error| error.fault == Fault::Uncertain)
}

/// What must come out.
#[derive(Default)]
struct Oracle {
    counters: Counters,
    /// Claimed by committed ticks, by route.
    claimed: BTreeMap<u32, i128>,
    /// Claimed in the kernel's eyes, also where a crash lost the claim.
    taken: u64,
    /// Claims handed over and not known to be committed.
    pending: Vec<(u32, u64)>,
    /// Claims in a commit that was not answered.
    unanswered: Vec<(u32, u64)>,
    /// What the sink has, by event id: it never forgets.
    sink: BTreeMap<(i64, u32, u32), i128>,
}

impl Oracle {
    fn traffic(&mut self, random: &mut Random) {
        let owner = [UNCLAIMED, 2, 3, 4][usize::try_from(random.below(4)).unwrap()];
        let bytes = 40 + random.below(1 << 40);
        let key = AccountKey {
            owner,
            ifindex: IFINDEX,
            class: 0,
        };
        let account: &mut Account = self.counters.accounts.entry(key).or_default();
        let cells: &mut InterfaceCells = self.counters.interfaces.entry(IFINDEX).or_default();
        let direction = if owner == UNCLAIMED || random.below(2) == 0 {
            account.rx_bytes += bytes;
            account.rx_frames += 1;
            Direction::Rx
        } else {
            account.tx_bytes += bytes;
            account.tx_frames += 1;
            Direction::Tx
        };
        let total = &mut cells.cells[direction as usize][cell::TOTAL];
        *total = Cell {
            bytes: total.bytes + bytes + 60,
            frames: total.frames + 2,
        };
        let other = &mut cells.cells[direction as usize][cell::NON_IP];
        *other = Cell {
            bytes: other.bytes + 60,
            frames: other.frames + 1,
        };
    }

    /// All of what is unclaimed, or a part of it.
    fn claim(&mut self, random: &mut Random) -> Vec<Claim> {
        let key = AccountKey {
            owner: UNCLAIMED,
            ifindex: IFINDEX,
            class: 0,
        };
        let held = self.counters.accounts.get(&key).map_or(0, |a| a.rx_bytes) - self.taken;
        if held == 0 || random.below(2) == 0 {
            return Vec::new();
        }
        let bytes = if random.below(2) == 0 {
            held
        } else {
            1 + random.below(held)
        };
        let to = ROUTES[usize::try_from(random.below(3)).unwrap()];
        self.taken += bytes;
        self.pending.push((to, bytes));
        let key = ClaimKey {
            from: OwnerId(UNCLAIMED),
            to: OwnerId(to),
            ifindex: IFINDEX,
            class: crate::class::ClassId::DEFAULT,
        };
        vec![Claim {
            key,
            bytes,
            frames: 0,
            payload_bytes: 0,
        }]
    }

    fn committed(&mut self, claims: Vec<(u32, u64)>) {
        for (to, bytes) in claims {
            *self.claimed.entry(to).or_default() += i128::from(bytes);
        }
    }

    /// A crash loses the claims no commit holds: their bytes stay unclaimed, visibly.
    fn lost(&mut self, claims: Vec<(u32, u64)>) {
        for (_, bytes) in claims {
            self.taken -= bytes;
        }
    }

    fn after(&mut self, posted: &Posted) {
        match posted.settled {
            Some(true) => {
                let claims = std::mem::take(&mut self.unanswered);
                self.committed(claims);
            }
            Some(false) => self.pending.append(&mut self.unanswered),
            None => {}
        }
        match &posted.failure {
            None => {
                let claims = std::mem::take(&mut self.pending);
                self.committed(claims);
            }
            Some(error) if error.fault == Fault::Uncertain => {
                self.unanswered = std::mem::take(&mut self.pending);
            }
            Some(_) => {}
        }
    }

    fn expected(&self) -> BTreeMap<u32, i128> {
        let mut sums: BTreeMap<u32, i128> = BTreeMap::new();
        for (key, account) in &self.counters.accounts {
            *sums.entry(key.owner).or_default() +=
                i128::from(account.rx_bytes) + i128::from(account.tx_bytes);
        }
        for (to, bytes) in &self.claimed {
            *sums.entry(*to).or_default() += bytes;
            *sums.entry(UNCLAIMED).or_default() -= bytes;
        }
        sums.retain(|_, bytes| *bytes != 0);
        sums
    }
}

fn in_ledger(ledger: &Ledger) -> BTreeMap<u32, i128> {
    let balances = ledger.balances().unwrap();
    let mut sums: BTreeMap<u32, i128> = BTreeMap::new();
    for (owner, amounts) in balances.by_owner() {
        for amount in amounts {
            *sums.entry(owner.0).or_default() += i128::from(amount.wire_bytes);
        }
    }
    sums.retain(|_, bytes| *bytes != 0);
    sums
}

fn sink() -> Sink {
    Sink {
        name: "bill".into(),
        window_seconds: 60,
        tenants: None,
        unattributed: false,
    }
}

struct World<'b> {
    backend: &'b Backend,
    plan: Plan,
    ledger: Ledger,
    poster: Poster,
    oracle: Oracle,
    random: Random,
    /// Ticks known to be committed.
    number: i64,
    now: i64,
}

impl<'b> World<'b> {
    fn new(backend: &'b Backend, seed: u64) -> Self {
        let plan = Plan::never();
        let ledger = backend.open_failing(&plan);
        let endpoint = Owner::connection(OwnerKind::Unclaimed, Leg::Client, "public");
        ledger
            .store(&[(OwnerId(UNCLAIMED), endpoint.clone())])
            .unwrap();
        for route in ROUTES {
            let owner = Owner {
                kind: OwnerKind::Route,
                route: format!("route-{route}"),
                tenant: "acme".into(),
                ..endpoint.clone()
            };
            ledger.store(&[(OwnerId(route), owner)]).unwrap();
        }
        ledger.push_to(vec![sink()]);
        let poster = Poster::resume(ledger.clone(), EPOCH).unwrap();
        Self {
            backend,
            plan,
            ledger,
            poster,
            oracle: Oracle::default(),
            random: Random(seed),
            number: 0,
            now: 1_790_000_000,
        }
    }

    /// kill -9 and a new process.
    fn crash(&mut self) {
        self.plan = Plan::never();
        self.ledger = self.backend.open_failing(&self.plan);
        self.ledger.push_to(vec![sink()]);
        self.poster = Poster::resume(self.ledger.clone(), EPOCH).unwrap();
        let (number, _) = self.ledger.resume(EPOCH).unwrap();
        let unanswered = std::mem::take(&mut self.oracle.unanswered);
        if number > self.number {
            self.oracle.committed(unanswered);
        } else {
            self.oracle.lost(unanswered);
        }
        let pending = std::mem::take(&mut self.oracle.pending);
        self.oracle.lost(pending);
        self.number = number;
    }

    fn maybe_fail(&mut self) {
        if self.random.below(3) == 0 {
            let steps = i64::try_from(self.random.below(24)).unwrap();
            self.plan.fail_after(steps);
        }
    }

    fn tick(&mut self) {
        let interfaces = HashMap::from([(IFINDEX, "edge0".to_owned())]);
        let claims = self.oracle.claim(&mut self.random);
        self.maybe_fail();
        let posted = self
            .poster
            .post(&self.oracle.counters, &claims, self.now, &interfaces);
        self.plan.fail_after(-1);
        self.oracle.after(&posted);
        if self.oracle.unanswered.is_empty() && !is_uncertain(&posted) {
            self.number = self.ledger.resume(EPOCH).unwrap().0;
        }
        if let Some(error) = posted.failure {
            assert_ne!(error.fault, Fault::Stale, "{error}");
            if self.random.below(2) == 0 {
                self.crash();
            }
        }
    }

    fn roll_up(&mut self) {
        let retention = Retention {
            seconds: std::time::Duration::from_secs(90),
            minutes: std::time::Duration::from_secs(600),
            hours: std::time::Duration::from_secs(4 * 3_600),
            days: std::time::Duration::from_secs(3 * 86_400),
        };
        self.maybe_fail();
        let _ = self.ledger.roll_up(&retention, self.now);
        self.plan.fail_after(-1);
    }

    /// One attempt to deliver: it may get lost on the way, or its answer may.
    fn deliver(&mut self) {
        self.maybe_fail();
        let batch = self.ledger.next_batch("bill", 3, self.now);
        self.plan.fail_after(-1);
        let Ok(Some(batch)) = batch else { return };
        if self.random.below(4) == 0 {
            self.maybe_fail();
            let _ = self.ledger.not_arrived("bill", batch.number);
            self.plan.fail_after(-1);
            return;
        }
        for event in &batch.events {
            let id = (event.seq, event.owner_id.0, event.direction as u32);
            let before = self.oracle.sink.insert(id, event.wire_bytes.into());
            assert!(
                before.is_none_or(|bytes| bytes == i128::from(event.wire_bytes)),
                "an event changed under its id"
            );
        }
        if self.random.below(4) == 0 {
            return; // the answer got lost
        }
        self.maybe_fail();
        let _ = self.ledger.acknowledge("bill", batch.number);
        self.plan.fail_after(-1);
        if self.random.below(4) == 0 {
            self.maybe_fail();
            let _ = self.ledger.fold_acknowledged("bill", self.now - 600);
            self.plan.fail_after(-1);
        }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.random.below(10) {
                0..3 => self.oracle.traffic(&mut self.random),
                3..6 => self.tick(),
                6 => self.roll_up(),
                7 => self.deliver(),
                8 => {
                    // Clocks go back at times.
                    let step = i64::try_from(self.random.below(1_800)).unwrap();
                    self.now += if self.random.below(8) == 0 {
                        -step / 4
                    } else {
                        step
                    };
                }
                _ => {
                    if self.random.below(6) == 0 {
                        self.crash();
                    }
                }
            }
        }
        // In the end everything works.
        for _ in 0..2 {
            self.tick_well();
        }
        self.now += 7_200;
        self.tick_well();
        while let Some(batch) = self.ledger.next_batch("bill", 50, self.now).unwrap() {
            for event in &batch.events {
                let id = (event.seq, event.owner_id.0, event.direction as u32);
                self.oracle.sink.insert(id, event.wire_bytes.into());
            }
            self.ledger.acknowledge("bill", batch.number).unwrap();
        }
        self.compare();
    }

    fn tick_well(&mut self) {
        let interfaces = HashMap::from([(IFINDEX, "edge0".to_owned())]);
        let posted = self
            .poster
            .post(&self.oracle.counters, &[], self.now, &interfaces);
        self.oracle.after(&posted);
        assert!(posted.failure.is_none(), "{:?}", posted.failure);
        self.number = self.ledger.resume(EPOCH).unwrap().0;
    }

    fn compare(&self) {
        assert_eq!(in_ledger(&self.ledger), self.oracle.expected());
        assert_eq!(self.ledger.breaches().unwrap(), []);
        // The sink has what the routes moved, to the byte.
        let mut sink: BTreeMap<u32, i128> = BTreeMap::new();
        for ((_, owner, _), bytes) in &self.oracle.sink {
            *sink.entry(*owner).or_default() += bytes;
        }
        let mut routes = self.oracle.expected();
        routes.remove(&UNCLAIMED);
        assert_eq!(sink, routes);
        let backlog = self.ledger.backlog("bill").unwrap();
        assert_eq!(backlog.outstanding_bytes, 0, "{backlog:?}");
        assert_eq!(
            i128::from(backlog.acknowledged_bytes),
            sink.values().sum::<i128>()
        );
        // Any partition of time adds up to the whole.
        let span = self.ledger.span().unwrap().unwrap();
        let mut sums: BTreeMap<u32, i128> = BTreeMap::new();
        let mut start = span.start;
        while start < span.end {
            let end = (start + 5_000).min(span.end);
            for usage in self.ledger.sums(Period { start, end }, false).unwrap() {
                *sums.entry(usage.owner_id.0).or_default() += i128::from(usage.amount.wire_bytes);
            }
            start = end;
        }
        sums.retain(|_, bytes| *bytes != 0);
        assert_eq!(sums, self.oracle.expected());
    }
}

#[test]
fn any_sequence_with_failures_at_any_step_equals_the_oracle_on_sqlite() {
    for seed in 1..=12_u64 {
        println!("seed {seed}");
        World::new(&Backend::file(), seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)).run(400);
    }
}

#[test]
fn any_sequence_with_failures_at_any_step_equals_the_oracle_on_postgresql() {
    for seed in 1..=3_u64 {
        println!("seed {seed}");
        World::new(&Backend::shared(), seed.wrapping_mul(0xD134_2543_DE82_EF95)).run(250);
    }
}

/// Not by chance: every step of every kind of transaction, once.
fn each_step_once(backend: &Backend) {
    let mut world = World::new(backend, 42);
    let interfaces = HashMap::from([(IFINDEX, "edge0".to_owned())]);
    let retention = Retention {
        seconds: std::time::Duration::ZERO,
        minutes: std::time::Duration::from_secs(60),
        hours: std::time::Duration::from_secs(86_400),
        days: std::time::Duration::from_secs(3 * 86_400),
    };
    for step in 0.. {
        for _ in 0..6 {
            world.oracle.traffic(&mut world.random);
        }
        world.now += 3_600;
        let claims = world.oracle.claim(&mut world.random);
        world.plan.fail_after(step);
        let posted = world
            .poster
            .post(&world.oracle.counters, &claims, world.now, &interfaces);
        world.oracle.after(&posted);
        let mut failed = posted.failure.is_some();
        if failed {
            world.crash();
        }
        world.number = world.ledger.resume(EPOCH).unwrap().0;
        let plan = world.plan.clone();
        plan.fail_after(step);
        failed |= world.ledger.roll_up(&retention, world.now).is_err();
        plan.fail_after(-1);
        assert_eq!(world.ledger.breaches().unwrap(), [], "after step {step}");
        if !failed {
            assert!(step > 12, "a tick has more than {step} steps");
            break;
        }
    }
    world.tick_well();
    assert_eq!(in_ledger(&world.ledger), world.oracle.expected());
}

#[test]
fn a_crash_at_each_step_of_a_tick_and_a_roll_up_loses_and_doubles_nothing() {
    super::backend::on_both(each_step_once);
}
