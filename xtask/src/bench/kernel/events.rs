//! What an event waits from the kernel's stamp to the moment it is counted, and how many are lost,
//! while connections come and go.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::observer::Observer;
use super::{Amount, Frames, streams};
use crate::bench::site::Site;
use crate::exposition::{self, Exposition};
use crate::netns::GATEWAY_TO_CLIENT;

/// Connections a second, opened and closed by one client at a steady pace.
const PACED: [u32; 2] = [100, 1_000];
/// Where they go.
const PORT: u16 = 9_920;
const DELAY: &str = "edgemeter_kernel_event_delay_seconds_bucket";

pub(super) fn measure(site: &Site, amount: &Amount) -> Result<String> {
    Frames::Large.set(site)?;
    let mut text = String::from(
        "### Events\n\nFrom the kernel's own stamp to the moment an event is counted in the metrics. \
         Buckets of a histogram: a figure says \"not more than\".\n\n\
         | Connections | a second | events | half | 99 of 100 | lost |\n|-|-|-|-|-|-|\n",
    );
    for rate in PACED {
        let row = under(site, || paced(site, rate, amount.seconds))?;
        let _ = writeln!(text, "| one by one, at a steady pace {row}");
    }
    let row = under(site, || {
        let short = streams::connections(&site.hosts, amount.connections, 20_000)?;
        Ok((u64::from(amount.connections), short.took))
    })?;
    let _ = writeln!(
        text,
        "| as fast as both ends on this machine go, 200 B in, 1000 B out {row}"
    );
    Ok(text)
}

/// The rest of a row: what a load did to events. The load says how many connections it made, and in
/// what time.
fn under(site: &Site, load: impl FnOnce() -> Result<(u64, Duration)>) -> Result<String> {
    let observer = Observer::start(site, 1 << 18)?;
    let before = first_page(site)?;
    let (connections, took) = load()?;
    // The last ones are over.
    std::thread::sleep(Duration::from_millis(500));
    let after = page(site)?;
    drop(observer);
    let gained = |name: &str| after.sum(name, |_| true) - before.sum(name, |_| true);
    let (events, lost) = (
        gained("edgemeter_kernel_events_total"),
        gained("edgemeter_kernel_events_lost_total"),
    );
    ensure!(
        events + lost >= i128::from(connections),
        "{connections} connections and {events} events, {lost} lost"
    );
    let delays = Delays::between(&before, &after)?;
    let rate = u128::from(connections) * 1_000_000 / took.as_micros().max(1);
    Ok(format!(
        "| {rate} | {events} | {} | {} | {lost} |",
        delays.bound(50),
        delays.bound(99)
    ))
}

/// Once there is one.
fn first_page(site: &Site) -> Result<Exposition> {
    let began = Instant::now();
    loop {
        match page(site) {
            Err(_) if began.elapsed() < Duration::from_secs(20) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

fn page(site: &Site) -> Result<Exposition> {
    let admin = "127.0.0.1:9911".parse()?;
    let (status, text) = site
        .hosts
        .gateway
        .run(|| exposition::get(admin, "/metrics"))??;
    ensure!(status == 200, "/metrics answers {status}");
    Exposition::parse(&text)
}

/// How many events waited for at most so many nanoseconds; the last bound is infinity.
struct Delays(BTreeMap<u64, i128>);

impl Delays {
    fn between(before: &Exposition, after: &Exposition) -> Result<Self> {
        let mut counts: BTreeMap<u64, i128> = BTreeMap::new();
        for (page, sign) in [(before, -1), (after, 1)] {
            for sample in page.named(DELAY) {
                let bound = nanoseconds(sample.label("le"))
                    .with_context(|| format!("{DELAY} has no bound"))?;
                *counts.entry(bound).or_default() += sign * sample.integer();
            }
        }
        Ok(Self(counts))
    }

    /// "0.25 ms": the least bound that so many of a hundred events keep to.
    fn bound(&self, percent: i128) -> String {
        let all = self.0.get(&u64::MAX).copied().unwrap_or(0);
        let kept = |(_, count): &(&u64, &i128)| **count * 100 >= all * percent;
        match self.0.iter().find(kept) {
            Some((bound, _)) if *bound != u64::MAX => {
                let (whole, parts) = (bound / 1_000_000, bound % 1_000_000 / 1_000);
                format!("{whole}.{parts:03} ms")
            }
            _ => "more than all bounds".into(),
        }
    }
}

/// A bound in seconds, as written on the page.
fn nanoseconds(seconds: &str) -> Option<u64> {
    if seconds == "+Inf" {
        return Some(u64::MAX);
    }
    let seconds: f64 = seconds.parse().ok()?;
    u64::try_from(Duration::try_from_secs_f64(seconds).ok()?.as_nanos()).ok()
}

fn paced(site: &Site, rate: u32, seconds: u32) -> Result<(u64, Duration)> {
    let to = SocketAddr::from((GATEWAY_TO_CLIENT.v4, PORT));
    let listener = site
        .hosts
        .gateway
        .run(|| TcpListener::bind(to))?
        .context("listening")?;
    let count = rate * seconds;
    std::thread::scope(|scope| {
        let server = scope.spawn(move || -> Result<()> {
            for _ in 0..count {
                drop(listener.accept().context("accepting")?);
            }
            Ok(())
        });
        let began = Instant::now();
        site.hosts.client.run(|| -> Result<()> {
            let period = Duration::from_secs(1) / rate;
            for number in 0..count {
                let due = began + period * number;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                drop(TcpStream::connect(to).context("connecting")?);
            }
            Ok(())
        })??;
        server
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        Ok((u64::from(count), began.elapsed()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_events_keeps_to_the_least_bound_that_holds_it() {
        let page = |counts: [u32; 3]| {
            let [a, b, all] = counts;
            let text = format!(
                "{DELAY}{{event=\"open\",le=\"0.00025\"}} {a}\n\
                 {DELAY}{{event=\"open\",le=\"0.001\"}} {b}\n\
                 {DELAY}{{event=\"open\",le=\"+Inf\"}} {all}\n"
            );
            Exposition::parse(&text).unwrap()
        };
        let delays = Delays::between(&page([5, 5, 5]), &page([55, 104, 105])).unwrap();
        assert_eq!(delays.bound(50), "0.250 ms");
        assert_eq!(delays.bound(51), "1.000 ms");
        assert_eq!(delays.bound(99), "1.000 ms");
        assert_eq!(delays.bound(100), "more than all bounds");
    }
}
