//! The access log: one JSON line a request, with the bytes the wire carried for it.
//!
//! The worker that ends a request writes its line, into a buffer that only it fills; a thread of its
//! own takes the buffers to the file, so that no worker waits for a disk and none is woken for a
//! line.
//!
//! When a request ends, its last bytes may still wait in the send queue. Such a line keeps gaps for
//! what the wire did until the kernel has sent every payload byte of the request once
//! (`wire_settled`), or for the configured time. Retransmits after that are in the accounts, not in
//! the line.

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, Thread},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    config::{self, AccessLogTarget},
    owner::Quality,
    slots::{Connection, RangeTicket},
    trace::{SpanId, Trace},
    units::PayloadBytes,
};

/// How often buffers are taken to the file, and waiting lines looked at.
const POLL: Duration = Duration::from_millis(50);
/// A buffer of this size does not wait for its turn.
const HURRY_BYTES: usize = 512 * 1024;
/// Waiting lines that are looked at with each new one.
const LOOK_MAX: usize = 8;
/// More than there are workers: the hash of a worker's thread rarely meets another's.
const SHARDS: usize = 16;

thread_local! {
    static SHARD: usize = {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(std::thread::current().id());
        usize::try_from(hash % SHARDS as u64).unwrap_or(0)
    };
}

/// A finished request.
pub struct Entry<'a> {
    /// When it ended.
    pub unix_time: SystemTime,
    /// Request id, from the client or made here.
    pub id: &'a str,
    /// Listener name.
    pub listener: &'a str,
    /// Client address and port.
    pub client: ClientAddress,
    /// Method.
    pub method: &'a str,
    /// Host as sent.
    pub host: &'a str,
    /// Path without the query, which may hold secrets.
    pub path: &'a str,
    /// HTTP version.
    pub version: &'static str,
    /// None when no route matched.
    pub route: Option<&'a str>,
    /// None when no route matched.
    pub service: Option<&'a str>,
    /// Tenant.
    pub tenant: &'a str,
    /// Status sent; 0 when none was.
    pub status: u16,
    /// From the parsed request to its end.
    pub duration: Duration,
    /// The client's variants in experiments; empty in none.
    pub variants: &'a str,
    /// Where it was sent; None when it was not.
    pub upstream: Option<&'a str>,
    /// Body received.
    pub request_body: PayloadBytes,
    /// Body sent.
    pub response_body: PayloadBytes,
    /// pingora's or our words; None when all went well.
    pub error: Option<&'a str>,
    /// The client connection; None when the kernel side does not know it.
    pub client_leg: Option<Leg>,
    /// Every attempt at a peer, in order.
    pub attempts: Vec<Attempt>,
    /// Its place in a trace; None when it is not recorded.
    pub trace: Option<&'a Trace>,
    /// What vendors said about the trace.
    pub trace_state: Option<&'a str>,
}

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAddress {
    /// The other end of the connection, or whom its PROXY header names.
    Socket(SocketAddr),
    /// Whom a trusted proxy names, without a port.
    Named(IpAddr),
    /// Nobody knows.
    Unknown,
}

impl std::fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => socket.fmt(f),
            Self::Named(ip) => ip.fmt(f),
            Self::Unknown => Ok(()),
        }
    }
}

/// A try at one peer.
#[derive(Clone)]
pub struct Attempt {
    /// Where.
    pub peer: SocketAddr,
    /// When.
    pub timing: AttemptTiming,
    /// The upstream connection; None when there was none, or the kernel side does not know it.
    pub leg: Option<Leg>,
    /// Its span; None when the request is not recorded.
    pub span: Option<SpanId>,
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
#[derive(Clone)]
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

/// Lines on their way to the file.
pub struct AccessLog {
    queue: Arc<Queue>,
    /// The writer's, to be woken when a buffer is full.
    thread: Thread,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What workers and the writer share.
struct Queue {
    shards: [Mutex<Batch>; SHARDS],
    /// Lines in the shards.
    lines: AtomicUsize,
    /// Most of them.
    bound: usize,
    closing: AtomicBool,
    lost: AtomicU64,
}

/// What one worker has written since its buffer was taken.
#[derive(Default)]
struct Batch {
    /// Whole lines.
    text: Vec<u8>,
    lines: usize,
    /// Oldest first, until looked at in vain.
    waiting: VecDeque<Waiting>,
}

/// A line that waits for its last bytes to leave.
struct Waiting {
    text: Vec<u8>,
    /// What the wire did goes there: positions in `text`, ascending.
    gaps: Vec<(usize, Leg)>,
    /// Where `wire_settled` goes.
    verdict_at: usize,
    ended: Instant,
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
        let queue = Arc::new(Queue {
            shards: Default::default(),
            lines: AtomicUsize::new(0),
            bound: config.queue,
            closing: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        });
        let settle = config.settle;
        let taken = Arc::clone(&queue);
        let writer = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&taken, target, settle))?;
        Ok(Self {
            queue,
            thread: writer.thread().clone(),
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Writes a line; a full queue loses it, countably.
    pub fn push(&self, entry: Entry<'_>) {
        if self.queue.lines.fetch_add(1, Ordering::Relaxed) >= self.queue.bound {
            self.queue.lines.fetch_sub(1, Ordering::Relaxed);
            self.queue.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let full = {
            let mut batch = self.queue.shard(SHARD.with(|at| *at));
            // Before the next requests on their connections overwrite what the wire did for them.
            batch.settle(LOOK_MAX, |_| false);
            if entry.settled() {
                write_line(&mut batch.text, entry, &mut Settled);
                batch.lines += 1;
            } else {
                let mut line = Waiting {
                    text: Vec::with_capacity(512),
                    gaps: Vec::new(),
                    verdict_at: 0,
                    ended: Instant::now(),
                };
                let mut text = std::mem::take(&mut line.text);
                write_line(&mut text, entry, &mut line);
                line.text = text;
                batch.waiting.push_back(line);
            }
            batch.text.len() > HURRY_BYTES
        };
        if full {
            self.thread.unpark();
        }
    }

    /// Writes what is queued and ends the writer.
    pub fn close(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.queue.closing.store(true, Ordering::Release);
        self.thread.unpark();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }

    /// Lines that were not written: the queue was full, or the disk.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.lost.load(Ordering::Relaxed)
    }
}

impl Queue {
    fn shard(&self, at: usize) -> MutexGuard<'_, Batch> {
        self.shards[at]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    /// Looks at so many of the lines that wait; those that are settled, or must be, wait no more.
    fn settle(&mut self, most: usize, must: impl Fn(&Waiting) -> bool) {
        for _ in 0..most.min(self.waiting.len()) {
            let Some(line) = self.waiting.pop_front() else {
                return;
            };
            let settled = line.settled();
            if settled || must(&line) {
                line.write(&mut self.text, settled);
                self.lines += 1;
            } else {
                self.waiting.push_back(line);
            }
        }
    }
}

fn write_lines(queue: &Queue, mut target: Box<dyn Write + Send>, settle: Duration) {
    let mut text = Vec::new();
    loop {
        let closing = queue.closing.load(Ordering::Acquire);
        for at in 0..SHARDS {
            let lines = {
                let mut batch = queue.shard(at);
                // At shutdown the sockets are closed: what is not settled is written so. As it is
                // where half of what may be queued waits.
                let forced = closing || batch.waiting.len() > queue.bound / 2;
                batch.settle(usize::MAX, |line| forced || line.ended.elapsed() >= settle);
                std::mem::swap(&mut batch.text, &mut text);
                std::mem::take(&mut batch.lines)
            };
            queue.lines.fetch_sub(lines, Ordering::Relaxed);
            if lines == 0 {
                continue;
            }
            let written = target.write_all(&text).and_then(|()| target.flush());
            if written.is_err() {
                queue.lost.fetch_add(lines as u64, Ordering::Relaxed);
            }
            text.clear();
        }
        if closing {
            return;
        }
        std::thread::park_timeout(POLL);
    }
}

impl Entry<'_> {
    fn settled(&self) -> bool {
        let attempts = self.attempts.iter();
        let upstreams = attempts.filter_map(|attempt| attempt.leg.as_ref());
        self.client_leg.iter().chain(upstreams).all(Leg::settled)
    }
}

impl Leg {
    /// True when the kernel has sent every payload byte once.
    pub(crate) fn settled(&self) -> bool {
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

    /// Wire bytes and retransmitted frames sent; None when the range was overwritten before it
    /// could be read.
    pub(crate) fn sent(&self) -> (Option<u64>, Option<u64>) {
        let (mut sent, mut retransmits) = (Some(0), Some(0));
        for ticket in &self.tickets {
            let read = self.connection.read(*ticket);
            sent = sent.zip(read).map(|(sum, range)| sum + range.wire_bytes);
            retransmits = retransmits
                .zip(read)
                .map(|(sum, range)| sum + range.retransmit_frames);
        }
        (sent, retransmits)
    }

    /// What the wire did.
    fn write(&self, out: &mut Vec<u8>) {
        let (sent, retransmits) = self.sent();
        key(out, b"{\"received_bytes\":");
        number(out, self.received_wire_bytes);
        key(out, b",\"sent_bytes\":");
        optional(out, sent, number);
        key(out, b",\"retransmits\":");
        optional(out, retransmits, number);
        key(out, b",\"srtt_us\":");
        number(out, self.srtt_us);
        key(out, b",\"connection\":");
        number(out, self.connection.cookie());
        key(out, b",\"quality\":");
        text(out, self.quality.as_str());
        out.push(b'}');
    }
}

/// Where what the wire did goes.
trait Wires {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg);
    fn verdict(&mut self, out: &mut Vec<u8>);
}

/// All of it is known.
struct Settled;

impl Wires for Settled {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg) {
        leg.write(out);
    }

    fn verdict(&mut self, out: &mut Vec<u8>) {
        key(out, b"true");
    }
}

impl Wires for Waiting {
    fn wire(&mut self, out: &mut Vec<u8>, leg: Leg) {
        self.gaps.push((out.len(), leg));
    }

    fn verdict(&mut self, out: &mut Vec<u8>) {
        self.verdict_at = out.len();
    }
}

impl Waiting {
    fn settled(&self) -> bool {
        self.gaps.iter().all(|(_, leg)| leg.settled())
    }

    fn write(&self, out: &mut Vec<u8>, settled: bool) {
        let mut from = 0;
        let mut verdict = Some(self.verdict_at);
        for (at, leg) in &self.gaps {
            if let Some(verdict_at) = verdict.take_if(|verdict_at| *verdict_at < *at) {
                out.extend_from_slice(&self.text[from..verdict_at]);
                key(out, if settled { b"true" } else { b"false" });
                from = verdict_at;
            }
            out.extend_from_slice(&self.text[from..*at]);
            leg.write(out);
            from = *at;
        }
        if let Some(verdict_at) = verdict {
            out.extend_from_slice(&self.text[from..verdict_at]);
            key(out, if settled { b"true" } else { b"false" });
            from = verdict_at;
        }
        out.extend_from_slice(&self.text[from..]);
    }
}

fn write_line(out: &mut Vec<u8>, entry: Entry<'_>, wires: &mut impl Wires) {
    let unix = entry
        .unix_time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    key(out, b"{\"unix_ms\":");
    number(out, unix.as_millis());
    key(out, b",\"id\":");
    text(out, entry.id);
    key(out, b",\"listener\":");
    text(out, entry.listener);
    key(out, b",\"client\":");
    match entry.client {
        ClientAddress::Socket(socket) => address(out, socket),
        ClientAddress::Named(ip) => text(out, &ip.to_string()),
        ClientAddress::Unknown => text(out, ""),
    }
    for (name, value) in [
        (&b",\"method\":"[..], entry.method),
        (b",\"host\":", entry.host),
        (b",\"path\":", entry.path),
        (b",\"version\":", entry.version),
    ] {
        key(out, name);
        text(out, value);
    }
    key(out, b",\"route\":");
    optional(out, entry.route, text);
    key(out, b",\"service\":");
    optional(out, entry.service, text);
    key(out, b",\"tenant\":");
    text(out, entry.tenant);
    key(out, b",\"status\":");
    number(out, entry.status);
    key(out, b",\"duration_us\":");
    number(out, entry.duration.as_micros());
    key(out, b",\"variants\":");
    let variants = Some(entry.variants).filter(|all| !all.is_empty());
    optional(out, variants, text);
    key(out, b",\"request_body_bytes\":");
    number(out, entry.request_body.0);
    key(out, b",\"response_body_bytes\":");
    number(out, entry.response_body.0);
    key(out, b",\"error\":");
    optional(out, entry.error, text);
    key(out, b",\"trace\":");
    optional(out, entry.trace, |out, trace| {
        // Writing to memory cannot fail.
        let _ = write!(out, "\"{}\"", trace.id);
    });
    key(out, b",\"wire\":");
    optional(out, entry.client_leg, |out, leg| wires.wire(out, leg));
    key(out, b",\"wire_settled\":");
    wires.verdict(out);
    key(out, b",\"upstream_name\":");
    optional(out, entry.upstream, text);
    key(out, b",\"upstream\":[");
    for (index, attempt) in entry.attempts.into_iter().enumerate() {
        let timing = &attempt.timing;
        let micros = |out: &mut Vec<u8>, time: Duration| number(out, time.as_micros());
        key(
            out,
            if index == 0 {
                b"{\"peer\":"
            } else {
                b",{\"peer\":"
            },
        );
        address(out, attempt.peer);
        key(out, b",\"reused\":");
        key(out, if timing.reused { b"true" } else { b"false" });
        key(out, b",\"began_us\":");
        micros(out, timing.began);
        for (name, time) in [
            (&b",\"connected_us\":"[..], timing.connected),
            (b",\"answered_us\":", timing.answered),
            (b",\"ended_us\":", timing.ended),
        ] {
            key(out, name);
            optional(out, time, micros);
        }
        key(out, b",\"status\":");
        optional(out, timing.status, number);
        key(out, b",\"error\":");
        optional(out, timing.error.as_deref(), text);
        key(out, b",\"wire\":");
        optional(out, attempt.leg, |out, leg| wires.wire(out, leg));
        out.push(b'}');
    }
    key(out, b"]}\n");
}

fn key(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn number(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

fn optional<T>(out: &mut Vec<u8>, value: Option<T>, write: impl FnOnce(&mut Vec<u8>, T)) {
    match value {
        Some(value) => write(out, value),
        None => key(out, b"null"),
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    let plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
    if value.bytes().all(plain) {
        out.push(b'"');
        out.extend_from_slice(value.as_bytes());
        out.push(b'"');
    } else {
        // Writing to memory cannot fail.
        let _ = serde_json::to_writer(out, value);
    }
}

fn address(out: &mut Vec<u8>, address: SocketAddr) {
    let SocketAddr::V4(v4) = address else {
        // Writing to memory cannot fail.
        let _ = write!(out, "\"{address}\"");
        return;
    };
    for (index, octet) in v4.ip().octets().into_iter().enumerate() {
        out.push(if index == 0 { b'"' } else { b'.' });
        number(out, octet);
    }
    out.push(b':');
    number(out, v4.port());
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>(path: &'a str, error: Option<&'a str>) -> Entry<'a> {
        Entry {
            unix_time: UNIX_EPOCH + Duration::from_millis(1_790_000_000_123),
            id: "7f",
            listener: "public",
            client: ClientAddress::Socket("192.0.2.1:4711".parse().unwrap()),
            method: "GET",
            host: "shop.example",
            path,
            version: "HTTP/1.1",
            route: Some("orders"),
            service: None,
            tenant: "acme",
            status: 200,
            duration: Duration::from_micros(1234),
            variants: "",
            upstream: Some("origin"),
            request_body: PayloadBytes(0),
            response_body: PayloadBytes(u64::MAX),
            error,
            client_leg: None,
            attempts: ["10.0.0.1:80", "[2001:db8::1]:443"]
                .map(|peer| Attempt {
                    peer: peer.parse().unwrap(),
                    timing: AttemptTiming {
                        connected: Some(Duration::from_micros(7)),
                        status: Some(200),
                        ..AttemptTiming::default()
                    },
                    leg: None,
                    span: None,
                })
                .into(),
            trace: None,
            trace_state: None,
        }
    }

    #[test]
    fn a_line_is_json_whatever_a_client_sends() {
        let odd = "/a\"b\\c\n\u{1}é";
        let mut out = Vec::new();
        write_line(
            &mut out,
            entry(odd, Some("upstream: \"gone\"")),
            &mut Settled,
        );
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
        let line: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(line["path"], odd);
        assert_eq!(line["client"], "192.0.2.1:4711");
        assert_eq!(line["error"], "upstream: \"gone\"");
        assert_eq!(line["unix_ms"], 1_790_000_000_123_u64);
        assert_eq!(line["response_body_bytes"], u64::MAX);
        assert_eq!(line["service"], serde_json::Value::Null);
        assert_eq!(line["variants"], serde_json::Value::Null);
        assert_eq!(line["wire_settled"], true);
        assert_eq!(line["upstream"][0]["peer"], "10.0.0.1:80");
        assert_eq!(line["upstream"][1]["peer"], "[2001:db8::1]:443");
        assert_eq!(line["upstream"][1]["connected_us"], 7);
        assert_eq!(line["upstream"][1]["ended_us"], serde_json::Value::Null);
    }

    #[test]
    fn a_full_queue_loses_lines_countably() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = AccessLog::start(&config::AccessLog {
            target: AccessLogTarget::File(path.clone()),
            queue: 5,
            settle: Duration::from_secs(1),
        })
        .unwrap();
        for _ in 0..50_000 {
            log.push(entry("/", None));
        }
        log.close();
        let written = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(log.lost() > 0);
        assert_eq!(written as u64 + log.lost(), 50_000);
    }
}
