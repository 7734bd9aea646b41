//! Mirroring: a copy of a request goes to another upstream, and nobody waits for its answer.
//!
//! Bounded twice: a body longer than the route's `body_max_bytes` is not copied, and no more than
//! [`COPIES_MAX`] copies are under way. What is not mirrored for either reason, or because the
//! mirror failed, is counted. The copy's bytes are metered on the mirror's own upstream leg, under
//! the route that was mirrored.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{Uri, header};
use pingora::{
    connectors::http::Connector, http::RequestHeader, prelude::HttpPeer, protocols::ALPN,
    upstreams::peer::Peer as _,
};

use super::{
    Shared,
    generation::Generation,
    meter::EndpointId,
    record::{Leg, attempt_quality},
    route::Route,
};
use crate::{
    census::Kind,
    config::{Mirror, UpstreamIndex},
    owner::Quality,
    slots::Before,
};

/// Copies under way at once.
const COPIES_MAX: usize = 512;
/// For a copy, all in all.
const DEADLINE: Duration = Duration::from_secs(30);

/// Sends copies.
pub struct Mirroring {
    /// Made when the first copy is sent: it reads the host's certificates.
    connector: OnceLock<Connector>,
    under_way: AtomicUsize,
    /// Copies the mirror answered.
    pub sent: AtomicU64,
    /// Copies not made, by [`Lost`].
    pub lost: [AtomicU64; Lost::ALL.len()],
}

/// Why a copy was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The body was too long.
    Body,
    /// Too many copies were under way.
    Busy,
    /// The mirror could not be reached, or did not answer.
    Failed,
}

impl Lost {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Body, Self::Busy, Self::Failed];

    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Busy => "busy",
            Self::Failed => "failed",
        }
    }
}

impl Default for Mirroring {
    fn default() -> Self {
        Self {
            connector: OnceLock::new(),
            under_way: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
            lost: Default::default(),
        }
    }
}

impl Mirroring {
    fn connector(&self) -> &Connector {
        self.connector.get_or_init(|| Connector::new(None))
    }
}

/// A copy in the making.
pub struct MirrorCopy {
    upstream: UpstreamIndex,
    body: BytesMut,
    body_max: usize,
    too_long: bool,
    /// As it goes to the upstream; None until it has been sent there.
    header: Option<Box<RequestHeader>>,
}

impl MirrorCopy {
    /// For a request that is mirrored.
    pub fn new(mirror: &Mirror) -> Self {
        Self {
            upstream: mirror.upstream,
            body: BytesMut::new(),
            body_max: mirror.body_max_bytes,
            too_long: false,
            header: None,
        }
    }

    /// The header, after all changes.
    pub fn header(&mut self, header: &RequestHeader) {
        self.header = Some(Box::new(header.clone()));
    }

    /// A part of the body.
    pub fn append(&mut self, part: &Bytes) {
        self.too_long |= self.body.len() + part.len() > self.body_max;
        if !self.too_long {
            self.body.extend_from_slice(part);
        }
    }

    /// The body comes again.
    pub fn restart(&mut self) {
        self.body.clear();
        self.too_long = false;
    }
}

/// Counts a copy under way until dropped.
struct UnderWay(Arc<Shared>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.mirroring.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The request is over: sends its copy on its way. Call within the runtime.
pub fn launch(
    shared: &Arc<Shared>,
    generation: &Arc<Generation>,
    route: &Arc<Route>,
    tenant: &str,
    copy: MirrorCopy,
) {
    let mirroring = &shared.mirroring;
    let lost = |why: Lost| {
        mirroring.lost[why as usize].fetch_add(1, Ordering::Relaxed);
    };
    let Some(header) = copy.header else {
        // It never went to its own upstream either.
        return;
    };
    if copy.too_long {
        return lost(Lost::Body);
    }
    if mirroring.under_way.fetch_add(1, Ordering::Relaxed) >= COPIES_MAX {
        mirroring.under_way.fetch_sub(1, Ordering::Relaxed);
        return lost(Lost::Busy);
    }
    let under_way = UnderWay(Arc::clone(shared));
    let upstream = &generation.config.upstreams[copy.upstream.0].name;
    let alive = shared
        .census
        .enter(Kind::Mirror, upstream.clone(), Instant::now());
    let (shared, generation) = (Arc::clone(shared), Arc::clone(generation));
    let (route, tenant) = (Arc::clone(route), Box::<str>::from(tenant));
    tokio::spawn(async move {
        let _under_way = (under_way, alive);
        let send = send(
            &shared,
            &generation,
            &route,
            &tenant,
            copy.upstream,
            header,
            copy.body.freeze(),
        );
        let counter = match tokio::time::timeout(DEADLINE, send).await {
            Ok(Some(())) => &shared.mirroring.sent,
            _ => &shared.mirroring.lost[Lost::Failed as usize],
        };
        counter.fetch_add(1, Ordering::Relaxed);
    });
}

/// None when it failed.
async fn send(
    shared: &Arc<Shared>,
    generation: &Generation,
    route: &Route,
    tenant: &str,
    index: UpstreamIndex,
    header: Box<RequestHeader>,
    body: Bytes,
) -> Option<()> {
    let upstream = generation.config.upstreams.get(index.0)?;
    let pool = generation.pools.get(index.0)?;
    let mut held = pool.pick(None, &[], Instant::now()).ok()?;
    let mut peer = HttpPeer::new(held.address(), false, String::new());
    let options = &mut peer.options;
    options.connection_timeout = Some(upstream.connect_timeout);
    options.idle_timeout = Some(upstream.idle_timeout);
    if upstream.http2 {
        options.alpn = ALPN::H2;
        options.max_h2_streams = 128;
    }
    let (mut session, reused) = match shared.mirroring.connector().get_http_session(&peer).await {
        Ok(session) => session,
        Err(_) => {
            held.broke(Instant::now());
            return None;
        }
    };
    held.connected(reused);
    session.set_read_timeout(Some(upstream.read_timeout));
    session.set_write_timeout(Some(upstream.write_timeout));
    let quality = attempt_quality(&peer);
    let header = framed(header, upstream.http2, body.len())?;
    let leg = (|| {
        let digest = session.digest()?.socket_digest.clone()?;
        let fd = session.stream().map(|stream| stream.id())?;
        let endpoint = EndpointId::Upstream(index);
        let table = &generation.endpoints;
        shared
            .meter
            .open(table, &digest, fd, endpoint, Before::Nothing);
        let owner = shared
            .meter
            .route_owner(table, endpoint, Some(route), tenant, quality)?;
        let tracked = shared.meter.find(&digest)?;
        Some(Leg::begin(shared, tracked, owner, quality, true))
    })();
    let exchanged = async {
        session.write_request_header(header).await.ok()?;
        if !body.is_empty() {
            session.write_request_body(body, true).await.ok()?;
        }
        session.finish_request_body().await.ok()?;
        session.read_response_header().await.ok()?;
        let status = session.response_header()?.status.as_u16();
        while session.read_response_body().await.ok()?.is_some() {}
        Some(status)
    }
    .await;
    let mut leg = leg;
    if let Some(leg) = &mut leg
        && quality == Quality::Exact
    {
        leg.received_all();
    }
    if let Some(leg) = leg {
        leg.finish(shared);
    }
    match exchanged {
        Some(status) => {
            held.answered(status, Instant::now());
            let idle = peer.idle_timeout();
            let connector = shared.mirroring.connector();
            connector.release_http_session(session, &peer, idle).await;
            Some(())
        }
        None => {
            held.broke(Instant::now());
            session.shutdown().await;
            None
        }
    }
}

/// The header for a body that is whole: its length instead of chunks. None when it cannot be.
fn framed(mut header: Box<RequestHeader>, http2: bool, body: usize) -> Option<Box<RequestHeader>> {
    header.remove_header(&header::TRANSFER_ENCODING);
    if body > 0 || header.headers.contains_key(header::CONTENT_LENGTH) {
        header.insert_header(header::CONTENT_LENGTH, body).ok()?;
    }
    let host = header.headers.get(header::HOST).cloned();
    if http2 {
        let mut parts = header.uri.clone().into_parts();
        parts.scheme = Some(http::uri::Scheme::HTTP);
        if let Some(host) = host {
            parts.authority = Some(host.as_bytes().try_into().ok()?);
        }
        header.set_uri(Uri::from_parts(parts).ok()?);
        header.set_version(http::Version::HTTP_2);
    } else {
        if host.is_none()
            && let Some(authority) = header.uri.authority().cloned()
        {
            header
                .insert_header(header::HOST, authority.as_str())
                .ok()?;
        }
        let path = header.uri.path_and_query()?.as_str().parse().ok()?;
        header.set_uri(path);
        header.set_version(http::Version::HTTP_11);
    }
    Some(header)
}
