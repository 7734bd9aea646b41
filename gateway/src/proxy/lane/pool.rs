//! Upstream connections kept by the worker that made them: no lock is contended and no wake-up
//! crosses a processor.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use ahash::HashMap;
use pingora::protocols::SocketDigest;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::proxy::{Shared, generation::Generation, meter::Tracked, upstream::Pool};

/// Idle connections kept to one peer by one worker; the oldest goes first.
const IDLE_MAX: usize = 256;
/// More than there are workers: the hash of a worker's thread rarely meets another's.
const SHARDS: usize = 64;

thread_local! {
    static SHARD: usize = {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(std::thread::current().id());
        usize::try_from(hash % SHARDS as u64).unwrap_or(0)
    };
}

/// A socket that counts what it takes: whose bytes follow is said by that count, without a system
/// call.
pub struct Counted {
    stream: TcpStream,
    sent: Arc<AtomicU64>,
}

impl Counted {
    /// Whether there is something to read, or the end.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.poll_read_ready(context)
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let taken = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.sent.fetch_add(taken as u64, Ordering::Relaxed);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A connection to a peer, known to the kernel side from its first byte to its last.
pub struct UpstreamConnection {
    /// The socket.
    pub stream: Counted,
    /// Its slot; None where nothing is observed.
    pub tracked: Option<Tracked>,
    digest: Arc<SocketDigest>,
    shared: Arc<Shared>,
}

impl UpstreamConnection {
    /// Takes a connected socket. `observe` names it to the kernel side before a byte is sent.
    pub fn new(
        stream: TcpStream,
        shared: &Arc<Shared>,
        observe: impl FnOnce(&Arc<SocketDigest>, i32),
    ) -> Self {
        let fd = stream.as_raw_fd();
        let digest = Arc::new(SocketDigest::from_raw_fd(fd));
        observe(&digest, fd);
        let tracked = shared.meter.find(&digest);
        let sent = Arc::<AtomicU64>::default();
        if let Some(tracked) = &tracked {
            tracked.connection.counts(Arc::clone(&sent));
        }
        Self {
            tracked,
            stream: Counted { stream, sent },
            digest,
            shared: Arc::clone(shared),
        }
    }

    /// Nothing has come on it since its last response, not even an end.
    fn is_quiet(&self) -> bool {
        let mut byte = [0];
        matches!(self.stream.stream.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Drop for UpstreamConnection {
    fn drop(&mut self) {
        self.shared.meter.close(&self.digest);
    }
}

/// Which connections serve which requests alike. An upstream is known by its pool of peers, which
/// outlives a reload when nothing about the upstream changed, and only then.
#[derive(Clone, Debug)]
pub struct PoolKey {
    /// The upstream.
    pub upstream: Arc<Pool>,
    /// The peer.
    pub peer: SocketAddr,
}

impl PartialEq for PoolKey {
    fn eq(&self, other: &Self) -> bool {
        self.peer == other.peer && Arc::ptr_eq(&self.upstream, &other.upstream)
    }
}

impl Eq for PoolKey {}

impl Hash for PoolKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Two words: the standard hash of an address is a dozen.
        let ip = match self.peer.ip() {
            IpAddr::V4(v4) => v4.to_bits().into(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        state.write_u128(ip);
        state.write_usize(Arc::as_ptr(&self.upstream) as usize ^ usize::from(self.peer.port()));
    }
}

struct Idle {
    connection: UpstreamConnection,
    since: Instant,
}

/// Idle connections of all workers, each in its own shard.
pub struct Pools {
    shards: Vec<Shard>,
}

type Shard = Mutex<Worker>;

/// What one worker keeps.
#[derive(Default)]
struct Worker {
    /// The generation whose upstreams these are.
    generation: u64,
    idle: HashMap<PoolKey, VecDeque<Idle>>,
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }
}

impl Pools {
    /// The connection used last that is still good: the others may grow old and be closed.
    pub fn take(
        &self,
        key: &PoolKey,
        now: Instant,
        idle_max: Duration,
    ) -> Option<UpstreamConnection> {
        let mut gone = Vec::new();
        let found = {
            let mut shard = self.shard();
            let idle = shard.idle.get_mut(key)?;
            let mut found = None;
            while let Some(candidate) = idle.pop_back() {
                let fresh = now.duration_since(candidate.since) < idle_max;
                if fresh && candidate.connection.is_quiet() {
                    found = Some(candidate.connection);
                    break;
                }
                gone.push(candidate);
            }
            found
        };
        // Closing takes system calls, and the lock is no place for them.
        drop(gone);
        found
    }

    /// Keeps a connection whose response was read to its end.
    pub fn put(
        &self,
        key: PoolKey,
        connection: UpstreamConnection,
        generation: &Generation,
        now: Instant,
        idle_max: Duration,
    ) {
        let mut gone = Vec::new();
        {
            let mut shard = self.shard();
            if shard.generation < generation.number {
                shard.generation = generation.number;
                // What a reload took away is not kept: nobody would ever ask for it.
                let kept = |key: &PoolKey| {
                    let mut pools = generation.pools.iter();
                    pools.any(|pool| Arc::ptr_eq(pool, &key.upstream))
                };
                gone.extend(
                    shard
                        .idle
                        .extract_if(|key, _| !kept(key))
                        .flat_map(|(_, idle)| idle),
                );
            }
            let idle = shard.idle.entry(key).or_default();
            idle.push_back(Idle {
                connection,
                since: now,
            });
            while idle.len() > IDLE_MAX
                || idle
                    .front()
                    .is_some_and(|oldest| now.duration_since(oldest.since) >= idle_max)
            {
                gone.extend(idle.pop_front());
            }
        }
        drop(gone);
    }

    fn shard(&self) -> MutexGuard<'_, Worker> {
        self.shards[SHARD.with(|at| *at)]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
