//! Every metric and label in a panel or a rule exists in what the two processes really expose.

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use xtask::{
    dashboards, exposition, host,
    load::{self, Protocol, Template},
    netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE},
};

use crate::harness::{Setup, Site};

const ORDERS: u16 = 9100;

/// The order service, killed when dropped.
struct Commerce(Child);

impl Drop for Commerce {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_panel_and_rule_asks_for_metrics_that_exist() {
    let directory = host::workspace_root().join("dashboards");
    let expressions = dashboards::expressions(&directory).unwrap();
    assert!(expressions.len() > 30, "{} expressions", expressions.len());

    let site = Site::start(
        "db",
        &Setup {
            priced: true,
            // Nobody listens there: the metrics of a sink that is away.
            extra: "[[push]]\nname = \"bill\"\nurl = \"http://127.0.0.1:9/\"\n\
                    [[budgets]]\nname = \"all\"\nperiod = \"day\"\nlimit_bytes = 1000000000\n\
                    [[prices.rates]]\nid = \"from-service\"\nleg = \"upstream\"\n\
                    direction = \"rx\"\nprice = \"0.01\"\nunit_bytes = 1073741824\n\
                    [[routes]]\nname = \"kept\"\npath = { prefix = \"/kept\" }\n\
                    upstream = \"origin\"\n[routes.cache]\n\
                    [[listeners]]\nname = \"fenced\"\naddress = \"127.0.0.1:8099\"\n\
                    access = { deny = [\"192.0.2.0/24\"], kernel = true }\n\
                    [[upstreams]]\nname = \"vault\"\npeers = [\"127.0.0.1:9\"]\n\
                    tls = { server_name = \"vault.internal\", authorities = \"cert.pem\" }\n\
                    [[routes]]\nname = \"vault\"\npath = { prefix = \"/vault\" }\n\
                    upstream = \"vault\"\n\
                    [tracing]\nendpoint = \"http://127.0.0.1:9\"\n\
                    [[listeners]]\nname = \"ordered\"\naddress = \"[::]:8444\"\n\
                    [listeners.tls.acme]\ndirectory = \"https://127.0.0.1:9/dir\"\n\
                    domains = [\"shop.example\"]\nretry_seconds = 1\n"
                .into(),
            ..Setup::default()
        },
    );
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), true, Protocol::Http1, 30);
    load::run(&site.hosts.client, &plan).unwrap();
    // What is no request, so that somebody is behind the alarm.
    site.hosts
        .client
        .run(|| {
            let address = (GATEWAY_TO_CLIENT.v4, crate::harness::PLAIN);
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            std::io::Write::write_all(&mut stream, b"\x16\x03\x01 no request\n").unwrap();
            let _ = std::io::Read::read_to_end(&mut stream, &mut Vec::new());
        })
        .unwrap();
    site.quiet();
    // Nobody listens there: the host drops the SYN, and counts it.
    let nowhere = (GATEWAY_TO_CLIENT.v4, 7);
    let refused = site
        .hosts
        .client
        .run(|| std::net::TcpStream::connect(nowhere).is_err());
    assert!(refused.unwrap());
    let (_, gateway) = site.get("/metrics").unwrap();

    let binary = host::target_directory().join("debug").join("commerce");
    if !binary.exists() {
        // A test of the whole workspace has built it; one of this package alone has not.
        host::run(host::cargo().args(["build", "--locked", "--package", "commerce"])).unwrap();
    }
    let address = (GATEWAY_TO_SERVICE.far_v4, ORDERS).into();
    let mut commerce = site.hosts.service.command(binary).unwrap();
    let database = site.directory.path().join("commerce.db");
    let commerce = commerce
        .args(["serve", "--listen", &format!("{address}"), "--database"])
        .arg(database)
        .args(["--assess-seconds", "1", "--campaign"])
        .arg(host::workspace_root().join("commerce/examples/campaign.toml"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _commerce = Commerce(commerce);
    let get = |path: &str| {
        site.hosts
            .service
            .run(|| exposition::get(address, path))
            .unwrap()
    };
    let started = Instant::now();
    while get("/readyz").map_or(0, |(status, _)| status) != 200 {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "commerce is not ready"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let order = Template::post(
        "order",
        "/api/v1/orders",
        r#"{"lines":[{"sku":"1001","quantity":1}]}"#,
        201,
    )
    .header("content-type", "application/json")
    .header("idempotency-key", "dashboards-{n}");
    let mut plan = plan;
    (plan.address, plan.root, plan.requests, plan.templates) = (address, None, 3, vec![order]);
    load::run(&site.hosts.service, &plan).unwrap();
    // An experiment has metrics once it was assessed.
    let started = Instant::now();
    let orders = loop {
        let (_, orders) = get("/metrics").unwrap();
        if orders.contains("commerce_experiment_state{") {
            break orders;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "no experiment was assessed"
        );
        std::thread::sleep(Duration::from_millis(100));
    };

    if let Err(missing) = dashboards::check(&expressions, &[&gateway, &orders]) {
        let lines: Vec<String> = missing.iter().map(ToString::to_string).collect();
        panic!("{}", lines.join("\n"));
    }
    let unread = dashboards::unread(&expressions, &[&gateway, &orders]);
    assert!(
        unread.is_empty(),
        "exposed, and on no panel and in no rule: {unread:?}"
    );
}
