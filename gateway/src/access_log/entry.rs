//! What a line is made from: a finished request, its attempts, and its part of each connection.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    owner::Quality,
    slots::{Connection, RangeTicket},
    trace::{SpanId, Trace},
    units::PayloadBytes,
};

/// A finished request.
pub struct Entry<'a> {
    /// When it ended.
    pub unix_time: SystemTime,
    /// Request id, from the client or made here.
    pub id: &'a str,
    /// Listener name.
    pub listener: &'a str,
    /// Client address and port.
    pub client: ClientAddress,
    /// Method.
    pub method: &'a str,
    /// Host as sent.
    pub host: &'a str,
    /// Path without the query, which may hold secrets.
    pub path: &'a str,
    /// HTTP version.
    pub version: &'static str,
    /// None when no route matched.
    pub route: Option<&'a str>,
    /// None when no route matched.
    pub service: Option<&'a str>,
    /// Tenant.
    pub tenant: &'a str,
    /// Status sent; 0 when none was.
    pub status: u16,
    /// From the parsed request to its end.
    pub duration: Duration,
    /// The client's variants in experiments; empty in none.
    pub variants: &'a str,
    /// Where it was sent; None when it was not.
    pub upstream: Option<&'a str>,
    /// Body received.
    pub request_body: PayloadBytes,
    /// Body sent.
    pub response_body: PayloadBytes,
    /// pingora's or our words; None when all went well.
    pub error: Option<&'a str>,
    /// The client connection; None when the kernel side does not know it.
    pub client_leg: Option<Leg>,
    /// Every attempt at a peer, in order.
    pub attempts: Vec<Attempt>,
    /// Its place in a trace; None when it is not recorded.
    pub trace: Option<&'a Trace>,
    /// What vendors said about the trace.
    pub trace_state: Option<&'a str>,
}

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAddress {
    /// The other end of the connection, or whom its PROXY header names.
    Socket(SocketAddr),
    /// Whom a trusted proxy names, without a port.
    Named(IpAddr),
    /// Nobody knows.
    Unknown,
}

impl std::fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => socket.fmt(f),
            Self::Named(ip) => ip.fmt(f),
            Self::Unknown => Ok(()),
        }
    }
}

/// A try at one peer.
#[derive(Clone)]
pub struct Attempt {
    /// Where.
    pub peer: SocketAddr,
    /// When.
    pub timing: AttemptTiming,
    /// The upstream connection; None when there was none, or the kernel side does not know it.
    pub leg: Option<Leg>,
    /// Its span; None when the request is not recorded.
    pub span: Option<SpanId>,
}

/// How a try went. Times are since the request's header was parsed.
#[derive(Clone, Debug, Default)]
pub struct AttemptTiming {
    /// The peer was chosen.
    pub began: Duration,
    /// It had a connection.
    pub connected: Option<Duration>,
    /// The connection came from the pool.
    pub reused: bool,
    /// The response's header was there.
    pub answered: Option<Duration>,
    /// Its status.
    pub status: Option<u16>,
    /// It was over.
    pub ended: Option<Duration>,
    /// Why it came to nothing.
    pub error: Option<String>,
}

/// One connection's part of the request.
#[derive(Clone)]
pub struct Leg {
    /// Where the ranges are.
    pub connection: Arc<Connection>,
    /// The request's ranges.
    pub tickets: Vec<RangeTicket>,
    /// Stream offset up to which had been written when the request ended; None when not known
    /// (HTTP/2).
    pub written: Option<u64>,
    /// Wire bytes received for it.
    pub received_wire_bytes: u64,
    /// Exact, or estimated on HTTP/2.
    pub quality: Quality,
    /// Smoothed round-trip time at its end, microseconds.
    pub srtt_us: u32,
}

impl Entry<'_> {
    pub(super) fn settled(&self) -> bool {
        let attempts = self.attempts.iter();
        let upstreams = attempts.filter_map(|attempt| attempt.leg.as_ref());
        self.client_leg.iter().chain(upstreams).all(Leg::settled)
    }
}

impl Leg {
    /// True when the kernel has sent every payload byte once.
    pub(crate) fn settled(&self) -> bool {
        let Some((ticket, written)) = self.tickets.first().copied().zip(self.written) else {
            return true;
        };
        // A pooled connection may have gone to the next request before this one had ended.
        let end = self
            .connection
            .end_of(ticket)
            .map_or(written, |end| end.min(written));
        let expected = end.saturating_sub(ticket.offset);
        // An overwritten range will not get better by waiting.
        self.connection
            .read(ticket)
            .is_none_or(|range| range.first_payload_bytes >= expected)
    }

    /// Wire bytes and retransmitted frames sent; None when the range was overwritten before it
    /// could be read.
    pub(crate) fn sent(&self) -> (Option<u64>, Option<u64>) {
        let (mut sent, mut retransmits) = (Some(0), Some(0));
        for ticket in &self.tickets {
            let read = self.connection.read(*ticket);
            sent = sent.zip(read).map(|(sum, range)| sum + range.wire_bytes);
            retransmits = retransmits
                .zip(read)
                .map(|(sum, range)| sum + range.retransmit_frames);
        }
        (sent, retransmits)
    }
}
