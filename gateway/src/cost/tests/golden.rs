//! The vendors' own worked examples, to the last digit.

use super::*;

const GB: i64 = 1_000_000_000;
const GIB: i64 = 1 << 30;
/// Bytes of a five-minute sample at one Mbps.
const MBPS_SAMPLE: i64 = 1_000_000 / 8 * 300;

fn head(currency: &str, zone: &str) -> String {
    format!("currency = \"{currency}\"\ntimezone = \"{zone}\"\n")
}

fn one_sku(currency: &str, zone: &str, sku: &str) -> Book {
    let head = head(currency, zone);
    book(&format!(
        "{head}[[skus]]\nid = \"it\"\nleg = \"client\"\ndirection = \"tx\"\n{sku}"
    ))
}

/// `samples` five-minute samples a day at `mbps`, on each of the month's first `days` days.
fn samples(book: &Book, from: &str, days: i64, samples: i64, mbps: i64) -> Usage {
    let first = start(book, from);
    let mut rows = Vec::new();
    for day in 0..days {
        for sample in 0..samples {
            let at = first + day * 86_400 + sample * 300;
            rows.push(sent("api", at, mbps * MBPS_SAMPLE));
        }
    }
    usage(rows)
}

/// Tencent, enhanced 95th: max(80 x 6/30, 100 x 12/30) x 108 = 4320.
#[test]
fn tencent_enhanced_95() {
    let sku = r#"
basis = "p95"
method = { day_rank = 5, month_mean_top = 5 }
commit = { cap_mbps = 400, floor_pct = 20, from = "2026-11-01", until = "2026-11-07" }
prorate = "valid_days"
price = "108"
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    // Five samples a day at 100 Mbps, so that the fifth largest is 100; four larger ones do not count.
    let mut usage = samples(&book, "2026-11-01", 12, 5, 100);
    let first = start(&book, "2026-11-01");
    for (sample, row) in (6..10).zip(usage.rows.clone()) {
        let _ = row;
        usage.rows.push(sent("burst", first + sample * 300, 0));
    }
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "4320.00");
    // Without traffic, only the floor: 80 x 6/30 x 108, and nobody's.
    let idle = rated(&book, &Usage::default(), "2026-11");
    assert_eq!(cost(&idle).to_string(), "1728.00");
    assert!(
        idle.charges
            .iter()
            .all(|charge| charge.account.kind == Kind::Account)
    );
}

#[test]
fn the_samples_above_the_rank_are_free() {
    let sku = r#"
basis = "p95"
method = { day_rank = 5, month_mean_top = 5 }
prorate = "valid_days"
price = "108"
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    let mut usage = samples(&book, "2026-11-01", 12, 9, 100);
    let first = start(&book, "2026-11-01");
    for day in 0..12 {
        for sample in 0..4 {
            usage.rows.push(sent(
                "burst",
                first + day * 86_400 + sample * 300,
                900 * MBPS_SAMPLE,
            ));
        }
    }
    usage.totals = usage.sums();
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    // 100 x 12/30 x 108, all of it the route's that was in the fifth largest samples.
    assert_eq!(cost(&bill).to_string(), "4320.00");
    let burst: i128 = bill
        .charges
        .iter()
        .filter(|charge| charge.account.route == "burst")
        .map(|charge| charge.cost)
        .sum();
    assert_eq!(burst, 0);
}

/// Huawei, enhanced 95th: 300 x 120 x 16/30 = 19200.
#[test]
fn huawei_enhanced_95() {
    let sku = r#"
basis = "p95"
method = { drop_top_pct = 5 }
prorate = "valid_days"
price = "120"
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    let usage = samples(&book, "2026-11-15", 16, 288, 300);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "19200.00");
    let charge = bill.charges.iter().find(|charge| charge.cost != 0).unwrap();
    assert_eq!(charge.quantity(), "160.0");
    assert_eq!(charge.method, "edgemeter.p95.drop-top-5.share.v1");
}

/// Baidu CDN: 10,000 x 0.20 + 300 x 0.17 = 2051.
#[test]
fn baidu_cdn_traffic() {
    let sku = r#"
unit_bytes = 1000000000
tiers = [
  { to = 10000, price = "0.20" }, { to = 50000, price = "0.17" },
  { to = 100000, price = "0.14" }, { to = 1000000, price = "0.12" }, { price = "0.10" },
]
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    let first = start(&book, "2026-11-01");
    let usage = usage(vec![
        sent("a", first, 9_900 * GB),
        sent("b", first + 86_400, 400 * GB),
    ]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "2051.00");
}

/// Baidu, daily peak: 912 x 0.51 = 465.12: the whole volume at the tier it reaches.
#[test]
fn baidu_daily_peak() {
    let sku = r#"
basis = "peak_mbps_day"
tier_mode = "whole_volume"
tiers = [{ to = 500, price = "0.52" }, { price = "0.51" }]
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    let first = start(&book, "2026-11-05");
    let usage = usage(vec![
        sent("a", first, 912 * MBPS_SAMPLE),
        sent("a", first + 3_600, 600 * MBPS_SAMPLE),
    ]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "465.12");
}

/// JD: 0.48 a day + 10 GB x 0.80 = 8.48.
#[test]
fn jd_traffic_and_a_daily_fee() {
    let sku = r#"
unit_bytes = 1000000000
price = "0.80"
fixed_per_day = "0.48"
from = "2026-11-05"
until = "2026-11-06"
"#;
    let book = one_sku("CNY", "Asia/Shanghai", sku);
    let usage = usage(vec![sent("a", start(&book, "2026-11-05"), 10 * GB)]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "8.48");
}

/// AWS: 51,200 GB = $4394.20, the free 100 inside the first tier.
#[test]
fn aws_internet_out() {
    let sku = r#"
unit_bytes = 1073741824
free_units = 100
tiers = [
  { to = 10240, price = "0.09" }, { to = 51200, price = "0.085" },
  { to = 153600, price = "0.07" }, { price = "0.05" },
]
"#;
    let book = one_sku("USD", "UTC", sku);
    let first = start(&book, "2026-11-01");
    let rows = (0..30).map(|day| {
        let bytes = if day == 0 { 51_200 - 29 * 1_700 } else { 1_700 };
        sent("a", first + day * 86_400, bytes * GIB)
    });
    let usage = usage(rows.collect());
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "4394.20");
    let parts: Vec<(Part, String)> = bill
        .pools
        .iter()
        .map(|pool| (pool.part.clone(), pool.cost.to_string()))
        .collect();
    assert_eq!(
        parts,
        [
            (Part::Free, "0.00".into()),
            (Part::Tier(1), "912.60".into()),
            (Part::Tier(2), "3481.60".into()),
        ]
    );
}

/// The example row of the FOCUS reference: 90,000,000 bytes at 0.8 per GB.
#[test]
fn ninety_megabytes_at_eighty_cents() {
    let book = one_sku("CNY", "UTC", "unit_bytes = 1000000000\nprice = \"0.8\"\n");
    let usage = usage(vec![sent("api-v1", start(&book, "2026-11-23"), 90_000_000)]);
    let bill = rated(&book, &usage, "2026-11");
    let charge = &bill.charges[0];
    assert_eq!(charge.quantity(), "0.09");
    assert_eq!(charge.unit_price(), "0.8");
    assert_eq!(charge.list_cost().unwrap(), "0.072");
    assert_eq!(charge.cost().to_string(), "0.072");
}

/// An adder is another price on the same bytes, which are counted once.
#[test]
fn an_adder_prices_bytes_again_and_counts_them_once() {
    let sku = r#"
unit_bytes = 1000000000
price = "0.01"
adders = [{ id = "nat", price = "0.045" }]
"#;
    let book = one_sku("USD", "UTC", sku);
    let usage = usage(vec![sent("a", start(&book, "2026-11-05"), 100 * GB)]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "5.50");
}

/// A price in another currency is converted at the rate that was written down, once.
#[test]
fn a_foreign_price_is_converted_exactly() {
    let book = book(
        r#"
currency = "CNY"
[[fx]]
from = "USD"
to = "CNY"
rate = "7.123456789"
as_of = "2026-11-01"
[[skus]]
id = "out"
currency = "USD"
leg = "client"
direction = "tx"
unit_bytes = 1000000000
price = "0.09"
"#,
    );
    let usage = usage(vec![sent("a", start(&book, "2026-11-05"), 3 * GB)]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(bill.charges[0].unit_price(), "0.64111111101");
    assert_eq!(cost(&bill).to_string(), "1.923333333");
    assert_eq!(bill.charges[0].list_cost().unwrap(), "1.92333333303");
}

/// `max_in_out` over bytes: the larger direction pays, the smaller is on the bill at nothing.
#[test]
fn the_larger_direction_pays() {
    let head = head("USD", "UTC");
    let book = book(&format!(
        "{head}[[skus]]\nid = \"it\"\nleg = \"client\"\ndirection = \"max_in_out\"\n\
         unit_bytes = 1000000000\nprice = \"1\"\n"
    ));
    let at = start(&book, "2026-11-05");
    let mut received = sent("a", at, 7 * GB);
    received.account.way = Way::Rx;
    let usage = usage(vec![sent("a", at, 5 * GB), received]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "7.00");
    assert!(
        bill.charges
            .iter()
            .any(|charge| charge.part == Part::Measured && charge.wire_bytes == i128::from(5 * GB))
    );
}
