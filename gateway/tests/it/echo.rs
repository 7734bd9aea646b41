//! An upstream on loopback that says what it was asked, and misbehaves when told to.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};

/// What a server was told, and what it has seen.
#[derive(Default)]
pub struct Mood {
    pub name: String,
    /// Answer everything (but checks) with this; 0: as asked.
    pub status: AtomicU16,
    /// Answer checks with this; 0: 200.
    pub health: AtomicU16,
    /// Before each answer.
    pub delay_ms: AtomicU64,
    pub requests: AtomicU64,
    pub checks: AtomicU64,
    /// `METHOD path body-length`.
    pub seen: Mutex<Vec<String>>,
}

/// Serves until dropped; then every connection breaks, as when a process is killed.
pub struct Echo {
    pub address: SocketAddr,
    pub mood: Arc<Mood>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Echo {
    pub fn start(name: &str) -> Self {
        Self::start_at(name, "127.0.0.1:0".parse().unwrap())
    }

    pub fn start_at(name: &str, address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let mood = Arc::new(Mood {
            name: name.to_owned(),
            ..Mood::default()
        });
        let listener = {
            let _inside = runtime.enter();
            let listener = TcpListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            tokio::net::TcpListener::from_std(listener).unwrap()
        };
        let address = listener.local_addr().unwrap();
        let served = Arc::clone(&mood);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let mood = Arc::clone(&served);
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&mood), request));
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            mood,
            runtime: Some(runtime),
        }
    }

    pub fn requests(&self) -> u64 {
        self.mood.requests.load(Ordering::SeqCst)
    }

    /// Breaks every connection and stops listening.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn answer(
    mood: Arc<Mood>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let target = head.uri.path_and_query().unwrap().to_string();
    let Ok(body) = body.collect().await else {
        return Ok(Response::default());
    };
    let body = body.to_bytes();
    if head.uri.path() == "/livez" {
        mood.checks.fetch_add(1, Ordering::SeqCst);
        let status = mood.health.load(Ordering::SeqCst);
        return Ok(respond(
            if status == 0 { 200 } else { status },
            "live",
            &mood.name,
        ));
    }
    if head.uri.path() == "/grpc.health.v1.Health/Check" {
        mood.checks.fetch_add(1, Ordering::SeqCst);
        let serving = if mood.health.load(Ordering::SeqCst) == 0 {
            1
        } else {
            2
        };
        let mut response = respond(200, "", &mood.name);
        let message = vec![0, 0, 0, 0, 2, 0x08, serving];
        *response.body_mut() = Full::new(Bytes::from(message));
        let headers = response.headers_mut();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        headers.insert("grpc-status", "0".parse().unwrap());
        return Ok(response);
    }
    mood.requests.fetch_add(1, Ordering::SeqCst);
    let line = format!("{} {target} {}", head.method, body.len());
    mood.seen.lock().unwrap().push(line);
    let delay = mood.delay_ms.load(Ordering::SeqCst);
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    let status = mood.status.load(Ordering::SeqCst);
    let headers: serde_json::Map<String, serde_json::Value> = head
        .headers
        .iter()
        .map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.to_string(), value.into())
        })
        .collect();
    let said = serde_json::json!({
        "server": mood.name,
        "method": head.method.as_str(),
        "target": target,
        "headers": headers,
        "body_bytes": body.len(),
    });
    Ok(respond(
        if status == 0 { 200 } else { status },
        &said.to_string(),
        &mood.name,
    ))
}

fn respond(status: u16, body: &str, name: &str) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header("server", name)
        .header("x-server", name)
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap()
}
