//! pingora, and what it serves.

use std::sync::Arc;

use pingora::{
    apps::http_app::ServeHttp,
    listeners::{L4BufferSettings, ListenerConfig},
    server::{RunArgs, Server, configuration::ServerConf},
    services::listening::Service,
};

use crate::{
    admin::Admin,
    config::{Config, ListenerIndex},
    proxy::{
        Shared,
        app::MeteredApp,
        full::Full,
        full_http2::FullHttp2,
        lane::{Lane, Pools},
    },
    serve::Serving,
};

/// Runs pingora until the way out has been gone.
pub(super) fn serve(shared: &Arc<Shared>, config: &Config, serving: &Arc<Serving>, admin: Admin) {
    let conf = ServerConf {
        threads: config.gateway.threads.get(),
        // Requests stay on the worker that accepted them: 15 % less CPU on small requests.
        work_stealing: false,
        // The way out has waited already.
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        max_retries: 6,
        upstream_keepalive_pool_size: 1024,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let conf = Arc::clone(&server.configuration);
    let pools = Arc::new(Pools::default());
    let mut all_full = Vec::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        let listener_index = ListenerIndex(index);
        let full = Arc::new(Full::new(&conf, shared, listener_index));
        all_full.push(Arc::clone(&full));
        let app = MeteredApp {
            full,
            full_http2: FullHttp2::new(&conf, shared, listener_index),
            lane: Lane {
                shared: Arc::clone(shared),
                listener: listener_index,
                pools: Arc::clone(&pools),
            },
            shared: Arc::clone(shared),
            listener: listener_index,
        };
        let mut service = Service::new(format!("listener {}", listener.name), app);
        let address = listener.address.to_string();
        // TLS is the guard's: a reload may change it. Each lane has buffers of its own, and only
        // while data moves: pingora's are 64 KiB a connection for what is read, 1.4 for what is
        // written.
        let unbuffered = L4BufferSettings::unbuffered();
        service.add_listener(ListenerConfig::tcp(address).l4_buffer(unbuffered));
        server.add_service(serving.follow(service, false));
    }
    let mut service = Service::new("admin".into(), admin);
    service.add_tcp(&config.admin.listen.to_string());
    server.add_service(serving.follow(service, true));
    serving.afterwards(move || {
        for full in &all_full {
            full.proxy();
        }
    });
    server.run(RunArgs {
        shutdown_signal: serving.way_out(),
    });
}

// The admin service is a ServeHttp; this keeps the bound next to its use.
const _: fn() = || {
    fn serves<T: ServeHttp>() {}
    serves::<Admin>();
};
