//! HTTP/2 of the full lane alone (`gateway.lane = "full"`): pingora's own, which takes its settings
//! when its proxy is made. So it is made anew when a reload has changed them; connections stay with
//! the one they began on.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use pingora::{
    apps::HttpServerOptions,
    protocols::http::v2::server::default_h2_options,
    proxy::{HttpProxy, http_proxy},
    server::configuration::ServerConf,
};

use super::{Gateway, Shared};
use crate::config::{Limits, ListenerIndex};

/// One listener's.
pub struct FullHttp2 {
    conf: Arc<ServerConf>,
    shared: Arc<Shared>,
    listener: ListenerIndex,
    /// None before the first connection.
    made: ArcSwapOption<Made>,
}

struct Made {
    settings: Settings,
    proxy: Arc<HttpProxy<Gateway>>,
}

/// What HTTP/2 is told at a connection's begin.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Settings {
    streams_max: u32,
    header_bytes_max: u32,
    idle_timeout: Duration,
}

impl Settings {
    fn of(limits: &Limits) -> Self {
        Self {
            streams_max: limits.streams_max,
            header_bytes_max: u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX),
            idle_timeout: limits.idle_timeout,
        }
    }
}

impl FullHttp2 {
    /// Makes nothing yet.
    #[must_use]
    pub fn new(conf: &Arc<ServerConf>, shared: &Arc<Shared>, listener: ListenerIndex) -> Self {
        Self {
            conf: Arc::clone(conf),
            shared: Arc::clone(shared),
            listener,
            made: ArcSwapOption::empty(),
        }
    }

    /// With these limits.
    pub fn proxy(&self, limits: &Limits) -> Arc<HttpProxy<Gateway>> {
        let settings = Settings::of(limits);
        if let Some(made) = &*self.made.load()
            && made.settings == settings
        {
            return Arc::clone(&made.proxy);
        }
        let made = make(&self.conf, &self.shared, self.listener, settings);
        let proxy = Arc::clone(&made.proxy);
        self.made.store(Some(Arc::new(made)));
        proxy
    }
}

fn make(
    conf: &Arc<ServerConf>,
    shared: &Arc<Shared>,
    listener: ListenerIndex,
    settings: Settings,
) -> Made {
    let gateway = Gateway {
        shared: Arc::clone(shared),
        listener,
    };
    let mut proxy = http_proxy(conf, gateway);
    let mut options = HttpServerOptions::default();
    // The guard answers whether plain text may be HTTP/2, by the configuration in force.
    options.h2c = true;
    options.h2_idle_timeout = Some(settings.idle_timeout);
    let mut h2 = default_h2_options();
    h2.max_concurrent_streams(settings.streams_max);
    h2.max_header_list_size(settings.header_bytes_max);
    proxy.h2_options = Some(h2);
    proxy.server_options = Some(options);
    Made {
        settings,
        proxy: Arc::new(proxy),
    }
}
