//! What is known of a client connection for as long as it lives: who is at its end, and how far
//! its requests are. Shared by the stream ([`super::guard`]) and by the requests on it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Waker,
};

use http::StatusCode;
use pingora::{http::ResponseHeader, protocols::raw_connect::ProxyDigest, proxy::Session};
use tokio::sync::Notify;

use super::strict::Refusal;

/// One accepted connection.
#[derive(Debug)]
pub struct Connection {
    /// At the other end of the socket.
    pub peer: SocketAddr,
    /// Whom the PROXY header names; else the peer.
    pub client: SocketAddr,
    /// None on a plain listener.
    pub tls: Option<Tls>,
    /// Requests whose header was passed on.
    begun: AtomicU64,
    /// Requests that are over, HTTP/1 only.
    over: AtomicU64,
    tunnel: AtomicBool,
    /// pingora writes.
    in_parts: AtomicBool,
    refusal: Mutex<Option<Refusal>>,
    waker: Mutex<Option<Waker>>,
    /// Read, and in no request.
    leftover: AtomicU64,
    requests_max: Option<u64>,
    /// Told when the connection has had its last request.
    pub retire: Notify,
}

/// What the handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The name the client asked for.
    pub server_name: Option<Box<str>>,
    /// Such as `TLSv1.3`.
    pub version: &'static str,
    /// Such as `TLS13_AES_128_GCM_SHA256`.
    pub cipher: &'static str,
    /// The client's verified certificate.
    pub identity: Option<Identity>,
}

/// Who a client certificate names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The first DNS, URI or e-mail name among its subject alternative names.
    pub alternative_name: Option<Box<str>>,
    /// The subject's common name.
    pub common_name: Option<Box<str>>,
}

impl Identity {
    /// The alternative name, else the common name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.alternative_name
            .as_deref()
            .or(self.common_name.as_deref())
    }
}

impl Connection {
    /// Just accepted.
    #[must_use]
    pub fn new(
        peer: SocketAddr,
        client: SocketAddr,
        tls: Option<Tls>,
        requests_max: Option<u64>,
    ) -> Self {
        Self {
            peer,
            client,
            tls,
            begun: AtomicU64::new(0),
            over: AtomicU64::new(0),
            tunnel: AtomicBool::new(false),
            in_parts: AtomicBool::new(false),
            refusal: Mutex::default(),
            waker: Mutex::default(),
            leftover: AtomicU64::new(0),
            requests_max,
            retire: Notify::new(),
        }
    }

    /// The connection a request came on.
    #[must_use]
    pub fn of(session: &Session) -> Option<Arc<Self>> {
        let digest = session.digest()?.proxy_digest.as_ref()?;
        let data = digest.user_data.as_ref()?;
        data.downcast_ref::<Arc<Self>>().cloned()
    }

    /// How the stream hands itself to [`Connection::of`]: pingora carries this digest from the
    /// stream to every request on it.
    pub(super) fn digest(self: &Arc<Self>) -> Option<ProxyDigest> {
        let header = ResponseHeader::build(StatusCode::OK, Some(0)).ok()?;
        Some(ProxyDigest::new(
            Box::new(header),
            Some(Box::new(Arc::clone(self))),
        ))
    }

    /// From now on pingora writes to it: a head, and each piece of a body, by itself.
    pub fn is_written_in_parts(&self) {
        self.in_parts.store(true, Ordering::Relaxed);
    }

    pub(super) fn writes_in_parts(&self) -> bool {
        self.in_parts.load(Ordering::Relaxed)
    }

    /// A request's header was passed on.
    pub fn request_begins(&self) {
        let begun = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        if self.requests_max.is_some_and(|max| begun >= max) {
            self.retire.notify_one();
        }
    }

    /// Whether it had all requests it may have.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.requests_max
            .is_some_and(|max| self.begun.load(Ordering::Relaxed) >= max)
    }

    /// An HTTP/1 request is over: the next header may be passed on.
    pub fn request_is_over(&self) {
        self.over.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Requests that are over.
    #[must_use]
    pub fn requests_over(&self) -> u64 {
        self.over.load(Ordering::Acquire)
    }

    /// Requests whose header was passed on.
    #[must_use]
    pub fn requests_begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// The response was 101: what follows is not HTTP.
    pub fn becomes_tunnel(&self) {
        self.tunnel.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether it is a tunnel.
    #[must_use]
    pub fn is_tunnel(&self) -> bool {
        self.tunnel.load(Ordering::Acquire)
    }

    /// The client is refused; the request that stands for it answers.
    pub fn refuse(&self, refusal: Refusal) {
        *lock(&self.refusal) = Some(refusal);
    }

    /// Why the client was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        *lock(&self.refusal)
    }

    /// Bytes were read that are in no request.
    pub(super) fn leaves(&self, bytes: usize) {
        self.leftover.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes read that are in no request.
    #[must_use]
    pub fn leftover(&self) -> u64 {
        self.leftover.load(Ordering::Relaxed)
    }

    /// Whom to wake when a request is over.
    pub(super) fn wake_later(&self, waker: &Waker) {
        let mut kept = lock(&self.waker);
        if !kept.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            *kept = Some(waker.clone());
        }
    }

    fn wake(&self) {
        if let Some(waker) = lock(&self.waker).take() {
            waker.wake();
        }
    }
}

/// An HTTP/1 request's hold on its connection: over when dropped.
pub struct OnConnection(Arc<Connection>);

impl OnConnection {
    /// For a request that came on it.
    #[must_use]
    pub fn new(connection: Arc<Connection>) -> Self {
        Self(connection)
    }
}

impl std::ops::Deref for OnConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl Drop for OnConnection {
    fn drop(&mut self) {
        self.0.request_is_over();
    }
}

impl fmt::Debug for OnConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
