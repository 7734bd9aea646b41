//! What the ledger hands to pricing: who moved how many wire bytes, when.
//!
//! This is the whole contract between the two. Periods may be of any length (minutes now, hours or
//! months after a roll-up); one that crosses a boundary of the bill is split there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::calendar::Period;
use crate::owner::{Leg, OwnerKind, Quality};

pub use flow_abi::Direction;

/// Why bytes are on the bill. Attributed are `route` and `overhead`; all others are unattributed,
/// and rows of the bill all the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A request's bytes.
    Route,
    /// A gateway connection's own frames.
    Overhead,
    /// Received on a gateway connection, claimed by no request.
    Unclaimed,
    /// Of no gateway connection.
    Foreign,
    /// In no flow: the name of the kernel's cell.
    Cell(String),
    /// No bytes at all: fixed fees and commitments that nobody's traffic carries.
    Account,
}

impl Kind {
    /// The word in reports; cells say which.
    #[must_use]
    pub fn word(&self) -> String {
        match self {
            Self::Route => "route".into(),
            Self::Overhead => "overhead".into(),
            Self::Unclaimed => "unclaimed".into(),
            Self::Foreign => "foreign".into(),
            Self::Cell(name) => format!("cell:{name}"),
            Self::Account => "account".into(),
        }
    }

    /// Whether somebody is known to have caused these bytes.
    #[must_use]
    pub fn is_attributed(&self) -> bool {
        matches!(self, Self::Route | Self::Overhead | Self::Account)
    }
}

impl From<OwnerKind> for Kind {
    fn from(kind: OwnerKind) -> Self {
        match kind {
            OwnerKind::Route => Self::Route,
            OwnerKind::Overhead => Self::Overhead,
            OwnerKind::Unclaimed => Self::Unclaimed,
            OwnerKind::Foreign => Self::Foreign,
        }
    }
}

/// Which side of the gateway bytes were on. A proxied byte crosses the host on both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Between a client and the gateway.
    Client,
    /// Between the gateway and an upstream peer.
    Upstream,
    /// On no connection of the gateway.
    None,
}

impl Side {
    /// The word in reports and in the price book.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "upstream",
            Self::None => "none",
        }
    }
}

impl From<Leg> for Side {
    fn from(leg: Leg) -> Self {
        match leg {
            Leg::Client => Self::Client,
            Leg::Upstream => Self::Upstream,
        }
    }
}

/// Received or sent, as seen by this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Received.
    Rx,
    /// Sent.
    Tx,
}

impl Way {
    /// The word in reports and in the price book.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }
}

impl From<Direction> for Way {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Rx => Self::Rx,
            Direction::Tx => Self::Tx,
        }
    }
}

/// Whose bytes, where: everything of a row but when and how many. Its order breaks ties.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Account {
    /// Network interface.
    pub interface: String,
    /// Side of the gateway.
    pub side: Side,
    /// Received or sent.
    pub way: Way,
    /// Name of the address class of the far end; empty when it has none.
    pub class: String,
    /// Why they are on the bill.
    pub kind: Kind,
    /// Listener or upstream; empty for foreign bytes and cells.
    pub endpoint: String,
    /// Empty unless `kind` is a route.
    pub route: String,
    /// Empty unless `kind` is a route.
    pub service: String,
    /// Empty unless `kind` is a route.
    pub tenant: String,
    /// How sure the split is.
    pub estimated: bool,
}

/// Bytes of one account in one period.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UsageRow {
    /// When; half-open.
    pub period: Period,
    /// Whose.
    pub account: Account,
    /// Wire bytes. Negative only for `unclaimed`, when a request claims in one minute what came in
    /// the one before; the sum of an interface's rows is never negative.
    pub wire_bytes: i64,
}

/// A time in which the counters of an interface were not read: what it moved is in the row after.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gap {
    /// Where.
    pub interface: String,
    /// When.
    pub period: Period,
}

/// Everything the ledger knows of a range of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In any order.
    pub rows: Vec<UsageRow>,
    /// Missed readings.
    pub gaps: Vec<Gap>,
    /// What the interfaces moved, by period: the sum of the rows, counted apart.
    pub totals: BTreeMap<(Period, String, Way), i128>,
    /// Hash of the class list the rows were classed by; empty when there was none.
    pub class_hash: String,
}

impl Usage {
    /// Sorts the rows and adds up those of the same period and account, so that neither order nor
    /// grain of arrival shows.
    pub fn canonical(&mut self) {
        let mut sums: BTreeMap<(Period, Account), i64> = BTreeMap::new();
        for row in self.rows.drain(..) {
            *sums.entry((row.period, row.account)).or_default() += row.wire_bytes;
        }
        self.rows = sums
            .into_iter()
            .filter(|(_, bytes)| *bytes != 0)
            .map(|((period, account), wire_bytes)| UsageRow {
                period,
                account,
                wire_bytes,
            })
            .collect();
        self.gaps.sort();
        self.gaps.dedup();
    }

    /// SHA-256 of the canonical rows and gaps, in hexadecimal.
    #[must_use]
    pub fn hash(&self) -> String {
        let mut digest = Sha256::new();
        for row in &self.rows {
            let account = &row.account;
            digest.update(format!(
                "{} {} {:?} {}\n",
                row.period.start, row.period.end, account, row.wire_bytes
            ));
        }
        for gap in &self.gaps {
            digest.update(format!("{gap:?}\n"));
        }
        hex(&digest.finalize())
    }

    /// What the rows add up to: the same as `totals`.
    #[must_use]
    pub fn sums(&self) -> BTreeMap<(Period, String, Way), i128> {
        let mut sums = BTreeMap::new();
        for row in &self.rows {
            let key = (row.period, row.account.interface.clone(), row.account.way);
            *sums.entry(key).or_insert(0) += i128::from(row.wire_bytes);
        }
        sums
    }

    /// By how much the interfaces moved more than the rows say, for each period that touches a
    /// window: zero, always. By period, because a coarse one may touch two windows.
    #[must_use]
    pub fn imbalance(&self, window: Period) -> BTreeMap<(Period, String, Way), i128> {
        let mut apart = self.totals.clone();
        for (key, bytes) in self.sums() {
            *apart.entry(key).or_default() -= bytes;
        }
        apart.retain(|(period, ..), bytes| *bytes != 0 && period.meet(window).is_some());
        apart
    }
}

/// Whether the owner's split is an estimate.
#[must_use]
pub fn is_estimated(quality: Quality) -> bool {
    quality == Quality::Estimated
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
