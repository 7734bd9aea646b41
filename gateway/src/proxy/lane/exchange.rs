//! A request on its way to an upstream, until the answer begins: which peer, a kept or a new
//! connection, and when it is sent again. What the client speaks does not matter here.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::buffers::Buffer;
use super::forward;
use super::pool::{Counted, PoolKey, UpstreamConnection};
use super::relay::Patience;
use super::serve::Lane;
use super::timer::Timer;
use crate::{
    config::UpstreamIndex,
    owner::Quality,
    proxy::{
        meter::{EndpointId, Tracked},
        record::{Leg, RequestRecord},
        retry,
        upstream::limits::Refused,
    },
    slots::Before,
    units::PayloadBytes,
};

/// Room before an answer for a head that grows.
pub const HEADROOM: usize = 1024;

/// A request as the upstream gets it.
pub struct Outbound {
    /// The request.
    pub record: RequestRecord,
    /// Where it goes.
    pub upstream: UpstreamIndex,
    /// Head and body.
    pub bytes: Buffer,
    /// Of those, the body.
    pub body_bytes: usize,
    /// Where an attempt's span goes in the head, when the request is recorded.
    pub span_at: Option<usize>,
    /// May be sent again when a kept connection turns out closed.
    pub repeatable: bool,
}

/// An answer that has begun.
pub struct Answer {
    /// Where the rest comes from.
    pub connection: UpstreamConnection,
    /// Where the connection is kept afterwards.
    pub key: PoolKey,
    /// What has been read of the answer, behind [`HEADROOM`].
    pub read: Buffer,
}

impl Outbound {
    /// The upstream's limits.
    #[must_use]
    pub fn patience(&self) -> Patience {
        let upstream = &self.record.generation.config.upstreams[self.upstream.0];
        Patience {
            read: upstream.read_timeout,
            write: upstream.write_timeout,
        }
    }

    fn idle_timeout(&self) -> Duration {
        self.record.generation.config.upstreams[self.upstream.0].idle_timeout
    }
}

impl Lane {
    /// Sends the request to peers until one begins to answer; returns what has been read of the
    /// answer, behind [`HEADROOM`].
    pub(super) async fn answer(
        &self,
        request: &mut Outbound,
        timer: &mut Timer,
    ) -> Result<Answer, Failure> {
        let patience = request.patience();
        let generation = Arc::clone(&request.record.generation);
        let pool = &generation.pools[request.upstream.0];
        match pool.admit() {
            Ok(admission) => request.record.admission = Some(admission),
            Err(refused) => return Err(Failure::busy(refused)),
        }
        let mut fresh_only = false;
        loop {
            let record = &mut request.record;
            let now = Instant::now();
            let held = match pool.pick(None, &record.tried, now) {
                Ok(held) => held,
                Err(refused) => return Err(Failure::busy(refused)),
            };
            let peer = held.address();
            record.attempt(held, now);
            record.request_body = PayloadBytes(request.body_bytes as u64);
            let key = PoolKey {
                upstream: Arc::clone(pool),
                peer,
            };
            let kept = if fresh_only {
                None
            } else {
                let idle = request.idle_timeout();
                self.pools.take(&key, now, idle)
            };
            let reused = kept.is_some();
            let mut connection = match kept {
                Some(connection) => connection,
                None => match self.connect(request, peer, timer).await {
                    Ok(connection) => connection,
                    Err(error) => {
                        self.shared.metrics.connect_failure(&pool.settings.name);
                        if retry::connect_failed(&mut request.record, error.to_string()) {
                            continue;
                        }
                        return Err(Failure::from(error));
                    }
                },
            };
            self.attempt(request, reused, connection.tracked.as_ref());
            let write = connection.stream.write_all(&request.bytes.bytes);
            let read = match timer.within(patience.write, write).await {
                Ok(()) => {
                    timer
                        .within(patience.read, first_bytes(&mut connection.stream))
                        .await
                }
                Err(error) => Err(error),
            };
            let (record, repeatable) = (&mut request.record, request.repeatable);
            match read {
                Ok(Some(answer)) => {
                    let status = first_status(&answer.bytes[HEADROOM..]).unwrap_or(200);
                    if retry::answer_began(record, status, repeatable) {
                        continue;
                    }
                    return Ok(Answer {
                        connection,
                        key,
                        read: answer,
                    });
                }
                Ok(None) => {
                    // A kept connection that the peer had closed: the request did not arrive.
                    let why = "closed without an answer";
                    if retry::connection_broke(record, why.into(), reused, repeatable) {
                        fresh_only |= reused;
                        continue;
                    }
                    return Err(Failure::bad_gateway(why.into()));
                }
                Err(error) => {
                    let stale = reused && error.kind() != io::ErrorKind::TimedOut;
                    if retry::connection_broke(record, error.to_string(), stale, repeatable) {
                        fresh_only |= stale;
                        continue;
                    }
                    return Err(Failure::from(error));
                }
            }
        }
    }

    /// Keeps a connection whose response was read to its end.
    pub(super) fn keep(&self, request: &Outbound, connection: UpstreamConnection, key: PoolKey) {
        let idle = request.idle_timeout();
        let generation = &request.record.generation;
        self.pools
            .put(key, connection, generation, Instant::now(), idle);
    }

    async fn connect(
        &self,
        request: &Outbound,
        peer: SocketAddr,
        timer: &mut Timer,
    ) -> io::Result<UpstreamConnection> {
        let generation = &request.record.generation;
        let upstream = &generation.config.upstreams[request.upstream.0];
        let connect = TcpStream::connect(peer);
        let stream = timer.within(upstream.connect_timeout, connect).await?;
        stream.set_nodelay(true)?;
        let endpoint = EndpointId::Upstream(request.upstream);
        Ok(UpstreamConnection::new(
            stream,
            &self.shared,
            |digest, fd| {
                self.shared.meter.open(
                    &generation.endpoints,
                    digest,
                    fd,
                    endpoint,
                    Before::Nothing,
                );
            },
        ))
    }

    fn attempt(&self, request: &mut Outbound, reused: bool, tracked: Option<&Tracked>) {
        let record = &mut request.record;
        let owner = tracked.and_then(|_| {
            self.shared.meter.route_owner(
                &record.generation.endpoints,
                EndpointId::Upstream(request.upstream),
                record.route.as_deref(),
                &record.tenant,
                Quality::Exact,
            )
        });
        let leg = tracked.zip(owner).map(|(tracked, owner)| {
            Leg::begin(&self.shared, tracked.clone(), owner, Quality::Exact, true)
        });
        record.attempt_connected(reused, leg);
        if let Some(at) = request.span_at
            && let Some(span) = record.trace_attempt()
        {
            forward::set_span(&mut request.bytes.bytes, at, span);
        }
    }
}

/// Waits for an answer's first bytes without holding a buffer for them: it goes to whoever has
/// something to put into it, and is still warm from the last one. None at the connection's end.
async fn first_bytes(stream: &mut Counted) -> io::Result<Option<Buffer>> {
    poll_fn(|context| {
        ready!(stream.poll_read_ready(context))?;
        let mut answer = Buffer::take();
        answer.bytes.resize(HEADROOM, 0);
        let read = ready!(pin!(stream.read_buf(&mut answer.bytes)).poll(context))?;
        Poll::Ready(Ok((read > 0).then_some(answer)))
    })
    .await
}

/// Why the upstream's answer is ours.
pub struct Failure {
    /// Answered to the client.
    pub status: u16,
    /// What outsiders may know.
    pub title: &'static str,
    /// For the access log.
    pub what: String,
}

/// The status of an answer of which the first line has come.
fn first_status(bytes: &[u8]) -> Option<u16> {
    let digits = bytes.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

impl Failure {
    fn busy(refused: Refused) -> Self {
        Self {
            status: 503,
            title: "Service Unavailable",
            what: format!("upstream: at its limit ({})", refused.as_str()),
        }
    }

    /// The upstream broke the protocol, or is gone.
    #[must_use]
    pub fn bad_gateway(what: String) -> Self {
        Self {
            status: 502,
            title: "Bad Gateway",
            what: format!("upstream: {what}"),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::TimedOut {
            return Self {
                status: 504,
                title: "Gateway Timeout",
                what: "upstream: timed out".into(),
            };
        }
        Self::bad_gateway(error.to_string())
    }
}

/// The upstream has sent everything: said before the client can know, so that the next request's
/// bytes are not taken for this one's.
pub(super) fn upstream_is_done(record: &mut RequestRecord) {
    if let Some(leg) = record.attempts.last_mut().and_then(|at| at.leg.as_mut()) {
        leg.received_all();
    }
}
