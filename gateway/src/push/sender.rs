//! One HTTP exchange, and what it says about arrival.

use std::time::Duration;

use anyhow::Context as _;
use ureq::{
    Agent, Timeout,
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{Secrets, sign};
use crate::config::PushSink;

/// The longest answer read: only its beginning goes into an error.
const ANSWER_MAX: u64 = 4_096;

/// What is known after an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The sink has it.
    Accepted,
    /// The sink certainly does not have it; later may be better.
    NotArrived {
        why: String,
        retry_after: Option<Duration>,
    },
    /// It may or may not have it: send the same again.
    Unknown {
        why: String,
        retry_after: Option<Duration>,
    },
    /// It will never take this content.
    Refused { why: String },
}

/// Whether the sink has an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Yes,
    No,
    Unclear(String),
}

/// Talks to one sink.
#[derive(Debug)]
pub struct Sender {
    agent: Agent,
    url: String,
    confirm_url: Option<String>,
    secrets: Option<Secrets>,
    token: Option<String>,
}

impl Sender {
    /// Reads the secrets.
    ///
    /// # Errors
    /// A file cannot be read or does not hold what it should.
    pub fn new(sink: &PushSink) -> anyhow::Result<Self> {
        let here = format!("push {}", sink.name);
        let mut tls = TlsConfig::builder();
        if let Some(path) = &sink.ca_file {
            let pem = std::fs::read(path)
                .with_context(|| format!("{here}: ca_file {}", path.display()))?;
            let root = Certificate::from_pem(&pem)
                .with_context(|| format!("{here}: ca_file {}", path.display()))?;
            tls = tls.root_certs(RootCerts::new_with_certs(&[root]));
        }
        let agent = Agent::config_builder()
            .tls_config(tls.build())
            .timeout_global(Some(sink.timeout))
            .timeout_connect(Some(sink.timeout.min(Duration::from_secs(10))))
            // A status is a verdict, not an error; a redirect is a mistake in the configuration.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("edgemeter/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let secrets = match &sink.secret_file {
            Some(path) => Some(
                Secrets::read(path)
                    .map_err(|what| anyhow::anyhow!("{here}: secret_file {what}"))?,
            ),
            None => None,
        };
        let token = match &sink.token_file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("{here}: token_file {}", path.display()))?;
                Some(text.trim().to_owned())
            }
            None => None,
        };
        Ok(Self {
            agent,
            url: sink.url.clone(),
            confirm_url: sink.confirm_url.clone(),
            secrets,
            token,
        })
    }

    /// Sends a batch once. `id` names it: the same in every attempt.
    pub(super) fn send(&self, id: &str, unix_seconds: i64, body: &str) -> Verdict {
        let mut request = self
            .agent
            .post(&self.url)
            .header(
                "content-type",
                "application/cloudevents-batch+json; charset=utf-8",
            )
            .header("webhook-id", id)
            .header("webhook-timestamp", unix_seconds.to_string());
        if let Some(secrets) = &self.secrets {
            request = request.header("webhook-signature", sign(secrets, id, unix_seconds, body));
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) => return failed(&error),
        };
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let answer = response
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_string();
        let answer = answer.unwrap_or_default();
        let answer: String = answer.chars().take(200).collect();
        let why = format!("{status} {}", answer.trim());
        match status {
            200..=299 => Verdict::Accepted,
            400 | 413 | 422 => Verdict::Refused { why },
            // Too many requests, or a wrong address or token: none of it was taken.
            300..=499 => Verdict::NotArrived { why, retry_after },
            _ => Verdict::Unknown { why, retry_after },
        }
    }

    /// Asks the sink whether it has an event; None when it cannot be asked.
    pub(super) fn knows(&self, source: &str, id: &str) -> Option<Known> {
        let url = self.confirm_url.as_ref()?;
        let url = url
            .replace("{id}", &escaped(id))
            .replace("{source}", &escaped(source));
        let mut request = self.agent.get(&url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        Some(match request.call() {
            Ok(response) => match response.status().as_u16() {
                200..=299 => Known::Yes,
                404 => Known::No,
                status => Known::Unclear(format!("confirm_url answered {status}")),
            },
            Err(error) => Known::Unclear(format!("confirm_url: {error}")),
        })
    }
}

/// An attempt without an answer. Certain is only what failed before a byte could be sent.
fn failed(error: &ureq::Error) -> Verdict {
    let why = error.to_string();
    let certain = match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::BadUri(_)
        | ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => true,
        ureq::Error::Io(error) => matches!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused
                | std::io::ErrorKind::HostUnreachable
                | std::io::ErrorKind::NetworkUnreachable
                | std::io::ErrorKind::AddrNotAvailable
        ),
        _ => false,
    };
    if certain {
        Verdict::NotArrived {
            why,
            retry_after: None,
        }
    } else {
        Verdict::Unknown {
            why,
            retry_after: None,
        }
    }
}

/// Percent-encoded for a path segment or query value.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
