//! Membership, pure: what a subscription entitles to, and when a renewal counts.
//!
//! - [`token`]: access tokens (JWT) and the keys that sign them.
//! - here: periods, grace, and refresh tokens that are used once.
//!
//! A token says who somebody is; what they are entitled to is in the database, so that it
//! can change before the token ends.

pub mod token;

use serde::Serialize;
use utoipa::ToSchema;

/// Length of a period, in milliseconds: 30 days.
pub const PERIOD_MS: i64 = 30 * 24 * 3_600 * 1_000;
/// How long benefits outlast a period that was not renewed, in milliseconds: 3 days.
pub const GRACE_MS: i64 = 3 * 24 * 3_600 * 1_000;
/// How long a refresh token lives unused, in milliseconds: 30 days.
pub const REFRESH_MS: i64 = 30 * 24 * 3_600 * 1_000;

/// What a subscription is worth at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Paid for.
    Active,
    /// The period is over; the benefits stay for a while.
    Grace,
    /// Over.
    Lapsed,
}

impl Standing {
    /// Whether members' prices apply.
    #[must_use]
    pub const fn is_entitled(self) -> bool {
        matches!(self, Self::Active | Self::Grace)
    }
}

/// A subscription's periods. Period numbers start at 1 and only rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// The last period that was paid.
    pub period: i64,
    /// First millisecond after it.
    pub paid_until_ms: i64,
}

/// What a renewal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It is the next period, which ends then.
    Renewed(Subscription),
    /// That period is paid already: the same renewal once more. Nothing changes.
    Known,
    /// Not the next period: nothing is taken for a period that nobody can have yet.
    OutOfOrder {
        /// The period that can be renewed.
        next: i64,
    },
}

impl Subscription {
    /// A subscription that was never paid.
    pub const NONE: Self = Self {
        period: 0,
        paid_until_ms: 0,
    };

    /// What it is worth at `now_ms`.
    #[must_use]
    pub const fn standing(&self, now_ms: i64) -> Standing {
        if now_ms < self.paid_until_ms {
            Standing::Active
        } else if self.period > 0 && now_ms < self.paid_until_ms.saturating_add(GRACE_MS) {
            Standing::Grace
        } else {
            Standing::Lapsed
        }
    }

    /// Pays for `period` at `now_ms`. Early and within grace it continues where the last
    /// one ended; after a lapse it starts now.
    #[must_use]
    pub fn renew(&self, period: i64, now_ms: i64) -> Renewal {
        let next = self.period.saturating_add(1);
        if period > 0 && period < next {
            return Renewal::Known;
        }
        if period != next {
            return Renewal::OutOfOrder { next };
        }
        let from = if self.standing(now_ms).is_entitled() {
            self.paid_until_ms
        } else {
            now_ms
        };
        Renewal::Renewed(Self {
            period,
            paid_until_ms: from.saturating_add(PERIOD_MS),
        })
    }
}

/// What became of a refresh token that was presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// Used for the first time: exchange it.
    Rotate,
    /// Used before. Thief or owner, one of them has a copy: the whole family ends.
    Reused,
    /// Unknown, too old, or of a family that has ended.
    Invalid,
}

/// A refresh token as stored; its secret only as a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefreshToken {
    /// Whether it was exchanged.
    pub used: bool,
    /// Whether its family has ended.
    pub revoked: bool,
    /// First millisecond at which it is too old.
    pub expires_at_ms: i64,
}

impl RefreshToken {
    /// What presenting it means.
    #[must_use]
    pub const fn present(&self, now_ms: i64) -> Refresh {
        if self.revoked || now_ms >= self.expires_at_ms {
            Refresh::Invalid
        } else if self.used {
            Refresh::Reused
        } else {
            Refresh::Rotate
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_paid_once_however_often_it_is_asked_for() {
        let Renewal::Renewed(first) = Subscription::NONE.renew(1, 1_000) else {
            panic!("the first period is next")
        };
        assert_eq!(first.paid_until_ms, 1_000 + PERIOD_MS);
        assert_eq!(first.renew(1, 2_000), Renewal::Known);
        assert_eq!(first.renew(3, 2_000), Renewal::OutOfOrder { next: 2 });
        assert_eq!(first.renew(0, 2_000), Renewal::OutOfOrder { next: 2 });
    }

    #[test]
    fn renewal_continues_until_grace_ends_and_starts_anew_after() {
        let paid = Subscription {
            period: 1,
            paid_until_ms: 10_000,
        };
        let until = |now| match paid.renew(2, now) {
            Renewal::Renewed(renewed) => renewed.paid_until_ms,
            other => panic!("{other:?}"),
        };
        assert_eq!(until(5_000), 10_000 + PERIOD_MS, "early: no day is lost");
        assert_eq!(until(10_000 + GRACE_MS - 1), 10_000 + PERIOD_MS);
        let late = 10_000 + GRACE_MS;
        assert_eq!(until(late), late + PERIOD_MS);
    }

    #[test]
    fn benefits_last_through_grace_and_no_longer() {
        let paid = Subscription {
            period: 1,
            paid_until_ms: 10_000,
        };
        for (now, standing) in [
            (9_999, Standing::Active),
            (10_000, Standing::Grace),
            (10_000 + GRACE_MS - 1, Standing::Grace),
            (10_000 + GRACE_MS, Standing::Lapsed),
        ] {
            assert_eq!(paid.standing(now), standing, "at {now}");
        }
        assert_eq!(Subscription::NONE.standing(1), Standing::Lapsed);
    }

    #[test]
    fn a_refresh_token_works_once() {
        let token = RefreshToken {
            used: false,
            revoked: false,
            expires_at_ms: 10,
        };
        assert_eq!(token.present(9), Refresh::Rotate);
        assert_eq!(token.present(10), Refresh::Invalid);
        let used = RefreshToken {
            used: true,
            ..token
        };
        assert_eq!(used.present(9), Refresh::Reused);
        let ended = RefreshToken {
            revoked: true,
            ..used
        };
        assert_eq!(ended.present(9), Refresh::Invalid);
    }
}
