//! Reads issuers' keys in the background: at start, every `refresh`, and soon after a token named
//! a key nobody knows.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};

use super::token::Verifier;
use crate::{config::KeySource, export::EdgeMetrics};

/// The least time between two looks an unknown key can cause.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A JWKS document.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(500);

/// Looks after the keys of a verifier for as long as it lives.
pub async fn look_after(verifier: Weak<Verifier>, metrics: EdgeMetrics) {
    let mut next = Instant::now();
    let mut looked: Option<Instant> = None;
    let mut unknown_before = 0;
    loop {
        let Some(verifier) = verifier.upgrade() else {
            return;
        };
        let unknown = verifier.unknown_keys.load(Ordering::Relaxed);
        let asked = unknown != unknown_before && looked.is_none_or(|at| at.elapsed() > LOOK_AGAIN);
        if asked || Instant::now() >= next {
            unknown_before = unknown;
            looked = Some(Instant::now());
            let name = verifier.issuer().name.as_str().to_owned();
            match read(&verifier).await {
                Ok(count) => {
                    log::debug!("tokens {name}: {count} keys");
                    next = Instant::now() + verifier.issuer().refresh;
                }
                Err(error) => {
                    metrics.keys_failed();
                    log::warn!("tokens {name}: keys cannot be read, the last ones stay: {error}");
                    next = Instant::now() + LOOK_AGAIN.min(verifier.issuer().refresh);
                }
            }
        }
        drop(verifier);
        tokio::time::sleep(TICK).await;
    }
}

async fn read(verifier: &Arc<Verifier>) -> Result<usize, String> {
    let document = match &verifier.issuer().keys {
        KeySource::File(path) => tokio::fs::read_to_string(path)
            .await
            .map_err(|error| format!("{}: {error}", path.display()))?,
        KeySource::Url(url) => tokio::time::timeout(FETCH_TIMEOUT, fetch(url))
            .await
            .map_err(|_| format!("{url}: no answer"))?
            .map_err(|error| format!("{url}: {error}"))?,
    };
    verifier.take_keys(&document)
}

async fn fetch(url: &str) -> Result<String, String> {
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_native_roots()
        .map_err(|error| error.to_string())?
        .https_or_http()
        .enable_http1()
        .build();
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    let url = url.parse().map_err(|_| "no URL".to_owned())?;
    let response = client.get(url).await.map_err(|error| error.to_string())?;
    if !response.status().is_success() {
        return Err(format!("answered {}", response.status()));
    }
    let body = Limited::new(response.into_body(), DOCUMENT_BYTES_MAX);
    let body = body.collect().await.map_err(|error| error.to_string())?;
    String::from_utf8(body.to_bytes().to_vec()).map_err(|error| error.to_string())
}
