//! The collector: once an interval, kernel counters → attribution → ledger → published view.

mod peers;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    attribution::{Claim, Claims, Counters},
    class::ClassesInForce,
    export::WireView,
    kernel::{FlowWalk, Kernel},
    ledger::{Ledger, LedgerError, Poster, invariants},
    proxy::{Shared, upstream::Pool},
    slots::Slots,
};

/// Flows are looked at this often at most: nothing is billed from them.
const FLOW_LOOK: Duration = Duration::from_secs(1);
/// Slots are looked through once in this many ticks.
const SLOT_TICKS: u64 = 10;
/// A minute: idle. An hour: longer than any timeout, so the task that holds it is leaked.
const SILENT_NS: [u64; 2] = [60_000_000_000, 3_600_000_000_000];

/// Everything a tick needs.
pub struct Collector {
    kernel: Kernel,
    slots: Arc<Slots>,
    claims: Arc<Claims>,
    poster: Poster,
    shared: Arc<Shared>,
    view: Arc<Mutex<WireView>>,
    peer_flows: peers::PeerFlows,
    flows: FlowWalk,
    flows_looked_at: Option<Instant>,
    ticks: u64,
    /// Why the ledger cannot be written, as logged.
    failing: Option<String>,
    role: Role,
    /// The kernel's class table as the configuration has it.
    classes: ClassesInForce,
}

/// Where claims go while another process posts; false when they did not arrive.
pub type Forward = Box<dyn FnMut(&[Claim]) -> bool + Send>;

/// Of all processes of a gateway one posts.
enum Role {
    Posting,
    /// Another process is about to post. Claims wait.
    Resting,
    /// Another process posts, with our claims.
    Forwarding(Forward),
}

enum Order {
    Rest(SyncSender<Result<(), String>>),
    Post,
    Forward(Forward),
}

/// The running thread.
pub struct CollectorThread {
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

impl Collector {
    /// Continues where the ledger stopped.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn new(
        kernel: Kernel,
        slots: Arc<Slots>,
        claims: Arc<Claims>,
        ledger: Ledger,
        shared: Arc<Shared>,
        view: Arc<Mutex<WireView>>,
        classes: ClassesInForce,
    ) -> Result<Self, LedgerError> {
        let poster = Poster::resume(ledger.clone(), &kernel.epoch)?;
        let balances = ledger.balances()?;
        view.lock().unwrap_or_else(PoisonError::into_inner).balances = balances;
        Ok(Self {
            kernel,
            slots,
            claims,
            poster,
            shared,
            view,
            peer_flows: peers::PeerFlows::default(),
            flows: FlowWalk::default(),
            flows_looked_at: None,
            ticks: 0,
            failing: None,
            role: Role::Posting,
            classes,
        })
    }

    /// Runs until stopped; then once more, so that the last bytes are posted.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(mut self, interval: Duration) -> std::io::Result<CollectorThread> {
        let (orders, ordered) = channel();
        let thread = std::thread::Builder::new()
            .name("collector".into())
            .spawn(move || self.run(&ordered, interval))?;
        Ok(CollectorThread { orders, thread })
    }

    fn run(&mut self, ordered: &Receiver<Order>, interval: Duration) {
        loop {
            match ordered.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.tick();
                }
                Ok(Order::Rest(answer)) => {
                    let posted = self.tick();
                    if posted.is_ok() {
                        self.role = Role::Resting;
                    }
                    let _ = answer.send(posted);
                }
                Ok(Order::Post) => {
                    // Another process may have posted, and may have changed the class table.
                    self.poster.look_again();
                    if let Err(error) = self.kernel.maps.set_classes(&self.classes.get()) {
                        log::error!("{error}");
                    }
                    self.role = Role::Posting;
                }
                Ok(Order::Forward(forward)) => self.role = Role::Forwarding(forward),
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = self.tick();
                    return;
                }
            }
        }
    }

    /// What there is to do, by role.
    ///
    /// # Errors
    /// Not everything could be posted now.
    fn tick(&mut self) -> Result<(), String> {
        match &mut self.role {
            Role::Posting => return self.post(),
            Role::Resting => {}
            Role::Forwarding(forward) => {
                let claims = self.claims.take();
                if !claims.is_empty() && !forward(&claims) {
                    log::error!(
                        "{} claims did not reach the process that posts: their bytes stay \
                         unclaimed",
                        claims.len()
                    );
                }
            }
        }
        self.slots.reclaim();
        self.shared.meter.sweep();
        Ok(())
    }

    fn post(&mut self) -> Result<(), String> {
        self.ticks += 1;
        if let Some(log) = &mut self.kernel.log {
            log.flush();
        }
        // Before the counters, so that what is claimed has been counted.
        let claims = self.claims.take();
        let reading = match self.kernel.maps.read() {
            Ok(reading) => reading,
            Err(error) => {
                self.claims.put_back(&claims);
                log::error!("cannot read the kernel's counters: {error}; they keep counting");
                self.publish(|view| view.commit_failures += 1);
                return Err(error.to_string());
            }
        };
        let gap_bytes = reading.gap_bytes();
        let orphan_bytes = reading.orphans.iter().map(|cell| cell.bytes).sum();
        let counters = Counters {
            accounts: reading.accounts,
            interfaces: reading.interfaces,
        };
        let unix_seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs().cast_signed());
        // After the counters: an interface has its name before it counts.
        let interfaces = &self.kernel.names.snapshot();
        // After them as well: an owner waits to be stored before its number is used.
        if let Err(error) = self.shared.meter.write_names() {
            self.claims.put_back(&claims);
            return Err(self.failed(error.to_string()));
        }
        // The poster keeps the claims until they are committed.
        let posted = self
            .poster
            .post(&counters, &claims, unix_seconds, interfaces);
        if let Some(error) = &posted.failure {
            let error = error.to_string();
            if posted.postings.is_empty() {
                return Err(self.failed(error));
            }
            self.say_failing(&error);
        }
        if posted.failure.is_none() && self.failing.take().is_some() {
            log::info!("the ledger is written again; everything is posted");
        }
        for regression in &posted.regressions {
            log::error!("{regression}");
        }
        self.look_at_flows();
        let (used, free) = self.slots.reclaim();
        self.shared.meter.sweep();
        let flows = self.flows.known();
        let flows_by_protocol = self.flows.known_by_protocol();
        let silent = (self.ticks % SLOT_TICKS == 1).then(|| self.slots.silent(SILENT_NS));
        let slots = &self.slots;
        let shared = &self.shared;
        self.publish(|view| {
            for postings in &posted.postings {
                view.balances.add(postings, interfaces);
            }
            view.ledger_error = posted.failure.as_ref().map(ToString::to_string);
            view.commit_failures += u64::from(posted.failure.is_some());
            view.breaches = invariants::at_run_time(&view.balances, &posted.postings, interfaces);
            view.gap_bytes = gap_bytes;
            view.orphan_bytes = orphan_bytes;
            view.ticks += 1;
            view.regressions += posted.regressions.len() as u64;
            view.slots = (used as u64, free as u64);
            view.slots_exhausted = slots.exhausted.load(Ordering::Relaxed);
            view.handshakes_undivided = slots.undivided.load(Ordering::Relaxed);
            view.ranges_overwritten = slots.overwritten.load(Ordering::Relaxed);
            view.owner_failures = shared.meter.owner_failures.load(Ordering::Relaxed);
            view.access_log_lost = shared.access_log.as_ref().map_or(0, |log| log.lost());
            view.flows = flows;
            view.flows_by_protocol = flows_by_protocol;
            if let Some([minute, hour]) = silent {
                view.silent = (minute as u64, hour as u64);
            }
        });
        posted
            .failure
            .map_or(Ok(()), |error| Err(error.to_string()))
    }

    /// Nothing could be posted.
    fn failed(&mut self, error: String) -> String {
        self.say_failing(&error);
        self.publish(|view| {
            view.commit_failures += 1;
            view.ledger_error = Some(error.clone());
        });
        error
    }

    fn say_failing(&mut self, error: &str) {
        // Ten times a second the same line says no more.
        if self.failing.as_deref() != Some(error) {
            log::error!("{error}; metering goes on, a later tick posts these bytes");
            self.failing = Some(error.to_owned());
        }
    }

    /// Goes on through the flow table: flows that are over go, and the pools are told how the
    /// kernel sees their peers.
    fn look_at_flows(&mut self) {
        let now = Instant::now();
        let looked = self.flows_looked_at;
        if looked.is_some_and(|last| now.duration_since(last) < FLOW_LOOK) {
            return;
        }
        self.flows_looked_at = Some(now);
        let generation = self.shared.generation.load_full();
        let informed = |pool: &&Arc<Pool>| pool.settings.kernel_informed;
        let pools: Vec<_> = generation.pools.iter().filter(informed).collect();
        let mut peers: HashSet<_> = pools.iter().flat_map(|pool| pool.addresses()).collect();
        if pools.iter().all(|pool| pool.addresses().len() < 2) {
            // Nothing to choose from.
            peers.clear();
        }
        let maps = &self.kernel.maps;
        let flows = &mut self.peer_flows;
        let mut look = peers::Look::default();
        // Those known are asked for one by one; a large table is walked too seldom.
        let mut read = flows.follow(&mut look, &peers, |key| maps.flow(key));
        read = read.and(maps.look_at_flows(&mut self.flows, |key, flow| {
            flows.visit(&mut look, &peers, key, flow);
        }));
        if let Err(error) = read {
            log::warn!("cannot read the flow table: {error}");
        } else if !peers.is_empty() {
            let samples = look.samples();
            for pool in pools {
                pool.observe(&samples, now);
            }
        }
    }

    fn publish(&self, change: impl FnOnce(&mut WireView)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl CollectorThread {
    /// Posts once more and lets another process post; claims wait here meanwhile.
    ///
    /// # Errors
    /// Not everything could be posted: this process goes on posting.
    pub fn rest(&self) -> Result<(), String> {
        let (answer, answered) = sync_channel(1);
        let ended = |_| "the collector has ended".to_owned();
        self.orders
            .send(Order::Rest(answer))
            .map_err(|error| ended(error.to_string()))?;
        answered.recv().map_err(|error| ended(error.to_string()))?
    }

    /// Posts again: the other process did not come to it, or is gone.
    pub fn post_again(&self) {
        let _ = self.orders.send(Order::Post);
    }

    /// The other process posts. What this one's requests still claim goes there.
    pub fn forward(&self, forward: Forward) {
        let _ = self.orders.send(Order::Forward(forward));
    }

    /// Posts what is left, or hands it on, and ends.
    pub fn stop(self) {
        drop(self.orders);
        if self.thread.join().is_err() {
            log::error!("the collector panicked; the kernel keeps counting for the next start");
        }
    }
}
