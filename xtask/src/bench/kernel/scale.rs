//! A million flows, fifty thousand new ones a second, and what the collector takes meanwhile.

use std::fmt::Write as _;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::frames::{self, Kind};
use super::observer::{Listing, Observer};
use super::packets::{hundredths, ratio};
use super::{Amount, Frames, streams};
use crate::bench::accounting;
use crate::bench::site::Site;
use crate::netns::{GATEWAY_TO_CLIENT, Namespace};

const MILLION: u32 = 1_000_000;
/// Where datagrams are taken, and where nobody listens.
const SINK: u16 = 9_900;
const CLOSED: u16 = 9_901;
/// New connections a second that churn aims at.
const CHURN: u32 = 50_000;
/// Flows at which the collector is measured, and frames a second over all of them.
const LIVE: u32 = 100_000;
const LIVE_FRAMES: u32 = 10_000;

pub(super) fn measure(site: &Site, amount: &Amount) -> Result<String> {
    Frames::Large.set(site)?;
    let hosts = &site.hosts;
    // So that answers to the made-up sources find their way.
    let way = GATEWAY_TO_CLIENT.far_v4.to_string();
    hosts.gateway.ip(&[
        "route",
        "replace",
        frames::SOURCES,
        "via",
        &way,
        "dev",
        GATEWAY_TO_CLIENT.device,
    ])?;
    let mut text = String::from("### Scale\n\n");
    for part in [million, full_table, attempts, connections, collector] {
        text.push_str(&part(site, amount)?);
        text.push('\n');
    }
    Ok(text)
}

fn million(site: &Site, _: &Amount) -> Result<String> {
    let observer = Observer::start(site, 1 << 20)?;
    let sink = Sink::listen(&site.hosts.gateway)?;
    let before = observer.flows()?;
    let sent = far_frames(site)?;
    let took = frames::send(&site.hosts.client, Kind::Datagram, 0..MILLION, SINK, None)?;
    settle(site)?;
    let sent = far_frames(site)? - sent;
    let mut listings = vec![observer.flows()?];
    for _ in 0..4 {
        listings.push(observer.flows()?);
    }
    let read_us: Vec<u64> = listings.iter().map(|listing| listing.read_us).collect();
    let listing = listings.swap_remove(0);
    drop(sink);
    let memory = observer.memory()?;
    let all: u64 = memory.values().sum();
    let flows = memory.get("FLOWS").copied().unwrap_or(0);
    let lost = i128::from(MILLION) - i128::from(listing.count - before.count);
    exact(&listing)?;
    Ok(format!(
        "**{MILLION} flows** ({sent} frames in {} ms, {} frames/s): {} in the table, {lost} lost; \
         identity {}; in no flow: {}.\n\
         Memory of the pinned maps {} MiB, of which the flow table ({} entries) {} MiB, {} B an entry. \
         A full dump by `edgemeter flows`: {} ms (median of 5: {}).\n",
        took.as_millis(),
        ratio(sent, 1_000_000_000, nanoseconds(took)),
        listing.count - before.count,
        identity(&listing),
        listing.cells(),
        all >> 20,
        1 << 20,
        flows >> 20,
        flows >> 20,
        super::median(read_us.iter().copied()).unwrap_or(0) / 1000,
        list(&read_us),
    ))
}

/// More flows than there is room for: what is too much is in a visible cell.
fn full_table(site: &Site, _: &Amount) -> Result<String> {
    const ROOM: u32 = 1 << 16;
    let observer = Observer::start(site, ROOM)?;
    let sink = Sink::listen(&site.hosts.gateway)?;
    let sent = far_frames(site)?;
    frames::send(&site.hosts.client, Kind::Datagram, 0..4 * ROOM, SINK, None)?;
    settle(site)?;
    let sent = far_frames(site)? - sent;
    let listing = observer.flows()?;
    drop(sink);
    exact(&listing)?;
    Ok(format!(
        "**Four times more flows than the table holds** ({sent} frames, {ROOM} entries): {} in the \
         table; in no flow: {}; identity {}.\n",
        listing.count,
        listing.cells(),
        identity(&listing),
    ))
}

/// SYN in, RST out, each of a new tuple.
fn attempts(site: &Site, amount: &Amount) -> Result<String> {
    let observer = Observer::start(site, 1 << 21)?;
    let count = (CHURN * amount.seconds).min(1 << 21);
    let sent = far_frames(site)?;
    let took = frames::send(&site.hosts.client, Kind::Syn, 0..count, CLOSED, Some(CHURN))?;
    settle(site)?;
    let sent = far_frames(site)? - sent;
    let listing = observer.flows()?;
    exact(&listing)?;
    Ok(format!(
        "**Churn of attempts** (SYN in, RST out; {CHURN}/s asked for): {} a second for {} s, {sent} \
         SYN frames; {} flows, {} lost; in no flow: {}; identity {}.\n",
        ratio(u64::from(count), 1_000_000_000, nanoseconds(took)),
        took.as_secs(),
        listing.count,
        i128::from(count) - i128::from(listing.count),
        listing.cells(),
        identity(&listing),
    ))
}

/// Whole connections: handshake, 200 bytes, 1000 bytes, close.
fn connections(site: &Site, amount: &Amount) -> Result<String> {
    let observer = Observer::start(site, 1 << 20)?;
    // Below the number of a client's ports towards one of the server's.
    let mut took = Duration::ZERO;
    let (mut count, mut tuples) = (0u64, 0u64);
    let mut port = 20_000;
    while took < Duration::from_secs(u64::from(amount.seconds)) {
        let short = streams::connections(&site.hosts, 20_000, port)?;
        took += short.took;
        tuples += short.tuples;
        count += 20_000;
        port += 2;
    }
    settle(site)?;
    let listing = observer.flows()?;
    exact(&listing)?;
    Ok(format!(
        "**Churn of whole connections** (handshake, 200 B, 1000 B, close; as fast as both ends on \
         this machine go): {} a second for {} s; {} connections of {tuples} tuples, {} flows, {} lost; in no flow: {}; \
         identity {}.\n",
        ratio(count, 1_000_000_000, nanoseconds(took)),
        took.as_secs(),
        count,
        listing.count,
        i128::from(tuples) - i128::from(listing.count),
        listing.cells(),
        identity(&listing),
    ))
}

/// Flows that live: each has a frame every ten seconds.
fn collector(site: &Site, amount: &Amount) -> Result<String> {
    let observer = Observer::start(site, 1 << 18)?;
    let sink = Sink::listen(&site.hosts.gateway)?;
    let client = &site.hosts.client;
    frames::send(client, Kind::Datagram, 0..LIVE, SINK, None)?;
    let pid = observer.pid();
    let used = || -> Result<(u64, u64)> {
        Ok((
            accounting::thread_ns(pid, "collector")?,
            accounting::cpu_ns(pid)?,
        ))
    };
    let began = Instant::now();
    let before = used()?;
    // Longer than a walk through the table takes.
    let seconds = amount.seconds.max(20);
    let mut first = 0;
    while began.elapsed() < Duration::from_secs(seconds.into()) {
        let next = first + LIVE_FRAMES;
        frames::send(client, Kind::Datagram, first..next, SINK, Some(LIVE_FRAMES))?;
        first = next % LIVE;
    }
    let elapsed = nanoseconds(began.elapsed());
    let after = used()?;
    let listing = observer.flows()?;
    drop(sink);
    let share = |from: u64, to: u64| hundredths(ratio(to - from, 10_000, elapsed).cast_signed());
    Ok(format!(
        "**Collector at {} live flows**, {LIVE_FRAMES} frames/s over all of them, {seconds} s: the \
         collector's thread {} % of a core, the whole process {} %.\n",
        listing.count,
        share(before.0, after.0),
        share(before.1, after.1),
    ))
}

/// Takes datagrams, so that none is an error.
struct Sink {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn listen(host: &Namespace) -> Result<Self> {
        let socket = host
            .run(|| UdpSocket::bind((GATEWAY_TO_CLIENT.v4, SINK)))?
            .context("a socket for datagrams")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                let _ = socket.recv(&mut datagram);
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Frames the client's end has sent.
fn far_frames(site: &Site) -> Result<u64> {
    Ok(super::beside::sent(&site.hosts.client, GATEWAY_TO_CLIENT.far_device)?.frames)
}

/// Until nothing moves any more.
fn settle(site: &Site) -> Result<()> {
    let mut last = u64::MAX;
    loop {
        let now = far_frames(site)?;
        if now == last {
            return Ok(());
        }
        last = now;
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn exact(listing: &Listing) -> Result<()> {
    ensure!(
        listing.difference() == 0,
        "the identity misses {} bytes: {:?}",
        listing.difference(),
        listing.identities
    );
    Ok(())
}

/// "received 60 = 60 + 0, sent …: exact".
fn identity(listing: &Listing) -> String {
    let mut text = String::new();
    for direction in ["received", "sent"] {
        if let Some(identity) = listing.of(direction)
            && identity.total != 0
        {
            let cells: u64 = identity.cells.values().sum();
            let _ = write!(
                text,
                "{direction} {} B = flows {} B + cells {cells} B, ",
                identity.total, identity.flows,
            );
        }
    }
    let _ = write!(text, "difference {} B", listing.difference());
    text
}

fn list(values: &[u64]) -> String {
    let values: Vec<String> = values.iter().map(|us| (us / 1000).to_string()).collect();
    values.join(", ")
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
