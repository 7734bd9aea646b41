//! The clients: wrk for HTTP/1.1, h2load for HTTP/2, and our own where connections are the work.
//! All run in the client's namespace on processor 1, bounded in time, and check every answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::peers::port;
use super::site::Site;
use crate::host;
use crate::netns::{GATEWAY_TO_CLIENT, Namespace};

/// What a client measured. No request at all where the time was over before the first answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// Answers, all of them right.
    pub(super) requests: u64,
    /// Requests a second.
    pub(super) rate: u64,
    /// Latency, microseconds; 0 where the client does not tell.
    pub(super) p50_us: u64,
    pub(super) p99_us: u64,
}

/// HTTP/1.1 on kept connections.
pub(super) fn wrk(
    site: &Site,
    tls: bool,
    path: &str,
    connections: u32,
    seconds: u64,
) -> Result<Outcome> {
    let (scheme, port) = if tls {
        ("https", port::TLS)
    } else {
        ("http", port::PLAIN)
    };
    let url = format!("{scheme}://{}:{port}/{path}", GATEWAY_TO_CLIENT.v4);
    run_wrk(site, &[], &url, connections, seconds)
}

/// The same in plain text, with more header lines.
pub(super) fn wrk_with(
    site: &Site,
    lines: &[String],
    path: &str,
    connections: u32,
    seconds: u64,
) -> Result<Outcome> {
    let url = format!("http://{}:{}/{path}", GATEWAY_TO_CLIENT.v4, port::PLAIN);
    run_wrk(site, lines, &url, connections, seconds)
}

fn run_wrk(
    site: &Site,
    lines: &[String],
    url: &str,
    connections: u32,
    seconds: u64,
) -> Result<Outcome> {
    let mut command = site.hosts.client.command("taskset")?;
    command.args(["-c", "1", "wrk", "-t1", "--latency"]);
    command.args(["-c", &connections.to_string(), "-d", &format!("{seconds}s")]);
    for line in lines {
        command.args(["-H", line]);
    }
    let said = host::output(command.arg(url))?;
    parse_wrk(&said).with_context(|| format!("wrk said:\n{said}"))
}

/// One request for each of so many tenants, on one connection.
pub(super) fn each_tenant(site: &Site, count: u32) -> Result<()> {
    let address: SocketAddr = (GATEWAY_TO_CLIENT.v4, port::PLAIN).into();
    site.hosts.client.run(move || {
        runtime()?.block_on(async move {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let mut answer = Vec::with_capacity(4096);
            for tenant in 0..count {
                let lines = format!("keep-alive\r\nx-tenant: t{tenant}");
                get_1k(&mut stream, &mut answer, &lines).await?;
            }
            Ok(())
        })
    })?
}

fn parse_wrk(said: &str) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for line in said.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["50%", time] => outcome.p50_us = microseconds(time)?,
            ["99%", time] => outcome.p99_us = microseconds(time)?,
            [count, "requests", "in", ..] => outcome.requests = count.parse()?,
            ["Requests/sec:", rate] => outcome.rate = whole(rate)?,
            ["Non-2xx", ..] | ["Socket", "errors:", ..] => bail!("wrong answers: {line}"),
            _ => {}
        }
    }
    Ok(outcome)
}

/// HTTP/2: 8 connections with 32 streams each.
pub(super) fn h2load(site: &Site, tls: bool, path: &str, seconds: u64) -> Result<Outcome> {
    let (scheme, port) = if tls {
        ("https", port::H2)
    } else {
        ("http", port::H2C)
    };
    let url = format!("{scheme}://{}:{port}/{path}", GATEWAY_TO_CLIENT.v4);
    let mut command = site.hosts.client.command("taskset")?;
    command.args(["-c", "1", "h2load", "-t1", "-c8", "-m32", "-D"]);
    let said = host::output(command.arg(seconds.to_string()).arg(url))?;
    parse_h2load(&said).with_context(|| format!("h2load said:\n{said}"))
}

fn parse_h2load(said: &str) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["finished", "in", _, rate, "req/s,", ..] => outcome.rate = whole(rate)?,
            // 2xx only: a stream that was open when the time was over counts as failed.
            [
                "status",
                "codes:",
                ok,
                "2xx,",
                three,
                "3xx,",
                four,
                "4xx,",
                five,
                "5xx",
            ] => {
                ensure!([three, four, five] == [&"0"; 3], "wrong answers: {line}");
                outcome.requests = ok.parse()?;
            }
            _ => {}
        }
    }
    Ok(outcome)
}

/// "1.23ms", "45.60us" or "0.98s", in microseconds.
fn microseconds(time: &str) -> Result<u64> {
    let split = time
        .find(|c: char| c.is_ascii_alphabetic())
        .with_context(|| format!("{time} has no unit"))?;
    let (number, unit) = time.split_at(split);
    let scale: u64 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        _ => bail!("{time} has an unknown unit"),
    };
    // Two decimals are all wrk prints.
    let (units, decimals) = number.split_once('.').unwrap_or((number, "0"));
    let hundredths: u64 = format!("{decimals:0<2}")[..2].parse()?;
    Ok(units.parse::<u64>()? * scale + hundredths * scale / 100)
}

/// The whole part of a decimal number.
fn whole(number: &str) -> Result<u64> {
    Ok(number.split('.').next().unwrap_or_default().parse()?)
}

/// A new connection for every request: handshake, one GET, close. `clients` at a time.
pub(super) fn fresh_connections(
    site: &Site,
    tls: bool,
    clients: u32,
    seconds: u64,
) -> Result<Outcome> {
    let connector = Arc::new(Connector::new(site, tls)?);
    site.hosts.client.run(move || {
        pin_to_processor_1();
        runtime()?.block_on(async move {
            let started = Instant::now();
            let until = started + Duration::from_secs(seconds);
            let mut workers = tokio::task::JoinSet::new();
            for _ in 0..clients {
                let connector = Arc::clone(&connector);
                workers.spawn(async move {
                    let mut times_us = Vec::new();
                    while Instant::now() < until {
                        let began = Instant::now();
                        connector.get(true).await?;
                        times_us.push(u64::try_from(began.elapsed().as_micros())?);
                    }
                    anyhow::Ok(times_us)
                });
            }
            let mut times_us = Vec::new();
            while let Some(worker) = workers.join_next().await {
                times_us.append(&mut worker??);
            }
            summary(times_us, started.elapsed())
        })
    })?
}

/// Opens connections, sends one request on each and leaves them idle; calls `measure` when there are
/// as many as each of `counts` says, in turn.
pub(super) fn while_idle<T: Send, const N: usize>(
    site: &Site,
    tls: bool,
    counts: [u32; N],
    measure: impl Fn() -> T + Send,
) -> Result<[T; N]> {
    let connector = Connector::new(site, tls)?;
    site.hosts.client.run(move || {
        pin_to_processor_1();
        let runtime = runtime()?;
        let mut idle = Vec::new();
        let mut measured = Vec::new();
        for count in counts {
            while idle.len() < count as usize {
                idle.push(runtime.block_on(connector.get(false))?);
            }
            // What a request needed has been given back by then.
            std::thread::sleep(Duration::from_secs(1));
            measured.push(measure());
        }
        drop(idle);
        let measured = measured.try_into();
        measured.map_err(|_| anyhow::anyhow!("not measured at each number"))
    })?
}

/// Waits until a peer answers, and says how long it took.
pub(super) fn first_answer(site: &Site, started: Instant, patience: Duration) -> Result<Duration> {
    let connector = Connector::new(site, false)?;
    site.hosts.client.run(move || {
        let runtime = runtime()?;
        loop {
            match runtime.block_on(connector.get(true)) {
                Ok(_) => return Ok(started.elapsed()),
                Err(error) if started.elapsed() > patience => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    })?
}

/// Calls at a fixed rate whatever the answers do; latency counts from when a call was due, so
/// that a stall is charged for every call it delays.
pub(super) fn steady(
    host: &Namespace,
    address: SocketAddr,
    rate: u64,
    connections: u32,
    duration: Duration,
) -> Result<Outcome> {
    host.run(move || {
        runtime()?.block_on(async move {
            // Each connection takes every n-th call.
            let period = Duration::from_nanos(1_000_000_000 * u64::from(connections) / rate);
            let mut workers = tokio::task::JoinSet::new();
            let began = Instant::now();
            for number in 0..connections {
                workers.spawn(async move {
                    let mut stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    let mut due = began + period * number / connections;
                    let mut times_us = Vec::new();
                    let mut answer = Vec::with_capacity(4096);
                    while due < began + duration {
                        tokio::time::sleep_until(due.into()).await;
                        get_1k(&mut stream, &mut answer, "keep-alive").await?;
                        times_us.push(u64::try_from(due.elapsed().as_micros())?);
                        due += period;
                    }
                    anyhow::Ok(times_us)
                });
            }
            let mut times_us = Vec::new();
            while let Some(worker) = workers.join_next().await {
                times_us.append(&mut worker??);
            }
            summary(times_us, began.elapsed())
        })
    })?
}

/// Waits until somebody answers at an address.
pub(super) fn await_answer(
    host: &Namespace,
    address: SocketAddr,
    patience: Duration,
) -> Result<()> {
    host.run(move || {
        let runtime = runtime()?;
        let began = Instant::now();
        loop {
            let asked = runtime.block_on(async {
                let mut stream = TcpStream::connect(address).await?;
                get_1k(&mut stream, &mut Vec::new(), "close").await
            });
            match asked {
                Ok(()) => return Ok(()),
                Err(error) if began.elapsed() > patience => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    })?
}

fn summary(mut times_us: Vec<u64>, took: Duration) -> Result<Outcome> {
    ensure!(!times_us.is_empty(), "no request was answered");
    times_us.sort_unstable();
    let requests = u64::try_from(times_us.len())?;
    let at = |percent: usize| times_us[(times_us.len() - 1) * percent / 100];
    Ok(Outcome {
        requests,
        rate: requests * 1000 / u64::try_from(took.as_millis().max(1))?,
        p50_us: at(50),
        p99_us: at(99),
    })
}

/// Asks for 1 KiB on an open connection and checks it.
pub(super) async fn get_1k(
    stream: &mut (impl Connected + ?Sized),
    answer: &mut Vec<u8>,
    connection: &str,
) -> Result<()> {
    let request =
        format!("GET /1k HTTP/1.1\r\nhost: bench.test\r\nconnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    answer.clear();
    loop {
        let complete = answer
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .is_some_and(|end| answer.len() >= end + 4 + 1024);
        if complete {
            break;
        }
        let read = stream.read_buf(answer).await?;
        ensure!(
            read > 0,
            "the connection closed before the answer was whole"
        );
    }
    ensure!(
        answer.starts_with(b"HTTP/1.1 200 "),
        "wrong answer: {}",
        String::from_utf8_lossy(&answer[..answer.len().min(60)])
    );
    Ok(())
}

struct Connector {
    address: SocketAddr,
    tls: Option<TlsConnector>,
}

pub(super) trait Connected:
    tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send
{
}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send> Connected for T {}

impl Connector {
    fn new(site: &Site, tls: bool) -> Result<Self> {
        let port = if tls { port::TLS } else { port::PLAIN };
        let mut roots = RootCertStore::empty();
        roots.add(site.certificate.root.clone())?;
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every handshake is a full one.
        config.resumption = Resumption::disabled();
        Ok(Self {
            address: (GATEWAY_TO_CLIENT.v4, port).into(),
            tls: tls.then(|| TlsConnector::from(Arc::new(config))),
        })
    }

    /// Connects, asks for 1 KiB, checks it, and hands the connection back.
    async fn get(&self, close: bool) -> Result<Box<dyn Connected>> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let mut stream: Box<dyn Connected> = match &self.tls {
            None => Box::new(tcp),
            Some(tls) => {
                let name = ServerName::IpAddress(self.address.ip().into());
                Box::new(tls.connect(name, tcp).await?)
            }
        };
        let mut answer = Vec::with_capacity(2048);
        let connection = if close { "close" } else { "keep-alive" };
        get_1k(stream.as_mut(), &mut answer, connection).await?;
        if close {
            // Also the peer's side of the close, for it belongs to the work.
            let _ = stream.shutdown().await;
            let _ = stream.read_buf(&mut answer).await;
        }
        Ok(stream)
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making a runtime")
}

/// The calling thread leaves processor 0 to the proxy.
fn pin_to_processor_1() {
    // SAFETY: the set is a plain bit mask of its own size; 0 is the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(1, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_prints_is_understood() {
        let said = "  Latency Distribution\n     50%    1.73ms\n     99%   11.90ms\n  \
                    59911 requests in 2.01s, 70.50MB read\nRequests/sec:  29806.34\n";
        let outcome = parse_wrk(said).unwrap();
        assert_eq!(
            (
                outcome.requests,
                outcome.rate,
                outcome.p50_us,
                outcome.p99_us
            ),
            (59_911, 29_806, 1_730, 11_900)
        );
        assert!(parse_wrk(&format!("{said}  Non-2xx or 3xx responses: 3\n")).is_err());
    }

    #[test]
    fn what_h2load_prints_is_understood() {
        let said = "finished in 2.00s, 41210.50 req/s, 47.10MB/s\n\
                    status codes: 82421 2xx, 0 3xx, 0 4xx, 0 5xx\n";
        let outcome = parse_h2load(said).unwrap();
        assert_eq!((outcome.requests, outcome.rate), (82_421, 41_210));
        assert!(parse_h2load(&said.replace("0 5xx", "7 5xx")).is_err());
    }
}
