//! Whole files, good and bad. What is asserted of a bad one is exactly what people would read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::fields::{all, example};
use super::*;

/// Every field there is.
const FULL: &str = r#"
[gateway]
state_dir = "/var/lib/edgemeter"
threads = 2
grace_seconds = 10
lane = "auto"
id = "edge-1"
ledger = "postgres://edgemeter:secret@db.example:5432/bill"

[retention]
seconds_for_minutes = 15
minutes_for_days = 62
hours_for_days = 400
days_for_days = 1830

[[push]]
name = "billing"
url = "https://meter.example/api/v1/events"
secret_file = "push.secret"
token_file = "push.token"
ca_file = "cert.pem"
confirm_url = "https://meter.example/api/v1/events/{id}"
tenants = ["acme"]
unattributed = false
batch = 100
window_seconds = 60
timeout_ms = 10000
dedupe_seconds = 86400
keep_days = 35

[[budgets]]
name = "acme-month"
period = "month"
limit_money = "500.00"
routes = ["orders-create"]
services = ["commerce"]
tenants = ["acme"]
timezone = "Asia/Shanghai"
warn_percent = [50, 80, 95]
action = "warn"

[[budgets]]
name = "all-day"
period = "day"
limit_bytes = 1000000000000
action = "throttle"
throttle_bytes_per_second = 1000000

[admin]
listen = "127.0.0.1:9901"
token_file = "/var/lib/edgemeter/admin.token"

[observe]
enabled = true
interfaces = ["edge0", "svc0"]
exclude = ["veth*"]
boundary = ["edge0"]
namespaces = ["blue", "/proc/4711/ns/net"]
attach = "tcx"
bpffs = "/sys/fs/bpf/edgemeter"
flows_max = 262144
connections_max = 16384
accounts_max = 16384
collect_interval_ms = 1000
required = false
kernel_log = "warn"

[access_log]
path = "/var/log/edgemeter/access.jsonl"
queue = 65536
settle_ms = 5000

[[listeners]]
name = "public"
address = "0.0.0.0:8080"
http2 = true

[[listeners]]
name = "secure"
address = "[::]:8443"
[listeners.tls]
certificate = "cert.pem"
key = "key.pem"

[[upstreams]]
name = "orders"
peers = ["10.77.2.2:9000", { address = "10.77.2.3:9000", weight = 2 }]
http2 = false
connect_timeout_ms = 1000
read_timeout_ms = 30000
write_timeout_ms = 30000
idle_timeout_ms = 30000
retries = 1
balance = "hash"
hash = { cookie = "uid" }
kernel_informed = true
resolve_interval_ms = 5000
check = { path = "/livez", host = "orders.internal", interval_ms = 1000, timeout_ms = 500, healthy = 2, unhealthy = 3 }
[upstreams.retry]
statuses = [503]
budget_percent = 20
budget_reserve = 10
idempotency_key = true
[upstreams.ejection]
connect_failures = 3
server_errors = 5
base_ms = 1000
max_ms = 30000
panic_percent = 34
[upstreams.limits]
requests = 1000
pending = 100
per_peer = 500

[[upstreams]]
name = "next"
peers = ["next.internal:9000"]
hash = { header = "x-customer" }
check = { grpc = "orders.Orders" }

[[upstreams]]
name = "shadow"
peers = ["10.77.2.4:9000"]
hash = { source = true }
check = { tcp = true }

[[experiments]]
name = "badge"
salt = "badge-1"
cookie = "uid"
coverage = 10000
variants = [{ name = "control", weight = 5000 }, { name = "treatment", weight = 5000, upstream = "next" }]

[[experiments]]
name = "hero"
header = "x-customer"
variants = [{ name = "control", weight = 5000 }, { name = "treatment", weight = 5000 }]

[[routes]]
name = "canary"
hosts = ["canary.example"]
backends = [{ upstream = "orders", weight = 95 }, { upstream = "next", weight = 5 }]
rewrite = { host = "orders.internal", prefix = "/v2" }
request_headers = { set = { "x-edge" = "1" }, add = { "via" = "edge" }, remove = ["x-internal"] }
response_headers = { set = { "x-frame-options" = "DENY" }, add = { "vary" = "Origin" }, remove = ["server"] }
mirror = { upstream = "shadow", percent = 10, body_max_bytes = 65536 }
experiments = ["badge", "hero"]
request_timeout_ms = 5000
try_timeout_ms = 1000

[[routes]]
name = "items"
hosts = ["items.example"]
path = { regex = "/items/[0-9]+" }
methods = ["GET"]
headers = [{ name = "x-beta", exact = "1" }, { name = "x-version", regex = "1|2" }]
query = [{ name = "v", exact = "2" }, { name = "w", regex = "[23]" }]
upstream = "next"
rewrite = { path = "/item" }

[[routes]]
name = "old"
hosts = ["old.example"]
redirect = { scheme = "https", host = "www.shop.example", port = 8443, prefix = "/v2", status = 301 }
[[routes.matches]]
path = { prefix = "/old" }
[[routes.matches]]
path = { prefix = "/older" }
methods = ["GET"]
headers = [{ name = "x-beta", exact = "1" }, { name = "x-version", regex = "1|2" }]
query = [{ name = "v", exact = "2" }, { name = "w", regex = "[23]" }]

[[routes]]
name = "oldest"
hosts = ["oldest.example"]
redirect = { path = "/new" }
matches = [{ path = { exact = "/a" } }, { path = { regex = "/b+" } }]

[[routes]]
name = "orders-create"
service = "commerce"
tenant = { header = "X-Tenant", default = "public" }
listeners = ["public"]
hosts = ["shop.example", "*.shop.example"]
path = { prefix = "/api/v1/orders" }
methods = ["POST"]
upstream = "orders"

[[routes]]
name = "health"
tenant = "ops"
path = { exact = "/healthz" }
upstream = "orders"

[[routes]]
name = "rest"
tenant = { host = "{tenant}.shop.example", path = "/t/{tenant}" }
upstream = "orders"

[[classes]]
name = "internet"
cidrs = ["0.0.0.0/0", "::/0"]
[[classes]]
name = "zone-b"
cidrs = ["10.2.0.0/16"]

[prices]
currency = "USD"
[[prices.rates]]
id = "internet-out"
leg = "client"
direction = "tx"
price = "0.09"
unit_bytes = 1073741824
"#;

/// Every field of protection, TLS, authentication and content.
const EDGE: &str = include_str!("tests/edge.toml");

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("edgemeter-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn full(test: &str) -> (Folder, Config) {
    let folder = Folder::new(test);
    folder.write("cert.pem", "-----BEGIN CERTIFICATE-----\n");
    folder.write("push.secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    folder.write("push.token", "t");
    folder.write("key.pem", "-----BEGIN EC PRIVATE KEY-----\n");
    let path = folder.write("edgemeter.toml", FULL);
    match Config::load(path) {
        Ok(config) => (folder, config),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_full_file_becomes_types() {
    let (folder, config) = full("types");
    assert_eq!(config.gateway.threads.get(), 2);
    assert_eq!(config.gateway.grace, Duration::from_secs(10));
    let observe = config.observe.unwrap();
    assert_eq!(observe.interfaces, ["edge0", "svc0"]);
    assert_eq!(observe.exclude, ["veth*"]);
    let places: Vec<&Path> = observe
        .namespaces
        .iter()
        .map(|n| n.path.as_path())
        .collect();
    let expected = ["/run/netns/blue", "/proc/4711/ns/net"].map(Path::new);
    assert_eq!(places, expected);
    assert_eq!(observe.attach, Attach::Tcx);
    assert_eq!(observe.kernel_log, KernelLog::Warn);
    let classes: Vec<&str> = config.classes.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(classes, ["internet", "zone-b"]);
    assert_eq!(config.classes[1].cidrs[0].to_string(), "10.2.0.0/16");
    let log = config.access_log.unwrap();
    let path = "/var/log/edgemeter/access.jsonl".into();
    assert_eq!(log.target, AccessLogTarget::File(path));
    let tls = config.listeners[1].tls.as_ref().unwrap();
    assert_eq!(tls.pair.certificate, folder.0.join("cert.pem"));
    assert_eq!(tls.pair.key, folder.0.join("key.pem"));
    let weights = config.upstreams[0]
        .peers
        .iter()
        .map(|peer| peer.weight.get());
    assert!(weights.eq([1, 2]));
    let [canary, items, old, oldest, create, health, rest] = &config.routes[..] else {
        panic!("{:?}", config.routes);
    };
    assert!(create.upstreams().eq([UpstreamIndex(0)]));
    assert_eq!(create.listeners, [ListenerIndex(0)]);
    assert_eq!(
        create.hosts[1],
        HostPattern::Wildcard(".shop.example".into())
    );
    assert_eq!(
        create.matches[0].path,
        PathPattern::Prefix("/api/v1/orders".into())
    );
    assert_eq!(create.matches[0].methods, [http::Method::POST]);
    let TenantRule::Header { header, default } = &create.tenant else {
        panic!("{:?}", create.tenant);
    };
    assert_eq!((header.as_str(), default.as_str()), ("x-tenant", "public"));
    assert_eq!(health.tenant, TenantRule::Fixed(Name::new("ops").unwrap()));
    assert_eq!(health.service.as_str(), "orders");
    assert_eq!(rest.listeners, [ListenerIndex(0), ListenerIndex(1)]);
    assert_eq!(rest.matches[0].path, PathPattern::Prefix("".into()));
    let Action::Forward { backends, rewrite } = &canary.action else {
        panic!("{canary:?}");
    };
    assert!(backends.iter().map(|backend| backend.weight).eq([95, 5]));
    assert_eq!(rewrite.path, Some(PathEdit::Prefix("/v2".into())));
    assert_eq!(canary.request_headers.remove, ["x-internal"]);
    assert_eq!(canary.experiments, [ExperimentIndex(0), ExperimentIndex(1)]);
    assert_eq!(canary.request_timeout, Some(Duration::from_secs(5)));
    assert!(
        items.matches[0].headers[1].1.is_match("2")
            && !items.matches[0].headers[1].1.is_match("12")
    );
    assert_eq!((old.matches.len(), oldest.matches.len()), (2, 2));
    let Action::Redirect(redirect) = &old.action else {
        panic!("{old:?}");
    };
    assert_eq!(
        (redirect.scheme, redirect.port, redirect.status),
        (Some("https"), Some(8443), 301)
    );
    assert_eq!(
        config.upstreams[1].peers[0].address.to_string(),
        "next.internal:9000"
    );
    assert_eq!(config.experiments[1].salt.as_ref(), "hero");
    assert_eq!(
        config.experiments[0].variants[1].upstream,
        Some(UpstreamIndex(1))
    );
    let prices = config.prices.unwrap();
    let out = prices.find(Leg::Client, Direction::Tx).unwrap();
    assert_eq!(out.rate.cost(1_u64 << 30).unwrap().to_string(), "0.09");
    assert!(prices.find(Leg::Upstream, Direction::Tx).is_none());
}

#[test]
fn the_listing_is_short() {
    let (_folder, config) = full("listing");
    let expected = "\
gateway     state /var/lib/edgemeter, 2 threads, grace 10s
admin       127.0.0.1:9901
observe     edge0 svc0 without veth* and in blue and in proc-4711-ns-net, boundary edge0 (Tcx, every 1s)
access log  /var/log/edgemeter/access.jsonl
listener    public 0.0.0.0:8080 http/1.1 h2c
listener    secure [::]:8443 tls http/1.1 h2
upstream    orders http/1.1 -> 10.77.2.2:9000, 10.77.2.3:9000 x2
upstream    next http/1.1 -> next.internal:9000
upstream    shadow http/1.1 -> 10.77.2.4:9000
route       canary on public,secure: * canary.example/* -> orders x95, next x5 (service orders, tenant none)
route       items on public,secure: GET items.example ~/items/[0-9]+ and 4 more -> next (service next, tenant none)
route       old on public,secure: * old.example/old/* or GET old.example/older/* and 4 more -> redirect 301 (service old, tenant none)
route       oldest on public,secure: * oldest.example/a or * oldest.example ~/b+ -> redirect 302 (service oldest, tenant none)
route       orders-create on public: POST shop.example,*.shop.example/api/v1/orders/* -> orders (service commerce, tenant header x-tenant or public)
route       health on public,secure: * */healthz -> orders (service orders, tenant ops)
route       rest on public,secure: * */* -> orders (service orders, tenant host {tenant}.shop.example, path /t/{tenant} or none)
class       internet: 0.0.0.0/0 ::/0
class       zone-b: 10.2.0.0/16
price       internet-out client tx: 0.09 USD per 1073741824 bytes
";
    assert_eq!(config.listing(), expected);
}

/// The least a file can say, one line each, for bad files to differ from.
const SMALL: &str = r#"[[listeners]]
name = "public"
address = "0.0.0.0:8080"
[[upstreams]]
name = "orders"
peers = ["10.0.0.2:9000"]
[[routes]]
name = "all"
upstream = "orders"
"#;

#[test]
fn what_is_left_out_has_its_documented_default() {
    let config = Config::parse(SMALL, "small.toml").unwrap();
    assert_eq!(config.gateway.state_dir, Path::new("/var/lib/edgemeter"));
    assert_eq!(config.gateway.grace, Duration::from_secs(10));
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:9901");
    assert!(config.observe.is_none() && config.access_log.is_none() && config.prices.is_none());
    assert!(!config.listeners[0].http2 && config.listeners[0].tls.is_none());
    let upstream = &config.upstreams[0];
    assert!(!upstream.http2);
    assert_eq!(upstream.connect_timeout, Duration::from_secs(1));
    for timeout in [
        upstream.read_timeout,
        upstream.write_timeout,
        upstream.idle_timeout,
    ] {
        assert_eq!(timeout, Duration::from_secs(30));
    }
    assert_eq!(upstream.retry.attempts, 1);
    assert_eq!(upstream.balance, Balance::LeastRequest);
    let none = TenantRule::Fixed(Name::new("none").unwrap());
    assert_eq!(config.routes[0].tenant, none);

    let more = format!("{SMALL}[observe]\ninterfaces = [\"e\"]\n[access_log]\npath = \"-\"\n");
    let config = Config::parse(&more, "small.toml").unwrap();
    let observe = config.observe.unwrap();
    assert_eq!(observe.attach, Attach::Auto);
    assert_eq!(observe.kernel_log, KernelLog::Off);
    assert_eq!(observe.bpffs, Path::new("/sys/fs/bpf/edgemeter"));
    assert_eq!(observe.flows_max, 262_144);
    assert_eq!(
        (observe.connections_max, observe.accounts_max),
        (16_384, 16_384)
    );
    assert_eq!(observe.collect_interval, Duration::from_secs(1));
    assert!(!observe.required);
    let log = config.access_log.unwrap();
    assert_eq!(log.target, AccessLogTarget::StandardOutput);
    assert_eq!((log.queue, log.settle), (65_536, Duration::from_secs(5)));

    let disabled = format!("{SMALL}[observe]\nenabled = false\n");
    assert!(
        Config::parse(&disabled, "small.toml")
            .unwrap()
            .observe
            .is_none()
    );
}

#[test]
fn relative_paths_start_at_the_file() {
    let text = format!("{SMALL}[gateway]\nstate_dir = \"state\"\n");
    let config = Config::parse(&text, "/etc/edgemeter/gateway.toml").unwrap();
    assert_eq!(config.gateway.state_dir, Path::new("/etc/edgemeter/state"));
}

#[test]
fn every_field_has_an_example_that_is_right() {
    fn fields(table: &DeTable<'_>, under: &str, into: &mut Vec<String>) {
        for (key, value) in table {
            let path = format!("{under}{}", key.get_ref());
            values(value.get_ref(), &path, into);
            into.push(path);
        }
    }
    fn values(value: &DeValue<'_>, path: &str, into: &mut Vec<String>) {
        match value {
            DeValue::Table(table) => fields(table, &format!("{path}."), into),
            DeValue::Array(array) => array
                .iter()
                .for_each(|value| values(value.get_ref(), path, into)),
            _ => {}
        }
    }
    // The one field that excludes others of the full file.
    let mut paths = vec!["prices.book".to_owned()];
    fields(DeTable::parse(FULL).unwrap().get_ref(), "", &mut paths);
    // Inside these the keys are header names.
    paths.retain(|path| !path.contains("_headers.set.") && !path.contains("_headers.add."));
    fields(DeTable::parse(EDGE).unwrap().get_ref(), "", &mut paths);
    paths.sort();
    paths.dedup();
    let mut known: Vec<&str> = all().map(|&(path, _)| path).collect();
    known.sort_unstable();
    assert_eq!(paths, known);
    for (path, line) in all() {
        let key = path.rsplit('.').next().unwrap();
        let parsed = DeTable::parse(line).unwrap();
        let header = line.starts_with('[') && line.contains(path);
        assert!(header || parsed.get_ref().contains_key(key), "{line}");
    }
    assert_eq!(
        example("prices.rates[12].id"),
        Some("id = \"internet-out\"")
    );
}

/// What people would read, without the file name.
fn complaints(text: &str) -> Vec<String> {
    match Config::parse(text, "c.toml") {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error
            .to_string()
            .lines()
            .map(|line| line.strip_prefix("c.toml:").unwrap().to_owned())
            .collect(),
    }
}

/// [`SMALL`] with one text replaced is refused with exactly this.
#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    assert_eq!(SMALL.matches(from).count(), 1, "{from}");
    assert_eq!(complaints(&SMALL.replace(from, to)).join("\n"), expected);
}

/// [`SMALL`] with this after its nine lines is refused with exactly this.
#[track_caller]
fn refused_after(more: &str, expected: &str) {
    assert_eq!(complaints(&format!("{SMALL}{more}")).join("\n"), expected);
}

#[test]
fn syntax_is_refused_where_it_breaks() {
    refused(
        r#"name = "all""#,
        r#"name = all"#,
        r#"8:8: routes[0]: string values must be quoted, expected literal string; fix: write TOML 1.x: `key = value` lines under [table] headers, text in double quotes"#,
    );
    refused(
        r#"[[routes]]"#,
        r#"[[routes]"#,
        r#"7:10: document: unclosed array table, expected `]`; fix: write TOML 1.x: `key = value` lines under [table] headers, text in double quotes"#,
    );
    refused_after(
        r#"upstream = "x"
"#,
        r#"10:1: routes[0].upstream: duplicate key; fix: keep one of the two"#,
    );
}

#[test]
fn fields_and_types_are_refused_with_the_right_ones() {
    refused(
        r#"upstream = "orders""#,
        r#"upsteam = "orders""#,
        r#"9:1: routes[0].upsteam: unknown field; known here: `name`, `service`, `tenant`, `listeners`, `hosts`, `path`, `methods`, `headers`, `query`, `matches`, `upstream`, `backends`, `redirect`, `rewrite`, `request_headers`, `response_headers`, `mirror`, `experiments`, `request_timeout_ms`, `try_timeout_ms`, `access`, `body_bytes_max`, `rate_limits`, `authentication`, `cache`, `compression`, `hints`; fix: write `upstream`"#,
    );
    refused(
        r#"peers = ["10.0.0.2:9000"]"#,
        r#"peers = "10.0.0.2:9000""#,
        r#"6:9: upstreams[0].peers: invalid type: string "10.0.0.2:9000", expected an array; fix: write `peers = ["10.0.0.2:9000"]`"#,
    );
    refused(
        r#"address = "0.0.0.0:8080""#,
        r#"address = 8080"#,
        r#"3:11: listeners[0].address: invalid type: integer `8080`, expected a string; fix: write `address = "0.0.0.0:8080"`"#,
    );
    refused(
        r#"peers = ["10.0.0.2:9000"]
"#,
        r#""#,
        r#"4:1: upstreams[0].peers: is missing; fix: add `peers = ["10.0.0.2:9000"]`"#,
    );
    refused(
        r#"["10.0.0.2:9000"]"#,
        r#"[{ address = "10.0.0.2:9000", wait = 2 }]"#,
        r#"6:39: upstreams[0].peers[0].wait: unknown field; known here: `address`, `weight`; fix: delete it"#,
    );
    refused_after(
        r#"[prices]
currency = "USD"
rates = [{ id = "a", leg = "client", direction = "tx", price = 0.09, unit_bytes = 1 }]
"#,
        r#"12:64: prices.rates[0].price: invalid type: floating point `0.09`, expected a string; fix: write `price = "0.09"`"#,
    );
}

#[test]
fn names_are_well_formed_unique_and_known() {
    refused(
        r#""all""#,
        r#""All""#,
        r#"8:8: routes[0].name: "All" is not a name; fix: write at most 64 of a-z 0-9 . _ -, beginning with a letter or digit"#,
    );
    refused_after(
        r#"[[routes]]
name = "all"
upstream = "orders"
path.exact = "/x"
"#,
        r#"11:8: routes[1].name: "all" is already in routes[0].name; fix: write another name"#,
    );
    refused_after(
        r#"[[upstreams]]
name = "orders"
peers = ["10.0.0.3:9000"]
"#,
        r#"11:8: upstreams[1].name: "orders" is already in upstreams[0].name; fix: write another name"#,
    );
    refused_after(
        r#"[[listeners]]
name = "public"
address = "0.0.0.0:8081"
"#,
        r#"11:8: listeners[1].name: "public" is already in listeners[0].name; fix: write another name"#,
    );
    refused(
        r#"upstream = "orders""#,
        r#"upstream = "oders""#,
        r#"9:12: routes[0].upstream: no upstream is named "oders"; known: `orders`; fix: write "orders""#,
    );
    refused(
        r#"upstream = "orders""#,
        r#"upstream = "billing""#,
        r#"9:12: routes[0].upstream: no upstream is named "billing"; known: `orders`; fix: add a [[upstreams]] table named "billing" or name another"#,
    );
    refused(
        r#"upstream = "orders""#,
        r#"upstream = "orders"
listeners = ["public", "private"]"#,
        r#"10:24: routes[0].listeners[1]: no listener is named "private"; known: `public`; fix: add a [[listeners]] table named "private" or name another"#,
    );
}

#[test]
fn addresses_are_sockets_and_nobody_elses() {
    refused(
        r#"0.0.0.0:8080"#,
        r#"localhost:8080"#,
        r#"3:11: listeners[0].address: "localhost:8080" is not a socket address; fix: write "127.0.0.1:8080""#,
    );
    refused(
        r#"0.0.0.0:8080"#,
        r#":8080"#,
        r#"3:11: listeners[0].address: ":8080" is not a socket address; fix: write "0.0.0.0:8080""#,
    );
    refused(
        r#"0.0.0.0:8080"#,
        r#"::1"#,
        r#"3:11: listeners[0].address: "::1" is not a socket address; fix: add a port, such as "127.0.0.1:8080" or "[::1]:8080""#,
    );
    refused(
        r#"10.0.0.2:9000"#,
        r#"orders..internal:9000"#,
        r#"6:10: upstreams[0].peers[0]: "orders..internal:9000" is not a socket address; fix: write IP:port, such as "127.0.0.1:8080"; names are not resolved"#,
    );
    refused(
        r#"10.0.0.2:9000"#,
        r#"10.0.0.2:0"#,
        r#"6:10: upstreams[0].peers[0]: port 0 cannot be connected to; fix: write the port the server listens on"#,
    );
    refused(
        r#"["10.0.0.2:9000"]"#,
        r#"[]"#,
        r#"6:9: upstreams[0].peers: is empty; fix: write such as `peers = ["10.0.0.2:9000"]`"#,
    );
    refused(
        r#"["10.0.0.2:9000"]"#,
        r#"["10.0.0.2:9000", { address = "10.0.0.2:9000", weight = 0 }]"#,
        r#"6:39: upstreams[0].peers[1].address: "10.0.0.2:9000" is already in upstreams[0].peers[0]; fix: delete it; use `weight` for a larger share
6:65: upstreams[0].peers[1].weight: 0 is out of range; fix: write a number from 1 to 1000"#,
    );
    refused(
        r#"["10.0.0.2:9000"]"#,
        r#"["10.0.0.2:9000", "10.0.0.2:9000"]"#,
        r#"6:27: upstreams[0].peers[1]: "10.0.0.2:9000" is already in upstreams[0].peers[0]; fix: delete it; use `weight` for a larger share"#,
    );
    refused_after(
        r#"[[listeners]]
name = "b"
address = "127.0.0.1:8080"
"#,
        r#"12:11: listeners[1].address: "127.0.0.1:8080" is already taken by listeners[0].address; fix: write another port"#,
    );
    refused(
        r#"0.0.0.0:8080"#,
        r#"127.0.0.1:9901"#,
        r#"3:11: listeners[0].address: "127.0.0.1:9901" is already taken by admin.listen; fix: write another port"#,
    );
}

#[test]
fn routes_are_well_formed_and_do_not_compete() {
    refused_after(
        r#"hosts = ["Shop.example:80", "a.*.b"]
"#,
        r#"10:10: routes[0].hosts[0]: "Shop.example:80" has a port, and hosts are compared without it; fix: write "shop.example"
10:29: routes[0].hosts[1]: "a.*.b" has a `*` elsewhere than in front; fix: write "*.shop.example""#,
    );
    refused_after(
        r#"hosts = []
"#,
        r#"10:9: routes[0].hosts: is empty; fix: leave it out to mean all, or name at least one"#,
    );
    refused_after(
        r#"methods = ["get", "GET", "GET"]
"#,
        r#"10:12: routes[0].methods[0]: "get" is not in capital letters; fix: write "GET"
10:26: routes[0].methods[2]: "GET" is already in the list; fix: delete it"#,
    );
    refused_after(
        r#"path = { prefix = "api" }
"#,
        r#"10:19: routes[0].path.prefix: "api" does not start with `/`; fix: write "/api""#,
    );
    refused_after(
        r#"path = { exact = "/x?y=1" }
"#,
        r#"10:18: routes[0].path.exact: "/x?y=1" contains a query or fragment, and only paths are compared; fix: write "/x""#,
    );
    refused_after(
        r#"path = { exact = "/x", prefix = "/" }
"#,
        r#"10:8: routes[0].path: has both `exact` and `prefix`; fix: write `path = { prefix = "/api" }` or `path = { exact = "/x" }`"#,
    );
    refused_after(
        r#"path = {}
"#,
        r#"10:8: routes[0].path: has neither `exact`, `prefix` nor `regex`; fix: write `path = { prefix = "/api" }` or `path = { exact = "/x" }`"#,
    );
    refused_after(
        r#"tenant = { header = "x tenant" }
"#,
        r#"10:21: routes[0].tenant.header: "x tenant" is not a header name; fix: write such as `header = "x-tenant"`"#,
    );
    refused_after(
        r#"tenant = "Big Corp"
"#,
        r#"10:10: routes[0].tenant: "Big Corp" is not a name; fix: write at most 64 of a-z 0-9 . _ -, beginning with a letter or digit"#,
    );
    refused_after(
        r#"[[routes]]
name = "again"
upstream = "orders"
path = { prefix = "/" }
"#,
        r#"10:1: routes[1]: claims the same requests as routes[0] "all": listener public, any host, path /*, any method; fix: give one of the two another host, path or method, or delete it"#,
    );
    refused_after(
        r#"hosts = ["a.example", "B.example"]
methods = ["GET", "PUT"]
[[routes]]
name = "b"
upstream = "orders"
hosts = ["b.example"]
methods = ["PUT"]
"#,
        r#"12:1: routes[1]: claims the same requests as routes[0] "all": listener public, host b.example, path /*, method PUT; fix: give one of the two another host, path or method, or delete it"#,
    );
}

#[test]
fn every_section_reports_all_it_finds() {
    refused_after(
        r#"[listeners.tls]
certificate = "no-such-cert.pem"
key = "/dev/null"
"#,
        r#"11:15: listeners[0].tls.certificate: "no-such-cert.pem" cannot be read: No such file or directory (os error 2); fix: name an existing PEM file; relative paths start at the configuration file's folder
12:7: listeners[0].tls.key: "/dev/null" holds no PEM block ending in `PRIVATE KEY-----`; fix: name a PEM file with a private key"#,
    );
    refused_after(
        r#"[gateway]
threads = 0
grace_seconds = -1
[admin]
listen = ""
"#,
        r#"11:11: gateway.threads: 0 is out of range; fix: write a number from 1 to 1024
12:17: gateway.grace_seconds: -1 is out of range; fix: write a number from 0 to 3600
14:10: admin.listen: "" is not a socket address; fix: write IP:port, such as "127.0.0.1:8080"; names are not resolved"#,
    );
    refused_after(
        r#"[observe]
"#,
        r#"10:1: observe.interfaces: is missing; fix: add `interfaces = ["eth0"]` or `enabled = false`"#,
    );
    refused_after(
        r#"[observe]
interfaces = []
"#,
        r#"11:14: observe.interfaces: is empty; fix: write `interfaces = ["eth0"]` or `enabled = false`"#,
    );
    refused_after(
        r#"[observe]
enabled = false
interfaces = ["a/b", "e", "e"]
attach = "clsat"
bpffs = "bpf"
flows_max = 1023
connections_max = 63
accounts_max = 1048577
collect_interval_ms = 49
kernel_log = "verbose"
"#,
        r#"12:15: observe.interfaces[0]: "a/b" cannot be the name of a network interface; fix: write a name that `ip link` lists, such as "eth0"
12:27: observe.interfaces[2]: "e" is already in observe.interfaces[1]; fix: delete it
13:10: observe.attach: "clsat" is not one of `auto`, `tcx`, `clsact`; fix: write "clsact"
14:9: observe.bpffs: is not an absolute path; fix: write `bpffs = "/sys/fs/bpf/edgemeter"`
15:13: observe.flows_max: 1023 is out of range; fix: write a number from 1024 to 16777216
16:19: observe.connections_max: 63 is out of range; fix: write a number from 64 to 1048576
17:16: observe.accounts_max: 1048577 is out of range; fix: write a number from 64 to 1048576
18:23: observe.collect_interval_ms: 49 is out of range; fix: write a number from 50 to 60000
19:14: observe.kernel_log: "verbose" is not one of `off`, `error`, `warn`, `info`, `debug`; fix: write one of `off`, `error`, `warn`, `info`, `debug`"#,
    );
    refused_after(
        r#"[access_log]
path = ""
queue = 0
settle_ms = 600001
"#,
        r#"11:8: access_log.path: is empty; fix: write such as `path = "-"`
12:9: access_log.queue: 0 is out of range; fix: write a number from 1 to 16777216
13:13: access_log.settle_ms: 600001 is out of range; fix: write a number from 0 to 600000"#,
    );
    refused_after(
        r#"[prices]
currency = "usd"
[[prices.rates]]
id = "a"
leg = "client"
direction = "out"
price = "0.0000000001"
unit_bytes = 0
[[prices.rates]]
id = "a"
leg = "upstream"
direction = "rx"
price = "1e3"
unit_bytes = 1
[[prices.rates]]
id = "c"
leg = "upstream"
direction = "rx"
price = "1"
unit_bytes = 1
"#,
        r#"11:12: prices.currency: "usd" is not a currency code of three capital letters; fix: write such as `currency = "USD"`
15:13: prices.rates[0].direction: "out" is not one of `tx`, `rx`; fix: write one of `tx`, `rx`
16:9: prices.rates[0].price: "0.0000000001" has more than 9 decimals; fix: write such as `price = "0.09"`
17:14: prices.rates[0].unit_bytes: 0 is out of range; fix: write a number from 1 to 9223372036854775807
19:6: prices.rates[1].id: "a" is already in prices.rates[0].id; fix: write another name
22:9: prices.rates[1].price: "1e3" is not a decimal number; fix: write such as `price = "0.09"`
24:1: prices.rates[2]: overlaps prices.rates[1]: both price `upstream` `rx`; fix: keep one rate for each leg and direction"#,
    );
}

#[test]
fn a_file_that_cannot_be_read_says_which() {
    let error = Config::load("/no/such/gateway.toml")
        .unwrap_err()
        .to_string();
    let expected = "/no/such/gateway.toml: cannot be read: No such file or directory (os error 2); \
                    fix: name a readable TOML file";
    assert_eq!(error, expected);
}

/// Broken files of every kind end in a list of problems: no panic, no endless mending, no refusal
/// without a reason.
#[test]
fn no_damage_goes_unexplained() {
    let tokens = [
        "",
        "\n",
        "[",
        "]",
        "[[",
        "{",
        "}",
        "=",
        "\"",
        "'",
        ",",
        ".",
        "#",
        "5",
        "-1",
        "1.5",
        "true",
        "é",
        "[x]",
        "[[routes]]",
        "x = 1",
        "\"x\"",
        "{}",
        "[]",
        "\u{0}",
        "\r",
        "name",
    ];
    let boundaries: Vec<usize> = FULL.char_indices().map(|(at, _)| at).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % u64::try_from(bound).unwrap()).unwrap()
    };
    for _ in 0..2_000 {
        let mut text = FULL.to_owned();
        let at = boundaries[below(boundaries.len())];
        let end = text.len().min(at + below(12));
        text.replace_range(at..end, tokens[below(tokens.len())]);
        // The certificate files do not exist, so nothing is ever accepted.
        match Config::parse(&text, "c.toml") {
            Err(ConfigError::Invalid(problems)) => assert!(!problems.is_empty(), "{text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_edge_file_becomes_types() {
    let folder = Folder::new("edge");
    folder.write("cert.pem", "-----BEGIN CERTIFICATE-----\n");
    folder.write("key.pem", "-----BEGIN EC PRIVATE KEY-----\n");
    let config = match Config::load(folder.write("edge.toml", EDGE)) {
        Ok(config) => config,
        Err(error) => panic!("{error}"),
    };
    let [plain, secure] = &config.listeners[..] else {
        panic!("{:?}", config.listeners);
    };
    assert_eq!(plain.protection, Protection::default());
    let limits = &secure.protection.limits;
    assert_eq!(limits.header_timeout, Duration::from_secs(5));
    assert_eq!(limits.body_bytes_max, Some(104_857_600));
    assert!(
        !secure
            .protection
            .access
            .permits("10.6.6.1".parse().unwrap())
    );
    let tls = secure.tls.as_ref().unwrap();
    assert_eq!(tls.versions, [TlsVersion::V1_2, TlsVersion::V1_3]);
    assert_eq!(tls.certificates.len(), 1);
    assert!(tls.client.as_ref().unwrap().required);
    let limit = &config.routes[0].policy.rate_limits[0];
    assert_eq!((limit.requests.get(), limit.burst.get()), (100, 200));
    assert_eq!(limit.key, RateKey::Client);
    let TenantRule::Certificate { part, .. } = config.routes[1].tenant else {
        panic!("{:?}", config.routes[1]);
    };
    assert_eq!(part, CertificatePart::AlternativeName);
}

#[test]
fn protection_is_refused_precisely() {
    let edge = |from: &str, to: &str| {
        assert_eq!(EDGE.matches(from).count(), 1, "{from}");
        complaints(&EDGE.replace(from, to).replace("cert.pem", "/dev/null"))
            .into_iter()
            .filter(|line| !line.contains("/dev/null") && !line.contains("key.pem"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    for (from, to, expected) in [
        (
            r#"deny = ["10.6.6.0/24"] # listener"#,
            r#"deny = ["10.6.6.0/33"]"#,
            r#"listeners[1].access.deny[0]: "10.6.6.0/33" is neither an address nor a network; fix: write such as "10.0.0.0/8" or "2001:db8::/32""#,
        ),
        (
            "headers_max = 100",
            "headers_max = 1000",
            "listeners[1].limits.headers_max: 1000 is out of range; fix: write a number from 1 to 256",
        ),
        (
            r#"key = "client""#,
            r#"key = "clients""#,
            r#"routes[0].rate_limits[0].key: "clients" is not a key to count by; fix: write "client", "tenant", "route" or "header:x-api-key""#,
        ),
        (
            r#"versions = ["1.2", "1.3"]"#,
            r#"versions = ["1.1"]"#,
            r#"listeners[1].tls.versions[0]: "1.1" is not one of `1.2`, `1.3`; fix: write "1.2""#,
        ),
        (
            r#"tenant = { claim = "tenant" }"#,
            "tenant = { default = \"x\" }",
            "routes[2].tenant: says nowhere to read the tenant from; fix: write such as `tenant = { header = \"x-tenant\", default = \"public\" }`",
        ),
    ] {
        let found = edge(from, to);
        assert!(found.ends_with(expected), "{found}");
    }
}
