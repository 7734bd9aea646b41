//! Our bill against a provider's: for each SKU the difference, and what explains it.
//!
//! A cause is not guessed from a ratio: the same usage is rated again as the provider would have
//! rated it if the cause were true, and the cause is named only when that comes out at the
//! provider's figure.

use std::{collections::BTreeMap, fmt::Write as _, num::NonZeroU64};

use super::{
    bill::Bill,
    book::{Basis, Book, SkuDirection, TierMode},
    calendar::{Month, Zone},
    rate::{RateError, rate_month},
    usage::{Kind, Side, Usage, Way},
};
use crate::money::Nanos;

/// One SKU of a provider's bill.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BillLine {
    /// As the provider names it.
    pub sku: String,
    /// Billionths of a unit, where the bill says.
    pub quantity: Option<i128>,
    /// Money.
    pub cost: Nanos,
}

/// What is wrong with a provider's file.
#[derive(Debug, thiserror::Error)]
pub enum BillError {
    /// Not CSV.
    #[error("{0}")]
    Csv(#[from] csv::Error),
    /// A column is missing.
    #[error("line 1: no column for the {what}; fix: name one of {known}")]
    Column {
        /// Which.
        what: &'static str,
        /// Names that are understood.
        known: String,
    },
    /// A value is no number.
    #[error("line {line}: \"{value}\" is not a decimal number; fix: write such as 12.50")]
    Number {
        /// From 1.
        line: usize,
        /// As written.
        value: String,
    },
}

const SKU_COLUMNS: &[&str] = &["sku", "SkuId", "lineItem/UsageType", "SKU ID", "MeterName"];
const QUANTITY_COLUMNS: &[&str] = &[
    "quantity",
    "PricingQuantity",
    "lineItem/UsageAmount",
    "Usage Amount",
    "Quantity",
];
const COST_COLUMNS: &[&str] = &[
    "cost",
    "BilledCost",
    "lineItem/UnblendedCost",
    "Cost",
    "CostInBillingCurrency",
];

/// Reads a bill: FOCUS, the exports of AWS, GCP and Azure, or plain `sku,quantity,cost`. Lines of
/// the same SKU are added up.
///
/// # Errors
/// [`BillError`].
pub fn read(text: &[u8]) -> Result<Vec<BillLine>, BillError> {
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_reader(text);
    let headers = reader.headers()?.clone();
    let find = |known: &[&str]| headers.iter().position(|name| known.contains(&name));
    let need = |what, known: &[&str]| {
        find(known).ok_or_else(|| BillError::Column {
            what,
            known: known.join(", "),
        })
    };
    let sku = need("SKU", SKU_COLUMNS)?;
    let cost = need("cost", COST_COLUMNS)?;
    let quantity = find(QUANTITY_COLUMNS);
    let mut lines: BTreeMap<String, BillLine> = BTreeMap::new();
    for (index, record) in reader.records().enumerate() {
        let record = record?;
        let line = index + 2;
        let number = |column: usize| {
            let value = record.get(column).unwrap_or_default();
            nanos(value).ok_or_else(|| BillError::Number {
                line,
                value: value.to_owned(),
            })
        };
        let name = record.get(sku).unwrap_or_default().to_owned();
        if name.is_empty() {
            continue;
        }
        let entry = lines.entry(name.clone()).or_default();
        entry.sku = name;
        entry.cost.0 += number(cost)?;
        if let Some(column) = quantity
            && record.get(column).is_some_and(|value| !value.is_empty())
        {
            entry.quantity = Some(entry.quantity.unwrap_or(0) + number(column)?);
        }
    }
    Ok(lines.into_values().collect())
}

/// A decimal in billionths; further digits, which bills have, are cut off.
fn nanos(text: &str) -> Option<i128> {
    if text.is_empty() {
        return Some(0);
    }
    let short = match text.split_once('.') {
        Some((whole, fraction)) if fraction.len() > 9 => {
            if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            format!("{whole}.{}", &fraction[..9])
        }
        _ => text.to_owned(),
    };
    short.parse::<Nanos>().ok().map(|nanos| nanos.0)
}

/// Why two bills differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// They do not.
    Agree,
    /// By less than the tolerance.
    Rounding,
    /// 10^9 bytes against 2^30.
    UnitSize(u64),
    /// The other direction, both, or the larger one.
    Direction(&'static str),
    /// No free allowance was given.
    FreeUnits,
    /// Tiers by whole volume instead of graduated, or the reverse.
    TierMode,
    /// Months begin at another zone's midnight.
    Timezone(&'static str),
    /// Bytes of a class that we price apart are in it.
    MissingClass(String),
    /// Bytes that no request and no connection of the gateway moved are in it.
    Unattributed,
    /// The gateway's own connection overhead is not in it.
    Overhead,
    /// A surcharge of ours is not in it.
    Adder(String),
    /// The daily fee is not in it.
    Fixed,
    /// The quantities agree.
    Price,
    /// The provider has no such SKU.
    NotOnBill,
    /// We have no such SKU.
    NotInBook,
    /// None of the above.
    Unexplained,
}

impl Cause {
    /// In words, with what to do.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Agree => "agree".into(),
            Self::Rounding => "rounding".into(),
            Self::UnitSize(bytes) => {
                format!("unit size: the provider counts in {bytes} bytes; set unit_bytes = {bytes}")
            }
            Self::Direction(word) => {
                format!("direction: the provider bills `{word}`; set direction = \"{word}\"")
            }
            Self::FreeUnits => {
                "free tier: the provider gave no free units; used up by another account of the \
                 same organisation, or set free_units = 0"
                    .into()
            }
            Self::TierMode => {
                "tiers: the provider applies them the other way; set tier_mode".into()
            }
            Self::Timezone(zone) => {
                format!("timezone: the provider's month is that of {zone}; set timezone")
            }
            Self::MissingClass(class) => {
                format!("class: the provider bills bytes of class `{class}` here too")
            }
            Self::Unattributed => {
                "unattributed: bytes of no gateway connection are in it; add a SKU with \
                 leg = \"none\", or find what else uses the interface"
                    .into()
            }
            Self::Overhead => "overhead: connection overhead is not in it".into(),
            Self::Adder(id) => format!("surcharge: `{id}` is not in it"),
            Self::Fixed => "fee: the daily fee is not in it".into(),
            Self::Price => "price: quantities agree and the money does not".into(),
            Self::NotOnBill => "not on the provider's bill".into(),
            Self::NotInBook => "not in the price book".into(),
            Self::Unexplained => "unexplained: no single cause comes out at this figure".into(),
        }
    }
}

/// One SKU on both bills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Ours, or the provider's where we have none.
    pub sku: String,
    /// Ours: billionths of a unit and nanos.
    pub ours: Option<(i128, Nanos)>,
    /// The provider's.
    pub theirs: Option<BillLine>,
    /// Why they differ.
    pub cause: Cause,
}

/// Compares a month. `usage` reaches a day beyond the month on both sides, so that other zones'
/// months can be tried. `tolerance_ppm`: differences below this many millionths are rounding.
///
/// # Errors
/// [`RateError`].
pub fn reconcile(
    book: &Book,
    usage: &Usage,
    month: Month,
    bill: &[BillLine],
    tolerance_ppm: i128,
) -> Result<Vec<Finding>, RateError> {
    let ours = sums(&rate(book, usage, month)?);
    let mut findings = Vec::new();
    let mut matched: Vec<&str> = Vec::new();
    for line in bill {
        let index = book
            .skus
            .iter()
            .position(|sku| sku.id.as_str() == line.sku || sku.bill_names.contains(&line.sku));
        let Some(index) = index else {
            findings.push(Finding {
                sku: line.sku.clone(),
                ours: None,
                theirs: Some(line.clone()),
                cause: Cause::NotInBook,
            });
            continue;
        };
        let id = book.skus[index].id.as_str();
        matched.push(id);
        let mine = ours.get(id).copied().unwrap_or_default();
        let cause = cause(book, usage, month, index, mine, line, tolerance_ppm)?;
        findings.push(Finding {
            sku: id.to_owned(),
            ours: Some(mine),
            theirs: Some(line.clone()),
            cause,
        });
    }
    for (id, mine) in &ours {
        if !matched.contains(&id.as_str()) && mine.1 != Nanos(0) {
            findings.push(Finding {
                sku: id.clone(),
                ours: Some(*mine),
                theirs: None,
                cause: Cause::NotOnBill,
            });
        }
    }
    Ok(findings)
}

fn rate(book: &Book, usage: &Usage, month: Month) -> Result<Bill, RateError> {
    rate_month(book, usage, month, book.zone.month(month).end)
}

/// Quantity (of the base price, in billionths of a unit) and money by SKU.
fn sums(bill: &Bill) -> BTreeMap<String, (i128, Nanos)> {
    use super::bill::Part;
    let mut sums: BTreeMap<String, (i128, Nanos)> = BTreeMap::new();
    for pool in &bill.pools {
        let sum = sums.entry(pool.sku.clone()).or_default();
        if matches!(pool.part, Part::Free | Part::Tier(_)) {
            // Below the tolerance of any comparison.
            sum.0 += pool.quantity.saturating_mul(1_000_000_000) / pool.divisor;
        }
        sum.1.0 += pool.cost.0;
    }
    sums
}

/// Whether two figures are the same but for so many millionths, or for one cent of rounding.
fn near(ours: i128, theirs: i128, ppm: i128) -> bool {
    let apart = (ours - theirs).abs();
    apart.saturating_mul(1_000_000) <= ppm.saturating_mul(ours.abs().max(theirs.abs()))
        || apart <= 5_000_000
}

fn cause(
    book: &Book,
    usage: &Usage,
    month: Month,
    index: usize,
    ours: (i128, Nanos),
    theirs: &BillLine,
    ppm: i128,
) -> Result<Cause, RateError> {
    let explains = |(quantity, cost): (i128, Nanos)| {
        near(cost.0, theirs.cost.0, ppm)
            && theirs
                .quantity
                .is_none_or(|theirs| near(quantity, theirs, ppm))
    };
    if explains(ours) {
        let same = ours.1 == theirs.cost;
        return Ok(if same { Cause::Agree } else { Cause::Rounding });
    }
    let id = book.skus[index].id.to_string();
    for (cause, book, usage) in variants(book, usage, index) {
        // A variant that cannot be rated explains nothing.
        if let Ok(bill) = rate(&book, &usage, month)
            && explains(sums(&bill).get(&id).copied().unwrap_or_default())
        {
            return Ok(cause);
        }
    }
    if theirs
        .quantity
        .is_some_and(|theirs| near(ours.0, theirs, ppm))
    {
        return Ok(Cause::Price);
    }
    Ok(Cause::Unexplained)
}

/// The book and the usage as they would be if a cause were true.
fn variants(book: &Book, usage: &Usage, index: usize) -> Vec<(Cause, Book, Usage)> {
    let sku = &book.skus[index];
    let id = sku.id.clone();
    let mut variants: Vec<(Cause, Book, Usage)> = Vec::new();
    // Every version of the price at once.
    let changed = |change: &dyn Fn(&mut super::book::Sku)| {
        let mut book = book.clone();
        book.skus
            .iter_mut()
            .filter(|sku| sku.id == id)
            .for_each(change);
        book
    };
    if let Basis::Bytes { unit } = sku.basis {
        for bytes in [1_000_000_000, 1 << 30] {
            let other = NonZeroU64::new(bytes).filter(|other| *other != unit);
            if let Some(other) = other {
                let book = changed(&|sku| sku.basis = Basis::Bytes { unit: other });
                variants.push((Cause::UnitSize(bytes), book, usage.clone()));
            }
        }
    }
    for (word, direction) in [
        ("tx", SkuDirection::Only(Way::Tx)),
        ("rx", SkuDirection::Only(Way::Rx)),
        ("both", SkuDirection::Both),
        ("max_in_out", SkuDirection::MaxInOut),
    ] {
        if direction != sku.direction {
            let mut book = changed(&|sku| sku.direction = direction);
            // Whatever priced the other direction must not take the bytes away.
            book.skus
                .retain(|other| other.id == id || other.leg != sku.leg || other.class != sku.class);
            variants.push((Cause::Direction(word), book, usage.clone()));
        }
    }
    if sku.free_units > 0 {
        let book = changed(&|sku| sku.free_units = 0);
        variants.push((Cause::FreeUnits, book, usage.clone()));
    }
    if sku.tiers.len() > 1 {
        let book = changed(&|sku| {
            sku.tier_mode = match sku.tier_mode {
                TierMode::Graduated => TierMode::WholeVolume,
                TierMode::WholeVolume => TierMode::Graduated,
            };
        });
        variants.push((Cause::TierMode, book, usage.clone()));
    }
    for name in ["UTC", "America/Los_Angeles", "Asia/Shanghai"] {
        if name != book.zone.name()
            && let Some(zone) = Zone::new(name)
        {
            let mut book = book.clone();
            book.zone = zone;
            variants.push((Cause::Timezone(name), book, usage.clone()));
        }
    }
    // Classes are ours, and the provider may not know them.
    let mut classes: Vec<String> = usage
        .rows
        .iter()
        .map(|row| row.account.class.clone())
        .collect();
    classes.sort();
    classes.dedup();
    for class in classes {
        let own = sku.class.as_ref().map_or("", |class| class.as_str());
        if class == own {
            continue;
        }
        let mut merged = usage.clone();
        for row in &mut merged.rows {
            if row.account.class == class {
                row.account.class = own.to_owned();
            }
        }
        variants.push((Cause::MissingClass(class), book.clone(), merged));
    }
    let mut taken = usage.clone();
    for row in &mut taken.rows {
        if row.account.side == Side::None {
            row.account.side = sku.leg;
            row.account.class = sku
                .class
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
        }
    }
    variants.push((Cause::Unattributed, book.clone(), taken));
    let mut without = usage.clone();
    without
        .rows
        .retain(|row| row.account.kind != Kind::Overhead);
    variants.push((Cause::Overhead, book.clone(), without));
    for adder in &sku.adders {
        let name = adder.id.clone();
        let book = changed(&|sku| sku.adders.retain(|adder| adder.id != name));
        variants.push((Cause::Adder(adder.id.to_string()), book, usage.clone()));
    }
    if sku.fixed_per_day.is_some() {
        let book = changed(&|sku| sku.fixed_per_day = None);
        variants.push((Cause::Fixed, book, usage.clone()));
    }
    variants
}

/// For people.
#[must_use]
pub fn table(findings: &[Finding], currency: &str) -> String {
    let mut out = format!(
        "{:<24} {:>18} {:>18} {:>16} {:>16} {:>16}  cause\n",
        "sku",
        "our quantity",
        "their quantity",
        format!("ours {currency}"),
        format!("theirs {currency}"),
        "difference"
    );
    for finding in findings {
        let quantity = |value: Option<i128>| value.map_or("-".into(), |v| Nanos(v).to_string());
        let money = |value: Option<Nanos>| value.map_or("-".into(), |v| v.to_string());
        let ours = finding.ours;
        let theirs = finding.theirs.as_ref();
        let difference =
            Nanos(ours.map_or(0, |ours| ours.1.0) - theirs.map_or(0, |theirs| theirs.cost.0));
        let _ = writeln!(
            out,
            "{:<24} {:>18} {:>18} {:>16} {:>16} {:>16}  {}",
            finding.sku,
            quantity(ours.map(|ours| ours.0)),
            quantity(theirs.and_then(|theirs| theirs.quantity)),
            money(ours.map(|ours| ours.1)),
            money(theirs.map(|theirs| theirs.cost)),
            difference.to_string(),
            finding.cause.text()
        );
    }
    out
}
