//! Experiments over HTTP: what is in force and what is known, and what pages report.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use super::keyed::{self, json};
use super::problem::{Kind, Problem, ProblemDocument};
use crate::campaigns::{self, Active};
use crate::experiment::assign::{UNIT_HEADER, VARIANT_HEADER};
use crate::experiment::statistics::Sample;
use crate::trace::TraceId;

/// Longest unit taken over, in bytes.
const UNIT_LEN_MAX: usize = 128;
/// The cookie that carries the unit where no gateway does.
pub(super) const UNIT_COOKIE: &str = "edgemeter_unit";

/// The customer a request is counted for: what the gateway hashed, else the cookie, else the
/// tenant.
pub(super) fn unit(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let cookie = || {
        let cookies = headers.get_all(header::COOKIE).iter();
        cookies
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .find_map(|(name, value)| (name == UNIT_COOKIE).then_some(value))
    };
    text(UNIT_HEADER)
        .or_else(cookie)
        .or_else(|| text("x-tenant"))
        .filter(|unit| (1..=UNIT_LEN_MAX).contains(&unit.len()))
}

/// The variants a request is in.
pub(super) fn variants(
    active: &Active,
    headers: &HeaderMap,
    unit: Option<&str>,
) -> Vec<(String, String)> {
    let header = headers.get(VARIANT_HEADER);
    active.variants(header.and_then(|value| value.to_str().ok()), unit)
}

/// The experiments in force.
#[derive(Serialize, ToSchema)]
pub(super) struct Experiments {
    /// The campaign's revision.
    revision: u64,
    /// Every experiment of it.
    experiments: Vec<ExperimentAnswer>,
}

/// One experiment.
#[derive(Serialize, ToSchema)]
pub(super) struct ExperimentAnswer {
    /// Its name.
    name: String,
    /// `running`, `shipped`, `kept`, `rolled_back`.
    verdict: String,
    /// Milliseconds since the Unix epoch at which it began.
    started_at_ms: i64,
    /// Chance of so uneven a split; tiny when the assignment or the log is broken.
    sample_ratio_p: f64,
    /// Control first.
    variants: Vec<VariantAnswer>,
}

/// One variant, and what is known of it against the control.
#[derive(Serialize, ToSchema)]
pub(super) struct VariantAnswer {
    /// Its name.
    name: String,
    /// Customers who saw it.
    units: u64,
    /// Their outcomes: conversions, or minor units.
    sum: u64,
    /// Expected relative lift; none for the control and without data.
    lift: Option<f64>,
    /// The central 95 % of it.
    interval: Option<[f64; 2]>,
    /// Probability that it is better.
    win: Option<f64>,
    /// Expected relative loss of shipping it.
    risk: Option<f64>,
}

/// Shows the experiments in force and what is known. Looking does not decide.
#[utoipa::path(
    get, path = "/api/v1/experiments", tag = "experiments", operation_id = "experiments",
    responses(
        (status = 200, description = "The experiments", body = Experiments),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn list(State(shared): State<Shared>) -> Result<Json<Experiments>, Problem> {
    let active = shared.campaigns.active();
    let findings = campaigns::findings(&shared.store, &active).await?;
    let experiments = findings
        .into_iter()
        .map(|finding| {
            // The control is compared with nothing.
            let known = std::iter::once(None).chain(finding.assessment.treatments);
            let variants = finding
                .variants
                .into_iter()
                .zip(finding.samples)
                .zip(known)
                .map(|((name, Sample { units, sum, .. }), known)| VariantAnswer {
                    name,
                    units,
                    sum,
                    lift: known.map(|known| known.mean),
                    interval: known.map(|known| [known.interval.0, known.interval.1]),
                    win: known.map(|known| known.win),
                    risk: known.map(|known| known.risk_of_shipping),
                });
            ExperimentAnswer {
                verdict: finding.stored,
                started_at_ms: finding.started_at_ms,
                sample_ratio_p: finding.assessment.sample_ratio_p,
                variants: variants.collect(),
                name: finding.name,
            }
        })
        .collect();
    Ok(Json(Experiments {
        revision: active.revision,
        experiments,
    }))
}

/// What a page measured about itself, once it was painted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vitals {
    /// First contentful paint, in milliseconds after navigation.
    fcp_ms: u32,
    /// Whether the browser used hints that came before the answer.
    #[serde(default)]
    hinted: bool,
}

/// A paint later than this is a tab in the background.
const PAINT_MS_MAX: u32 = 120_000;

/// `POST /api/v1/vitals`: a page reports its first contentful paint (`sendBeacon`).
pub(super) async fn vitals(
    State(shared): State<Shared>,
    Extension(_): Extension<TraceId>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    // A beacon is text/plain: another media type would ask the server first.
    let body = keyed::body(&HeaderMap::new(), body)?;
    let Vitals { fcp_ms, hinted } = json(&body)?;
    if fcp_ms > PAINT_MS_MAX {
        return Err(Problem::new(
            Kind::BadRequest,
            "`fcp_ms` is not a paint's time.",
        ));
    }
    let paint = std::time::Duration::from_millis(fcp_ms.into());
    shared.metrics.painted(hinted, paint);
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_unit_comes_from_the_gateway_then_the_cookie_then_the_tenant() {
        let mut headers = HeaderMap::new();
        assert_eq!(unit(&headers), None);
        headers.insert("x-tenant", HeaderValue::from_static("acme"));
        assert_eq!(unit(&headers), Some("acme"));
        let cookie = HeaderValue::from_static("a=b; edgemeter_unit=c-1; x=y");
        headers.insert(header::COOKIE, cookie);
        assert_eq!(unit(&headers), Some("c-1"));
        headers.insert(UNIT_HEADER, HeaderValue::from_static("g-1"));
        assert_eq!(unit(&headers), Some("g-1"));
        let long = HeaderValue::from_str(&"x".repeat(UNIT_LEN_MAX + 1)).unwrap();
        headers.insert(UNIT_HEADER, long);
        assert_eq!(unit(&headers), None);
    }
}
