//! The rest of a response body, from the upstream's socket to the client's.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::buffers::{BUFFER_BYTES, Buffer};
use super::chunks::{ChunkError, Chunks};
use super::head::Framing;
use super::pool::Counted;
use super::timer::Timer;

/// How much of a body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    rest: Rest,
    payload: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Length(u64),
    Chunked(Chunks),
    UntilClose,
}

impl Remaining {
    /// A whole body.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let rest = match framing {
            Framing::None => Rest::Length(0),
            Framing::Length(length) => Rest::Length(length),
            Framing::Chunked => Rest::Chunked(Chunks::default()),
            Framing::UntilClose => Rest::UntilClose,
        };
        Self { rest, payload: 0 }
    }

    /// Takes bytes; returns how many of them belong to the body.
    ///
    /// # Errors
    /// The bytes are not what the framing promised.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        match &mut self.rest {
            Rest::Length(left) => {
                let taken =
                    usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= taken as u64;
                self.payload += taken as u64;
                Ok(taken)
            }
            Rest::Chunked(chunks) => {
                let taken = chunks.take(bytes)?;
                self.payload = chunks.data();
                Ok(taken)
            }
            Rest::UntilClose => {
                self.payload += bytes.len() as u64;
                Ok(bytes.len())
            }
        }
    }

    /// What is known to come is more than an ordinary buffer holds.
    #[must_use]
    pub fn is_large(&self) -> bool {
        matches!(self.rest, Rest::Length(left) if left > BUFFER_BYTES as u64)
    }

    /// Payload bytes taken so far.
    #[must_use]
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// Nothing more will come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match self.rest {
            Rest::Length(left) => left == 0,
            Rest::Chunked(chunks) => chunks.is_done(),
            Rest::UntilClose => false,
        }
    }
}

/// Whose fault it is that a response did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The upstream closed early, broke, or sent what it had not announced.
    #[error("upstream: {0}")]
    Upstream(io::Error),
    /// The client went away.
    #[error("client: {0}")]
    Client(io::Error),
}

/// Limits of a relay.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the next bytes from the upstream.
    pub read: Duration,
    /// For the client to take what it was sent.
    pub write: Duration,
}

/// Moves the rest of a body and calls `moved` with the payload so far after each write. Returns
/// true when the upstream's connection can be used again.
///
/// # Errors
/// [`RelayError`]: both connections are to be closed.
pub async fn body<W>(
    from: &mut Counted,
    to: &mut W,
    remaining: &mut Remaining,
    buffer: &mut Buffer,
    (patience, timer): (Patience, &mut Timer),
    mut moved: impl FnMut(u64),
) -> Result<bool, RelayError>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    while !remaining.is_done() {
        buffer.bytes.clear();
        let read = timer
            .within(patience.read, from.read_buf(&mut buffer.bytes))
            .await
            .map_err(RelayError::Upstream)?;
        if read == 0 {
            if remaining.rest == Rest::UntilClose {
                return Ok(false);
            }
            let early = io::Error::new(io::ErrorKind::UnexpectedEof, "closed inside its answer");
            return Err(RelayError::Upstream(early));
        }
        let taken = remaining
            .take(&buffer.bytes)
            .map_err(|error| RelayError::Upstream(io::Error::other(error)))?;
        timer
            .within(patience.write, to.write_all(&buffer.bytes[..taken]))
            .await
            .map_err(RelayError::Client)?;
        moved(remaining.payload());
        if taken < buffer.bytes.len() {
            // More than was announced: nothing on this connection can be trusted.
            return Ok(false);
        }
    }
    Ok(true)
}
