//! The HTTP edge: routes, limits, and errors as problem documents.
//!
//! Handlers parse once, call the store, and translate. No business rule lives here.

mod catalogue;
mod experiments;
mod group;
mod health;
mod keyed;
pub mod member;
mod observe;
mod openapi;
mod orders;
mod page;
mod problem;
mod webhooks;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Query, rejection::QueryRejection};
use axum::http::HeaderMap;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post, put};
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::campaigns::Campaigns;
use crate::catalogue::Sku;
use crate::census::Census;
use crate::command::pay::Provider;
use crate::gate::Gate;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::watch::Hub;
use crate::webhook::Secret;
use problem::{Kind, Problem};

/// Largest request body, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// Largest page of a listing, in entries.
pub const PAGE_ENTRIES_MAX: u32 = 100;
/// Page size when the client names none, in entries.
const PAGE_ENTRIES_DEFAULT: u32 = 20;
/// Longest tenant name, in characters.
const TENANT_LEN_MAX: usize = 128;
/// Who a request without a tenant acts as.
const ANONYMOUS: &str = "anonymous";

/// Every route template, and so every value of the `route` label but `unmatched`.
mod route {
    pub(super) const ORDERS: &str = "/api/v1/orders";
    pub(super) const ORDER: &str = "/api/v1/orders/{id}";
    pub(super) const CANCEL: &str = "/api/v1/orders/{id}/cancel";
    pub(super) const PAY: &str = "/api/v1/orders/{id}/pay";
    pub(super) const REFUND: &str = "/api/v1/orders/{id}/refund";
    pub(super) const EVENTS: &str = "/api/v1/orders/{id}/events";
    pub(super) const PAYMENTS: &str = "/api/v1/orders/{id}/payments";
    pub(super) const WEBHOOKS: &str = "/api/v1/webhooks";
    pub(super) const WEBHOOK: &str = "/api/v1/webhooks/{id}";
    pub(super) const CALLBACK: &str = "/api/v1/payments/callback";
    pub(super) const OPENAPI: &str = "/openapi.json";
    pub(super) const PRODUCTS: &str = "/api/v1/products";
    pub(super) const PRODUCT: &str = "/api/v1/products/{sku}";
    pub(super) const PRODUCT_PAGE: &str = "/products/{sku}";
    pub(super) const ASSET: &str = "/assets/{name}";
    pub(super) const PICTURE: &str = "/pictures/{name}";
    pub(super) const VITALS: &str = "/api/v1/vitals";
    pub(super) const EXPERIMENTS: &str = "/api/v1/experiments";
    pub(super) const GROUP_OFFER: &str = "/api/v1/group";
    pub(super) const GROUP: &str = "/api/v1/group/{id}";
    pub(super) const GROUP_TICKET: &str = "/api/v1/group/{id}/ticket";
    pub(super) const GROUP_WATCH: &str = "/api/v1/group/{id}/watch";
    pub(super) const MEMBERS: &str = "/api/v1/members";
    pub(super) const TOKENS: &str = "/api/v1/tokens";
    pub(super) const TOKENS_REFRESH: &str = "/api/v1/tokens/refresh";
    pub(super) const TOKENS_REVOKE: &str = "/api/v1/tokens/revoke";
    pub(super) const MEMBERSHIP: &str = "/api/v1/membership";
    pub(super) const PERIOD: &str = "/api/v1/membership/periods/{period}";
    pub(super) const JWKS: &str = "/.well-known/jwks.json";
    pub(super) const LIVEZ: &str = "/livez";
    pub(super) const READYZ: &str = "/readyz";
    pub(super) const METRICS: &str = "/metrics";
    pub(super) const ALL: &[&str] = &[
        ORDERS,
        ORDER,
        CANCEL,
        PAY,
        REFUND,
        EVENTS,
        PAYMENTS,
        WEBHOOKS,
        WEBHOOK,
        CALLBACK,
        OPENAPI,
        PRODUCTS,
        PRODUCT,
        PRODUCT_PAGE,
        ASSET,
        PICTURE,
        VITALS,
        EXPERIMENTS,
        GROUP_OFFER,
        GROUP,
        GROUP_TICKET,
        GROUP_WATCH,
        MEMBERS,
        TOKENS,
        TOKENS_REFRESH,
        TOKENS_REVOKE,
        MEMBERSHIP,
        PERIOD,
        JWKS,
        LIVEZ,
        READYZ,
        METRICS,
    ];
}

/// What handlers share.
#[derive(Clone)]
pub struct Shared {
    /// The database.
    pub store: Store,
    /// The counters.
    pub metrics: Metrics,
    /// Whether the service is on its way out.
    pub drain: Drain,
    /// How long an unpaid order keeps its stock.
    pub hold: Duration,
    /// Who takes the money.
    pub provider: Provider,
    /// What signs the provider's callbacks.
    pub provider_secret: Option<Secret>,
    /// Turns orders away before the database.
    pub gate: Option<Gate>,
    /// Tells the relays that a subscription changed.
    pub sinks: watch::Sender<u64>,
    /// Discounts, group offers and experiments in force.
    pub campaigns: Campaigns,
    /// Who watches which group.
    pub hub: Hub,
    /// The tasks that outlive a request.
    pub census: Census,
    /// Issues and verifies access tokens.
    pub issuer: member::SharedIssuer,
    /// The product that is a period of membership.
    pub membership_sku: Sku,
    /// Origins, beside our own, whose pages may watch groups.
    pub origins: Arc<[String]>,
}

/// A switch that only goes one way: once draining, `/readyz` answers 503.
#[derive(Clone)]
pub struct Drain {
    announce: Arc<watch::Sender<bool>>,
    announced: watch::Receiver<bool>,
}

impl Default for Drain {
    fn default() -> Self {
        let (announce, announced) = watch::channel(false);
        Self {
            announce: Arc::new(announce),
            announced,
        }
    }
}

impl Drain {
    /// Announces the end.
    pub fn begin(&self) {
        self.announce.send_replace(true);
    }

    /// Whether the end was announced.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.announced.borrow()
    }

    /// Waits until the end is announced.
    pub async fn begun(&mut self) {
        // The sender lives as long as we do.
        let _ = self.announced.wait_for(|begun| *begun).await;
    }
}

/// 256 random bits as text: what nobody can guess.
fn random_token() -> Result<String, Problem> {
    use base64::Engine as _;
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| {
        tracing::error!(%error, "the system has no random bytes");
        Problem::new(Kind::Internal, "The request failed here, not at your side.")
    })?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

/// All routes over `shared`.
pub fn router(shared: Shared) -> Router {
    Router::new()
        .route(route::ORDERS, get(orders::look::list).post(orders::place))
        .route(route::ORDER, get(orders::look::show))
        .route(route::CANCEL, post(orders::change::cancel))
        .route(route::PAY, post(orders::change::pay))
        .route(route::REFUND, post(orders::change::refund))
        .route(route::EVENTS, get(orders::look::events))
        .route(route::PAYMENTS, get(orders::look::payments))
        .route(
            route::WEBHOOKS,
            get(webhooks::list).post(webhooks::subscribe),
        )
        .route(route::WEBHOOK, delete(webhooks::unsubscribe))
        .route(route::CALLBACK, post(webhooks::callback))
        .route(route::OPENAPI, get(openapi::document))
        .route(route::PRODUCTS, get(catalogue::list))
        .route(route::PRODUCT, get(catalogue::show))
        .route(route::PRODUCT_PAGE, get(page::page))
        .route(route::ASSET, get(page::asset))
        .route(route::PICTURE, get(page::picture))
        .route(route::VITALS, post(experiments::vitals))
        .route(route::EXPERIMENTS, get(experiments::list))
        .route(route::GROUP_OFFER, get(group::offer).post(group::join))
        .route(route::GROUP, get(group::show))
        .route(route::GROUP_TICKET, post(group::ticket))
        .route(route::GROUP_WATCH, get(group::watch))
        .route(route::MEMBERS, post(member::register))
        .route(route::TOKENS, post(member::log_in))
        .route(route::TOKENS_REFRESH, post(member::refresh))
        .route(route::TOKENS_REVOKE, post(member::log_out))
        .route(route::MEMBERSHIP, get(member::membership))
        .route(route::PERIOD, put(member::renew))
        .route(route::JWKS, get(member::jwks))
        .route(route::LIVEZ, get(health::livez))
        .route(route::READYZ, get(health::readyz))
        .route(route::METRICS, get(health::metrics))
        .fallback(|| async { Problem::new(Kind::NotFound, "There is nothing at this path.") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                Kind::MethodNotAllowed,
                "See the Allow header for what this path takes.",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn_with_state(shared.metrics.clone(), observe::observe))
        .with_state(shared)
}

/// The query of a listing.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageQuery {
    /// Entries per page.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
    /// The `next` of the page before.
    after: Option<String>,
}

impl PageQuery {
    /// The page size and the cursor.
    fn parse(query: Result<Query<Self>, QueryRejection>) -> Result<(u32, Option<String>), Problem> {
        let Query(Self { limit, after }) =
            query.map_err(|rejected| Problem::new(Kind::BadRequest, rejected.body_text()))?;
        match limit.unwrap_or(PAGE_ENTRIES_DEFAULT) {
            limit @ 1..=PAGE_ENTRIES_MAX => Ok((limit, after)),
            _ => {
                let detail = format!("`limit` must be 1 to {PAGE_ENTRIES_MAX}.");
                Err(Problem::new(Kind::BadRequest, detail))
            }
        }
    }
}

/// Who asks: the `x-tenant` header, which the gateway in front vouches for.
fn principal(headers: &HeaderMap) -> Result<String, Problem> {
    let mut values = headers.get_all("x-tenant").iter();
    let Some(value) = values.next() else {
        return Ok(ANONYMOUS.to_owned());
    };
    match value.to_str() {
        Ok(name) if values.next().is_none() && (1..=TENANT_LEN_MAX).contains(&name.len()) => {
            Ok(name.to_owned())
        }
        _ => {
            let detail =
                format!("`x-tenant` must occur once, with 1 to {TENANT_LEN_MAX} ASCII characters.");
            Err(Problem::new(Kind::BadRequest, detail))
        }
    }
}
