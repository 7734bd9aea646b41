//! A bill as FOCUS 1.4 rows (FinOps Open Cost and Usage Specification, Cost and Usage dataset).
//!
//! `ListCost` and `ContractedCost` are unit price x quantity with every digit; `BilledCost` and
//! `EffectiveCost` are the row's nanos, which add up to the rounded pool.

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::{
    bill::{Charge, Part, Provenance},
    book::{Basis, Book},
    calendar::Period,
    exact::decimal,
    usage::{Account, Kind, hex},
};

/// How a column is typed where the format has types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// A decimal with at least one place.
    Decimal,
    /// A whole number.
    Integer,
    /// An instant in UTC.
    Time,
    /// Anything else.
    Text,
}

/// All columns in the order of every file.
pub const COLUMNS: [(&str, Column); 57] = [
    ("AllocatedMethodId", Column::Text),
    ("AllocatedResourceId", Column::Text),
    ("AllocatedResourceName", Column::Text),
    ("AllocatedTags", Column::Text),
    ("AvailabilityZone", Column::Text),
    ("BilledCost", Column::Decimal),
    ("BillingAccountId", Column::Text),
    ("BillingAccountName", Column::Text),
    ("BillingCurrency", Column::Text),
    ("BillingPeriodEnd", Column::Time),
    ("BillingPeriodStart", Column::Time),
    ("ChargeCategory", Column::Text),
    ("ChargeClass", Column::Text),
    ("ChargeDescription", Column::Text),
    ("ChargeFrequency", Column::Text),
    ("ChargePeriodEnd", Column::Time),
    ("ChargePeriodStart", Column::Time),
    ("ConsumedQuantity", Column::Decimal),
    ("ConsumedUnit", Column::Text),
    ("ContractedCost", Column::Decimal),
    ("ContractedUnitPrice", Column::Decimal),
    ("EffectiveCost", Column::Decimal),
    ("HostProviderName", Column::Text),
    ("InvoiceIssuerName", Column::Text),
    ("ListCost", Column::Decimal),
    ("ListUnitPrice", Column::Decimal),
    ("PricingCategory", Column::Text),
    ("PricingQuantity", Column::Decimal),
    ("PricingUnit", Column::Text),
    ("RegionId", Column::Text),
    ("RegionName", Column::Text),
    ("ResourceId", Column::Text),
    ("ResourceName", Column::Text),
    ("ResourceType", Column::Text),
    ("ServiceCategory", Column::Text),
    ("ServiceName", Column::Text),
    ("ServiceProviderName", Column::Text),
    ("ServiceSubcategory", Column::Text),
    ("SkuId", Column::Text),
    ("SkuMeter", Column::Text),
    ("SkuPriceDetails", Column::Text),
    ("SkuPriceId", Column::Text),
    ("SubAccountId", Column::Text),
    ("SubAccountName", Column::Text),
    ("Tags", Column::Text),
    ("x_ClassHash", Column::Text),
    ("x_Direction", Column::Text),
    ("x_Endpoint", Column::Text),
    ("x_EventId", Column::Text),
    ("x_Interface", Column::Text),
    ("x_Kind", Column::Text),
    ("x_Leg", Column::Text),
    ("x_Method", Column::Text),
    ("x_PriceBookHash", Column::Text),
    ("x_Quality", Column::Text),
    ("x_UsageHash", Column::Text),
    ("x_WireBytes", Column::Integer),
];

/// One row: a value or null for each of [`COLUMNS`].
pub type Record = Vec<Option<String>>;

/// Something needs more digits than 128 bits have.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a row of {0} has a list cost beyond 128 bits")]
pub struct TooLarge(pub String);

/// The rows of a bill. `correction` marks every one as a change to a closed bill.
///
/// # Errors
/// A list cost does not fit.
pub fn records(
    book: &Book,
    month: Period,
    charges: &[Charge],
    provenance: &Provenance,
    correction: bool,
) -> Result<Vec<Record>, TooLarge> {
    let month = month.utc();
    charges
        .iter()
        .map(|charge| {
            let list = charge
                .list_cost()
                .ok_or_else(|| TooLarge(charge.sku.clone()))?;
            let row = Row {
                book,
                charge,
                month: &month,
                provenance,
                correction,
                list,
            };
            Ok(COLUMNS.iter().map(|(name, _)| row.value(name)).collect())
        })
        .collect()
}

struct Row<'a> {
    book: &'a Book,
    charge: &'a Charge,
    month: &'a (String, String),
    provenance: &'a Provenance,
    correction: bool,
    list: String,
}

impl Row<'_> {
    fn value(&self, column: &str) -> Option<String> {
        let charge = self.charge;
        let account = &charge.account;
        let billing = &self.book.account;
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        match column {
            "AllocatedMethodId" => self.is_shared().then(|| charge.method.clone()),
            "AllocatedResourceId" | "AllocatedResourceName" => {
                self.is_shared().then(|| resource(account))
            }
            "AllocatedTags" => self.is_shared().then(|| tags(account)),
            "AvailabilityZone" => billing.availability_zone.clone(),
            "BilledCost" | "EffectiveCost" => Some(decimal(charge.cost, 1_000_000_000)),
            "BillingAccountId" => Some(billing.id.clone()),
            "BillingAccountName" => Some(billing.name.clone()),
            "BillingCurrency" => Some(self.book.currency.to_string()),
            "BillingPeriodStart" => Some(self.month.0.clone()),
            "BillingPeriodEnd" => Some(self.month.1.clone()),
            "ChargeCategory" => Some("Usage".into()),
            "ChargeClass" => self.correction.then(|| "Correction".into()),
            "ChargeDescription" => Some(self.description()),
            "ChargeFrequency" => Some(
                if charge.part == Part::Fixed {
                    "Recurring"
                } else {
                    "Usage-Based"
                }
                .into(),
            ),
            "ChargePeriodStart" => Some(charge.period.utc().0),
            "ChargePeriodEnd" => Some(charge.period.utc().1),
            "ConsumedQuantity" => Some(self.consumed().0),
            "ConsumedUnit" => Some(self.consumed().1),
            "ContractedCost" | "ListCost" => Some(self.list.clone()),
            "ContractedUnitPrice" | "ListUnitPrice" => Some(charge.unit_price()),
            "HostProviderName" | "InvoiceIssuerName" | "ServiceProviderName" => {
                Some(billing.provider.clone())
            }
            "PricingCategory" => Some(
                if self.is_priced() {
                    "Standard"
                } else {
                    "Other"
                }
                .into(),
            ),
            "PricingQuantity" => Some(charge.quantity()),
            "PricingUnit" => Some(charge.unit.clone()),
            "RegionId" => billing.region.as_ref().map(|(id, _)| id.clone()),
            "RegionName" => billing.region.as_ref().map(|(_, name)| name.clone()),
            "ResourceId" | "ResourceName" => Some(if self.is_shared() {
                account.interface.clone()
            } else {
                resource(account)
            })
            .filter(|name| !name.is_empty()),
            "ResourceType" => self.value("ResourceId").map(|_| {
                match (self.is_shared(), &account.kind) {
                    (true, _) => "Network interface",
                    (false, Kind::Route) => "Route",
                    (false, _) => "Gateway",
                }
                .into()
            }),
            "ServiceCategory" => Some("Networking".into()),
            "ServiceSubcategory" => Some("Network Connectivity".into()),
            "ServiceName" => Some(if account.service.is_empty() {
                format!("({})", account.kind.word())
            } else {
                account.service.clone()
            }),
            "SkuId" | "SkuMeter" => Some(self.sku().to_owned()),
            "SkuPriceId" => Some(format!("{}/{}", self.sku(), charge.part.word())),
            "SkuPriceDetails" => Some(self.price_details()),
            "SubAccountId" | "SubAccountName" => text(&account.tenant),
            "Tags" => Some(tags(account)),
            "x_ClassHash" => text(&self.provenance.classes),
            "x_Direction" => Some(account.way.word().into()),
            "x_Endpoint" => text(&account.endpoint),
            "x_EventId" => Some(self.event_id()),
            "x_Interface" => text(&account.interface),
            "x_Kind" => Some(account.kind.word()),
            "x_Leg" => Some(account.side.word().into()),
            "x_Method" => text(&charge.method),
            "x_PriceBookHash" => Some(self.provenance.book.clone()),
            "x_Quality" => Some(quality(charge).into()),
            "x_UsageHash" => Some(self.provenance.usage.clone()),
            "x_WireBytes" => Some(charge.wire_bytes.to_string()),
            _ => None,
        }
    }

    /// Usage without a SKU is no FOCUS row: bytes that no price covers have one of their own.
    fn sku(&self) -> &str {
        if self.charge.sku.is_empty() {
            "unpriced"
        } else {
            &self.charge.sku
        }
    }

    /// Whether the row has a price, or only counts bytes.
    fn is_priced(&self) -> bool {
        !matches!(self.charge.part, Part::Measured | Part::Unpriced)
    }

    /// Whether the row is a share of something that was bought as a whole.
    fn is_shared(&self) -> bool {
        self.charge.part == Part::Fixed || self.charge.unit.starts_with("Mbps")
    }

    fn consumed(&self) -> (String, String) {
        let charge = self.charge;
        if self.is_shared() {
            (charge.quantity(), charge.unit.clone())
        } else {
            (decimal(charge.quantity, 1), "B".into())
        }
    }

    fn description(&self) -> String {
        let charge = self.charge;
        let what = match &charge.part {
            Part::Free => "free allowance".into(),
            Part::Tier(number) => format!("tier {number}"),
            Part::Adder(id) => format!("surcharge {id}"),
            Part::Fixed => "daily fee".into(),
            Part::Measured => "counted here, billed by another row".into(),
            Part::Unpriced => "no price in the book".into(),
        };
        let sku = self.sku();
        format!(
            "{sku}: {what}, {} leg {}, {}",
            charge.account.side.word(),
            charge.account.way.word(),
            resource(&charge.account)
        )
    }

    fn price_details(&self) -> String {
        let sku = self
            .book
            .skus
            .iter()
            .find(|sku| sku.id.as_str() == self.charge.sku);
        let mut details = Map::new();
        details.insert("x_Part".into(), Value::String(self.charge.part.word()));
        if let Some(sku) = sku {
            if let Basis::Bytes { unit } = &sku.basis {
                details.insert("x_UnitBytes".into(), Value::String(unit.to_string()));
            }
            if let Some(fx) = sku.fx {
                let rate = format!("{} from {} as of {}", fx.rate, fx.from, fx.as_of);
                details.insert("x_ExchangeRate".into(), Value::String(rate));
            }
            if !sku.source.is_empty() {
                details.insert("x_Source".into(), Value::String(sku.source.clone()));
            }
        }
        Value::Object(details).to_string()
    }

    /// The same row has the same id in every rating.
    fn event_id(&self) -> String {
        let charge = self.charge;
        let identity = format!(
            "{:?} {} {:?} {:?} {} {} {} {}",
            charge.period,
            charge.sku,
            charge.part,
            charge.account,
            charge.unit,
            charge.divisor,
            charge.price,
            charge.price_decimals
        );
        hex(&Sha256::digest(identity)[..16])
    }
}

/// `exact` or `estimated`.
#[must_use]
pub fn quality(charge: &Charge) -> &'static str {
    if charge.estimated {
        "estimated"
    } else {
        "exact"
    }
}

/// What the bytes were moved for: a route, or why there is none.
#[must_use]
pub fn resource(account: &Account) -> String {
    match &account.kind {
        Kind::Route => account.route.clone(),
        Kind::Overhead | Kind::Unclaimed => {
            format!("({} {})", account.kind.word(), account.endpoint)
        }
        Kind::Foreign | Kind::Cell(_) => format!("({})", account.kind.word()),
        Kind::Account => "(fees and commitments)".into(),
    }
}

fn tags(account: &Account) -> String {
    let mut tags = Map::new();
    for (name, value) in [
        ("class", &account.class),
        ("route", &account.route),
        ("service", &account.service),
        ("tenant", &account.tenant),
    ] {
        if !value.is_empty() {
            tags.insert(name.into(), Value::String(value.clone()));
        }
    }
    if !account.kind.is_attributed() {
        tags.insert("unattributed".into(), Value::String(account.kind.word()));
    }
    Value::Object(tags).to_string()
}

/// Rows as CSV.
///
/// # Errors
/// Writing fails.
pub fn csv(records: &[Record]) -> Result<Vec<u8>, csv::Error> {
    let mut writer = csv::WriterBuilder::new()
        .terminator(csv::Terminator::Any(b'\n'))
        .from_writer(Vec::new());
    writer.write_record(COLUMNS.iter().map(|(name, _)| *name))?;
    for record in records {
        writer.write_record(record.iter().map(|value| value.as_deref().unwrap_or("")))?;
    }
    writer
        .into_inner()
        .map_err(|error| csv::Error::from(std::io::Error::other(error.to_string())))
}
