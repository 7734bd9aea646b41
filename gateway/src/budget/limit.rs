//! A budget as configured.

use crate::{
    config::{Name, Route},
    cost::calendar::Zone,
    money::Nanos,
};

/// What may be used, by whom, in which time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Unique among budgets.
    pub name: Name,
    /// Whose use counts.
    pub scope: Scope,
    /// How much.
    pub limit: Limit,
    /// In which time.
    pub period: PeriodKind,
    /// Where days begin.
    pub zone: Zone,
    /// Shares of the limit, percent, ascending, at which a warning begins.
    pub warn_percent: Vec<i64>,
    /// What happens to requests past the limit.
    pub action: Action,
    /// For [`Action::Throttle`]: what all responses together may move.
    pub throttle_bytes_per_second: u64,
}

impl Budget {
    /// Whether something may happen to a route's requests because of it, some tenant's at least.
    #[must_use]
    pub fn may_act_on(&self, route: &Route) -> bool {
        let lists = |names: &[Name], name: &Name| names.is_empty() || names.contains(name);
        self.action != Action::None
            && lists(&self.scope.routes, &route.name)
            && lists(&self.scope.services, &route.service)
    }
}

/// Whose use counts: all that is given must match; nothing given is everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Route names.
    pub routes: Vec<Name>,
    /// Service names.
    pub services: Vec<Name>,
    /// Tenant names.
    pub tenants: Vec<Name>,
}

impl Scope {
    /// Whether a request's or owner's use counts.
    #[must_use]
    pub fn covers(&self, route: &str, service: &str, tenant: &str) -> bool {
        let covers = |names: &[Name], value: &str| {
            names.is_empty() || names.iter().any(|name| name.as_str() == value)
        };
        covers(&self.routes, route)
            && covers(&self.services, service)
            && covers(&self.tenants, tenant)
    }
}

/// How much may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Wire bytes, both legs and directions.
    Bytes(i128),
    /// At the configured rates.
    Money(Nanos),
}

impl Limit {
    /// As a number of [`Limit::unit`].
    #[must_use]
    pub fn amount(self) -> i128 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Money(nanos) => nanos.0,
        }
    }

    /// `bytes` or `nanos`.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bytes(_) => "bytes",
            Self::Money(_) => "nanos",
        }
    }
}

/// A budget's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeriodKind {
    /// From midnight to midnight.
    Day,
    /// A calendar month.
    Month,
}

impl PeriodKind {
    /// The word in the configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
        }
    }
}

/// What happens to requests past the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: metrics and alerts only.
    None,
    /// A header on responses, from the first warning on.
    Warn,
    /// Responses are slowed down.
    Throttle,
    /// 429 until the period ends.
    Refuse,
}
