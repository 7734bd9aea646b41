//! Bytes for the client, gathered: the codec flushes frame by frame, and the socket gets one write
//! for all frames of a wake-up. Bounded: a full outbox takes nothing until the socket does.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use pingora::protocols::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::lane::buffers::{BUFFER_BYTES, Buffer};

/// A stream that is written to when [`Outbox::poll_send`] is called.
#[derive(Clone)]
pub struct Outbox {
    // Held by the codec and by who sends, both on one task: never contended.
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    stream: Stream,
    /// None while there is nothing to send: an idle connection has no buffer.
    waiting: Option<Buffer>,
    /// Of those, sent.
    sent: usize,
}

impl Outbox {
    /// Over a connection.
    pub fn new(stream: Stream) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                stream,
                waiting: None,
                sent: 0,
            })),
        }
    }

    /// Writes everything that waits, and flushes.
    pub fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().poll_send(cx)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(waiting) = &self.waiting else {
            return Poll::Ready(Ok(()));
        };
        while self.sent < waiting.bytes.len() {
            let rest = &waiting.bytes[self.sent..];
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sent += written,
            }
        }
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.waiting = None;
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Outbox {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.lock().stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Outbox {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        let is_full = |inner: &Inner| {
            let waiting = inner.waiting.as_ref();
            waiting.is_some_and(|waiting| waiting.bytes.len() >= BUFFER_BYTES)
        };
        if is_full(&inner) {
            ready!(inner.poll_send(cx))?;
        }
        let waiting = inner.waiting.get_or_insert_with(Buffer::take);
        let room = BUFFER_BYTES.saturating_sub(waiting.bytes.len());
        let taken = room.min(bytes.len());
        waiting.bytes.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    /// The codec asks for it after every frame; the connection's task sends when it has them all.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.stream).poll_shutdown(cx)
    }
}
