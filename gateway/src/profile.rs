//! Where the process spends its CPU time: stacks sampled for some seconds, as a flame graph.
//!
//! The kernel sends SIGPROF for every hundredth of a second of CPU time that all threads use
//! together; whichever thread it meets notes its stack. An idle process is not sampled, and
//! nothing is installed while no profile is taken.

mod flame;

use std::{
    sync::{
        Mutex, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Samples a second of CPU time. No divisor of a timer's rate: what happens each 10 ms would be
/// seen always or never.
const SAMPLES_PER_SECOND: i32 = 99;
/// A profile's longest time.
pub const SECONDS_MAX: u64 = 60;

/// Takes profiles, one at a time.
#[derive(Debug, Default)]
pub struct Profiler {
    under_way: Mutex<()>,
    /// Profiles that were handed out.
    pub taken: AtomicU64,
    /// Asked for in vain.
    pub refused: AtomicU64,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// One is being taken.
    #[error("a profile is being taken: ask again when it is done")]
    UnderWay,
    /// Too short or too long.
    #[error("seconds must be 1 to {SECONDS_MAX}")]
    Seconds,
    /// The timer or the signal handler cannot be installed.
    #[error("cannot take a profile: {0}")]
    Sampling(#[from] pprof::Error),
}

impl Profiler {
    /// Samples for so long and draws what it saw, an SVG. Blocks.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn take(&self, seconds: u64) -> Result<String, ProfileError> {
        let result = self.sample(seconds);
        let counter = if result.is_ok() {
            &self.taken
        } else {
            &self.refused
        };
        counter.fetch_add(1, Ordering::Relaxed);
        result
    }

    fn sample(&self, seconds: u64) -> Result<String, ProfileError> {
        if !(1..=SECONDS_MAX).contains(&seconds) {
            return Err(ProfileError::Seconds);
        }
        let _alone = match self.under_way.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::WouldBlock) => return Err(ProfileError::UnderWay),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        // Not within the unwinder itself. The C library is looked into: every system call is made
        // there.
        let guard = pprof::ProfilerGuardBuilder::default()
            .frequency(SAMPLES_PER_SECOND)
            .blocklist(&["libgcc", "vdso"])
            .build()?;
        std::thread::sleep(Duration::from_secs(seconds));
        let report = guard.report().build()?;
        drop(guard);
        let stacks = report.data.iter().map(|(stack, samples)| {
            // Innermost first, as they were found; drawn from the thread upwards.
            let functions = stack.frames.iter().flatten().rev();
            let mut names = vec![stack.thread_name_or_id()];
            names.extend(functions.map(name));
            (names, u64::try_from(*samples).unwrap_or(0))
        });
        let title = format!(
            "edgemeter {}: CPU time of {seconds} s, {SAMPLES_PER_SECOND} samples a second of it",
            env!("CARGO_PKG_VERSION")
        );
        Ok(flame::draw(&title, stacks))
    }
}

/// A function as people look for it. Debug information knows closures and inlined functions by
/// their last name only: then with the file they are in.
fn name(function: &pprof::Symbol) -> String {
    let name = function.name();
    let last = name.split('<').next().unwrap_or_default();
    match &function.filename {
        Some(path) if !last.is_empty() && !last.contains("::") => {
            format!("{name} [{}]", from_crate(&path.to_string_lossy()))
        }
        _ => name,
    }
}

/// From the crate's folder on: where that is on the machine that built it is no matter.
fn from_crate(path: &str) -> &str {
    let Some(src) = path.rfind("/src/") else {
        return path;
    };
    path[..src]
        .rfind('/')
        .map_or(path, |folder| &path[folder + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_from_its_crate_on() {
        for (path, expected) in [
            (
                "/build/.cargo/registry/src/index/pingora-core-0.9.1/src/apps/mod.rs",
                "pingora-core-0.9.1/src/apps/mod.rs",
            ),
            ("gateway/src/proxy/lane.rs", "gateway/src/proxy/lane.rs"),
            ("./malloc/malloc.c", "./malloc/malloc.c"),
        ] {
            assert_eq!(from_crate(path), expected);
        }
    }
}
