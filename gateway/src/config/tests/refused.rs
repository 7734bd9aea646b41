//! What is refused, word by word as people read it.

use super::super::*;
use super::{EDGE, FULL, Folder, SMALL, complaints, refused, refused_after};

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
            "learn = true",
            "variant = \"badge=red\"",
            "routes[0].hints.early.variant: \"badge=red\" is no variant of this route's; fix: write \"experiment=variant\", of an experiment in `experiments`",
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

#[test]
fn a_key_of_another_certificate_is_refused_with_both_files() {
    let folder = Folder::new("fit");
    folder.write_pair("cert.pem", "key.pem");
    folder.write_pair("other.pem", "other-key.pem");
    let text =
        format!("{SMALL}[listeners.tls]\ncertificate = \"cert.pem\"\nkey = \"other-key.pem\"\n");
    let error = Config::load(folder.write("fit.toml", &text))
        .unwrap_err()
        .to_string();
    let (certificate, key) = (folder.0.join("cert.pem"), folder.0.join("other-key.pem"));
    let (certificate, key) = (certificate.display(), key.display());
    assert!(
        error.contains(&format!(
            "12:7: listeners[0].tls.key: \"{key}\" is not the key of \"{certificate}\"; \
             fix: name the key that \"{certificate}\" was made with"
        )),
        "{error}"
    );
}

#[test]
fn what_orders_a_certificate_needs_names_and_a_plain_listener() {
    for (acme, expected) in [
        (
            "directory = \"http://acme.example\"\ndomains = [\"shop.example\"]",
            "listeners[1].tls.acme.directory: \"http://acme.example\" is not an https:// URL",
        ),
        (
            "directory = \"https://acme.example/d\"\ndomains = [\"*.shop.example\"]",
            "listeners[1].tls.acme.domains[0]: \"*.shop.example\" is not a host name that http-01 \
             can prove",
        ),
    ] {
        let text = format!(
            "{SMALL}[[listeners]]\nname = \"secure\"\naddress = \"127.0.0.1:8443\"\n\
             [listeners.tls.acme]\n{acme}\n"
        );
        let said = complaints(&text).join("\n");
        assert!(said.contains(expected), "{said}");
    }
    let lone = format!(
        "{SMALL}[listeners.tls.acme]\ndirectory = \"https://acme.example/d\"\n\
         domains = [\"shop.example\"]\n"
    );
    let said = complaints(&lone).join("\n");
    assert!(
        said.contains("listeners: needs a plain listener, on which the server looks"),
        "{said}"
    );
}
