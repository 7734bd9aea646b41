//! Bytes by class of the remote address, over a change of the classes.

use std::collections::BTreeMap;

use edgemeter::ledger::Ledger;
use xtask::{
    load::{self, Protocol},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE},
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends};

/// The client is 10.77.1.2, the service 10.77.2.2 (see the topology).
const CLASSES: &str = "
[[classes]]
name = \"internet\"
cidrs = [\"0.0.0.0/0\", \"::/0\"]
[[classes]]
name = \"inside\"
cidrs = [\"10.77.2.0/24\"]
";

fn by_class(site: &Site) -> BTreeMap<(String, String), i64> {
    let ledger = Ledger::open(&site.directory.path().join("state")).unwrap();
    let names: BTreeMap<_, _> = ledger.classes().unwrap().into_iter().collect();
    let mut sums = BTreeMap::new();
    for (interface, _, _, class, amount) in ledger.balances().unwrap().by_class() {
        let name = names.get(&class).cloned().unwrap_or_default();
        *sums.entry((interface.to_owned(), name)).or_insert(0) += amount.wire_bytes;
    }
    sums.retain(|_, bytes| *bytes != 0);
    sums
}

#[test]
fn classes_split_every_byte_and_a_change_of_them_loses_none() {
    let setup = Setup {
        extra: CLASSES.into(),
        ..Setup::default()
    };
    let mut site = Site::start("cl", &setup);
    let captures = site.captures();
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 30);
    load::run(&site.hosts.client, &plan).unwrap();
    let page = site.quiet();
    let (edge, svc) = (GATEWAY_TO_CLIENT.device, GATEWAY_TO_SERVICE.device);
    let first = by_class(&site);
    let names: Vec<_> = first
        .keys()
        .map(|(i, c)| (i.as_str(), c.as_str()))
        .collect();
    assert_eq!(names, [(edge, "internet"), (svc, "inside")]);
    assert_eq!(page.sum("edgemeter_unclaimed_bytes", |_| true), 0);
    let exported = page.sum("edgemeter_wire_bytes_total", |s| {
        s.label("class") == "internet" && s.label("interface") == edge
    });
    assert_eq!(
        exported,
        i128::from(first[&(edge.to_owned(), "internet".to_owned())])
    );

    // Another process with other classes: "inside" is gone, its number is not given again.
    site.end(libc::SIGTERM);
    let text = std::fs::read_to_string(site.config()).unwrap();
    let text = text
        .replace("\"inside\"", "\"zone-b\"")
        .replace(", \"::/0\"", "");
    std::fs::write(site.config(), text).unwrap();
    site.launch();
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let second = by_class(&site);
    let names: Vec<_> = second
        .keys()
        .map(|(i, c)| (i.as_str(), c.as_str()))
        .collect();
    assert_eq!(
        names,
        [(edge, "internet"), (svc, "inside"), (svc, "zone-b")]
    );
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
}

#[test]
fn the_example_says_what_the_documentation_says() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/classes.toml");
    let config = edgemeter::config::Config::load(example).unwrap();
    let listing = config.listing();
    assert!(
        listing.contains("class       inside: 10.0.0.0/8 fd00::/8"),
        "{listing}"
    );
    let documentation = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/classes.md");
    let documentation = std::fs::read_to_string(documentation).unwrap();
    let text = std::fs::read_to_string(example).unwrap();
    let (_, classes) = text.split_once("[[classes]]").unwrap();
    assert!(documentation.contains(classes.trim_end()));
}
