//! HTTP/2 to the client. One task has a connection and all its streams: what they answer in one
//! wake-up leaves in one write, and dropping the task accounts for each of them.
//!
//! ```text
//! frames → h2 crate → accept → admit → exchange (HTTP/1.1 upstream) → answer → h2 crate → outbox
//!                        └── not for this lane → session → pingora's phases ──┘
//! ```
//!
//! Each stream is decided for itself: what the lean lane does not serve goes to the full lane as a
//! session of pingora's over the same stream.

mod accept;
mod answer;
mod body;
mod outbox;
mod session;
mod stream;
mod turn;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use h2::{Reason, server};
use pingora::{
    protocols::{Digest, Stream},
    server::ShutdownWatch,
};

use super::serve::Lane;
use crate::{
    config::Limits,
    proxy::{connection::Connection, full::Full, meter::Tracked},
};
use outbox::Outbox;
use turn::Turn;

/// Malformed requests on one connection, answered one by one before the connection ends.
const MALFORMED_MAX: usize = 32;

/// A client's connection, as its streams see it.
struct Client<'c> {
    lane: &'c Lane,
    full: &'c Full,
    connection: &'c Arc<Connection>,
    tracked: Option<Tracked>,
    digest: Arc<Digest>,
    limits: &'c Limits,
    shutdown: &'c ShutdownWatch,
    turn: Turn,
}

impl Lane {
    /// Serves an HTTP/2 connection to its end.
    pub async fn http2(
        &self,
        full: &Full,
        stream: Stream,
        connection: &Arc<Connection>,
        limits: &Limits,
        shutdown: &ShutdownWatch,
    ) {
        let digest = Digest {
            ssl_digest: stream.get_ssl_digest(),
            timing_digest: stream.get_timing_digest(),
            proxy_digest: stream.get_proxy_digest(),
            socket_digest: stream.get_socket_digest(),
        };
        let socket = digest.socket_digest.as_ref();
        let client = Client {
            lane: self,
            full,
            connection,
            tracked: socket.and_then(|digest| self.shared.meter.find(digest)),
            digest: Arc::new(digest),
            limits,
            shutdown,
            turn: Turn::default(),
        };
        let outbox = Outbox::new(stream);
        match handshake(&outbox, limits).await {
            Ok(codec) => client.serve(codec, &outbox).await,
            Err(error) => log::debug!("{}: HTTP/2: {error}", connection.client),
        }
    }
}

type Codec = server::Connection<Outbox, Bytes>;

async fn handshake(outbox: &Outbox, limits: &Limits) -> Result<Codec, h2::Error> {
    let mut options = server::Builder::new();
    options
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX));
    let mut handshake = pin!(options.handshake(outbox.clone()));
    poll_fn(|cx| {
        let done = handshake.as_mut().poll(cx);
        // What cannot be sent now is sent later; what breaks is read again.
        let _ = outbox.poll_send(cx);
        done
    })
    .await
}

impl Client<'_> {
    /// Until the connection is closed, idle for too long, or has been asked to end and its last
    /// stream is over.
    async fn serve(&self, mut codec: Codec, outbox: &Outbox) {
        let mut streams = FuturesUnordered::new();
        let mut malformed = 0;
        let mut enough = false;
        let mut watch = self.shutdown.clone();
        let mut leaving = pin!(watch.wait_for(|stop| *stop));
        let mut told = false;
        let mut idle = pin!(Idle::new(self.limits.idle_timeout));
        poll_fn(|cx| {
            if !told && leaving.as_mut().poll(cx).is_ready() {
                told = true;
                codec.graceful_shutdown();
            }
            loop {
                while let Poll::Ready(Some(())) = streams.poll_next_unpin(cx) {}
                let mut accepted = false;
                loop {
                    let (request, respond) = match codec.poll_accept(cx) {
                        Poll::Pending => break,
                        Poll::Ready(Some(Ok(stream))) => stream,
                        Poll::Ready(Some(Err(error))) => {
                            log::debug!("{}: HTTP/2: {error}", self.connection.client);
                            return Poll::Ready(());
                        }
                        Poll::Ready(None) => return Poll::Ready(()),
                    };
                    accepted = true;
                    match accept::judge(request, respond) {
                        Some((request, respond)) => {
                            streams.push(self.stream(request, respond));
                        }
                        None => {
                            malformed += 1;
                            enough |= malformed == MALFORMED_MAX;
                        }
                    }
                }
                if std::mem::take(&mut enough) {
                    // What was answered so far has been handed over.
                    codec.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    continue;
                }
                let again = match outbox.poll_send(cx) {
                    Poll::Ready(Ok(())) => self.turn.ends(),
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => false,
                };
                if !accepted && !again {
                    break;
                }
            }
            if !streams.is_empty() {
                idle.as_mut().get_mut().since = None;
                return Poll::Pending;
            }
            if idle.as_mut().get_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // Nobody is owed anything: one GOAWAY if the socket takes it, and the end.
            codec.abrupt_shutdown(Reason::NO_ERROR);
            let _ = codec.poll_closed(cx);
            let _ = outbox.poll_send(cx);
            Poll::Ready(())
        })
        .await;
    }
}

/// Since when a connection has no stream. The timer is set when it is first needed and moved when
/// it fires, not with every request.
struct Idle {
    limit: Duration,
    since: Option<Instant>,
    timer: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

impl Idle {
    fn new(limit: Duration) -> Self {
        Self {
            limit,
            since: None,
            timer: None,
        }
    }

    /// Ready when it has been idle for as long as it may.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let end = *self.since.get_or_insert_with(Instant::now) + self.limit;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end.into())));
        loop {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if timer.deadline() >= end.into() {
                return Poll::Ready(());
            }
            timer.as_mut().reset(end.into());
        }
    }
}

/// What the h2 crate reports, as the sockets do.
fn broken(error: h2::Error) -> io::Error {
    io::Error::other(error)
}
