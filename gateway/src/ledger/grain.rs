//! How coarse a row of the ledger is.

use crate::cost::calendar::{Month, Period, Zone};

/// How long the span of a row is. Spans begin and end in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grain {
    /// One second; only where asked for, and not for long.
    Second,
    /// 60 seconds.
    Minute,
    /// 3,600 seconds.
    Hour,
    /// A UTC day.
    Day,
    /// A UTC month.
    Month,
}

impl Grain {
    /// Finest first.
    pub const ALL: [Self; 5] = [
        Self::Second,
        Self::Minute,
        Self::Hour,
        Self::Day,
        Self::Month,
    ];

    /// The word in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    pub(super) fn number(self) -> i64 {
        match self {
            Self::Second => -1,
            Self::Minute => 0,
            Self::Hour => 1,
            Self::Day => 2,
            Self::Month => 3,
        }
    }

    pub(super) fn from_number(number: i64) -> Self {
        match number {
            -1 => Self::Second,
            0 => Self::Minute,
            1 => Self::Hour,
            2 => Self::Day,
            _ => Self::Month,
        }
    }

    /// The span of this grain that an instant (Unix seconds) lies in.
    #[must_use]
    pub fn span(self, at: i64) -> Period {
        let fixed = |seconds: i64| {
            let start = at - at.rem_euclid(seconds);
            Period {
                start,
                end: start + seconds,
            }
        };
        match self {
            Self::Second => fixed(1),
            Self::Minute => fixed(60),
            Self::Hour => fixed(3_600),
            Self::Day => fixed(86_400),
            Self::Month => {
                let utc = Zone::utc();
                utc.month(Month::of(utc.date(at)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_have_their_own_lengths() {
        // 2028-02-29T12:00:00Z
        let february = Grain::Month.span(1_835_438_400);
        assert_eq!(february.end - february.start, 29 * 86_400);
        let march = Grain::Month.span(february.end);
        assert_eq!(march.start, february.end);
        assert_eq!(march.end - march.start, 31 * 86_400);
        assert_eq!(
            Grain::Hour.span(-1),
            Period {
                start: -3_600,
                end: 0
            }
        );
    }
}
