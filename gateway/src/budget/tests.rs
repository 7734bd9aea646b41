//! Standings and decisions, against sums worked out by hand.

use flow_abi::Direction;

use super::{judge::Days, *};
use crate::{
    attribution::Amount,
    config::{Config, Name, Prices},
    cost::calendar::{Period, Zone},
    ledger::{Grain, Sum},
    money::Nanos,
    owner::{Leg, Owner, OwnerId, OwnerKind},
};

/// 2026-11-11T12:00:00Z, a Wednesday.
const NOON: i64 = 1_794_398_400;
const DAY: i64 = 86_400;

fn budget(period: PeriodKind, limit: Limit, action: Action) -> Budget {
    Budget {
        name: Name::new("acme").unwrap(),
        scope: Scope {
            tenants: vec![Name::new("acme").unwrap()],
            ..Scope::default()
        },
        limit,
        period,
        zone: Zone::utc(),
        warn_percent: vec![50, 80],
        action,
        throttle_bytes_per_second: 1_000_000,
    }
}

fn sum(tenant: &str, direction: Direction, wire_bytes: i64) -> Sum {
    Sum {
        gateway: "local".into(),
        interface: "eth0".into(),
        direction,
        owner_id: OwnerId(1),
        owner: Owner {
            kind: OwnerKind::Route,
            route: "orders".into(),
            service: "commerce".into(),
            tenant: tenant.into(),
            ..Owner::connection(OwnerKind::Route, Leg::Client, "public")
        },
        class: 0,
        grain: Grain::Minute,
        amount: Amount {
            wire_bytes,
            ..Amount::default()
        },
    }
}

fn day(at: i64) -> Period {
    Grain::Day.span(at)
}

fn standing(used: i128, limit: i128, warned_percent: i64) -> Standing {
    Standing {
        period: day(NOON),
        at: NOON,
        used,
        limit,
        forecast: used,
        warned_percent,
    }
}

#[test]
fn only_the_scopes_bytes_of_the_period_count() {
    let budget = budget(PeriodKind::Day, Limit::Bytes(1_000), Action::None);
    let days = Days::from([
        (day(NOON - DAY), vec![sum("acme", Direction::Tx, 7_000)]),
        (
            day(NOON),
            vec![
                sum("acme", Direction::Tx, 500),
                sum("acme", Direction::Rx, 350),
                sum("globex", Direction::Tx, 9_000),
            ],
        ),
    ]);
    let standing = judge(&budget, None, &days, NOON, NOON).unwrap();
    assert_eq!((standing.used, standing.limit), (850, 1_000));
    assert_eq!(standing.warned_percent, 80);
    assert_eq!(standing.forecast, 1_700, "half the day is gone");
    assert!(!standing.is_exhausted());
}

#[test]
fn money_is_rated_once_for_the_whole_and_to_the_nano() {
    let text = "[[listeners]]\nname = \"a\"\naddress = \"127.0.0.1:1\"\n[[upstreams]]\nname = \"u\"\n\
                peers = [\"127.0.0.1:2\"]\n[[routes]]\nname = \"r\"\nupstream = \"u\"\n[prices]\n\
                currency = \"USD\"\n[[prices.rates]]\nid = \"out\"\nleg = \"client\"\n\
                direction = \"tx\"\nprice = \"0.09\"\nunit_bytes = 1073741824\n";
    let prices: Prices = Config::parse(text, "c.toml").unwrap().prices.unwrap();
    let limit = Limit::Money("1.00".parse::<Nanos>().unwrap());
    let budget = budget(PeriodKind::Day, limit, Action::None);
    // A thousand times 3 bytes, each worth a quarter of a nano.
    let sums = vec![sum("acme", Direction::Tx, 3); 1_000];
    let days = Days::from([(day(NOON), sums)]);
    let standing = judge(&budget, Some(&prices), &days, NOON, NOON).unwrap();
    // 3,000 x 90,000,000 / 1,073,741,824 = 251.46
    assert_eq!(standing.used, 251);
}

#[test]
fn a_month_is_forecast_by_its_weekdays_where_they_are_known() {
    let budget = budget(PeriodKind::Month, Limit::Bytes(1_000_000), Action::None);
    let mut days = Days::new();
    // 28 days: 100 a day, 20 at weekends; the month began with ten of them.
    for back in 1..=28 {
        let at = NOON - back * DAY;
        // 1970-01-01 was a Thursday.
        let weekday = (at.div_euclid(DAY) + 3).rem_euclid(7);
        let bytes = if weekday >= 5 { 20 } else { 100 };
        days.insert(day(at), vec![sum("acme", Direction::Tx, bytes)]);
    }
    days.insert(day(NOON), vec![sum("acme", Direction::Tx, 50)]);
    let standing = judge(&budget, None, &days, NOON - 40 * DAY, NOON).unwrap();
    // November 1st is a Sunday: 1 + 2 + 7..8 are weekend days: 20 x 3, 100 x 7, and today's 50.
    assert_eq!(standing.used, 20 * 3 + 100 * 7 + 50);
    // Half a Wednesday, 12th to 30th: 14 + 21 + 28 … : 13 weekdays, 6 weekend days.
    assert_eq!(standing.forecast, standing.used + 50 + 100 * 13 + 20 * 6);
    // Without history: in proportion to ten and a half of thirty days.
    let short = judge(&budget, None, &days, NOON, NOON).unwrap();
    assert_eq!(short.forecast, short.used * 30 * 2 / 21);
}

#[test]
fn days_begin_where_the_budgets_zone_says() {
    let mut budget = budget(PeriodKind::Day, Limit::Bytes(1), Action::None);
    budget.zone = Zone::new("Asia/Shanghai").unwrap();
    let period = judge::period(&budget, NOON);
    // 20:00 there: the day began at 16:00 UTC.
    assert_eq!(period.start, NOON - 20 * 3_600);
}

#[test]
fn what_is_past_the_limit_is_refused_until_the_period_ends() {
    let budgets = Budgets::new(vec![budget(
        PeriodKind::Day,
        Limit::Bytes(100),
        Action::Refuse,
    )]);
    let now = Instant::now();
    let publish = |standing: Standing| {
        budgets.publish(Judgement {
            standings: vec![standing],
            valid_until: Some(now + Duration::from_secs(60)),
        });
    };
    let decide = |tenant: &str, at: Instant| budgets.decide("orders", "commerce", tenant, at);
    assert!(
        matches!(decide("acme", now), Decision::Allow),
        "nothing is known yet"
    );
    publish(standing(49, 100, 0));
    assert!(matches!(decide("acme", now), Decision::Allow));
    publish(standing(85, 100, 80));
    let Decision::Warn(text) = decide("acme", now) else {
        panic!("no warning");
    };
    assert_eq!(text, "acme; used=85%; period=day");
    publish(standing(100, 100, 80));
    let Decision::Refuse { retry_after, .. } = decide("acme", now) else {
        panic!("not refused");
    };
    assert_eq!(retry_after, Duration::from_secs(12 * 3_600));
    assert!(
        matches!(decide("globex", now), Decision::Allow),
        "another tenant"
    );
    // An old judgement refuses nobody.
    let later = now + Duration::from_secs(61);
    assert!(matches!(decide("acme", later), Decision::Allow));
    budgets.publish(Judgement::default());
    assert!(matches!(decide("acme", now), Decision::Allow));
}

#[test]
fn a_shared_pace_adds_up() {
    let pace = Pace::new(1_000_000);
    let now = Instant::now();
    assert_eq!(pace.wait(500_000, now), Duration::ZERO);
    assert_eq!(pace.wait(250_000, now), Duration::from_millis(500));
    assert_eq!(pace.wait(1, now), Duration::from_millis(750));
    // Nobody saves up while nothing is sent.
    let later = now + Duration::from_secs(60);
    assert_eq!(pace.wait(1_000_000, later), Duration::ZERO);
    // And nobody waits for ever.
    for _ in 0..100 {
        assert!(pace.wait(5_000_000, later) <= DELAY_MAX);
    }
}
