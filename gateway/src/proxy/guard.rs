//! The stream between a client and pingora. It lets an HTTP/1 header through whole and strictly
//! well-formed or not at all, holds back what follows a request until that request is over, and
//! watches how slowly bytes come and how many HTTP/2 control frames.
//!
//! A refused HTTP/1 client is answered through pingora's own phases, so that it is in the access
//! log and in the metrics: in place of what it sent, pingora gets a request that stands for it.

use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::{Buf as _, BytesMut};
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    Stream, TimingDigest, UniqueID, UniqueIDType,
    raw_connect::ProxyDigest,
    tls::{SslDigest, TlsRef},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::Sleep,
};
use tokio_rustls::server::TlsStream;

use super::{
    connection::Connection,
    frames::{FrameScanner, PREFACE},
    proxy_header::Opened,
    slow_reader::SlowReader,
    strict::{ChunkScanner, Framing, HeadLimits, HeadScanner, Refusal},
};
use crate::config::Limits;

/// What pingora parses in place of a refused request.
const STANDS_FOR_REFUSED: &[u8] =
    b"GET /refused HTTP/1.1\r\nhost: refused.invalid\r\nconnection: close\r\n\r\n";
/// Bytes read ahead of the request they belong to.
const HELD_MAX: usize = 16 * 1024;
/// A body's rate is measured over this.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// How long and how much a refused client may go on sending, so that it can read its answer:
/// closing with bytes unread would reset the connection.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 256 * 1024;

/// The connection below HTTP.
pub enum Transport {
    /// Plain.
    Plain(Opened),
    /// TLS.
    Tls(Box<TlsStream<Opened>>, Arc<SslDigest>),
}

/// A guarded connection.
pub struct Guard {
    transport: Transport,
    connection: Arc<Connection>,
    /// Made when pingora asks for it.
    digest: OnceLock<Option<Arc<ProxyDigest>>>,
    limits: Limits,
    phase: Phase,
    /// Read from the client, not yet passed on.
    held: BytesMut,
    /// Of `held`, how many may be passed on.
    released: usize,
    timer: Option<Pin<Box<Sleep>>>,
    reader: SlowReader,
    /// The client will send no more.
    ended: bool,
    /// Whether plain text may be HTTP/2.
    h2c: bool,
    refused: Box<dyn Fn(Refusal) + Send + Sync>,
}

enum Phase {
    /// Waiting for a header, since then when its deadline runs.
    Head(HeadScanner, Option<Instant>),
    /// Passing a body on.
    Body(Body, Rate),
    /// The request has been received whole and is not over.
    Served,
    Tunnel,
    Http2(Box<FrameScanner>),
    /// What stands for the request is passed on, then nothing.
    Refused,
}

enum Body {
    Length(u64),
    Chunked(ChunkScanner),
}

/// The rate of a body, counted only while the client is waited for.
struct Rate {
    since: Instant,
    bytes: u64,
    waiting: bool,
}

impl Rate {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            bytes: 0,
            waiting: false,
        }
    }

    fn restart(&mut self) {
        *self = Self::new();
    }

    fn received(&mut self, bytes: usize, least_per_second: u64) {
        self.bytes += bytes as u64;
        let over = self.since.elapsed() >= RATE_WINDOW;
        // Not polled for a while: it was the service that was slow.
        if !self.waiting || (over && self.is_enough(least_per_second)) {
            self.restart();
        }
        self.waiting = false;
    }

    fn is_enough(&self, least_per_second: u64) -> bool {
        self.bytes >= RATE_WINDOW.as_secs() * least_per_second
    }
}

impl Guard {
    /// Guards a connection. `refused` is told once why its client was refused.
    pub fn new(
        transport: Transport,
        connection: Arc<Connection>,
        limits: Limits,
        h2c: bool,
        refused: impl Fn(Refusal) + Send + Sync + 'static,
    ) -> Self {
        let now = Instant::now();
        let http2 = matches!(&transport, Transport::Tls(tls, _)
            if tls.get_ref().1.alpn_protocol() == Some(b"h2"));
        let phase = if http2 {
            Phase::Http2(Box::new(FrameScanner::new(now)))
        } else {
            Phase::Head(HeadScanner::default(), Some(now))
        };
        Self {
            transport,
            connection,
            digest: OnceLock::new(),
            limits,
            phase,
            held: BytesMut::new(),
            released: 0,
            timer: None,
            reader: SlowReader::default(),
            ended: false,
            h2c,
            refused: Box::new(refused),
        }
    }

    /// Whether the handshake has agreed on HTTP/2.
    #[must_use]
    pub fn speaks_http2(&self) -> bool {
        matches!(self.phase, Phase::Http2(_))
    }

    fn gather_writes(&mut self) {
        if self.connection.writes_in_parts() {
            self.transport.opened_mut().gather_writes();
        }
    }

    fn head_limits(&self) -> HeadLimits {
        HeadLimits {
            bytes_max: self.limits.header_bytes_max,
            lines_max: self.limits.headers_max,
            target_bytes_max: self.limits.uri_bytes_max,
        }
    }

    /// HTTP/1 gets an answer.
    fn refuse(&mut self, refusal: Refusal) {
        (self.refused)(refusal);
        self.connection.refuse(refusal);
        self.connection.request_begins();
        self.connection.leaves(self.held.len());
        self.held.clear();
        self.held.extend_from_slice(STANDS_FOR_REFUSED);
        self.released = self.held.len();
        self.timer = None;
        self.phase = Phase::Refused;
    }

    /// Where no answer can be given any more.
    fn fail(&mut self, refusal: Refusal) -> io::Error {
        (self.refused)(refusal);
        self.connection.refuse(refusal);
        self.connection.leaves(self.held.len());
        self.held.clear();
        io::Error::new(io::ErrorKind::InvalidData, refusal)
    }

    /// Ready at that time.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        let at = tokio::time::Instant::from_std(at);
        let timer = match &mut self.timer {
            Some(timer) if timer.deadline() == at => timer,
            timer => timer.insert(Box::pin(tokio::time::sleep_until(at))),
        };
        timer.as_mut().poll(cx)
    }

    /// Reads more into `held`; false at the end of the stream.
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.ended {
            return Poll::Ready(Ok(false));
        }
        let mut space = [0; 4096];
        let mut buffer = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut self.transport).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            self.ended = true;
            return Poll::Ready(Ok(false));
        }
        self.held.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(true))
    }

    /// Passes on what may be.
    fn pass(&mut self, buffer: &mut ReadBuf<'_>) {
        let length = self.released.min(buffer.remaining());
        buffer.put_slice(&self.held[..length]);
        self.held.advance(length);
        self.released -= length;
        if self.held.is_empty() && self.held.capacity() > HELD_MAX {
            self.held = BytesMut::new();
        }
    }

    /// Where a header is waited for; Ready(false): the stream has ended.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            let limits = self.head_limits();
            let Phase::Head(scanner, since) = &mut self.phase else {
                return Poll::Ready(Ok(true));
            };
            // RFC 9112 2.2: one empty line before a request is ignored.
            if scanner.is_fresh() && self.held.starts_with(b"\r\n") {
                self.held.advance(2);
            }
            if !self.held.is_empty() && since.is_none() {
                *since = Some(Instant::now());
            }
            match scanner.scan(&self.held, &limits) {
                Ok(Some(head)) => {
                    self.released = head.length;
                    self.timer = None;
                    self.connection.request_begins();
                    self.phase = match head.framing {
                        Framing::None => Phase::Served,
                        Framing::Length(length) => Phase::Body(Body::Length(length), Rate::new()),
                        Framing::Chunked => {
                            Phase::Body(Body::Chunked(ChunkScanner::default()), Rate::new())
                        }
                    };
                    return Poll::Ready(Ok(true));
                }
                Ok(None) => {}
                Err(refusal) => {
                    self.refuse(refusal);
                    return Poll::Ready(Ok(true));
                }
            }
            let deadline = since.map(|since| since + self.limits.header_timeout);
            match self.poll_hold(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(other) => return Poll::Ready(other),
                Poll::Pending => {
                    if let Some(deadline) = deadline {
                        ready!(self.poll_deadline(cx, deadline));
                        if self.held.is_empty() {
                            // Nothing was asked: nothing is answered.
                            return Poll::Ready(Err(self.fail(Refusal::HeaderTimeout)));
                        }
                        self.refuse(Refusal::HeaderTimeout);
                        return Poll::Ready(Ok(true));
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// The usual case: one whole header without a body comes in one read, and goes into the
    /// reader's buffer without being held. Ready(false): it was something else, and is held.
    fn poll_whole_head(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        let limits = self.head_limits();
        let Phase::Head(scanner, since) = &mut self.phase else {
            return Poll::Ready(Ok(false));
        };
        let start = buffer.filled().len();
        match Pin::new(&mut self.transport).poll_read(cx, buffer) {
            Poll::Ready(result) => result?,
            Poll::Pending => {
                let Some(since) = *since else {
                    return Poll::Pending;
                };
                ready!(self.poll_deadline(cx, since + self.limits.header_timeout));
                // Nothing was asked: nothing is answered.
                return Poll::Ready(Err(self.fail(Refusal::HeaderTimeout)));
            }
        }
        let read = &buffer.filled()[start..];
        if read.is_empty() {
            self.ended = true;
            return Poll::Ready(Ok(true));
        }
        if let Ok(Some(head)) = scanner.scan(read, &limits)
            && head.length == read.len()
            && head.framing == Framing::None
        {
            self.timer = None;
            self.connection.request_begins();
            self.phase = Phase::Served;
            return Poll::Ready(Ok(true));
        }
        *scanner = HeadScanner::default();
        self.held.extend_from_slice(read);
        buffer.set_filled(start);
        Poll::Ready(Ok(false))
    }

    /// A body goes through without being held, except what follows it.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let start = buffer.filled().len();
        if self.held.is_empty() {
            match Pin::new(&mut self.transport).poll_read(cx, buffer) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.poll_rate(cx),
            }
        } else {
            let length = self.held.len().min(buffer.remaining());
            buffer.put_slice(&self.held[..length]);
            self.held.advance(length);
        }
        let read = buffer.filled().len() - start;
        if read == 0 {
            self.ended = true;
            return Poll::Ready(Ok(()));
        }
        self.timer = None;
        let least = self.limits.body_rate_min;
        let Phase::Body(body, rate) = &mut self.phase else {
            return Poll::Ready(Ok(()));
        };
        rate.received(read, least);
        let end = match body {
            Body::Length(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(read);
                *left -= here as u64;
                (*left == 0).then_some(here)
            }
            Body::Chunked(scanner) => match scanner.scan(&buffer.filled()[start..]) {
                Ok(end) => end,
                Err(refusal) => {
                    buffer.set_filled(start);
                    return Poll::Ready(Err(self.fail(refusal)));
                }
            },
        };
        if let Some(end) = end {
            let after = &buffer.filled()[start + end..];
            if !after.is_empty() {
                let mut held = BytesMut::from(after);
                held.extend_from_slice(&self.held);
                self.held = held;
                buffer.set_filled(start + end);
            }
            self.phase = Phase::Served;
        }
        Poll::Ready(Ok(()))
    }

    /// A write waits: for as long as the client takes anything worth the name.
    fn poll_taken(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.transport.socket().id();
        let least = self.limits.body_rate_min;
        ready!(self.reader.poll_wait(cx, socket, least))?;
        Poll::Ready(Err(self.fail(Refusal::ReadsTooSlowly)))
    }

    fn poll_rate(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let least = self.limits.body_rate_min;
        let Phase::Body(_, rate) = &mut self.phase else {
            return Poll::Pending;
        };
        if least == 0 {
            return Poll::Pending;
        }
        if !rate.waiting && rate.since.elapsed() >= RATE_WINDOW {
            rate.restart();
        }
        rate.waiting = true;
        let deadline = rate.since + RATE_WINDOW;
        ready!(self.poll_deadline(cx, deadline));
        let Phase::Body(_, rate) = &mut self.phase else {
            return Poll::Pending;
        };
        if !rate.is_enough(least) {
            return Poll::Ready(Err(self.fail(Refusal::BodyTooSlow)));
        }
        rate.restart();
        rate.waiting = true;
        let deadline = rate.since + RATE_WINDOW;
        let _ = self.poll_deadline(cx, deadline);
        Poll::Pending
    }

    /// Whether the request under way is over, or a tunnel.
    fn moves_on(&mut self) -> bool {
        if self.connection.is_tunnel() {
            self.phase = Phase::Tunnel;
            self.released = self.held.len();
            return true;
        }
        let over = self.connection.requests_over() >= self.connection.requests_begun();
        if over {
            self.phase = Phase::Head(HeadScanner::default(), None);
            if self.held.is_empty() {
                // An idle connection has no buffer.
                self.held = BytesMut::new();
            }
        }
        over
    }

    /// The request is being served: what comes is held, and only the end is passed on.
    fn poll_served(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Next>> {
        loop {
            if self.moves_on() {
                return Poll::Ready(Ok(Next::Again));
            }
            self.connection.wake_later(cx.waker());
            // It may have ended in between.
            if self.moves_on() {
                return Poll::Ready(Ok(Next::Again));
            }
            if self.held.len() >= HELD_MAX {
                return Poll::Pending;
            }
            if !ready!(self.poll_hold(cx))? {
                if self.held.is_empty() {
                    return Poll::Ready(Ok(Next::End));
                }
                return Poll::Pending;
            }
        }
    }

    fn poll_http2(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let start = buffer.filled().len();
        if self.held.is_empty() {
            match Pin::new(&mut self.transport).poll_read(cx, buffer) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    let Phase::Http2(frames) = &self.phase else {
                        return Poll::Pending;
                    };
                    let Some(since) = frames.open_block() else {
                        return Poll::Pending;
                    };
                    ready!(self.poll_deadline(cx, since + self.limits.header_timeout));
                    return Poll::Ready(Err(self.fail(Refusal::HeaderTimeout)));
                }
            }
        } else {
            let length = self.held.len().min(buffer.remaining());
            buffer.put_slice(&self.held[..length]);
            self.held.advance(length);
        }
        self.timer = None;
        let Phase::Http2(frames) = &mut self.phase else {
            return Poll::Ready(Ok(()));
        };
        if let Err(refusal) = frames.scan(&buffer.filled()[start..], Instant::now()) {
            buffer.set_filled(start);
            return Poll::Ready(Err(self.fail(refusal)));
        }
        Poll::Ready(Ok(()))
    }
}

enum Next {
    Again,
    End,
}

impl AsyncRead for Guard {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.released > 0 {
                this.pass(buffer);
                return Poll::Ready(Ok(()));
            }
            match &this.phase {
                Phase::Head(scanner, _)
                    if scanner.is_fresh() && this.held.is_empty() && !this.ended =>
                {
                    if ready!(this.poll_whole_head(cx, buffer))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                Phase::Head(..) => {
                    if !ready!(this.poll_head(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                Phase::Body(..) => return this.poll_body(cx, buffer),
                Phase::Served => match ready!(this.poll_served(cx))? {
                    Next::Again => {}
                    Next::End => return Poll::Ready(Ok(())),
                },
                Phase::Tunnel => return Pin::new(&mut this.transport).poll_read(cx, buffer),
                Phase::Http2(_) => return this.poll_http2(cx, buffer),
                // The answer is under way, and then the connection closes.
                Phase::Refused => return Poll::Pending,
            }
        }
    }
}

impl AsyncWrite for Guard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.gather_writes();
        let Poll::Ready(written) = Pin::new(&mut self.transport).poll_write(cx, bytes) else {
            return self.poll_taken(cx).map_ok(|()| 0);
        };
        self.reader.wrote();
        let written = written?;
        if let Phase::Http2(frames) = &mut self.phase {
            frames.sent(written);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.gather_writes();
        let Poll::Ready(written) = Pin::new(&mut self.transport).poll_write_vectored(cx, slices)
        else {
            return self.poll_taken(cx).map_ok(|()| 0);
        };
        self.reader.wrote();
        let written = written?;
        if let Phase::Http2(frames) = &mut self.phase {
            frames.sent(written);
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }
}

#[async_trait]
impl Peek for Guard {
    /// For pingora's question whether plain text starts with the HTTP/2 preface. Answers as soon
    /// as it does not, so that an HTTP/1.0 request of 18 bytes is served as well.
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.h2c {
            return Ok(true);
        }
        let deadline = Instant::now() + self.limits.header_timeout;
        let outcome = std::future::poll_fn(|cx| {
            loop {
                let known = self.held.len().min(PREFACE.len());
                if self.held[..known] != PREFACE[..known] || known == PREFACE.len() {
                    return Poll::Ready(Ok(()));
                }
                match self.poll_hold(cx) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(Ok(false)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        ready!(self.poll_deadline(cx, deadline));
                        return Poll::Ready(Err(self.fail(Refusal::HeaderTimeout)));
                    }
                }
            }
        });
        outcome.await?;
        self.timer = None;
        let known = self.held.len().min(buffer.len());
        buffer[..known].copy_from_slice(&self.held[..known]);
        if self.held.starts_with(PREFACE) {
            self.phase = Phase::Http2(Box::new(FrameScanner::new(Instant::now())));
        }
        Ok(true)
    }
}

#[async_trait]
impl Shutdown for Guard {
    async fn shutdown(&mut self) {
        // What follows is the end of a plain socket, which says so itself.
        let ends = matches!(self.transport, Transport::Plain(_));
        if ends && !matches!(self.phase, Phase::Refused) {
            let _ = AsyncWriteExt::flush(&mut self.transport).await;
            return;
        }
        let _ = AsyncWriteExt::shutdown(&mut self.transport).await;
        if matches!(self.phase, Phase::Refused) {
            let drain = async {
                let mut space = [0; 4096];
                let mut left = LINGER_BYTES;
                while let Ok(read) = self.transport.read(&mut space).await
                    && read > 0
                    && left >= read
                {
                    left -= read;
                }
            };
            let _ = tokio::time::timeout(LINGER, drain).await;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !matches!(self.phase, Phase::Refused) {
            self.connection.leaves(self.held.len());
        }
    }
}

impl UniqueID for Guard {
    fn id(&self) -> UniqueIDType {
        self.transport.socket().id()
    }
}

impl Ssl for Guard {
    fn get_ssl(&self) -> Option<&TlsRef> {
        None
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        match &self.transport {
            Transport::Plain(_) => None,
            Transport::Tls(_, digest) => Some(Arc::clone(digest)),
        }
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        match &self.transport {
            Transport::Plain(_) => None,
            Transport::Tls(tls, _) => match tls.get_ref().1.alpn_protocol()? {
                b"h2" => Some(ALPN::H2),
                b"http/1.1" => Some(ALPN::H1),
                _ => None,
            },
        }
    }
}

impl GetTimingDigest for Guard {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.transport.socket().get_timing_digest()
    }
}

impl GetProxyDigest for Guard {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        let digest = || self.connection.digest().map(Arc::new);
        self.digest.get_or_init(digest).clone()
    }
}

impl GetSocketDigest for Guard {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.transport.socket().get_socket_digest()
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Transport {
    fn opened(&self) -> &Opened {
        match self {
            Self::Plain(opened) => opened,
            Self::Tls(tls, _) => tls.get_ref().0,
        }
    }

    fn opened_mut(&mut self) -> &mut Opened {
        match self {
            Self::Plain(opened) => opened,
            Self::Tls(tls, _) => tls.get_mut().0,
        }
    }

    fn socket(&self) -> &Stream {
        &self.opened().stream
    }

    /// Where the bytes that the socket has taken are counted.
    #[must_use]
    pub fn sent(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.opened().sent)
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream, _) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream, _) => stream.is_write_vectored(),
        }
    }
}
