//! The composition root: opens everything, serves, and drains in order.
//!
//! Drain: `/readyz` says 503 ► pause ► the port closes ► requests finish ► the writer
//! commits its queue ► the log is moved into the database file.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::campaigns::Campaigns;
use crate::catalogue::{self, SeedError};
use crate::census::{Census, Kind};
use crate::command::pay::Provider;
use crate::config::Config;
use crate::gate::Gate;
use crate::http::member::Issuer;
use crate::http::{self, Drain, Shared};
use crate::metrics::Metrics;
use crate::provider;
use crate::relay::deliver::Client;
use crate::relay::{self, sink};
use crate::store::sql::Backend;
use crate::store::{Limits, Store, StoreError, WriterThread};
use crate::upkeep::{self, Upkeep};
use crate::watch::Hub;
use crate::webhook::{Secret, WebhookError};

/// Connections that may wait to be accepted. A gateway with 500 clients opens as many at once; of
/// those beyond the usual 128 the kernel drops the first packet, and sends it again after a
/// second, when the gateway has given up.
const WAITING_CONNECTIONS_MAX: u32 = 4096;
/// How long watchers may take to say goodbye.
const WATCHERS_PATIENCE: Duration = Duration::from_secs(2);

/// A service that has its port and its database, and is about to answer.
pub struct Service {
    listener: TcpListener,
    address: SocketAddr,
    shared: Shared,
    writer: WriterThread,
    background: Background,
    drain_announce: Duration,
    drain_timeout: Duration,
}

impl Service {
    /// Opens the database, then the port: whoever can connect gets an answer.
    ///
    /// # Errors
    /// [`ServiceError`], naming what could not be opened.
    pub async fn start(config: &Config) -> Result<Self, ServiceError> {
        let seed = if config.seed {
            catalogue::seed()?
        } else {
            Vec::new()
        };
        let limits = Limits {
            queue_capacity: config.queue_capacity,
            readers: config.readers,
        };
        let metrics = Metrics::new();
        let (target, counters) = (config.store.clone(), metrics.clone());
        // It blocks, and PostgreSQL's connections bring their own runtime.
        let opened =
            tokio::task::spawn_blocking(move || Store::open(&target, limits, &seed, &counters));
        let (store, writer) = opened
            .await
            .map_err(std::io::Error::other)
            .map_err(StoreError::Thread)??;
        let background = Background::start(config, &store, &metrics).await?;
        let census = Census::default();
        let settings = config.campaigns.clone();
        let campaigns = Campaigns::start(&store, settings, &census, &metrics).await?;
        let issuer = Arc::new(Issuer::new(
            config.issuer.clone(),
            config.audience.clone(),
            upkeep::keys(&store).await?,
        ));
        let upkeep = Upkeep {
            store: store.clone(),
            provider: background.provider,
            keep: config.keep,
            issuer: issuer.clone(),
            metrics: metrics.clone(),
        };
        census.spawn(Kind::Upkeep, upkeep.run());
        let bind = |error| ServiceError::Bind(config.listen, error);
        let listener = listen(config.listen).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self {
            listener,
            address,
            shared: Shared {
                hub: Hub::new(store.clone(), census.clone()),
                store,
                metrics,
                drain: Drain::default(),
                hold: config.hold,
                provider: background.provider,
                provider_secret: background.secret.clone(),
                gate: background.gate.clone(),
                sinks: background.sinks.clone(),
                campaigns,
                census,
                issuer,
                membership_sku: config.membership_sku.clone(),
                origins: config.origins.clone().into(),
            },
            background,
            writer,
            drain_announce: config.drain_announce,
            drain_timeout: config.drain_timeout,
        })
    }

    /// Where it listens; the real port if port 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` completes, then drains.
    ///
    /// # Errors
    /// [`ServiceError::Accept`] if accepting failed, [`ServiceError::Store`] if the last
    /// commit or the checkpoint did.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServiceError> {
        let (drain, census) = (self.shared.drain.clone(), self.shared.census.clone());
        let (close_port, port_closes) = oneshot::channel::<()>();
        let listener = self.listener.tap_io(|connection| {
            // Small answers must not wait for an acknowledgement of the previous one.
            if let Err(error) = connection.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY was refused");
            }
        });
        let serve =
            axum::serve(listener, http::router(self.shared)).with_graceful_shutdown(async {
                // A dropped sender closes the port as well.
                let _ = port_closes.await;
            });
        let mut server = tokio::spawn(serve.into_future());
        tracing::info!(address = %self.address, "listening");

        let served = tokio::select! {
            ended = &mut server => ended,
            () = stop => {
                tracing::info!("draining");
                drain.begin();
                tokio::time::sleep(self.drain_announce).await;
                let _ = close_port.send(());
                match tokio::time::timeout(self.drain_timeout, &mut server).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        tracing::warn!("requests did not finish in time and are abandoned");
                        server.abort();
                        Ok(Ok(()))
                    }
                }
            }
        };
        // Watchers have been told; their connections are no requests, so nobody else waits.
        let told = tokio::time::timeout(WATCHERS_PATIENCE, census.none_of(Kind::Watcher));
        let _ = told.await;
        self.background.stop().await;
        // Whatever happened to the server, what was queued is committed.
        let stopped = self.writer.stop().await;
        served
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(ServiceError::Accept)?;
        stopped?;
        tracing::info!("stopped");
        Ok(())
    }
}

/// Opens the port with room for a crowd.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A restart must not wait for the connections of the process before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING_CONNECTIONS_MAX)
}

/// What runs beside the requests: relays, questions to the provider, the gate's loading.
struct Background {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    provider: Provider,
    secret: Option<Secret>,
    gate: Option<Gate>,
    sinks: watch::Sender<u64>,
}

impl Background {
    async fn start(
        config: &Config,
        store: &Store,
        metrics: &Metrics,
    ) -> Result<Self, ServiceError> {
        let secret = config
            .shared_secret
            .as_deref()
            .map(Secret::parse)
            .transpose()?;
        if config.provider_url.is_some() && secret.is_none() {
            return Err(ServiceError::NoSecret);
        }
        let signs = match &config.shared_secret {
            Some(secret) => secret.clone(),
            None => Secret::generate(),
        };
        for (kind, url) in [
            (sink::Kind::Risk, &config.risk_url),
            (sink::Kind::Provider, &config.provider_url),
        ] {
            if let Some(url) = url {
                let (url, secret) = (url.clone(), signs.clone());
                store
                    .run_patiently(sink::Configure { kind, url, secret })
                    .await?;
            }
        }
        let client = Client::new(
            store.backend() == Backend::Postgres,
            config.sink_ca.as_deref(),
        )
        .map_err(ServiceError::SinkCa)?;
        let check_after_ms = i64::try_from(config.provider_check.as_millis()).unwrap_or(i64::MAX);
        let provider = match config.provider_url {
            Some(_) => Provider::External { check_after_ms },
            None => Provider::Immediate,
        };
        let (stop, sinks) = (watch::channel(false).0, watch::channel(0).0);
        let mut tasks = JoinSet::new();
        tasks.spawn(relay::run(
            store.clone(),
            metrics.clone(),
            client.clone(),
            sinks.subscribe(),
            stop.subscribe(),
        ));
        if let Some(url) = config.provider_url.clone() {
            tasks.spawn(provider::reconcile(
                store.clone(),
                metrics.clone(),
                client.http().clone(),
                url,
                provider,
                stop.subscribe(),
            ));
        }
        let mut gate = None;
        if let Some(url) = &config.gate_url {
            let connected = Gate::connect(url, "0", metrics.clone())?;
            tasks.spawn(
                connected
                    .clone()
                    .keep_loaded(store.clone(), stop.subscribe()),
            );
            gate = Some(connected);
        }
        Ok(Self {
            tasks,
            stop,
            provider,
            secret,
            gate,
            sinks,
        })
    }

    /// Ends the tasks. What a sink had not acknowledged stays in the outbox.
    async fn stop(mut self) {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a background task failed");
            }
        }
    }
}

/// Completes at SIGTERM or SIGINT. The handlers are installed before this returns.
///
/// # Errors
/// If the system refuses a signal handler.
pub fn termination() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Why the service could not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The embedded catalogue is faulty.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// The database could not be opened, or not be closed cleanly.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// `--shared-secret` is no secret.
    #[error("--shared-secret: {0}")]
    Secret(#[from] WebhookError),
    /// A provider whose callbacks nobody could believe.
    #[error("--provider-url needs --shared-secret, which signs the callbacks; fix: add it")]
    NoSecret,
    /// The client that sinks are told with cannot be made.
    #[error("{0}")]
    SinkCa(std::io::Error),
    /// `--gate` is no address.
    #[error("--gate: {0}; fix: write redis://host:port/")]
    Gate(#[from] redis::RedisError),
    /// The port could not be opened.
    #[error("listening on {0}: {1}")]
    Bind(SocketAddr, std::io::Error),
    /// Connections could no longer be accepted.
    #[error("accepting connections: {0}")]
    Accept(std::io::Error),
}
