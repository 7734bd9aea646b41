//! Buffers that exist only while data moves: an idle connection has none.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

/// Size of an ordinary buffer: a head and the wire's largest burst, 64 KiB, in one read and one
/// write.
pub const BUFFER_BYTES: usize = 128 * 1024;
/// Size of a relay buffer for a body that does not fit the first: fewer, larger system calls.
pub const LARGE_BYTES: usize = 256 * 1024;
/// Kept for reuse by each worker.
const KEPT_MAX: usize = 64;
/// The same, of large ones.
const KEPT_LARGE_MAX: usize = 16;
/// What is read before anything is known of a request.
const FIRST_BYTES: usize = 8 * 1024;

thread_local! {
    // A worker's own, so that no lock is taken. Nothing but memory is kept here.
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static KEPT_LARGE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static FIRST: RefCell<Box<[u8]>> = RefCell::new(vec![0; FIRST_BYTES].into_boxed_slice());
}

/// A buffer from the worker's stock, empty; goes back when dropped.
#[derive(Debug, Default)]
pub struct Buffer {
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Buffer {
    /// An empty buffer with room for [`BUFFER_BYTES`].
    #[must_use]
    pub fn take() -> Self {
        let kept = KEPT.with_borrow_mut(Vec::pop);
        Self {
            bytes: kept.unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES)),
        }
    }

    /// An empty buffer with room for [`LARGE_BYTES`].
    #[must_use]
    pub fn large() -> Self {
        let kept = KEPT_LARGE.with_borrow_mut(Vec::pop);
        Self {
            bytes: kept.unwrap_or_else(|| Vec::with_capacity(LARGE_BYTES)),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        // One that had to grow is given to the allocator, not kept.
        let (stock, most) = match bytes.capacity() {
            BUFFER_BYTES => (&KEPT, KEPT_MAX),
            LARGE_BYTES => (&KEPT_LARGE, KEPT_LARGE_MAX),
            _ => return,
        };
        bytes.clear();
        stock.with_borrow_mut(|kept| {
            if kept.len() < most {
                kept.push(bytes);
            }
        });
    }
}

/// Waits for the first bytes on a connection without holding a buffer for it; None at its end.
///
/// # Errors
/// The connection broke.
pub async fn first_bytes<S>(stream: &mut S) -> io::Result<Option<Buffer>>
where
    S: AsyncRead + Unpin + ?Sized,
{
    std::future::poll_fn(|context| poll_first(Pin::new(stream), context)).await
}

fn poll_first<S: AsyncRead + ?Sized>(
    stream: Pin<&mut S>,
    context: &mut Context<'_>,
) -> Poll<io::Result<Option<Buffer>>> {
    FIRST.with_borrow_mut(|shared| {
        let mut read = ReadBuf::new(shared);
        match stream.poll_read(context, &mut read) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) if read.filled().is_empty() => Poll::Ready(Ok(None)),
            Poll::Ready(Ok(())) => {
                let mut buffer = Buffer::take();
                buffer.bytes.extend_from_slice(read.filled());
                Poll::Ready(Ok(Some(buffer)))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_in_a_buffer_that_is_used_again() {
        let mut stream: &[u8] = b"GET / HTTP/1.1\r\n\r\n";
        let buffer = first_bytes(&mut stream).await.unwrap().unwrap();
        assert_eq!(buffer.bytes, b"GET / HTTP/1.1\r\n\r\n");
        let address = buffer.bytes.as_ptr();
        drop(buffer);
        let again = Buffer::take();
        assert!(again.bytes.is_empty());
        assert_eq!(again.bytes.as_ptr(), address);
        assert!(first_bytes(&mut stream).await.unwrap().is_none());
    }
}
