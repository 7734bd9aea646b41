//! A request whose head is read: its route, its tenant, its record, and whether this lane may
//! serve it. The same for every protocol a client speaks.

use std::sync::Arc;

use http::{HeaderName, Method};

use super::serve::Lane;
use crate::{
    access_log::ClientAddress,
    config::UpstreamIndex,
    owner::Quality,
    proxy::{
        X_TIMEOUT,
        connection::{Connection, OnConnection},
        meter::{EndpointId, Tracked},
        record::{Leg, RequestLine, RequestRecord},
        request_id, retry,
        route::{Asked, Lines, Route},
        tenant,
    },
};

/// What a request asks for.
#[derive(Debug)]
pub struct Head<'h> {
    /// Method.
    pub method: &'h Method,
    /// The authority.
    pub host: &'h str,
    /// Path and query, as sent.
    pub target: &'h str,
    /// All lines.
    pub lines: &'h dyn Lines,
    /// For the access log.
    pub version: &'static str,
    /// How exactly its client's bytes can be known.
    pub quality: Quality,
    /// More of it is still to be received.
    pub more: bool,
}

/// A request that this lane serves.
pub struct Admitted {
    /// Begun.
    pub record: RequestRecord,
    /// Where it goes.
    pub upstream: UpstreamIndex,
    /// Sending it twice is harmless.
    pub repeatable: bool,
}

impl Head<'_> {
    fn line(&self, name: &HeaderName) -> Option<&str> {
        self.lines.first(name)
    }

    /// A deadline of the client's own is the full lane's.
    fn has_deadline(&self) -> bool {
        self.line(&X_TIMEOUT).is_some() || self.line(&retry::GRPC_TIMEOUT).is_some()
    }
}

impl Lane {
    /// Routes a request and begins its record; None when the full lane must serve it.
    pub(super) fn admit(
        &self,
        head: &Head<'_>,
        connection: &Arc<Connection>,
        tracked: Option<&Tracked>,
    ) -> Option<Admitted> {
        if !head.target.starts_with('/') || head.has_deadline() {
            return None;
        }
        let (path, query) = match head.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (head.target, None),
        };
        let mut record = RequestRecord::new(Arc::clone(&self.shared));
        let asked = Asked {
            host: Some(head.host),
            path,
            query,
            method: head.method,
            headers: head.lines,
        };
        let generation = Arc::clone(&record.generation);
        let found = generation.router.find(self.listener, &asked)?;
        let route: Arc<Route> = Arc::clone(found.route);
        if !generation.fit.route(route.index.0) {
            return None;
        }
        let upstream = route.backend()?;
        record.route = Some(Arc::clone(&route));
        record.upstream = Some(upstream);
        let named = tenant(
            Some(&route.tenant),
            &record,
            Some(head.host),
            path,
            |name| head.line(name),
        );
        record.tenant = named;
        let id = request_id(|name| head.line(name));
        record.begin(RequestLine::new(
            (&id, head.host, path),
            head.method.clone(),
            head.version,
            ClientAddress::Socket(connection.client),
            self.listener,
        ));
        record.trace(head.lines);
        record.client_ip = Some(connection.client.ip());
        record.connection = Some(OnConnection::new(Arc::clone(connection)));
        if let Some(tracked) = tracked {
            let owner = self.shared.meter.route_owner(
                &generation.endpoints,
                EndpointId::Listener(self.listener),
                Some(&route),
                &record.tenant,
                head.quality,
            );
            record.client = owner.map(|owner| {
                Leg::begin(
                    &self.shared,
                    tracked.clone(),
                    owner,
                    head.quality,
                    head.more,
                )
            });
        }
        let has_key = head.line(&retry::IDEMPOTENCY_KEY).is_some();
        Some(Admitted {
            repeatable: retry::is_harmless(&record, head.method, has_key),
            upstream,
            record,
        })
    }
}
