//! The price book: what a byte, a megabit and a day cost, from when to when.
//!
//! Made by `config::book` from a TOML file or from the shorthand in `[prices]`; by then every
//! reference, range and overlap has been checked. A byte has at most one SKU at any instant: that
//! is the proof that a byte which crosses the host twice, on two legs, is never billed twice under
//! one price.

use std::num::NonZeroU64;

use super::{
    calendar::{Date, Zone},
    usage::{Account, Side, Way},
};
use crate::{config::Name, money::Currency, money::UnitPrice};

/// Bits per second in one Mbps.
pub const BPS_PER_MBPS: i128 = 1_000_000;

/// A whole, valid price book.
#[derive(Clone, Debug)]
pub struct Book {
    /// File name as given.
    pub file: String,
    /// SHA-256 of the file (of the canonical shorthand when there is none), hexadecimal.
    pub hash: String,
    /// Who sends the bill, and to whom.
    pub account: BillingAccount,
    /// Of every amount of the bill.
    pub currency: Currency,
    /// Whose midnights begin days and months.
    pub zone: Zone,
    /// In file order; those with the same id are versions of one price.
    pub skus: Vec<Sku>,
    /// Prices of machines, for what the gateway itself costs and what idle things waste.
    pub compute: Vec<Compute>,
}

/// Names on the bill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BillingAccount {
    /// Billing account.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Who invoices, hosts and provides.
    pub provider: String,
    /// Region id and name; both or neither.
    pub region: Option<(String, String)>,
    /// Availability zone.
    pub availability_zone: Option<String>,
}

/// One price, or one version of it.
#[derive(Clone, Debug)]
pub struct Sku {
    /// Shared by the versions of one price.
    pub id: Name,
    /// For people.
    pub description: String,
    /// Where the price was read, and when.
    pub source: String,
    /// What a provider's bill calls it.
    pub bill_names: Vec<String>,
    /// Which bytes.
    pub leg: Side,
    /// Which way.
    pub direction: SkuDirection,
    /// Only this address class; None: every class that no other SKU names.
    pub class: Option<Name>,
    /// Only these interfaces; empty: every one that no other SKU names.
    pub interfaces: Vec<String>,
    /// What is counted.
    pub basis: Basis,
    /// How tiers apply.
    pub tier_mode: TierMode,
    /// Units that cost nothing, the first of each month (bytes) or day (peaks). They lie inside
    /// the first tiers.
    pub free_units: u64,
    /// At least one; all but the last have an end, in ascending order.
    pub tiers: Vec<Tier>,
    /// Further prices on the same bytes.
    pub adders: Vec<Adder>,
    /// For every day in force, whatever is used.
    pub fixed_per_day: Option<UnitPrice>,
    /// When the price is in another currency: billionths of the book's currency for one unit of it.
    pub fx: Option<Fx>,
    /// Days in force.
    pub effective: Dates,
}

/// A range of days, open where None: `[from, until)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dates {
    /// First day.
    pub from: Option<Date>,
    /// First day no more.
    pub until: Option<Date>,
}

impl Dates {
    /// Whether a day is inside.
    #[must_use]
    pub fn contains(&self, date: Date) -> bool {
        self.from.is_none_or(|from| from <= date) && self.until.is_none_or(|until| date < until)
    }

    /// Whether two ranges share a day.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        let before = |until: Option<Date>, from: Option<Date>| match (until, from) {
            (Some(until), Some(from)) => until <= from,
            _ => false,
        };
        !before(self.until, other.from) && !before(other.until, self.from)
    }
}

/// A rate of exchange somebody wrote down on a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fx {
    /// The price's currency.
    pub from: Currency,
    /// Billionths of the book's currency for one unit of `from`.
    pub rate: UnitPrice,
    /// When it was read.
    pub as_of: Date,
}

/// Which bytes of a leg are priced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkuDirection {
    /// One way only.
    Only(Way),
    /// Both, added.
    Both,
    /// The larger of the two: over the month (bytes) or in each sample (peaks and 95th).
    MaxInOut,
}

impl SkuDirection {
    /// Whether bytes of this direction are this SKU's.
    #[must_use]
    pub fn covers(self, way: Way) -> bool {
        match self {
            Self::Only(only) => only == way,
            Self::Both | Self::MaxInOut => true,
        }
    }

    /// Whether a byte could be both's.
    #[must_use]
    pub fn meets(self, other: Self) -> bool {
        [Way::Rx, Way::Tx]
            .into_iter()
            .any(|way| self.covers(way) && other.covers(way))
    }
}

/// What is counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Bytes, over the account's month.
    Bytes {
        /// How many bytes a price buys.
        unit: NonZeroU64,
    },
    /// The largest sample of each day, in Mbps.
    PeakMbpsDay(Sampling),
    /// The 95th percentile of the month's samples, in Mbps.
    Percentile {
        /// How samples are made.
        sampling: Sampling,
        /// Which sample counts.
        method: Method,
        /// What is paid at least.
        commit: Option<Commit>,
        /// Whether only days with traffic count.
        valid_days: bool,
    },
}

/// How bandwidth is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Length of a sample; divides an hour.
    pub seconds: i64,
    /// Decimals of a Mbps that the billed figure keeps, 0 to 6.
    pub decimals: u8,
}

/// Which sample of a month counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The `day_rank`-th largest of each day; of these the mean of the `month_mean_top` largest.
    DayRank {
        /// From 1.
        day_rank: usize,
        /// From 1.
        month_mean_top: usize,
    },
    /// The largest after dropping this many per cent of the month's samples.
    DropTop {
        /// 0 to 99.
        percent: usize,
    },
}

impl Method {
    /// The id recorded in every row it made.
    #[must_use]
    pub fn id(self) -> String {
        match self {
            Self::DayRank {
                day_rank,
                month_mean_top,
            } => format!("edgemeter.p95.day-rank-{day_rank}.mean-top-{month_mean_top}.share.v1"),
            Self::DropTop { percent } => format!("edgemeter.p95.drop-top-{percent}.share.v1"),
        }
    }
}

/// A commitment: at least `floor_pct` of `cap_mbps` is paid while it is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Mbps that may be used.
    pub cap_mbps: u64,
    /// Per cent of it that are paid in any case.
    pub floor_pct: u64,
    /// Days in force.
    pub effective: Dates,
}

/// How tiers apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TierMode {
    /// Each unit at the price of the tier it falls in.
    Graduated,
    /// All units at the price of the tier the whole falls in.
    WholeVolume,
}

/// A price up to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// In units, from the first of the month (bytes) or in Mbps; None: no end.
    pub to: Option<u64>,
    /// For one unit.
    pub price: UnitPrice,
}

/// A further price on the same bytes, such as a NAT gateway's.
#[derive(Clone, Debug)]
pub struct Adder {
    /// Unique within the SKU.
    pub id: Name,
    /// For one unit.
    pub price: UnitPrice,
}

/// What a machine costs.
#[derive(Clone, Debug)]
pub struct Compute {
    /// Unique.
    pub id: Name,
    /// Where the price was read, and when.
    pub source: String,
    /// For one core for one hour.
    pub core_hour: UnitPrice,
    /// For one GiB of memory for one hour.
    pub gib_hour: Option<UnitPrice>,
}

/// An exact price: `numerator / 10^decimals` of the book's currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Price {
    /// Billionths, or billionths of billionths when converted.
    pub numerator: i128,
    /// 9 or 18.
    pub decimals: u32,
}

impl Price {
    /// What a nano of the bill is in the numerator's unit: 1 or 10^9.
    #[must_use]
    pub fn per_nano(self) -> i128 {
        10_i128.pow(self.decimals - 9)
    }
}

impl Sku {
    /// The price in the book's currency, exact also after conversion.
    #[must_use]
    pub fn price(&self, price: UnitPrice) -> Price {
        let nanos = i128::from(price.nanos());
        match self.fx {
            None => Price {
                numerator: nanos,
                decimals: 9,
            },
            Some(fx) => Price {
                numerator: nanos * i128::from(fx.rate.nanos()),
                decimals: 18,
            },
        }
    }

    /// What is written after a quantity.
    #[must_use]
    pub fn unit(&self) -> String {
        match &self.basis {
            Basis::Bytes { unit } => match unit.get() {
                1 => "B".into(),
                1_000_000_000 => "GB".into(),
                1_000_000_000_000 => "TB".into(),
                1_073_741_824 => "GiB".into(),
                1_099_511_627_776 => "TiB".into(),
                other => format!("{other} B"),
            },
            Basis::PeakMbpsDay(_) => "Mbps-Days".into(),
            Basis::Percentile { .. } => "Mbps-Months".into(),
        }
    }

    /// How exactly this names the account's bytes: higher is closer; None: not its bytes.
    fn fits(&self, account: &Account) -> Option<u8> {
        if self.leg != account.side || !self.direction.covers(account.way) {
            return None;
        }
        let class = match &self.class {
            None => 0,
            Some(class) if class.as_str() == account.class => 1,
            Some(_) => return None,
        };
        if self.interfaces.is_empty() {
            return Some(class);
        }
        self.interfaces
            .contains(&account.interface)
            .then_some(class + 2)
    }
}

impl Book {
    /// The coarsest grain of usage, in seconds, that loses nothing: every zone's midnight is on a
    /// quarter of an hour, and no sample is shorter than it.
    #[must_use]
    pub fn grain(&self) -> i64 {
        let samples = self.skus.iter().filter_map(|sku| match &sku.basis {
            Basis::Bytes { .. } => None,
            Basis::PeakMbpsDay(sampling) | Basis::Percentile { sampling, .. } => {
                Some(sampling.seconds)
            }
        });
        samples.fold(900, gcd)
    }

    /// The one SKU of an account's bytes on a day; None: they are counted, not priced.
    #[must_use]
    pub fn find(&self, account: &Account, date: Date) -> Option<usize> {
        let mut best: Option<(u8, usize)> = None;
        for (index, sku) in self.skus.iter().enumerate() {
            if !sku.effective.contains(date) {
                continue;
            }
            if let Some(fit) = sku.fits(account)
                && best.is_none_or(|(found, _)| fit > found)
            {
                best = Some((fit, index));
            }
        }
        best.map(|(_, index)| index)
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
