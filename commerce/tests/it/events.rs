//! Events reach the risk service and subscribers: in batches, at least once, over crashes.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode as Code};
use axum::routing::post;
use commerce::store::sql::Backend;
use commerce::webhook::{self, Secret};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::harness::{Database, InProcess, Process, eventually, header, product};

/// What a sink got, and how it behaves.
#[derive(Default)]
struct Received {
    /// Sizes of accepted batches.
    batches: Vec<usize>,
    /// How often each event came.
    events: HashMap<String, usize>,
    bodies: Vec<Value>,
    signatures: Vec<(HeaderMap, Vec<u8>)>,
    /// Answer this many requests with 500 first.
    failures: usize,
    /// Refuse batches that contain the event of this order.
    poison: Option<String>,
    /// Hold answers back: the request is taken, and the answer never comes.
    mute: bool,
}

#[derive(Clone, Default)]
pub struct Sink(Arc<Mutex<Received>>);

impl Sink {
    /// Starts it; returns its address.
    pub async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}/")
    }

    /// The same behind TLS with this certificate.
    async fn start_tls(&self, certificate: &xtask::certificate::Certificate) -> String {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let chain = CertificateDer::pem_file_iter(&certificate.certificate).unwrap();
        let chain = chain.map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(&certificate.key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let listener = Tls {
            tcp: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            acceptor: TlsAcceptor::from(Arc::new(config)),
        };
        let address = listener.tcp.local_addr().unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("https://{address}/")
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/", post(take))
            .with_state(self.clone())
    }

    /// The events it was told.
    pub fn bodies(&self) -> Vec<Value> {
        self.with(|received| received.bodies.clone())
    }

    fn with<T>(&self, look: impl FnOnce(&mut Received) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }
}

/// Accepts connections whose handshake succeeds.
struct Tls {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (tcp, address) = self.tcp.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(tcp).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

async fn take(State(sink): State<Sink>, headers: HeaderMap, body: Bytes) -> Code {
    let value: Value = serde_json::from_slice(&body).unwrap();
    let events = match value.get("events") {
        Some(events) => events.as_array().unwrap().clone(),
        None => vec![value],
    };
    let mute = sink.with(|received| {
        if received.failures > 0 {
            received.failures -= 1;
            return Err(Code::INTERNAL_SERVER_ERROR);
        }
        if let Some(poison) = &received.poison
            && events.iter().any(|event| event["order_id"] == **poison)
        {
            return Err(Code::UNPROCESSABLE_ENTITY);
        }
        received.batches.push(events.len());
        received.signatures.push((headers, body.to_vec()));
        for event in &events {
            let id = event["id"].as_str().unwrap().to_owned();
            *received.events.entry(id).or_default() += 1;
        }
        received.bodies.extend(events);
        Ok(received.mute)
    });
    match mute {
        Err(status) => status,
        Ok(true) => std::future::pending().await,
        Ok(false) => Code::NO_CONTENT,
    }
}

async fn every_event_arrives_in_batches_although_the_sink_fails_at_first(on: Backend) {
    const ORDERS: usize = 120;
    let sink = Sink::default();
    sink.with(|received| received.failures = 3);
    let url = sink.start().await;
    let service = InProcess::with(on, &[product("a", 1000)], |config| {
        config.risk_url = Some(url);
    })
    .await;
    let mut orders = tokio::task::JoinSet::new();
    for n in 0..ORDERS {
        let api = service.api.clone();
        orders.spawn(async move { api.place(&format!("k{n}"), &[("a", 1)]).await.status() });
    }
    assert!(
        orders
            .join_all()
            .await
            .iter()
            .all(|status| *status == StatusCode::CREATED)
    );
    eventually("all events arrive", async || {
        sink.with(|received| received.events.len() == ORDERS)
            .then_some(())
    })
    .await;
    let database = service.stop_and_audit().await;
    sink.with(|received| {
        assert!(received.batches.iter().all(|&events| events <= 50));
        assert!(
            received.batches.iter().any(|&events| events > 1),
            "{:?}",
            received.batches
        );
    });
    assert_eq!(database.count("SELECT count(*) FROM dead_letter"), 0);
}

/// A sink that is down is behind by the age of its oldest event, and by nothing once it has it.
async fn a_sink_that_is_down_is_seen_to_be_behind(on: Backend) {
    const LAG: &str = "commerce_outbox_oldest_event_age_seconds{sink=\"risk\"}";
    let sink = Sink::default();
    sink.with(|received| received.failures = usize::MAX);
    let url = sink.start().await;
    let service = InProcess::with(on, &[product("a", 10)], |config| {
        config.risk_url = Some(url);
    })
    .await;
    let lag = async || {
        let text = service.api.get("/metrics").await.text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(LAG));
        line.unwrap().trim().parse::<f64>().unwrap()
    };
    let placed = service.api.place("k", &[("a", 1)]).await;
    assert_eq!(placed.status(), StatusCode::CREATED);
    eventually("the sink is behind", async || {
        (lag().await > 0.0).then_some(())
    })
    .await;
    sink.with(|received| received.failures = 0);
    eventually("it has caught up", async || {
        (lag().await == 0.0).then_some(())
    })
    .await;
    assert_eq!(sink.bodies().len(), 1);
    service.stop_and_audit().await;
}

async fn poison_becomes_a_dead_letter_and_does_not_hold_up_the_rest(on: Backend) {
    let sink = Sink::default();
    let url = sink.start().await;
    let service = InProcess::with(on, &[product("a", 1000)], |config| {
        config.risk_url = Some(url);
    })
    .await;
    let poisoned: Value = service
        .api
        .place("k0", &[("a", 1)])
        .await
        .json()
        .await
        .unwrap();
    sink.with(|received| received.poison = Some(poisoned["id"].as_str().unwrap().to_owned()));
    let mut others = BTreeSet::new();
    for n in 1..20 {
        let order: Value = service
            .api
            .place(&format!("k{n}"), &[("a", 1)])
            .await
            .json()
            .await
            .unwrap();
        others.insert(order["id"].as_str().unwrap().to_owned());
    }
    eventually("the rest arrives", async || {
        let arrived: BTreeSet<String> = sink.with(|received| {
            let orders = received
                .bodies
                .iter()
                .map(|event| event["order_id"].as_str().unwrap());
            orders.map(str::to_owned).collect()
        });
        others.is_subset(&arrived).then_some(())
    })
    .await;
    // The event that arrived before it was called poison leaves none.
    let was_in_time = sink.with(|received| {
        received
            .bodies
            .iter()
            .any(|event| event["order_id"] == poisoned["id"])
    });
    if !was_in_time {
        eventually("it is a dead letter", async || {
            let dead = service.database.count("SELECT count(*) FROM dead_letter");
            (dead == 1).then_some(())
        })
        .await;
    }
    service.stop_and_audit().await;
}

/// The process dies with requests in flight: taken by the sink, and never answered.
async fn killed_with_batches_in_flight_it_sends_them_again(on: Backend) {
    const ORDERS: usize = 130;
    let sink = Sink::default();
    sink.with(|received| received.mute = true);
    let url = sink.start().await;
    let database = Database::with(on, &[product("a", 1000)]).await;
    let process = Process::start(&database, &["--risk-url", &url]);
    for n in 0..ORDERS {
        let placed = process.api.place(&format!("k{n}"), &[("a", 1)]).await;
        assert_eq!(placed.status(), StatusCode::CREATED);
    }
    eventually("a batch is in flight", async || {
        sink.with(|received| !received.batches.is_empty())
            .then_some(())
    })
    .await;
    process.kill();
    // What was taken by the dead process's requests is forgotten: it was never answered.
    sink.with(|received| {
        received.mute = false;
        received.events.clear();
    });
    if on == Backend::Postgres {
        // The dead machine's claims run out; here they do so now.
        database.execute("UPDATE delivery SET leased_until_ms = 0 WHERE delivered_at_ms IS NULL");
    }
    let process = Process::start(&database, &["--risk-url", &url]);
    eventually("every event arrives", async || {
        sink.with(|received| received.events.len() == ORDERS)
            .then_some(())
    })
    .await;
    process.terminate();
    assert!(process.wait().success());
    database.assert_audit_clean();
}

async fn subscribers_get_their_own_events_signed(on: Backend) {
    let sink = Sink::default();
    let url = sink.start().await;
    let service = InProcess::start(on, &[product("a", 10)]).await;
    let subscribe = || {
        service
            .api
            .request(Method::POST, "/api/v1/webhooks")
            .header("x-tenant", "acme")
            .header("idempotency-key", "w1")
            .json(&json!({ "url": url }))
            .send()
    };
    let subscribed = subscribe().await.unwrap();
    assert_eq!(subscribed.status(), StatusCode::CREATED);
    let subscription: Value = subscribed.json().await.unwrap();
    assert_eq!(
        subscribe().await.unwrap().json::<Value>().await.unwrap(),
        subscription
    );
    for tenant in ["acme", "globex"] {
        let request = service.api.request(Method::POST, "/api/v1/orders");
        let placed = request
            .header("x-tenant", tenant)
            .header("idempotency-key", "k")
            .json(&json!({ "lines": [{ "sku": "a", "quantity": 1 }] }))
            .send();
        assert_eq!(placed.await.unwrap().status(), StatusCode::CREATED);
    }
    eventually("the event arrives", async || {
        sink.with(|received| (received.events.len() == 1).then_some(()))
    })
    .await;
    let secret = Secret::parse(subscription["secret"].as_str().unwrap()).unwrap();
    let (headers, body) = sink.with(|received| received.signatures[0].clone());
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let now = text(webhook::TIMESTAMP).unwrap().parse().unwrap();
    let verified = secret.verify(
        text(webhook::ID),
        text(webhook::TIMESTAMP),
        text(webhook::SIGNATURE),
        &body,
        now,
    );
    assert_eq!(verified, Ok(()));
    let event: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(event["type"], "order.placed");
    assert!(
        text("traceparent")
            .unwrap()
            .contains(event["trace_id"].as_str().unwrap())
    );

    let end = |tenant: &'static str| {
        let id = subscription["id"].as_str().unwrap();
        service
            .api
            .request(Method::DELETE, &format!("/api/v1/webhooks/{id}"))
            .header("x-tenant", tenant)
            .send()
    };
    assert_eq!(end("globex").await.unwrap().status(), StatusCode::NOT_FOUND);
    assert_eq!(end("acme").await.unwrap().status(), StatusCode::NO_CONTENT);
    let left = service.api.get_json("/api/v1/webhooks").await;
    assert_eq!(left, json!([]));
    let placed = service.api.place("k9", &[("a", 1)]).await;
    assert_eq!(header(&placed, "content-type"), "application/json");
    service.stop_and_audit().await;
}

crate::on_both_stores!(
    a_sink_that_is_down_is_seen_to_be_behind,
    every_event_arrives_in_batches_although_the_sink_fails_at_first,
    poison_becomes_a_dead_letter_and_does_not_hold_up_the_rest,
    killed_with_batches_in_flight_it_sends_them_again,
    subscribers_get_their_own_events_signed,
);

/// A subscriber behind TLS whose authority the operator named gets its events; one whose
/// certificate nobody vouches for gets none, and they wait.
#[tokio::test(flavor = "multi_thread")]
async fn subscribers_behind_tls_are_told_when_their_certificate_is_trusted() {
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [known, unknown] = directories.each_ref().map(|directory| {
        xtask::certificate::write(directory.path(), &["127.0.0.1".parse().unwrap()]).unwrap()
    });
    let service = InProcess::with(Backend::Sqlite, &[product("a", 10)], |config| {
        config.sink_ca = Some(known.certificate.clone());
    })
    .await;
    let sinks = [Sink::default(), Sink::default()];
    for (sink, certificate) in sinks.iter().zip([&known, &unknown]) {
        let url = sink.start_tls(certificate).await;
        let subscribed = service
            .api
            .request(Method::POST, "/api/v1/webhooks")
            .header(
                "idempotency-key",
                url.rsplit(':').next().unwrap().trim_matches('/'),
            )
            .json(&json!({ "url": url }))
            .send()
            .await
            .unwrap();
        assert_eq!(subscribed.status(), StatusCode::CREATED);
    }
    service.api.place("k", &[("a", 1)]).await;
    eventually("the trusted one is told", async || {
        sinks[0].with(|received| (received.events.len() == 1).then_some(()))
    })
    .await;
    let failed = "commerce_event_delivery_failures_total{sink=\"webhook\"}";
    eventually("the other one is refused", async || {
        (service.api.metric(failed).await > 0).then_some(())
    })
    .await;
    assert_eq!(sinks[1].with(|received| received.events.len()), 0);
    service.stop_and_audit().await;
}
