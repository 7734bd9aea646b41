//! One SKU: which bytes it prices, and what they cost.

use std::ops::Range;

use toml::Spanned;

use super::raw::RawSku;
use crate::config::check::{Checker, Seen};
use crate::config::raw::Text;
use crate::cost::book::{Adder, Fx, Sku, SkuDirection, Tier, TierMode};
use crate::cost::usage::{Side, Way};
use crate::money::{Currency, UnitPrice};

impl Checker<'_> {
    pub(super) fn skus(
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
}
