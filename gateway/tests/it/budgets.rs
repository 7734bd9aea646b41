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
