//! The full lane: pingora's proxy. It reads the host's certificates when it is made, twice, which
//! takes longer than all else of a start, so it is made once the gateway serves, or when the first
//! connection needs it, whichever comes first.

use std::sync::{Arc, OnceLock};

use pingora::{
    apps::HttpServerApp as _,
    proxy::{HttpProxy, http_proxy},
    server::configuration::ServerConf,
};

use super::{Gateway, Shared};
use crate::config::ListenerIndex;

/// One listener's.
pub struct Full {
    conf: Arc<ServerConf>,
    shared: Arc<Shared>,
    listener: ListenerIndex,
    made: OnceLock<Arc<HttpProxy<Gateway>>>,
}

impl Full {
    /// Makes nothing yet.
    #[must_use]
    pub fn new(conf: &Arc<ServerConf>, shared: &Arc<Shared>, listener: ListenerIndex) -> Self {
        Self {
            conf: Arc::clone(conf),
            shared: Arc::clone(shared),
            listener,
            made: OnceLock::new(),
        }
    }

    /// Makes it, at first: a few milliseconds.
    ///
    /// # Panics
    /// The host's certificates cannot be read; pingora says why.
    pub fn proxy(&self) -> &Arc<HttpProxy<Gateway>> {
        self.made.get_or_init(|| {
            let gateway = Gateway {
                shared: Arc::clone(&self.shared),
                listener: self.listener,
            };
            Arc::new(http_proxy(&self.conf, gateway))
        })
    }

    /// Closes the connections that wait for a request.
    pub async fn cleanup(&self) {
        if let Some(proxy) = self.made.get() {
            proxy.http_cleanup().await;
        }
    }
}
