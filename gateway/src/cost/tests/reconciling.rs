//! Made-up provider bills, each wrong in one way, and the way is found.

use super::*;
use crate::cost::{
    compare,
    reconcile::{BillLine, Cause, Finding, read, reconcile, table},
};

const GIB: i64 = 1 << 30;

const OURS: &str = r#"currency = "USD"
timezone = "Asia/Shanghai"
[[skus]]
id = "out"
bill_names = ["DataTransfer-Out"]
leg = "client"
direction = "tx"
unit_bytes = 1073741824
free_units = 100
fixed_per_day = "0.20"
adders = [{ id = "nat", price = "0.045" }]
tiers = [{ to = 1000, price = "0.09" }, { price = "0.08" }]
[[skus]]
id = "zone"
leg = "client"
direction = "tx"
class = "zone"
unit_bytes = 1073741824
price = "0.01"
"#;

fn ours() -> Book {
    book(OURS)
}

/// Sent and received, two classes, overhead, foreign bytes, and an evening that is already the
/// next month in Shanghai.
fn moved(book: &Book) -> Usage {
    let first = start(book, "2026-11-03");
    let mut rows = vec![
        sent("a", first, 900 * GIB),
        sent("b", first + 86_400, 400 * GIB),
    ];
    let mut received = sent("a", first, 250 * GIB);
    received.account.way = Way::Rx;
    rows.push(received);
    let mut zone = sent("a", first, 333 * GIB);
    zone.account.class = "zone".into();
    rows.push(zone);
    let mut overhead = sent("", first, 21 * GIB);
    overhead.account.kind = Kind::Overhead;
    rows.push(overhead);
    let mut foreign = sent("", first, 77 * GIB);
    foreign.account.kind = Kind::Foreign;
    foreign.account.side = Side::None;
    rows.push(foreign);
    rows.push(sent("a", start(book, "2026-12-01") + 3_600, 111 * GIB));
    usage(rows)
}

/// The provider's bill for `out` as it would be under a changed book and usage.
fn theirs(book: &Book, usage: &Usage) -> BillLine {
    let bill = rated(book, usage, "2026-11");
    let pools = bill.pools.iter().filter(|pool| pool.sku == "out");
    let mut line = BillLine {
        sku: "DataTransfer-Out".into(),
        quantity: Some(0),
        cost: Nanos(0),
    };
    for pool in pools {
        line.cost.0 += pool.cost.0;
        if matches!(pool.part, Part::Free | Part::Tier(_)) {
            *line.quantity.as_mut().unwrap() += pool.quantity * 1_000_000_000 / pool.divisor;
        }
    }
    line
}

fn found(line: &BillLine) -> Cause {
    let book = ours();
    let zone = BillLine {
        sku: "zone".into(),
        quantity: None,
        cost: Nanos(3_330_000_000),
    };
    let month = month("2026-11");
    let lines = [line.clone(), zone];
    let findings = reconcile(&book, &moved(&book), month, &lines, 10).unwrap();
    assert_eq!(findings.len(), 2);
    assert_eq!(findings[1].cause, Cause::Agree);
    findings[0].cause.clone()
}

/// The provider's book: ours with one text replaced.
fn with(from: &str, to: &str) -> Cause {
    assert!(OURS.contains(from), "{from}");
    let provider = book(&OURS.replacen(from, to, 1));
    found(&theirs(&provider, &moved(&ours())))
}

#[test]
fn the_same_bill_agrees() {
    assert_eq!(with("free_units = 100", "free_units = 100"), Cause::Agree);
}

#[test]
fn another_unit_size() {
    let cause = with(
        "unit_bytes = 1073741824\nfree",
        "unit_bytes = 1000000000\nfree",
    );
    assert_eq!(cause, Cause::UnitSize(1_000_000_000));
}

#[test]
fn the_other_direction_or_both() {
    for (word, cause) in [
        ("rx", Cause::Direction("rx")),
        ("both", Cause::Direction("both")),
    ] {
        // With the class apart, as ours has it: the received bytes have no class SKU.
        let found = with(
            "direction = \"tx\"\nunit",
            &format!("direction = \"{word}\"\nunit"),
        );
        assert_eq!(found, cause, "{word}");
    }
}

#[test]
fn no_free_tier() {
    assert_eq!(with("free_units = 100\n", ""), Cause::FreeUnits);
}

#[test]
fn tiers_by_whole_volume() {
    assert_eq!(
        with(
            "free_units = 100",
            "free_units = 100\ntier_mode = \"whole_volume\""
        ),
        Cause::TierMode
    );
}

#[test]
fn another_time_zone() {
    assert_eq!(with("Asia/Shanghai", "UTC"), Cause::Timezone("UTC"));
}

#[test]
fn surcharges_and_fees_that_are_not_there() {
    let adder = with("adders = [{ id = \"nat\", price = \"0.045\" }]\n", "");
    assert_eq!(adder, Cause::Adder("nat".into()));
    assert_eq!(with("fixed_per_day = \"0.20\"\n", ""), Cause::Fixed);
}

#[test]
fn bytes_of_a_class_we_price_apart() {
    let book = ours();
    let mut usage = moved(&book);
    for row in &mut usage.rows {
        if row.account.class == "zone" {
            row.account.class = String::new();
        }
    }
    assert_eq!(
        found(&theirs(&book, &usage)),
        Cause::MissingClass("zone".into())
    );
}

#[test]
fn bytes_that_are_not_the_gateways() {
    let book = ours();
    let mut usage = moved(&book);
    for row in &mut usage.rows {
        if row.account.side == Side::None {
            row.account.side = Side::Client;
        }
    }
    assert_eq!(found(&theirs(&book, &usage)), Cause::Unattributed);
}

#[test]
fn overhead_that_is_not_there() {
    let book = ours();
    let mut usage = moved(&book);
    usage.rows.retain(|row| row.account.kind != Kind::Overhead);
    assert_eq!(found(&theirs(&book, &usage)), Cause::Overhead);
}

#[test]
fn a_price_that_is_not_ours_and_figures_without_a_reason() {
    let book = ours();
    let mut line = theirs(&book, &moved(&book));
    line.cost.0 += 7_000_000_000;
    assert_eq!(found(&line), Cause::Price);
    line.quantity = Some(1);
    assert_eq!(found(&line), Cause::Unexplained);
}

#[test]
fn lines_on_one_side_only() {
    let book = ours();
    let lines = [BillLine {
        sku: "StorageOps".into(),
        quantity: None,
        cost: Nanos(1),
    }];
    let findings = reconcile(&book, &moved(&book), month("2026-11"), &lines, 10).unwrap();
    let causes: Vec<&Cause> = findings.iter().map(|finding| &finding.cause).collect();
    assert_eq!(
        causes,
        [&Cause::NotInBook, &Cause::NotOnBill, &Cause::NotOnBill]
    );
    let text = table(&findings, "USD");
    assert!(text.contains("not in the price book"), "{text}");
}

#[test]
fn bills_of_several_shapes_are_read() {
    for text in [
        "sku,quantity,cost\nout,1.5,0.25\nout,0.5,0.75\n",
        "SkuId,PricingQuantity,BilledCost\nout,1.50000000000001,0.25\nout,0.5,0.75\n",
        "lineItem/UsageType,lineItem/UsageAmount,lineItem/UnblendedCost\nout,2,1.0\n",
    ] {
        let lines = read(text.as_bytes()).unwrap();
        let expected = BillLine {
            sku: "out".into(),
            quantity: Some(2_000_000_000),
            cost: Nanos(1_000_000_000),
        };
        assert_eq!(lines, [expected], "{text}");
    }
    let error = read(b"sku,quantity,cost\nout,1,1e3\n")
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "line 2: \"1e3\" is not a decimal number; fix: write such as 12.50"
    );
    let error = read(b"name,cost\n").unwrap_err().to_string();
    assert!(error.contains("no column for the SKU"), "{error}");
}

#[test]
fn findings_carry_the_difference() {
    let findings = [Finding {
        sku: "out".into(),
        ours: Some((2_000_000_000, Nanos(3_000_000_000))),
        theirs: Some(BillLine {
            sku: "out".into(),
            quantity: None,
            cost: Nanos(2_500_000_000),
        }),
        cause: Cause::FreeUnits,
    }];
    let text = table(&findings, "USD");
    assert!(text.contains("0.50  free tier: "), "{text}");
}

#[test]
fn the_calculator_multiplies_what_it_prints() {
    let given = |value: u64| compare::Input::or(Some(value), 0, "");
    let price = |text: &str| {
        compare::Input::or(
            Some(text.parse().unwrap()),
            crate::money::UnitPrice::ZERO,
            "",
        )
    };
    let inputs = compare::Inputs {
        calls_per_second: given(1_000),
        pods: given(10),
        sidecar_cpu_us: given(400),
        gateway_cpu_us: given(100),
        sidecar_memory_mib: given(512),
        gateway_memory_mib: given(256),
        sidecar_wire_bytes: given(200),
        gateway_wire_bytes: given(0),
        core_hour: price("0.04"),
        gib_hour: price("0.005"),
        gb_price: price("0.01"),
        currency: "USD".into(),
    };
    let (sidecars, gateway) = inputs.months().unwrap();
    // 0.4 cores x 730 h x 0.04; 5 GiB x 730 h x 0.005; 200 kB/s x 2,628,000 s x 0.01 per GB.
    assert_eq!(sidecars.cpu.to_string(), "11.68");
    assert_eq!(sidecars.memory.to_string(), "18.25");
    assert_eq!(sidecars.wire.to_string(), "5.256");
    assert_eq!(sidecars.total.to_string(), "35.186");
    assert_eq!(gateway.total.to_string(), "3.8325");
    let table = inputs.table().unwrap();
    for text in ["--core-hour", "given", "as right as its inputs"] {
        assert!(table.contains(text), "{table}");
    }
}
