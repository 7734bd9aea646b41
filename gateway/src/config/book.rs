//! A price book's text to a [`Book`]: the same parser, the same kind of complaint as the
//! configuration. Nothing about money is assumed: what would change a bill must be written.

use std::num::NonZeroU64;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use toml::Spanned;

use super::check::{Checker, Seen};
use super::problem::{ConfigError, Source};
use super::raw::{Number, Text};
use super::shape;
use crate::cost::book::{
    Adder, Basis, BillingAccount, Book, Commit, Compute, Dates, Fx, Method, Sampling, Sku,
    SkuDirection, Tier, TierMode,
};
use crate::cost::calendar::{Date, Zone};
use crate::cost::exact::is_finite;
use crate::cost::usage::{Side, Way, hex};
use crate::money::{Currency, UnitPrice};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawBook {
    currency: Text,
    timezone: Option<Text>,
    account: Option<RawAccount>,
    #[serde(default)]
    fx: Vec<RawFx>,
    #[serde(default)]
    skus: Vec<Spanned<RawSku>>,
    #[serde(default)]
    compute: Vec<RawCompute>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawAccount {
    id: String,
    name: Option<String>,
    provider: Option<String>,
    region: Option<Text>,
    region_name: Option<Text>,
    availability_zone: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawFx {
    from: Text,
    to: Text,
    rate: Text,
    as_of: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawSku {
    id: Text,
    description: Option<String>,
    source: Option<String>,
    #[serde(default)]
    bill_names: Vec<String>,
    currency: Option<Text>,
    leg: Text,
    direction: Text,
    class: Option<Text>,
    #[serde(default)]
    interfaces: Vec<String>,
    basis: Option<Text>,
    unit_bytes: Option<Number>,
    tier_mode: Option<Text>,
    pool: Option<Text>,
    free_units: Option<Number>,
    price: Option<Text>,
    tiers: Option<Spanned<Vec<Spanned<RawTier>>>>,
    #[serde(default)]
    adders: Vec<RawAdder>,
    fixed_per_day: Option<Text>,
    sample_s: Option<Number>,
    mbps_decimals: Option<Number>,
    method: Option<Spanned<RawMethod>>,
    commit: Option<RawCommit>,
    prorate: Option<Text>,
    from: Option<Text>,
    until: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawTier {
    to: Option<Number>,
    price: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawAdder {
    id: Text,
    price: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawMethod {
    day_rank: Option<Number>,
    month_mean_top: Option<Number>,
    drop_top_pct: Option<Number>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawCommit {
    cap_mbps: Number,
    floor_pct: Number,
    from: Option<Text>,
    until: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawCompute {
    id: Text,
    source: Option<String>,
    core_hour: Text,
    gib_hour: Option<Text>,
}

impl Book {
    /// Reads and checks a price book file.
    ///
    /// # Errors
    /// The file cannot be read, or every problem found in it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks a text as if it had been read from `file_name`.
    ///
    /// # Errors
    /// Every problem found.
    pub fn parse(text: &str, file_name: &Path) -> Result<Self, ConfigError> {
        let source = Source::new(file_name, text);
        let raw: RawBook = shape::read(&source)?;
        let mut checker = Checker::new(&source, Path::new(""));
        let book = checker.book(&raw);
        let mut book = checker.finish(book)?;
        book.file = file_name.display().to_string();
        book.hash = hex(&Sha256::digest(text));
        Ok(book)
    }
}

impl Checker<'_> {
    fn book(&mut self, raw: &RawBook) -> Option<Book> {
        let currency = self.parsed::<Currency>(&raw.currency, "currency");
        let zone = match &raw.timezone {
            None => Some(Zone::utc()),
            Some(text) => {
                let zone = Zone::new(text.get_ref());
                if zone.is_none() {
                    let wrong = format!("\"{}\" is no IANA time zone", text.get_ref());
                    let fix = "write such as \"Asia/Shanghai\" or \"UTC\"";
                    self.report(text.span(), "timezone", wrong, fix);
                }
                zone
            }
        };
        let account = self.billing_account(raw.account.as_ref());
        let fx = self.fx(&raw.fx, currency);
        let skus = self.skus(&raw.skus, currency, fx.as_deref());
        let compute = self.compute(&raw.compute);
        Some(Book {
            file: String::new(),
            hash: String::new(),
            account: account?,
            currency: currency?,
            zone: zone?,
            skus: skus?,
            compute: compute?,
        })
    }

    fn billing_account(&mut self, raw: Option<&RawAccount>) -> Option<BillingAccount> {
        let Some(raw) = raw else {
            return Some(BillingAccount::default());
        };
        let region = match (&raw.region, &raw.region_name) {
            (None, None) => None,
            (Some(id), Some(name)) => Some((id.get_ref().clone(), name.get_ref().clone())),
            (Some(only), None) | (None, Some(only)) => {
                let wrong = "a region has an id and a name, and only one of them is written";
                let fix = "write both `region` and `region_name`, or neither";
                self.report(only.span(), "account.region", wrong, fix);
                return None;
            }
        };
        Some(BillingAccount {
            id: raw.id.clone(),
            name: raw.name.clone().unwrap_or_else(|| raw.id.clone()),
            provider: raw
                .provider
                .clone()
                .unwrap_or_else(|| BillingAccount::default().provider),
            region,
            availability_zone: raw.availability_zone.clone(),
        })
    }

    fn fx(&mut self, raws: &[RawFx], book: Option<Currency>) -> Option<Vec<Fx>> {
        let mut all: Vec<Option<Fx>> = Vec::new();
        let mut seen: Seen<String> = Seen::default();
        for (index, raw) in raws.iter().enumerate() {
            let here = format!("fx[{index}]");
            let from = self.parsed::<Currency>(&raw.from, &format!("{here}.from"));
            let to = self.parsed::<Currency>(&raw.to, &format!("{here}.to"));
            let rate = self.parsed::<UnitPrice>(&raw.rate, &format!("{here}.rate"));
            let as_of = self.date(&raw.as_of, &format!("{here}.as_of"));
            let field = format!("{here}.from");
            let once = self.unique(
                &mut seen,
                raw.from.get_ref().clone(),
                raw.from.span(),
                &field,
                "keep one rate for each currency",
            );
            if let (Some(to), Some(book)) = (to, book)
                && to != book
            {
                let wrong = format!("converts to {to}, and the book is in {book}");
                let fix = format!("write \"{book}\"");
                self.report(raw.to.span(), format!("{here}.to"), wrong, fix);
            }
            all.push((|| {
                once?;
                Some(Fx {
                    from: from?,
                    rate: rate?,
                    as_of: as_of?,
                })
            })());
        }
        all.into_iter().collect()
    }

    fn compute(&mut self, raws: &[RawCompute]) -> Option<Vec<Compute>> {
        let mut ids = Seen::default();
        let mut all = Vec::new();
        for (index, raw) in raws.iter().enumerate() {
            let here = format!("compute[{index}]");
            let id = self.unique_name(&mut ids, &raw.id, &format!("{here}.id"));
            let core = self.parsed(&raw.core_hour, &format!("{here}.core_hour"));
            let gib = match &raw.gib_hour {
                None => Some(None),
                Some(text) => self.parsed(text, &format!("{here}.gib_hour")).map(Some),
            };
            all.push((|| {
                Some(Compute {
                    id: id?,
                    source: raw.source.clone().unwrap_or_default(),
                    core_hour: core?,
                    gib_hour: gib?,
                })
            })());
        }
        all.into_iter().collect()
    }

    fn skus(
        &mut self,
        raws: &[Spanned<RawSku>],
        book: Option<Currency>,
        fx: Option<&[Fx]>,
    ) -> Option<Vec<Sku>> {
        let mut skus: Vec<Option<Sku>> = Vec::new();
        for (index, raw) in raws.iter().enumerate() {
            let here = format!("skus[{index}]");
            let sku = self.sku(raw.span(), raw.get_ref(), &here, book, fx);
            if let Some(sku) = &sku {
                for (earlier, other) in skus.iter().enumerate() {
                    if let Some(other) = other {
                        self.no_overlap(raw, sku, &here, other, earlier);
                    }
                }
            }
            skus.push(sku);
        }
        skus.into_iter().collect()
    }

    /// No byte may find two prices.
    fn no_overlap(
        &mut self,
        raw: &Spanned<RawSku>,
        sku: &Sku,
        here: &str,
        other: &Sku,
        earlier: usize,
    ) {
        let interfaces = match (sku.interfaces.is_empty(), other.interfaces.is_empty()) {
            (true, true) => true,
            (false, false) => sku.interfaces.iter().any(|i| other.interfaces.contains(i)),
            // One names interfaces, the other takes the rest.
            _ => false,
        };
        let meet = sku.leg == other.leg
            && sku.direction.meets(other.direction)
            && sku.class == other.class
            && interfaces
            && sku.effective.meets(&other.effective);
        if meet {
            let wrong = format!(
                "overlaps skus[{earlier}] (`{}`): the same bytes of the {} leg would be billed twice",
                other.id,
                sku.leg.word()
            );
            let fix = "give them different `class`, `direction`, `interfaces` or \
                       `from`/`until`, or make one an adder of the other";
            self.report(raw.span(), here, wrong, fix);
        }
        let same_pool = std::mem::discriminant(&sku.basis) == std::mem::discriminant(&other.basis);
        if sku.id == other.id && !same_pool {
            let wrong = format!("skus[{earlier}] has the same id and another basis");
            let fix = "versions of one price keep its basis; give this one another id";
            self.report(raw.get_ref().id.span(), format!("{here}.id"), wrong, fix);
        }
    }

    fn sku(
        &mut self,
        at: Range<usize>,
        raw: &RawSku,
        here: &str,
        book: Option<Currency>,
        fx: Option<&[Fx]>,
    ) -> Option<Sku> {
        let field = |name: &str| format!("{here}.{name}");
        let id = self.name(raw.id.get_ref(), raw.id.span(), &field("id"));
        let leg = self.choice(
            &raw.leg,
            &field("leg"),
            &[
                ("client", Side::Client),
                ("upstream", Side::Upstream),
                ("none", Side::None),
            ],
        );
        let direction = self.choice(
            &raw.direction,
            &field("direction"),
            &[
                ("tx", SkuDirection::Only(Way::Tx)),
                ("rx", SkuDirection::Only(Way::Rx)),
                ("both", SkuDirection::Both),
                ("max_in_out", SkuDirection::MaxInOut),
            ],
        );
        let class = match &raw.class {
            None => Some(None),
            Some(text) => self
                .name(text.get_ref(), text.span(), &field("class"))
                .map(Some),
        };
        let tier_mode = match &raw.tier_mode {
            None => Some(TierMode::Graduated),
            Some(text) => self.choice(
                text,
                &field("tier_mode"),
                &[
                    ("graduated", TierMode::Graduated),
                    ("whole_volume", TierMode::WholeVolume),
                ],
            ),
        };
        if let Some(pool) = &raw.pool {
            self.choice(pool, &field("pool"), &[("account-month", ())])?;
        }
        let basis = self.basis(at.clone(), raw, here);
        let tiers = self.tiers(at, raw, here);
        let free = raw.free_units.as_ref();
        let free_units = self.number::<u64>(free, &field("free_units"), 0..=i64::MAX, 0);
        let mut ids = Seen::default();
        let mut adders = Vec::new();
        for (index, adder) in raw.adders.iter().enumerate() {
            let here = format!("{here}.adders[{index}]");
            let id = self.unique_name(&mut ids, &adder.id, &format!("{here}.id"));
            let price = self.parsed::<UnitPrice>(&adder.price, &format!("{here}.price"));
            adders.push(id.zip(price).map(|(id, price)| Adder { id, price }));
        }
        let fixed_per_day = match &raw.fixed_per_day {
            None => Some(None),
            Some(text) => self.parsed(text, &field("fixed_per_day")).map(Some),
        };
        let fx = self.sku_fx(raw.currency.as_ref(), &field("currency"), book, fx);
        let effective = self.dates(raw.from.as_ref(), raw.until.as_ref(), here);
        Some(Sku {
            id: id?,
            description: raw.description.clone().unwrap_or_default(),
            source: raw.source.clone().unwrap_or_default(),
            bill_names: raw.bill_names.clone(),
            leg: leg?,
            direction: direction?,
            class: class?,
            interfaces: raw.interfaces.clone(),
            basis: basis?,
            tier_mode: tier_mode?,
            free_units: free_units?,
            tiers: tiers?,
            adders: adders.into_iter().collect::<Option<_>>()?,
            fixed_per_day: fixed_per_day?,
            fx: fx?,
            effective: effective?,
        })
    }

    fn basis(&mut self, at: Range<usize>, raw: &RawSku, here: &str) -> Option<Basis> {
        #[derive(Clone, Copy, PartialEq)]
        enum Word {
            Bytes,
            Peak,
            Percentile,
        }
        let field = |name: &str| format!("{here}.{name}");
        let word = match &raw.basis {
            None => Word::Bytes,
            Some(text) => self.choice(
                text,
                &field("basis"),
                &[
                    ("bytes", Word::Bytes),
                    ("peak_mbps_day", Word::Peak),
                    ("p95", Word::Percentile),
                ],
            )?,
        };
        let sampled = word != Word::Bytes;
        let only = [
            (
                "sample_s",
                raw.sample_s.as_ref().map(Spanned::span),
                sampled,
            ),
            (
                "mbps_decimals",
                raw.mbps_decimals.as_ref().map(Spanned::span),
                sampled,
            ),
            (
                "unit_bytes",
                raw.unit_bytes.as_ref().map(Spanned::span),
                !sampled,
            ),
            (
                "method",
                raw.method.as_ref().map(Spanned::span),
                word == Word::Percentile,
            ),
            (
                "prorate",
                raw.prorate.as_ref().map(Spanned::span),
                word == Word::Percentile,
            ),
            (
                "commit",
                raw.commit.as_ref().map(|commit| commit.cap_mbps.span()),
                word == Word::Percentile,
            ),
        ];
        let mut fits = Some(());
        for (name, written, belongs) in only {
            if let Some(span) = written
                && !belongs
            {
                let wrong = "has no meaning with this basis";
                self.report(span, field(name), wrong, "delete it, or change `basis`");
                fits = None;
            }
        }
        fits?;
        if word == Word::Bytes {
            let Some(unit) = &raw.unit_bytes else {
                let wrong = "is missing, and 1 GiB is 7.37 % more than 1 GB";
                let fix = "add `unit_bytes = 1073741824` or `unit_bytes = 1000000000`, as the \
                           provider bills";
                self.report(at, field("unit_bytes"), wrong, fix);
                return None;
            };
            let range = 1..=1_i64 << 60;
            let bytes = self.number::<u64>(Some(unit), &field("unit_bytes"), range, 1)?;
            if !is_finite(bytes) {
                let wrong = format!(
                    "{bytes} has other prime factors than 2 and 5: a quantity \
                                     would have no exact decimal"
                );
                let fix = "write such as 1000000000 or 1073741824";
                self.report(unit.span(), field("unit_bytes"), wrong, fix);
                return None;
            }
            return NonZeroU64::new(bytes).map(|unit| Basis::Bytes { unit });
        }
        let sample = raw.sample_s.as_ref();
        let seconds = self.number::<i64>(sample, &field("sample_s"), 60..=3_600, 300);
        let decimals = raw.mbps_decimals.as_ref();
        let decimals = self.number::<u8>(decimals, &field("mbps_decimals"), 0..=6, 6);
        let sampling = Sampling {
            seconds: seconds?,
            decimals: decimals?,
        };
        if 3_600 % sampling.seconds != 0 || sampling.seconds % 60 != 0 {
            let span = sample.map_or(at, Spanned::span);
            let wrong = format!(
                "{} s is not whole minutes that divide an hour",
                sampling.seconds
            );
            self.report(span, field("sample_s"), wrong, "write such as 300");
            return None;
        }
        if word == Word::Peak {
            return Some(Basis::PeakMbpsDay(sampling));
        }
        let method = self.sampled_method(at, raw, here)?;
        let commit = match &raw.commit {
            None => None,
            Some(raw) => {
                let here = field("commit");
                let cap = format!("{here}.cap_mbps");
                let cap = self.number::<u64>(Some(&raw.cap_mbps), &cap, 1..=1_000_000_000, 1);
                let floor = format!("{here}.floor_pct");
                let floor = self.number::<u64>(Some(&raw.floor_pct), &floor, 0..=100, 0);
                let effective = self.dates(raw.from.as_ref(), raw.until.as_ref(), &here);
                Some(Commit {
                    cap_mbps: cap?,
                    floor_pct: floor?,
                    effective: effective?,
                })
            }
        };
        let valid_days = match &raw.prorate {
            None => false,
            Some(text) => self.choice(
                text,
                &field("prorate"),
                &[("valid_days", true), ("none", false)],
            )?,
        };
        Some(Basis::Percentile {
            sampling,
            method,
            commit,
            valid_days,
        })
    }

    fn sampled_method(&mut self, at: Range<usize>, raw: &RawSku, here: &str) -> Option<Method> {
        let here = format!("{here}.method");
        let Some(method) = &raw.method else {
            let wrong = "is missing: providers count differently";
            let fix = "add `method = { drop_top_pct = 5 }` or \
                       `method = { day_rank = 5, month_mean_top = 5 }`";
            self.report(at, here, wrong, fix);
            return None;
        };
        let raw = method.get_ref();
        match (&raw.day_rank, &raw.month_mean_top, &raw.drop_top_pct) {
            (Some(rank), Some(top), None) => {
                let rank = self.number(Some(rank), &format!("{here}.day_rank"), 1..=60, 1);
                let top = self.number(Some(top), &format!("{here}.month_mean_top"), 1..=31, 1);
                Some(Method::DayRank {
                    day_rank: rank?,
                    month_mean_top: top?,
                })
            }
            (None, None, Some(percent)) => {
                let field = format!("{here}.drop_top_pct");
                let percent = self.number(Some(percent), &field, 0..=99, 5)?;
                Some(Method::DropTop { percent })
            }
            _ => {
                let wrong = "is neither a day's rank with a month's mean, nor a share to drop";
                let fix = "write `{ drop_top_pct = 5 }` or `{ day_rank = 5, month_mean_top = 5 }`";
                self.report(method.span(), here, wrong, fix);
                None
            }
        }
    }

    fn tiers(&mut self, at: Range<usize>, raw: &RawSku, here: &str) -> Option<Vec<Tier>> {
        let tiers = match (&raw.price, &raw.tiers) {
            (Some(price), None) => {
                let price = self.parsed(price, &format!("{here}.price"))?;
                return Some(vec![Tier { to: None, price }]);
            }
            (None, Some(tiers)) => tiers,
            (Some(price), Some(_)) => {
                let wrong = "stands beside `tiers`";
                self.report(
                    price.span(),
                    format!("{here}.price"),
                    wrong,
                    "keep one of the two",
                );
                return None;
            }
            (None, None) => {
                let wrong = "is missing, and so is `tiers`";
                self.report(at, format!("{here}.price"), wrong, "add `price = \"0.09\"`");
                return None;
            }
        };
        let mut all = Vec::new();
        let mut floor = 0;
        let count = tiers.get_ref().len();
        for (index, raw) in tiers.get_ref().iter().enumerate() {
            let field = format!("{here}.tiers[{index}]");
            let span = raw.span();
            let raw = raw.get_ref();
            let price = self.parsed::<UnitPrice>(&raw.price, &format!("{field}.price"));
            let to = match &raw.to {
                None => Some(None),
                Some(number) => {
                    let to = format!("{field}.to");
                    self.number::<u64>(Some(number), &to, 1..=i64::MAX, 1)
                        .map(Some)
                }
            };
            if let Some(to) = to {
                let last = index + 1 == count;
                if to.is_none() && !last {
                    let fix = "add `to`, or move this tier to the end";
                    self.report(span, &field, "has no end, and others follow", fix);
                } else if to.is_some_and(|to| to <= floor) {
                    let wrong = format!("does not end above the one before ({floor})");
                    self.report(span, &field, wrong, "write tiers in ascending order");
                }
                floor = to.unwrap_or(floor);
            }
            all.push(to.zip(price).map(|(to, price)| Tier { to, price }));
        }
        let all: Vec<Tier> = all.into_iter().collect::<Option<_>>()?;
        if let Some(to) = all.last().and_then(|tier| tier.to) {
            let wrong = format!("end at {to}: what comes after has no price");
            let fix = "leave `to` out of the last tier";
            self.report(tiers.span(), format!("{here}.tiers"), wrong, fix);
            return None;
        }
        if all.is_empty() {
            let fix = "add `{ price = \"0.09\" }`";
            self.report(tiers.span(), format!("{here}.tiers"), "is empty", fix);
            return None;
        }
        Some(all)
    }

    fn sku_fx(
        &mut self,
        written: Option<&Text>,
        field: &str,
        book: Option<Currency>,
        rates: Option<&[Fx]>,
    ) -> Option<Option<Fx>> {
        let Some(text) = written else {
            return Some(None);
        };
        let currency = self.parsed::<Currency>(text, field)?;
        if Some(currency) == book {
            return Some(None);
        }
        let found = rates?.iter().find(|fx| fx.from == currency);
        if found.is_none() {
            let wrong = format!("{currency} is not the book's currency, and no [[fx]] converts it");
            let fix = format!("add an [[fx]] with `from = \"{currency}\"`, or convert the price");
            self.report(text.span(), field, wrong, fix);
        }
        found.copied().map(Some)
    }

    fn dates(&mut self, from: Option<&Text>, until: Option<&Text>, here: &str) -> Option<Dates> {
        let mut date = |text: Option<&Text>, name: &str| match text {
            None => Some(None),
            Some(text) => self.date(text, &format!("{here}.{name}")).map(Some),
        };
        let dates = Dates {
            from: date(from, "from")?,
            until: date(until, "until")?,
        };
        if let (Some(first), Some(last)) = (dates.from, dates.until)
            && first >= last
        {
            let span = until.or(from).map_or(0..0, Spanned::span);
            let wrong = format!("ends on {last}, before it begins on {first}");
            let fix = "`until` is the first day no more in force; write a later one";
            self.report(span, format!("{here}.until"), wrong, fix);
            return None;
        }
        Some(dates)
    }

    fn date(&mut self, text: &Text, field: &str) -> Option<Date> {
        let date = text.get_ref().parse().ok();
        if date.is_none() {
            let wrong = format!("\"{}\" is not a day", text.get_ref());
            self.report(text.span(), field, wrong, "write such as \"2026-11-01\"");
        }
        date
    }
}

impl Default for BillingAccount {
    fn default() -> Self {
        Self {
            id: "default".into(),
            name: "default".into(),
            provider: "edgemeter".into(),
            region: None,
            availability_zone: None,
        }
    }
}

/// A rate of the shorthand in `[prices]` as the SKU it stands for.
pub(super) fn shorthand(price: &super::Price) -> Sku {
    Sku {
        id: price.id.clone(),
        description: String::new(),
        source: "configuration".into(),
        bill_names: Vec::new(),
        leg: price.leg.into(),
        direction: SkuDirection::Only(price.direction.into()),
        class: None,
        interfaces: Vec::new(),
        basis: Basis::Bytes {
            unit: price.rate.unit_bytes,
        },
        tier_mode: TierMode::Graduated,
        free_units: 0,
        tiers: vec![Tier {
            to: None,
            price: price.rate.price,
        }],
        adders: Vec::new(),
        fixed_per_day: None,
        fx: None,
        effective: Dates::default(),
    }
}

/// The shorthand's book: hashed by what it means, since it is part of another file.
pub(super) fn shorthand_book(currency: Currency, rates: &[super::Price]) -> Book {
    let skus: Vec<Sku> = rates.iter().map(shorthand).collect();
    let canonical: String = rates
        .iter()
        .map(|rate| {
            format!(
                "{} {} {:?} {} {}\n",
                rate.id,
                rate.leg.as_str(),
                rate.direction,
                rate.rate.price,
                rate.rate.unit_bytes
            )
        })
        .collect();
    Book {
        file: super::SHORTHAND.into(),
        hash: hex(&Sha256::digest(format!("{currency}\n{canonical}"))),
        account: BillingAccount::default(),
        currency,
        zone: Zone::utc(),
        skus,
        compute: Vec::new(),
    }
}

/// The book's price for bytes of one leg and direction as one rate, for views that show no tiers:
/// the first tier that costs something.
pub(super) fn first_rate(sku: &Sku, way: Way) -> Option<super::Price> {
    let Basis::Bytes { unit } = &sku.basis else {
        return None;
    };
    let leg = match sku.leg {
        Side::Client => super::Leg::Client,
        Side::Upstream => super::Leg::Upstream,
        Side::None => return None,
    };
    if sku.fx.is_some() || sku.class.is_some() || sku.direction == SkuDirection::MaxInOut {
        return None;
    }
    let price = sku.tiers.iter().find(|tier| tier.price.nanos() > 0)?.price;
    let direction = match way {
        Way::Rx => super::Direction::Rx,
        Way::Tx => super::Direction::Tx,
    };
    sku.direction.covers(way).then(|| super::Price {
        id: sku.id.clone(),
        leg,
        direction,
        rate: crate::money::Rate {
            price,
            unit_bytes: *unit,
        },
    })
}
