//! A real gateway that meters real bytes: warned, then refused, and allowed again where the use is
//! not known.

use std::time::{Duration, Instant};

use xtask::{
    exposition,
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{PLAIN, Setup, Site};

const DEADLINE: Duration = Duration::from_secs(40);

/// One request by curl's rules, with its whole response header.
fn ask(site: &Site, path: &str) -> String {
    use std::io::{Read as _, Write as _};
    let answer = site.hosts.client.run(|| {
        let address = std::net::SocketAddr::from((GATEWAY_TO_CLIENT.v4, PLAIN));
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    });
    answer.unwrap().unwrap()
}

fn until(site: &Site, path: &str, what: &str) -> String {
    let started = Instant::now();
    loop {
        let answer = ask(site, path);
        if answer.contains(what) {
            return answer;
        }
        assert!(
            started.elapsed() < DEADLINE,
            "no {what} in {answer}: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn a_budget_warns_then_refuses_and_fails_open_when_nothing_is_metered() {
    let extra = "[[budgets]]\nname = \"small-day\"\nperiod = \"day\"\nroutes = [\"small\"]\n\
                 limit_bytes = 100000\nwarn_percent = [1]\naction = \"refuse\"\n";
    let mut site = Site::start(
        "bu",
        &Setup {
            extra: extra.into(),
            ..Setup::default()
        },
    );
    assert!(ask(&site, "/small/bytes/200").starts_with("HTTP/1.1 200"));
    let mut plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 5);
    plan.templates.truncate(1);
    load::run(&site.hosts.client, &plan).unwrap();
    let answer = until(
        &site,
        "/small/bytes/200",
        "x-edgemeter-budget: small-day; used=",
    );
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    while ask(&site, "/small/bytes/20000").starts_with("HTTP/1.1 200") {
        std::thread::sleep(Duration::from_millis(50));
    }
    let refused = until(&site, "/small/bytes/200", "429");
    assert!(refused.contains("application/problem+json"), "{refused}");
    assert!(refused.contains("budget small-day is used up"), "{refused}");
    assert!(
        refused.to_lowercase().contains("\r\nretry-after: "),
        "{refused}"
    );
    assert!(
        ask(&site, "/large/bytes/200").starts_with("HTTP/1.1 200"),
        "another route"
    );
    // It remembers over kill -9.
    site.end(libc::SIGKILL);
    site.launch();
    until(&site, "/small/bytes/200", "429");
    // Without metering nobody is refused.
    site.end(libc::SIGTERM);
    let text = std::fs::read_to_string(site.config()).unwrap();
    let text = text.replace("[observe]\n", "[observe]\nenabled = false\n");
    std::fs::write(site.config(), text).unwrap();
    site.launch();
    assert!(ask(&site, "/small/bytes/200").starts_with("HTTP/1.1 200"));
    let (_, page) = site.get("/metrics").unwrap();
    assert!(
        page.contains("edgemeter_budget_judged{budget=\"small-day\"} 0"),
        "{page}"
    );
}

/// Past its limit a route is slowed down, and nobody else is: what 100 answers of 2,000 bytes take
/// at 10,000 bytes a second is at least the time their bytes need beyond one second's worth.
#[test]
fn a_budget_slows_a_route_down_to_its_pace() {
    let extra = "[[budgets]]\nname = \"paced\"\nperiod = \"day\"\nroutes = [\"small\"]\n\
                 limit_bytes = 1000\naction = \"throttle\"\nthrottle_bytes_per_second = 20000\n";
    let site = Site::start(
        "bt",
        &Setup {
            extra: extra.into(),
            ..Setup::default()
        },
    );
    let throttled = || {
        site.scrape()
            .sum("edgemeter_budget_actions_total", |sample| {
                sample.label("budget") == "paced" && sample.label("action") == "throttled"
            })
    };
    // Its own bytes bring it past the limit.
    let started = Instant::now();
    while throttled() == 0 {
        assert!(started.elapsed() < DEADLINE, "{}", site.log());
        assert!(ask(&site, "/small/bytes/2000").starts_with("HTTP/1.1 200"));
    }
    let time = |path: &str| {
        let began = Instant::now();
        let answer = ask(&site, path);
        assert!(answer.starts_with("HTTP/1.1 200"), "slowed, not refused");
        (began.elapsed(), answer.len())
    };
    // No lower bound of ours is about the machine: a pace is a promise to be no faster.
    let (slowed, length) = time("/small/bytes/100000");
    assert!(length > 100_000, "whole: {length}");
    assert!(slowed >= Duration::from_secs(3), "{slowed:?} for 100 kB");
    let before = throttled();
    let (_, length) = time("/large/bytes/100000");
    assert!(length > 100_000);
    assert_eq!(throttled(), before, "another route is not slowed");
}

#[test]
fn the_budget_example_runs() {
    let replace = [("interfaces = [\"eth0\"]", "enabled = false")];
    let example = crate::billing::Example::run("budgets.toml", &replace, "");
    let (_, page) = exposition::get(example.admin, "/metrics").unwrap();
    assert!(
        page.contains("edgemeter_budget_judged{budget=\"acme-month\"} 0"),
        "{page}"
    );
}
