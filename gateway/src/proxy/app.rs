//! The wrapper around pingora's proxy that sees connections, not requests: it lets them in, reads
//! a PROXY header, shakes hands, gives each accepted socket its slot before the first request, and
//! takes it back at the end, whatever the end.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::BytesMut;
use pingora::{
    apps::{HttpServerApp as _, ServerApp},
    protocols::{ALPN, SocketDigest, Stream, http::ServerSession},
    server::ShutdownWatch,
};
use tokio::{sync::watch, time::timeout};
use tokio_rustls::TlsAcceptor;

use super::{
    Shared,
    alarm::Desync,
    connection::Connection,
    frames::PREFACE,
    full::Full,
    full_http2::FullHttp2,
    gate::{Admitted, Turned, network_of},
    generation::Generation,
    guard::{Guard, Transport},
    lane::{Buffer, Lane, Stay},
    meter::EndpointId,
    proxy_header::{self, Named, Opened},
    tls,
};
use crate::{
    census::Kind,
    config::{Limits, ListenerIndex, Name, Protection},
    slots::Before,
};

/// A connection on which nothing was asked for so long after we began to leave is closed.
pub const LAST_REQUEST: Duration = Duration::from_secs(1);
/// pingora's default.
const KEEP_ALIVE_SECONDS: u64 = 60;

/// One listener's application.
pub struct MeteredApp {
    /// pingora's proxy.
    pub full: Arc<Full>,
    /// HTTP/2 where the lean lane is off.
    pub full_http2: FullHttp2,
    /// Shared state.
    pub shared: Arc<Shared>,
    /// The short way for requests that need nothing more.
    pub lane: Lane,
    /// The listener.
    pub listener: ListenerIndex,
}

#[async_trait]
impl ServerApp for MeteredApp {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        // A task of our own: pingora's holds 9 KiB, for a handshake that is the guard's here.
        let (app, shutdown) = (Arc::clone(self), shutdown.clone());
        tokio::spawn(async move { app.connection(stream, &shutdown).await });
        None
    }

    async fn cleanup(&self) {
        // pingora now closes the connections that wait for a request. One may be on its way.
        tokio::time::sleep(LAST_REQUEST).await;
        self.full.cleanup().await;
    }
}

/// A connection whose first request may come.
struct Ready {
    transport: Transport,
    connection: Connection,
    /// What was received up to the end of the TLS handshake, a PROXY header included.
    handshake_bytes: Option<u64>,
    admitted: Admitted,
}

/// The rest of a connection's life.
struct Way {
    stream: Stream,
    connection: Arc<Connection>,
    /// Whether plain text may be HTTP/2, and whether the lean lane begins.
    protocol: (bool, bool),
    stay: Stay,
    name: Name,
    _admitted: Admitted,
}

impl MeteredApp {
    /// From the accepted socket to its end.
    async fn connection(&self, stream: Stream, shutdown: &ShutdownWatch) {
        let Some(digest) = stream.get_socket_digest() else {
            return;
        };
        let Some(peer) = digest.peer_addr().and_then(|peer| peer.as_inet().copied()) else {
            return;
        };
        // The configuration this connection is opened by; its requests take the one then in force.
        let generation = self.shared.generation.load_full();
        let listener = &generation.config.listeners[self.listener.0];
        let name = listener.name.as_str();
        let census = &self.shared.census;
        let _alive = census.enter(Kind::Connection, listener.name.clone(), Instant::now());
        let received = Arc::new(AtomicU64::new(0));
        // Before the handshake, so that the kernel tells its frames from the first request's.
        let is_tls = generation.edge.tls[self.listener.0].is_some();
        let endpoint = EndpointId::Listener(self.listener);
        let before = if is_tls {
            Before::HandshakeToCome
        } else {
            Before::Nothing
        };
        let meter = &self.shared.meter;
        let fd = stream.id();
        meter.open(&generation.endpoints, &digest, fd, endpoint, before);
        let closing = Closing {
            shared: Arc::clone(&self.shared),
            digest,
        };
        // In a box, as is all that an idle connection has no use for.
        let opened = Box::pin(self.open(stream, peer, &generation, &received));
        let opened = match opened.await {
            Ok(opened) => opened,
            Err(turned) => {
                self.shared.edge.turned(name, turned);
                let desync = match turned {
                    Turned::ProxyHeader => Some(Desync::ProxyHeader),
                    Turned::TlsHandshake | Turned::TlsTimeout => Some(Desync::Handshake),
                    _ => None,
                };
                if let Some(desync) = desync {
                    self.alarm(name, peer.ip(), desync, received.load(Ordering::Relaxed));
                }
                log::debug!("{name}: {peer}: turned away: {}", turned.reason());
                return;
            }
        };
        let way = self.way(opened, &generation, &closing.digest);
        // Or an old configuration lives as long as its last connection.
        drop(generation);
        let Way {
            stream,
            connection,
            protocol,
            stay,
            name,
            _admitted,
        } = way;
        self.serve(stream, &connection, protocol, stay, shutdown)
            .await;
        self.look_back(
            name.as_str(),
            &connection,
            &closing.digest,
            received.load(Ordering::Relaxed),
        );
    }

    /// How it goes on. Not in the connection's own future: what is borrowed there has its place in
    /// it until the end, and an idle connection would keep it.
    fn way(&self, opened: Ready, generation: &Generation, digest: &Arc<SocketDigest>) -> Way {
        let listener = &generation.config.listeners[self.listener.0];
        let limits = &listener.protection.limits;
        if let Some(tracked) = self.shared.meter.find(digest) {
            if let Some(handshake_bytes) = opened.handshake_bytes {
                tracked.connection.handshake_over(handshake_bytes);
            }
            tracked.connection.counts(opened.transport.sent());
        }
        let is_tls = matches!(opened.transport, Transport::Tls(..));
        let connection = Arc::new(opened.connection);
        let h2c = listener.http2 && !is_tls;
        let guard = self.guard(opened.transport, &connection, limits, h2c, &listener.name);
        let lean = !h2c && !guard.speaks_http2() && generation.fit.listener(self.listener.0);
        Way {
            stream: Box::new(guard),
            connection,
            protocol: (h2c, lean),
            stay: Stay::new(limits),
            name: listener.name.clone(),
            _admitted: opened.admitted,
        }
    }

    /// Who it is, whether it may, and TLS.
    async fn open(
        &self,
        stream: Stream,
        peer: SocketAddr,
        generation: &Generation,
        received: &Arc<AtomicU64>,
    ) -> Result<Ready, Turned> {
        let listener = &generation.config.listeners[self.listener.0];
        let protection = &listener.protection;
        let limits = &protection.limits;
        let peer = proxy_header::plain(peer);
        let from = &protection.proxy_protocol_from;
        let named = !from.is_empty();
        if named && !from.iter().any(|net| net.contains(&peer.ip())) {
            return Err(Turned::ProxyHeader);
        }
        // Before the header is read for everybody else: a connection that says nothing counts.
        let mut admitted = None;
        if !named {
            admitted = Some(self.admit(peer, protection)?);
        }
        let mut opened = Opened::new(stream);
        opened.received = Arc::clone(received);
        let mut client = peer;
        if named {
            let header = timeout(limits.handshake_timeout, opened.read_header()).await;
            match header {
                Ok(Ok(Named::Client(address))) => client = address,
                Ok(Ok(Named::Nobody)) => {}
                Ok(Err(_)) | Err(_) => return Err(Turned::ProxyHeader),
            }
        }
        let admitted = match admitted {
            Some(admitted) => admitted,
            None => self.admit(client, protection)?,
        };
        let mut handshake_bytes = None;
        let (transport, tls) = match &generation.edge.tls[self.listener.0] {
            None => (Transport::Plain(opened), None),
            Some(config) => {
                opened.handshake_begins();
                let accept = TlsAcceptor::from(Arc::clone(config)).accept(opened);
                let mut stream = timeout(limits.handshake_timeout, accept)
                    .await
                    .map_err(|_| Turned::TlsTimeout)?
                    .map_err(|error| {
                        log::debug!("{}: {client}: TLS handshake: {error}", listener.name);
                        Turned::TlsHandshake
                    })?;
                handshake_bytes = Some(stream.get_mut().0.handshake_is_over());
                let (agreed, digest) = tls::agreed(&stream);
                (
                    Transport::Tls(Box::new(stream), Arc::new(digest)),
                    Some(agreed),
                )
            }
        };
        Ok(Ready {
            transport,
            connection: Connection::new(peer, client, tls, limits.requests_per_connection_max),
            handshake_bytes,
            admitted,
        })
    }

    /// A connection is over: whether something came on it that no request was.
    fn look_back(
        &self,
        name: &str,
        connection: &Connection,
        digest: &Arc<SocketDigest>,
        received: u64,
    ) {
        let leftover = connection.leftover();
        let (desync, seen) = if connection.refusal().is_some() {
            (Desync::Refused, leftover)
        } else if connection.requests_begun() == 0 && received > 0 {
            (Desync::NoRequest, received)
        } else if leftover > 0 {
            (Desync::Leftover, leftover)
        } else {
            return;
        };
        // The kernel's count has headers and retransmits in it, and what nobody read.
        let counted = self.shared.meter.find(digest);
        let counted = counted.map(|tracked| tracked.connection.take_unclaimed().bytes);
        let bytes = counted.unwrap_or(0).max(seen);
        self.alarm(name, connection.client.ip(), desync, bytes);
    }

    fn alarm(&self, name: &str, peer: std::net::IpAddr, desync: Desync, bytes: u64) {
        self.shared.edge.desync(name, desync, bytes);
        if let Some(share) = self.shared.alarm.note(network_of(peer), bytes) {
            log::warn!(
                "{name}: {peer}: {} bytes on {} connections are in no request, the last for: {}",
                share.bytes,
                share.connections,
                desync.reason()
            );
        }
    }

    fn admit(&self, client: SocketAddr, protection: &Protection) -> Result<Admitted, Turned> {
        self.shared.gate.admit(
            self.listener,
            client.ip(),
            &protection.access,
            &protection.limits,
        )
    }

    fn guard(
        &self,
        transport: Transport,
        connection: &Arc<Connection>,
        limits: &Limits,
        h2c: bool,
        name: &Name,
    ) -> Guard {
        let shared = Arc::clone(&self.shared);
        let listener = name.clone();
        let peer = connection.client;
        Guard::new(
            transport,
            Arc::clone(connection),
            limits.clone(),
            h2c,
            move |refusal| {
                shared.edge.refused(listener.as_str(), refusal);
                log::info!("{listener}: {peer}: refused: {refusal}");
            },
        )
    }

    /// Until the connection ends: on the lean lane where it can be, else on pingora's.
    async fn serve(
        &self,
        mut stream: Stream,
        connection: &Arc<Connection>,
        (h2c, lean): (bool, bool),
        stay: Stay,
        shutdown: &ShutdownWatch,
    ) {
        let read = if lean {
            let left = self
                .lane
                .connection(&mut stream, connection, stay, shutdown)
                .await;
            let Some(read) = left else { return };
            read
        } else {
            Buffer::default()
        };
        Box::pin(self.to_its_end(stream, connection, h2c, read, stay, shutdown)).await;
    }

    /// HTTP/2, and what the lean lane has left. Neither asks for a connection's age nor for its
    /// requests: they are told by a shutdown of the connection's own. HTTP/2 is told by GOAWAY,
    /// HTTP/1 by `connection: close`.
    async fn to_its_end(
        &self,
        stream: Stream,
        connection: &Arc<Connection>,
        h2c: bool,
        read: Buffer,
        stay: Stay,
        shutdown: &ShutdownWatch,
    ) {
        let (leave, leaving) = watch::channel(*shutdown.borrow());
        let serving = async {
            let mut stream = stream;
            let mut http2 = stream.selected_alpn_proto() == Some(ALPN::H2);
            if h2c {
                let mut begins = [0; PREFACE.len()];
                if stream.try_peek(&mut begins).await.is_err() {
                    return;
                }
                http2 = begins == *PREFACE;
            }
            if !http2 {
                connection.is_written_in_parts();
                self.full_lane(stream, &read.bytes, &leaving).await;
                return;
            }
            let generation = self.shared.generation.load_full();
            let protection = &generation.config.listeners[self.listener.0].protection;
            let limits = protection.limits.clone();
            let own = generation.fit.http2();
            // Or an old configuration lives as long as its last connection.
            drop(generation);
            if own {
                self.lane
                    .http2(&self.full, stream, connection, &limits, &leaving)
                    .await;
            } else {
                connection.is_written_in_parts();
                let proxy = self.full_http2.proxy(&limits);
                proxy.process_new(stream, &leaving).await;
            }
        };
        let asking = async {
            let mut shutdown = shutdown.clone();
            let age = async {
                match stay.until {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => {}
                () = age => {}
                () = connection.retire.notified() => {}
            }
            let _ = leave.send(true);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = serving => {}
            () = asking => {}
        }
    }
}

/// What moves the bytes.
impl MeteredApp {
    /// pingora's own loop over an HTTP/1 connection's requests, begun with what the lean lane has
    /// read.
    async fn full_lane(&self, stream: Stream, read: &[u8], shutdown: &ShutdownWatch) {
        let mut session = ServerSession::new_http1(stream);
        session.set_keepalive((!*shutdown.borrow()).then_some(KEEP_ALIVE_SECONDS));
        // Off by default in pingora, which then closes after a request that others follow.
        session.set_pipelining_enabled(true);
        if !read.is_empty() {
            session.set_pipelined_prefix(BytesMut::from(read));
        }
        let proxy = self.full.proxy();
        let mut result = proxy.process_new_http(session, shutdown).await;
        while let Some((stream, settings)) = result.map(|reused| reused.consume()) {
            let mut session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
            }
            result = proxy.process_new_http(session, shutdown).await;
        }
    }
}

/// Forgets the connection when the task ends or is dropped.
struct Closing {
    shared: Arc<Shared>,
    digest: Arc<SocketDigest>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.shared.meter.close(&self.digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, F: Future>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// What a connection keeps while nothing is asked. A local that is borrowed has its place in the
    /// future to the end, so one more line can cost every idle connection a kilobyte.
    #[test]
    fn an_idle_connections_future_is_small() {
        type Parts = (&'static MeteredApp, Stream, &'static ShutdownWatch);
        let bytes =
            size_of_future(|(app, stream, shutdown): Parts| app.connection(stream, shutdown));
        assert!(bytes <= 1536, "{bytes} bytes");
    }
}
