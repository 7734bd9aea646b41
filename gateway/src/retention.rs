//! The thread that lets old rows of the ledger become coarser, a small step at a time.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    export::WireView,
    ledger::{Ledger, Retention},
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(60);
/// Between two steps, so that ticks get their turn.
const PAUSE: Duration = Duration::from_millis(100);

/// The running thread.
pub struct RetentionThread {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl RetentionThread {
    /// Starts it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        ledger: Ledger,
        retention: Retention,
        view: Arc<Mutex<WireView>>,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new()
            .name("retention".into())
            .spawn(move || run(&ledger, &retention, &view, &stopped))?;
        Ok(Self { stop, thread })
    }

    /// Ends it after the step under way.
    pub fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            log::error!("the retention thread panicked; nothing in the ledger is half done");
        }
    }
}

fn run(ledger: &Ledger, retention: &Retention, view: &Mutex<WireView>, stopped: &Receiver<()>) {
    loop {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = since.map_or(0, |since| since.as_secs().cast_signed());
        let wait = match ledger.roll_up(retention, now) {
            Ok(Some(step)) => {
                let mut view = view.lock().unwrap_or_else(PoisonError::into_inner);
                view.rolled_up_rows += step.rows;
                PAUSE
            }
            Ok(None) => INTERVAL,
            Err(error) => {
                log::error!("old rows stay as they are: {error}");
                INTERVAL
            }
        };
        if !matches!(stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout)) {
            return;
        }
    }
}
