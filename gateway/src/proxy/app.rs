//! The wrapper around pingora's proxy that sees connections, not requests: it gives each accepted
//! socket its slot before the first request, and takes it back at the end, whatever the end.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use pingora::{
    apps::{HttpServerApp as _, ServerApp},
    protocols::{ALPN, SocketDigest, Stream, http::ServerSession},
    proxy::HttpProxy,
    server::ShutdownWatch,
};

use super::{
    Gateway, Shared,
    lane::{Buffer, Lane},
    meter::EndpointId,
};

/// pingora's default.
const KEEP_ALIVE_SECONDS: u64 = 60;

/// One listener's application.
pub struct MeteredApp {
    /// pingora's proxy.
    pub proxy: Arc<HttpProxy<Gateway>>,
    /// Shared state.
    pub shared: Arc<Shared>,
    /// The short way for requests that need nothing more.
    pub lane: Lane,
    /// The listener.
    pub endpoint: EndpointId,
    /// Whether plain connections may begin with HTTP/2's preface.
    pub http2: bool,
    /// Whether a TLS handshake came before the first request.
    pub tls: bool,
}

#[async_trait]
impl ServerApp for MeteredApp {
    async fn process_new(
        self: &Arc<Self>,
        mut stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let digest = stream.get_socket_digest();
        let _closing = digest.map(|digest| {
            let generation = self.shared.generation.load();
            let table = &generation.endpoints;
            self.shared
                .meter
                .open(table, &digest, stream.id(), self.endpoint, self.tls);
            Closing {
                shared: Arc::clone(&self.shared),
                digest,
            }
        });
        if self.http2 || stream.selected_alpn_proto() == Some(ALPN::H2) {
            return self.proxy.process_new(stream, shutdown).await;
        }
        let generation = self.shared.generation.load_full();
        let read = if generation.fit.listener(self.lane.listener.0) {
            drop(generation);
            self.lane.connection(&mut stream, shutdown).await?
        } else {
            Buffer::default()
        };
        self.full_lane(stream, &read.bytes, shutdown).await;
        None
    }

    async fn cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

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
        let mut result = self.proxy.process_new_http(session, shutdown).await;
        while let Some((stream, settings)) = result.map(|reused| reused.consume()) {
            let mut session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
            }
            result = self.proxy.process_new_http(session, shutdown).await;
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
