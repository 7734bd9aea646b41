//! A small HTTP load: what the demo and the integration tests send through the gateway. Bounded
//! in requests and in time; it checks every answer it gets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response, body::Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::netns::Namespace;

/// No single answer may take longer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

/// How a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1, keep-alive.
    Http1,
    /// HTTP/2: with prior knowledge on plain text, by ALPN on TLS.
    Http2,
}

/// One kind of request.
#[derive(Clone, Debug)]
pub struct Template {
    /// What the summary calls it.
    pub name: &'static str,
    /// Method.
    pub method: Method,
    /// Path; `{n}` becomes a number that never repeats within a run.
    pub path: String,
    /// Headers; `{n}` likewise.
    pub headers: Vec<(&'static str, String)>,
    /// Body; `{n}` likewise.
    pub body: String,
    /// The only status that is right.
    pub status: u16,
}

impl Template {
    /// A GET that must answer 200.
    #[must_use]
    pub fn get(name: &'static str, path: impl Into<String>) -> Self {
        Self {
            name,
            method: Method::GET,
            path: path.into(),
            headers: vec![],
            body: String::new(),
            status: 200,
        }
    }

    /// A POST that must answer `status`.
    #[must_use]
    pub fn post(
        name: &'static str,
        path: impl Into<String>,
        body: impl Into<String>,
        status: u16,
    ) -> Self {
        Self {
            method: Method::POST,
            body: body.into(),
            status,
            ..Self::get(name, path)
        }
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A load.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where to connect.
    pub address: SocketAddr,
    /// How to speak.
    pub protocol: Protocol,
    /// The root to trust; None is plain text.
    pub root: Option<CertificateDer<'static>>,
    /// Connections at once, each with one request under way (HTTP/2: four).
    pub connections: u32,
    /// Requests in all; the load ends at this or at `deadline`, whichever is first.
    pub requests: u64,
    /// When to stop asking.
    pub deadline: Duration,
    /// Requests a connection makes before it is closed and made anew.
    pub per_connection: u64,
    /// What to ask, in turns.
    pub templates: Vec<Template>,
    /// Ends the load early when set.
    pub stop: Arc<AtomicBool>,
}

/// What one template got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Answers.
    pub requests: u64,
    /// Body bytes sent.
    pub sent_bytes: u64,
    /// Body bytes received.
    pub received_bytes: u64,
}

/// What all templates got, by name.
pub type Summary = BTreeMap<&'static str, Answers>;

/// Runs the load from a namespace.
///
/// # Errors
/// The first wrong status, failed connection or late answer, with its request.
pub fn run(namespace: &Namespace, plan: &Plan) -> Result<Summary> {
    namespace.run(|| run_here(plan))?
}

/// Runs the load from the namespace the calling thread is in.
///
/// # Errors
/// As [`run`].
pub fn run_here(plan: &Plan) -> Result<Summary> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the load's runtime")?
        .block_on(Load::new(plan)?.run())
}

/// A template and the request made from it.
type Asked<'a> = (&'a Template, Request<Full<Bytes>>);

struct Load {
    plan: Plan,
    tls: Option<TlsConnector>,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Made, and not sent.
    unsent: Vec<(usize, Request<Full<Bytes>>)>,
    next: u64,
    summary: Summary,
}

impl Load {
    fn new(plan: &Plan) -> Result<Arc<Self>> {
        let tls = plan
            .root
            .as_ref()
            .map(|root| connector(root, plan.protocol))
            .transpose()?;
        Ok(Arc::new(Self {
            plan: plan.clone(),
            tls,
            started: Instant::now(),
            state: Mutex::default(),
        }))
    }

    async fn run(self: Arc<Self>) -> Result<Summary> {
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..self.plan.connections {
            workers.spawn(Arc::clone(&self).worker());
        }
        while let Some(worker) = workers.join_next().await {
            worker.context("a load worker panicked")??;
        }
        Ok(self.state().summary.clone())
    }

    async fn worker(self: Arc<Self>) -> Result<()> {
        while self.more() {
            let stream = TcpStream::connect(self.plan.address)
                .await
                .with_context(|| format!("connecting to {}", self.plan.address))?;
            stream.set_nodelay(true).context("TCP_NODELAY")?;
            match &self.tls {
                None => self.connection(TokioIo::new(stream)).await?,
                Some(tls) => {
                    let name = ServerName::from(self.plan.address.ip());
                    let stream = tls.connect(name, stream).await.context("TLS handshake")?;
                    self.connection(TokioIo::new(stream)).await?;
                }
            }
        }
        Ok(())
    }

    async fn connection<I>(&self, io: I) -> Result<()>
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        match self.plan.protocol {
            Protocol::Http1 => {
                let (mut sender, connection) = http1::handshake(io).await.context("HTTP/1.1")?;
                let driver = tokio::spawn(connection);
                for _ in 0..self.plan.per_connection {
                    // Closed after an answer, as the server may: the next one goes elsewhere.
                    if sender.ready().await.is_err() {
                        break;
                    }
                    let Some((template, request)) = self.next_request()? else {
                        break;
                    };
                    let name = template.name;
                    let answer =
                        tokio::time::timeout(ANSWER_DEADLINE, sender.send_request(request));
                    let answer = answer.await.with_context(|| format!("{name}: no answer"))?;
                    self.check(template, answer.with_context(|| name.to_owned())?)
                        .await?;
                }
                drop(sender);
                let _ = driver.await;
            }
            Protocol::Http2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
                    .await
                    .context("HTTP/2")?;
                let driver = tokio::spawn(connection);
                let mut made = 0;
                while made < self.plan.per_connection {
                    // Four streams at once, so that they share frames.
                    let mut answers = vec![];
                    for _ in 0..4 {
                        let Some((template, request)) = self.next_request()? else {
                            break;
                        };
                        let mut sender = sender.clone();
                        if sender.ready().await.is_err() {
                            // GOAWAY: this one goes to the next connection.
                            self.put_back(template, request);
                            break;
                        }
                        let again = request.clone();
                        answers.push((template, again, sender.try_send_request(request)));
                        made += 1;
                    }
                    if answers.is_empty() {
                        break;
                    }
                    for (template, again, answer) in answers {
                        let answer = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
                        let answer =
                            answer.with_context(|| format!("{}: no answer", template.name))?;
                        match answer {
                            Ok(answer) => self.check(template, answer).await?,
                            Err(mut error) => {
                                // Never sent, because of a GOAWAY: safe to send again.
                                if error.take_message().is_none() {
                                    return Err(error.into_error()).context(template.name);
                                }
                                self.put_back(template, again);
                            }
                        }
                    }
                }
                drop(sender);
                let _ = driver.await;
            }
        }
        Ok(())
    }

    async fn check(&self, template: &Template, answer: Response<Incoming>) -> Result<()> {
        let status = answer.status().as_u16();
        let body = tokio::time::timeout(ANSWER_DEADLINE, answer.into_body().collect())
            .await
            .with_context(|| format!("{}: the body does not end", template.name))?
            .with_context(|| format!("{}: body", template.name))?
            .to_bytes();
        if status != template.status {
            let text: String = String::from_utf8_lossy(&body).chars().take(300).collect();
            bail!(
                "{}: status {status}, not {}: {text}",
                template.name,
                template.status
            );
        }
        let mut state = self.state();
        let answers = state.summary.entry(template.name).or_default();
        answers.requests += 1;
        answers.received_bytes += body.len() as u64;
        Ok(())
    }

    fn more(&self) -> bool {
        if !self.state().unsent.is_empty() {
            return true;
        }
        !self.plan.stop.load(Ordering::Relaxed)
            && self.state().next < self.plan.requests
            && self.started.elapsed() < self.plan.deadline
    }

    fn put_back(&self, template: &Template, request: Request<Full<Bytes>>) {
        let templates = self.plan.templates.iter();
        let mut turns = templates.enumerate();
        let turn = turns.find(|(_, known)| std::ptr::eq(*known, template));
        if let Some((turn, _)) = turn {
            self.state().unsent.push((turn, request));
        }
    }

    fn next_request(&self) -> Result<Option<Asked<'_>>> {
        if let Some((turn, request)) = self.state().unsent.pop() {
            return Ok(Some((&self.plan.templates[turn], request)));
        }
        if !self.more() {
            return Ok(None);
        }
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        let turn = usize::try_from(number).unwrap_or(0) % self.plan.templates.len();
        let template = &self.plan.templates[turn];
        let fill = |text: &str| text.replace("{n}", &number.to_string());
        let body = fill(&template.body);
        let address = self.plan.address;
        let uri = match self.plan.protocol {
            Protocol::Http1 => fill(&template.path),
            // HTTP/2 has no Host header: the authority is in the URI.
            Protocol::Http2 => {
                let scheme = if self.tls.is_some() { "https" } else { "http" };
                format!("{scheme}://{address}{}", fill(&template.path))
            }
        };
        let mut request = Request::builder().method(template.method.clone()).uri(uri);
        if self.plan.protocol == Protocol::Http1 {
            request = request.header("host", address.to_string());
        }
        for (name, value) in &template.headers {
            request = request.header(*name, fill(value));
        }
        state.summary.entry(template.name).or_default().sent_bytes += body.len() as u64;
        let request = request
            .body(Full::new(Bytes::from(body)))
            .context("building a request")?;
        Ok(Some((template, request)))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn connector(root: &CertificateDer<'static>, protocol: Protocol) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots
        .add(root.clone())
        .context("the load's root certificate")?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS versions")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![match protocol {
        Protocol::Http1 => b"http/1.1".to_vec(),
        Protocol::Http2 => b"h2".to_vec(),
    }];
    Ok(TlsConnector::from(Arc::new(config)))
}
