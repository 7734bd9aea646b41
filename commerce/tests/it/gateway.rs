//! Through the real gateway: groups are watched, the page is hinted before it is there, members'
//! tokens are verified, customers are dealt once, and one id follows an order.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use xtask::browser::Browser;
use xtask::exposition::{self, Exposition};

use commerce::store::sql::Backend;

use crate::campaigns::{Shop, campaign};
use crate::events::Sink;
use crate::groups::{CAMPAIGN, joined, pay, ticket, told, watch, with_campaign};
use crate::harness::{Api, Database, InProcess, Process, eventually, header, product};
use crate::members::{member, with_token};

/// The gateway, killed on drop.
struct Gateway {
    child: Child,
    address: String,
    admin: SocketAddr,
    directory: tempfile::TempDir,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Fails when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free() -> SocketAddr {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap()
}

/// A route for everything to the upstream `commerce`.
const EVERYTHING: &str =
    "[[routes]]\nname = \"all\"\npath = { prefix = \"/\" }\nupstream = \"commerce\"\n";

impl Gateway {
    async fn start(service: &str) -> Self {
        Self::with(service, "", EVERYTHING, |_| {}).await
    }

    /// With more lines for its listener, and other routes; `files` are written beside its
    /// configuration.
    async fn with(service: &str, listener: &str, more: &str, files: impl FnOnce(&Path)) -> Self {
        let binary = xtask::host::target_directory().join("debug/edgemeter");
        // A test of the whole workspace has built it; one of this package alone has not.
        if !binary.exists() {
            let mut cargo = xtask::host::cargo();
            xtask::host::run(cargo.args(["build", "--locked", "--package", "edgemeter"])).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        files(directory.path());
        let (address, admin) = (free().to_string(), free());
        let configuration = format!(
            "[gateway]\nstate_dir = \"state\"\ngrace_seconds = 1\n\n\
             [admin]\nlisten = \"{admin}\"\n\n\
             [access_log]\npath = \"access.jsonl\"\nsettle_ms = 0\n\n\
             [[listeners]]\nname = \"shop\"\naddress = \"{address}\"\n{listener}\n\
             [[upstreams]]\nname = \"commerce\"\npeers = [\"{service}\"]\n\n{more}"
        );
        let path = directory.path().join("edgemeter.toml");
        std::fs::write(&path, configuration).unwrap();
        let child = Command::new(&binary)
            .args(["run", "--config"])
            .arg(&path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the gateway is ready", async || {
            matches!(exposition::get(admin, "/readyz"), Ok((200, _))).then_some(())
        })
        .await;
        Self {
            child,
            address,
            admin,
            directory,
        }
    }

    fn scrape(&self) -> Exposition {
        exposition::scrape(self.admin).unwrap()
    }

    /// The access log's line for which this holds.
    async fn logged(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let path = self.directory.path().join("access.jsonl");
        eventually(what, async || {
            let text = std::fs::read_to_string(&path).unwrap();
            text.lines()
                // The last line may be half written.
                .filter_map(|line| serde_json::from_str(line).ok())
                .find(&is_it)
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_watched_through_the_gateway() {
    let (service, _campaign) = with_campaign(Backend::Sqlite, CAMPAIGN).await;
    let gateway = Gateway::start(service.api.address()).await;
    let api = Api::new(&gateway.address);
    let (group, order) = joined(&api, "one", "a", 3).await;
    // Many times over: whether the service's 101 or the client's empty body is first at the
    // gateway is a matter of luck.
    for _ in 0..40 {
        let ticket = ticket(&api, &group).await;
        let mut socket = watch(&gateway.address, &group, &ticket, None)
            .await
            .unwrap();
        assert_eq!(told(&mut socket).await["type"], "snapshot");
    }
    let last = ticket(&api, &group).await;
    let mut socket = watch(&gateway.address, &group, &last, None).await.unwrap();
    assert_eq!(told(&mut socket).await["places_left"], 2);
    joined(&api, "two", "a", 3).await;
    assert_eq!(told(&mut socket).await["places_left"], json!(1));
    assert_eq!(pay(&api, "one", &order).await.status(), StatusCode::OK);
    assert_eq!(told(&mut socket).await["group"]["paid"], 1);
    drop(socket);
    drop(gateway);
    service.stop_and_audit().await;
}

/// What a customer gets: the page's own `Link` becomes a 103 that the browser acts upon, the page
/// is rendered, and its first paint is measured and reported as hinted.
#[tokio::test(flavor = "multi_thread")]
async fn the_product_page_is_hinted_before_it_is_there() {
    let service = InProcess::start(Backend::Sqlite, &[]).await;
    let mut trusted = String::new();
    let hinted = format!("{EVERYTHING}[routes.hints.early]\nlearn = true\n");
    let gateway = Gateway::with(
        service.api.address(),
        "http2 = true\ntls = { certificate = \"cert.pem\", key = \"key.pem\" }\n",
        &hinted,
        |directory| {
            let loopback = [127, 0, 0, 1].into();
            let certificate = xtask::certificate::write(directory, &[loopback]).unwrap();
            trusted = certificate.key_sha256;
        },
    )
    .await;
    let address = gateway.address.clone();
    let seen = tokio::task::spawn_blocking(move || {
        let mut browser = Browser::start(&[
            &format!("--ignore-certificate-errors-spki-list={trusted}"),
            &format!("--host-resolver-rules=MAP shop.example {address}"),
        ])
        .unwrap();
        let url = "https://shop.example/products/1001";
        let mut visit = || {
            // Cookies and a cache of its own, both empty.
            let page = browser.open().unwrap();
            let nothing = json!({});
            browser.command(&page, "Network.enable", nothing).unwrap();
            browser.go_to(&page, url).unwrap();
            let painted = "new Promise((resolve) => {
                const look = () => {
                    const [paint] = performance.getEntriesByName('first-contentful-paint');
                    paint ? resolve(paint.startTime) : setTimeout(look, 10);
                };
                look();
            })";
            let painted = browser.evaluate(&page, painted).unwrap();
            let look = "({
                heading: document.querySelector('h1').innerText,
                price: document.querySelector('.price strong').innerText,
                layout: getComputedStyle(document.querySelector('main')).display,
                picture: document.querySelector('img').naturalWidth,
                style: performance.getEntriesByType('resource')
                    .find((entry) => entry.name.includes('/assets/style-')).initiatorType,
            })";
            let look = browser.evaluate(&page, look).unwrap();
            (page, painted.as_f64().unwrap(), look)
        };
        // The gateway has not seen the page yet.
        let (_, painted, first) = visit();
        assert!(painted > 0.0);
        let (page, painted, second) = visit();
        assert!(painted > 0.0);
        let hints = browser
            .event(&page, "Network.responseReceivedEarlyHints")
            .unwrap();
        (first, second, hints["params"]["headers"].to_string())
    });
    let (first, second, hints) = seen.await.unwrap();
    let page = |style: &str| {
        json!({
            "heading": "Enamel Camping Mug", "price": "CNY 49.00", "layout": "grid",
            "picture": 480, "style": style,
        })
    };
    assert_eq!((first, second), (page("link"), page("early-hints")));
    for named in ["/assets/style-", "/pictures/1001.svg"] {
        assert!(hints.contains(named), "{named} is not hinted: {hints}");
    }
    for is_hinted in [false, true] {
        let series =
            format!("commerce_first_contentful_paint_seconds_count{{hinted=\"{is_hinted}\"}}");
        eventually("the paint is reported", async || {
            (service.api.metric(&series).await == 1).then_some(())
        })
        .await;
    }
    let sent = gateway
        .scrape()
        .sum("edgemeter_early_hints_total", |sample| {
            sample.label("source") == "gateway"
        });
    assert_eq!(sent, 1);
    drop(gateway);
    service.stop_and_audit().await;
}

/// The id the gateway gives a request is in its log, in ours, in the order's row, in the order's
/// events, and in what a sink is told.
#[tokio::test(flavor = "multi_thread")]
async fn one_id_follows_an_order_through_both_logs_its_rows_and_its_events() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let sink = Sink::default();
    let risk = sink.start().await;
    let database = Database::with(Backend::Sqlite, &[product("a", 5)]).await;
    let process = Process::start(&database, &["--log-level", "debug", "--risk-url", &risk]);
    let gateway = Gateway::start(process.api.address()).await;
    let api = Api::new(&gateway.address);
    // A client that is part of a trace has its id followed.
    let traced = api
        .request(Method::POST, "/api/v1/orders")
        .header("idempotency-key", "t")
        .header("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01"))
        .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }));
    let traced: Value = traced.send().await.unwrap().json().await.unwrap();
    assert_eq!(traced["trace_id"], TRACE);
    let line = gateway.logged("the trace is logged", |line| line["id"] == TRACE);
    assert_eq!(line.await["status"], 201);

    let placed = api.place("k", &[("a", 1)]).await;
    assert_eq!(placed.status(), StatusCode::CREATED);
    let location = header(&placed, "location").to_owned();

    let line = gateway.logged("the order is logged", |line| {
        line["status"] == 201 && line["id"] != TRACE
    });
    let id = line.await["id"].as_str().unwrap().to_owned();
    assert_eq!(id.len(), 32, "{id}");
    assert_eq!(api.get_json(&location).await["trace_id"], *id);
    let events = api.get_json(&format!("{location}/events")).await;
    assert_eq!(events[0]["trace_id"], *id);
    let sql = format!("SELECT count(*) FROM orders WHERE trace_id = '{id}'");
    assert_eq!(database.count(&sql), 1);
    let sql = format!("SELECT count(*) FROM outbox WHERE trace_id = '{id}'");
    assert_eq!(database.count(&sql), 1);
    eventually("the sink is told", async || {
        let told = sink.bodies();
        told.iter()
            .any(|event| event["trace_id"] == *id)
            .then_some(())
    })
    .await;
    eventually("the service has logged it", async || {
        process
            .has_logged(|line| line["trace_id"] == *id && line["route"] == "/api/v1/orders")
            .then_some(())
    })
    .await;
    drop(gateway);
    process.terminate();
    assert!(process.wait().success());
    database.assert_audit_clean();
}

/// Tokens issued here are believed there by the keys published here, and nobody else's are.
#[tokio::test(flavor = "multi_thread")]
async fn a_members_token_is_verified_by_the_gateway_with_the_published_keys() {
    const ROUTE: &str = "/api/v1/membership";
    let service = InProcess::start(Backend::Sqlite, &[product("a", 1)]).await;
    let address = service.api.address();
    let more = format!(
        "[[tokens]]\nname = \"members\"\nkeys = \"http://{address}/.well-known/jwks.json\"\n\
         issuer = \"https://shop.test\"\naudience = \"shop\"\nalgorithms = [\"EdDSA\"]\n\n\
         [[routes]]\nname = \"membership\"\npath = {{ prefix = \"{ROUTE}\" }}\n\
         tenant = {{ claim = \"sub\", default = \"unknown\" }}\nupstream = \"commerce\"\n\
         [routes.authentication]\ntoken = \"members\"\n\n{EVERYTHING}"
    );
    let gateway = Gateway::with(address, "", &more, |_| {}).await;
    let api = Api::new(&gateway.address);
    let tokens = member(&api, "kim@shop.example").await;
    let token = tokens["access_token"].as_str().unwrap();

    let right = with_token(&api, Method::GET, ROUTE, token).await;
    assert_eq!(right.status(), StatusCode::OK);
    // Another claim under the same signature.
    let parts: Vec<&str> = token.split('.').collect();
    let forged = format!(
        "{}.{}.{}",
        parts[0],
        &parts[1][..parts[1].len() - 4],
        parts[2]
    );
    let refused = with_token(&api, Method::GET, ROUTE, &forged).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert!(header(&refused, "www-authenticate").starts_with("Bearer"));
    assert_eq!(api.get(ROUTE).await.status(), StatusCode::UNAUTHORIZED);
    // The refused ones never came here.
    let taken = format!("commerce_request_duration_seconds_count{{route=\"{ROUTE}\"}}");
    assert_eq!(service.api.metric(&taken).await, 1);
    // What the member used is on the member's account.
    let line = gateway.logged("the member is logged", |line| {
        line["route"] == "membership" && line["status"] == 200
    });
    let line = line.await;
    let subject = line["tenant"].as_str().unwrap();
    let sql = format!("SELECT count(*) FROM member WHERE id = '{subject}'");
    assert_eq!(service.database.count(&sql), 1, "{line}");
    drop(gateway);
    service.stop_and_audit().await;
}

/// Whoever is dealt by the gateway gets what this service would have dealt; a client cannot choose.
#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_deals_customers_as_the_shop_does() {
    const CUSTOMERS: usize = 40;
    let shop = Shop::open(Backend::Sqlite, &campaign(0, "s1")).await;
    let more = format!(
        "[[experiments]]\nname = \"badge\"\nsalt = \"s1\"\nheader = \"x-customer\"\n\
         variants = [{{ name = \"control\", weight = 5000 }}, {{ name = \"treatment\", weight = 5000 }}]\n\n\
         {}experiments = [\"badge\"]\n",
        EVERYTHING
    );
    let gateway = Gateway::with(shop.service.api.address(), "", &more, |_| {}).await;
    let through = Api::new(&gateway.address);
    let total = async |api: &Api, key: String, headers: &[(&str, &str)]| {
        let mut request = api.request(Method::POST, "/api/v1/orders");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .header("idempotency-key", key)
            .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
        let order: Value = response.json().await.unwrap();
        order["total"]["minor"].as_i64().unwrap()
    };
    let mut treated = 0;
    for n in 0..CUSTOMERS {
        let customer = format!("c{n}");
        let headers = [
            ("x-customer", customer.as_str()),
            // Not for a client to say.
            ("x-edgemeter-variant", "badge=treatment"),
        ];
        let there = total(&through, format!("g{n}"), &headers).await;
        let here = [("x-edgemeter-unit", customer.as_str())];
        let here = total(&shop.service.api, format!("d{n}"), &here).await;
        assert_eq!(there, here, "{customer}");
        treated += usize::from(there == 1_000); // 1999 − 999
    }
    assert!((8..=32).contains(&treated), "{treated} of {CUSTOMERS}");
    eventually("every customer is counted once", async || {
        let seen = shop.experiment().await;
        let units = |at: usize| seen["variants"][at]["units"].as_u64().unwrap();
        (units(0) + units(1) == CUSTOMERS as u64).then_some(())
    })
    .await;
    drop(gateway);
    shop.service.stop_and_audit().await;
}
