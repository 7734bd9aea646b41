//! One client connection on the lean lane: request by request, until one needs the full lane.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::{protocols::Stream, server::ShutdownWatch};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::admit::Head;
use super::buffers::{self, Buffer};
use super::exchange::{Answer, Failure, HEADROOM, Outbound, upstream_is_done};
use super::forward::{self, Forwarded};
use super::head::{self, Framing, HeadError};
use super::pool::Pools;
use super::relay::{self, Patience, Remaining};
use super::timer::Timer;
use crate::{
    config::{Limits, ListenerIndex},
    owner::Quality,
    proxy::{Shared, app::LAST_REQUEST, connection::Connection, meter::Tracked, route::Lines},
    units::PayloadBytes,
};

/// From a request's first byte to the end of its header, and again to the end of its body.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// A body larger than this streams through the full lane.
const BODY_MAX: u64 = 48 * 1024;

/// The lean lane of one listener.
pub struct Lane {
    /// Shared state.
    pub shared: Arc<Shared>,
    /// Which listener.
    pub listener: ListenerIndex,
    /// Kept upstream connections.
    pub pools: Arc<Pools>,
}

/// How long a client connection may stay.
#[derive(Clone, Copy, Debug)]
pub struct Stay {
    /// Without a request.
    pub idle_max: Duration,
    /// With or without.
    pub until: Option<Instant>,
}

impl Stay {
    /// From now on.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let age = limits.connection_age_max;
        Self {
            idle_max: limits.idle_timeout,
            until: age.and_then(|age| Instant::now().checked_add(age)),
        }
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// For the next request.
    fn wait(&self) -> Duration {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        self.until
            .map_or(self.idle_max, |until| self.idle_max.min(left(until)))
    }
}

/// The client's side.
struct Client<'a> {
    stream: &'a mut Stream,
    connection: Arc<Connection>,
    tracked: Option<Tracked>,
    timer: Timer,
}

impl Client<'_> {
    async fn write(&mut self, patience: Patience, bytes: &[u8]) -> io::Result<()> {
        let write = self.stream.write_all(bytes);
        self.timer.within(patience.write, write).await
    }

    async fn flush(&mut self, patience: Patience) -> io::Result<()> {
        let flush = self.stream.flush();
        self.timer.within(patience.write, flush).await
    }
}

/// How a request left the connection.
enum Left {
    /// The next may come; bytes of it may be here already.
    Open(Option<Buffer>),
    Closing,
    /// This request is the full lane's, with everything read of it.
    Full(Buffer),
}

/// What a head asks for.
enum Plan {
    More,
    Full,
    Refuse(HeadError),
    Serve(Box<Request>),
}

/// A request that this lane serves.
struct Request {
    /// For the upstream; the body is appended.
    out: Outbound,
    head_bytes: usize,
    to_head: bool,
    keep_alive: bool,
}

impl Lane {
    /// Whether a request that comes now may be served here, as far as its listener goes.
    pub(super) fn may_begin(&self) -> bool {
        let generation = self.shared.generation.load();
        generation.fit.listener(self.listener.0)
    }

    /// Serves a connection until it ends (None), or until a request needs the full lane: then
    /// with what has been read of that request.
    pub async fn connection(
        &self,
        stream: &mut Stream,
        connection: &Arc<Connection>,
        stay: Stay,
        shutdown: &ShutdownWatch,
    ) -> Option<Buffer> {
        let digest = stream.get_socket_digest();
        let tracked = digest
            .as_ref()
            .and_then(|digest| self.shared.meter.find(digest));
        let mut client = Client {
            stream,
            connection: Arc::clone(connection),
            tracked,
            timer: Timer::default(),
        };
        // Asked for once: whoever waits for it is on its list as long as the connection lives.
        let mut stopping = shutdown.clone();
        let mut stop = std::pin::pin!(async {
            if stopping.wait_for(|stop| *stop).await.is_ok() {
                tokio::time::sleep(LAST_REQUEST).await;
            }
        });
        let mut carried = None;
        loop {
            let buffer = match carried.take() {
                Some(buffer) => buffer,
                None => self.idle(&mut client, stay.wait(), stop.as_mut()).await?,
            };
            let draining = *shutdown.borrow() || stay.is_over();
            // In a box of its own: an idle connection keeps none of it.
            match Box::pin(self.request(&mut client, buffer, draining)).await {
                Left::Open(rest) => carried = rest,
                Left::Closing => {
                    client.stream.shutdown().await.ok();
                    return None;
                }
                Left::Full(buffer) => return Some(buffer),
            }
        }
    }

    /// Waits for a request; None when the client closes or is silent for too long. When we stop,
    /// one may be on its way: it is waited for a little.
    async fn idle(
        &self,
        client: &mut Client<'_>,
        wait: Duration,
        stop: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Buffer> {
        let first = buffers::first_bytes(client.stream.as_mut());
        let first = client.timer.within(wait, first);
        tokio::select! {
            biased;
            first = first => first.ok().flatten(),
            () = stop => None,
        }
    }

    async fn request(&self, client: &mut Client<'_>, mut buffer: Buffer, draining: bool) -> Left {
        // The clock is read for a request that does not come whole.
        let mut deadline = None;
        let mut late =
            || *deadline.get_or_insert_with(|| tokio::time::Instant::now() + REQUEST_DEADLINE);
        let mut request = loop {
            match self.plan(client, &buffer.bytes, draining) {
                Plan::Serve(request) => break request,
                Plan::Full => return Left::Full(buffer),
                // The full lane refuses it, in its words, and records it.
                Plan::Refuse(error) => {
                    log::debug!("{}: {error}", self.listener.0);
                    return Left::Full(buffer);
                }
                Plan::More => {
                    let more = client.stream.read_buf(&mut buffer.bytes);
                    match tokio::time::timeout_at(late(), more).await {
                        Ok(Ok(1..)) => {}
                        _ => return Left::Closing,
                    }
                }
            }
        };
        let end = request.head_bytes + request.out.body_bytes;
        while buffer.bytes.len() < end {
            let more = client.stream.read_buf(&mut buffer.bytes);
            match tokio::time::timeout_at(late(), more).await {
                Ok(Ok(1..)) => {}
                _ => {
                    request.out.record.error = Some("the client's body did not come".into());
                    return Left::Closing;
                }
            }
        }
        if request.out.body_bytes > 0 {
            let body = &buffer.bytes[request.head_bytes..end];
            request.out.bytes.bytes.extend_from_slice(body);
            request.out.record.request_body = PayloadBytes(request.out.body_bytes as u64);
            if let Some(leg) = &mut request.out.record.client {
                leg.received_all();
            }
        }
        let rest = (buffer.bytes.len() > end).then(|| {
            let mut rest = Buffer::take();
            rest.bytes.extend_from_slice(&buffer.bytes[end..]);
            rest
        });
        drop(buffer);
        match self.exchange(client, &mut request).await {
            Ok(true) => Left::Open(rest),
            Ok(false) => Left::Closing,
            Err(error) => {
                request
                    .out
                    .record
                    .error
                    .get_or_insert_with(|| error.to_string());
                Left::Closing
            }
        }
    }

    /// Everything that is decided from the head alone.
    fn plan(&self, client: &Client<'_>, bytes: &[u8], draining: bool) -> Plan {
        // What stands for a refused request is answered by the full lane.
        if client.connection.refusal().is_some() {
            return Plan::Full;
        }
        let mut lines = head::room();
        let head = match head::request(bytes, &mut lines) {
            Ok(Some(head)) => head,
            Ok(None) => return Plan::More,
            Err(error) => return Plan::Refuse(error),
        };
        let body_bytes = match head.framing {
            Framing::None => 0,
            Framing::Length(length) if length <= BODY_MAX => usize::try_from(length).unwrap_or(0),
            _ => return Plan::Full,
        };
        let Some(host) = head.host else {
            return Plan::Full;
        };
        if head.special || head.old {
            return Plan::Full;
        }
        if head.target.starts_with(crate::acme::CHALLENGE_PATH) {
            return Plan::Full;
        }
        let Ok(method) = http::Method::from_bytes(head.method.as_bytes()) else {
            return Plan::Full;
        };
        let lines = Slices(head.headers);
        let asked = Head {
            method: &method,
            host,
            target: head.target,
            lines: &lines,
            version: "HTTP/1.1",
            quality: Quality::Exact,
            more: bytes.len() < head.bytes + body_bytes,
        };
        let Some(admitted) = self.admit(&asked, &client.connection, client.tracked.as_ref()) else {
            return Plan::Full;
        };
        let mut outbound = Buffer::take();
        let forwarded = Forwarded::of(&client.connection, &admitted.record);
        let span_at = forward::request(&mut outbound.bytes, &head, &forwarded);
        Plan::Serve(Box::new(Request {
            head_bytes: head.bytes,
            to_head: method == http::Method::HEAD,
            keep_alive: head.keep_alive && !draining && !client.connection.is_spent(),
            out: Outbound {
                upstream: admitted.upstream,
                bytes: outbound,
                body_bytes,
                span_at,
                repeatable: admitted.repeatable,
                record: admitted.record,
            },
        }))
    }

    /// Sends the request and the answer. True when the client's connection stays open.
    async fn exchange(&self, client: &mut Client<'_>, request: &mut Request) -> io::Result<bool> {
        let patience = request.out.patience();
        let Answer {
            mut connection,
            key,
            read: mut answer,
        } = match self.answer(&mut request.out, &mut client.timer).await {
            Ok(found) => found,
            Err(failure) => return self.refuse(client, request, failure).await,
        };
        // Interim responses first, then the one that counts.
        let (mut remaining, reusable, keep_alive) = loop {
            let from = HEADROOM;
            let mut out = Buffer::take();
            let step = {
                let mut lines = head::room();
                match head::response(&answer.bytes[from..], &mut lines, request.to_head) {
                    Ok(None) => None,
                    Err(error) => {
                        let failure = Failure::bad_gateway(error.to_string());
                        return self.refuse(client, request, failure).await;
                    }
                    Ok(Some(head)) => {
                        let keep_alive = request.keep_alive && head.framing != Framing::UntilClose;
                        let interim = head.status < 200;
                        forward::response(&mut out.bytes, &head, !keep_alive && !interim);
                        Some((
                            head.status,
                            head.bytes,
                            head.framing,
                            head.keep_alive,
                            keep_alive,
                        ))
                    }
                }
            };
            let Some((status, head_bytes, framing, reusable, keep_alive)) = step else {
                let more = connection.stream.read_buf(&mut answer.bytes);
                match client.timer.within(patience.read, more).await {
                    Ok(1..) => continue,
                    Ok(0) => {
                        let failure = Failure::bad_gateway("closed inside its head".into());
                        return self.refuse(client, request, failure).await;
                    }
                    Err(error) => return self.refuse(client, request, Failure::from(error)).await,
                }
            };
            if status < 200 {
                client.write(patience, &out.bytes).await?;
                client.flush(patience).await?;
                answer.bytes.drain(from..from + head_bytes);
                continue;
            }
            request.out.record.status = status;
            let mut remaining = Remaining::new(framing);
            let body_from = from + head_bytes;
            let taken = remaining
                .take(&answer.bytes[body_from..])
                .map_err(io::Error::other)?;
            let clean = body_from + taken == answer.bytes.len();
            answer.bytes.truncate(body_from + taken);
            if remaining.is_done() {
                upstream_is_done(&mut request.out.record);
            }
            // Head and body leave in one write, without moving the body.
            if out.bytes.len() <= body_from {
                let start = body_from - out.bytes.len();
                answer.bytes[start..body_from].copy_from_slice(&out.bytes);
                client.write(patience, &answer.bytes[start..]).await?;
            } else {
                client.write(patience, &out.bytes).await?;
                client.write(patience, &answer.bytes[body_from..]).await?;
            }
            request.out.record.response_body = PayloadBytes(remaining.payload());
            break (remaining, reusable && clean, keep_alive);
        };
        let mut reusable = reusable;
        if !remaining.is_done() {
            if remaining.is_large() {
                answer = Buffer::large();
            }
            let record = &mut request.out.record;
            let relayed = relay::body(
                &mut connection.stream,
                client.stream.as_mut(),
                &mut remaining,
                &mut answer,
                (patience, &mut client.timer),
                |payload| record.response_body = PayloadBytes(payload),
            )
            .await;
            match relayed {
                Ok(again) => reusable &= again,
                Err(error) => return Err(io::Error::other(error)),
            }
            upstream_is_done(record);
        }
        if reusable {
            self.keep(&request.out, connection, key);
        }
        client.flush(patience).await?;
        Ok(keep_alive)
    }

    /// Answers in the upstream's place.
    async fn refuse(
        &self,
        client: &mut Client<'_>,
        request: &mut Request,
        failure: Failure,
    ) -> io::Result<bool> {
        request.out.record.status = failure.status;
        request.out.record.error.get_or_insert(failure.what);
        let body = serde_json::json!({
            "type": "about:blank", "title": failure.title, "status": failure.status,
        })
        .to_string();
        let connection = if request.keep_alive {
            "keep-alive"
        } else {
            "close"
        };
        let mut text = format!(
            "HTTP/1.1 {} {}\r\ncontent-type: application/problem+json\r\n\
             content-length: {}\r\nconnection: {connection}\r\n\r\n",
            failure.status,
            failure.title,
            body.len(),
        );
        if failure.status == 503 {
            text.insert_str(text.len() - 2, "retry-after: 1\r\n");
        }
        if !request.to_head {
            text.push_str(&body);
            request.out.record.response_body = PayloadBytes(body.len() as u64);
        }
        client.stream.write_all(text.as_bytes()).await?;
        client.stream.flush().await?;
        Ok(request.keep_alive)
    }
}

/// The lines of a head as the router asks for them.
#[derive(Debug)]
struct Slices<'h, 'b>(&'h [httparse::Header<'b>]);

impl Lines for Slices<'_, '_> {
    fn first(&self, name: &http::HeaderName) -> Option<&str> {
        let mut lines = self.0.iter();
        let line = lines.find(|line| line.name.eq_ignore_ascii_case(name.as_str()))?;
        std::str::from_utf8(line.value).ok()
    }
}
