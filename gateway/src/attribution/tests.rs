//! Properties of attribution over random counters, claims and crashes, against a plain sum.

use std::collections::HashMap;

use flow_abi::{Account, AccountKey, Direction, InterfaceCells, cell};

use super::*;

/// Deterministic random numbers: a failure repeats.
struct Random(u64);

impl Random {
    fn small(&mut self, bound: u32) -> u32 {
        u32::try_from(self.below(u64::from(bound))).unwrap()
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

const UNCLAIMED: u32 = 1;
const IFINDEX: u32 = 7;

/// A kernel that credits random frames, and the claims a proxy would make of them.
struct World {
    random: Random,
    counters: Counters,
    /// Received, credited to unclaimed, not yet claimed.
    claimable: u64,
    claims: Vec<Claim>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed | 1),
            counters: Counters::default(),
            claimable: 0,
            claims: Vec::new(),
        }
    }

    fn traffic(&mut self) {
        for _ in 0..self.random.below(40) {
            let bytes = 54 + self.random.below(1460);
            let direction = self.random.small(2) as usize;
            let cells = self.counters.interfaces.entry(IFINDEX).or_default();
            let add = |cells: &mut InterfaceCells, number: usize| {
                cells.cells[direction][number].bytes += bytes;
                cells.cells[direction][number].frames += 1;
            };
            add(cells, cell::TOTAL);
            let place = self.random.small(8);
            if place == 0 {
                add(cells, cell::NON_IP);
                continue;
            }
            let key = AccountKey {
                owner: place,
                ifindex: IFINDEX,
                class: 1 + place % 2,
            };
            let account = self.counters.accounts.entry(key).or_default();
            if direction == Direction::Rx as usize {
                account.rx_bytes += bytes;
                account.rx_frames += 1;
                account.rx_payload_bytes += bytes - 54;
                if place == UNCLAIMED {
                    self.claimable += bytes;
                }
            } else {
                account.tx_bytes += bytes;
                account.tx_frames += 1;
            }
        }
        if self.claimable > 0 {
            let bytes = self.random.below(self.claimable + 1);
            self.claimable -= bytes;
            let to = OwnerId(2 + self.random.small(6));
            let key = ClaimKey {
                from: OwnerId(UNCLAIMED),
                to,
                ifindex: IFINDEX,
                class: ClassId(1 + UNCLAIMED % 2),
            };
            self.claims.push(Claim {
                key,
                bytes,
                frames: 1,
                payload_bytes: bytes.saturating_sub(54),
            });
        }
    }
}

fn add_all(sum: &mut HashMap<PostingKey, Amount>, postings: &Postings) {
    for (key, amount) in &postings.amounts {
        sum.entry(*key).or_default().add(amount);
    }
}

#[test]
fn parts_equal_the_whole_and_nothing_is_negative_over_any_history() {
    for seed in 1..200 {
        let mut world = World::new(seed);
        let mut watermarks = Watermarks::default();
        let mut ledger = HashMap::new();
        for _ in 0..20 {
            world.traffic();
            let claims = std::mem::take(&mut world.claims);
            // A crash before the commit: the tick's result is thrown away, with its watermarks.
            if world.random.below(3) == 0 {
                let mut lost = watermarks.clone();
                let _ = attribute(&mut lost, &world.counters, &claims);
                world.claims = claims;
                continue;
            }
            let (postings, regressions) = attribute(&mut watermarks, &world.counters, &claims);
            assert_eq!(regressions, []);
            for (place, difference) in postings.imbalance() {
                assert_eq!(difference, 0, "seed {seed} at {place:?}");
            }
            add_all(&mut ledger, &postings);
        }
        let claims = std::mem::take(&mut world.claims);
        let (last, _) = attribute(&mut watermarks, &world.counters, &claims);
        add_all(&mut ledger, &last);
        for (key, amount) in &ledger {
            assert!(amount.wire_bytes >= 0, "seed {seed}: {key:?} is {amount:?}");
        }
        let payload: i64 = ledger.values().map(|a| a.l4_payload_bytes).sum();
        let counted = world.counters.accounts.values().map(|a| a.rx_payload_bytes);
        assert_eq!(payload, counted.sum::<u64>().cast_signed(), "seed {seed}");
        for direction in [Direction::Rx, Direction::Tx] {
            let posted: i64 = ledger
                .iter()
                .filter(|(key, _)| key.direction == direction)
                .map(|(_, amount)| amount.wire_bytes)
                .sum();
            let counted: u64 = world
                .counters
                .accounts
                .values()
                .map(|a| {
                    if direction == Direction::Rx {
                        a.rx_bytes
                    } else {
                        a.tx_bytes
                    }
                })
                .sum();
            assert_eq!(posted, counted.cast_signed(), "seed {seed}");
        }
    }
}

#[test]
fn a_tick_without_traffic_posts_nothing() {
    let mut world = World::new(5);
    world.traffic();
    let mut watermarks = Watermarks::default();
    let _ = attribute(&mut watermarks, &world.counters, &[]);
    let (postings, _) = attribute(&mut watermarks, &world.counters, &[]);
    assert_eq!(postings, Postings::default());
}

#[test]
fn a_counter_that_goes_backwards_is_reported_and_not_posted() {
    let key = AccountKey {
        owner: 3,
        ifindex: IFINDEX,
        class: 0,
    };
    let mut watermarks = Watermarks::default();
    let mut counters = Counters::default();
    counters.accounts.insert(
        key,
        Account {
            rx_bytes: 100,
            ..Account::default()
        },
    );
    let _ = attribute(&mut watermarks, &counters, &[]);
    counters.accounts.insert(
        key,
        Account {
            rx_bytes: 40,
            ..Account::default()
        },
    );
    let (postings, regressions) = attribute(&mut watermarks, &counters, &[]);
    assert_eq!(postings, Postings::default());
    assert_eq!(regressions.len(), 1);
    counters.accounts.insert(
        key,
        Account {
            rx_bytes: 130,
            ..Account::default()
        },
    );
    let (postings, _) = attribute(&mut watermarks, &counters, &[]);
    let posted: i64 = postings
        .amounts
        .values()
        .map(|amount| amount.wire_bytes)
        .sum();
    assert_eq!(posted, 30, "the watermark stayed where it was");
}

#[test]
fn what_came_and_was_claimed_within_a_tick_still_moves_its_mark() {
    let from = AccountKey {
        owner: UNCLAIMED,
        ifindex: IFINDEX,
        class: 2,
    };
    let mut counters = Counters::default();
    let account = Account {
        rx_bytes: 100,
        rx_frames: 1,
        rx_payload_bytes: 34,
        ..Account::default()
    };
    counters.accounts.insert(from, account);
    let claim = Claim {
        key: ClaimKey {
            from: OwnerId(UNCLAIMED),
            to: OwnerId(9),
            ifindex: IFINDEX,
            class: ClassId(2),
        },
        bytes: 100,
        frames: 1,
        payload_bytes: 34,
    };
    let mut watermarks = Watermarks::default();
    let (postings, _) = attribute(&mut watermarks, &counters, &[claim]);
    let lines: Vec<(u32, i64)> = postings
        .amounts
        .iter()
        .map(|(key, amount)| (key.owner.0, amount.wire_bytes))
        .collect();
    assert_eq!(lines, [(UNCLAIMED, 0), (9, 100)]);
}
