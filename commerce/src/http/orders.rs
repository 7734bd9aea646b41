//! Orders over HTTP: placed here, changed in [`change`], read in [`look`].

pub(super) mod change;
pub(super) mod look;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::keyed::{self, json, key};
use super::problem::{Kind, Problem, ProblemDocument};
use super::{Shared, experiments, principal, route};
use crate::command::place::{Place, Placed, Terms};
use crate::command::{Answer, Keyed, Verdict};
use crate::discount::COUPONS_MAX;
use crate::event::Origin;
use crate::gate::{Admission, Gate};
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::metrics::RefusalReason;
use crate::order::{Draft, Order};
use crate::trace::TraceId;

/// The body of a request to place an order.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OrderRequest<'a> {
    /// Lines of one SKU are summed.
    #[serde(borrow)]
    #[schema(min_items = 1, max_items = 100)]
    lines: Vec<LineRequest<'a>>,
    /// Coupon codes.
    #[serde(default)]
    #[schema(max_items = 5)]
    coupons: Vec<String>,
}

/// One line of a request.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LineRequest<'a> {
    /// What.
    #[serde(borrow)]
    #[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,64}$", example = "1001")]
    sku: Cow<'a, str>,
    /// How many units.
    #[schema(minimum = 1, maximum = 10000, example = 1)]
    quantity: u32,
}

/// Places an order: reserves its stock until its deadline.
#[utoipa::path(
    post, path = "/api/v1/orders", tag = "orders",
    params(("Idempotency-Key" = String, Header, description = "Names the intended effect; the same key gives the same answer", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$")),
    request_body = OrderRequest<'_>,
    responses(
        (status = 201, description = "Committed", body = Order,
            headers(("location" = String, description = "The order"), ("etag" = String, description = "Its version")),
            links(
                ("show" = (operation_id = "show", parameters(("id" = "$response.body#/id")))),
                ("cancel" = (operation_id = "cancel", parameters(("id" = "$response.body#/id")))),
                ("pay" = (operation_id = "pay", parameters(("id" = "$response.body#/id")))),
                ("refund" = (operation_id = "refund", parameters(("id" = "$response.body#/id")))),
                ("events" = (operation_id = "events", parameters(("id" = "$response.body#/id"))))
            )),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn place(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let order = parse(&shared, trace, &headers, body)
        .inspect_err(|_| shared.metrics.order_refused(RefusalReason::InvalidRequest))?;
    let unit = experiments::unit(&headers).map(str::to_owned);
    let (active, variants) = (
        shared.campaigns.active(),
        order.effect.terms.variants.clone(),
    );
    let began = Instant::now();
    let answer = match &shared.gate {
        None => keyed::queue(&shared, order).await,
        Some(gate) => through_gate(&shared, gate, order).await,
    };
    shared.metrics.deducted(began.elapsed());
    let answer = answer?;
    if let (Answer::Done(_, Placed::Order { id, total, .. }), Some(unit)) = (&answer, &unit)
        && !active.campaign.experiments.is_empty()
    {
        // An order is an exposure too: its price may depend on the variant.
        shared.campaigns.exposed(&active, unit, &variants);
        shared
            .campaigns
            .ordered(unit, id.to_string(), total.minor());
    }
    keyed::respond(answer)
}

/// Asks the gate first; what the ledger says counts, and teaches the gate.
async fn through_gate(
    shared: &Shared,
    gate: &Gate,
    mut order: Keyed<Place>,
) -> Result<Answer<Placed>, Problem> {
    let reservation = Gate::reservation(&order.scope);
    let admission = gate.admit(&reservation, &order.effect.draft).await;
    order.effect.is_sold_out = matches!(admission, Admission::SoldOut(_));
    let answer = keyed::queue(shared, order).await;
    let is_placed = matches!(&answer, Ok(Answer::Done(_, Placed::Order { .. })));
    let ran_out = matches!(
        &answer,
        Ok(Answer::Done(
            _,
            Placed::Refused(RefusalReason::InsufficientStock)
        ))
    );
    match admission {
        Admission::Admitted => {
            gate.settle(&reservation, is_placed).await;
            if ran_out {
                gate.mark_stale();
            }
        }
        // It does not know of this order: what it loaded meanwhile may be from before.
        Admission::SoldOut(_) | Admission::Unknown if is_placed => gate.mark_stale(),
        Admission::SoldOut(_) | Admission::Unknown => {}
    }
    answer
}

/// The whole request, parsed once.
fn parse(
    shared: &Shared,
    trace: TraceId,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Keyed<Place>, Problem> {
    let principal = principal(headers)?;
    let key = key(headers)?;
    let body = keyed::body(headers, body)?;
    let request: OrderRequest<'_> = json(&body)?;
    let lines = request.lines.iter().map(|line| (&*line.sku, line.quantity));
    let draft =
        Draft::new(lines).map_err(|error| Problem::new(Kind::InvalidOrder, error.to_string()))?;
    if request.coupons.len() > COUPONS_MAX {
        let detail = format!("An order takes {COUPONS_MAX} coupons.");
        return Err(Problem::new(Kind::InvalidOrder, detail));
    }
    let active = shared.campaigns.active();
    let terms = Terms {
        rules: Arc::clone(&active.campaign.discounts),
        member: shared.issuer.member(headers)?,
        coupons: request.coupons,
        variants: experiments::variants(&active, headers, experiments::unit(headers)),
    };
    Ok(Keyed {
        scope: Scope {
            principal: principal.clone(),
            route: "POST /api/v1/orders",
            key,
        },
        fingerprint: Fingerprint::of(&body),
        effect: Place {
            origin: Origin {
                actor: principal.clone(),
                trace,
            },
            principal,
            draft,
            terms,
            hold: shared.hold,
            is_sold_out: false,
            render,
        },
    })
}

/// The answer as it is stored with the order.
fn render(verdict: &Verdict<'_>) -> Result<Reply, serde_json::Error> {
    let (status, location, order, json) = match verdict {
        Verdict::Refused(refusal) => return Problem::from(*refusal).reply(),
        Verdict::Placed(order, json) => {
            let location = format!("{}/{}", route::ORDERS, order.id);
            (StatusCode::CREATED, Some(location), order, json)
        }
        Verdict::Changed(order, json) => (StatusCode::OK, None, order, json),
        Verdict::Accepted(order, json) => (StatusCode::ACCEPTED, None, order, json),
    };
    Ok(Reply {
        status: status.as_u16(),
        content_type: "application/json".to_owned(),
        location,
        etag: Some(order.etag()),
        body: json.as_bytes().to_vec(),
    })
}

fn not_found() -> Problem {
    Problem::new(Kind::NotFound, "There is no such order.")
}
