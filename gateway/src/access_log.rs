//! The access log: one JSON line a request, with the bytes the wire carried for it.
//!
//! When a request ends, its last bytes may still wait in the send queue. So a line waits until
//! the kernel has sent every payload byte of the request once (`wire.settled`), or for the
//! configured time. Retransmits after that are in the accounts, not in the line.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::{
    config::{self, AccessLogTarget, Name},
    owner::Quality,
    slots::{Connection, RangeTicket},
    units::PayloadBytes,
};

/// How often waiting lines are looked at.
const POLL: Duration = Duration::from_millis(50);

/// A finished request.
pub struct Entry {
    /// When it ended.
    pub unix_time: SystemTime,
    /// Request id, from the client or made here.
    pub id: String,
    /// Listener name.
    pub listener: Arc<str>,
    /// Client address and port.
    pub client_address: String,
    /// Method.
    pub method: String,
    /// Host as sent.
    pub host: String,
    /// Path without the query, which may hold secrets.
    pub path: String,
    /// HTTP version.
    pub version: &'static str,
    /// None when no route matched.
    pub route: Option<Name>,
    /// None when no route matched.
    pub service: Option<Name>,
    /// Tenant.
    pub tenant: Box<str>,
    /// Status sent; 0 when none was.
    pub status: u16,
    /// From the parsed request to its end.
    pub duration: Duration,
    /// The client's variants in experiments; empty in none.
    pub variants: String,
    /// Where it was sent; None when it was not.
    pub upstream: Option<Name>,
    /// Body received.
    pub request_body: PayloadBytes,
    /// Body sent.
    pub response_body: PayloadBytes,
    /// pingora's or our words; None when all went well.
    pub error: Option<String>,
    /// The client connection; None when the kernel side does not know it.
    pub client: Option<Leg>,
    /// Every attempt at a peer, in order.
    pub attempts: Vec<Attempt>,
    /// When the line began to wait.
    pub ended: Instant,
}

/// A try at one peer.
pub struct Attempt {
    /// Where.
    pub peer: SocketAddr,
    /// When.
    pub timing: AttemptTiming,
    /// The upstream connection; None when there was none, or the kernel side does not know it.
    pub leg: Option<Leg>,
}

/// How a try went. Times are since the request's header was parsed.
#[derive(Clone, Debug, Default)]
pub struct AttemptTiming {
    /// The peer was chosen.
    pub began: Duration,
    /// It had a connection.
    pub connected: Option<Duration>,
    /// The connection came from the pool.
    pub reused: bool,
    /// The response's header was there.
    pub answered: Option<Duration>,
    /// Its status.
    pub status: Option<u16>,
    /// It was over.
    pub ended: Option<Duration>,
    /// Why it came to nothing.
    pub error: Option<String>,
}

/// One connection's part of the request.
pub struct Leg {
    /// Where the ranges are.
    pub connection: Arc<Connection>,
    /// The request's ranges.
    pub tickets: Vec<RangeTicket>,
    /// Stream offset up to which had been written when the request ended; None when not known
    /// (HTTP/2).
    pub written: Option<u64>,
    /// Wire bytes received for it.
    pub received_wire_bytes: u64,
    /// Exact, or estimated on HTTP/2.
    pub quality: Quality,
    /// Smoothed round-trip time at its end, microseconds.
    pub srtt_us: u32,
}

/// The queue to the writer.
pub struct AccessLog {
    sender: SyncSender<Message>,
    writer: Mutex<Option<JoinHandle<()>>>,
    lost: Arc<AtomicU64>,
}

enum Message {
    Line(Box<Entry>),
    Close,
}

impl AccessLog {
    /// Opens the target and starts the writer.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or no thread could be started.
    pub fn start(config: &config::AccessLog) -> io::Result<Self> {
        let target: Box<dyn Write + Send> = match &config.target {
            AccessLogTarget::StandardOutput => Box::new(io::stdout()),
            AccessLogTarget::File(path) => {
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                Box::new(
                    OpenOptions::new()
                        .create(true)
                        .append(true)
                        .open(path)
                        .map_err(|error| {
                            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
                        })?,
                )
            }
        };
        let (sender, receiver) = sync_channel(config.queue);
        let lost = Arc::new(AtomicU64::new(0));
        let settle = config.settle;
        let bound = config.queue;
        let failures = Arc::clone(&lost);
        let writer = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&receiver, target, settle, bound, &failures))?;
        Ok(Self {
            sender,
            writer: Mutex::new(Some(writer)),
            lost,
        })
    }

    /// Queues a line; a full queue loses it, countably.
    pub fn push(&self, entry: Entry) {
        if self
            .sender
            .try_send(Message::Line(Box::new(entry)))
            .is_err()
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes what is queued and ends the writer.
    pub fn close(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && self.sender.send(Message::Close).is_ok()
        {
            let _ = writer.join();
        }
    }

    /// Lines that were not written: the queue was full, or the disk.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

fn write_lines(
    receiver: &Receiver<Message>,
    target: Box<dyn Write + Send>,
    settle: Duration,
    bound: usize,
    lost: &AtomicU64,
) {
    let mut out = io::BufWriter::new(target);
    let mut waiting: Vec<Box<Entry>> = Vec::new();
    let mut open = true;
    while open || !waiting.is_empty() {
        match receiver.recv_timeout(POLL) {
            Ok(first) => {
                for message in std::iter::once(first).chain(receiver.try_iter()) {
                    match message {
                        Message::Line(entry) => waiting.push(entry),
                        // At shutdown the sockets are closed: what is not settled is written so.
                        Message::Close => open = false,
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => open = false,
        }
        // As many may wait to settle as may wait to be taken; the oldest are written as they are.
        let mut excess = waiting.len().saturating_sub(bound);
        waiting.retain(|entry| {
            let settled = entry.settled();
            let forced = excess > 0;
            excess = excess.saturating_sub(1);
            if !settled && !forced && open && entry.ended.elapsed() < settle {
                return true;
            }
            if write_line(&mut out, entry, settled).is_err() {
                lost.fetch_add(1, Ordering::Relaxed);
            }
            false
        });
        if out.flush().is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Entry {
    fn settled(&self) -> bool {
        let attempts = self.attempts.iter();
        let upstreams = attempts.filter_map(|attempt| attempt.leg.as_ref());
        self.client.iter().chain(upstreams).all(Leg::settled)
    }
}

impl Leg {
    /// True when the kernel has sent every payload byte once.
    fn settled(&self) -> bool {
        let Some((ticket, written)) = self.tickets.first().copied().zip(self.written) else {
            return true;
        };
        // A pooled connection may have gone to the next request before this one had ended.
        let end = self
            .connection
            .end_of(ticket)
            .map_or(written, |end| end.min(written));
        let expected = end.saturating_sub(ticket.offset);
        // An overwritten range will not get better by waiting.
        self.connection
            .read(ticket)
            .is_none_or(|range| range.first_payload_bytes >= expected)
    }

    fn wire(&self) -> Wire {
        let mut wire = Wire {
            received_bytes: self.received_wire_bytes,
            sent_bytes: Some(0),
            retransmits: Some(0),
            srtt_us: self.srtt_us,
            quality: self.quality.as_str(),
        };
        for ticket in &self.tickets {
            let read = self.connection.read(*ticket);
            wire.sent_bytes = wire
                .sent_bytes
                .zip(read)
                .map(|(sum, range)| sum + range.wire_bytes);
            wire.retransmits = wire
                .retransmits
                .zip(read)
                .map(|(sum, range)| sum + range.retransmit_frames);
        }
        wire
    }
}

#[derive(Serialize)]
struct Wire {
    received_bytes: u64,
    /// Null when the range was overwritten before it could be read.
    sent_bytes: Option<u64>,
    retransmits: Option<u64>,
    srtt_us: u32,
    quality: &'static str,
}

fn write_line(out: &mut impl Write, entry: &Entry, settled: bool) -> io::Result<()> {
    #[derive(Serialize)]
    struct AttemptLine<'a> {
        peer: SocketAddr,
        reused: bool,
        began_us: u128,
        connected_us: Option<u128>,
        answered_us: Option<u128>,
        ended_us: Option<u128>,
        status: Option<u16>,
        error: Option<&'a str>,
        wire: Option<Wire>,
    }
    let micros = |time: Option<Duration>| time.map(|time| time.as_micros());
    #[derive(Serialize)]
    struct Line<'a> {
        unix_ms: u128,
        id: &'a str,
        listener: &'a str,
        client: &'a str,
        method: &'a str,
        host: &'a str,
        path: &'a str,
        version: &'a str,
        route: Option<&'a str>,
        service: Option<&'a str>,
        tenant: &'a str,
        status: u16,
        duration_us: u128,
        variants: Option<&'a str>,
        request_body_bytes: u64,
        response_body_bytes: u64,
        error: Option<&'a str>,
        wire: Option<Wire>,
        wire_settled: bool,
        upstream_name: Option<&'a str>,
        upstream: Vec<AttemptLine<'a>>,
    }
    let line = Line {
        unix_ms: entry
            .unix_time
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis(),
        id: &entry.id,
        listener: &entry.listener,
        client: &entry.client_address,
        method: &entry.method,
        host: &entry.host,
        path: &entry.path,
        version: entry.version,
        route: entry.route.as_ref().map(Name::as_str),
        service: entry.service.as_ref().map(Name::as_str),
        tenant: &entry.tenant,
        status: entry.status,
        duration_us: entry.duration.as_micros(),
        variants: Some(entry.variants.as_str()).filter(|all| !all.is_empty()),
        request_body_bytes: entry.request_body.0,
        response_body_bytes: entry.response_body.0,
        error: entry.error.as_deref(),
        wire: entry.client.as_ref().map(Leg::wire),
        wire_settled: settled,
        upstream_name: entry.upstream.as_ref().map(Name::as_str),
        upstream: entry
            .attempts
            .iter()
            .map(|attempt| AttemptLine {
                peer: attempt.peer,
                reused: attempt.timing.reused,
                began_us: attempt.timing.began.as_micros(),
                connected_us: micros(attempt.timing.connected),
                answered_us: micros(attempt.timing.answered),
                ended_us: micros(attempt.timing.ended),
                status: attempt.timing.status,
                error: attempt.timing.error.as_deref(),
                wire: attempt.leg.as_ref().map(Leg::wire),
            })
            .collect(),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}
