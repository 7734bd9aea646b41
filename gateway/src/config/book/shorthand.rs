//! The shorthand in `[prices]` as a book, and a book's SKUs as the shorthand's rates.

use sha2::{Digest as _, Sha256};

use crate::cost::book::{Basis, BillingAccount, Book, Dates, Sku, SkuDirection, Tier, TierMode};
use crate::cost::calendar::Zone;
use crate::cost::usage::{Side, Way, hex};
use crate::money::Currency;

/// A rate of the shorthand in `[prices]` as the SKU it stands for.
fn shorthand(price: &crate::config::Price) -> Sku {
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
pub(in crate::config) fn shorthand_book(
    currency: Currency,
    rates: &[crate::config::Price],
) -> Book {
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
        file: crate::config::SHORTHAND.into(),
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
pub(in crate::config) fn first_rate(sku: &Sku, way: Way) -> Option<crate::config::Price> {
    let Basis::Bytes { unit } = &sku.basis else {
        return None;
    };
    let leg = match sku.leg {
        Side::Client => crate::config::Leg::Client,
        Side::Upstream => crate::config::Leg::Upstream,
        Side::None => return None,
    };
    if sku.fx.is_some() || sku.class.is_some() || sku.direction == SkuDirection::MaxInOut {
        return None;
    }
    let price = sku.tiers.iter().find(|tier| tier.price.nanos() > 0)?.price;
    let direction = match way {
        Way::Rx => crate::config::Direction::Rx,
        Way::Tx => crate::config::Direction::Tx,
    };
    sku.direction.covers(way).then(|| crate::config::Price {
        id: sku.id.clone(),
        leg,
        direction,
        rate: crate::money::Rate {
            price,
            unit_bytes: *unit,
        },
    })
}
