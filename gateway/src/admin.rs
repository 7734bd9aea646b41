//! The admin port: health, readiness, metrics, and, for who has the token, control. Loopback unless
//! configured otherwise.

pub mod client;
pub mod token;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use http::{Method, Response, header};
use pingora::{apps::http_app::ServeHttp, protocols::http::ServerSession};
use prometheus_client::{encoding::text::encode, registry::Registry};

use crate::{
    cache::{Selection, Store},
    census::{AGES, Census},
    connections::{Connections, Filter},
    export::WireView,
    kernel::events::monotonic_ns,
    profile::{ProfileError, Profiler},
    reload::Reloader,
    serve::Serving,
    upgrade::Giver,
};
use token::Token;

/// The page at `/`: no server-side part, it reads `/metrics`.
const PAGE: &str = include_str!("admin/page.html");

/// How long `/profile` samples unless it is said.
const PROFILE_SECONDS: u64 = 10;
/// The oldest that `/tasks` lists.
const OLDEST: usize = 50;

/// Serves `/`, `/metrics`, `/livez` and `/readyz` to everybody; with the token `GET /config`,
/// `/connections`, `/events`, `/tasks` and `/profile`, and `POST /reload`, `/upgrade` and
/// `/cache/purge`.
pub struct Admin {
    /// Every metric.
    pub registry: Arc<Registry>,
    /// What the collector published last.
    pub view: Arc<Mutex<WireView>>,
    /// What sockets told.
    pub connections: Arc<Connections>,
    /// How far the process is.
    pub serving: Arc<Serving>,
    /// Opens what changes the gateway.
    pub token: Token,
    /// Brings the file into force again.
    pub reloader: Arc<Reloader>,
    /// Hands over to another process.
    pub giver: Arc<Giver>,
    /// What is alive.
    pub census: Arc<Census>,
    /// Where CPU time goes.
    pub profiler: Arc<Profiler>,
    /// What `POST /cache/purge` empties.
    pub cache: &'static Store,
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let request = session.req_header();
        let (method, path) = (request.method.clone(), request.uri.path().to_owned());
        if matches!(
            path.as_str(),
            "/config"
                | "/reload"
                | "/upgrade"
                | "/connections"
                | "/events"
                | "/tasks"
                | "/profile"
                | "/cache/purge"
        ) {
            let given = request.headers.get(header::AUTHORIZATION);
            if !self
                .token
                .authorizes(given.map(header::HeaderValue::as_bytes))
            {
                return answer(401, "text/plain", UNAUTHORIZED.into());
            }
            let query = request.uri.query().unwrap_or("").to_owned();
            return self.control(&method, &path, &query).await;
        }
        match path.as_str() {
            "/" => answer(200, "text/html; charset=utf-8", PAGE.into()),
            "/metrics" => self.metrics(),
            "/livez" => answer(200, "text/plain", "ok\n".into()),
            "/readyz" => self.readiness(),
            _ => answer(
                404,
                "text/plain",
                "not here; try /, /metrics, /livez or /readyz\n".into(),
            ),
        }
    }
}

const UNAUTHORIZED: &str =
    "send `Authorization: Bearer TOKEN` with the token from the file admin.token_file names\n";

/// For who has the token.
impl Admin {
    async fn control(&self, method: &Method, path: &str, query: &str) -> Response<Vec<u8>> {
        match (method, path) {
            (&Method::GET, "/config") => {
                answer(200, "application/toml", self.reloader.text().to_string())
            }
            (&Method::GET, "/connections") => self.connections(query),
            (&Method::GET, "/events") => json(&self.connections.events()),
            (&Method::POST, "/reload") => {
                let reloader = Arc::clone(&self.reloader);
                match tokio::task::spawn_blocking(move || reloader.reload()).await {
                    Ok(Ok(changes)) => {
                        let lines = changes.iter().map(|change| format!("{change}\n"));
                        answer(200, "text/plain", lines.collect())
                    }
                    Ok(Err(refused)) => answer(409, "text/plain", format!("{refused}\n")),
                    Err(panicked) => answer(500, "text/plain", format!("{panicked}\n")),
                }
            }
            (&Method::GET, "/tasks") => self.tasks(),
            (&Method::GET, "/profile") => self.profile(query).await,
            (&Method::POST, "/upgrade") => {
                let giver = Arc::clone(&self.giver);
                match tokio::task::spawn_blocking(move || giver.upgrade()).await {
                    Ok(Ok(pid)) => answer(
                        200,
                        "text/plain",
                        format!("process {pid} serves; the one before it drains\n"),
                    ),
                    Ok(Err(failed)) => answer(409, "text/plain", format!("{failed}\n")),
                    Err(panicked) => answer(500, "text/plain", format!("{panicked}\n")),
                }
            }
            (&Method::POST, "/cache/purge") => match selection(query) {
                Ok(selection) => {
                    let count = self.cache.purge(&selection);
                    log::info!("cache: {count} responses purged: {query}");
                    answer(200, "application/json", format!("{{\"purged\":{count}}}\n"))
                }
                Err(wrong) => answer(400, "text/plain", wrong),
            },
            _ => answer(
                405,
                "text/plain",
                "GET /config, /connections, /events, /tasks or /profile, or POST /reload, \
                 /upgrade or /cache/purge\n"
                    .into(),
            ),
        }
    }
}

impl Admin {
    fn metrics(&self) -> Response<Vec<u8>> {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => answer(
                200,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            Err(error) => answer(
                500,
                "text/plain",
                format!("cannot encode metrics: {error}\n"),
            ),
        }
    }

    fn connections(&self, query: &str) -> Response<Vec<u8>> {
        match Filter::from_query(query) {
            Ok(filter) => json(&self.connections.rows(&filter, monotonic_ns())),
            Err(error) => answer(400, "text/plain", format!("{error}\n")),
        }
    }

    /// Ready means serving; a degraded observer is said, not hidden, and does not fail it.
    fn readiness(&self) -> Response<Vec<u8>> {
        let status = match (self.serving.is_leaving(), self.serving.is_serving()) {
            (true, _) => Some("leaving"),
            (false, false) => Some("starting"),
            (false, true) => None,
        };
        if let Some(status) = status {
            let body = serde_json::json!({ "status": status });
            return answer(503, "application/json", format!("{body}\n"));
        }
        let (degraded, ledger) = {
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            (view.degraded.clone(), view.ledger_error.clone())
        };
        let mut body = match degraded {
            None => serde_json::json!({ "status": "ready", "observer": "attached" }),
            Some(reason) => {
                serde_json::json!({ "status": "ready", "observer": "degraded", "reason": reason })
            }
        };
        if let Some(error) = ledger {
            body["ledger"] = error.into();
        }
        let last = self.reloader.last();
        body["configuration"] = serde_json::json!({
            "generation": self.reloader.number(),
            "last_reload_unix_seconds": last.unix_seconds,
            "last_reload_refused": last.refused,
        });
        for feature in &self.connections.features {
            if let Err(why) = &feature.result {
                body["missing"][feature.name] = serde_json::json!({
                    "why": why, "lost": feature.lost
                });
            }
        }
        answer(200, "application/json", format!("{body}\n"))
    }
}

impl Admin {
    /// What is alive, and the oldest of it.
    fn tasks(&self) -> Response<Vec<u8>> {
        let body = serde_json::json!({
            "counts": self.census.counts(),
            "ages_seconds": AGES.map(|age| age.as_secs()),
            "oldest": self.census.oldest(OLDEST),
        });
        answer(200, "application/json", format!("{body}\n"))
    }

    /// `seconds=…`, 10 when it is not said.
    async fn profile(&self, query: &str) -> Response<Vec<u8>> {
        let seconds = match query.strip_prefix("seconds=") {
            None if query.is_empty() => Ok(PROFILE_SECONDS),
            // Out of range, like any number that is.
            Some(text) => Ok(text.parse().unwrap_or(0)),
            None => Err(()),
        };
        let Ok(seconds) = seconds else {
            return answer(
                400,
                "text/plain",
                "give seconds, such as ?seconds=10\n".into(),
            );
        };
        let profiler = Arc::clone(&self.profiler);
        match tokio::task::spawn_blocking(move || profiler.take(seconds)).await {
            Ok(Ok(svg)) => answer(200, "image/svg+xml", svg),
            Ok(Err(error)) => {
                let status = match error {
                    ProfileError::Seconds => 400,
                    ProfileError::UnderWay => 409,
                    ProfileError::Sampling(_) => 500,
                };
                answer(status, "text/plain", format!("{error}\n"))
            }
            Err(panicked) => answer(500, "text/plain", format!("{panicked}\n")),
        }
    }
}

/// `tenant=…&route=…&url=…&url_prefix=…`, percent-encoded; `all=true` for everything.
fn selection(query: &str) -> Result<Selection, String> {
    const USE: &str = "give tenant, route, url or url_prefix, or all=true\n";
    let mut selection = Selection::default();
    let mut given = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or(USE)?;
        let value = Some(percent_decoded(value).ok_or(USE)?);
        given = true;
        match name {
            "tenant" => selection.tenant = value,
            "route" => selection.route = value,
            "url" => selection.url = value,
            "url_prefix" => selection.url_prefix = value,
            "all" if value.as_deref() == Some("true") => {}
            _ => return Err(USE.to_owned()),
        }
    }
    if given {
        Ok(selection)
    } else {
        Err(USE.to_owned())
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

fn json<T: serde::Serialize>(rows: &[T]) -> Response<Vec<u8>> {
    // A row a line: people read it, and grep does.
    let mut text = String::from("[");
    for (index, row) in rows.iter().enumerate() {
        text.push_str(if index == 0 { "\n" } else { ",\n" });
        match serde_json::to_string(row) {
            Ok(row) => text.push_str(&row),
            Err(error) => return answer(500, "text/plain", format!("{error}\n")),
        }
    }
    text.push_str("\n]\n");
    answer(200, "application/json", text)
}

fn answer(status: u16, content_type: &str, body: String) -> Response<Vec<u8>> {
    let mut response = Response::new(Vec::new());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_LENGTH,
        header::HeaderValue::from(body.len()),
    );
    // The page is one file and talks to nobody but this port.
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        header::HeaderValue::from_static(
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
             connect-src 'self'; img-src data:",
        ),
    );
    if let Ok(value) = header::HeaderValue::from_str(content_type) {
        headers.insert(header::CONTENT_TYPE, value);
    }
    *response.body_mut() = body.into_bytes();
    response
}
