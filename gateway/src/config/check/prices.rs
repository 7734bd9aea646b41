//! `[prices]`: a price book of its own file, or the shorthand.

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use super::{Checker, Seen};
use crate::config::book::shorthand_book;
use crate::config::problem::ConfigError;
use crate::config::raw::{RawPrices, Text};
use crate::config::{Direction, Leg, Price, Prices};
use crate::cost::book::Book;
use crate::cost::exact::is_finite;
use crate::money::{Currency, Rate, UnitPrice};

impl Checker<'_> {
    pub(super) fn prices(&mut self, at: Range<usize>, raw: &RawPrices) -> Option<Prices> {
        if let Some(book) = &raw.book {
            return self.price_book(raw, book);
        }
        let Some(currency) = &raw.currency else {
            let fix = "add `currency = \"USD\"` with [[prices.rates]], or `book = \"prices.toml\"`";
            self.report(at, "prices.currency", "is missing, and so is `book`", fix);
            return None;
        };
        let currency = self.parsed::<Currency>(currency, "prices.currency");
        let mut ids = Seen::default();
        let mut covered: Seen<(Leg, Direction)> = Seen::default();
        let mut rates = Vec::new();
        for (index, raw) in raw.rates.iter().enumerate() {
            let here = format!("prices.rates[{index}]");
            let at = raw.span();
            let raw = raw.get_ref();
            let id = self.unique_name(&mut ids, &raw.id, &format!("{here}.id"));
            let leg = self.choice(
                &raw.leg,
                &format!("{here}.leg"),
                &[("client", Leg::Client), ("upstream", Leg::Upstream)],
            );
            let direction = self.choice(
                &raw.direction,
                &format!("{here}.direction"),
                &[("tx", Direction::Tx), ("rx", Direction::Rx)],
            );
            let price = self.parsed::<UnitPrice>(&raw.price, &format!("{here}.price"));
            let unit = format!("{here}.unit_bytes");
            let unit = self
                .number::<u64>(Some(&raw.unit_bytes), &unit, 1..=i64::MAX, 1)
                .and_then(NonZeroU64::new);
            if unit.is_some_and(|unit| !is_finite(unit.get())) {
                let wrong = "has other prime factors than 2 and 5: a quantity would have no \
                             exact decimal";
                let field = format!("{here}.unit_bytes");
                let fix = "write such as 1000000000 or 1073741824";
                self.report(raw.unit_bytes.span(), field, wrong, fix);
            }
            if let (Some(leg), Some(direction)) = (leg, direction)
                && let Some(first) = covered.insert((leg, direction), here.clone())
            {
                let wrong = format!(
                    "overlaps {first}: both price `{}` `{}`",
                    raw.leg.get_ref(),
                    raw.direction.get_ref()
                );
                let fix = "keep one rate for each leg and direction";
                self.report(at, &here, wrong, fix);
            }
            rates.push((|| {
                Some(Price {
                    id: id?,
                    leg: leg?,
                    direction: direction?,
                    rate: Rate {
                        price: price?,
                        unit_bytes: unit?,
                    },
                })
            })());
        }
        let (currency, rates) = (currency?, rates.into_iter().collect::<Option<Vec<_>>>()?);
        Some(Prices {
            currency,
            book: Arc::new(shorthand_book(currency, &rates)),
            rates,
        })
    }

    /// A price book of its own file; its problems are this file's too.
    fn price_book(&mut self, raw: &RawPrices, written: &Text) -> Option<Prices> {
        if let Some(currency) = &raw.currency {
            let fix = "delete it: the book says its currency";
            self.report(
                currency.span(),
                "prices.currency",
                "stands beside `book`",
                fix,
            );
        }
        if let Some(rate) = raw.rates.first() {
            let fix = "keep `book` or [[prices.rates]]";
            self.report(rate.span(), "prices.rates", "stands beside `book`", fix);
        }
        let path = self.path(written, "prices.book")?;
        match Book::load(&path) {
            Ok(book) => Some(Prices::of(book)),
            Err(ConfigError::Invalid(problems)) => {
                self.problems.extend(problems);
                None
            }
            Err(ConfigError::Read { path, source }) => {
                let wrong = format!("\"{}\" cannot be read: {source}", path.display());
                let fix = "name a readable price book; relative paths start at the configuration \
                           file's folder";
                self.report(written.span(), "prices.book", wrong, fix);
                None
            }
        }
    }
}
