//! One batch to one sink: requests, retries with growing pauses, and dead letters.
//!
//! A sink that fails (no answer, 5xx, 429) is tried until it works: nothing is lost. An event
//! that a working sink refuses (other 4xx) is poison: tried a few times alone, then put aside,
//! so that it does not hold up the rest.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use uuid::Uuid;

use super::sink::{Kind, Sink};
use crate::event::Event;
use crate::metrics::Metrics;
use crate::store::unix_time_ms;
use crate::trace::traceparent;
use crate::webhook::{self, Secret};

/// How long PostgreSQL's rows are claimed, in milliseconds; longer than any request.
pub(super) const LEASE_MS: i64 = 60_000;
/// Longest time a sink may take for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause between tries.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LAST: Duration = Duration::from_secs(10);
/// How often an event that is refused is tried.
const REFUSALS_MAX: u32 = 3;

/// What became of a batch. Everything in it is acknowledged, or dead.
#[derive(Debug, Default)]
pub(super) struct Delivered {
    /// Events the sink refused for good.
    pub(super) dead: Vec<Dead>,
    /// The lease ran out before the sink answered: somebody else may have it now.
    pub(super) abandoned: bool,
}

/// An event put aside.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) event: Uuid,
    pub(super) attempts: u32,
    pub(super) reason: String,
}

/// What a sink answered.
enum Said {
    Accepted,
    /// It works, and does not want this.
    Refused(String),
    /// It does not work.
    Failed(String),
}

/// Sends requests; shared by all relays.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    leases: bool,
}

impl Client {
    /// `leases`: whether claims run out (PostgreSQL). `ca`: a PEM file of authorities that sinks
    /// may have their certificates from, beside the system's.
    ///
    /// # Errors
    /// When the file cannot be read, or the HTTP client cannot be made.
    pub fn new(leases: bool, ca: Option<&Path>) -> std::io::Result<Self> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(trust(ca)?)
            .timeout(REQUEST_TIMEOUT)
            // A sink that moved is the operator's to know: a redirect would drop the body.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(std::io::Error::other)?;
        Ok(Self { http, leases })
    }

    /// The HTTP client, for other requests to the same services.
    #[must_use]
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// Delivers the events, in as many requests as the sink's kind wants.
    pub(super) async fn deliver(
        &self,
        sink: &Sink,
        events: &[(i64, Event)],
        metrics: &Metrics,
    ) -> Delivered {
        let mut delivered = Delivered::default();
        let deadline = self
            .leases
            .then(|| unix_time_ms().saturating_add(LEASE_MS / 2));
        let events: Vec<&Event> = events.iter().map(|(_, event)| event).collect();
        if sink.kind == Kind::Risk {
            match self.insist(sink, &events, 1, deadline, metrics).await {
                Some(Said::Accepted) => return delivered,
                // One of them is poison: find it.
                Some(_) => {}
                None => {
                    delivered.abandoned = true;
                    return delivered;
                }
            }
        }
        for event in events {
            let one = [event];
            match self
                .insist(sink, &one, REFUSALS_MAX, deadline, metrics)
                .await
            {
                Some(Said::Accepted) => {}
                Some(Said::Refused(reason) | Said::Failed(reason)) => {
                    tracing::warn!(sink = sink.id, event = %event.id, trace_id = event.trace_id,
                        reason, "an event is a dead letter");
                    metrics.dead_letter(sink.kind.as_str());
                    delivered.dead.push(Dead {
                        event: event.id,
                        attempts: REFUSALS_MAX,
                        reason,
                    });
                }
                None => {
                    delivered.abandoned = true;
                    return delivered;
                }
            }
        }
        delivered
    }

    /// Tries until the sink accepts, or has refused `refusals` times; `None` at the deadline.
    async fn insist(
        &self,
        sink: &Sink,
        events: &[&Event],
        refusals: u32,
        deadline_ms: Option<i64>,
        metrics: &Metrics,
    ) -> Option<Said> {
        let mut pause = PAUSE_FIRST;
        let mut refused = 0;
        loop {
            match self.send(sink, events).await {
                Said::Accepted => {
                    let count = u64::try_from(events.len()).unwrap_or(u64::MAX);
                    metrics.events_delivered(sink.kind.as_str(), count);
                    return Some(Said::Accepted);
                }
                Said::Refused(reason) => {
                    metrics.delivery_failed(sink.kind.as_str());
                    refused += 1;
                    if refused >= refusals {
                        return Some(Said::Refused(reason));
                    }
                }
                Said::Failed(reason) => {
                    metrics.delivery_failed(sink.kind.as_str());
                    tracing::warn!(sink = sink.id, reason, "a sink does not work; trying again");
                }
            }
            if deadline_ms.is_some_and(|deadline| unix_time_ms() >= deadline) {
                return None;
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2).min(PAUSE_LAST);
        }
    }

    async fn send(&self, sink: &Sink, events: &[&Event]) -> Said {
        let Some(first) = events.first() else {
            return Said::Accepted;
        };
        let (url, body) = match request(sink, events) {
            Ok(request) => request,
            Err(error) => return Said::Refused(error.to_string()),
        };
        let Ok(secret) = Secret::parse(&sink.secret) else {
            return Said::Refused("the sink's secret is unusable".to_owned());
        };
        let id = first.id.to_string();
        let seconds = unix_time_ms().div_euclid(1000);
        let signature = secret.sign(&id, seconds, &body);
        let mut request = self
            .http
            .post(url)
            .header("content-type", "application/json")
            .header(webhook::ID, id)
            .header(webhook::TIMESTAMP, seconds.to_string())
            .header(webhook::SIGNATURE, signature);
        if let (1, Some(parent)) = (events.len(), traceparent(&first.trace_id)) {
            request = request.header("traceparent", parent);
        }
        match request.body(body).send().await {
            Ok(response) if response.status().is_success() => Said::Accepted,
            Ok(response) => {
                let status = response.status();
                let is_poison =
                    status.is_client_error() && !matches!(status.as_u16(), 408 | 425 | 429);
                if is_poison {
                    Said::Refused(format!("the sink answered {status}"))
                } else {
                    Said::Failed(format!("the sink answered {status}"))
                }
            }
            Err(error) => Said::Failed(error.to_string()),
        }
    }
}

/// TLS as sinks must speak it: 1.2 or newer, with a certificate from a known authority.
fn trust(ca: Option<&Path>) -> std::io::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in system.errors {
        tracing::warn!(%error, "an authority of the system is not read");
    }
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = ca {
        let named = |error: &dyn std::fmt::Display| {
            std::io::Error::other(format!("--sink-ca {}: {error}", path.display()))
        };
        let found = CertificateDer::pem_file_iter(path).map_err(|error| named(&error))?;
        for certificate in found {
            let certificate = certificate.map_err(|error| named(&error))?;
            roots.add(certificate).map_err(|error| named(&error))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Address and body.
fn request(sink: &Sink, events: &[&Event]) -> Result<(String, Vec<u8>), serde_json::Error> {
    #[derive(Serialize)]
    struct Batch<'a> {
        events: &'a [&'a Event],
    }
    let one = events.first();
    Ok(match (sink.kind, one) {
        (Kind::Provider, Some(event)) => {
            let path = match event.topic {
                crate::event::Topic::RefundRequested => "v1/refunds",
                _ => "v1/charges",
            };
            let url = format!("{}/{path}", sink.url.trim_end_matches('/'));
            (url, event.data.0.as_bytes().to_vec())
        }
        (Kind::Webhook, Some(event)) => (sink.url.clone(), serde_json::to_vec(event)?),
        _ => (sink.url.clone(), serde_json::to_vec(&Batch { events })?),
    })
}
