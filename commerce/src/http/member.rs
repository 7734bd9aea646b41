//! Members over HTTP: registration, tokens, renewals, and the keys that verify tokens.

use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use utoipa::ToSchema;
use uuid::Uuid;

use super::keyed::{self, json};
use super::problem::{Kind, Problem, ProblemDocument};
use super::{Shared, principal, random_token};
use crate::command::member::{self, Exchange, Login, Register, Renew, Renewed, Revoke};
use crate::membership::token::{ACCESS_MS, Claims, Ring};
use crate::membership::{GRACE_MS, Refresh, Renewal, Standing, Subscription};
use crate::order::OrderId;
use crate::store::unix_time_ms;

/// Longest address and password, in bytes. Hashing takes time, so its input is bounded.
const EMAIL_LEN_MAX: usize = 254;
const PASSWORD_LEN: std::ops::RangeInclusive<usize> = 8..=128;
/// Passwords hashed at once: each takes 19 MiB and tens of milliseconds of a processor.
const HASHING_MAX: usize = 2;
/// Requests that may wait for it.
const HASHING_WAITING_MAX: usize = 64;
/// Longest refresh token, in bytes.
const REFRESH_LEN_MAX: usize = 128;

/// What issues and verifies tokens.
pub struct Issuer {
    /// `iss` of every token.
    pub issuer: String,
    /// `aud` of every token.
    pub audience: String,
    ring: std::sync::RwLock<Ring>,
    hashing: Semaphore,
    admitted: Semaphore,
}

impl Issuer {
    /// An issuer with these keys.
    #[must_use]
    pub fn new(issuer: String, audience: String, ring: Ring) -> Self {
        Self {
            issuer,
            audience,
            ring: std::sync::RwLock::new(ring),
            hashing: Semaphore::new(HASHING_MAX),
            admitted: Semaphore::new(HASHING_MAX + HASHING_WAITING_MAX),
        }
    }

    /// Takes over new keys.
    pub fn replace(&self, ring: Ring) {
        *self
            .ring
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = ring;
    }

    fn ring(&self) -> Ring {
        let ring = self.ring.read();
        ring.unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Who sent a request, by its bearer token; `None` without one.
    pub(super) fn member(&self, headers: &HeaderMap) -> Result<Option<String>, Problem> {
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Ok(None);
        };
        let token = value.to_str().ok().and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then_some(token.trim())
        });
        let refuse = |detail: String| Problem::new(Kind::Unauthorized, detail);
        let token =
            token.ok_or_else(|| refuse("Authorization must be a bearer token.".to_owned()))?;
        let ring = self.ring.read();
        let ring = ring.unwrap_or_else(std::sync::PoisonError::into_inner);
        ring.verify(token, &self.issuer, &self.audience, unix_time_ms())
            .map(|claims| Some(claims.sub))
            .map_err(|error| refuse(error.to_string()))
    }

    /// Runs work that is as slow as it is meant to be, a few at a time.
    async fn hash<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Problem> {
        let overloaded = || Problem::new(Kind::Overloaded, "Too many log in at once.");
        let _admitted = self.admitted.try_acquire().map_err(|_| overloaded())?;
        let _turn = self.hashing.acquire().await.map_err(|_| overloaded())?;
        tokio::task::spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "hashing a password failed");
            Problem::new(Kind::Internal, "The request failed here, not at your side.")
        })
    }
}

/// Who somebody is, and how they prove it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Credentials {
    /// Compared in lower case.
    #[schema(format = Email, max_length = 254)]
    email: String,
    /// 8 to 128 bytes.
    #[schema(min_length = 8, max_length = 128)]
    password: String,
}

impl Credentials {
    fn parse(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Self, Problem> {
        let body = keyed::body(headers, body)?;
        let mut credentials: Self = json(&body)?;
        credentials.email.make_ascii_lowercase();
        let email = credentials.email.as_str();
        let is_address = email.len() <= EMAIL_LEN_MAX
            && email.bytes().all(|byte| byte.is_ascii_graphic())
            && email
                .split_once('@')
                .is_some_and(|(user, host)| !user.is_empty() && host.contains('.'));
        if !is_address {
            return Err(invalid("`email` is not an address."));
        }
        if !PASSWORD_LEN.contains(&credentials.password.len()) {
            return Err(invalid("`password` must have 8 to 128 bytes."));
        }
        Ok(credentials)
    }
}

fn invalid(detail: &str) -> Problem {
    Problem::new(Kind::InvalidMember, detail)
}

/// A new member.
#[derive(Serialize, ToSchema)]
pub(super) struct MemberAnswer {
    /// The `sub` of their tokens.
    id: Uuid,
}

/// Registers a member.
#[utoipa::path(
    post, path = "/api/v1/members", tag = "members", operation_id = "register",
    request_body = Credentials,
    responses(
        (status = 201, description = "Registered", body = MemberAnswer),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn register(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let Credentials { email, password } = Credentials::parse(&headers, body)?;
    let hashed = shared.issuer.hash(move || {
        let hashed = Argon2::default().hash_password(password.as_bytes());
        hashed.map(|hash| hash.to_string())
    });
    let password_hash = hashed.await?.map_err(|error| {
        tracing::error!(%error, "a password could not be hashed");
        Problem::new(Kind::Internal, "The request failed here, not at your side.")
    })?;
    let id = Uuid::now_v7();
    let register = Register {
        id,
        email,
        password_hash,
    };
    if shared.store.run(register).await? {
        Ok((StatusCode::CREATED, Json(MemberAnswer { id })).into_response())
    } else {
        Err(Problem::new(
            Kind::MemberExists,
            "This address has a member already.",
        ))
    }
}

/// Tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct Tokens {
    /// A JWT for `Authorization: Bearer`.
    access_token: String,
    /// Always `Bearer`.
    token_type: &'static str,
    /// Seconds the access token is good for.
    expires_in: i64,
    /// Good once, for the next pair.
    refresh_token: String,
}

fn issue(shared: &Shared, member: &str, refresh_token: String) -> Result<Response, Problem> {
    let now_ms = unix_time_ms();
    let claims = Claims {
        iss: shared.issuer.issuer.clone(),
        aud: shared.issuer.audience.clone(),
        sub: member.to_owned(),
        iat: now_ms / 1_000,
        exp: now_ms.saturating_add(ACCESS_MS) / 1_000,
        jti: Uuid::now_v7().to_string(),
    };
    let access_token = shared
        .issuer
        .ring()
        .sign(&claims, now_ms)
        .map_err(|error| {
            tracing::error!(%error, "a token could not be signed");
            Problem::new(Kind::Internal, "The request failed here, not at your side.")
        })?;
    let tokens = Tokens {
        access_token,
        token_type: "Bearer",
        expires_in: ACCESS_MS / 1_000,
        refresh_token,
    };
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(tokens)).into_response())
}

/// Logs in.
#[utoipa::path(
    post, path = "/api/v1/tokens", tag = "members", operation_id = "log_in",
    request_body = Credentials,
    responses(
        (status = 200, description = "Tokens", body = Tokens),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn log_in(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let Credentials { email, password } = Credentials::parse(&headers, body)?;
    let found = shared
        .store
        .read(move |connection| member::by_email(connection, &email))
        .await?;
    let member = shared
        .issuer
        .hash(move || {
            // An unknown address takes as long as a wrong password.
            let known = found.as_ref().map(|member| member.password_hash.as_str());
            let stored = known.unwrap_or(NOBODY);
            let is_right = PasswordHash::new(stored).is_ok_and(|stored| {
                Argon2::default()
                    .verify_password(password.as_bytes(), &stored)
                    .is_ok()
            });
            found.filter(|_| is_right)
        })
        .await?;
    let Some(member) = member else {
        return Err(Problem::new(
            Kind::Unauthorized,
            "The address or the password is wrong.",
        ));
    };
    let secret = random_token()?;
    let login = Login {
        member_id: member.id.clone(),
        family: Uuid::now_v7(),
        secret: secret.clone(),
    };
    shared.store.run(login).await?;
    issue(&shared, &member.id, secret)
}

/// A hash that no password is known for, of the usual cost.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// A refresh token.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RefreshRequest {
    /// As issued.
    #[schema(max_length = 128)]
    refresh_token: String,
}

impl RefreshRequest {
    fn parse(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<String, Problem> {
        let body = keyed::body(headers, body)?;
        let Self { refresh_token } = json(&body)?;
        if (1..=REFRESH_LEN_MAX).contains(&refresh_token.len()) {
            Ok(refresh_token)
        } else {
            Err(refused())
        }
    }
}

fn refused() -> Problem {
    Problem::new(
        Kind::Unauthorized,
        "The refresh token is unknown, used or too old; log in again.",
    )
}

/// Exchanges a refresh token. One that is presented twice ends every token of its login.
#[utoipa::path(
    post, path = "/api/v1/tokens/refresh", tag = "members", operation_id = "refresh",
    request_body = RefreshRequest,
    responses(
        (status = 200, description = "Tokens", body = Tokens),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn refresh(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let presented = RefreshRequest::parse(&headers, body)?;
    let next = random_token()?;
    let exchange = Exchange {
        presented,
        next: next.clone(),
    };
    match shared.store.run(exchange).await? {
        (Refresh::Rotate, Some(member)) => issue(&shared, &member, next),
        (Refresh::Reused, _) => {
            tracing::warn!("a refresh token was presented twice; its login is ended");
            Err(refused())
        }
        _ => Err(refused()),
    }
}

/// Logs out: ends every refresh token of the login.
#[utoipa::path(
    post, path = "/api/v1/tokens/revoke", tag = "members", operation_id = "log_out",
    request_body = RefreshRequest,
    responses(
        (status = 204, description = "Ended, if it was known"),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn log_out(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    let presented = RefreshRequest::parse(&headers, body)?;
    shared.store.run(Revoke { presented }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A membership.
#[derive(Serialize, ToSchema)]
pub(super) struct MembershipAnswer {
    /// What it is worth now.
    standing: Standing,
    /// The last period paid; 0 before the first.
    period: i64,
    /// Milliseconds since the Unix epoch at which it ends.
    paid_until_ms: i64,
    /// Milliseconds since the Unix epoch at which the benefits end.
    grace_until_ms: i64,
}

impl MembershipAnswer {
    fn of(subscription: Subscription) -> Self {
        let Subscription {
            period,
            paid_until_ms,
        } = subscription;
        let grace_ms = if period > 0 { GRACE_MS } else { 0 };
        Self {
            standing: subscription.standing(unix_time_ms()),
            period,
            paid_until_ms,
            grace_until_ms: paid_until_ms.saturating_add(grace_ms),
        }
    }
}

fn require_member(shared: &Shared, headers: &HeaderMap) -> Result<String, Problem> {
    shared
        .issuer
        .member(headers)?
        .ok_or_else(|| Problem::new(Kind::Unauthorized, "A bearer token is required."))
}

fn no_member() -> Problem {
    Problem::new(Kind::NotFound, "There is no such member.")
}

/// Shows one's membership.
#[utoipa::path(
    get, path = "/api/v1/membership", tag = "members", operation_id = "membership",
    responses(
        (status = 200, description = "The membership", body = MembershipAnswer),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn membership(
    State(shared): State<Shared>,
    headers: HeaderMap,
) -> Result<Json<MembershipAnswer>, Problem> {
    let id = require_member(&shared, &headers)?;
    let read = shared
        .store
        .read(move |connection| member::by_id(connection, &id));
    let member = read.await?.ok_or_else(no_member)?;
    Ok(Json(MembershipAnswer::of(member.subscription)))
}

/// What pays for a period.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RenewRequest {
    /// A paid order of one unit of the membership product. An order buys one period.
    #[schema(format = Uuid)]
    order: String,
}

/// Turns a paid order into a period. The period is the idempotency key: asking twice changes
/// nothing.
#[utoipa::path(
    put, path = "/api/v1/membership/periods/{period}", tag = "members", operation_id = "renew",
    params(("period" = i64, Path, description = "The period, from 1", minimum = 1)),
    request_body = RenewRequest,
    responses(
        (status = 200, description = "The membership after it", body = MembershipAnswer),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn renew(
    State(shared): State<Shared>,
    Path(period): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<MembershipAnswer>, Problem> {
    let member_id = require_member(&shared, &headers)?;
    let body = keyed::body(&headers, body)?;
    let RenewRequest { order } = json(&body)?;
    let period: i64 = period
        .parse()
        .ok()
        .filter(|period| *period > 0)
        .ok_or_else(|| Problem::new(Kind::BadRequest, "The period must be a positive number."))?;
    let unpaid = |problem| Problem::new(Kind::PeriodUnpaid, problem);
    let renew = Renew {
        member_id,
        period,
        principal: principal(&headers)?,
        order: OrderId::parse(&order).ok_or_else(|| unpaid("There is no such order."))?,
        sku: shared.membership_sku.clone(),
    };
    match shared.store.run(renew).await? {
        Renewed::NoMember => Err(no_member()),
        Renewed::Unpaid(problem) => Err(unpaid(problem)),
        Renewed::Done(Renewal::OutOfOrder { next }, _) => Err(Problem::new(
            Kind::PeriodOutOfOrder,
            format!("The period to renew is {next}."),
        )),
        Renewed::Done(Renewal::Renewed(_) | Renewal::Known, subscription) => {
            Ok(Json(MembershipAnswer::of(subscription)))
        }
    }
}

/// `GET /.well-known/jwks.json`: the keys that verify access tokens.
pub(super) async fn jwks(State(shared): State<Shared>) -> Response {
    let set = shared.issuer.ring().jwks(unix_time_ms());
    (
        // Half the time that a new key is published before it signs.
        [(header::CACHE_CONTROL, "public, max-age=300")],
        Json(set),
    )
        .into_response()
}

/// What handlers share of it.
pub type SharedIssuer = Arc<Issuer>;
