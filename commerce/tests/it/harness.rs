//! A service in this process or in its own, its client, and what tests ask of both.

use std::future::Future;
use std::io::{BufRead as _, BufReader, Write as _};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use commerce::app::{Service, ServiceError};
use commerce::audit::audit;
use commerce::catalogue::{NewProduct, Sku};
use commerce::config::Config;
use commerce::metrics::Metrics;
use commerce::money::{Currency, Money};
use commerce::store::sql::Backend;
use commerce::store::{Limits, Store, Target};
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

/// A database of a test's own, on either store.
pub struct Database {
    pub target: Target,
    directory: TempDir,
}

impl Database {
    /// An empty one.
    pub fn empty(on: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let target = match on {
            Backend::Sqlite => Target::Sqlite(directory.path().join("commerce.db")),
            Backend::Postgres => {
                let server = xtask::server::Postgres::shared().unwrap();
                Target::Postgres(server.create_database().unwrap())
            }
        };
        Self { target, directory }
    }

    /// One with these products, and nobody using it.
    pub async fn with(on: Backend, products: &[NewProduct]) -> Self {
        let database = Self::empty(on);
        let (target, products) = (database.target.clone(), products.to_vec());
        let opened = tokio::task::spawn_blocking(move || {
            Store::open(&target, limits(1), &products, &Metrics::new()).unwrap()
        });
        opened.await.unwrap().1.stop().await.unwrap();
        database
    }

    /// The file, on SQLite.
    pub fn path(&self) -> &Path {
        match &self.target {
            Target::Sqlite(path) => path,
            Target::Postgres(_) => panic!("this test is about the file"),
        }
    }

    /// A directory that goes with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What `--store` takes.
    pub fn argument(&self) -> String {
        match &self.target {
            Target::Sqlite(path) => format!("sqlite:{}", path.display()),
            Target::Postgres(url) => url.clone(),
        }
    }

    /// Fails with the whole report unless every promise is kept.
    pub fn assert_audit_clean(&self) {
        let target = self.target.clone();
        // Not on the runtime's thread: PostgreSQL's connection brings its own runtime.
        let report = std::thread::spawn(move || audit(&target).unwrap());
        let report = report.join().unwrap();
        assert!(report.is_clean(), "{report}");
    }

    /// Changes the database behind the service's back.
    pub fn execute(&self, sql: &str) {
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                connection.execute_batch(sql).unwrap();
            }
            Target::Postgres(url) => drop(psql(url, sql)),
        }
    }

    /// One number out of the database.
    pub fn count(&self, sql: &str) -> usize {
        match &self.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                let number = connection.query_row(sql, [], |row| row.get::<_, i64>(0));
                number.unwrap().try_into().unwrap()
            }
            Target::Postgres(url) => psql(url, sql).trim().parse().unwrap(),
        }
    }
}

fn psql(url: &str, sql: &str) -> String {
    let server = xtask::server::Postgres::shared().unwrap();
    let name = url.rsplit('/').next().unwrap();
    server.query(name, sql).unwrap()
}

/// Makes the writer wait until dropped.
pub struct WriteLock {
    _file: Option<rusqlite::Connection>,
    server: Option<Child>,
}

impl WriteLock {
    pub fn take(database: &Database) -> Self {
        match &database.target {
            Target::Sqlite(path) => {
                let connection = rusqlite::Connection::open(path).unwrap();
                connection.execute_batch("BEGIN IMMEDIATE").unwrap();
                Self {
                    _file: Some(connection),
                    server: None,
                }
            }
            Target::Postgres(url) => Self::hold(url, "LOCK TABLE idempotency; SELECT 'locked'"),
        }
    }

    /// PostgreSQL: keeps what `sql` locks; it must select the word `locked`.
    pub fn hold(url: &str, sql: &str) -> Self {
        let mut psql = Command::new("psql")
            .args(["-X", "-q", "-A", "-t", url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = psql.stdin.as_mut().unwrap();
        writeln!(input, "BEGIN; {sql};").unwrap();
        let mut line = String::new();
        let output = psql.stdout.as_mut().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "locked");
        Self {
            _file: None,
            server: Some(psql),
        }
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        if let Some(mut psql) = self.server.take() {
            // The end of its input ends the session, and the session's end the transaction.
            drop(psql.stdin.take());
            let _ = psql.wait();
        }
    }
}

/// Runs each of the tests on SQLite and on PostgreSQL.
#[macro_export]
macro_rules! on_both_stores {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(commerce::store::sql::Backend::Sqlite).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(commerce::store::sql::Backend::Postgres).await;
            })*
        }
    };
}

/// Repeats `attempt` until it gives a value. The deadline only turns a hang into a failure.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    // Mutants wait for what never happens.
    let patience = std::env::var("COMMERCE_TEST_PATIENCE_SECONDS").ok();
    let patience = patience.map_or(60, |seconds| seconds.parse().unwrap());
    let deadline = Instant::now() + Duration::from_secs(patience);
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
            client: {
                // reqwest asks the process for its cryptography; another test may have named it.
                let _ = rustls::crypto::ring::default_provider().install_default();
                Client::new()
            },
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

    /// Changes an order: `what` is cancel, pay or refund.
    pub async fn change(&self, location: &str, what: &str, key: &str, body: Value) -> Response {
        self.request(reqwest::Method::POST, &format!("{location}/{what}"))
            .header("idempotency-key", key)
            .json(&body)
            .send()
            .await
            .unwrap()
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

/// What a service in this process is configured with, unless a test wants otherwise.
pub fn configuration(database: &Database) -> Config {
    let Limits {
        queue_capacity,
        readers,
    } = limits(1024);
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        store: database.target.clone(),
        gate_url: None,
        risk_url: None,
        provider_url: None,
        sink_ca: None,
        shared_secret: None,
        provider_check: Duration::from_secs(30),
        hold: Duration::from_secs(900),
        keep: commerce::command::forget::Keep {
            keys: Duration::from_secs(86_400),
            events: Duration::from_secs(86_400),
        },
        membership_sku: Sku::parse("member-30d").unwrap(),
        campaigns: commerce::campaigns::Settings {
            file: None,
            assess_every: Duration::from_secs(3_600),
            good_after: Duration::from_secs(3_600),
        },
        issuer: "https://shop.test".to_owned(),
        audience: "shop".to_owned(),
        origins: Vec::new(),
        queue_capacity,
        readers,
        seed: true,
        drain_announce: Duration::ZERO,
        drain_timeout: Duration::from_secs(60),
    }
}

/// A service in this process, over a database of its own.
pub struct InProcess {
    pub api: Api,
    pub database: Database,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServiceError>>,
}

impl InProcess {
    pub async fn start(on: Backend, products: &[NewProduct]) -> Self {
        Self::with(on, products, |_| {}).await
    }

    /// With another configuration.
    pub async fn with(
        on: Backend,
        products: &[NewProduct],
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let database = if products.is_empty() {
            Database::empty(on)
        } else {
            Database::with(on, products).await
        };
        Self::over(database, configure).await
    }

    /// Over a database that exists.
    pub async fn over(database: Database, configure: impl FnOnce(&mut Config)) -> Self {
        let mut config = configuration(&database);
        configure(&mut config);
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
        }
    }

    /// Drains it and looks at nothing: another one uses its database.
    pub async fn stop_only(self) {
        self.stop.send(()).unwrap();
        self.running.await.unwrap().unwrap();
    }

    /// Drains it, proves its database, and gives it back.
    pub async fn stop_and_audit(self) -> Database {
        self.stop.send(()).unwrap();
        self.running.await.unwrap().unwrap();
        self.database.assert_audit_clean();
        self.database
    }
}

/// The executable, killed on drop.
pub struct Process {
    pub api: Api,
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Process {
    /// Starts `commerce serve` and waits until it logs its address.
    pub fn start(database: &Database, extra: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_commerce"))
            .args(["serve", "--listen", "127.0.0.1:0", "--store"])
            .arg(database.argument())
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
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        // A full pipe would block the service.
        std::thread::spawn(move || {
            for line in log.map_while(Result::ok) {
                kept.lock().unwrap().extend(serde_json::from_str(&line));
            }
        });
        Self {
            api: Api::new(&address),
            child,
            log: lines,
        }
    }

    /// Whether it has logged such a line since it listens.
    pub fn has_logged(&self, is_it: impl Fn(&Value) -> bool) -> bool {
        self.log.lock().unwrap().iter().any(is_it)
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
