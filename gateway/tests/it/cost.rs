//! `edgemeter cost` as users run it, on a ledger made for it: FOCUS rows before an outside
//! validator, Parquet before two outside readers, closed months, a provider's bill. Only the test
//! over real traffic needs root.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
};

use edgemeter::{
    attribution::{Amount, CellKey, PostingKey, Postings, Watermarks},
    config::Direction,
    cost::calendar::{Date, Zone},
    ledger::{Ledger, Tick},
    owner::{Leg, Owner, OwnerId, OwnerKind, Owners, Quality},
};
use flow_abi::cell;
use xtask::{
    host,
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
    python,
};

use crate::harness::{Setup, Site};

const FOCUS: &[&str] = &[
    "focus-data-toolkit==0.14.1",
    "pyarrow==26.0.1",
    "duckdb==2.0.1",
];

/// A configuration, its price book and its ledger.
struct Shop {
    directory: tempfile::TempDir,
    ledger: Ledger,
    owners: Owners,
    minutes: i64,
}

impl Shop {
    fn new(book: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = "[gateway]\nstate_dir = \"state\"\n\
            [[listeners]]\nname = \"public\"\naddress = \"127.0.0.1:8080\"\n\
            [[upstreams]]\nname = \"orders\"\npeers = [\"127.0.0.1:9000\", \"127.0.0.1:9001\", \
            \"127.0.0.1:9002\", \"127.0.0.1:9003\"]\n\
            [[routes]]\nname = \"orders\"\nupstream = \"orders\"\n\
            [admin]\nlisten = \"127.0.0.1:1\"\n\
            [prices]\nbook = \"prices.toml\"\n";
        std::fs::write(directory.path().join("edgemeter.toml"), config).unwrap();
        std::fs::write(directory.path().join("prices.toml"), book).unwrap();
        let ledger = Ledger::open(&directory.path().join("state")).unwrap();
        let owners = Owners::new(ledger.owners().unwrap(), Box::new(ledger.clone()));
        Self {
            directory,
            ledger,
            owners,
            minutes: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn owner(&self, kind: OwnerKind, leg: Leg, route: &str, tenant: &str) -> OwnerId {
        let mut owner = Owner::connection(
            kind,
            leg,
            if leg == Leg::Client {
                "public"
            } else {
                "orders"
            },
        );
        if kind == OwnerKind::Route {
            (owner.route, owner.tenant) = (route.into(), tenant.into());
            owner.service = "commerce".into();
            if route == "page" {
                owner.quality = Quality::Estimated;
            }
        }
        self.owners.intern(&owner).unwrap()
    }

    /// One minute's postings: sent bytes by owner, and `other` bytes that are not IP.
    fn post(&mut self, at: i64, sent: &[(OwnerId, i64)], other: i64) {
        let mut postings = Postings::default();
        let mut total = other;
        for (owner, bytes) in sent {
            let key = PostingKey {
                class: edgemeter::class::ClassId::DEFAULT,
                owner: *owner,
                ifindex: 2,
                direction: Direction::Tx,
            };
            let amount = Amount {
                wire_bytes: *bytes,
                ..Amount::default()
            };
            postings.amounts.insert(key, amount);
            total += bytes;
        }
        for (number, bytes) in [(cell::TOTAL, total), (cell::NON_IP, other)] {
            let key = CellKey {
                ifindex: 2,
                direction: Direction::Tx,
                cell: number,
            };
            postings.cells.insert(key, (bytes, 1));
        }
        self.minutes += 1;
        let tick = Tick {
            unix_seconds: at,
            epoch: "test:1",
            number: self.minutes - 1,
            before: &Watermarks::default(),
            postings: &postings,
            watermarks: &Watermarks::default(),
            interfaces: &HashMap::from([(2, "eth0".to_owned())]),
        };
        self.ledger.append(&tick).unwrap();
    }

    /// Three days of two routes, overhead and strangers, in a month that is over.
    fn month(&mut self, zone: &str) {
        let client =
            |shop: &Self, route, tenant| shop.owner(OwnerKind::Route, Leg::Client, route, tenant);
        let (orders, page) = (client(self, "orders", "acme"), client(self, "page", ""));
        let other = client(self, "orders", "globex");
        let upstream = self.owner(OwnerKind::Route, Leg::Upstream, "orders", "acme");
        let overhead = self.owner(OwnerKind::Overhead, Leg::Client, "", "");
        let zone = Zone::new(zone).unwrap();
        for day in 3..6 {
            let date = Date::from_ymd_opt(2026, 3, day).unwrap();
            let midnight = zone.midnight(date);
            for minute in 0..20 {
                let bytes = 7_777_777_777 + 1_003 * minute;
                self.post(
                    midnight + minute * 60,
                    &[
                        (orders, bytes),
                        (other, bytes / 3),
                        (page, bytes / 7),
                        (upstream, bytes / 2),
                        (overhead, 60_000 + minute),
                        (OwnerId::FOREIGN, 999),
                    ],
                    60,
                );
            }
        }
    }

    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgemeter"));
        command.arg("cost").args(arguments);
        if arguments[0] != "compare" {
            command.arg("--config").arg(self.path("edgemeter.toml"));
        }
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    fn report(&self, more: &[&str]) -> String {
        let mut arguments = vec!["report", "--from", "2026-03-01", "--to", "2026-04-01"];
        arguments.extend(more);
        self.run(&arguments).unwrap()
    }

    /// The report in FOCUS rows, by column name.
    fn focus(&self) -> Vec<BTreeMap<String, String>> {
        rows(&self.report(&["--format", "focus"]))
    }
}

fn rows(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut lines = text.lines().map(fields);
    let header = lines.next().unwrap();
    lines
        .map(|row| {
            assert_eq!(row.len(), header.len());
            header.iter().cloned().zip(row).collect()
        })
        .collect()
}

/// CSV without line breaks in fields, which ours has none of.
fn fields(line: &str) -> Vec<String> {
    let (mut all, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => all.push(std::mem::take(&mut field)),
            other => field.push(other),
        }
    }
    all.push(field);
    all
}

/// Every kind of price at once, with the currency, region and tags of a real account.
const BOOK: &str = r#"
currency = "CNY"
timezone = "Asia/Shanghai"
[account]
id = "4711"
name = "shop"
provider = "edge-gw"
region = "cn-hangzhou"
region_name = "Hangzhou"
availability_zone = "cn-hangzhou-h"
[[skus]]
id = "internet-out"
source = "example"
leg = "client"
direction = "tx"
unit_bytes = 1073741824
free_units = 10
tiers = [{ to = 300, price = "0.80" }, { price = "0.72" }]
adders = [{ id = "nat", price = "0.05" }]
fixed_per_day = "0.48"
[[skus]]
id = "line-95"
source = "example"
leg = "upstream"
direction = "max_in_out"
basis = "p95"
method = { day_rank = 2, month_mean_top = 2 }
commit = { cap_mbps = 100, floor_pct = 20 }
prorate = "valid_days"
price = "108"
[[compute]]
id = "core"
source = "example"
core_hour = "0.2"
gib_hour = "0.03"
"#;

#[test]
fn focus_rows_pass_an_outside_validator() {
    let mut shop = Shop::new(BOOK);
    shop.month("Asia/Shanghai");
    let file = shop.path("out.csv");
    shop.report(&["--format", "focus", "--output", file.to_str().unwrap()]);
    let environment = python::venv("focus", FOCUS).unwrap();
    let validate = |file: &Path, conditions: &[&str]| {
        let mut command = Command::new(environment.join("bin/focus-toolkit"));
        command.args(["validate", "--dataset", "cost-and-usage"]);
        for condition in conditions {
            command.args(["--supports", condition]);
        }
        let output = command.arg(file).output().unwrap();
        // The validator says what is wrong on standard output.
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok(())
        } else {
            Err(said)
        }
    };
    // With and without the conditions under which more columns are required.
    validate(&file, &[]).unwrap();
    let conditions = ["SupportsUnitPricing", "SupportsMultiplePricingCategories"];
    validate(&file, &conditions).unwrap();

    // The validator can fail: one broken value of ours is refused.
    let text = std::fs::read_to_string(&file).unwrap();
    let broken = shop.path("broken.csv");
    std::fs::write(&broken, text.replace(",CNY,", ",YUAN,")).unwrap();
    assert!(validate(&broken, &[]).is_err());

    // A month's closed files pass too, and so do its corrections.
    let closed = shop.run(&["close", "--month", "2026-03"]).unwrap();
    assert!(closed.starts_with("closed 2026-03: "), "{closed}");
    let folder = shop.path("state/bills/2026-03");
    validate(&folder.join("focus.csv"), &conditions).unwrap();
    let late = shop.owner(OwnerKind::Route, Leg::Client, "late", "acme");
    let at = Zone::new("Asia/Shanghai")
        .unwrap()
        .midnight(Date::from_ymd_opt(2026, 3, 9).unwrap());
    let before = std::fs::read(folder.join("focus.csv")).unwrap();
    shop.post(at, &[(late, 5_000_000_001)], 0);
    let corrected = shop.run(&["close", "--month", "2026-03"]).unwrap();
    assert!(corrected.contains("correction rows of"), "{corrected}");
    validate(&folder.join("correction-001/focus.csv"), &conditions).unwrap();
    assert_eq!(std::fs::read(folder.join("focus.csv")).unwrap(), before);
    let again = shop.run(&["close", "--month", "2026-03"]).unwrap();
    assert!(again.contains("nothing has changed since"), "{again}");
}

/// What the outside validator does not look at.
#[test]
fn focus_rows_hold_what_the_validator_does_not_look_at() {
    let mut shop = Shop::new(BOOK);
    shop.month("Asia/Shanghai");
    let rows = shop.focus();
    assert!(rows.len() > 20);
    let kinds: Vec<&str> = rows.iter().map(|row| row["x_Kind"].as_str()).collect();
    for kind in ["route", "overhead", "foreign", "cell:non_ip"] {
        assert!(kinds.contains(&kind), "{kind} has no row");
    }
    for row in &rows {
        // Periods are in order, and each charge lies in its billing period.
        let time = |name: &str| row[name].clone();
        assert!(time("BillingPeriodStart") < time("BillingPeriodEnd"));
        assert!(time("ChargePeriodStart") < time("ChargePeriodEnd"));
        assert!(time("BillingPeriodStart") <= time("ChargePeriodStart"));
        assert!(time("ChargePeriodEnd") <= time("BillingPeriodEnd"));
        // Midnight in Shanghai.
        assert_eq!(time("BillingPeriodStart"), "2026-02-28T16:00:00Z");
        assert!(time("ChargePeriodStart").ends_with("T16:00:00Z"));
        // A region has a name, quantities have units, and the units are ours.
        assert_eq!(
            (row["RegionId"].as_str(), row["RegionName"].as_str()),
            ("cn-hangzhou", "Hangzhou")
        );
        for (quantity, unit) in [
            ("PricingQuantity", "PricingUnit"),
            ("ConsumedQuantity", "ConsumedUnit"),
        ] {
            assert_eq!(row[quantity].is_empty(), row[unit].is_empty());
            let known = ["", "B", "GiB", "Days", "Mbps-Months"];
            assert!(known.contains(&row[unit].as_str()), "{}", row[unit]);
            assert!(row[quantity].is_empty() || row[quantity].contains('.'));
        }
        assert_eq!(row["x_PriceBookHash"].len(), 64);
        assert_eq!(row["x_UsageHash"].len(), 64);
        let estimated = row["Tags"].contains("\"page\"");
        assert!(!estimated || row["x_Quality"] == "estimated");
        assert_eq!(row["ListCost"], row["ContractedCost"]);
        assert_eq!(row["BilledCost"], row["EffectiveCost"]);
    }
    let ids: std::collections::BTreeSet<&str> =
        rows.iter().map(|row| row["x_EventId"].as_str()).collect();
    assert_eq!(ids.len(), rows.len(), "two rows have one id");
    // A percentile is shared, and says how.
    let shared: Vec<_> = rows
        .iter()
        .filter(|row| row["SkuId"] == "line-95")
        .collect();
    assert!(shared.iter().any(|row| {
        row["AllocatedMethodId"] == "edgemeter.p95.day-rank-2.mean-top-2.share.v1"
            && row["AllocatedResourceId"] == "orders"
            && row["ResourceId"] == "eth0"
    }));
    // Every byte once: the rows are what the interface moved.
    let bytes: i128 = rows
        .iter()
        .map(|row| row["x_WireBytes"].parse::<i128>().unwrap())
        .sum();
    let balance = shop.ledger.balances().unwrap().by_interface()["eth0"];
    assert_eq!(bytes, i128::from(balance.total));
    // The same ledger and book write the same bytes.
    assert_eq!(
        shop.report(&["--format", "focus"]),
        shop.report(&["--format", "focus"])
    );
}

#[test]
fn parquet_reads_back_as_the_same_rows() {
    let mut shop = Shop::new(BOOK);
    shop.month("Asia/Shanghai");
    let (csv, parquet) = (shop.path("out.csv"), shop.path("out.parquet"));
    shop.report(&["--format", "focus", "--output", csv.to_str().unwrap()]);
    shop.report(&["--format", "parquet", "--output", parquet.to_str().unwrap()]);
    let script = r#"
import csv, sys, decimal, datetime, json
import pyarrow, pyarrow.parquet, duckdb
decimal.getcontext().prec = 100
rows = list(csv.DictReader(open(sys.argv[1])))
table = pyarrow.parquet.read_table(sys.argv[2])
assert table.column_names == list(rows[0]), "columns"
assert table.num_rows == len(rows), "rows"
for name in table.column_names:
    for have, row in zip(table[name].to_pylist(), rows):
        want = row[name] or None
        if isinstance(have, decimal.Decimal):
            want = decimal.Decimal(want)
        elif isinstance(have, datetime.datetime):
            have = have.strftime("%Y-%m-%dT%H:%M:%SZ")
        assert have == want, (name, have, want)
types = {name: str(table.schema.field(name).type) for name in table.column_names}
assert types["BilledCost"].startswith("decimal128(38, "), types["BilledCost"]
assert types["ChargePeriodStart"] == "timestamp[ms, tz=UTC]", types["ChargePeriodStart"]
cost = sum(decimal.Decimal(row["BilledCost"]) for row in rows)
found = duckdb.sql(f"select sum(BilledCost), count(*) from '{sys.argv[2]}'").fetchall()[0]
assert (decimal.Decimal(found[0]), found[1]) == (cost, len(rows)), (found, cost)
print(len(rows), cost)
"#;
    let environment = python::venv("focus", FOCUS).unwrap();
    let mut python = Command::new(environment.join("bin/python"));
    let said = host::output(python.args(["-c", script]).arg(csv).arg(parquet)).unwrap();
    assert!(said.split_whitespace().count() == 2, "{said}");
}

#[test]
fn reports_group_and_conserve() {
    let mut shop = Shop::new(BOOK);
    shop.month("Asia/Shanghai");
    let table = shop.report(&["--by", "route,tenant,class,day"]);
    for text in [
        "2026-03-03",
        "(overhead public)",
        "(foreign)",
        "(cell:non_ip)",
        "page ~",
    ] {
        assert!(table.contains(text), "{text}\n{table}");
    }
    assert!(table.contains("; difference 0 B\n"), "{table}");

    let csv = rows(&shop.report(&["--by", "service,tenant", "--format", "csv"]));
    let json: serde_json::Value =
        serde_json::from_str(&shop.report(&["--by", "service,tenant", "--format", "json"]))
            .unwrap();
    let nanos = |text: &str| text.parse::<edgemeter::money::Nanos>().unwrap().0;
    let total: i128 = csv.iter().map(|row| nanos(&row["cost"])).sum();
    assert_eq!(total, nanos(json["total"]["cost"].as_str().unwrap()));
    assert_eq!(
        json["total"]["interface_bytes"].as_str().unwrap(),
        shop.ledger.balances().unwrap().by_interface()["eth0"]
            .total
            .to_string()
    );
    // However it is grouped, it is the same money.
    for by in [
        "day",
        "sku,part",
        "leg,direction,interface",
        "kind,quality,endpoint",
    ] {
        let csv = rows(&shop.report(&["--by", by, "--format", "csv"]));
        assert_eq!(
            csv.iter().map(|row| nanos(&row["cost"])).sum::<i128>(),
            total,
            "{by}"
        );
    }
    // Days of the book's zone: the fourth alone.
    let day = shop
        .run(&[
            "report",
            "--from",
            "2026-03-04",
            "--to",
            "2026-03-05",
            "--by",
            "day",
            "--format",
            "csv",
        ])
        .unwrap();
    assert_eq!(day.lines().count(), 2, "{day}");
    let error = shop
        .run(&["report", "--from", "2026-03-04", "--to", "2026-03-04"])
        .unwrap_err();
    assert!(error.contains("is not after --from"), "{error}");
}

#[test]
fn a_providers_bill_is_compared_and_idle_things_are_priced() {
    let mut shop = Shop::new(BOOK);
    shop.month("Asia/Shanghai");
    let bill = shop.path("bill.csv");
    std::fs::write(
        &bill,
        "sku,quantity,cost\nStorage,1,3.50\nline-95,,2000.00\n",
    )
    .unwrap();
    let text = shop
        .run(&[
            "reconcile",
            "--month",
            "2026-03",
            "--bill",
            bill.to_str().unwrap(),
        ])
        .unwrap();
    for cause in [
        "not in the price book",
        "not on the provider's bill",
        "unexplained",
    ] {
        assert!(text.contains(cause), "{cause}\n{text}");
    }

    let page = shop.path("metrics.txt");
    let metrics = "edgemeter_connection_slots{state=\"used\"} 100\n\
                   edgemeter_silent_connections{longer_than=\"1m\"} 64\n\
                   edgemeter_silent_connections{longer_than=\"1h\"} 3\n";
    std::fs::write(&page, metrics).unwrap();
    let idle = shop
        .run(&["idle", "--metrics", page.to_str().unwrap()])
        .unwrap();
    for text in [
        "peers of upstream orders",
        "2 of 4",
        "idle connections",
        "3 of 100",
        "price book: core",
    ] {
        assert!(idle.contains(text), "{text}\n{idle}");
    }
    // Without a gateway to ask, the rest is still found, and what is missing is said.
    let idle = shop.run(&["idle"]).unwrap();
    assert!(
        idle.contains("connections and tasks are not looked at: "),
        "{idle}"
    );

    let compare = shop.run(&["compare", "--pods", "12"]).unwrap();
    assert!(
        compare.contains("--pods") && compare.contains("given"),
        "{compare}"
    );
}

#[test]
fn without_prices_the_fix_is_named() {
    let shop = Shop::new(BOOK);
    let path = shop.path("edgemeter.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("[prices]\nbook = \"prices.toml\"\n", ""),
    )
    .unwrap();
    let error = shop.run(&["report"]).unwrap_err();
    assert!(
        error.contains("fix: add `[prices]` with `book = \"prices.toml\"`"),
        "{error}"
    );
}

/// Real connections, TLS and HTTP/2 included: each byte the cables carried is on the bill, once.
#[test]
fn the_bill_of_real_traffic_is_what_the_interfaces_moved() {
    let site = Site::start(
        "cb",
        &Setup {
            priced: true,
            ..Setup::default()
        },
    );
    for (tls, protocol) in [(false, Protocol::Http1), (true, Protocol::Http2)] {
        let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), tls, protocol, 60);
        load::run(&site.hosts.client, &plan).unwrap();
    }
    // While it serves: what a stop sends is posted at the next start.
    site.quiet();
    let (done, table) = site.edgemeter(&[
        "cost",
        "report",
        "--config",
        "edgemeter.toml",
        "--by",
        "route,leg,direction,quality",
    ]);
    assert!(done, "{table}");
    assert!(table.contains("; difference 0 B"), "{table}");
    for row in [
        "small",
        "large ~",
        "upload",
        "(overhead plain)",
        "(overhead tls)",
    ] {
        assert!(table.contains(row), "{row}\n{table}");
    }
    let (balances, _) = site.ledger();
    let moved: i64 = balances
        .by_interface()
        .values()
        .map(|balance| balance.total)
        .sum();
    assert!(
        table.contains(&format!("interfaces moved {moved} B")),
        "{moved}\n{table}"
    );
    let (done, csv) = site.edgemeter(&[
        "cost",
        "report",
        "--config",
        "edgemeter.toml",
        "--format",
        "focus",
    ]);
    assert!(done, "{csv}");
    let rows = rows(&csv);
    let bytes: i64 = rows
        .iter()
        .map(|row| row["x_WireBytes"].parse::<i64>().unwrap())
        .sum();
    assert_eq!(bytes, moved);
}
