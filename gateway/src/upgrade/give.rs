//! The old process's side.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    SERVING_LIMIT, Taken,
    channel::{Channel, Message, Offer, row},
};
use crate::{
    attribution::Claim, duties::Duties, export::ConfigMetrics, owner::Owners, reload::Reloader,
    serve::Serving, slots::Slots,
};

/// Why this process goes on serving.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// One is under way.
    #[error("an upgrade is under way already")]
    UnderWay,
    /// The process before this one has connections left.
    #[error("the process before this one still drains: try again when it has ended")]
    PredecessorDrains,
    /// The process is on its way out.
    #[error("this process is ending")]
    Leaving,
    /// The new process could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The binary.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It ended before it served.
    #[error("the new process ended ({0}) before it served; its last words are in the log")]
    Ended(String),
    /// It said why it cannot.
    #[error("the new process cannot take over: {0}")]
    Refused(String),
    /// It did not answer.
    #[error("the new process did not get {stage} within {limit:?} and was killed")]
    TooLate {
        /// Which answer.
        stage: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// What it said makes no sense.
    #[error("the new process said something else than \"{0}\" and was killed")]
    Nonsense(&'static str),
    /// This process could not let go.
    #[error("not everything could be posted: {0}")]
    CannotRest(String),
    /// A descriptor could not be handed over.
    #[error("cannot hand over: {0}")]
    Channel(#[from] io::Error),
}

/// What is handed over.
pub struct GiverParts {
    /// The configuration file.
    pub config: PathBuf,
    /// How long the new process may take until it is ready.
    pub ready_limit: Duration,
    /// Sockets.
    pub serving: Arc<Serving>,
    /// Reads no file and names no endpoint meanwhile.
    pub reloader: Arc<Reloader>,
    /// Posts, pushes, rolls up.
    pub duties: Arc<Duties>,
    /// None while degraded.
    pub slots: Option<Arc<Slots>>,
    /// Numbers.
    pub owners: Arc<Owners>,
    /// Lifetime of the kernel maps; None while degraded.
    pub epoch: Option<String>,
    /// Where the ledger is; None when it cannot be used.
    pub ledger: Option<String>,
    /// A hold on the lock on the pins.
    pub pins_lock: Option<OwnedFd>,
    /// A hold on the lock on the ledger's directory.
    pub ledger_lock: Option<OwnedFd>,
    /// Make the interface threads attach anew.
    pub attach_again: Vec<Arc<AtomicBool>>,
    /// From whom this process took over.
    pub taken: Option<Arc<Taken>>,
    /// Counts upgrades.
    pub metrics: ConfigMetrics,
}

/// Hands over, one attempt at a time.
pub struct Giver {
    parts: GiverParts,
    /// As it was found at start: a package manager puts the new binary in its place.
    program: PathBuf,
    under_way: Mutex<()>,
}

impl Giver {
    /// For the program this process was started from.
    ///
    /// # Errors
    /// It cannot be found.
    pub fn new(parts: GiverParts) -> io::Result<Self> {
        Ok(Self {
            parts,
            program: std::env::current_exe()?,
            under_way: Mutex::default(),
        })
    }

    /// Starts the program anew and hands over to it. Returns its process id once it serves; this
    /// process then drains. Blocks.
    ///
    /// # Errors
    /// Why this process goes on as before.
    pub fn upgrade(&self) -> Result<u32, UpgradeError> {
        let _alone = match self.under_way.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::WouldBlock) => return Err(UpgradeError::UnderWay),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let result = self.attempt();
        match &result {
            Ok(pid) => log::info!("process {pid} serves; this one drains and ends"),
            Err(error) => log::error!("upgrade failed, this process serves on: {error}"),
        }
        self.parts.metrics.upgraded(result.is_ok());
        result
    }

    fn attempt(&self) -> Result<u32, UpgradeError> {
        let parts = &self.parts;
        if parts.serving.is_leaving() {
            return Err(UpgradeError::Leaving);
        }
        if parts.taken.as_ref().is_some_and(|taken| !taken.is_over()) {
            return Err(UpgradeError::PredecessorDrains);
        }
        let mut numbers = SharedNumbers::begin(&parts.owners)?;
        let (channel, theirs) = Channel::pair()?;
        let mut new = NewProcess::start(&self.program, &parts.config, theirs)?;
        log::info!("upgrade: process {} gets ready", new.child.id());
        unless_closed(self.offer(&channel))?;
        new.expect(&channel, &Message::Ready, "ready", parts.ready_limit)?;
        let mut release = Release::new(parts)?;
        if let Err(error) = release.to(&channel, &mut new) {
            // Before anything is taken back.
            drop(new);
            return Err(error);
        }
        release.is_final = true;
        numbers.is_final = true;
        let pid = new.child.id();
        new.is_done = true;
        parts.duties.hand_on(Box::new(move |claims: &[Claim]| {
            let rows: Vec<_> = claims.iter().map(row).collect();
            channel.send_list(&rows, Message::Claims).is_ok()
        }));
        parts.serving.replace();
        Ok(pid)
    }

    fn offer(&self, channel: &Channel) -> io::Result<()> {
        let parts = &self.parts;
        channel.send(&Message::Offer(Offer {
            epoch: parts.epoch.clone(),
            ledger: parts.ledger.clone(),
        }))?;
        for (address, socket) in parts.serving.second_holds()? {
            channel.send_with(&Message::Listener(address), Some(socket.as_fd()))?;
        }
        for (lock, message) in [
            (&parts.pins_lock, Message::PinsLock),
            (&parts.ledger_lock, Message::LedgerLock),
        ] {
            if let Some(lock) = lock {
                channel.send_with(&message, Some(lock.as_fd()))?;
            }
        }
        channel.send(&Message::Prepare)?;
        Ok(())
    }
}

/// A process that closed its end has said why, or has ended: what it is asked next tells.
fn unless_closed(sent: io::Result<()>) -> io::Result<()> {
    match sent {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The new process, killed when it did not come to serve.
struct NewProcess {
    child: Child,
    is_done: bool,
}

impl NewProcess {
    fn start(program: &PathBuf, config: &PathBuf, end: OwnedFd) -> Result<Self, UpgradeError> {
        let child = Command::new(program)
            .arg("run")
            .arg("--config")
            .arg(config)
            .arg("--take-over")
            .stdin(Stdio::from(end))
            .spawn()
            .map_err(|source| UpgradeError::Start {
                program: program.clone(),
                source,
            })?;
        Ok(Self {
            child,
            is_done: false,
        })
    }

    /// Waits for one answer.
    fn expect(
        &mut self,
        channel: &Channel,
        wanted: &Message,
        stage: &'static str,
        limit: Duration,
    ) -> Result<(), UpgradeError> {
        let began = Instant::now();
        match channel.receive(Some(limit)) {
            Ok(Some((message, _))) if message == *wanted => Ok(()),
            Ok(Some((Message::Failed(why), _))) => Err(UpgradeError::Refused(why)),
            Ok(Some(_)) => Err(UpgradeError::Nonsense(stage)),
            Ok(None) => Err(UpgradeError::Ended(
                self.end(limit - began.elapsed().min(limit)),
            )),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                Err(UpgradeError::TooLate { stage, limit })
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(UpgradeError::Ended(self.end(limit)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How it ended: its end of the channel is closed, so it does.
    fn end(&mut self, limit: Duration) -> String {
        let began = Instant::now();
        while began.elapsed() < limit {
            match self.child.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return error.to_string(),
            }
        }
        "killed: it had closed its channel and lived on".into()
    }
}

impl Drop for NewProcess {
    fn drop(&mut self) {
        if !self.is_done {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What was let go; taken back when dropped, unless it was for good. The new process must be gone
/// then.
struct Release<'a> {
    parts: &'a GiverParts,
    slots: Vec<u32>,
    is_final: bool,
}

impl<'a> Release<'a> {
    fn new(parts: &'a GiverParts) -> Result<Self, UpgradeError> {
        parts.reloader.freeze(true);
        let mut release = Self {
            parts,
            slots: Vec::new(),
            is_final: false,
        };
        parts.duties.rest().map_err(UpgradeError::CannotRest)?;
        if let Some(slots) = &parts.slots {
            release.slots = slots.hand_over();
        }
        Ok(release)
    }

    fn to(&self, channel: &Channel, new: &mut NewProcess) -> Result<(), UpgradeError> {
        let sent = channel
            .send_list(&self.slots, Message::Slots)
            .and_then(|()| channel.send(&Message::Go));
        unless_closed(sent)?;
        new.expect(channel, &Message::Serving, "serving", SERVING_LIMIT)
    }
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        if self.is_final {
            return;
        }
        let parts = self.parts;
        if let Some(slots) = &parts.slots {
            // The new process may have used some of them: those are freed when it is quiet there.
            slots.receive(std::mem::take(&mut self.slots));
        }
        for again in &parts.attach_again {
            again.store(true, Ordering::Relaxed);
        }
        if let Err(error) = parts.reloader.name_endpoints() {
            log::error!("cannot name the endpoints to the kernel again: {error}");
        }
        crate::systemd::serving_still();
        parts.reloader.freeze(false);
        parts.duties.take_up();
    }
}

/// Two processes give numbers: the store decides about each, so that nothing waits in a journal
/// that the other one does not read. Dropped after the new process unless it serves.
struct SharedNumbers<'a> {
    owners: &'a Owners,
    is_final: bool,
}

impl<'a> SharedNumbers<'a> {
    fn begin(owners: &'a Owners) -> Result<Self, UpgradeError> {
        owners.share(true);
        let numbers = Self {
            owners,
            is_final: false,
        };
        let cannot = |error: crate::owner::StoreError| UpgradeError::CannotRest(error.to_string());
        owners.write_out().map_err(cannot)?;
        Ok(numbers)
    }
}

impl Drop for SharedNumbers<'_> {
    fn drop(&mut self) {
        if self.is_final {
            return;
        }
        // Numbers the new process may have given.
        if let Err(error) = self.owners.refresh() {
            log::error!("{error}");
        } else {
            self.owners.share(false);
        }
    }
}

/// Upgrades on SIGUSR2.
///
/// # Errors
/// The signal cannot be waited for.
pub fn watch(giver: &Arc<Giver>, background: &tokio::runtime::Handle) -> io::Result<()> {
    let mut signal = {
        let _inside = background.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined2())?
    };
    let giver = Arc::clone(giver);
    background.spawn(async move {
        while signal.recv().await.is_some() {
            let giver = Arc::clone(&giver);
            let _ = tokio::task::spawn_blocking(move || giver.upgrade()).await;
        }
    });
    Ok(())
}
