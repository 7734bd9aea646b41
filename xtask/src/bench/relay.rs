//! A TCP relay that passes bytes on later, and no faster than it may: a slow network, or a slow
//! service, without a queueing discipline that a kernel may lack. It lives as long as the process.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Pieces under way in one direction of one connection; the sender waits when there are more.
const UNDER_WAY_MAX: usize = 1024;
/// What a slow line sends at a time: about a segment.
const PIECE_BYTES: usize = 1448;

/// How bytes travel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// From one end to the other.
    pub(super) delay: Duration,
    /// None: as fast as they come.
    pub(super) bytes_per_second: Option<u64>,
}

impl Pace {
    /// Late, but not slow.
    pub(super) fn delay(delay: Duration) -> Self {
        Self {
            delay,
            bytes_per_second: None,
        }
    }
}

/// Relays connections, with a pace for what the client sends, which `judge` sees.
///
/// # Errors
/// Nobody can listen there.
pub(super) fn start(
    listen: SocketAddr,
    to: SocketAddr,
    judge: impl Fn(&[u8]) -> Pace + Send + Sync + 'static,
) -> Result<()> {
    between(listen, to, judge, |_| Pace::delay(Duration::ZERO))
}

/// Relays connections, with a pace for each direction.
///
/// # Errors
/// Nobody can listen there.
pub(super) fn between(
    listen: SocketAddr,
    to: SocketAddr,
    forth: impl Fn(&[u8]) -> Pace + Send + Sync + 'static,
    back: impl Fn(&[u8]) -> Pace + Send + Sync + 'static,
) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("relay at {listen}"))?;
    let (forth, back) = (Arc::new(forth), Arc::new(back));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(to) else {
                continue;
            };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let (Ok(from_client), Ok(from_server)) = (client.try_clone(), server.try_clone())
            else {
                continue;
            };
            let (forth, back) = (Arc::clone(&forth), Arc::clone(&back));
            pump(from_client, server, move |bytes| forth(bytes));
            pump(from_server, client, move |bytes| back(bytes));
        }
    });
    Ok(())
}

fn pump(mut from: TcpStream, to: TcpStream, pace: impl Fn(&[u8]) -> Pace + Send + 'static) {
    let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    std::thread::spawn(move || deliver(to, &receiver));
    std::thread::spawn(move || {
        let mut space = [0; 16 * 1024];
        let mut line_free = Instant::now();
        while let Ok(read @ 1..) = from.read(&mut space) {
            let pace = pace(&space[..read]);
            for piece in space[..read].chunks(PIECE_BYTES) {
                if let Some(rate) = pace.bytes_per_second {
                    let nanos = piece.len() as u64 * 1_000_000_000 / rate.max(1);
                    line_free = line_free.max(Instant::now()) + Duration::from_nanos(nanos);
                }
                let at = line_free.max(Instant::now()) + pace.delay;
                if sender.send((at, piece.to_vec())).is_err() {
                    return;
                }
            }
        }
    });
}

fn deliver(mut to: TcpStream, pieces: &Receiver<(Instant, Vec<u8>)>) {
    for (at, piece) in pieces {
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
