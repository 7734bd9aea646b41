//! One try at an upstream: which peer, its connection, and what cannot be tried.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::prelude::{HttpPeer, Session};
use pingora::protocols::{ALPN, Digest};
use pingora::{Error, ErrorType, Result};

use super::record::{Leg, RequestRecord, attempt_quality};
use super::request::cookie;
use super::upstream::hash_key;
use super::upstream::limits::Refused;
use super::{Gateway, outbound};
use crate::config::{Balance, HashKey};
use crate::owner::Quality;
use crate::slots::Before;

impl Gateway {
    /// The peer to try, and how to connect to it.
    pub(super) async fn peer_for(
        &self,
        session: &mut Session,
        record: &mut RequestRecord,
    ) -> Result<Box<HttpPeer>> {
        let Some(route) = record.route.clone() else {
            return Err(Error::explain(
                ErrorType::InternalError,
                "routed without a route",
            ));
        };
        if record.is_late() {
            return Err(fail(record, 504, "the deadline has passed"));
        }
        let chosen = record.upstream.or(record.assignment.upstream);
        let Some(index) = chosen.or_else(|| route.backend()) else {
            return Err(fail(record, 500, "the route has no upstream"));
        };
        record.upstream = Some(index);
        self.hint_early(session, record).await;
        let generation = Arc::clone(&record.generation);
        let upstream = &generation.config.upstreams[index.0];
        let pool = &generation.pools[index.0];
        if record.admission.is_none() {
            match pool.admit() {
                Ok(admission) => record.admission = Some(admission),
                Err(refused) => return Err(refusal(record, refused)),
            }
        }
        let key = balance_key(&upstream.balance, session);
        let held = match pool.pick(key, &record.tried, Instant::now()) {
            Ok(held) => held,
            Err(refused) => return Err(refusal(record, refused)),
        };
        let mut http_peer = HttpPeer::new(held.address(), false, String::new());
        record.attempt(held, Instant::now());
        let options = &mut http_peer.options;
        let connect = match record.remaining() {
            Some(left) => upstream.connect_timeout.min(left),
            None => upstream.connect_timeout,
        };
        options.connection_timeout = Some(connect);
        options.total_connection_timeout = Some(connect);
        let silence = route.try_timeout.into_iter().chain(record.remaining());
        options.read_timeout = Some(silence.fold(upstream.read_timeout, Ord::min));
        options.write_timeout = Some(upstream.write_timeout);
        options.idle_timeout = Some(upstream.idle_timeout);
        if let Some(outbound) = &generation.edge.outbound[index.0] {
            outbound.apply(&mut http_peer);
        }
        if let (Some(version), Some(connection)) = (upstream.proxy_protocol, &record.connection) {
            outbound::name_client(&mut http_peer, connection.client, version);
        }
        let options = &mut http_peer.options;
        if upstream.http2 {
            options.alpn = ALPN::H2;
            // pingora's default of 1 would open a connection per concurrent request.
            options.max_h2_streams = 128;
        }
        Ok(Box::new(http_peer))
    }

    /// There is a connection: its bytes are this attempt's.
    pub(super) fn connected(
        &self,
        reused: bool,
        peer: &HttpPeer,
        fd: std::os::unix::io::RawFd,
        digest: Option<&Digest>,
        record: &mut RequestRecord,
    ) {
        let quality = attempt_quality(peer);
        let meter = &self.shared.meter;
        let mut leg = None;
        let handshake = digest.filter(|_| !reused).and_then(tls_handshake);
        if let Some((took, upstream)) = handshake.zip(record.upstream_name()) {
            let route = record.route.as_deref();
            self.shared.metrics.tls_handshake(route, upstream, took);
        }
        if let Some(endpoint) = record.upstream_id()
            && let Some(digest) = digest.and_then(|digest| digest.socket_digest.as_ref())
        {
            let table = &record.generation.endpoints;
            let tls = record
                .upstream
                .is_some_and(|index| record.generation.config.upstreams[index.0].tls.is_some());
            let before = if tls {
                Before::Handshake
            } else {
                Before::Nothing
            };
            meter.open(table, digest, fd, endpoint, before);
            let owner = meter.route_owner(
                table,
                endpoint,
                record.route.as_deref(),
                &record.tenant,
                quality,
            );
            if let Some((tracked, owner)) = meter.find(digest).zip(owner) {
                let mut begun = Leg::begin(&self.shared, tracked, owner, quality, true);
                if quality == Quality::Estimated {
                    begun
                        .tickets
                        .extend(begun.tracked.connection.continue_sending(owner));
                }
                leg = Some(begun);
            }
        }
        record.attempt_connected(reused, leg);
    }
}

/// How long a new connection's TLS handshake took; None where there was none. The socket's own entry
/// comes first, that of TLS after it.
fn tls_handshake(digest: &Digest) -> Option<Duration> {
    let tls = digest.timing_digest.get(1)?.as_ref()?;
    tls.establishment_duration
}

/// An error with the status it is answered with, and its reason for the access log.
fn fail(record: &mut RequestRecord, status: u16, why: &'static str) -> Box<Error> {
    record.error = Some(match record.upstream_name() {
        Some(upstream) => format!("upstream {upstream}: {why}"),
        None => why.to_owned(),
    });
    Error::explain(ErrorType::HTTPStatus(status), why)
}

/// A limit was reached: 503, and the client may come back.
fn refusal(record: &mut RequestRecord, refused: Refused) -> Box<Error> {
    let why = match refused {
        Refused::Requests => "as many requests are under way as may be",
        Refused::Pending => "as many requests wait for a connection as may",
        Refused::PerPeer => "every peer has as many requests as it may",
        Refused::Unresolved => "no name has led to an address yet",
    };
    fail(record, 503, why)
}

/// What a hash balance goes by.
fn balance_key(balance: &Balance, session: &Session) -> Option<u64> {
    let Balance::Hash(key) = balance else {
        return None;
    };
    match key {
        HashKey::Header(name) => {
            let value = session.req_header().headers.get(name)?;
            Some(hash_key(value.as_bytes()))
        }
        HashKey::Cookie(name) => {
            cookie(session.req_header(), name).map(|value| hash_key(value.as_bytes()))
        }
        HashKey::Source => {
            let address: SocketAddr = *session.client_addr()?.as_inet()?;
            Some(hash_key(address.ip().to_string().as_bytes()))
        }
    }
}
