//! One timer for all that a connection waits for, one thing after the other.
//!
//! A wait is nearly always over long before its limit, and to set a timer for it and take it away
//! again costs more than the wait itself does. So the timer stays set for an earlier limit than
//! the present one: when it goes off too early, it is set again, about once a limit and not twice
//! a request.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::slots::now_ns;

/// A connection's timer. Nothing is set before the first wait that is not over at once.
#[derive(Debug, Default)]
pub struct Timer {
    set: Option<Set>,
}

#[derive(Debug)]
struct Set {
    sleep: Pin<Box<Sleep>>,
    /// When it goes off, by [`now_ns`].
    at_ns: u64,
}

impl Timer {
    /// An operation that may not take longer, to a few milliseconds.
    ///
    /// # Errors
    /// The operation's, or `TimedOut`.
    pub async fn within<T>(
        &mut self,
        limit: Duration,
        operation: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let mut operation = std::pin::pin!(operation);
        let mut due_ns = None;
        std::future::poll_fn(|context| {
            if let Poll::Ready(result) = operation.as_mut().poll(context) {
                return Poll::Ready(result);
            }
            // The clock is read only for an operation that is not over at once; its coarse form
            // is enough for limits of milliseconds and more.
            let due_ns = *due_ns.get_or_insert_with(|| now_ns().saturating_add(nanos(limit)));
            self.poll(context, due_ns)
                .map(|()| Err(io::Error::from(io::ErrorKind::TimedOut)))
        })
        .await
    }

    fn poll(&mut self, context: &mut Context<'_>, due_ns: u64) -> Poll<()> {
        if let Some(set) = &self.set
            && set.at_ns <= due_ns
            && !set.sleep.is_elapsed()
        {
            // It wakes this task before the time has come.
            return Poll::Pending;
        }
        loop {
            let left = due_ns.saturating_sub(now_ns());
            if left == 0 {
                return Poll::Ready(());
            }
            let deadline = Instant::now() + Duration::from_nanos(left);
            let set = match &mut self.set {
                Some(set) => {
                    set.sleep.as_mut().reset(deadline);
                    set
                }
                none => none.insert(Set {
                    sleep: Box::pin(tokio::time::sleep_until(deadline)),
                    at_ns: 0,
                }),
            };
            set.at_ns = due_ns;
            if set.sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn times_out(timer: &mut Timer, limit: Duration) -> Duration {
        let before = Instant::now();
        let error = timer
            .within(limit, std::future::pending::<io::Result<()>>())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        before.elapsed()
    }

    #[tokio::test]
    async fn a_wait_that_is_over_sets_nothing() {
        let mut timer = Timer::default();
        let done = timer.within(Duration::ZERO, async { Ok(7) }).await;
        assert_eq!(done.unwrap(), 7);
        assert!(timer.set.is_none());
    }

    #[tokio::test]
    async fn one_timer_serves_longer_and_shorter_limits() {
        let mut timer = Timer::default();
        // Sets it for later than the next one is due.
        let soon = timer.within(Duration::from_secs(3600), async {
            tokio::task::yield_now().await;
            Ok(())
        });
        soon.await.unwrap();
        let coarse = Duration::from_millis(10);
        for millis in [40, 120, 20] {
            let limit = Duration::from_millis(millis);
            let waited = times_out(&mut timer, limit).await;
            assert!(waited + coarse >= limit, "{waited:?} instead of {limit:?}");
            assert!(waited < Duration::from_secs(60), "{waited:?}");
        }
    }

    #[tokio::test]
    async fn one_that_goes_off_early_is_set_again() {
        let mut timer = Timer::default();
        let first = timer.within(Duration::from_millis(30), async {
            tokio::task::yield_now().await;
            Ok(())
        });
        first.await.unwrap();
        // Still set for the first one, which is due before this one.
        let limit = Duration::from_millis(150);
        let waited = times_out(&mut timer, limit).await;
        assert!(waited + Duration::from_millis(10) >= limit, "{waited:?}");
    }
}
