//! An order client of our own: HTTP/1.1 on kept connections, one thread, a few microseconds a
//! request, so that on two processors the service gets what is left.
//!
//! Open loop: arrivals come at a fixed rate whatever the service does, and latency counts
//! from when a request *should* have been sent. A service that stalls for a second is
//! charged for everybody who would have come in that second (coordinated omission). What
//! this client's own timer is late (up to a millisecond) is charged to the service as well.
//!
//! Closed loop: so many clients, each sending its next order on the answer to its last one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::LocalSet;

/// How orders arrive.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arrivals {
    /// So many a second, served by so many connections.
    Rate { per_second: u64, connections: u32 },
    /// So many clients, without a pause.
    Clients(u32),
}

/// What to send.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) address: SocketAddr,
    pub(super) arrivals: Arrivals,
    pub(super) duration: Duration,
    /// The first so much of it is sent, answered and counted, and not measured: caches are cold,
    /// connections are being made.
    pub(super) warm_up: Duration,
    /// Makes idempotency keys unique over runs.
    pub(super) run: String,
    /// SKUs, taken in turn; one is a hot one.
    pub(super) skus: Vec<String>,
    /// Whether the service going away ends the run instead of failing it.
    pub(super) may_die: bool,
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Orders created: answered with 201.
    pub(super) created: u64,
    /// Refused for now: answered with 503.
    pub(super) overloaded: u64,
    /// Orders created that were due after the warm-up.
    pub(super) measured: u64,
    /// From the end of the warm-up to the last answer.
    pub(super) took: Duration,
    /// Latency of each measured order, microseconds, ascending.
    latencies_us: Vec<u32>,
}

impl Outcome {
    pub(super) fn per_second(&self) -> u64 {
        let millis = u64::try_from(self.took.as_millis().max(1)).unwrap_or(u64::MAX);
        self.measured.saturating_mul(1000) / millis
    }

    /// Mean latency, microseconds.
    pub(super) fn mean_us(&self) -> u64 {
        let sum: u64 = self.latencies_us.iter().copied().map(u64::from).sum();
        sum / u64::try_from(self.latencies_us.len().max(1)).unwrap_or(u64::MAX)
    }

    /// The latency that `per_mille` of orders do not exceed, microseconds.
    pub(super) fn at_us(&self, per_mille: usize) -> u64 {
        let last = self.latencies_us.len().saturating_sub(1);
        self.latencies_us
            .get(last * per_mille / 1000)
            .map_or(0, |&latency| u64::from(latency))
    }
}

/// Sends orders as planned and waits for every answer.
///
/// # Errors
/// An answer that is neither 201 nor 503, or a connection that breaks unless it may.
pub(super) fn run(plan: &Plan) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making a runtime")?;
    LocalSet::new().block_on(&runtime, drive(plan))
}

/// One order on one connection.
///
/// # Errors
/// Nobody listens yet, or the answer is not 201.
pub(super) fn first_order(plan: &Plan) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making a runtime")?;
    runtime.block_on(async {
        let mut stream = TcpStream::connect(plan.address).await?;
        stream.set_nodelay(true)?;
        let (mut request, mut answer) = (Vec::new(), Vec::new());
        write_order(&mut request, &Desk::default(), plan)?;
        stream.write_all(&request).await?;
        let status = read_answer(&mut stream, &mut answer).await?;
        ensure!(status == 201, "{}", String::from_utf8_lossy(&answer));
        Ok(())
    })
}

/// What the connections share; one thread, so no lock.
#[derive(Default)]
struct Desk {
    /// When requests that nobody has taken yet should have been sent.
    due: RefCell<VecDeque<Instant>>,
    came: Notify,
    closed: RefCell<bool>,
    outcome: RefCell<Outcome>,
    number: RefCell<u64>,
}

async fn drive(plan: &Plan) -> Result<Outcome> {
    let desk = Rc::new(Desk::default());
    let count = match plan.arrivals {
        Arrivals::Rate { connections, .. } => connections,
        Arrivals::Clients(clients) => clients,
    };
    let mut connections = Vec::new();
    for _ in 0..count {
        let stream = TcpStream::connect(plan.address)
            .await
            .with_context(|| format!("connecting to {}", plan.address))?;
        stream.set_nodelay(true)?;
        connections.push(stream);
    }
    let began = Instant::now();
    let (warm, until) = (began + plan.warm_up, began + plan.duration);
    let workers: Vec<_> = connections
        .into_iter()
        .map(|stream| {
            let (desk, plan) = (Rc::clone(&desk), plan.clone());
            tokio::task::spawn_local(async move {
                let worked = work(stream, &desk, &plan, warm, until).await;
                if plan.may_die { Ok(()) } else { worked }
            })
        })
        .collect();
    if let Arrivals::Rate { per_second, .. } = plan.arrivals {
        let gap_ns = 1_000_000_000 / per_second.max(1);
        let mut next = began;
        while next < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let now = Instant::now();
            while next <= now && next < until {
                desk.due.borrow_mut().push_back(next);
                desk.came.notify_one();
                next += Duration::from_nanos(gap_ns);
            }
        }
    }
    *desk.closed.borrow_mut() = true;
    desk.came.notify_waiters();
    for worker in workers {
        // A permit may have been taken by a worker that left: the others must look again.
        desk.came.notify_waiters();
        worker.await.context("a client panicked")??;
    }
    let mut outcome = desk.outcome.take();
    outcome.took = warm.elapsed();
    outcome.latencies_us.sort_unstable();
    Ok(outcome)
}

/// One connection: takes what is due, sends it, waits for the answer.
async fn work(
    mut stream: TcpStream,
    desk: &Desk,
    plan: &Plan,
    warm: Instant,
    until: Instant,
) -> Result<()> {
    let mut request = Vec::with_capacity(512);
    let mut answer = Vec::with_capacity(2048);
    loop {
        let due = match plan.arrivals {
            Arrivals::Clients(_) => {
                let now = Instant::now();
                if now >= until {
                    return Ok(());
                }
                now
            }
            Arrivals::Rate { .. } => loop {
                let came = desk.came.notified();
                let next = desk.due.borrow_mut().pop_front();
                if let Some(due) = next {
                    break due;
                }
                if *desk.closed.borrow() {
                    return Ok(());
                }
                came.await;
            },
        };
        write_order(&mut request, desk, plan)?;
        stream.write_all(&request).await?;
        let status = read_answer(&mut stream, &mut answer).await?;
        let mut outcome = desk.outcome.borrow_mut();
        match status {
            201 => {
                outcome.created += 1;
                if due >= warm {
                    outcome.measured += 1;
                    let latency = due.elapsed().as_micros();
                    outcome
                        .latencies_us
                        .push(u32::try_from(latency).unwrap_or(u32::MAX));
                }
            }
            503 => outcome.overloaded += 1,
            _ => bail!("wrong answer: {}", String::from_utf8_lossy(&answer)),
        }
    }
}

fn write_order(request: &mut Vec<u8>, desk: &Desk, plan: &Plan) -> Result<()> {
    let number = {
        let mut number = desk.number.borrow_mut();
        *number += 1;
        *number
    };
    let at = usize::try_from(number)? % plan.skus.len().max(1);
    let sku = plan.skus.get(at).context("no SKU to order")?;
    let body_bytes = r#"{"lines":[{"sku":"","quantity":1}]}"#.len() + sku.len();
    request.clear();
    write!(
        request,
        "POST /api/v1/orders HTTP/1.1\r\nhost: {}\r\nidempotency-key: {}-{number}\r\n\
         content-type: application/json\r\ncontent-length: {body_bytes}\r\n\r\n\
         {{\"lines\":[{{\"sku\":\"{sku}\",\"quantity\":1}}]}}",
        plan.address, plan.run,
    )?;
    Ok(())
}

/// Reads one answer with a `Content-Length` and returns its status.
async fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) -> Result<u16> {
    answer.clear();
    loop {
        let read = stream.read_buf(answer).await?;
        ensure!(
            read > 0,
            "the connection closed before the answer was whole"
        );
        if let Some((status, whole_bytes)) = head(answer)
            && answer.len() >= whole_bytes
        {
            return Ok(status);
        }
    }
}

/// Status and length, head included, once the head is there.
fn head(answer: &[u8]) -> Option<(u16, usize)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let text = std::str::from_utf8(&answer[..end]).ok()?;
    let status = text.get(9..12)?.parse().ok()?;
    let length: usize = text
        .lines()
        .find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().ok())?
        })
        .unwrap_or(0);
    Some((status, end + 4 + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_its_body() {
        let text = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nx: y\r\n\r\n{}";
        assert_eq!(head(text), Some((201, text.len())));
        assert_eq!(head(&text[..30]), None);
        assert_eq!(head(b"HTTP/1.1 503 x\r\n\r\n"), Some((503, 18)));
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let outcome = Outcome {
            created: 5,
            measured: 4,
            took: Duration::from_secs(2),
            latencies_us: vec![1, 2, 3, 10],
            ..Outcome::default()
        };
        assert_eq!(
            (
                outcome.per_second(),
                outcome.mean_us(),
                outcome.at_us(500),
                outcome.at_us(1000)
            ),
            (2, 4, 2, 10)
        );
    }

    /// A service that answers nothing for a while: the wait is charged to all who would
    /// have come, not only to the one that was being served.
    #[test]
    fn a_stall_is_charged_to_everybody_who_would_have_come() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let service = std::thread::spawn(move || {
            use std::io::Read as _;
            let (mut stream, _) = listener.accept().unwrap();
            let mut read = [0; 4096];
            let mut stalled = false;
            while stream.read(&mut read).is_ok_and(|bytes| bytes > 0) {
                if !stalled {
                    std::thread::sleep(Duration::from_millis(300));
                    stalled = true;
                }
                let answer = b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer).unwrap();
            }
        });
        let outcome = run(&Plan {
            address,
            arrivals: Arrivals::Rate {
                per_second: 100,
                connections: 1,
            },
            duration: Duration::from_millis(400),
            warm_up: Duration::ZERO,
            run: "t".to_owned(),
            skus: vec!["1001".to_owned()],
            may_die: false,
        })
        .unwrap();
        service.join().unwrap();
        assert_eq!(outcome.created, 40);
        let late = outcome
            .latencies_us
            .iter()
            .filter(|&&us| us > 100_000)
            .count();
        assert!(
            late >= 15,
            "{late} of 40 waited: {:?}",
            outcome.latencies_us
        );
    }
}
