//! Listening, and the way out: sockets that can be handed to another process, a gateway that says
//! it is not ready before it stops accepting, and requests that end before it does.
//!
//! Out, on SIGTERM, SIGQUIT, or when another process has taken over: not ready → (`drain_delay`)
//! → no new connections; HTTP/1 answers say `connection: close`, HTTP/2 gets GOAWAY → the last
//! connection has gone, or `grace_seconds` have passed → the process ends. SIGINT ends at once.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd as _, IntoRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use pingora::{
    server::{Fds, ListenFds, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch},
    services::Service,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    census::{Census, Kind},
    config::Config,
    systemd,
};

/// How often a draining gateway looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);
/// How long after the start what can wait waits.
const AFTERWARDS: Duration = Duration::from_millis(50);
/// A draining gateway lives at least so long: the answer to who asked for it is under way.
const DRAIN_MIN: Duration = Duration::from_millis(200);

/// Bound sockets by address. Held beside pingora's own, so that they can be handed over.
#[derive(Default)]
pub struct Sockets(HashMap<String, OwnedFd>);

impl Sockets {
    /// Binds what the configuration asks for, except what another process hands over.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub fn bind(config: &Config, mut inherited: HashMap<String, OwnedFd>) -> anyhow::Result<Self> {
        let mut bound = HashMap::new();
        let listeners = config.listeners.iter();
        let listeners = listeners.map(|l| (format!("listener {}", l.name), l.address));
        let admin = ("admin.listen".to_owned(), config.admin.listen);
        for (name, address) in listeners.chain([admin]) {
            let key = key(address);
            let socket = match inherited.remove(&key) {
                Some(socket) => socket,
                None => listen(address)
                    .with_context(|| format!("{name}: cannot listen on {address}"))?
                    .into(),
            };
            bound.insert(key, socket);
        }
        Ok(Self(bound))
    }

    /// A table of them for pingora, which closes what it is given.
    fn for_pingora(&self) -> io::Result<ListenFds> {
        let mut table = Fds::new();
        for (address, socket) in &self.0 {
            table.add(address.clone(), socket.try_clone()?.into_raw_fd());
        }
        Ok(Arc::new(table.into()))
    }
}

/// pingora takes a handed socket as it is: a blocking one would stop a thread in `accept`.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// As pingora names its listeners.
fn key(address: SocketAddr) -> String {
    address.to_string()
}

type Work = Box<dyn FnOnce() + Send>;

/// How far the process is.
pub struct Serving {
    sockets: Mutex<Sockets>,
    for_pingora: ListenFds,
    /// Services to be started, and those that have.
    services: AtomicUsize,
    started: AtomicUsize,
    /// What is done once it serves.
    afterwards: Mutex<Vec<Work>>,
    /// Load balancers are to look elsewhere.
    leaving: AtomicBool,
    /// True: clients are accepted no more.
    accept: watch::Sender<bool>,
    /// True: the admin port neither.
    admin: watch::Sender<bool>,
    /// True: another process serves.
    replaced: watch::Sender<bool>,
    census: Arc<Census>,
    delay: Duration,
    grace: Duration,
}

impl Serving {
    /// Bound, and not yet serving.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(config: &Config, sockets: Sockets, census: Arc<Census>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            for_pingora: sockets.for_pingora()?,
            sockets: Mutex::new(sockets),
            services: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            afterwards: Mutex::default(),
            leaving: AtomicBool::new(false),
            accept: watch::channel(false).0,
            admin: watch::channel(false).0,
            replaced: watch::channel(false).0,
            census,
            delay: config.gateway.drain_delay,
            grace: config.gateway.grace,
        }))
    }

    /// Does this once the process serves, on a thread of its own: what no start is to wait for.
    pub fn afterwards(&self, work: impl FnOnce() + Send + 'static) {
        let afterwards = self.afterwards.lock();
        let mut afterwards = afterwards.unwrap_or_else(PoisonError::into_inner);
        afterwards.push(Box::new(work));
    }

    fn begin_afterwards(&self) {
        let afterwards = self.afterwards.lock();
        let works = std::mem::take(&mut *afterwards.unwrap_or_else(PoisonError::into_inner));
        let started = std::thread::Builder::new()
            .name("afterwards".into())
            .spawn(move || {
                // The first answers have the processor to themselves.
                std::thread::sleep(AFTERWARDS);
                for work in works {
                    work();
                }
            });
        if let Err(error) = started {
            log::error!("what is to be done after the start is not: no thread ({error})");
        }
    }

    /// A service that starts and stops by what this says.
    pub fn follow<S: Service>(self: &Arc<Self>, service: S, is_admin: bool) -> Followed<S> {
        self.services.fetch_add(1, Ordering::Relaxed);
        Followed {
            service,
            serving: Arc::clone(self),
            is_admin,
        }
    }

    /// Whether every service has begun.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        let services = self.services.load(Ordering::Relaxed);
        services > 0 && self.started.load(Ordering::Relaxed) == services
    }

    /// Whether the process is on its way out.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Holds on every socket, by address.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn second_holds(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let sockets = self.sockets();
        let sockets = sockets.0.iter();
        sockets
            .map(|(address, socket)| Ok((address.clone(), socket.as_fd().try_clone_to_owned()?)))
            .collect()
    }

    /// Another process serves: this one drains and ends.
    pub fn replace(&self) {
        let _ = self.replaced.send(true);
    }

    /// When the process is to end, and how.
    #[must_use]
    pub fn way_out(self: &Arc<Self>) -> Box<dyn ShutdownSignalWatch> {
        Box::new(WayOut(Arc::clone(self)))
    }

    async fn drain(&self, replaced: bool) {
        self.leaving.store(true, Ordering::Relaxed);
        if !replaced {
            systemd::stopping();
        }
        if !replaced && !self.delay.is_zero() {
            log::info!("not ready any more; accepting for another {:?}", self.delay);
            sleep(self.delay).await;
        }
        let began = Instant::now();
        // A socket that somebody still holds would go on queueing connections.
        self.sockets().0.clear();
        let _ = self.accept.send(true);
        if replaced {
            let _ = self.admin.send(true);
            sleep(DRAIN_MIN).await;
        }
        loop {
            let left = self.census.count(Kind::Connection);
            if left == 0 {
                break;
            }
            if began.elapsed() >= self.grace {
                log::warn!(
                    "{left} connections are still open after {:?} and end now (gateway.grace_seconds)",
                    self.grace
                );
                break;
            }
            sleep(LOOK).await;
        }
        let _ = self.admin.send(true);
        log::info!("drained in {:?}", began.elapsed());
    }

    fn sockets(&self) -> MutexGuard<'_, Sockets> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct WayOut(Arc<Serving>);

#[async_trait]
impl ShutdownSignalWatch for WayOut {
    async fn recv(&self) -> ShutdownSignal {
        let signals = || -> io::Result<_> {
            Ok((
                signal(SignalKind::terminate())?,
                signal(SignalKind::quit())?,
                signal(SignalKind::interrupt())?,
            ))
        };
        let (mut terminate, mut quit, mut interrupt) = match signals() {
            Ok(signals) => signals,
            Err(error) => {
                log::error!("cannot wait for signals: {error}");
                return ShutdownSignal::FastShutdown;
            }
        };
        let mut replaced = self.0.replaced.subscribe();
        let is_replaced = tokio::select! {
            _ = terminate.recv() => false,
            _ = quit.recv() => false,
            _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
            _ = replaced.wait_for(|replaced| *replaced) => true,
        };
        tokio::select! {
            () = self.0.drain(is_replaced) => ShutdownSignal::GracefulTerminate,
            _ = interrupt.recv() => ShutdownSignal::FastShutdown,
        }
    }
}

/// A service of pingora's with our sockets and our end.
pub struct Followed<S> {
    service: S,
    serving: Arc<Serving>,
    is_admin: bool,
}

#[async_trait]
impl<S: Service> Service for Followed<S> {
    async fn start_service(
        &mut self,
        _fds: Option<ListenFds>,
        _shutdown: ShutdownWatch,
        listeners_per_fd: usize,
    ) {
        let serving = &self.serving;
        let ending = if self.is_admin {
            serving.admin.subscribe()
        } else {
            serving.accept.subscribe()
        };
        let started = serving.started.fetch_add(1, Ordering::Relaxed) + 1;
        if started == serving.services.load(Ordering::Relaxed) {
            systemd::serving();
            serving.begin_afterwards();
        }
        let sockets = Arc::clone(&serving.for_pingora);
        self.service
            .start_service(Some(sockets), ending, listeners_per_fd)
            .await;
    }

    fn name(&self) -> &str {
        self.service.name()
    }
}
