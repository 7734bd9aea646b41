//! Days and months of the book's zone as half-open ranges of Unix seconds.
//!
//! Zone rules come with the program, not from the host: a bill is the same everywhere.

use std::fmt;

use chrono::{DateTime, Datelike as _, TimeZone as _, Utc};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

pub use chrono::NaiveDate as Date;

/// `[start, end)` in Unix seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Period {
    /// First second inside.
    pub start: i64,
    /// First second after.
    pub end: i64,
}

impl Period {
    /// How long, in seconds; an inverted range is empty.
    #[must_use]
    pub fn seconds(self) -> i64 {
        (self.end - self.start).max(0)
    }

    /// What both have in common, if anything.
    #[must_use]
    pub fn meet(self, other: Self) -> Option<Self> {
        let both = Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        };
        (both.start < both.end).then_some(both)
    }

    /// Both ends as FOCUS writes them: UTC, `2026-11-23T14:05:00Z`.
    #[must_use]
    pub fn utc(self) -> (String, String) {
        let text = |seconds| at(seconds).format("%Y-%m-%dT%H:%M:%SZ").to_string();
        (text(self.start), text(self.end))
    }
}

/// A time zone of the IANA database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone(Tz);

impl Zone {
    /// A zone by its name, such as `Asia/Shanghai` or `UTC`; None when there is no such zone.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        name.parse().ok().map(Self)
    }

    /// Greenwich.
    #[must_use]
    pub fn utc() -> Self {
        Self(Tz::UTC)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// The first instant of a day. Where clocks skip midnight, the first that exists; where they
    /// repeat it, the first of the two.
    #[must_use]
    pub fn midnight(&self, date: Date) -> i64 {
        let utc = date.and_time(chrono::NaiveTime::MIN).and_utc().timestamp();
        // No zone is further from Greenwich.
        let (mut before, mut inside) = (utc - 16 * 3_600, utc + 16 * 3_600);
        while inside - before > 1 {
            let middle = before + (inside - before) / 2;
            if self.date(middle) < date {
                before = middle;
            } else {
                inside = middle;
            }
        }
        inside
    }

    /// A whole day: 23, 24 or 25 hours.
    #[must_use]
    pub fn day(&self, date: Date) -> Period {
        let next = date.succ_opt().unwrap_or(date);
        Period {
            start: self.midnight(date),
            end: self.midnight(next),
        }
    }

    /// The day an instant belongs to.
    #[must_use]
    pub fn date(&self, unix_seconds: i64) -> Date {
        self.0
            .from_utc_datetime(&at(unix_seconds).naive_utc())
            .date_naive()
    }

    /// A whole month.
    #[must_use]
    pub fn month(&self, month: Month) -> Period {
        Period {
            start: self.midnight(month.first()),
            end: self.midnight(month.next().first()),
        }
    }

    /// The days that a range touches, in order.
    #[must_use]
    pub fn days(&self, range: Period) -> Vec<(Date, Period)> {
        let mut days = Vec::new();
        let mut date = self.date(range.start);
        loop {
            let day = self.day(date);
            if day.start >= range.end || day.seconds() == 0 {
                return days;
            }
            days.push((date, day));
            match date.succ_opt() {
                Some(next) => date = next,
                None => return days,
            }
        }
    }
}

fn at(unix_seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(unix_seconds, 0).unwrap_or_default()
}

/// A calendar month, written `2026-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month {
    year: i32,
    month: u32,
}

impl Month {
    /// The month of a day.
    #[must_use]
    pub fn of(date: Date) -> Self {
        Self {
            year: date.year(),
            month: date.month(),
        }
    }

    /// Its first day.
    #[must_use]
    pub fn first(self) -> Date {
        Date::from_ymd_opt(self.year, self.month, 1).unwrap_or(Date::MIN)
    }

    /// The month after it.
    #[must_use]
    pub fn next(self) -> Self {
        if self.month == 12 {
            Self {
                year: self.year.saturating_add(1),
                month: 1,
            }
        } else {
            Self {
                year: self.year,
                month: self.month + 1,
            }
        }
    }

    /// 28 to 31.
    #[must_use]
    pub fn days(self) -> i64 {
        (self.next().first() - self.first()).num_days()
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year, self.month)
    }
}

impl std::str::FromStr for Month {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not a month; write it as 2026-11");
        if text.len() != 7 {
            return Err(wrong());
        }
        format!("{text}-01")
            .parse::<Date>()
            .map(Self::of)
            .map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours(zone: &str, date: &str) -> i64 {
        let day = Zone::new(zone).unwrap().day(date.parse().unwrap());
        assert_eq!(day.seconds() % 900, 0);
        day.seconds() / 3_600
    }

    #[test]
    fn days_around_clock_changes_are_shorter_or_longer() {
        assert_eq!(hours("Europe/Berlin", "2026-03-29"), 23);
        assert_eq!(hours("Europe/Berlin", "2026-10-25"), 25);
        assert_eq!(hours("Asia/Shanghai", "2026-03-29"), 24);
        // Midnight itself is skipped here, and the day begins at one o'clock.
        assert_eq!(hours("America/Sao_Paulo", "2018-11-04"), 23);
        // And here it is repeated: the day begins with the first of the two.
        assert_eq!(hours("America/Havana", "2026-11-01"), 25);
        let havana = Zone::new("America/Havana").unwrap();
        let day = havana.day("2026-11-01".parse().unwrap());
        assert_eq!(havana.date(day.start).to_string(), "2026-11-01");
        assert_eq!(havana.date(day.start - 1).to_string(), "2026-10-31");
    }

    #[test]
    fn a_month_is_exactly_its_days_in_every_zone() {
        for name in [
            "UTC",
            "Asia/Shanghai",
            "America/New_York",
            "Australia/Lord_Howe",
        ] {
            let zone = Zone::new(name).unwrap();
            for month in [
                "2026-02", "2026-03", "2026-04", "2026-10", "2026-11", "2026-12",
            ] {
                let month: Month = month.parse().unwrap();
                let whole = zone.month(month);
                let days = zone.days(whole);
                assert_eq!(
                    i64::try_from(days.len()).unwrap(),
                    month.days(),
                    "{name} {month}"
                );
                assert_eq!(days[0].1.start, whole.start);
                assert_eq!(days[days.len() - 1].1.end, whole.end);
                for pair in days.windows(2) {
                    assert_eq!(pair[0].1.end, pair[1].1.start);
                }
                for (date, day) in days {
                    assert_eq!(zone.date(day.start), date);
                    assert_eq!(zone.date(day.end - 1), date);
                }
            }
        }
    }

    #[test]
    fn months_follow_each_other() {
        let december: Month = "2026-12".parse().unwrap();
        assert_eq!(december.next().to_string(), "2027-01");
        assert!("2026-13".parse::<Month>().is_err());
        assert!("november".parse::<Month>().is_err());
        assert!(Zone::new("Mars/Olympus").is_none());
    }

    #[test]
    fn instants_are_written_in_utc() {
        let zone = Zone::new("Asia/Shanghai").unwrap();
        let (start, end) = zone.month("2026-11".parse().unwrap()).utc();
        assert_eq!(start, "2026-10-31T16:00:00Z");
        assert_eq!(end, "2026-11-30T16:00:00Z");
    }
}
