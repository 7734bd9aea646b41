//! The routing and experiment examples, on real sockets.

use std::collections::{BTreeMap, BTreeSet};

use crate::{echo::Echo, example::Example};

#[test]
fn the_routing_example_routes_as_it_says() {
    let servers = [
        Echo::start("orders"),
        Echo::start("orders-next"),
        Echo::start("shadow"),
    ];
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let site = Example::start("routing", &addresses);

    // Rewrites and header edits.
    let sent = [
        ("x-internal", "secret"),
        ("x-edgemeter-variant", "checkout=treatment"),
    ];
    let answer = site.get("shop.example", "/api/v1/orders/7?a=b", &sent);
    let said = answer.json();
    assert_eq!(said["target"], "/orders/7?a=b");
    let headers = &said["headers"];
    assert_eq!(headers["host"], "orders.internal");
    assert_eq!(headers["x-edge"], "1");
    assert_eq!(headers["x-forwarded-host"], "shop.example");
    assert!(headers["x-internal"].is_null(), "{headers}");
    assert!(
        headers["x-edgemeter-variant"].is_null(),
        "a client chooses no variant"
    );
    assert_eq!(answer.header("x-frame-options"), "DENY");
    assert_eq!(answer.header("server"), "");

    // Wildcard host, exact element boundary, precedence by headers.
    let served = |host: &str, target: &str, headers: &[(&str, &str)]| {
        site.get(host, target, headers).json()["target"].to_string()
    };
    assert_eq!(
        served("eu.shop.example", "/api/v1/orders", &[]),
        "\"/orders\""
    );
    assert_eq!(
        served("shop.example", "/api/v1/ordersx", &[]),
        "\"/api/v1/ordersx\""
    );
    let beta = site.get("shop.example", "/api/v1/orders", &[("X-Beta", "1")]);
    assert_eq!(beta.json()["server"], "orders-next");
    assert_eq!(
        beta.json()["target"],
        "/api/v1/orders",
        "another route, no rewrite"
    );

    // Redirects.
    let answer = site.get("old.shop.example", "/shop/a?b=c", &[]);
    assert_eq!(answer.status, 301);
    assert_eq!(answer.header("location"), "https://shop.example/api/a?b=c");
    let answer = site.get("old.shop.example", "/store", &[]);
    assert_eq!(answer.header("location"), "https://shop.example/api");
    let answer = site.ask("PUT", "old.shop.example", "/store", &[], "x");
    assert_eq!(
        answer.json()["server"],
        "orders",
        "only GET is redirected there"
    );

    // Weights, exactly over a round of 20.
    let before = servers[1].requests();
    for _ in 0..40 {
        assert_eq!(site.get("shop.example", "/api/v1/orders", &[]).status, 200);
    }
    assert_eq!(servers[1].requests() - before, 2);

    // Expression, query, and a copy to the shadow with its body.
    let answer = site.ask("POST", "shop.example", "/items/12?view=full", &[], "hello");
    assert_eq!(answer.json()["server"], "orders");
    site.get("shop.example", "/items/12?view=none", &[]);
    site.get("shop.example", "/items/x?view=full", &[]);
    site.get("shop.example", "/items/13?view=short", &[]);
    let long = "x".repeat(1_001);
    site.ask("POST", "shop.example", "/items/14?view=full", &[], &long);
    let copies = |result: &str| {
        let page = site.scrape();
        page.sum("edgemeter_mirror_copies_total", |sample| {
            sample.label("result") == result
        })
    };
    site.wait_for("copies", || copies("sent") == 2 && copies("body") == 1);
    let mut seen = servers[2].mood.seen.lock().unwrap().clone();
    seen.sort();
    assert_eq!(
        seen,
        ["GET /items/13?view=short 0", "POST /items/12?view=full 5"]
    );

    let routes: BTreeSet<String> = site
        .access_log(52)
        .iter()
        .map(|line| line["route"].as_str().unwrap().to_owned())
        .collect();
    let known = ["item", "old", "orders", "orders-beta", "rest"];
    assert!(routes.iter().eq(known), "{routes:?}");
}

#[test]
fn a_dead_mirror_hurts_nobody_and_is_counted() {
    let mut servers = [
        Echo::start("orders"),
        Echo::start("orders-next"),
        Echo::start("shadow"),
    ];
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    servers[2].kill();
    let site = Example::start("routing", &addresses);
    for _ in 0..10 {
        let answer = site.get("shop.example", "/items/12?view=full", &[]);
        assert_eq!(answer.status, 200);
    }
    site.wait_for("lost copies", || {
        let page = site.scrape();
        page.sum("edgemeter_mirror_copies_total", |sample| {
            sample.label("result") == "failed"
        }) == 10
    });
}

#[test]
fn the_experiments_example_is_sticky_and_tells_the_service() {
    let servers = [Echo::start("orders"), Echo::start("orders-next")];
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let site = Example::start("experiments", &addresses);
    let mut variants: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..40 {
        let first = site.get("h", "/", &[]);
        let cookie = first.header("set-cookie").to_owned();
        let unit = cookie
            .strip_prefix("uid=")
            .and_then(|rest| rest.split(';').next())
            .unwrap();
        let said = first.json();
        assert_eq!(said["headers"]["x-edgemeter-unit"], unit);
        let variant = said["headers"]["x-edgemeter-variant"]
            .as_str()
            .unwrap()
            .to_owned();
        let server = if variant == "checkout=treatment" {
            "orders-next"
        } else {
            "orders"
        };
        assert_eq!(said["server"], server, "{variant}");
        for _ in 0..2 {
            let again = site.get("h", "/", &[("cookie", &format!("a=b; uid={unit}"))]);
            assert_eq!(again.header("set-cookie"), "");
            assert_eq!(again.json()["headers"]["x-edgemeter-variant"], variant);
            assert_eq!(again.json()["server"], server);
        }
        *variants.entry(variant).or_default() += 1;
    }
    assert_eq!(variants.len(), 2, "{variants:?}");
    assert!(variants.values().all(|count| *count >= 5), "{variants:?}");
    // u0 and u9 are within the first quarter of badge-1's buckets; only some within a tenth.
    let dealt = |customer: &str| {
        let said = site
            .get("h", "/", &[("cookie", "uid=u1"), ("x-customer", customer)])
            .json();
        said["headers"]["x-edgemeter-variant"]
            .as_str()
            .unwrap()
            .contains("badge=")
    };
    let inside = (0..100).filter(|n| dealt(&format!("c{n}"))).count();
    assert!((1..30).contains(&inside), "{inside} of 100 at 10 %");
    let log = site.access_log(100);
    assert!(
        log.iter()
            .any(|line| line["variants"] == "checkout=treatment")
    );
}
