//! Errors on the wire: RFC 9457 problem documents.
//!
//! [`Kind`] is the vocabulary. Its type URI is what clients match on, its status says whose
//! fault it is (4xx: theirs), and `Retry-After` says that trying again may help. The detail
//! is for people; nothing internal goes into it.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::idempotency::Reply;
use crate::order::{Refusal, TotalRefusal};
use crate::store::StoreError;

/// The media type of a problem document.
const CONTENT_TYPE: &str = "application/problem+json";
/// Seconds after which an overloaded service is worth another try.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// What can go wrong, as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    BadRequest,
    InvalidIdempotencyKey,
    InvalidSignature,
    MalformedBody,
    NotFound,
    MethodNotAllowed,
    BodyTooLarge,
    UnsupportedMediaType,
    InvalidOrder,
    UnknownSku,
    InsufficientStock,
    InvalidCoupon,
    GroupFull,
    GroupOver,
    AlreadyMember,
    InvalidMember,
    MemberExists,
    PeriodOutOfOrder,
    PeriodUnpaid,
    Unauthorized,
    Forbidden,
    InvalidState,
    StaleVersion,
    PaymentPending,
    RefundTooLarge,
    IdempotencyKeyReused,
    Overloaded,
    Draining,
    StorageFailed,
    Internal,
}

impl Kind {
    /// Status, last part of the type URI, and title.
    const fn parts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::BadRequest => (StatusCode::BAD_REQUEST, "bad-request", "Bad request"),
            Self::InvalidIdempotencyKey => (
                StatusCode::BAD_REQUEST,
                "invalid-idempotency-key",
                "Missing or invalid idempotency key",
            ),
            Self::InvalidSignature => (
                StatusCode::UNAUTHORIZED,
                "invalid-signature",
                "Missing or invalid signature",
            ),
            Self::MalformedBody => (StatusCode::BAD_REQUEST, "malformed-body", "Malformed body"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "Method not allowed",
            ),
            Self::BodyTooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "body-too-large",
                "Body too large",
            ),
            Self::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "Unsupported media type",
            ),
            Self::InvalidOrder => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-order",
                "Invalid order",
            ),
            Self::UnknownSku => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "unknown-sku",
                "Unknown SKU",
            ),
            Self::InsufficientStock => (
                StatusCode::CONFLICT,
                "insufficient-stock",
                "Insufficient stock",
            ),
            Self::InvalidCoupon => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-coupon",
                "Invalid coupon",
            ),
            Self::GroupFull => (StatusCode::CONFLICT, "group-full", "Group full"),
            Self::GroupOver => (StatusCode::CONFLICT, "group-over", "Group over"),
            Self::AlreadyMember => (
                StatusCode::CONFLICT,
                "already-member",
                "Already a member of the group",
            ),
            Self::InvalidMember => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-member",
                "Invalid member",
            ),
            Self::MemberExists => (StatusCode::CONFLICT, "member-exists", "Member exists"),
            Self::PeriodOutOfOrder => (
                StatusCode::CONFLICT,
                "period-out-of-order",
                "Period out of order",
            ),
            Self::PeriodUnpaid => (StatusCode::CONFLICT, "period-unpaid", "Period unpaid"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized", "Unauthorized"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden", "Forbidden"),
            Self::InvalidState => (StatusCode::CONFLICT, "invalid-state", "Invalid state"),
            Self::StaleVersion => (
                StatusCode::PRECONDITION_FAILED,
                "stale-version",
                "Stale version",
            ),
            Self::PaymentPending => (StatusCode::CONFLICT, "payment-pending", "Payment pending"),
            Self::RefundTooLarge => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "refund-too-large",
                "Refund too large",
            ),
            Self::IdempotencyKeyReused => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "Idempotency key reused",
            ),
            Self::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded", "Overloaded"),
            Self::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining", "Draining"),
            Self::StorageFailed => (
                StatusCode::SERVICE_UNAVAILABLE,
                "storage-failed",
                "Storage failed",
            ),
            Self::Internal => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "Internal error",
            ),
        }
    }
}

/// A problem document (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProblemDocument {
    /// What clients match on.
    #[schema(example = "urn:commerce:problem:insufficient-stock")]
    r#type: String,
    /// The type in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// This occurrence, for people.
    detail: String,
    /// The SKU it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    sku: Option<String>,
}

/// One problem, ready to be sent or stored.
#[derive(Debug)]
pub(super) struct Problem {
    kind: Kind,
    detail: String,
    sku: Option<String>,
}

impl Problem {
    pub(super) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            sku: None,
        }
    }

    /// Renders it as it will be sent, and replayed.
    pub(super) fn reply(&self) -> Result<Reply, serde_json::Error> {
        let (status, slug, title) = self.kind.parts();
        let body = serde_json::to_vec(&ProblemDocument {
            r#type: format!("urn:commerce:problem:{slug}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: self.detail.clone(),
            sku: self.sku.clone(),
        })?;
        let content_type = CONTENT_TYPE.to_owned();
        Ok(Reply {
            status: status.as_u16(),
            content_type,
            location: None,
            etag: None,
            body,
        })
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, ..) = self.kind.parts();
        let mut response = match self.reply() {
            Ok(reply) => {
                (status, [(header::CONTENT_TYPE, CONTENT_TYPE)], reply.body).into_response()
            }
            Err(_) => status.into_response(),
        };
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        response
    }
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::UnknownSku(sku) => Self {
                sku: Some(sku.to_string()),
                ..Self::new(Kind::UnknownSku, format!("No product has the SKU {sku}."))
            },
            Refusal::InsufficientStock { sku, requested } => Self {
                sku: Some(sku.to_string()),
                ..Self::new(
                    Kind::InsufficientStock,
                    format!("Fewer than {requested} units of SKU {sku} are available."),
                )
            },
            Refusal::Coupon(code) => Self::new(
                Kind::InvalidCoupon,
                format!("Coupon {code:?} is unknown or not valid now."),
            ),
            Refusal::NotFound => Self::new(Kind::NotFound, "There is no such order."),
            Refusal::Stale { current } => Self::new(
                Kind::StaleVersion,
                format!("The order has changed; its entity tag is now \"{current}\"."),
            ),
            Refusal::State { status, action } => Self::new(
                Kind::InvalidState,
                format!(
                    "An order that is {} cannot be {}.",
                    status.as_str(),
                    action.as_str()
                ),
            ),
            Refusal::PaymentPending => Self::new(
                Kind::PaymentPending,
                "A payment is under way; its outcome decides.",
            ),
            Refusal::Spent => Self::new(
                Kind::InvalidState,
                "The order has bought a period of membership, which is not returned.",
            ),
            Refusal::RefundQuantity(sku) => Self {
                sku: Some(sku.to_string()),
                ..Self::new(
                    Kind::RefundTooLarge,
                    format!("Of SKU {sku}, not that many units were bought and not yet refunded."),
                )
            },
            Refusal::Total(why) => Self::new(
                Kind::InvalidOrder,
                match why {
                    TotalRefusal::NoLines => "The order has no lines.",
                    TotalRefusal::MixedCurrencies => {
                        "The products are priced in different currencies."
                    }
                    TotalRefusal::Overflow => "The total does not fit 64 bits of minor units.",
                },
            ),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::QueueFull | StoreError::ReadersBusy => Self::new(
                Kind::Overloaded,
                "Too much is waiting already; nothing was done.",
            ),
            StoreError::Closed | StoreError::Stalled => {
                tracing::warn!(%error, "a request met a store that does not answer");
                Self::new(
                    Kind::StorageFailed,
                    "The storage does not answer; retry with the same key.",
                )
            }
            StoreError::Batch(_) => {
                // The writer has logged it, once for the whole batch.
                Self::new(
                    Kind::StorageFailed,
                    "The order was not confirmed; retry with the same key.",
                )
            }
            StoreError::Sql(_) => {
                tracing::error!(%error, "the storage failed a request");
                Self::new(
                    Kind::StorageFailed,
                    "The request was not confirmed; retry with the same key.",
                )
            }
            StoreError::Inconsistent(_)
            | StoreError::Render(_)
            | StoreError::SchemaTooNew { .. }
            | StoreError::Thread(_) => {
                tracing::error!(%error, "a request failed");
                Self::new(Kind::Internal, "The request failed here, not at your side.")
            }
        }
    }
}
