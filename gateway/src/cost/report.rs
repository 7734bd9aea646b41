//! A bill by route, service, tenant, class, day: as a table, as CSV, as JSON.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::json;

use super::{
    bill::{Bill, Charge, Part},
    book::Book,
    focus::{quality, resource},
};
use crate::money::{Nanos, Overflow};

/// What rows may be grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Field {
    /// Route, or why there is none.
    Route,
    /// Service.
    Service,
    /// Tenant.
    Tenant,
    /// Address class of the far end.
    Class,
    /// Day of the book's zone.
    Day,
    /// Price.
    Sku,
    /// Tier, allowance, surcharge, fee.
    Part,
    /// Side of the gateway.
    Leg,
    /// Received or sent.
    Direction,
    /// Network interface.
    Interface,
    /// Listener or upstream.
    Endpoint,
    /// Why the bytes are on the bill.
    Kind,
    /// Exact or estimated.
    Quality,
}

impl Field {
    /// Its name in a header.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Service => "service",
            Self::Tenant => "tenant",
            Self::Class => "class",
            Self::Day => "day",
            Self::Sku => "sku",
            Self::Part => "part",
            Self::Leg => "leg",
            Self::Direction => "direction",
            Self::Interface => "interface",
            Self::Endpoint => "endpoint",
            Self::Kind => "kind",
            Self::Quality => "quality",
        }
    }

    fn of(self, book: &Book, charge: &Charge) -> String {
        let account = &charge.account;
        let or = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text.to_owned()
            }
        };
        match self {
            Self::Route => resource(account),
            Self::Service => or(&account.service),
            Self::Tenant => or(&account.tenant),
            Self::Class => or(&account.class),
            Self::Day => book.zone.date(charge.period.start).to_string(),
            Self::Sku => or(&charge.sku),
            Self::Part => charge.part.word(),
            Self::Leg => account.side.word().into(),
            Self::Direction => account.way.word().into(),
            Self::Interface => or(&account.interface),
            Self::Endpoint => or(&account.endpoint),
            Self::Kind => account.kind.word(),
            Self::Quality => quality(charge).into(),
        }
    }
}

/// Rows with the same group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Each byte once.
    pub wire_bytes: i128,
    /// Money.
    pub cost: Nanos,
    /// Whether something in it is an estimate.
    pub estimated: bool,
}

/// A bill, grouped.
pub struct Report<'a> {
    book: &'a Book,
    fields: &'a [Field],
    lines: BTreeMap<Vec<String>, Sum>,
    total: Sum,
    attributed: i128,
    unattributed: i128,
    unpriced: i128,
    interfaces: i128,
    bills: &'a [Bill],
}

impl<'a> Report<'a> {
    /// Groups the charges of some bills. `imbalance` is by how much the interfaces moved more than
    /// the rows they were made from.
    ///
    /// # Errors
    /// A sum of money does not fit.
    pub fn new(
        book: &'a Book,
        bills: &'a [Bill],
        imbalance: i128,
        fields: &'a [Field],
        select: impl Fn(&Charge) -> bool,
    ) -> Result<Self, Overflow> {
        let mut report = Self {
            book,
            fields,
            lines: BTreeMap::new(),
            total: Sum::default(),
            attributed: 0,
            unattributed: 0,
            unpriced: 0,
            interfaces: imbalance,
            bills,
        };
        for charge in bills.iter().flat_map(|bill| &bill.charges) {
            if !select(charge) {
                continue;
            }
            let key = fields.iter().map(|field| field.of(book, charge)).collect();
            for sum in [report.lines.entry(key).or_default(), &mut report.total] {
                sum.wire_bytes += charge.wire_bytes;
                sum.cost = sum.cost.checked_add(charge.cost())?;
                sum.estimated |= charge.estimated;
            }
            if charge.account.kind.is_attributed() {
                report.attributed += charge.wire_bytes;
            } else {
                report.unattributed += charge.wire_bytes;
            }
            if charge.part == Part::Unpriced {
                report.unpriced += charge.wire_bytes;
            }
        }
        report.interfaces += report.total.wire_bytes;
        Ok(report)
    }

    /// The groups, in order.
    #[must_use]
    pub fn lines(&self) -> &BTreeMap<Vec<String>, Sum> {
        &self.lines
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut widths: Vec<usize> = self.fields.iter().map(|field| field.word().len()).collect();
        for key in self.lines.keys() {
            for (width, text) in widths.iter_mut().zip(key) {
                *width = (*width).max(text.chars().count() + 2);
            }
        }
        let mut out = String::new();
        let currency = self.book.currency;
        for (field, width) in self.fields.iter().zip(&widths) {
            let _ = write!(out, "{:<width$} ", field.word());
        }
        let _ = writeln!(out, "{:>16} {:>18}", "wire B", format!("cost {currency}"));
        for (key, sum) in &self.lines {
            for (index, (text, width)) in key.iter().zip(&widths).enumerate() {
                let mark = if index == 0 && sum.estimated {
                    " ~"
                } else {
                    ""
                };
                let _ = write!(out, "{:<width$} ", format!("{text}{mark}"));
            }
            let _ = writeln!(out, "{:>16} {:>18}", sum.wire_bytes, sum.cost);
        }
        let _ = writeln!(
            out,
            "total {} B, {} {currency}; ~ marks what an estimate is part of",
            self.total.wire_bytes, self.total.cost
        );
        let _ = writeln!(
            out,
            "conservation: attributed {} B + unattributed {} B = {} B; interfaces moved {} B; \
             difference {} B",
            self.attributed,
            self.unattributed,
            self.total.wire_bytes,
            self.interfaces,
            self.total.wire_bytes - self.interfaces
        );
        if self.unpriced != 0 {
            let _ = writeln!(out, "no price in the book for {} B", self.unpriced);
        }
        let _ = writeln!(
            out,
            "price book {} ({}), sha256 {}",
            self.book.file,
            self.book.zone.name(),
            self.book.hash
        );
        for bill in self.bills {
            let _ = writeln!(
                out,
                "usage of {}, sha256 {}",
                bill.month, bill.provenance.usage
            );
        }
        out
    }

    /// For spreadsheets.
    ///
    /// # Errors
    /// Writing fails.
    pub fn csv(&self) -> Result<String, csv::Error> {
        let mut writer = csv::WriterBuilder::new()
            .terminator(csv::Terminator::Any(b'\n'))
            .from_writer(Vec::new());
        let mut header: Vec<&str> = self.fields.iter().map(|field| field.word()).collect();
        header.extend(["wire_bytes", "cost", "currency", "quality"]);
        writer.write_record(&header)?;
        for (key, sum) in &self.lines {
            let mut row = key.clone();
            row.extend([
                sum.wire_bytes.to_string(),
                sum.cost.to_string(),
                self.book.currency.to_string(),
                estimated(*sum).into(),
            ]);
            writer.write_record(&row)?;
        }
        let bytes = writer
            .into_inner()
            .map_err(|error| csv::Error::from(std::io::Error::other(error.to_string())))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// For programs; numbers are text, because other readers round beyond 2^53.
    #[must_use]
    pub fn json(&self) -> String {
        let rows: Vec<serde_json::Value> = self
            .lines
            .iter()
            .map(|(key, sum)| {
                let mut row = serde_json::Map::new();
                for (field, text) in self.fields.iter().zip(key) {
                    row.insert(field.word().into(), json!(text));
                }
                row.insert("wire_bytes".into(), json!(sum.wire_bytes.to_string()));
                row.insert("cost".into(), json!(sum.cost.to_string()));
                row.insert("quality".into(), json!(estimated(*sum)));
                serde_json::Value::Object(row)
            })
            .collect();
        let report = json!({
            "currency": self.book.currency.to_string(),
            "timezone": self.book.zone.name(),
            "rows": rows,
            "total": {
                "wire_bytes": self.total.wire_bytes.to_string(),
                "cost": self.total.cost.to_string(),
                "attributed_bytes": self.attributed.to_string(),
                "unattributed_bytes": self.unattributed.to_string(),
                "unpriced_bytes": self.unpriced.to_string(),
                "interface_bytes": self.interfaces.to_string(),
            },
            "provenance": self.bills.iter().map(|bill| json!({
                "month": bill.month.to_string(),
                "price_book_sha256": bill.provenance.book,
                "classes_sha256": bill.provenance.classes,
                "usage_sha256": bill.provenance.usage,
            })).collect::<Vec<_>>(),
        });
        format!("{report:#}\n")
    }
}

fn estimated(sum: Sum) -> &'static str {
    if sum.estimated { "estimated" } else { "exact" }
}
