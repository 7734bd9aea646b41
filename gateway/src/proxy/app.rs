//! The wrapper around pingora's proxy that sees connections, not requests: it gives each accepted
//! socket its slot before the first request, and takes it back at the end, whatever the end.

use std::sync::Arc;

use async_trait::async_trait;
use pingora::{
    apps::{HttpServerApp as _, ServerApp},
    protocols::{SocketDigest, Stream},
    proxy::HttpProxy,
    server::ShutdownWatch,
};

use super::{Gateway, Shared, meter::EndpointId};

/// One listener's application.
pub struct MeteredApp {
    /// pingora's proxy.
    pub proxy: Arc<HttpProxy<Gateway>>,
    /// Shared state.
    pub shared: Arc<Shared>,
    /// The listener.
    pub endpoint: EndpointId,
    /// Whether a TLS handshake came before the first request.
    pub tls: bool,
}

#[async_trait]
impl ServerApp for MeteredApp {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
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
        self.proxy.process_new(stream, shutdown).await
    }

    async fn cleanup(&self) {
        self.proxy.http_cleanup().await;
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
