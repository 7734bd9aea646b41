//! Certificates from an ACME server (RFC 8555), for listeners that ask for them.
//!
//! ```text
//! due (two thirds of the lifetime) → order → http-01, answered on every plain listener
//!   → certificate and key in one file, swapped by a rename → the next generation serves it
//! ```
//! One file holds key and chain, so no crash leaves a pair that does not fit. Until the first
//! certificate a self-signed one stands in. Whatever fails is tried again, later each time, and
//! what is there goes on being served.

mod file;
mod order;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    config::{Acme, Config},
    export::AcmeMetrics,
    proxy::Shared,
    reload::Reloader,
    serve::Serving,
};

pub use file::{ensure, file};

/// Where a server looks for the answer to http-01 (RFC 8555, 8.3).
pub const CHALLENGE_PATH: &str = "/.well-known/acme-challenge/";
/// Between two looks at the clock.
const TICK: Duration = Duration::from_secs(1);
/// A server may refuse a nonce at any time (RFC 8555, 6.5). A request is repeated by the library; an
/// order whose request was refused each time is begun anew, so many times in all.
const ORDERS_MAX: u32 = 5;
/// Of the wait before an order is tried again, however often it failed.
const WAIT_MAX: Duration = Duration::from_secs(6 * 3600);

/// Answers to http-01 challenges under way. Bounded by the names being ordered.
#[derive(Debug, Default)]
pub struct Challenges(Mutex<HashMap<Box<str>, Box<str>>>);

/// An answer that is given until this is dropped.
struct Answering<'a> {
    challenges: &'a Challenges,
    token: Box<str>,
}

impl Challenges {
    /// The answer for a token.
    #[must_use]
    pub fn answer(&self, token: &str) -> Option<Box<str>> {
        self.lock().get(token).cloned()
    }

    fn hold(&self, token: &str, answer: &str) -> Answering<'_> {
        self.lock().insert(token.into(), answer.into());
        Answering {
            challenges: self,
            token: token.into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Box<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.challenges.lock().remove(&self.token);
    }
}

/// One listener's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    listener: String,
    acme: Acme,
    file: PathBuf,
    account: PathBuf,
}

impl Wanted {
    /// What stands in until the first order has no expiry that matters: 0.
    fn tell_expiry(&self, held: Option<&file::Held>, metrics: &AcmeMetrics) {
        let held = held.filter(|held| !held.stands_in);
        metrics.expires(&self.listener, held.map_or(0, |held| unix(held.not_after)));
    }
}

/// How it stands with it.
#[derive(Default)]
struct Standing {
    failures: u32,
    /// Not before.
    next: Option<Instant>,
}

/// Orders certificates as they become due, until the process leaves.
pub async fn look_after(
    shared: Arc<Shared>,
    reloader: Arc<Reloader>,
    serving: Arc<Serving>,
    metrics: AcmeMetrics,
) {
    let mut standings: HashMap<String, Standing> = HashMap::new();
    for wanted in wanted(&shared.generation.load().config) {
        wanted.tell_expiry(file::read(&wanted.file).as_ref(), &metrics);
    }
    loop {
        tokio::time::sleep(TICK).await;
        if serving.is_leaving() {
            return;
        }
        for wanted in wanted(&shared.generation.load().config) {
            let standing = standings.entry(wanted.listener.clone()).or_default();
            let held = file::read(&wanted.file);
            wanted.tell_expiry(held.as_ref(), &metrics);
            let fits = held.filter(|held| held.is_for(&wanted.acme.domains));
            let is_due = fits.is_none_or(|held| SystemTime::now() >= held.due());
            if !is_due || standing.next.is_some_and(|next| Instant::now() < next) {
                continue;
            }
            let result = obtain(&wanted, &shared.challenges, &reloader).await;
            wanted.tell_expiry(file::read(&wanted.file).as_ref(), &metrics);
            metrics.ordered(&wanted.listener, result.is_ok());
            match result {
                Ok(()) => {
                    log::info!("{}: a new certificate is served", wanted.listener);
                    *standing = Standing::default();
                }
                Err(error) => {
                    let wait = wait(wanted.acme.retry, standing.failures);
                    standing.failures = standing.failures.saturating_add(1);
                    standing.next = Some(Instant::now() + wait);
                    log::error!(
                        "{}: no certificate from {}: {error:#}; what is there stays, tried again \
                         in {wait:?}",
                        wanted.listener,
                        wanted.acme.directory
                    );
                }
            }
        }
    }
}

async fn obtain(
    wanted: &Wanted,
    challenges: &Challenges,
    reloader: &Arc<Reloader>,
) -> anyhow::Result<()> {
    let mut orders = 1;
    let pem = loop {
        let result = order::order(&wanted.acme, &wanted.account, challenges).await;
        match result {
            Err(error) if orders < ORDERS_MAX && order::is(&error, "badNonce") => orders += 1,
            Err(error) if orders < ORDERS_MAX && order::is(&error, "accountDoesNotExist") => {
                log::warn!("{}: the account is gone; a new one", wanted.acme.directory);
                std::fs::remove_file(&wanted.account)?;
                orders += 1;
            }
            other => break other?,
        }
    };
    file::replace(&wanted.file, &pem)?;
    let reloader = Arc::clone(reloader);
    tokio::task::spawn_blocking(move || reloader.renew()).await??;
    Ok(())
}

/// Twice as long after each failure.
fn wait(first: Duration, failures: u32) -> Duration {
    first
        .saturating_mul(2_u32.saturating_pow(failures.min(16)))
        .min(WAIT_MAX)
}

fn wanted(config: &Config) -> Vec<Wanted> {
    let listeners = config.listeners.iter();
    let wanted = listeners.filter_map(|listener| {
        let tls = listener.tls.as_ref()?;
        let acme = tls.acme.clone()?;
        Some(Wanted {
            account: account_file(&config.gateway.state_dir, &acme.directory),
            listener: listener.name.to_string(),
            acme,
            file: tls.pair.certificate.clone(),
        })
    });
    wanted.collect()
}

/// One account a server.
fn account_file(state_dir: &Path, directory: &str) -> PathBuf {
    let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = directory.chars().map(word).collect();
    state_dir.join("acme").join(format!("account-{name}.json"))
}

fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_given_for_as_long_as_its_challenge_lasts() {
        let challenges = Challenges::default();
        let held = challenges.hold("token", "token.thumbprint");
        assert_eq!(
            challenges.answer("token").as_deref(),
            Some("token.thumbprint")
        );
        drop(held);
        assert_eq!(challenges.answer("token"), None);
    }

    #[test]
    fn each_failure_waits_longer_up_to_a_bound() {
        let first = Duration::from_secs(60);
        assert_eq!(wait(first, 0), first);
        assert_eq!(wait(first, 3), Duration::from_secs(480));
        assert_eq!(wait(first, u32::MAX), WAIT_MAX);
    }
}
