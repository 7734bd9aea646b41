//! Random routes, prices, days and orders of arrival against big integers.

use num_bigint::BigInt;
use proptest::prelude::*;

use super::*;
use crate::cost::exact::allocate;

/// Round half to even, in big integers and by another rule than the code's.
fn oracle_division(dividend: &BigInt, divisor: &BigInt) -> BigInt {
    let two = BigInt::from(2);
    let doubled: BigInt = dividend * &two + divisor;
    let twice = divisor * &two;
    // floor((2a + b) / 2b) rounds half up; an exact half at an odd result goes down.
    let mut quotient = &doubled / &twice;
    let exact_half = &doubled % &twice == BigInt::ZERO;
    if exact_half && &quotient % &two != BigInt::ZERO {
        quotient -= 1;
    }
    quotient
}

#[derive(Clone, Debug)]
struct Case {
    unit: u64,
    free: u64,
    bounds: Vec<u64>,
    prices: Vec<u64>,
    whole: bool,
    rows: Vec<(usize, i64, i64)>,
}

fn case() -> impl Strategy<Value = Case> {
    let tiers = (1_usize..5).prop_flat_map(|count| {
        (
            proptest::collection::btree_set(1_u64..5_000, count - 1),
            proptest::collection::vec(0_u64..2_000_000_000, count),
        )
    });
    let unit = prop_oneof![
        Just(1_000_000_000_u64),
        Just(1 << 30),
        Just(1),
        Just(1_000_000)
    ];
    let rows = proptest::collection::vec(
        (0_usize..7, 0_i64..30 * 1_440, 0_i64..900_000_000_000),
        1..40,
    );
    (unit, 0_u64..300, tiers, any::<bool>(), rows).prop_map(|(unit, free, tiers, whole, rows)| {
        let (bounds, mut prices) = tiers;
        // A set may come out smaller than asked for.
        prices.truncate(bounds.len() + 1);
        Case {
            unit,
            free,
            bounds: bounds.into_iter().collect(),
            prices,
            whole,
            rows,
        }
    })
}

impl Case {
    fn book(&self) -> Book {
        let mut tiers = String::new();
        for (index, price) in self.prices.iter().enumerate() {
            let price = Nanos(i128::from(*price));
            match self.bounds.get(index) {
                Some(to) => tiers += &format!("{{ to = {to}, price = \"{price}\" }}, "),
                None => tiers += &format!("{{ price = \"{price}\" }}"),
            }
        }
        let mode = if self.whole {
            "whole_volume"
        } else {
            "graduated"
        };
        book(&format!(
            "currency = \"USD\"\ntimezone = \"Asia/Kathmandu\"\n[[skus]]\nid = \"out\"\n\
             leg = \"client\"\ndirection = \"tx\"\nunit_bytes = {}\nfree_units = {}\n\
             tier_mode = \"{mode}\"\ntiers = [{tiers}]\n",
            self.unit, self.free
        ))
    }

    fn usage(&self, book: &Book) -> Usage {
        let first = start(book, "2026-11-01");
        let row = |&(route, minute, bytes): &(usize, i64, i64)| {
            sent(&format!("r{route}"), first + minute * 60, bytes)
        };
        usage(self.rows.iter().map(row).collect())
    }

    /// Each tier's cost, by definition: the volume inside it times its price, rounded once.
    fn oracle(&self) -> BigInt {
        let unit = BigInt::from(self.unit);
        let total: BigInt = self.rows.iter().map(|row| BigInt::from(row.2)).sum();
        let free = BigInt::from(self.free) * &unit;
        let mut cost = BigInt::ZERO;
        let mut floor = free.clone();
        for (index, price) in self.prices.iter().enumerate() {
            let bound = self.bounds.get(index).map(|to| BigInt::from(*to) * &unit);
            let inside = if self.whole {
                let lower = match index {
                    0 => BigInt::from(-1),
                    _ => BigInt::from(self.bounds[index - 1]) * &unit,
                };
                let here = total > lower && bound.as_ref().is_none_or(|bound| total <= *bound);
                if here { &total - &free } else { BigInt::ZERO }
            } else {
                let top = bound
                    .clone()
                    .map_or(total.clone(), |bound| bound.min(total.clone()));
                let inside = &top - &floor;
                floor = floor.max(top);
                inside
            };
            if inside > BigInt::ZERO {
                cost += oracle_division(&(inside * BigInt::from(*price)), &unit);
            }
        }
        cost
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tiers_are_what_big_integers_say(case in case()) {
        let book = case.book();
        let usage = case.usage(&book);
        let bill = rated(&book, &usage, "2026-11");
        check(&bill, &usage);
        prop_assert_eq!(BigInt::from(cost(&bill).0), case.oracle());
    }

    #[test]
    fn no_order_of_arrival_changes_a_row(case in case(), seed in any::<u64>()) {
        let book = case.book();
        let usage = case.usage(&book);
        let bill = rated(&book, &usage, "2026-11");
        let mut shuffled = usage.clone();
        let mut state = seed | 1;
        for index in (1..shuffled.rows.len()).rev() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let other = usize::try_from(state % (index as u64 + 1)).unwrap();
            shuffled.rows.swap(index, other);
        }
        prop_assert_eq!(rated(&book, &shuffled, "2026-11"), bill);
    }

    #[test]
    fn unit_price_times_quantity_is_the_list_cost(case in case()) {
        let book = case.book();
        let bill = rated(&book, &case.usage(&book), "2026-11");
        for charge in &bill.charges {
            let big = |text: &str| {
                let (whole, fraction) = text.split_once('.').unwrap();
                let digits: BigInt = format!("{whole}{fraction}").parse().unwrap();
                (digits, fraction.len())
            };
            let (price, price_scale) = big(&charge.unit_price());
            let (quantity, quantity_scale) = big(&charge.quantity());
            let (cost, cost_scale) = big(&charge.list_cost().unwrap());
            let ten = BigInt::from(10);
            let scale = (price_scale + quantity_scale).max(cost_scale);
            let at = |value: BigInt, has: usize| value * ten.pow(u32::try_from(scale - has).unwrap());
            prop_assert_eq!(
                at(price * quantity, price_scale + quantity_scale),
                at(cost, cost_scale)
            );
            // The row's share of the rounded pool is within a nano of it.
            let nanos = BigInt::from(charge.cost) * ten.pow(u32::try_from(scale).unwrap())
                / ten.pow(9);
            let list = at(big(&charge.list_cost().unwrap()).0, cost_scale);
            let apart = if nanos > list { nanos - list } else { list - nanos };
            prop_assert!(apart <= ten.pow(u32::try_from(scale).unwrap()) / ten.pow(9) * 2 + 1);
        }
    }

    #[test]
    fn shares_are_within_one_of_exact_and_add_up(
        total in -1_000_000_000_000_i128..1_000_000_000_000,
        weights in proptest::collection::vec(0_i128..1_000_000_000_000, 1..30),
    ) {
        let shares = allocate(total, &weights).unwrap();
        prop_assert_eq!(shares.iter().sum::<i128>(), total);
        let sum: i128 = weights.iter().sum();
        if sum > 0 {
            for (share, weight) in shares.iter().zip(&weights) {
                let exact = BigInt::from(total) * BigInt::from(*weight);
                let apart = exact - BigInt::from(*share) * BigInt::from(sum);
                prop_assert!(apart.magnitude() < BigInt::from(sum).magnitude());
            }
        }
    }

    /// A percentile by definition: sort all samples of the month, drop the top, take the next.
    #[test]
    fn a_percentile_is_the_sorted_sample(
        samples in proptest::collection::vec((0_i64..30 * 288, 1_i64..1_000_000, 0_usize..4), 1..600),
        drop in 0_usize..20,
    ) {
        let book = book(&format!(
            "currency = \"USD\"\n[[skus]]\nid = \"p\"\nleg = \"client\"\ndirection = \"tx\"\n\
             basis = \"p95\"\nmethod = {{ drop_top_pct = {drop} }}\nprice = \"7.77\"\n"
        ));
        let first = start(&book, "2026-11-01");
        let mut slots = vec![0_i128; 30 * 288];
        let mut rows = Vec::new();
        for &(slot, bytes, route) in &samples {
            slots[usize::try_from(slot).unwrap()] += i128::from(bytes);
            rows.push(sent(&format!("r{route}"), first + slot * 300 + 120, bytes));
        }
        slots.sort_unstable_by(|a, b| b.cmp(a));
        let value = slots[30 * 288 * drop / 100];
        let bps = oracle_division(&BigInt::from(value * 8), &BigInt::from(300));
        let expected = oracle_division(
            &(bps * BigInt::from(7_770_000_000_i64)),
            &BigInt::from(1_000_000),
        );
        let usage = usage(rows.clone());
        let bill = rated(&book, &usage, "2026-11");
        check(&bill, &usage);
        prop_assert_eq!(BigInt::from(cost(&bill).0), expected);
        rows.reverse();
        let backwards = super::usage(rows);
        prop_assert_eq!(rated(&book, &backwards, "2026-11"), bill);
    }

    /// However rows are cut by a boundary, both sides together are the row.
    #[test]
    fn rows_across_boundaries_lose_nothing(
        offset in -86_400_i64..86_400,
        length in 1_i64..90_000,
        bytes in 0_i64..1_000_000_000_000,
        zone in prop_oneof![Just("UTC"), Just("Asia/Shanghai"), Just("America/New_York"), Just("Australia/Lord_Howe")],
    ) {
        let book = book(&format!(
            "currency = \"USD\"\ntimezone = \"{zone}\"\n[[skus]]\nid = \"out\"\nleg = \"client\"\n\
             direction = \"tx\"\nunit_bytes = 1000000000\nprice = \"1\"\n"
        ));
        let at = start(&book, "2026-11-01") + offset;
        let mut row = sent("a", at, bytes);
        row.period.end = at + length;
        let usage = usage(vec![row]);
        let sum: i128 = ["2026-10", "2026-11"]
            .iter()
            .flat_map(|month| rated(&book, &usage, month).charges)
            .map(|charge| charge.wire_bytes)
            .sum();
        prop_assert_eq!(sum, i128::from(bytes));
    }

    /// A price change: the volume before it at the old tiers, what follows at the new ones, in one
    /// pool that goes on. The row that crosses midnight is cut by time.
    #[test]
    fn a_price_change_is_two_ranges_of_one_pool(
        rows in proptest::collection::vec((0_i64..30 * 1_440, 0_i64..40_000_000_000), 1..30),
        crossing in (1_i64..60, 0_i64..1_000_000_000),
        change in 2_u8..29,
        bound in 1_u64..200,
        prices in proptest::array::uniform4(0_u64..3_000_000_000),
    ) {
        let tiers = |one: u64, two: u64| {
            let price = |nanos: u64| Nanos(i128::from(nanos)).to_string();
            format!(
                "tiers = [{{ to = {bound}, price = \"{}\" }}, {{ price = \"{}\" }}]\n",
                price(one), price(two)
            )
        };
        let head = "[[skus]]\nid = \"out\"\nleg = \"client\"\ndirection = \"tx\"\n\
                    unit_bytes = 1000000000\n";
        let day = format!("2026-11-{change:02}");
        let book = book(&format!(
            "currency = \"USD\"\ntimezone = \"America/New_York\"\n\
             {head}until = \"{day}\"\n{}{head}from = \"{day}\"\n{}",
            tiers(prices[0], prices[1]), tiers(prices[2], prices[3]),
        ));
        let (first, at) = (start(&book, "2026-11-01"), start(&book, &day));
        let mut list: Vec<UsageRow> = rows
            .iter()
            .map(|&(minute, bytes)| sent("a", first + minute * 60, bytes))
            .collect();
        let mut cut = sent("b", at - crossing.0, crossing.1);
        cut.period.end = at + (60 - crossing.0);
        list.push(cut);
        let shares = allocate(
            i128::from(crossing.1),
            &[i128::from(crossing.0), i128::from(60 - crossing.0)],
        )
        .unwrap();
        let mut volumes = [BigInt::from(shares[0]), BigInt::from(shares[1])];
        for row in &list[..rows.len()] {
            volumes[usize::from(row.period.start >= at)] += row.wire_bytes;
        }
        let unit = BigInt::from(1_000_000_000_u64);
        let edge = BigInt::from(bound) * &unit;
        let (middle, end) = (volumes[0].clone(), &volumes[0] + &volumes[1]);
        let mut expected = BigInt::ZERO;
        for (from, to, one, two) in [
            (BigInt::ZERO, middle.clone(), prices[0], prices[1]),
            (middle, end, prices[2], prices[3]),
        ] {
            let below = (to.clone().min(edge.clone()) - from.clone().min(edge.clone())).max(BigInt::ZERO);
            let above = &to - &from - &below;
            expected += oracle_division(&(below * one), &unit);
            expected += oracle_division(&(above * two), &unit);
        }
        let usage = usage(list);
        let bill = rated(&book, &usage, "2026-11");
        check(&bill, &usage);
        prop_assert_eq!(BigInt::from(cost(&bill).0), expected);
    }
}
