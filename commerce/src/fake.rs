//! A payment provider that misbehaves on purpose: `commerce provider`.
//!
//! It takes every charge and refund once per id, and calls back slowly, twice, out of order,
//! or never, as a seed decides. `GET /v1/charges/{payment}` always tells the truth.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::payment::Kind;
use crate::provider::{Notice, Statement};
use crate::store::unix_time_ms;
use crate::webhook::{self, Secret};

/// What goes wrong, in percent of the callbacks.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Decides everything below.
    pub seed: u64,
    /// Charges that are declined.
    pub decline: u8,
    /// Callbacks that never come.
    pub lose: u8,
    /// Callbacks that come twice.
    pub duplicate: u8,
    /// Longest delay of a callback, in milliseconds: what reorders them.
    pub slow_ms: u64,
}

struct Charge {
    statement: Statement,
    declined: bool,
}

struct Provider {
    faults: Faults,
    callback: String,
    secret: Secret,
    http: reqwest::Client,
    charges: Mutex<BTreeMap<Uuid, Charge>>,
}

type Shared = Arc<Provider>;

/// Serves until the task is dropped.
///
/// # Errors
/// What the socket reports.
pub async fn serve(
    listener: TcpListener,
    callback: String,
    secret: Secret,
    faults: Faults,
) -> std::io::Result<()> {
    let provider = Arc::new(Provider {
        faults,
        callback,
        secret,
        http: crate::relay::deliver::Client::new(false, None)?
            .http()
            .clone(),
        charges: Mutex::default(),
    });
    let router = Router::new()
        .route("/v1/charges", post(charge))
        .route("/v1/charges/{payment}", get(statement))
        .route("/v1/refunds", post(refund))
        .with_state(provider);
    axum::serve(listener, router).await
}

/// An amount as our events carry it.
#[derive(Deserialize)]
struct Amount {
    minor: i64,
}

#[derive(Deserialize)]
struct ChargeRequest {
    id: Uuid,
    amount: Amount,
}

#[derive(Deserialize)]
struct RefundRequest {
    id: Uuid,
    payment_id: Uuid,
    amount: Amount,
}

async fn charge(State(provider): State<Shared>, Json(request): Json<ChargeRequest>) -> StatusCode {
    let mut dice = Dice::new(provider.faults.seed, request.id, 0);
    let declined = dice.percent(provider.faults.decline);
    let notice = Notice {
        event_id: format!("charge:{}", request.id),
        payment_id: request.id,
        sequence: 1,
        kind: if declined {
            Kind::Failed
        } else {
            Kind::Captured
        },
        amount_minor: if declined { 0 } else { request.amount.minor },
    };
    {
        let mut charges = provider
            .charges
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // The same id again is the same charge.
        if charges.contains_key(&request.id) {
            return StatusCode::OK;
        }
        let events = vec![notice.clone()];
        let statement = Statement { events };
        charges.insert(
            request.id,
            Charge {
                statement,
                declined,
            },
        );
    }
    call_back(&provider, notice, dice);
    StatusCode::ACCEPTED
}

async fn refund(State(provider): State<Shared>, Json(request): Json<RefundRequest>) -> StatusCode {
    let event_id = format!("refund:{}", request.id);
    let notice = {
        let mut charges = provider
            .charges
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(charge) = charges.get_mut(&request.payment_id) else {
            // The charge may still be under way to us.
            return StatusCode::TOO_EARLY;
        };
        let events = &mut charge.statement.events;
        if events.iter().any(|event| event.event_id == event_id) {
            return StatusCode::OK;
        }
        let sum = |kind| {
            let amounts = events.iter().filter(|event| event.kind == kind);
            amounts.map(|event| event.amount_minor).sum::<i64>()
        };
        let left = sum(Kind::Captured).saturating_sub(sum(Kind::Refunded));
        if charge.declined || request.amount.minor > left {
            return StatusCode::UNPROCESSABLE_ENTITY;
        }
        let notice = Notice {
            event_id,
            payment_id: request.payment_id,
            sequence: i64::try_from(events.len())
                .unwrap_or(i64::MAX)
                .saturating_add(1),
            kind: Kind::Refunded,
            amount_minor: request.amount.minor,
        };
        events.push(notice.clone());
        notice
    };
    let dice = Dice::new(provider.faults.seed, request.id, 1);
    call_back(&provider, notice, dice);
    StatusCode::ACCEPTED
}

async fn statement(State(provider): State<Shared>, Path(payment): Path<Uuid>) -> Json<Statement> {
    let charges = provider
        .charges
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let found = charges.get(&payment).map(|charge| charge.statement.clone());
    Json(found.unwrap_or_default())
}

/// Calls back as the dice say: late, twice, never.
fn call_back(provider: &Shared, notice: Notice, mut dice: Dice) {
    let faults = provider.faults;
    if dice.percent(faults.lose) {
        return;
    }
    let copies = if dice.percent(faults.duplicate) { 2 } else { 1 };
    for _ in 0..copies {
        let delay = Duration::from_millis(dice.below(faults.slow_ms.saturating_add(1)));
        let (provider, notice) = (Arc::clone(provider), notice.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let Ok(body) = serde_json::to_vec(&notice) else {
                return;
            };
            let seconds = unix_time_ms().div_euclid(1000);
            let signature = provider.secret.sign(&notice.event_id, seconds, &body);
            let sent = provider
                .http
                .post(&provider.callback)
                .header("content-type", "application/json")
                .header(webhook::ID, &notice.event_id)
                .header(webhook::TIMESTAMP, seconds.to_string())
                .header(webhook::SIGNATURE, signature)
                .body(body)
                .send()
                .await;
            if let Err(error) = sent {
                // Lost: the service asks.
                tracing::debug!(%error, "a callback was not taken");
            }
        });
    }
}

/// Repeatable chance: the same seed and id give the same faults.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, id: Uuid, salt: u64) -> Self {
        let (high, low) = id.as_u64_pair();
        Self(seed ^ high.rotate_left(17) ^ low ^ salt.wrapping_mul(0xA24B_AED4_963E_E407))
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    fn percent(&mut self, percent: u8) -> bool {
        self.below(100) < u64::from(percent)
    }
}
