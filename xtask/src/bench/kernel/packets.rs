//! What one packet costs: the kernel's own count of run times under real TCP, and the same
//! programs run on one frame again and again.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

use super::observer::Observer;
use super::programs::{self, Runs};
use super::streams::{self, Sender};
use super::{Amount, Frames, frames, median};
use crate::bench::site::Site;
use crate::bench::{accounting, edgemeter, load, peers};
use crate::netns::GATEWAY_TO_CLIENT;

/// Aims of the project, nanoseconds a packet at MTU frames, received and sent.
const AIM: (u64, u64) = (150, 200);
const INGRESS: &str = "meter_ingress";
const EGRESS: &str = "meter_egress";

/// Traffic that is measured.
#[derive(Clone, Copy, Debug)]
enum Traffic {
    Stream(Frames, Sender),
    /// 1 MiB answers fetched through the gateway: ranges, claims, both cables.
    Gateway(Frames),
}

impl Traffic {
    const ALL: [Self; 6] = [
        Self::Stream(Frames::Mtu, Sender::Client),
        Self::Stream(Frames::Mtu, Sender::Host),
        Self::Gateway(Frames::Mtu),
        Self::Stream(Frames::Large, Sender::Client),
        Self::Stream(Frames::Large, Sender::Host),
        Self::Gateway(Frames::Large),
    ];

    fn frames(self) -> Frames {
        match self {
            Self::Stream(frames, _) | Self::Gateway(frames) => frames,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Stream(Frames::Mtu, Sender::Client) => "MTU frames, host receives",
            Self::Stream(Frames::Mtu, Sender::Host) => "MTU frames, host sends",
            Self::Gateway(Frames::Mtu) => "MTU frames, 1 MiB answers through the gateway",
            Self::Stream(Frames::Large, Sender::Client) => "GSO sizes, host receives",
            Self::Stream(Frames::Large, Sender::Host) => "GSO sizes, host sends",
            Self::Gateway(Frames::Large) => "GSO sizes, 1 MiB answers through the gateway",
        }
    }
}

pub(super) fn measure(site: &Site, amount: &Amount) -> Result<String> {
    let mut text = String::from("### A packet\n\n");
    let floor = programs::floor(&site.hosts.gateway)?;
    writeln!(
        text,
        "Nanoseconds a run (run_time_ns / run_cnt), data and acknowledgements together; a program \
         of two instructions takes {floor} ns by the same count, which is in every figure.\n\n\
         | traffic | ingress ns (runs) | egress ns (runs) | other programs |\n|-|-|-|-|"
    )?;
    for traffic in Traffic::ALL {
        traffic.frames().set(site)?;
        let runs = count(site, amount, traffic)?;
        let of = |name: &str| runs.get(name).copied().unwrap_or_default();
        let (ingress, egress) = (of(INGRESS), of(EGRESS));
        let others: Vec<String> = runs
            .iter()
            .filter(|(name, runs)| *name != INGRESS && *name != EGRESS && runs.count > 0)
            .map(|(name, runs)| format!("{name} {} ns × {}", runs.each(), runs.count))
            .collect();
        writeln!(
            text,
            "| {} | {} ({}) | {} ({}) | {} |",
            traffic.name(),
            ingress.each(),
            ingress.count,
            egress.each(),
            egress.count,
            others.join(", "),
        )?;
    }
    let (received, sent) = AIM;
    writeln!(
        text,
        "\nAim at MTU frames: {received} ns received, {sent} ns sent.\n"
    )?;
    text.push_str(&hot(site)?);
    text.push_str(&loss(site, amount)?);
    Ok(text)
}

fn count(site: &Site, amount: &Amount, traffic: Traffic) -> Result<BTreeMap<String, Runs>> {
    match traffic {
        Traffic::Stream(_, sender) => {
            let observer = Observer::start(site, 1 << 18)?;
            // Connections that were there make the table warm, as on a host that runs.
            streams::stream(&site.hosts, sender, 64 << 20)?;
            let _counted = programs::count_time()?;
            let before = programs::runs(&observer.others)?;
            streams::stream(&site.hosts, sender, amount.stream_bytes)?;
            Ok(programs::between(
                &before,
                &programs::runs(&observer.others)?,
            ))
        }
        Traffic::Gateway(_) => {
            let others = programs::present()?;
            let gateway = peers::Peer::Edgemeter.start(site)?;
            let address = (GATEWAY_TO_CLIENT.v4, peers::port::PLAIN).into();
            load::await_answer(
                &site.hosts.client,
                address,
                std::time::Duration::from_secs(10),
            )?;
            let _counted = programs::count_time()?;
            let before = programs::runs(&others)?;
            load::wrk(site, false, "1m", 16, 2)?;
            let runs = programs::between(&before, &programs::runs(&others)?);
            drop(gateway);
            edgemeter::detach();
            Ok(runs)
        }
    }
}

/// `BPF_PROG_TEST_RUN` on a datagram of a flow that is there.
fn hot(site: &Site) -> Result<String> {
    let observer = Observer::start(site, 1 << 18)?;
    let interface = site.hosts.gateway.run(|| {
        let name = std::ffi::CString::new(GATEWAY_TO_CLIENT.device).unwrap_or_default();
        // SAFETY: a NUL-terminated name.
        unsafe { libc::if_nametoindex(name.as_ptr()) }
    })?;
    let run = |name: &str, kind| {
        let frame = frames::frame(kind, 0, 9);
        programs::hot(
            &observer.others,
            &site.hosts.gateway,
            name,
            &frame,
            interface,
        )
    };
    let text = format!(
        "Hot (BPF_PROG_TEST_RUN, a million times the same UDP frame, bpf_stats off): ingress {} ns, \
         egress {} ns (without a TCP socket's part).\n",
        run(INGRESS, frames::Kind::Datagram)?,
        run(EGRESS, frames::Kind::Datagram)?,
    );
    let sizes = programs::sizes(&observer.others)?;
    let sizes: Vec<String> = sizes
        .iter()
        .map(|(name, bytes)| format!("{name} {bytes}"))
        .collect();
    Ok(format!(
        "{text}Machine code, bytes: {}.\n",
        sizes.join(", ")
    ))
}

/// The same stream with the programs on and off, in turns.
fn loss(site: &Site, amount: &Amount) -> Result<String> {
    let mut text = String::from(
        "\nThroughput and CPU with the programs off and on, in alternated rounds, medians of the \
         rounds' ratios:\n\n| stream | off Mbit/s | on Mbit/s | loss % | off s/GB | added s/GB |\n|-|-|-|-|-|-|\n",
    );
    for (frames, sender, name) in [
        (Frames::Mtu, Sender::Client, "MTU frames, host receives"),
        (Frames::Mtu, Sender::Host, "MTU frames, host sends"),
        (Frames::Large, Sender::Client, "GSO sizes, host receives"),
        (Frames::Large, Sender::Host, "GSO sizes, host sends"),
    ] {
        frames.set(site)?;
        let bytes = match frames {
            Frames::Mtu => amount.stream_bytes,
            Frames::Large => 4 * amount.stream_bytes,
        };
        let mut rounds = Vec::new();
        for _ in 0..amount.rounds {
            let off = once(site, sender, bytes)?;
            let observer = Observer::start(site, 1 << 18)?;
            let on = once(site, sender, bytes)?;
            drop(observer);
            rounds.push((off, on));
        }
        let middle = |value: &dyn Fn(&(Once, Once)) -> i64| median(rounds.iter().map(value));
        // In hundredths of a percent.
        let loss =
            middle(&|(off, on)| 10_000 - (on.mbits * 10_000 / off.mbits.max(1)).cast_signed());
        let off = middle(&|(off, _)| off.mbits.cast_signed()).unwrap_or(0);
        let on = middle(&|(_, on)| on.mbits.cast_signed()).unwrap_or(0);
        let base = middle(&|(off, _)| off.ms_per_gb.cast_signed()).unwrap_or(0);
        let added = middle(&|(off, on)| on.ms_per_gb.cast_signed() - off.ms_per_gb.cast_signed());
        writeln!(
            text,
            "| {name} | {off} | {on} | {} | {} | {} |",
            hundredths(loss.unwrap_or(0)),
            thousandths(base),
            thousandths(added.unwrap_or(0)),
        )?;
    }
    Ok(text)
}

/// One stream.
#[derive(Clone, Copy, Debug)]
struct Once {
    mbits: u64,
    /// Thousandths of a second of CPU a gigabyte (10^9).
    ms_per_gb: u64,
}

fn once(site: &Site, sender: Sender, bytes: u64) -> Result<Once> {
    let busy = accounting::own_ns();
    let took = streams::stream(&site.hosts, sender, bytes)?;
    let busy = accounting::own_ns() - busy;
    let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
    Ok(Once {
        mbits: ratio(bytes * 8, 1000, nanoseconds),
        ms_per_gb: ratio(busy, 1000, bytes),
    })
}

/// `a * scale / b` without overflow.
pub(super) fn ratio(a: u64, scale: u64, b: u64) -> u64 {
    let ratio = u128::from(a) * u128::from(scale) / u128::from(b.max(1));
    u64::try_from(ratio).unwrap_or(u64::MAX)
}

/// 1234 → "12.34".
pub(super) fn hundredths(value: i64) -> String {
    let sign = if value < 0 { "-" } else { "" };
    let value = value.unsigned_abs();
    format!("{sign}{}.{:02}", value / 100, value % 100)
}

/// 1234 → "1.234".
pub(super) fn thousandths(value: i64) -> String {
    let sign = if value < 0 { "-" } else { "" };
    let value = value.unsigned_abs();
    format!("{sign}{}.{:03}", value / 1000, value % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_without_floats() {
        assert_eq!(hundredths(-1234), "-12.34");
        assert_eq!(hundredths(5), "0.05");
        assert_eq!(thousandths(1234), "1.234");
        assert_eq!(ratio(u64::MAX, 1000, u64::MAX), 1000);
        assert_eq!(ratio(1, 1, 0), 1);
    }
}
