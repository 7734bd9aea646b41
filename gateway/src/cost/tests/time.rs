//! Edges of months, days and price changes, clock changes, gaps and late claims.

use super::*;

const GB: i64 = 1_000_000_000;

fn plain(zone: &str) -> Book {
    book(&format!(
        "currency = \"USD\"\ntimezone = \"{zone}\"\n[[skus]]\nid = \"out\"\nleg = \"client\"\n\
         direction = \"tx\"\nunit_bytes = 1000000000\nprice = \"1\"\n"
    ))
}

fn bytes(bill: &Bill) -> i128 {
    bill.charges.iter().map(|charge| charge.wire_bytes).sum()
}

#[test]
fn a_row_across_the_end_of_a_month_is_cut_there_and_nothing_is_lost() {
    let book = plain("Asia/Shanghai");
    let end = start(&book, "2026-12-01");
    let mut row = sent("a", end - 20 * 60, 0);
    row.period.end = end + 40 * 60;
    row.wire_bytes = 10 * GB + 1;
    let usage = usage(vec![row]);
    let november = rated(&book, &usage, "2026-11");
    let december = rated(&book, &usage, "2026-12");
    // A third of the time, a third of the bytes, and what cannot be divided goes to one side.
    assert_eq!(bytes(&november), 3_333_333_334);
    assert_eq!(bytes(&november) + bytes(&december), i128::from(10 * GB + 1));
    assert!(november.charges.iter().all(|charge| charge.estimated));
    // In another zone the same hour lies in one month, and nothing is estimated.
    let utc = rated(&plain("UTC"), &usage, "2026-11");
    assert_eq!(bytes(&utc), i128::from(10 * GB + 1));
    assert!(utc.charges.iter().all(|charge| !charge.estimated));
}

#[test]
fn a_price_change_cuts_the_month_and_the_tiers_go_on() {
    let tiers = |one: &str, two: &str| {
        format!("tiers = [{{ to = 10, price = \"{one}\" }}, {{ price = \"{two}\" }}]\n")
    };
    let head = "[[skus]]\nid = \"out\"\nleg = \"client\"\ndirection = \"tx\"\n\
                unit_bytes = 1000000000\n";
    let book = book(&format!(
        "currency = \"USD\"\ntimezone = \"America/New_York\"\n\
         {head}until = \"2026-11-11\"\n{}{head}from = \"2026-11-11\"\n{}",
        tiers("1", "0.5"),
        tiers("2", "0.25"),
    ));
    let change = start(&book, "2026-11-11");
    let usage = usage(vec![
        sent("a", change - 60, 8 * GB),
        sent("a", change, 4 * GB),
    ]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    // 8 at 1, then 2 more of the first tier at 2, then 2 of the second at 0.25.
    assert_eq!(cost(&bill).to_string(), "12.50");
}

#[test]
fn a_row_across_a_price_change_is_cut_at_midnight() {
    let head = "[[skus]]\nid = \"out\"\nleg = \"client\"\ndirection = \"tx\"\n\
                unit_bytes = 1000000000\n";
    let book = book(&format!(
        "currency = \"USD\"\n{head}until = \"2026-11-11\"\nprice = \"1\"\n\
         {head}from = \"2026-11-11\"\nprice = \"3\"\n"
    ));
    let change = start(&book, "2026-11-11");
    let mut row = sent("a", change - 30, 2 * GB);
    row.period.end = change + 30;
    let usage = usage(vec![row]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    assert_eq!(cost(&bill).to_string(), "4.00");
    assert!(bill.charges.iter().all(|charge| charge.estimated));
}

#[test]
fn days_with_23_and_25_hours_keep_every_sample() {
    for (date, samples) in [("2026-03-29", 276_i64), ("2026-10-25", 300)] {
        let book = book(
            "currency = \"EUR\"\ntimezone = \"Europe/Berlin\"\n[[skus]]\nid = \"peak\"\n\
             leg = \"client\"\ndirection = \"tx\"\nbasis = \"peak_mbps_day\"\nprice = \"1\"\n",
        );
        let first = start(&book, date);
        // Every minute of the day one Mbps, the last sample of the day two.
        let minutes = (0..samples * 5).map(|minute| {
            let twice = minute >= (samples - 1) * 5;
            sent(
                "a",
                first + minute * 60,
                7_500_000 * if twice { 2 } else { 1 },
            )
        });
        let usage = usage(minutes.collect());
        let bill = rated(&book, &usage, &date[..7]);
        check(&bill, &usage);
        assert_eq!(cost(&bill).to_string(), "2.00", "{date}");
        let days: std::collections::BTreeSet<Period> =
            bill.charges.iter().map(|charge| charge.period).collect();
        assert_eq!(days.len(), 1);
        assert_eq!(days.first().unwrap().seconds(), samples * 300);
    }
}

#[test]
fn a_step_of_the_clock_back_adds_to_the_same_minutes() {
    let book = plain("UTC");
    let at = start(&book, "2026-11-05");
    let twice = usage(vec![sent("a", at, GB), sent("a", at, GB)]);
    let once = usage(vec![sent("a", at, 2 * GB)]);
    assert_eq!(
        rated(&book, &twice, "2026-11"),
        rated(&book, &once, "2026-11")
    );
}

#[test]
fn a_missed_reading_marks_what_it_may_have_changed() {
    let book = book(
        "currency = \"USD\"\n[[skus]]\nid = \"peak\"\nleg = \"client\"\ndirection = \"tx\"\n\
         basis = \"peak_mbps_day\"\nprice = \"1\"\n",
    );
    let (fifth, sixth) = (start(&book, "2026-11-05"), start(&book, "2026-11-06"));
    let mut usage = usage(vec![
        sent("a", fifth, 37_500_000),
        sent("a", sixth, 37_500_000),
    ]);
    usage.gaps.push(Gap {
        interface: "eth0".into(),
        period: Period {
            start: fifth + 3_600,
            end: fifth + 3_660,
        },
    });
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    for charge in bill.charges.iter().filter(|charge| charge.cost != 0) {
        assert_eq!(charge.estimated, charge.period.start == fifth);
    }
    // Another interface's gap is nobody's business here.
    usage.gaps[0].interface = "eth1".into();
    let bill = rated(&book, &usage, "2026-11");
    assert!(bill.charges.iter().all(|charge| !charge.estimated));
}

#[test]
fn a_claim_after_midnight_leaves_the_days_sums_alone() {
    let book = plain("UTC");
    let midnight = start(&book, "2026-11-06");
    let unclaimed = |at, wire_bytes| {
        let mut row = sent("", at, wire_bytes);
        row.account.kind = Kind::Unclaimed;
        row.account.way = Way::Rx;
        row
    };
    let mut claimed = sent("upload", midnight, 5_700);
    claimed.account.way = Way::Rx;
    let usage = usage(vec![
        unclaimed(midnight - 60, 700),
        unclaimed(midnight, -700),
        claimed,
    ]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    let of = |start: i64| -> i128 {
        let day = bill
            .charges
            .iter()
            .filter(|charge| charge.period.start == start);
        day.map(|charge| charge.wire_bytes).sum()
    };
    assert_eq!((of(midnight - 86_400), of(midnight)), (700, 5_000));
    let upload = bill
        .charges
        .iter()
        .find(|charge| charge.account.route == "upload");
    assert!(upload.unwrap().estimated);
}

#[test]
fn an_interface_that_moved_less_than_nothing_is_refused() {
    let book = plain("UTC");
    let usage = usage(vec![sent("a", start(&book, "2026-11-06"), -1)]);
    let month = month("2026-11");
    let error = rate_month(&book, &usage, month, i64::MAX).unwrap_err();
    assert!(
        error.to_string().contains("the ledger is damaged"),
        "{error}"
    );
}

#[test]
fn fees_accrue_only_as_far_as_usage_is_known() {
    let book = book(
        "currency = \"USD\"\n[[skus]]\nid = \"out\"\nleg = \"client\"\ndirection = \"tx\"\n\
         unit_bytes = 1000000000\nprice = \"1\"\nfixed_per_day = \"0.48\"\n",
    );
    let until = start(&book, "2026-11-11");
    let bill = rate_month(&book, &Usage::default(), month("2026-11"), until).unwrap();
    assert_eq!(cost(&bill).to_string(), "4.80");
    assert_eq!(
        cost(&rated(&book, &Usage::default(), "2026-11")).to_string(),
        "14.40"
    );
}

#[test]
fn bytes_of_no_connection_are_rows_without_a_price() {
    let book = plain("UTC");
    let at = start(&book, "2026-11-06");
    let mut foreign = sent("", at, 500);
    foreign.account.side = Side::None;
    foreign.account.kind = Kind::Foreign;
    let mut cell = foreign.clone();
    cell.account.kind = Kind::Cell("non_ip".into());
    cell.account.way = Way::Rx;
    let usage = usage(vec![foreign, cell, sent("a", at, GB)]);
    let bill = rated(&book, &usage, "2026-11");
    check(&bill, &usage);
    let unpriced: Vec<&str> = bill
        .charges
        .iter()
        .filter(|charge| charge.part == Part::Unpriced)
        .map(|charge| charge.account.way.word())
        .collect();
    assert_eq!(unpriced, ["rx", "tx"]);
}

#[test]
fn a_book_that_would_bill_a_byte_twice_is_refused() {
    let sku = |id: &str, leg: &str, more: &str| {
        format!(
            "[[skus]]\nid = \"{id}\"\nleg = \"{leg}\"\ndirection = \"tx\"\n\
             unit_bytes = 1000000000\nprice = \"1\"\n{more}"
        )
    };
    let parse = |skus: &[String]| {
        let text = format!("currency = \"USD\"\n{}", skus.concat());
        Book::parse(&text, Path::new("p.toml")).map_err(|error| error.to_string())
    };
    let twice = parse(&[sku("a", "client", ""), sku("b", "client", "")]).unwrap_err();
    assert!(
        twice.starts_with(
            "p.toml:8:1: skus[1]: overlaps skus[0] (`a`): the same bytes of the \
                           client leg would be billed twice; fix: "
        ),
        "{twice}"
    );
    // Apart by leg, class, time or interface they are two prices.
    for (leg, more) in [
        ("upstream", ""),
        ("client", "class = \"internet\"\n"),
        ("client", "interfaces = [\"eth1\"]\n"),
    ] {
        parse(&[sku("a", "client", ""), sku("b", leg, more)]).unwrap();
    }
    parse(&[
        sku("a", "client", "until = \"2026-11-11\"\n"),
        sku("a", "client", "from = \"2026-11-11\"\n"),
    ])
    .unwrap();
}
