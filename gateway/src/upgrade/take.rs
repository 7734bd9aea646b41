//! The new process's side.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;

use super::channel::{Channel, Message, Offer, claim};
use crate::{attribution::Claims, owner::Owners, serve::Serving, slots::Slots};

/// Between two messages of a process that is alive and well.
const PATIENCE: Duration = Duration::from_secs(60);

/// The process that serves until this one does.
pub struct Predecessor {
    channel: Channel,
    offer: Offer,
    /// Its sockets by address.
    pub sockets: HashMap<String, OwnedFd>,
    /// A hold on its lock on the pins.
    pub pins_lock: Option<OwnedFd>,
    /// A hold on its lock on the ledger's directory.
    pub ledger_lock: Option<OwnedFd>,
}

/// What was taken from a process that drains.
pub struct Taken {
    is_over: AtomicBool,
}

/// The way back.
pub struct Excuse(Channel);

impl Excuse {
    /// Says why this process cannot take over.
    pub fn refuse(self, why: &anyhow::Error) {
        let _ = self.0.send(&Message::Failed(format!("{why:#}")));
    }
}

impl Taken {
    /// Whether that process has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

impl Predecessor {
    /// The process that started this one, at the other end of standard input.
    ///
    /// # Errors
    /// Nobody offers anything there.
    pub fn at_standard_input() -> anyhow::Result<Self> {
        let end = std::io::stdin().as_fd().try_clone_to_owned()?;
        let channel = Channel::of(end);
        let offered = channel.receive(Some(PATIENCE)).context(
            "--take-over is for a process that `edgemeter upgrade` starts; standard input is no \
             offer",
        )?;
        let Some((Message::Offer(offer), _)) = offered else {
            anyhow::bail!("the running gateway offers nothing");
        };
        let mut predecessor = Self {
            channel,
            offer,
            sockets: HashMap::new(),
            pins_lock: None,
            ledger_lock: None,
        };
        loop {
            let (message, descriptor) = predecessor
                .channel
                .receive(Some(PATIENCE))?
                .context("the running gateway closed the channel")?;
            match message {
                Message::Listener(address) => {
                    let socket = descriptor.context("a listener came without its socket")?;
                    predecessor.sockets.insert(address, socket);
                }
                Message::PinsLock => predecessor.pins_lock = descriptor,
                Message::LedgerLock => predecessor.ledger_lock = descriptor,
                Message::Prepare => return Ok(predecessor),
                other => anyhow::bail!("the running gateway said {other:?} in its offer"),
            }
        }
    }

    /// Whether it meters; this process must then use the same maps.
    ///
    /// # Errors
    /// The maps are others: bytes would be counted in both, and one of them would be posted.
    pub fn expect_epoch(&self, epoch: &str) -> anyhow::Result<()> {
        match &self.offer.epoch {
            Some(theirs) if theirs != epoch => anyhow::bail!(
                "the kernel maps are not the running gateway's (observe.bpffs or the map schema \
                 differs): stop it and start this one"
            ),
            _ => Ok(()),
        }
    }

    /// Whether it meters.
    #[must_use]
    pub fn meters(&self) -> bool {
        self.offer.epoch.is_some()
    }

    /// The ledger must be the same.
    ///
    /// # Errors
    /// It is not.
    pub fn expect_ledger(&self, place: &str) -> anyhow::Result<()> {
        match &self.offer.ledger {
            Some(theirs) if theirs != place => anyhow::bail!(
                "the running gateway's ledger is {theirs}, this configuration's is {place}: stop \
                 it and start this one"
            ),
            _ => Ok(()),
        }
    }

    /// For saying why this process cannot take over, once the rest of this has been used up.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn excuse(&self) -> std::io::Result<Excuse> {
        Ok(Excuse(self.channel.second()?))
    }

    /// Everything works: waits until the other process has stopped posting. Returns the slots
    /// that are ours from now on.
    ///
    /// # Errors
    /// It closed the channel: it serves on, or is gone.
    pub fn ready(&self) -> anyhow::Result<Vec<u32>> {
        self.channel.send(&Message::Ready)?;
        let mut slots = Vec::new();
        loop {
            match self.channel.receive(Some(PATIENCE))? {
                Some((Message::Slots(piece), _)) => slots.extend(piece),
                Some((Message::Go, _)) => return Ok(slots),
                Some((other, _)) => anyhow::bail!("the running gateway said {other:?}, not go"),
                None => anyhow::bail!("the running gateway has called it off, or has ended"),
            }
        }
    }

    /// Says so as soon as this process serves, and takes what the other one still knows until it
    /// ends. `drained` is dropped then.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn succeed(
        self,
        serving: Arc<Serving>,
        claims: Arc<Claims>,
        owners: Arc<Owners>,
        slots: Option<Arc<Slots>>,
        drained: Arc<()>,
    ) -> std::io::Result<Arc<Taken>> {
        let taken = Arc::new(Taken {
            is_over: AtomicBool::new(false),
        });
        let over = Arc::clone(&taken);
        std::thread::Builder::new()
            .name("predecessor".into())
            .spawn(move || {
                while !serving.is_serving() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                if let Err(error) = self.channel.send(&Message::Serving) {
                    // It is gone, or about to kill this process.
                    log::warn!("the process before this one does not listen: {error}");
                }
                self.follow(&claims, &owners);
                if let Some(slots) = slots {
                    slots.receive_rest();
                }
                owners.share(false);
                drop(drained);
                over.is_over.store(true, Ordering::Relaxed);
                log::info!("the process before this one has ended");
            })?;
        Ok(taken)
    }

    fn follow(&self, claims: &Claims, owners: &Owners) {
        loop {
            match self.channel.receive(None) {
                Ok(Some((Message::Claims(rows), _))) => {
                    // Its requests may have had tenants this process has not seen.
                    if let Err(error) = owners.refresh() {
                        log::warn!("{error}");
                    }
                    for claimed in rows.iter().filter_map(claim) {
                        claims.add(claimed);
                    }
                }
                Ok(Some((other, _))) => log::warn!("the process before this one said {other:?}"),
                Ok(None) => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::warn!("the process before this one: {error}");
                    return;
                }
            }
        }
    }
}
