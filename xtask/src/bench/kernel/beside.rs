//! Others on the same traffic: what each takes, and what it says it saw.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use super::accountants::{Accountant, Seen};
use super::packets::{hundredths, ratio, thousandths};
use super::streams::{self, Sender};
use super::{Amount, Frames, median};
use crate::bench::accounting;
use crate::bench::site::Site;
use crate::host;
use crate::netns::{GATEWAY_TO_CLIENT, Namespace};

/// Ethernet's header, which those that count IP packets leave out.
const ETHERNET: u64 = 14;

/// What an interface has sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) bytes: u64,
    pub(super) frames: u64,
}

/// One round of one accountant.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Thousandths of a second of CPU a gigabyte, everybody's.
    ms_per_gb: i64,
    /// Mbit/s.
    mbits: i64,
    /// Nanoseconds of CPU a connection, everybody's.
    ns_per_connection: i64,
    seen: Seen,
    /// Wire bytes, by the counters of the cable's two ends: without segmentation these are exact.
    wire_bytes: u64,
    /// The same without Ethernet headers.
    ip_bytes: u64,
    flows: u64,
}

pub(super) fn measure(site: &Site, amount: &Amount) -> Result<String> {
    Frames::Mtu.set(site)?;
    let mut samples: [Vec<Sample>; Accountant::ALL.len()] = Default::default();
    let mut port = 10_000;
    for _ in 0..amount.rounds {
        for (index, accountant) in Accountant::ALL.into_iter().enumerate() {
            let sample = round(site, amount, accountant, port);
            samples[index].push(sample.with_context(|| accountant.name())?);
            port += 2;
        }
    }
    render(amount, &samples)
}

fn round(site: &Site, amount: &Amount, accountant: Accountant, port: u16) -> Result<Sample> {
    let directory = site.directory.path();
    let running = accountant.start(site)?;
    let truth = truth(site)?;
    let pids = running.pids();
    let busy = || -> Result<u64> {
        pids.iter().try_fold(accounting::own_ns(), |sum, pid| {
            Ok(sum + accounting::cpu_ns(*pid)?)
        })
    };
    let start = busy()?;
    let took = streams::stream(&site.hosts, Sender::Host, amount.stream_bytes)?;
    let streamed = busy()?;
    let short = streams::connections(&site.hosts, amount.connections, port)?;
    let connected = busy()?;
    // What is still on its way: the last acknowledgements.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let end = self::truth(site)?;
    let seen = running.finish(&site.hosts, directory)?;
    let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    let (bytes, frames) = (end.bytes - truth.bytes, end.frames - truth.frames);
    Ok(Sample {
        ms_per_gb: ratio(streamed - start, 1000, amount.stream_bytes).cast_signed(),
        mbits: ratio(amount.stream_bytes * 8, 1000, nanoseconds).cast_signed(),
        ns_per_connection: ((connected - streamed) / u64::from(amount.connections)).cast_signed(),
        seen,
        wire_bytes: bytes,
        ip_bytes: bytes - frames * ETHERNET,
        flows: short.tuples + 1,
    })
}

/// Both directions of the cable.
fn truth(site: &Site) -> Result<Sent> {
    let near = sent(&site.hosts.gateway, GATEWAY_TO_CLIENT.device)?;
    let far = sent(&site.hosts.client, GATEWAY_TO_CLIENT.far_device)?;
    Ok(Sent {
        bytes: near.bytes + far.bytes,
        frames: near.frames + far.frames,
    })
}

/// An interface's own counters.
pub(super) fn sent(host: &Namespace, device: &str) -> Result<Sent> {
    let mut ip = std::process::Command::new("ip");
    ip.args(["-n", host.name(), "-s", "-j", "link", "show", "dev", device]);
    let said = host::output(&mut ip)?;
    let said: serde_json::Value = serde_json::from_str(&said).context("what ip said")?;
    let tx = &said[0]["stats64"]["tx"];
    let of = |name: &str| tx[name].as_u64().with_context(|| format!("no {name}"));
    Ok(Sent {
        bytes: of("bytes")?,
        frames: of("packets")?,
    })
}

fn render(amount: &Amount, samples: &[Vec<Sample>]) -> Result<String> {
    let mut text = format!(
        "### Beside others\n\nMTU frames; {} rounds in turns of a stream of {} MiB from the host and {} \
         connections of 200 B and 1000 B; extra CPU beyond nobody's in the same round, median, \
         everybody's processes and the traffic's own; truth is what the cable's two ends sent.\n\n\
         | who counts | version | extra CPU s/GB | throughput loss % | extra µs a connection | bytes seen / truth | flows lost of {} |\n|-|-|-|-|-|-|-|\n",
        amount.rounds,
        amount.stream_bytes >> 20,
        amount.connections,
        amount.connections + 1,
    );
    for (index, accountant) in Accountant::ALL.into_iter().enumerate() {
        if accountant == Accountant::Nobody {
            continue;
        }
        let pairs = || samples[0].iter().zip(&samples[index]);
        let cpu = median(pairs().map(|(base, own)| own.ms_per_gb - base.ms_per_gb));
        let loss =
            median(pairs().map(|(base, own)| 10_000 - own.mbits * 10_000 / base.mbits.max(1)));
        let each =
            median(pairs().map(|(base, own)| own.ns_per_connection - base.ns_per_connection));
        let bytes = samples[index].iter().map(|sample| {
            let truth = match accountant {
                Accountant::Edgemeter => sample.wire_bytes,
                _ => sample.ip_bytes,
            };
            let difference = i128::from(sample.seen.bytes) - i128::from(truth);
            (ratio(sample.seen.bytes, 100_000, truth), difference)
        });
        let (least, difference) = bytes
            .max_by_key(|(_, difference)| difference.unsigned_abs())
            .unwrap_or_default();
        let lost = samples[index]
            .iter()
            .map(|sample| i128::from(sample.flows) - i128::from(sample.seen.flows))
            .max()
            .unwrap_or(0);
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {}.{:05} (worst round {difference:+} B) | {lost} |",
            accountant.name(),
            accountant.version()?,
            thousandths(cpu.unwrap_or(0)),
            hundredths(loss.unwrap_or(0)),
            thousandths(each.unwrap_or(0)),
            least / 100_000,
            least % 100_000,
        )?;
    }
    let base = |value: fn(&Sample) -> i64| median(samples[0].iter().map(value)).unwrap_or(0);
    writeln!(
        text,
        "\nNobody: {} s/GB, {} Mbit/s, {} µs a connection.",
        thousandths(base(|sample| sample.ms_per_gb)),
        base(|sample| sample.mbits),
        thousandths(base(|sample| sample.ns_per_connection)),
    )?;
    Ok(text)
}
