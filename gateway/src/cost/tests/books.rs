//! The example books are read and rated; broken books say what to write.

use super::*;
use crate::config::Config;

const GB: i64 = 1_000_000_000;
const GIB: i64 = 1 << 30;

fn example(name: &str) -> Book {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/prices");
    let path = folder.join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("# EXAMPLE, not a price list"), "{name}");
    let book = Book::load(&path).unwrap_or_else(|error| panic!("{error}"));
    for sku in &book.skus {
        assert!(sku.source.contains("read 2026"), "{name}: {}", sku.id);
    }
    book
}

/// What one row of an interface costs in November, without the fees of other days.
fn bytes_cost(book: &Book, interface: &str, side: Side, way: Way, bytes: i64) -> String {
    let mut row = sent("a", start(book, "2026-11-05"), bytes);
    row.account.interface = interface.into();
    row.account.side = side;
    row.account.way = way;
    let usage = usage(vec![row]);
    let bill = rated(book, &usage, "2026-11");
    check(&bill, &usage);
    let charges = bill.charges.iter().filter(|charge| {
        charge.account.interface == interface
            && charge.account.side == side
            && charge.account.kind == Kind::Route
    });
    Nanos(charges.map(|charge| charge.cost).sum()).to_string()
}

#[test]
fn every_example_book_prices_its_vendors_example() {
    let aws = example("aws.toml");
    let out = bytes_cost(&aws, "eth0", Side::Client, Way::Tx, 51_200 * GIB);
    assert_eq!(out, "4394.20");
    let crossing = bytes_cost(&aws, "eth0", Side::Upstream, Way::Rx, 100 * GIB);
    assert_eq!(crossing, "5.50");

    let gcp = example("gcp.toml");
    let out = bytes_cost(&gcp, "eth0", Side::Client, Way::Tx, 1_025 * GIB);
    assert_eq!(out, "122.87");

    let azure = example("azure.toml");
    let out = bytes_cost(&azure, "eth0", Side::Client, Way::Tx, 200 * GB);
    assert_eq!(out, "8.70");

    let china = example("china.toml");
    let bgp = bytes_cost(&china, "bgp0", Side::Client, Way::Tx, 10 * GB);
    assert_eq!(bgp, "8.48");
    let cdn = bytes_cost(&china, "cdn0", Side::Client, Way::Tx, 10_300 * GB);
    assert_eq!(cdn, "2051.00");
    let pull = bytes_cost(&china, "cdn0", Side::Upstream, Way::Rx, 30 * GB);
    assert_eq!(pull, "3.00");
    let peak = bytes_cost(&china, "peak0", Side::Client, Way::Tx, 912 * 37_500_000);
    assert_eq!(peak, "465.12");
    // One sample above the rank is free, and a fifth of the cap is the account's, not the route's.
    let burst = bytes_cost(&china, "p95", Side::Client, Way::Tx, 500 * 37_500_000);
    assert_eq!(burst, "0.00");
    assert_eq!(china.compute[0].core_hour.to_string(), "0.055");
}

#[test]
fn a_configuration_names_a_book_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("edgemeter.toml");
    let text = "[[listeners]]\nname = \"public\"\naddress = \"127.0.0.1:8080\"\n\
                [[upstreams]]\nname = \"orders\"\npeers = [\"127.0.0.1:9000\"]\n\
                [[routes]]\nname = \"all\"\nupstream = \"orders\"\n\
                [prices]\nbook = \"prices.toml\"\n";
    std::fs::write(&config, text).unwrap();
    let missing = Config::load(&config).unwrap_err().to_string();
    assert!(
        missing.contains("edgemeter.toml:11:8: prices.book: "),
        "{missing}"
    );
    assert!(
        missing.contains("fix: name a readable price book"),
        "{missing}"
    );

    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/prices");
    let book = folder.path().join("prices.toml");
    std::fs::copy(examples.join("aws.toml"), &book).unwrap();
    let loaded = Config::load(&config).unwrap();
    let prices = loaded.prices.as_ref().unwrap();
    assert_eq!(prices.currency.to_string(), "USD");
    // The view's price: the first tier that costs something.
    let rate = prices.find(crate::owner::Leg::Client, crate::config::Direction::Tx);
    assert_eq!(rate.unwrap().rate.price.to_string(), "0.09");
    assert!(
        loaded
            .listing()
            .contains("prices.toml (2 SKUs, USD, UTC, sha256 ")
    );

    let broken = std::fs::read_to_string(&book)
        .unwrap()
        .replace("leg = \"client\"", "leg = \"both\"");
    std::fs::write(&book, broken).unwrap();
    let error = Config::load(&config).unwrap_err().to_string();
    assert!(
        error.contains(
            "prices.toml:18:7: skus[0].leg: \"both\" is not one of `client`, `upstream`, `none`"
        ),
        "{error}"
    );

    let both = format!("{text}currency = \"USD\"\n");
    std::fs::write(&config, both).unwrap();
    let error = Config::load(&config).unwrap_err().to_string();
    assert!(
        error.contains("prices.currency: stands beside `book`"),
        "{error}"
    );
}

#[test]
fn a_broken_book_says_where_and_what_to_write() {
    let good = "currency = \"USD\"\n[[skus]]\nid = \"a\"\nleg = \"client\"\ndirection = \"tx\"\n\
                unit_bytes = 1000000000\nprice = \"1\"\n";
    assert!(Book::parse(good, Path::new("p.toml")).is_ok());
    for (from, to, expected) in [
        (
            "unit_bytes = 1000000000\n",
            "",
            "p.toml:2:1: skus[0].unit_bytes: is missing, and 1 GiB is 7.37 % more than 1 GB",
        ),
        (
            "unit_bytes = 1000000000",
            "unit_bytes = 3000000000",
            "p.toml:6:14: skus[0].unit_bytes: 3000000000 has other prime factors than 2 and 5",
        ),
        (
            "price = \"1\"",
            "price = 1",
            "p.toml:7:9: skus[0].price: invalid type: integer `1`, expected a string; fix: write `price = \"0.09\"`",
        ),
        (
            "price = \"1\"",
            "tiers = [{ to = 10, price = \"1\" }]",
            "p.toml:7:9: skus[0].tiers: end at 10: what comes after has no price",
        ),
        (
            "price = \"1\"",
            "tiers = [{ to = 10, price = \"1\" }, { to = 5, price = \"2\" }, { price = \"3\" }]",
            "p.toml:7:36: skus[0].tiers[1]: does not end above the one before (10)",
        ),
        (
            "price = \"1\"",
            "price = \"1\"\nsample_s = 300",
            "p.toml:8:12: skus[0].sample_s: has no meaning with this basis",
        ),
        (
            "unit_bytes = 1000000000",
            "basis = \"p95\"",
            "p.toml:2:1: skus[0].method: is missing: providers count differently",
        ),
        (
            "price = \"1\"",
            "price = \"1\"\ncurrency = \"EUR\"",
            "p.toml:8:12: skus[0].currency: EUR is not the book's currency, and no [[fx]] converts it",
        ),
        (
            "currency = \"USD\"\n",
            "currency = \"USD\"\ntimezone = \"Mars\"\n",
            "p.toml:2:12: timezone: \"Mars\" is no IANA time zone",
        ),
        (
            "price = \"1\"",
            "price = \"1\"\nfrom = \"2026-11-31\"",
            "p.toml:8:8: skus[0].from: \"2026-11-31\" is not a day",
        ),
        (
            "price = \"1\"",
            "price = \"1\"\nfrom = \"2026-11-03\"\nuntil = \"2026-11-03\"",
            "p.toml:9:9: skus[0].until: ends on 2026-11-03, before it begins on 2026-11-03",
        ),
        (
            "leg = \"client\"\n",
            "",
            "p.toml:2:1: skus[0].leg: is missing; fix: add `leg = \"client\"`",
        ),
    ] {
        assert!(good.contains(from), "{from}");
        let text = good.replacen(from, to, 1);
        let error = Book::parse(&text, Path::new("p.toml"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}\nexpected {expected}");
        assert!(error.contains("; fix: "), "{error}");
    }
}

#[test]
fn a_book_is_known_by_the_hash_of_its_file() {
    let text = "currency = \"USD\"\n";
    let one = Book::parse(text, Path::new("a.toml")).unwrap();
    let other = Book::parse(&format!("{text}# a word\n"), Path::new("a.toml")).unwrap();
    assert_eq!(one.hash.len(), 64);
    assert_ne!(one.hash, other.hash);
}
