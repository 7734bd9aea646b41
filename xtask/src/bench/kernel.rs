//! `cargo xtask bench kernel`: what the kernel programs cost, and whether they stay exact.
//!
//! Real TCP over a veth cable between namespaces, with everything on: the programs on the
//! interface, the socket programs, the collector. Four questions: what a packet costs
//! ([`packets`]), what a million flows and fifty thousand new ones a second do ([`scale`]), what an
//! event waits ([`events`]), and what others take for the same traffic ([`beside`]).

mod accountants;
mod beside;
mod events;
mod frames;
mod observer;
mod packets;
mod programs;
mod scale;
mod streams;

use anyhow::Result;
use clap::Args;

use super::site::Site;
use super::{edgemeter, machine, results};
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE};

/// How thorough.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seven rounds of more traffic, instead of three.
    #[arg(long)]
    full: bool,
    /// Only these parts: packets, scale, events, beside.
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
}

/// A part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Nanoseconds a packet.
    Packets,
    /// A million flows, churn, the collector.
    Scale,
    /// What events wait, and how many are lost.
    Events,
    /// conntrack, softflowd and pmacctd on the same traffic.
    Beside,
}

/// How much of everything.
#[derive(Clone, Copy, Debug)]
struct Amount {
    rounds: usize,
    /// Of a stream of MTU frames.
    stream_bytes: u64,
    connections: u32,
    /// Seconds of what is paced.
    seconds: u32,
}

/// What a segment looks like to the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frames {
    /// One frame each, 1514 bytes at most.
    Mtu,
    /// Up to 64 KiB, cut behind the interface.
    Large,
}

impl Frames {
    fn set(self, site: &Site) -> Result<()> {
        let (features, segments) = match self {
            Self::Mtu => ("tso off gso off gro off", "1"),
            Self::Large => ("tso on gso on gro on", "65535"),
        };
        let hosts = &site.hosts;
        let (client, service) = (GATEWAY_TO_CLIENT, GATEWAY_TO_SERVICE);
        for (host, device) in [
            (&hosts.gateway, client.device),
            (&hosts.gateway, service.device),
            (&hosts.client, client.far_device),
            (&hosts.service, service.far_device),
        ] {
            host.offloads(device, features)?;
            // TCP makes large segments whatever the interface offers, and they are cut behind TC
            // egress: unless a segment may be one frame only.
            host.ip(&["link", "set", "dev", device, "gso_max_segs", segments])?;
        }
        Ok(())
    }
}

/// Runs it and prints the tables.
///
/// # Errors
/// Something does not start, a byte is missing, or a transfer fails.
pub(super) fn run(options: &Options) -> Result<()> {
    host::require_root("cargo xtask bench kernel")?;
    host::need(&[
        Tool::CC,
        Tool::CMAKE,
        Tool::IP,
        Tool::TC,
        Tool::ETHTOOL,
        Tool::NFT,
        Tool::NSENTER,
        Tool::NGINX,
        Tool::WRK,
        Tool::CONNTRACK,
        Tool::SOFTFLOWD,
        Tool::PMACCTD,
    ])?;
    host::mount_bpffs()?;
    let binary = edgemeter::build_or(None)?;
    edgemeter::detach();
    let amount = if options.full {
        Amount {
            rounds: 7,
            stream_bytes: 4 << 30,
            connections: 40_000,
            seconds: 30,
        }
    } else {
        Amount {
            rounds: 3,
            stream_bytes: 1 << 30,
            connections: 10_000,
            seconds: 8,
        }
    };
    let command = if options.full {
        "cargo xtask bench kernel --full"
    } else {
        "cargo xtask bench kernel"
    };
    let mut text = format!(
        "`{command}`; edgemeter {}; {}\n",
        edgemeter::version()?,
        machine()
    );
    println!("{text}");
    let site = Site::start(binary, Some(Site::CONGESTION_CONTROL))?;
    let wanted = |part: Part| options.only.is_empty() || options.only.contains(&part);
    type Measure = fn(&Site, &Amount) -> Result<String>;
    let parts: [(Part, Measure); 4] = [
        (Part::Packets, packets::measure),
        (Part::Scale, scale::measure),
        (Part::Events, events::measure),
        (Part::Beside, beside::measure),
    ];
    for (part, measure) in parts {
        if wanted(part) {
            let table = measure(&site, &amount);
            edgemeter::detach();
            let table = table?;
            println!("{table}");
            text.push('\n');
            text.push_str(&table);
        }
    }
    println!("written to {}", results("kernel.md", &text)?.display());
    Ok(())
}

/// The middle one.
fn median<T: Copy + Ord>(values: impl IntoIterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}
