//! The specification of discounts: worked examples, then what must hold for every basket.

// Not by glob: `Strategy` names a discount here.
use proptest::prelude::{Just, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::strategy::Strategy as Generator;

use super::*;
use crate::money::Currency;

const NOW_MS: i64 = 1_000;

fn cny(minor: i64) -> Money {
    Money::new(minor, Currency::CNY)
}

fn sku(text: &str) -> Sku {
    Sku::parse(text).unwrap()
}

fn item(name: &str, quantity: u32, minor: i64) -> Item {
    Item {
        sku: sku(name),
        quantity,
        unit_price: cny(minor),
    }
}

fn rule(id: &str, trigger: Trigger, strategy: Strategy) -> Rule {
    Rule {
        id: RuleId::parse(id).unwrap(),
        strategy,
        trigger,
        skus: BTreeSet::new(),
        from_ms: 0,
        until_ms: i64::MAX,
    }
}

fn only(skus: &[&str], rule: Rule) -> Rule {
    Rule {
        skus: skus.iter().map(|name| sku(name)).collect(),
        ..rule
    }
}

fn percent(points: u16) -> Strategy {
    Strategy::Percent(BasisPoints::new(points).unwrap())
}

fn threshold(at_least: i64, off: i64) -> Strategy {
    Strategy::Threshold {
        at_least: cny(at_least),
        off: cny(off),
    }
}

fn buy_get(buy: u32, free: u32) -> Strategy {
    Strategy::BuyGet {
        buy: NonZeroU32::new(buy).unwrap(),
        free: NonZeroU32::new(free).unwrap(),
    }
}

fn coupon(code: &str, stacks: bool) -> Trigger {
    Trigger::Coupon {
        code: code.to_owned(),
        stacks,
    }
}

/// One worked example: what the customer pays per line, and which rules took how much.
struct Example {
    what: &'static str,
    basket: Vec<Item>,
    rules: Vec<Rule>,
    member: bool,
    coupons: &'static [&'static str],
    nets: &'static [i64],
    applied: &'static [(&'static str, &'static str, i64)],
}

#[test]
fn worked_examples() {
    let two = || vec![item("a", 3, 1_000), item("b", 1, 500)];
    let examples = [
        Example {
            what: "no rule: list prices",
            basket: two(),
            rules: vec![],
            member: false,
            coupons: &[],
            nets: &[3_000, 500],
            applied: &[],
        },
        Example {
            what: "a percentage is allocated in proportion",
            basket: two(),
            rules: vec![rule("sale", Trigger::Always, percent(1_000))],
            member: false,
            coupons: &[],
            nets: &[2_700, 450],
            applied: &[("a", "sale", 300), ("b", "sale", 50)],
        },
        Example {
            what: "a threshold is met by equality",
            basket: two(),
            rules: vec![rule("full", Trigger::Always, threshold(3_500, 701))],
            member: false,
            coupons: &[],
            // 701 × 3000/3500 = 600.86, 701 × 500/3500 = 100.14
            nets: &[2_399, 400],
            applied: &[("a", "full", 601), ("b", "full", 100)],
        },
        Example {
            what: "a threshold one unit away does nothing",
            basket: two(),
            rules: vec![rule("full", Trigger::Always, threshold(3_501, 701))],
            member: false,
            coupons: &[],
            nets: &[3_000, 500],
            applied: &[],
        },
        Example {
            what: "a threshold looks at its own SKUs only",
            basket: two(),
            rules: vec![only(
                &["b"],
                rule("full", Trigger::Always, threshold(500, 100)),
            )],
            member: false,
            coupons: &[],
            nets: &[3_000, 400],
            applied: &[("b", "full", 100)],
        },
        Example {
            what: "buy two get one: of five units one is free",
            basket: vec![item("a", 5, 1_000)],
            rules: vec![rule("3for2", Trigger::Always, buy_get(2, 1))],
            member: false,
            coupons: &[],
            nets: &[4_000],
            applied: &[("a", "3for2", 1_000)],
        },
        Example {
            what: "buy one get two: the second unit of an open round is free",
            basket: vec![item("a", 5, 1_000)],
            rules: vec![rule("b1g2", Trigger::Always, buy_get(1, 2))],
            member: false,
            coupons: &[],
            nets: &[2_000],
            applied: &[("a", "b1g2", 3_000)],
        },
        Example {
            what: "a member price is for members",
            basket: two(),
            rules: vec![only(
                &["a"],
                rule("club", Trigger::Member, Strategy::MemberPrice(cny(900))),
            )],
            member: true,
            coupons: &[],
            nets: &[2_700, 500],
            applied: &[("a", "club", 300)],
        },
        Example {
            what: "and not for others",
            basket: two(),
            rules: vec![rule(
                "club",
                Trigger::Member,
                Strategy::MemberPrice(cny(900)),
            )],
            member: false,
            coupons: &[],
            nets: &[3_000, 500],
            applied: &[],
        },
        Example {
            what: "a member price above the list price never raises it",
            basket: two(),
            rules: vec![rule(
                "club",
                Trigger::Member,
                Strategy::MemberPrice(cny(5_000)),
            )],
            member: true,
            coupons: &[],
            nets: &[3_000, 500],
            applied: &[],
        },
        Example {
            what: "one item rule per line: the best, not both",
            basket: vec![item("a", 3, 1_000)],
            rules: vec![
                rule("3for2", Trigger::Always, buy_get(2, 1)),
                rule("club", Trigger::Member, Strategy::MemberPrice(cny(900))),
            ],
            member: true,
            coupons: &[],
            nets: &[2_000],
            applied: &[("a", "3for2", 1_000)],
        },
        Example {
            what: "one order rule: the best, not both",
            basket: two(),
            rules: vec![
                rule("ten", Trigger::Always, percent(1_000)),
                rule("full", Trigger::Always, threshold(1, 400)),
            ],
            member: false,
            coupons: &[],
            nets: &[2_657, 443],
            applied: &[("a", "full", 343), ("b", "full", 57)],
        },
        Example {
            what: "stages: item rule, then order rule on what is left, then coupons, amounts first",
            basket: vec![item("a", 3, 1_000)],
            rules: vec![
                rule("3for2", Trigger::Always, buy_get(2, 1)),
                rule("ten", Trigger::Always, percent(1_000)),
                rule("aa-half", coupon("HALF", true), percent(5_000)),
                rule("zz-100", coupon("C100", true), threshold(0, 100)),
            ],
            member: false,
            coupons: &["HALF", "C100"],
            // 3000 − 1000 = 2000; − 10 % = 1800; − 100 = 1700; half = 850
            nets: &[850],
            applied: &[
                ("a", "3for2", 1_000),
                ("a", "ten", 200),
                ("a", "zz-100", 100),
                ("a", "aa-half", 850),
            ],
        },
        Example {
            what: "an exclusive coupon that saves more stands alone",
            basket: two(),
            rules: vec![
                rule("ten", Trigger::Always, percent(1_000)),
                rule("vip", coupon("VIP", false), percent(2_000)),
            ],
            member: false,
            coupons: &["VIP"],
            nets: &[2_400, 400],
            applied: &[("a", "vip", 600), ("b", "vip", 100)],
        },
        Example {
            what: "one that saves less is left out",
            basket: two(),
            rules: vec![
                rule("ten", Trigger::Always, percent(1_000)),
                rule("vip", coupon("VIP", false), percent(500)),
            ],
            member: false,
            coupons: &["VIP"],
            nets: &[2_700, 450],
            applied: &[("a", "ten", 300), ("b", "ten", 50)],
        },
        Example {
            what: "more off than there is: free, not negative",
            basket: two(),
            rules: vec![rule("full", Trigger::Always, threshold(0, 99_999))],
            member: false,
            coupons: &[],
            nets: &[0, 0],
            applied: &[("a", "full", 3_000), ("b", "full", 500)],
        },
    ];
    for example in examples {
        let coupons: Vec<String> = example.coupons.iter().map(ToString::to_string).collect();
        let customer = Customer {
            member: example.member,
            coupons: &coupons,
            variants: &[],
        };
        let priced = price(&example.basket, &example.rules, &customer, NOW_MS).unwrap();
        let nets: Vec<i64> = priced.lines.iter().map(|line| line.net.minor()).collect();
        assert_eq!(nets, example.nets, "{}", example.what);
        let applied: Vec<(&str, &str, i64)> = priced
            .lines
            .iter()
            .flat_map(|line| {
                let one = |applied: &Applied| applied.amount.minor();
                line.applied
                    .iter()
                    .map(move |applied| (line.sku.as_str(), applied.rule.as_str(), one(applied)))
            })
            .collect();
        assert_eq!(applied, example.applied, "{}", example.what);
    }
}

#[test]
fn a_rule_holds_from_its_first_millisecond_to_before_its_last() {
    let rules = [Rule {
        from_ms: 10,
        until_ms: 20,
        ..rule("sale", Trigger::Always, percent(1_000))
    }];
    let total = |now| {
        let priced = price(&[item("a", 1, 1_000)], &rules, &Customer::default(), now);
        priced.unwrap().total.minor()
    };
    assert_eq!(
        [9, 10, 19, 20].map(total),
        [1_000, 900, 900, 1_000],
        "half-open"
    );
}

#[test]
fn a_variant_rule_is_for_customers_in_the_variant() {
    let trigger = Trigger::Variant {
        experiment: "badge".to_owned(),
        variant: "treatment".to_owned(),
    };
    let rules = [rule("test", trigger, percent(1_000))];
    let total = |variant: &str| {
        let variants = [("badge".to_owned(), variant.to_owned())];
        let customer = Customer {
            variants: &variants,
            ..Customer::default()
        };
        let priced = price(&[item("a", 1, 1_000)], &rules, &customer, NOW_MS);
        priced.unwrap().total.minor()
    };
    assert_eq!((total("treatment"), total("control")), (900, 1_000));
}

#[test]
fn what_has_no_price_says_why() {
    let offer = |coupons: &[String], rules: &[Rule], basket: &[Item]| {
        let customer = Customer {
            coupons,
            ..Customer::default()
        };
        price(basket, rules, &customer, NOW_MS).unwrap_err()
    };
    let basket = [item("a", 1, 1)];
    assert_eq!(offer(&[], &[], &[]), DiscountError::Empty);
    assert_eq!(
        offer(&[], &[], &[item("a", 1, 1), item("a", 2, 1)]),
        DiscountError::Duplicate(sku("a"))
    );
    let code = ["X".to_owned()];
    let unknown = DiscountError::Coupon("X".to_owned());
    assert_eq!(offer(&code, &[], &basket), unknown);
    let expired = Rule {
        until_ms: NOW_MS,
        ..rule("x", coupon("X", true), percent(1))
    };
    assert_eq!(offer(&code, &[expired], &basket), unknown);
    let many = vec!["X".to_owned(); COUPONS_MAX + 1];
    assert_eq!(offer(&many, &[], &basket), DiscountError::TooManyCoupons);
    let euro = Item {
        unit_price: Money::new(1, Currency::parse("EUR").unwrap()),
        ..item("b", 1, 1)
    };
    assert!(matches!(
        offer(&[], &[], &[item("a", 1, 1), euro]),
        DiscountError::Money(MoneyError::Mixed(..))
    ));
}

#[test]
fn shares_go_to_the_largest_remainders() {
    assert_eq!(allocate(100, &[1_000, 1_000, 1_000]), [34, 33, 33]);
    assert_eq!(allocate(2, &[1, 1, 1]), [1, 1, 0]);
    assert_eq!(allocate(10, &[0, 5, -3]), [0, 5, 0]);
    assert_eq!(allocate(10, &[]), [0; 0]);
    assert_eq!(
        allocate(i64::MAX, &[i64::MAX, i64::MAX])[0],
        i64::MAX / 2 + 1
    );
}

fn any_strategy() -> impl Generator<Value = Strategy> {
    prop_oneof![
        (0_i64..2_000).prop_map(|unit| Strategy::MemberPrice(cny(unit))),
        (1_u32..4, 1_u32..4).prop_map(|(buy, free)| buy_get(buy, free)),
        (0_i64..20_000, 0_i64..30_000).prop_map(|(at_least, off)| threshold(at_least, off)),
        (0_u16..=10_000).prop_map(percent),
    ]
}

fn any_rules() -> impl Generator<Value = Vec<Rule>> {
    let skus = proptest::sample::subsequence(vec!["a", "b", "c", "d"], 0..3);
    let one = (any_strategy(), 0_u8..4, skus);
    proptest::collection::vec(one, 0..7).prop_map(|rules| {
        let numbered = rules.into_iter().enumerate();
        numbered
            .map(|(n, (strategy, trigger, skus))| {
                let trigger = match trigger {
                    0 => Trigger::Always,
                    1 => Trigger::Member,
                    2 => coupon("STACKS", true),
                    _ => coupon("ALONE", false),
                };
                only(&skus, rule(&format!("r{n}"), trigger, strategy))
            })
            .collect()
    })
}

fn any_basket() -> impl Generator<Value = Vec<Item>> {
    proptest::collection::btree_map("[a-f]", (1_u32..50, 1_i64..5_000), 1..6).prop_map(|lines| {
        let lines = lines.into_iter();
        lines
            .map(|(name, (quantity, minor))| item(&name, quantity, minor))
            .collect()
    })
}

fn price_any(basket: &[Item], rules: &[Rule], member: bool) -> Priced {
    let codes: Vec<String> = ["STACKS", "ALONE"]
        .into_iter()
        .filter(|code| {
            let has = |rule: &Rule| matches!(&rule.trigger, Trigger::Coupon { code: of, .. } if of == code);
            rules.iter().any(has)
        })
        .map(str::to_owned)
        .collect();
    let customer = Customer {
        member,
        coupons: &codes,
        variants: &[],
    };
    price(basket, rules, &customer, NOW_MS).unwrap()
}

proptest! {
    #[test]
    fn the_allocations_sum_to_the_discount_and_nothing_is_negative(
        basket in any_basket(), rules in any_rules(), member in any::<bool>(),
    ) {
        let priced = price_any(&basket, &rules, member);
        let mut allocated = 0;
        for line in &priced.lines {
            prop_assert!(line.net.minor() >= 0);
            let of_line: i64 = line.applied.iter().map(|applied| applied.amount.minor()).sum();
            prop_assert!(line.applied.iter().all(|applied| applied.amount.minor() > 0));
            prop_assert_eq!(line.net.minor() + of_line, line.list.minor());
            allocated += of_line;
        }
        prop_assert_eq!(allocated, priced.discount.minor());
        let listed: i64 = basket.iter().map(|item| item.unit_price.minor() * i64::from(item.quantity)).sum();
        prop_assert_eq!(priced.total.minor() + allocated, listed);
    }

    #[test]
    fn the_order_of_lines_and_rules_changes_nothing(
        (basket, shuffled) in any_basket().prop_flat_map(|basket| (Just(basket.clone()), Just(basket).prop_shuffle())),
        (rules, mixed) in any_rules().prop_flat_map(|rules| (Just(rules.clone()), Just(rules).prop_shuffle())),
        member in any::<bool>(),
    ) {
        prop_assert_eq!(price_any(&basket, &rules, member), price_any(&shuffled, &mixed, member));
    }

    #[test]
    fn shares_sum_to_the_amount_and_stay_within_a_unit_of_the_proportion(
        weights in proptest::collection::vec(0_i64..=i64::MAX / 8, 1..8), part in 0_u16..=10_000,
    ) {
        let sum: i128 = weights.iter().map(|&weight| i128::from(weight)).sum();
        let amount = i64::try_from(sum * i128::from(part) / 10_000).unwrap();
        let shares = allocate(amount, &weights);
        prop_assert_eq!(shares.iter().map(|&share| i128::from(share)).sum::<i128>(), i128::from(amount));
        for (&share, &weight) in shares.iter().zip(&weights) {
            prop_assert!((0..=weight).contains(&share));
            let off = i128::from(share) * sum - i128::from(amount) * i128::from(weight);
            prop_assert!(off.abs() < sum.max(1), "more than a unit away");
        }
    }

    #[test]
    fn refunds_in_any_steps_sum_to_what_was_paid(
        net in 0_i64..1_000_000, quantity in 1_u32..40, steps in proptest::collection::vec(1_u32..5, 1..40),
    ) {
        let (mut before, mut back) = (0, 0);
        for step in steps {
            let units = step.min(quantity - before);
            back += refund(cny(net), quantity, before, units).unwrap().minor();
            before += units;
            prop_assert!(back <= net);
        }
        back += refund(cny(net), quantity, before, quantity - before).unwrap().minor();
        prop_assert_eq!(back, net);
        prop_assert_eq!(refund(cny(net), quantity, quantity, 1), Err(MoneyError::Overflow));
    }
}
