//! When a batch goes out, pure: 50 events, or 200 ms since the oldest.

use std::time::Duration;

/// Most events in one batch.
pub const BATCH_EVENTS_MAX: u32 = 50;
/// Longest wait of an event for company, in milliseconds.
pub const AGE_MAX_MS: i64 = 200;

/// The events a sink has not been sent: how many of the next batch are there, and since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Counted up to a batch.
    pub count: u32,
    /// When the oldest was committed: milliseconds since the Unix epoch.
    pub oldest_ms: i64,
}

/// What to do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Send.
    Now,
    /// Look again after this long.
    Wait(Duration),
    /// Nothing waits.
    Idle,
}

/// Decides. A clock that was set back does not hold events.
#[must_use]
pub fn decide(waiting: Waiting, now_ms: i64) -> Flush {
    if waiting.count == 0 {
        return Flush::Idle;
    }
    let age = now_ms.saturating_sub(waiting.oldest_ms);
    if waiting.count >= BATCH_EVENTS_MAX || !(0..AGE_MAX_MS).contains(&age) {
        return Flush::Now;
    }
    let left = AGE_MAX_MS.saturating_sub(age);
    Flush::Wait(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifty_or_two_hundred_milliseconds() {
        let waiting = |count, oldest_ms| Waiting { count, oldest_ms };
        assert_eq!(decide(waiting(0, 0), 1000), Flush::Idle);
        assert_eq!(decide(waiting(50, 1000), 1000), Flush::Now);
        assert_eq!(decide(waiting(1, 800), 1000), Flush::Now);
        let soon = Flush::Wait(Duration::from_millis(1));
        assert_eq!(decide(waiting(49, 801), 1000), soon);
        assert_eq!(decide(waiting(1, 5000), 1000), Flush::Now);
    }
}
