//! One configuration in force: everything a request looks up, built whole and swapped at once.
//!
//! A request takes the generation that is in force when its header is parsed, and finishes on it;
//! the last request to finish drops it. Nothing here is changed in place, except what measures:
//! a pool whose upstream did not change goes on in the next generation with all it has learnt.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use super::{
    edge::Edge,
    lane::Fit,
    meter::{EndpointId, EndpointTable, Meter},
    route::Router,
    tls::TlsError,
    upstream::{self, Pool},
};
use crate::{
    config::{Config, ListenerIndex, Upstream, UpstreamIndex},
    owner::StoreError,
};

/// Host name and port, and the addresses they led to.
pub type Names = HashMap<(Box<str>, u16), Vec<SocketAddr>>;

/// A configuration and what was built from it.
pub struct Generation {
    /// 1 at start, one more with each reload that was applied.
    pub number: u64,
    /// The configuration, its listeners in the order of the first generation's.
    pub config: Config,
    /// Request → route.
    pub router: Router,
    /// Peers, by upstream index.
    pub pools: Vec<Arc<Pool>>,
    /// Who owns the bytes of connections and requests.
    pub endpoints: EndpointTable,
    /// What the lean lane may serve.
    pub fit: Fit,
    /// TLS and rate limits.
    pub edge: Edge,
}

/// A configuration that cannot be brought into force.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The owners of its endpoints cannot be stored.
    #[error(transparent)]
    Owners(#[from] StoreError),
    /// A file it names cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Generation {
    /// The configuration the process starts with.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn first(config: Config, meter: &Meter) -> Result<Self, BuildError> {
        let pools = config.upstreams.iter().map(Pool::new).map(Arc::new);
        let edge = Edge::build(&config, None)?;
        Self::build(1, pools.collect(), edge, config, meter)
    }

    /// The next generation. The listeners must be those of this one, in any order.
    ///
    /// # Errors
    /// See [`BuildError`]: this generation stays.
    pub fn next(&self, config: Config, meter: &Meter) -> Result<Self, BuildError> {
        let config = config.with_listeners_ordered_as(&self.config);
        let pools = config.upstreams.iter().map(|upstream| {
            self.pool_of(upstream)
                .unwrap_or_else(|| Arc::new(Pool::new(upstream)))
        });
        let edge = Edge::build(&config, Some((&self.config, &self.edge)))?;
        Self::build(self.number + 1, pools.collect(), edge, config, meter)
    }

    fn build(
        number: u64,
        pools: Vec<Arc<Pool>>,
        edge: Edge,
        config: Config,
        meter: &Meter,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            number,
            router: Router::new(&config),
            fit: Fit::of(&config),
            pools,
            edge,
            endpoints: meter.endpoints(endpoint_names(&config))?,
            config,
        })
    }

    /// The addresses that names lead to now.
    pub fn resolve(&self, names: &Names) {
        for pool in self.pools.iter().filter(|pool| pool.has_names()) {
            pool.resolve(names);
        }
    }

    /// Starts the active checks of pools that are new. They end with their pool.
    pub fn start_checks(&self, background: &tokio::runtime::Handle) {
        for pool in &self.pools {
            if pool.settings.check.is_some() && pool.start() {
                background.spawn(upstream::check::run(Arc::downgrade(pool)));
            }
        }
    }

    /// The pool of an upstream that has not changed.
    fn pool_of(&self, upstream: &Upstream) -> Option<Arc<Pool>> {
        let at = self.config.upstreams.iter().position(|u| u == upstream)?;
        self.pools.get(at).cloned()
    }
}

/// Every listener and upstream with its name.
fn endpoint_names(config: &Config) -> impl Iterator<Item = (EndpointId, Arc<str>)> {
    let listeners = config.listeners.iter().enumerate();
    let listeners = listeners.map(|(index, listener)| {
        let id = EndpointId::Listener(ListenerIndex(index));
        (id, Arc::from(listener.name.as_str()))
    });
    let upstreams = config.upstreams.iter().enumerate();
    let upstreams = upstreams.map(|(index, upstream)| {
        let id = EndpointId::Upstream(UpstreamIndex(index));
        (id, Arc::from(upstream.name.as_str()))
    });
    listeners.chain(upstreams)
}
