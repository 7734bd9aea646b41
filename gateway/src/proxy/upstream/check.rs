//! Active checks: each peer is asked now and then, whether requests come or not.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::{Peer, Pool};
use crate::config::{CheckKind, HealthCheck};

/// Checks a pool's peers until the pool is gone.
pub async fn run(pool: Weak<Pool>) {
    loop {
        let interval = {
            let Some(pool) = pool.upgrade() else { return };
            let Some(check) = pool.settings.check.clone() else {
                return;
            };
            let check = Arc::new(check);
            // At once, so that one silent peer does not delay the verdict on another.
            let asked: Vec<_> = pool
                .peers()
                .into_iter()
                .map(|peer| tokio::spawn(verdict(Arc::clone(&pool), peer, Arc::clone(&check))))
                .collect();
            for asked in asked {
                let _ = asked.await;
            }
            check.interval
        };
        tokio::time::sleep(interval).await;
    }
}

async fn verdict(pool: Arc<Pool>, peer: Arc<Peer>, check: Arc<HealthCheck>) {
    let good = is_good(peer.address, &check).await;
    pool.checked(&peer, good);
}

/// Asks once.
pub async fn is_good(address: SocketAddr, check: &HealthCheck) -> bool {
    let answer = async {
        match &check.kind {
            CheckKind::Tcp => TcpStream::connect(address).await.is_ok(),
            CheckKind::Http { path, host } => {
                http(address, path, host.as_deref()).await.unwrap_or(false)
            }
            CheckKind::Grpc { service } => grpc(address, service).await.unwrap_or(false),
        }
    };
    let deadline: Duration = check.timeout;
    tokio::time::timeout(deadline, answer)
        .await
        .unwrap_or(false)
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

async fn http(address: SocketAddr, path: &str, host: Option<&str>) -> Result<bool, Failed> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let host = host.map_or_else(|| address.to_string(), str::to_owned);
    let request = Request::get(path)
        .header("host", host)
        .header("user-agent", "edgemeter-check")
        .header("connection", "close")
        .body(Full::<Bytes>::default())?;
    let response = sender.send_request(request).await;
    let good = matches!(&response, Ok(response) if response.status().as_u16() < 400);
    if let Ok(response) = response {
        let _ = response.into_body().collect().await;
    }
    driver.abort();
    Ok(good)
}

/// `grpc.health.v1.Health/Check`. The two messages have one field each: written by hand rather than
/// by a generator.
async fn grpc(address: SocketAddr, service: &str) -> Result<bool, Failed> {
    /// HealthCheckResponse.status (field 1, varint) = SERVING.
    const SERVING: [u8; 2] = [0x08, 1];
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "edgemeter-check")
        .body(Full::new(Bytes::from(framed(service)?)))?;
    let response = sender.send_request(request).await?;
    let mut good = response.status().as_u16() == 200;
    let body = response.into_body().collect().await?;
    if let Some(status) = body
        .trailers()
        .and_then(|trailers| trailers.get("grpc-status"))
    {
        good &= status.as_bytes() == b"0";
    }
    let bytes = body.to_bytes();
    // Uncompressed flag and length come before the message.
    good &= bytes.get(5..) == Some(&SERVING);
    driver.abort();
    Ok(good)
}

/// HealthCheckRequest.service (field 1, text), framed for gRPC.
fn framed(service: &str) -> Result<Vec<u8>, std::num::TryFromIntError> {
    let mut message = Vec::new();
    if !service.is_empty() {
        // Configured names are short enough for one byte of length.
        message.push(0x0a);
        message.push(u8::try_from(service.len())? & 0x7f);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
    frame.extend_from_slice(&message);
    Ok(frame)
}
