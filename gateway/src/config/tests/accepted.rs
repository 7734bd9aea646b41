//! What whole files become.

use std::path::Path;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::super::fields::{all, example};
use super::super::*;
use super::{EDGE, FULL, Folder, SMALL, full};

#[test]
fn a_full_file_becomes_types() {
    let (folder, config) = full("types");
    assert_eq!(config.gateway.threads.get(), 2);
    assert_eq!(config.gateway.grace, Duration::from_secs(10));
    assert_eq!(config.gateway.upgrade_timeout, Duration::from_secs(60));
    let tracing = config.tracing.unwrap();
    assert_eq!(tracing.parts_per_million, 1_000);
    assert_eq!(tracing.service_name, "edge");
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

#[test]
fn the_edge_file_becomes_types() {
    let folder = Folder::new("edge");
    folder.write_pair("cert.pem", "key.pem");
    let config = match Config::load(folder.write("edge.toml", EDGE)) {
        Ok(config) => config,
        Err(error) => panic!("{error}"),
    };
    let [plain, secure, ordered] = &config.listeners[..] else {
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
    let acme = ordered.tls.as_ref().unwrap().acme.as_ref().unwrap();
    assert_eq!(*acme.domains, [Box::<str>::from("shop.example")]);
    assert_eq!(acme.retry, Duration::from_secs(60));
    let limit = &config.routes[0].policy.rate_limits[0];
    assert_eq!((limit.requests.get(), limit.burst.get()), (100, 200));
    assert_eq!(limit.key, RateKey::Client);
    let TenantRule::Certificate { part, .. } = config.routes[1].tenant else {
        panic!("{:?}", config.routes[1]);
    };
    assert_eq!(part, CertificatePart::AlternativeName);
}
