//! One request, from its first byte to its end, whatever end that is: the record accounts for
//! itself in `Drop`, so that cancellation cannot lose it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue};
use pingora::{prelude::HttpPeer, protocols::ALPN, upstreams::peer::Peer as _};

use super::{
    connection::OnConnection,
    edge::Rate,
    experiment::Assignment,
    generation::Generation,
    meter::{EndpointId, Tracked},
    mirror::MirrorCopy,
    route::{Lines, Route},
    strict::Refusal,
    token::{Claims, Refused},
    upstream::{self, Pool, limits::Admission},
};
use crate::{
    access_log::{Attempt as LoggedAttempt, AttemptTiming, ClientAddress, Entry, Leg as LoggedLeg},
    budget::Decision,
    census::{Alive, Kind},
    config::{ListenerIndex, Match, Name, UpstreamIndex},
    owner::{self, OwnerId, Quality},
    proxy::Shared,
    slots::{Hold, RangeTicket},
    trace::{SpanId, TRACEPARENT, TRACESTATE, Trace},
    units::PayloadBytes,
};

/// A request under way. pingora calls it the context.
pub struct RequestRecord {
    shared: Arc<Shared>,
    /// The configuration this request is served by, from its header to its end.
    pub(super) generation: Arc<Generation>,
    started: Instant,
    /// Set once the request line is parsed; None before, and then nothing is accounted.
    pub(super) request: Option<RequestLine>,
    pub(super) route: Option<Arc<Route>>,
    /// The match of the route that held.
    pub(super) matched: Option<Arc<Match>>,
    pub(super) tenant: Box<str>,
    pub(super) client: Option<Leg>,
    /// In experiments.
    pub(super) assignment: Assignment,
    /// Where it goes, once chosen.
    pub(super) upstream: Option<UpstreamIndex>,
    /// Its place among the upstream's requests.
    pub(super) admission: Option<Admission>,
    /// Every attempt, in order.
    pub(super) attempts: Vec<Attempt>,
    /// Peers tried in vain.
    pub(super) tried: Vec<SocketAddr>,
    /// Attempts paid for from the budget.
    pub(super) retries: usize,
    /// An answer that is worth another attempt was taken for a failure.
    pub(super) retry_answer: bool,
    /// When it must be over.
    pub(super) deadline: Option<Instant>,
    pub(super) mirror: Option<MirrorCopy>,
    pub(super) status: u16,
    pub(super) request_body: PayloadBytes,
    pub(super) response_body: PayloadBytes,
    pub(super) error: Option<String>,
    pub(super) budget: Decision,
    /// Behind trusted proxies.
    pub(super) client_ip: Option<IpAddr>,
    /// This stands for a request that was refused.
    pub(super) refused: Option<Refusal>,
    pub(super) body_bytes_max: Option<u64>,
    /// Response body bytes before compression.
    pub(super) body_before_coding: u64,
    /// It was sent a 103 of ours.
    pub(super) hinted_early: bool,
    /// The client wants nothing stored.
    pub(super) bypassed_cache: bool,
    /// What the token says, or why it is refused; None where none is asked for.
    pub(super) token: Option<Result<Claims, Refused>>,
    /// What a forward authentication service says of the client.
    pub(super) vouched: Vec<(HeaderName, HeaderValue)>,
    /// The rate limit it is closest to.
    pub(super) rate: Option<Rate>,
    /// Its place in a trace, when it is recorded.
    trace: Option<Box<(Trace, Option<String>)>>,
    /// In the census, once begun.
    alive: Option<Alive>,
    // Last, so that it is dropped when everything else is done: the next request may begin then.
    pub(super) connection: Option<OnConnection>,
}

/// What the client asked, as it goes to the access log.
pub(super) struct RequestLine {
    /// Id, host and path one after the other: one allocation a request.
    text: String,
    id_bytes: usize,
    host_bytes: usize,
    pub(super) method: http::Method,
    pub(super) version: &'static str,
    pub(super) client: ClientAddress,
    pub(super) listener: ListenerIndex,
}

impl RequestLine {
    pub(super) fn new(
        (id, host, path): (&str, &str, &str),
        method: http::Method,
        version: &'static str,
        client: ClientAddress,
        listener: ListenerIndex,
    ) -> Self {
        let mut text = String::with_capacity(id.len() + host.len() + path.len());
        for part in [id, host, path] {
            text.push_str(part);
        }
        Self {
            text,
            id_bytes: id.len(),
            host_bytes: host.len(),
            method,
            version,
            client,
            listener,
        }
    }

    /// The request's id.
    pub(super) fn id(&self) -> &str {
        &self.text[..self.id_bytes]
    }

    /// As sent.
    pub(super) fn host(&self) -> &str {
        &self.text[self.id_bytes..][..self.host_bytes]
    }

    /// Without the query.
    pub(super) fn path(&self) -> &str {
        &self.text[self.id_bytes + self.host_bytes..]
    }
}

/// One connection's part in the request.
pub(super) struct Leg {
    pub(super) tracked: Tracked,
    pub(super) owner: OwnerId,
    pub(super) quality: Quality,
    /// The ranges of sent bytes that are this request's.
    pub(super) tickets: Vec<RangeTicket>,
    /// Unclaimed bytes taken for this request so far.
    pub(super) claimed_bytes: u64,
    /// Its hold on what the connection receives; None when the request came whole.
    pub(super) hold: Option<Hold>,
    /// `received_for_owner` when the request began: streams share an HTTP/2 connection.
    pub(super) received_before: u64,
    /// Wire bytes received for it, once nothing more will come.
    pub(super) received: Option<u64>,
}

/// HTTP/2 streams share frames.
pub(super) fn attempt_quality(peer: &HttpPeer) -> Quality {
    if matches!(peer.get_alpn(), Some(ALPN::H2)) {
        Quality::Estimated
    } else {
        Quality::Exact
    }
}

/// A try at one peer. Times are since the request's header was parsed.
pub(super) struct Attempt {
    pub(super) peer: SocketAddr,
    /// Under way.
    pub(super) held: Option<upstream::Attempt>,
    pub(super) leg: Option<Leg>,
    pub(super) timing: AttemptTiming,
    /// Its own, when the request is recorded.
    span: Option<SpanId>,
}

impl RequestRecord {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            generation: shared.generation.load_full(),
            shared,
            started: Instant::now(),
            request: None,
            route: None,
            matched: None,
            tenant: "none".into(),
            client: None,
            assignment: Assignment::default(),
            upstream: None,
            admission: None,
            attempts: Vec::new(),
            tried: Vec::new(),
            retries: 0,
            retry_answer: false,
            deadline: None,
            mirror: None,
            status: 0,
            request_body: PayloadBytes(0),
            response_body: PayloadBytes(0),
            error: None,
            budget: Decision::Allow,
            client_ip: None,
            refused: None,
            body_bytes_max: None,
            body_before_coding: 0,
            hinted_early: false,
            bypassed_cache: false,
            token: None,
            vouched: Vec::new(),
            rate: None,
            trace: None,
            alive: None,
            connection: None,
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The request's header is there. Restarts the clock and takes the configuration now in
    /// force: pingora makes the context before it waits for a keep-alive request.
    pub(super) fn arrive(&mut self) {
        self.started = Instant::now();
        let now = self.shared.generation.load();
        if now.number != self.generation.number {
            self.generation = Arc::clone(&now);
        }
    }

    /// From here on the request is accounted for.
    pub(super) fn begin(&mut self, request: RequestLine) {
        let listener = &self.generation.config.listeners[request.listener.0];
        let census = &self.shared.census;
        self.alive = Some(census.enter(Kind::Request, listener.name.clone(), self.started));
        self.request = Some(request);
    }

    /// Records the request when its caller does, or chance wants it. Ask once a request.
    pub(super) fn trace(&mut self, headers: &dyn Lines) {
        let sampler = &self.shared.sampler;
        if !sampler.is_on() {
            return;
        }
        let given = headers.first(&TRACEPARENT);
        if sampler.wants(given) {
            let state = headers.first(&TRACESTATE).map(str::to_owned);
            self.trace = Some(Box::new((Trace::begin(given), state)));
        }
    }

    /// Its place in a trace, when it is recorded.
    pub(super) fn recorded(&self) -> Option<&Trace> {
        self.trace.as_ref().map(|recorded| &recorded.0)
    }

    /// The attempt under way gets a span of its own, when the request is recorded.
    pub(super) fn trace_attempt(&mut self) -> Option<SpanId> {
        self.trace.as_ref()?;
        let span = SpanId::random();
        self.attempts.last_mut()?.span = Some(span);
        Some(span)
    }

    /// The response is about to be written to an HTTP/2 connection that streams share.
    pub(super) fn take_turn(&mut self) {
        if let Some(leg) = &mut self.client
            && leg.quality == Quality::Estimated
        {
            leg.take_turn();
        }
    }

    /// A tunnel begins: what the client sends is the request's once more.
    pub(super) fn resume_client(&mut self) {
        if let Some(leg) = &mut self.client {
            let before = leg.received.take().unwrap_or_else(|| leg.received_now());
            let (hold, claimed) = leg.tracked.connection.claim(leg.owner);
            leg.hold = Some(hold);
            leg.received_before = leg.tracked.connection.received_for_owner();
            leg.claimed_bytes = before + claimed.bytes;
            self.shared
                .meter
                .post_claim(leg.tracked.owners.unclaimed, leg.owner, claimed);
        }
    }

    fn finish(&mut self) {
        let Some(request) = self.request.take() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        let elapsed = self.started.elapsed();
        let route = self.route.as_deref();
        let (sent, received) = (self.response_body, self.request_body);
        shared
            .metrics
            .request(route, self.status, elapsed, received, sent);
        let client = self.client.take().map(|leg| {
            shared
                .metrics
                .client_rtt(route, leg.tracked.connection.srtt_us());
            let leg = leg.finish(&shared);
            shared.metrics.leg(route, owner::Leg::Client, &leg);
            leg
        });
        let pool = self.pool().cloned();
        let mut attempts = Vec::with_capacity(self.attempts.len());
        for attempt in self.attempts.drain(..) {
            let leg = attempt.leg.map(|leg| {
                if let Some(pool) = &pool {
                    shared
                        .metrics
                        .upstream_rtt(pool, leg.tracked.connection.srtt_us());
                }
                let leg = leg.finish(&shared);
                shared.metrics.leg(route, owner::Leg::Upstream, &leg);
                leg
            });
            let mut timing = attempt.timing;
            timing.ended.get_or_insert(elapsed);
            attempts.push(LoggedAttempt {
                peer: attempt.peer,
                timing,
                leg,
                span: attempt.span,
            });
        }
        let recorded = self.trace.take();
        let exporter = shared.exporter.as_ref().filter(|_| recorded.is_some());
        if shared.access_log.is_some() || exporter.is_some() {
            let entry = Entry {
                unix_time: std::time::SystemTime::now(),
                id: request.id(),
                listener: self.generation.config.listeners[request.listener.0]
                    .name
                    .as_str(),
                client: request.client,
                method: request.method.as_str(),
                host: request.host(),
                path: request.path(),
                version: request.version,
                route: route.map(|route| route.name.as_str()),
                service: route.map(|route| route.service.as_str()),
                tenant: &self.tenant,
                status: self.status,
                duration: elapsed,
                variants: &self.assignment.variants,
                upstream: pool.as_ref().map(|pool| pool.settings.name.as_str()),
                request_body: self.request_body,
                response_body: self.response_body,
                error: self.error.as_deref(),
                client_leg: client,
                attempts,
                trace: recorded.as_deref().map(|(trace, _)| trace),
                trace_state: recorded.as_deref().and_then(|(_, state)| state.as_deref()),
            };
            if let Some(exporter) = exporter {
                exporter.push(&entry);
            }
            if let Some(log) = &shared.access_log {
                log.push(entry);
            }
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Leg {
    /// The request takes its connection: what comes and goes from here on is its own. With
    /// `expects_more` false the request has been received whole, and what comes next is nobody's.
    pub(super) fn begin(
        shared: &Shared,
        tracked: Tracked,
        owner: OwnerId,
        quality: Quality,
        expects_more: bool,
    ) -> Self {
        tracked.requests.fetch_add(1, Ordering::Relaxed);
        let received_before = tracked.connection.received_for_owner();
        let connection = &tracked.connection;
        let (hold, claimed) = if expects_more {
            let (hold, claimed) = connection.claim(owner);
            (Some(hold), claimed)
        } else {
            (None, connection.take_unclaimed())
        };
        shared
            .meter
            .post_claim(tracked.owners.unclaimed, owner, claimed);
        let mut leg = Self {
            tracked,
            owner,
            quality,
            tickets: Vec::new(),
            claimed_bytes: claimed.bytes,
            hold,
            received_before,
            received: (!expects_more).then_some(claimed.bytes),
        };
        if quality == Quality::Exact {
            leg.tickets
                .extend(leg.tracked.connection.begin_sending(owner));
        }
        leg
    }

    /// Everything that will be received for the request has been. Called before the other side
    /// can know that, so that the next request's bytes are not taken for this one's.
    pub(super) fn received_all(&mut self) {
        if self.received.is_none() && self.quality == Quality::Exact {
            if let Some(hold) = self.hold {
                self.tracked.connection.release(hold);
            }
            self.received = Some(self.received_now());
        }
    }

    fn received_now(&self) -> u64 {
        let connection = &self.tracked.connection;
        let held = match (self.quality, self.hold) {
            (Quality::Exact, Some(hold)) => connection.received_under(hold),
            (Quality::Exact, None) => 0,
            (Quality::Estimated, _) => connection.received_for_owner() - self.received_before,
        };
        held + self.claimed_bytes
    }

    fn take_turn(&mut self) {
        if let Some(ticket) = self.tracked.connection.continue_sending(self.owner)
            && self
                .tickets
                .last()
                .is_none_or(|last| last.offset != ticket.offset)
        {
            self.tickets.push(ticket);
        }
    }

    /// The request is over.
    pub(super) fn finish(self, shared: &Shared) -> LoggedLeg {
        let connection = &self.tracked.connection;
        let received = self.received.unwrap_or_else(|| self.received_now());
        let last = self.tracked.requests.fetch_sub(1, Ordering::Relaxed) == 1;
        if let Some(hold) = self.hold
            && last
            && self.received.is_none()
        {
            connection.release(hold);
        }
        let handshake = connection.take_handshake();
        let owners = self.tracked.owners;
        shared
            .meter
            .post_claim(owners.unclaimed, owners.overhead, handshake);
        LoggedLeg {
            written: (self.quality == Quality::Exact)
                .then(|| connection.written().ok())
                .flatten(),
            srtt_us: connection.srtt_us(),
            received_wire_bytes: received,
            quality: self.quality,
            tickets: self.tickets,
            connection: self.tracked.connection,
        }
    }
}

impl RequestRecord {
    /// A peer was chosen.
    pub(super) fn attempt(&mut self, held: upstream::Attempt, now: Instant) {
        // Seldom is there a second one.
        self.attempts.reserve_exact(1);
        self.attempts.push(Attempt {
            peer: held.address(),
            held: Some(held),
            leg: None,
            span: None,
            timing: AttemptTiming {
                began: now.saturating_duration_since(self.started),
                ..AttemptTiming::default()
            },
        });
        // The body is read again, from pingora's retry buffer.
        self.request_body = PayloadBytes(0);
        if let Some(copy) = &mut self.mirror {
            copy.restart();
        }
    }

    /// The attempt under way has its connection.
    pub(super) fn attempt_connected(&mut self, reused: bool, leg: Option<Leg>) {
        let elapsed = self.elapsed();
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.leg = leg;
            attempt.timing.connected = Some(elapsed);
            attempt.timing.reused = reused;
            if let Some(held) = &mut attempt.held {
                held.connected(reused);
            }
        }
    }

    /// The attempt under way came to nothing.
    pub(super) fn attempt_failed(&mut self, why: String) {
        let now = self.elapsed();
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.held = None;
            attempt.timing.ended = Some(now);
            attempt.timing.error = Some(why);
        }
    }

    /// Whether the deadline has passed.
    pub(super) fn is_late(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// What is left until the deadline.
    pub(super) fn remaining(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// The pool of the chosen upstream.
    pub(super) fn pool(&self) -> Option<&Arc<Pool>> {
        self.generation.pools.get(self.upstream?.0)
    }

    pub(super) fn upstream_name(&self) -> Option<&Name> {
        let upstream = self.generation.config.upstreams.get(self.upstream?.0);
        upstream.map(|upstream| &upstream.name)
    }

    pub(super) fn upstream_id(&self) -> Option<EndpointId> {
        self.upstream.map(EndpointId::Upstream)
    }
}
