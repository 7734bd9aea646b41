//! A flame graph of a gateway at work.

use std::sync::atomic::{AtomicBool, Ordering};

use edgemeter::admin::client::ask;
use edgemeter::config::Config;
use xtask::exposition;

use crate::{echo::Echo, example::Example};

/// Ends the load, whatever the test comes to.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_profile_under_load_names_what_served_it_and_is_one_at_a_time() {
    let origin = Echo::start("origin");
    let gateway = Example::start("operations", &[origin.address]);
    let admin = config(&gateway).admin;
    let done = AtomicBool::new(false);
    let svg = std::thread::scope(|scope| {
        let ended = Ended(&done);
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(gateway.get("shop.example", "/a", &[]).status, 200);
                }
            });
        }
        // Two at once: one is taken, and says so to the other. On a slow machine the second may
        // come when the first is over.
        let ask_once = || ask(&admin, "GET", "/profile?seconds=3").unwrap();
        let profile = (0..5).find_map(|_| {
            let other = scope.spawn(ask_once);
            let mut both = [ask_once(), other.join().unwrap()];
            both.sort_by_key(|(status, _)| *status);
            let [taken, refused] = both;
            (refused.0 == 409 && refused.1.contains("being taken")).then_some(taken)
        });
        drop(ended);
        let (status, svg) = profile.unwrap();
        assert_eq!(status, 200, "{svg}");
        svg
    });
    assert!(svg.starts_with("<?xml") && svg.contains("<svg "), "{svg}");
    assert!(svg.ends_with("</svg>\n"));
    // What serves requests is ours, by its path or by its file, and takes much of the time.
    let titles = svg
        .split("<title>")
        .skip(1)
        .filter_map(|rest| rest.split("</title>").next());
    let ours = titles.filter(|title| {
        title.starts_with("edgemeter::proxy::") || title.contains("[gateway/src/proxy/")
    });
    let shares = ours.filter_map(|title| title.rsplit(", ").next()?.split('.').next());
    let most = shares.filter_map(|share| share.parse::<u32>().ok()).max();
    assert!(most >= Some(20), "{svg}");
    assert!(gateway.get("shop.example", "/after", &[]).status == 200);
    let taken = gateway.scrape().sum("edgemeter_profiles_total", |sample| {
        sample.label("result") == "taken"
    });
    assert!(taken >= 1);
}

#[test]
fn a_profile_needs_the_token_and_a_bounded_time() {
    let origin = Echo::start("origin");
    let gateway = Example::start("operations", &[origin.address]);
    let (status, _) = exposition::get(gateway.admin, "/profile?seconds=1").unwrap();
    assert_eq!(status, 401);
    let admin = config(&gateway).admin;
    for query in ["seconds=0", "seconds=61", "seconds=x"] {
        let (status, said) = ask(&admin, "GET", &format!("/profile?{query}")).unwrap();
        assert_eq!(
            (status, said.trim()),
            (400, "seconds must be 1 to 60"),
            "{query}"
        );
    }
    let (status, said) = ask(&admin, "GET", "/profile?minutes=1").unwrap();
    assert_eq!(status, 400, "{said}");
    let refused = gateway.scrape().sum("edgemeter_profiles_total", |sample| {
        sample.label("result") == "refused"
    });
    assert_eq!(refused, 3);
}

fn config(gateway: &Example) -> Config {
    let path = gateway.directory.path().join("edgemeter.toml");
    Config::load(path).unwrap()
}
