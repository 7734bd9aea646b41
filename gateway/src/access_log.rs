//! The access log: one JSON line a request, with the bytes the wire carried for it.
//!
//! The worker that ends a request writes its line, into a buffer that only it fills; a thread of its
//! own takes the buffers to the file, so that no worker waits for a disk and none is woken for a
//! line.
//!
//! When a request ends, its last bytes may still wait in the send queue. Such a line keeps gaps for
//! what the wire did until the kernel has sent every payload byte of the request once
//! (`wire_settled`), or for the configured time. Retransmits after that are in the accounts, not in
//! the line.

mod entry;
mod line;

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    io::{self, Write},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, Thread},
    time::{Duration, Instant},
};

pub use entry::{Attempt, AttemptTiming, ClientAddress, Entry, Leg};

use crate::config::{self, AccessLogTarget};
use line::{Settled, Waiting, write_line};

/// How often buffers are taken to the file, and waiting lines looked at.
const POLL: Duration = Duration::from_millis(50);
/// A buffer of this size does not wait for its turn.
const HURRY_BYTES: usize = 512 * 1024;
/// Waiting lines that are looked at with each new one.
const LOOK_MAX: usize = 8;
/// More than there are workers: the hash of a worker's thread rarely meets another's.
const SHARDS: usize = 16;

thread_local! {
    static SHARD: usize = {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(std::thread::current().id());
        usize::try_from(hash % SHARDS as u64).unwrap_or(0)
    };
}

/// Lines on their way to the file.
pub struct AccessLog {
    queue: Arc<Queue>,
    /// The writer's, to be woken when a buffer is full.
    thread: Thread,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What workers and the writer share.
struct Queue {
    shards: [Mutex<Batch>; SHARDS],
    /// Lines in the shards.
    lines: AtomicUsize,
    /// Most of them.
    bound: usize,
    closing: AtomicBool,
    lost: AtomicU64,
}

/// What one worker has written since its buffer was taken.
#[derive(Default)]
struct Batch {
    /// Whole lines.
    text: Vec<u8>,
    lines: usize,
    /// Oldest first, until looked at in vain.
    waiting: VecDeque<Waiting>,
}

impl AccessLog {
    /// Opens the target and starts the writer.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or no thread could be started.
    pub fn start(config: &config::AccessLog) -> io::Result<Self> {
        let target: Box<dyn Write + Send> = match &config.target {
            AccessLogTarget::StandardOutput => Box::new(io::stdout()),
            AccessLogTarget::File(path) => {
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                Box::new(
                    OpenOptions::new()
                        .create(true)
                        .append(true)
                        .open(path)
                        .map_err(|error| {
                            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
                        })?,
                )
            }
        };
        let queue = Arc::new(Queue {
            shards: Default::default(),
            lines: AtomicUsize::new(0),
            bound: config.queue,
            closing: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        });
        let settle = config.settle;
        let taken = Arc::clone(&queue);
        let writer = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&taken, target, settle))?;
        Ok(Self {
            queue,
            thread: writer.thread().clone(),
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Writes a line; a full queue loses it, countably.
    pub fn push(&self, entry: Entry<'_>) {
        if self.queue.lines.fetch_add(1, Ordering::Relaxed) >= self.queue.bound {
            self.queue.lines.fetch_sub(1, Ordering::Relaxed);
            self.queue.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let full = {
            let mut batch = self.queue.shard(SHARD.with(|at| *at));
            // Before the next requests on their connections overwrite what the wire did for them.
            batch.settle(LOOK_MAX, |_| false);
            if entry.settled() {
                write_line(&mut batch.text, entry, &mut Settled);
                batch.lines += 1;
            } else {
                let mut line = Waiting {
                    text: Vec::with_capacity(512),
                    gaps: Vec::new(),
                    verdict_at: 0,
                    ended: Instant::now(),
                };
                let mut text = std::mem::take(&mut line.text);
                write_line(&mut text, entry, &mut line);
                line.text = text;
                batch.waiting.push_back(line);
            }
            batch.text.len() > HURRY_BYTES
        };
        if full {
            self.thread.unpark();
        }
    }

    /// Writes what is queued and ends the writer.
    pub fn close(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.queue.closing.store(true, Ordering::Release);
        self.thread.unpark();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }

    /// Lines that were not written: the queue was full, or the disk.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.lost.load(Ordering::Relaxed)
    }
}

impl Queue {
    fn shard(&self, at: usize) -> MutexGuard<'_, Batch> {
        self.shards[at]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    /// Looks at so many of the lines that wait; those that are settled, or must be, wait no more.
    fn settle(&mut self, most: usize, must: impl Fn(&Waiting) -> bool) {
        for _ in 0..most.min(self.waiting.len()) {
            let Some(line) = self.waiting.pop_front() else {
                return;
            };
            let settled = line.settled();
            if settled || must(&line) {
                line.write(&mut self.text, settled);
                self.lines += 1;
            } else {
                self.waiting.push_back(line);
            }
        }
    }
}

fn write_lines(queue: &Queue, mut target: Box<dyn Write + Send>, settle: Duration) {
    let mut text = Vec::new();
    loop {
        let closing = queue.closing.load(Ordering::Acquire);
        for at in 0..SHARDS {
            let lines = {
                let mut batch = queue.shard(at);
                // At shutdown the sockets are closed: what is not settled is written so. As it is
                // where half of what may be queued waits.
                let forced = closing || batch.waiting.len() > queue.bound / 2;
                batch.settle(usize::MAX, |line| forced || line.ended.elapsed() >= settle);
                std::mem::swap(&mut batch.text, &mut text);
                std::mem::take(&mut batch.lines)
            };
            queue.lines.fetch_sub(lines, Ordering::Relaxed);
            if lines == 0 {
                continue;
            }
            let written = target.write_all(&text).and_then(|()| target.flush());
            if written.is_err() {
                queue.lost.fetch_add(lines as u64, Ordering::Relaxed);
            }
            text.clear();
        }
        if closing {
            return;
        }
        std::thread::park_timeout(POLL);
    }
}
