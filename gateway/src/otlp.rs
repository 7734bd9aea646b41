//! OpenTelemetry out: spans of recorded requests and every metric, by OTLP over HTTP in protobuf.
//!
//! ```text
//! record → access log entry ──→ queue (bounded; a full one loses and counts) ──→ wait until the
//!   wire has settled → batch ──→ POST /v1/traces      registry, each interval → POST /v1/metrics
//! ```
//! Spans are made from what the access log is made from, on a thread of their own; only requests
//! that are recorded pay for a copy. What a collector does not take is tried again a few times,
//! then lost and counted.

mod message;
mod metrics;
mod spans;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use prometheus_client::registry::Registry;
use prost::Message as _;

use crate::{
    access_log::{Attempt, Entry, Leg},
    config::Tracing,
    trace::Trace,
    units::PayloadBytes,
};

/// How often waiting spans are looked at.
const POLL: Duration = Duration::from_millis(50);
/// Requests in one message.
const BATCH: usize = 256;
/// A message is tried so often, with a pause of this times the number of the try.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
/// One try.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What became of spans and metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Spans the collector took.
    pub spans_sent: AtomicU64,
    /// Requests whose spans were lost: the queue was full, or the collector did not take them.
    pub requests_lost: AtomicU64,
    /// Messages the collector did not take.
    pub failures: AtomicU64,
}

/// The way out; closed by dropping.
pub struct Exporter {
    sender: SyncSender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// What became of it all.
    pub counts: Arc<Counts>,
}

enum Message {
    Request(Box<Recorded>),
    Registry(Arc<Registry>),
    Close,
}

impl Exporter {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(config: &Tracing, instance: &str) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(config.queue);
        let counts = Arc::new(Counts::default());
        let sending = Sending {
            config: config.clone(),
            agent: ureq::Agent::config_builder()
                .timeout_global(Some(TIMEOUT))
                .http_status_as_error(false)
                .build()
                .into(),
            resource: spans::resource(&config.service_name, instance),
            counts: Arc::clone(&counts),
            started: SystemTime::now(),
            failing: false,
        };
        let thread = std::thread::Builder::new()
            .name("otlp".into())
            .spawn(move || sending.run(&receiver))?;
        Ok(Self {
            sender,
            thread: Mutex::new(Some(thread)),
            counts,
        })
    }

    /// Queues a finished request; a full queue loses it, countably. One that is not recorded is
    /// none.
    pub fn push(&self, entry: &Entry<'_>) {
        let Some(recorded) = Recorded::of(entry) else {
            return;
        };
        let message = Message::Request(Box::new(recorded));
        if self.sender.try_send(message).is_err() {
            self.counts.requests_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends this registry's metrics, each interval from now on.
    pub fn export_metrics(&self, registry: &Arc<Registry>) {
        let _ = self.sender.send(Message::Registry(Arc::clone(registry)));
    }

    /// Sends what is queued, and ends.
    pub fn close(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && self.sender.send(Message::Close).is_ok()
        {
            let _ = thread.join();
        }
    }
}

/// A finished request that is recorded: what of the access log's entry its spans need.
struct Recorded {
    trace: Trace,
    trace_state: String,
    unix_time: SystemTime,
    duration: Duration,
    id: String,
    listener: String,
    client: String,
    method: String,
    host: String,
    path: String,
    version: &'static str,
    route: Option<String>,
    service: Option<String>,
    tenant: String,
    status: u16,
    upstream: Option<String>,
    request_body: PayloadBytes,
    response_body: PayloadBytes,
    error: Option<String>,
    client_leg: Option<Leg>,
    attempts: Vec<Attempt>,
    /// When it began to wait for the wire.
    ended: Instant,
}

impl Recorded {
    /// None when it is not recorded.
    fn of(entry: &Entry<'_>) -> Option<Self> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Self {
            trace: entry.trace?.clone(),
            trace_state: entry.trace_state.unwrap_or_default().to_owned(),
            unix_time: entry.unix_time,
            duration: entry.duration,
            id: entry.id.to_owned(),
            listener: entry.listener.to_owned(),
            client: entry.client.to_string(),
            method: entry.method.to_owned(),
            host: entry.host.to_owned(),
            path: entry.path.to_owned(),
            version: entry.version,
            route: owned(entry.route),
            service: owned(entry.service),
            tenant: entry.tenant.to_owned(),
            status: entry.status,
            upstream: owned(entry.upstream),
            request_body: entry.request_body,
            response_body: entry.response_body,
            error: owned(entry.error),
            client_leg: entry.client_leg.clone(),
            attempts: entry.attempts.clone(),
            ended: Instant::now(),
        })
    }

    /// True when the kernel has sent every payload byte of it once.
    fn settled(&self) -> bool {
        let upstreams = self.attempts.iter().filter_map(|at| at.leg.as_ref());
        self.client_leg.iter().chain(upstreams).all(Leg::settled)
    }
}

struct Sending {
    config: Tracing,
    agent: ureq::Agent,
    resource: message::Resource,
    counts: Arc<Counts>,
    started: SystemTime,
    failing: bool,
}

impl Sending {
    fn run(mut self, receiver: &Receiver<Message>) {
        let mut waiting: Vec<Box<Recorded>> = Vec::new();
        let mut registry: Option<Arc<Registry>> = None;
        let mut metrics_at = Instant::now() + self.config.metrics_interval;
        let mut open = true;
        while open {
            let mut take = |message| match message {
                Message::Request(entry) => waiting.push(entry),
                Message::Registry(given) => registry = Some(given),
                Message::Close => open = false,
            };
            match receiver.recv_timeout(POLL) {
                Ok(first) => {
                    take(first);
                    // The rest stays in the queue, whose bound is the only one.
                    receiver.try_iter().take(BATCH).for_each(take);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            let settle = self.config.settle;
            let excess = waiting.len().saturating_sub(self.config.queue);
            let mut place = 0;
            let ready: Vec<Box<Recorded>> = waiting
                .extract_if(.., |recorded| {
                    place += 1;
                    let old = place <= excess || recorded.ended.elapsed() >= settle;
                    !open || old || recorded.settled()
                })
                .collect();
            for batch in ready.chunks(BATCH) {
                self.send_spans(batch);
            }
            if let Some(registry) = &registry
                && (Instant::now() >= metrics_at || !open)
            {
                metrics_at = Instant::now() + self.config.metrics_interval;
                self.send_metrics(registry);
            }
        }
    }

    fn send_spans(&mut self, batch: &[Box<Recorded>]) {
        let request = spans::request(&self.resource, batch);
        let spans = spans::count(&request);
        if self.send("/v1/traces", &request.encode_to_vec()) {
            self.counts.spans_sent.fetch_add(spans, Ordering::Relaxed);
        } else {
            self.counts
                .requests_lost
                .fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
    }

    fn send_metrics(&mut self, registry: &Registry) {
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, registry).is_err() {
            return;
        }
        let now = SystemTime::now();
        let request = metrics::request(&self.resource, &text, self.started, now);
        self.send("/v1/metrics", &request.encode_to_vec());
    }

    /// False when the collector did not take it.
    fn send(&mut self, path: &str, body: &[u8]) -> bool {
        let url = format!("{}{path}", self.config.endpoint);
        let mut why = String::new();
        for attempt in 1..=TRIES {
            let sent = self
                .agent
                .post(&url)
                .header("content-type", "application/x-protobuf")
                .send(body);
            match sent {
                Ok(answer) if answer.status().is_success() => {
                    if std::mem::take(&mut self.failing) {
                        log::info!("{url}: taken again");
                    }
                    return true;
                }
                Ok(answer) => {
                    why = format!("answered {}", answer.status());
                    // What OTLP calls retryable; anything else will not get better.
                    if !matches!(answer.status().as_u16(), 429 | 502..=504) {
                        break;
                    }
                }
                Err(error) => why = error.to_string(),
            }
            std::thread::sleep(PAUSE * attempt);
        }
        self.counts.failures.fetch_add(1, Ordering::Relaxed);
        if !std::mem::replace(&mut self.failing, true) {
            log::warn!("{url}: {why}; what it does not take is lost");
        }
        false
    }
}
