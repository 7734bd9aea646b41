//! A service in this process or in its own, its client, and what tests ask of both.

use std::future::Future;
use std::io::{BufRead as _, BufReader};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use commerce::app::{Service, ServiceError};
use commerce::audit::audit;
use commerce::catalogue::{NewProduct, Sku};
use commerce::config::Config;
use commerce::metrics::Metrics;
use commerce::money::{Currency, Money};
use commerce::store::{Limits, Store};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A product with `initial` units at 19.99.
pub fn product(sku: &str, initial: u32) -> NewProduct {
    NewProduct {
        sku: Sku::parse(sku).unwrap(),
        name: format!("Product {sku}"),
        description: "A thing for tests.".to_owned(),
        price: Money::new(1999, Currency::CNY),
        initial,
    }
}

pub fn limits(queue_capacity: usize) -> Limits {
    Limits {
        queue_capacity: NonZeroUsize::new(queue_capacity).unwrap(),
        readers: NonZeroU32::new(2).unwrap(),
    }
}

/// A database with these products, and nobody using it.
pub async fn create_database(path: &Path, products: &[NewProduct]) {
    let (_, writer) = Store::open(path, limits(1), products, &Metrics::new()).unwrap();
    writer.stop().await.unwrap();
}

/// Fails with the whole report unless every promise is kept.
pub fn assert_audit_clean(path: &Path) {
    let report = audit(path).unwrap();
    assert!(report.is_clean(), "{report}");
}

/// One number out of the database.
pub fn count(path: &Path, sql: &str) -> usize {
    let connection = rusqlite::Connection::open(path).unwrap();
    let number = connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    number.unwrap().try_into().unwrap()
}

/// Holds the write lock until dropped, so that the writer waits in `BEGIN IMMEDIATE`.
pub struct WriteLock {
    _connection: rusqlite::Connection,
}

impl WriteLock {
    pub fn take(path: &Path) -> Self {
        let connection = rusqlite::Connection::open(path).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        Self {
            _connection: connection,
        }
    }
}

/// Repeats `attempt` until it gives a value. The deadline only turns a hang into a failure.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A client of one service.
#[derive(Clone)]
pub struct Api {
    client: Client,
    base: String,
}

impl Api {
    pub fn new(address: &str) -> Self {
        Self {
            client: Client::new(),
            base: format!("http://{address}"),
        }
    }

    pub fn address(&self) -> &str {
        self.base.strip_prefix("http://").unwrap()
    }

    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> Response {
        self.request(reqwest::Method::GET, path)
            .send()
            .await
            .unwrap()
    }

    pub async fn get_json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.json().await.unwrap()
    }

    /// Places an order of (SKU, quantity) lines, and lets the connection fail.
    pub async fn try_place(&self, key: &str, lines: &[(&str, u32)]) -> reqwest::Result<Response> {
        let lines: Vec<Value> = lines
            .iter()
            .map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity }))
            .collect();
        self.request(reqwest::Method::POST, "/api/v1/orders")
            .header("idempotency-key", key)
            .json(&json!({ "lines": lines }))
            .send()
            .await
    }

    pub async fn place(&self, key: &str, lines: &[(&str, u32)]) -> Response {
        self.try_place(key, lines).await.unwrap()
    }

    /// The value of one line of `/metrics`, or 0 when it is not there yet.
    pub async fn metric(&self, series: &str) -> u64 {
        let text = self.get("/metrics").await.text().await.unwrap();
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or(0)
    }
}

/// The header's value, or a failure naming it.
pub fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response
        .headers()
        .get(name)
        .unwrap_or_else(|| panic!("no {name}"))
        .to_str()
        .unwrap()
}

/// A service in this process, over a database of its own.
pub struct InProcess {
    pub api: Api,
    pub database: PathBuf,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServiceError>>,
    _directory: TempDir,
}

impl InProcess {
    pub async fn start(products: &[NewProduct]) -> Self {
        Self::with_queue(products, 1024).await
    }

    pub async fn with_queue(products: &[NewProduct], queue_capacity: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("commerce.db");
        create_database(&database, products).await;
        let Limits {
            queue_capacity,
            readers,
        } = limits(queue_capacity);
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            database: database.clone(),
            queue_capacity,
            readers,
            seed: true,
            drain_announce: Duration::ZERO,
            drain_timeout: Duration::from_secs(60),
        };
        let service = Service::start(&config).await.unwrap();
        let api = Api::new(&service.address().to_string());
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(service.run(async {
            let _ = stopped.await;
        }));
        Self {
            api,
            database,
            stop,
            running,
            _directory: directory,
        }
    }

    /// Drains it, proves its database, and gives back what keeps the file alive.
    pub async fn stop_and_audit(self) -> (PathBuf, TempDir) {
        self.stop.send(()).unwrap();
        self.running.await.unwrap().unwrap();
        assert_audit_clean(&self.database);
        (self.database, self._directory)
    }
}

/// The executable, killed on drop.
pub struct Process {
    pub api: Api,
    child: Child,
}

impl Process {
    /// Starts `commerce serve` and waits until it logs its address.
    pub fn start(database: &Path, extra: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_commerce"))
            .args(["serve", "--listen", "127.0.0.1:0", "--database"])
            .arg(database)
            .args(extra)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = log
            .find_map(|line| {
                // Every line of the log is JSON; one that is not fails the test here.
                let entry: Value = serde_json::from_str(&line.unwrap()).unwrap();
                entry["address"].as_str().map(str::to_owned)
            })
            .expect("the process ended before it listened");
        // A full pipe would block the service.
        std::thread::spawn(move || log.for_each(drop));
        Self {
            api: Api::new(&address),
            child,
        }
    }

    /// SIGKILL: no handler runs, nothing is flushed.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM: asks for a drain.
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
