//! A price book's text to a [`Book`]: the same parser, the same kind of complaint as the
//! configuration. Nothing about money is assumed: what would change a bill must be written.

mod basis;
mod raw;
mod shorthand;
mod sku;

use std::path::Path;

use sha2::{Digest as _, Sha256};
use toml::Spanned;

use super::check::{Checker, Seen};
use super::problem::{ConfigError, Source};
use super::raw::Text;
use super::shape;
use crate::cost::book::{BillingAccount, Book, Compute, Dates, Fx};
use crate::cost::calendar::{Date, Zone};
use crate::cost::usage::hex;
use crate::money::{Currency, UnitPrice};
use raw::{RawAccount, RawBook, RawCompute, RawFx};

pub(super) use shorthand::{first_rate, shorthand_book};

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
