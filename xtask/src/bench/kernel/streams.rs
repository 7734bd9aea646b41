//! Real TCP between the client and the observed host: one long stream, or many short connections.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::netns::{GATEWAY_TO_CLIENT, Topology};

/// Written at once.
const CHUNK: usize = 128 * 1024;
/// Of a short connection.
const REQUEST: usize = 200;
const ANSWER: usize = 1000;
/// Threads at each end of the short connections.
const THREADS: u16 = 2;

/// Which end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    /// The observed host: payload is in its egress.
    Host,
    /// The client: payload is in the host's ingress.
    Client,
}

/// Moves so many bytes over one connection, and says how long it took from the first to the last
/// byte read.
pub(super) fn stream(hosts: &Topology, sender: Sender, bytes: u64) -> Result<Duration> {
    let any: SocketAddr = (Ipv4Addr::UNSPECIFIED, 0).into();
    let listener = hosts
        .gateway
        .run(|| TcpListener::bind(any))?
        .context("listening")?;
    let port = listener.local_addr()?.port();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || -> Result<Duration> {
            let (mut socket, _) = listener.accept().context("accepting")?;
            pin(0);
            match sender {
                Sender::Host => write(&mut socket, bytes).map(|()| Duration::ZERO),
                Sender::Client => read(&mut socket, bytes),
            }
        });
        let client = hosts.client.run(|| -> Result<Duration> {
            let mut socket = TcpStream::connect((GATEWAY_TO_CLIENT.v4, port))?;
            pin(1);
            match sender {
                Sender::Host => read(&mut socket, bytes),
                Sender::Client => write(&mut socket, bytes).map(|()| Duration::ZERO),
            }
        })??;
        let server = server
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        Ok(client.max(server))
    })
}

fn write(socket: &mut TcpStream, bytes: u64) -> Result<()> {
    let chunk = vec![0x5a; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let part = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
        socket.write_all(&chunk[..part]).context("sending")?;
        left -= part as u64;
    }
    Ok(())
}

fn read(socket: &mut TcpStream, bytes: u64) -> Result<Duration> {
    let mut buffer = vec![0; CHUNK];
    let mut got = socket.read(&mut buffer).context("receiving")? as u64;
    let began = Instant::now();
    loop {
        let more = socket.read(&mut buffer).context("receiving")?;
        if more == 0 {
            break;
        }
        got += more as u64;
    }
    ensure!(got == bytes, "{got} of {bytes} bytes arrived");
    Ok(began.elapsed())
}

/// Each end has a processor for itself, or the scheduler's choice would be in the result.
fn pin(processor: usize) {
    // SAFETY: a zeroed set is valid, the number is below its size, 0 is the calling thread.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// Short connections that were made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    pub(super) took: Duration,
    /// Different 5-tuples: the client's port may come back when its TIME_WAIT was cut short.
    pub(super) tuples: u64,
}

/// Opens so many connections one after the other on each of some threads, asks and answers on
/// each, closes it. Ports of the host from `first_port` on.
pub(super) fn connections(hosts: &Topology, count: u32, first_port: u16) -> Result<Short> {
    let share = count / u32::from(THREADS);
    let listeners: Vec<TcpListener> = hosts.gateway.run(|| {
        (0..THREADS)
            .map(|at| TcpListener::bind((Ipv4Addr::UNSPECIFIED, first_port + at)))
            .collect::<Result<_, _>>()
    })??;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let mut ends = Vec::new();
        for listener in &listeners {
            let port = listener.local_addr()?.port();
            ends.push(scope.spawn(move || serve(listener, share)));
            ends.push(scope.spawn(move || hosts.client.run(|| call(port, share))?));
        }
        let mut tuples = 0;
        for end in ends {
            tuples += end
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(Short {
            took: began.elapsed(),
            tuples,
        })
    })
}

fn serve(listener: &TcpListener, count: u32) -> Result<u64> {
    let mut request = [0; REQUEST];
    let answer = [0x5a; ANSWER];
    for _ in 0..count {
        let (mut socket, _) = listener.accept().context("accepting")?;
        socket.read_exact(&mut request).context("a request")?;
        socket.write_all(&answer).context("an answer")?;
        // The client closes first and keeps the tuple in its TIME_WAIT, so that it is not new.
        let more = socket.read(&mut request).context("the end")?;
        ensure!(more == 0, "{more} bytes after the request");
    }
    Ok(0)
}

/// The number of different ports it called from.
fn call(port: u16, count: u32) -> Result<u64> {
    let request = [0x5a; REQUEST];
    let mut answer = [0; ANSWER];
    let mut ports = HashSet::new();
    for _ in 0..count {
        let mut socket = TcpStream::connect((GATEWAY_TO_CLIENT.v4, port))?;
        ports.insert(socket.local_addr()?.port());
        socket.write_all(&request).context("a request")?;
        socket.read_exact(&mut answer).context("an answer")?;
    }
    Ok(ports.len() as u64)
}
