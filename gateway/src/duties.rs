//! What exactly one process of a gateway does: post to the ledger, push usage events, let old rows
//! become coarser. An upgrade hands these duties from one process to the next; a failed one gives
//! them back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;

use crate::{
    collector::{CollectorThread, Forward},
    config::PushSink,
    export::WireView,
    ledger::{Ledger, Retention},
    push::{PushView, Pushes},
    retention::RetentionThread,
};

/// What the duties are done with.
pub struct Duties {
    ledger: Ledger,
    sinks: Vec<PushSink>,
    push_view: PushView,
    retention: Retention,
    view: Arc<Mutex<WireView>>,
    /// Whether the ledger is ours to post to.
    posts: bool,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    collector: Option<CollectorThread>,
    pushes: Option<Pushes>,
    retention: Option<RetentionThread>,
}

impl Duties {
    /// Nothing is done yet.
    #[must_use]
    pub fn new(
        ledger: Ledger,
        posts: bool,
        sinks: Vec<PushSink>,
        push_view: PushView,
        retention: Retention,
        view: Arc<Mutex<WireView>>,
    ) -> Self {
        Self {
            ledger,
            sinks,
            push_view,
            retention,
            view,
            posts,
            running: Mutex::default(),
        }
    }

    /// Begins all of them.
    ///
    /// # Errors
    /// A sink's secret cannot be read, or no thread could be started.
    pub fn begin(&self, collector: Option<CollectorThread>) -> anyhow::Result<()> {
        let mut running = self.running();
        running.collector = collector;
        self.begin_beside(&mut running)
    }

    fn begin_beside(&self, running: &mut Running) -> anyhow::Result<()> {
        running.pushes = Some(Pushes::start(&self.sinks, &self.ledger, &self.push_view)?);
        let retention =
            RetentionThread::start(self.ledger.clone(), self.retention, Arc::clone(&self.view));
        running.retention = Some(retention.context("cannot start the retention thread")?);
        Ok(())
    }

    /// Everything is posted; from now on another process may do all this.
    ///
    /// # Errors
    /// The ledger cannot be written now; this process goes on.
    pub fn rest(&self) -> Result<(), String> {
        let mut running = self.running();
        if let Some(collector) = &running.collector {
            collector.rest()?;
        }
        running.end_beside();
        if self.posts
            && let Err(error) = self.ledger.give_up()
        {
            log::warn!("{error}");
        }
        Ok(())
    }

    /// The other process did not come to it.
    pub fn take_up(&self) {
        let mut running = self.running();
        if self.posts
            && self.ledger.place().is_shared()
            && let Err(error) = self.ledger.take()
        {
            log::error!("{error}");
        }
        if let Some(collector) = &running.collector {
            collector.post_again();
        }
        if running.pushes.is_none()
            && let Err(error) = self.begin_beside(&mut running)
        {
            log::error!("{error:#}");
        }
    }

    /// Another process posts, and hears of our claims.
    pub fn hand_on(&self, forward: Forward) {
        if let Some(collector) = &self.running().collector {
            collector.forward(forward);
        }
    }

    /// Ends: what is left is posted, or handed on.
    pub fn end(&self) {
        let mut running = self.running();
        if let Some(collector) = running.collector.take() {
            collector.stop();
        }
        running.end_beside();
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn end_beside(&mut self) {
        if let Some(pushes) = self.pushes.take() {
            pushes.stop();
        }
        if let Some(retention) = self.retention.take() {
            retention.stop();
        }
    }
}
