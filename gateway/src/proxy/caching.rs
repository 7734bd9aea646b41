//! What may be stored, for how long, and for whom: RFC 9111, by pingora's state machine, with the
//! decisions it leaves to us. A shared cache: what is private, or belongs to an authorized client
//! without being public, is never stored.

use std::time::{Duration, SystemTime};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::{
    Error, ErrorSource, ErrorType, Result,
    cache::{
        CacheKey, CacheMeta, CacheMetaDefaults, CachePhase, ForcedFreshness, NoCacheReason,
        RespCacheable, VarianceBuilder,
        cache_control::{CacheControl, DirectiveKey},
        filters::resp_cacheable,
        key::{CacheHashKey as _, HashBinary},
    },
    http::{RequestHeader, ResponseHeader},
    prelude::Session,
};

use super::{Gateway, record::RequestRecord, route::Asked};
use crate::{
    cache::{Selection, primary},
    config::CachePolicy,
};

static CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Nothing is stored that does not say so; what a route says is applied afterwards.
const NO_DEFAULTS: CacheMetaDefaults = CacheMetaDefaults::new(|_| None, 0, 0);

/// Statuses that a route's default freshness applies to (RFC 9110, 15.1).
const HEURISTIC: [u16; 10] = [200, 203, 204, 300, 301, 308, 404, 405, 410, 414];

/// What became of a request at the cache; the label of the metric.
pub const RESULTS: [&str; 7] = [
    "hit",
    "stale",
    "miss",
    "expired",
    "revalidated",
    "uncacheable",
    "bypass",
];

impl Gateway {
    fn cache_policy<'r>(&self, record: &'r RequestRecord) -> Option<&'r CachePolicy> {
        let route = record.route.as_ref()?;
        let config = &record.generation.config;
        config.routes[route.index.0].policy.cache.as_ref()
    }

    /// Lets a request look into the cache, and fill it.
    pub(super) fn enable_cache(&self, session: &mut Session, record: &mut RequestRecord) {
        let Some(policy) = self.cache_policy(record) else {
            return;
        };
        let request = session.req_header();
        if !matches!(request.method, Method::GET | Method::HEAD)
            || request.headers.contains_key(header::UPGRADE)
        {
            return;
        }
        let control = CacheControl::from_req_headers(request);
        if control.as_ref().is_some_and(CacheControl::no_store) {
            record.bypassed_cache = true;
            return;
        }
        let most = usize::try_from(policy.object_bytes_max).unwrap_or(usize::MAX);
        let cache = self.shared.cache;
        session
            .cache
            .enable(cache.store, None, None, Some(cache.lock), None);
        session.cache.set_max_file_size_bytes(most);
    }

    pub(super) fn key_of(session: &Session, record: &RequestRecord) -> CacheKey {
        CacheKey::new(primary_of(session, record), record.tenant.to_string())
    }

    /// What the client asks of freshness: no-cache, max-age, min-fresh.
    pub(super) fn freshness_asked(session: &Session, meta: &CacheMeta) -> Option<ForcedFreshness> {
        let control = CacheControl::from_req_headers(session.req_header())?;
        let age = meta.age();
        let seconds = |name| {
            let value = control
                .directives
                .get(&DirectiveKey::from_lowercase(name))?
                .as_ref()?;
            value.parse_as_delta_seconds().ok().map(u64::from)
        };
        let too_old = seconds("max-age").is_some_and(|most| age.as_secs() > most);
        let left = meta.fresh_until().duration_since(SystemTime::now());
        let left = left.unwrap_or_default().as_secs();
        let too_soon = seconds("min-fresh").is_some_and(|least| left < least);
        (control.has_key("no-cache") || too_old || too_soon)
            .then_some(ForcedFreshness::ForceExpired)
    }

    /// Whether a response may be stored, and for how long.
    pub(super) fn storable(
        &self,
        session: &Session,
        response: &ResponseHeader,
        record: &RequestRecord,
    ) -> RespCacheable {
        let refuse = RespCacheable::Uncacheable(NoCacheReason::OriginNotCache);
        let Some(policy) = self.cache_policy(record) else {
            return refuse;
        };
        let headers = &response.headers;
        let varies_by_all = |value: &HeaderValue| value.as_bytes().contains(&b'*');
        if headers.get_all(header::VARY).iter().any(varies_by_all)
            || headers.contains_key(header::SET_COOKIE)
            || response.status == StatusCode::PARTIAL_CONTENT
        {
            return refuse;
        }
        let control = CacheControl::from_resp_headers(response);
        let authorized = session
            .req_header()
            .headers
            .contains_key(header::AUTHORIZATION)
            || matches!(record.token, Some(Ok(_)))
            || !record.vouched.is_empty();
        let decided = resp_cacheable(control.as_ref(), response.clone(), authorized, &NO_DEFAULTS);
        let explicit = control.is_some() || headers.contains_key(header::EXPIRES);
        match decided {
            RespCacheable::Cacheable(meta) => {
                RespCacheable::Cacheable(aged(meta, response, policy))
            }
            RespCacheable::Uncacheable(_)
                if !explicit
                    && !authorized
                    && policy.default > Duration::ZERO
                    && HEURISTIC.contains(&response.status.as_u16()) =>
            {
                let now = SystemTime::now();
                let meta = CacheMeta::new(
                    now + policy.default,
                    now,
                    seconds(policy.stale_while_revalidate),
                    seconds(policy.stale_if_error),
                    response.clone(),
                );
                RespCacheable::Cacheable(aged(meta, response, policy))
            }
            RespCacheable::Uncacheable(_) => refuse,
        }
    }

    /// The values of the request headers that the stored response varies by.
    pub(super) fn variance(meta: &CacheMeta, request: &RequestHeader) -> Option<HashBinary> {
        let mut builder = VarianceBuilder::new();
        let lines = meta.headers().get_all(header::VARY);
        let names = lines.iter().filter_map(|line| line.to_str().ok());
        let names = names.flat_map(|line| line.split(',')).map(str::trim);
        let names: Vec<String> = names
            .filter(|name| !name.is_empty())
            .map(str::to_ascii_lowercase)
            .collect();
        for name in &names {
            let mut value = Vec::new();
            for one in request.headers.get_all(name.as_str()) {
                // In one normal form: spaces after commas say nothing.
                value.extend(one.as_bytes().iter().filter(|byte| **byte != b' '));
                value.push(b',');
            }
            builder.add_owned_value(name, value);
        }
        builder.finalize()
    }

    /// Whether a stale response is better than none.
    pub(super) fn stale_is_better(error: Option<&Error>) -> bool {
        error.is_none_or(|error| {
            matches!(error.esource(), ErrorSource::Upstream)
                || matches!(error.etype(), ErrorType::HTTPStatus(500..=599))
        })
    }

    /// Cache-Status (RFC 9211), and RFC 9111 4.4: what was changed is no longer what is stored.
    pub(super) fn after_response(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        record: &RequestRecord,
    ) -> Result<()> {
        if self.cache_policy(record).is_none() {
            return Ok(());
        }
        let status = match session.cache.phase() {
            CachePhase::Hit => "edgemeter; hit",
            CachePhase::Stale | CachePhase::StaleUpdating => "edgemeter; hit; detail=stale",
            CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_) => {
                "edgemeter; hit; detail=revalidated"
            }
            CachePhase::Miss => "edgemeter; fwd=uri-miss; stored",
            CachePhase::Expired => "edgemeter; fwd=stale; stored",
            CachePhase::Bypass => "edgemeter; fwd=bypass",
            _ => "edgemeter; fwd=uri-miss",
        };
        response.append_header(CACHE_STATUS.clone(), status)?;
        let unsafe_method = !session.req_header().method.is_safe();
        if unsafe_method && response.status.as_u16() < 400 {
            let url = url_of(session, record);
            self.shared.cache.store.purge(&Selection {
                url: Some(url),
                ..Selection::default()
            });
        }
        Ok(())
    }

    /// Whether a path of this request's host is stored for this request's tenant.
    pub(super) fn is_cached(&self, session: &Session, record: &RequestRecord, path: &str) -> bool {
        let host = record.request.as_ref().map(|line| line.host());
        let router = &record.generation.router;
        let asked = Asked {
            host,
            path,
            query: None,
            method: &Method::GET,
            headers: &session.req_header().headers,
        };
        let Some(found) = router.find(self.listener, &asked) else {
            return false;
        };
        let url = url_of(session, record);
        let origin = url.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        let primary = primary(
            &record.tenant,
            found.route.name.as_str(),
            &format!("{origin}{path}"),
        );
        self.shared
            .cache
            .store
            .holds(&CacheKey::new(primary, "").combined())
    }

    /// Counts what the compression did for a request that is over.
    pub(super) fn count_coding(&self, record: &RequestRecord) {
        let (before, after) = (record.body_before_coding, record.response_body.0);
        if let Some(route) = record
            .route
            .as_ref()
            .filter(|_| before > after && after > 0)
        {
            self.shared
                .edge
                .compressed(route.name.as_str(), before - after);
        }
    }

    /// Counts what the cache did for a request that is over.
    pub(super) fn count_cache(&self, session: &Session, record: &RequestRecord) {
        let Some(route) = record
            .route
            .as_ref()
            .filter(|_| self.cache_policy(record).is_some())
        else {
            return;
        };
        let (result, saved) = match session.cache.phase() {
            CachePhase::Hit => ("hit", true),
            CachePhase::Stale | CachePhase::StaleUpdating => ("stale", true),
            CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_) => ("revalidated", true),
            CachePhase::Miss => ("miss", false),
            CachePhase::Expired => ("expired", false),
            CachePhase::Bypass => ("bypass", false),
            CachePhase::Disabled(_) if record.bypassed_cache => ("bypass", false),
            _ => ("uncacheable", false),
        };
        let saved = if saved { record.body_before_coding } else { 0 };
        self.shared.edge.cached(route.name.as_str(), result, saved);
    }
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

/// Time spent in caches before ours is no longer to come; a route's own stale times apply where
/// the response has none.
fn aged(meta: CacheMeta, response: &ResponseHeader, policy: &CachePolicy) -> CacheMeta {
    let age = response.headers.get(header::AGE);
    let age = age.and_then(|age| age.to_str().ok()?.parse::<u32>().ok());
    let control = CacheControl::from_resp_headers(response);
    let silent = |name: &str| {
        control.as_ref().is_none_or(|control| {
            !control.has_key(name)
                && !control.must_revalidate()
                && !control.proxy_revalidate()
                && !control.no_cache()
        })
    };
    let stale_while = if silent("stale-while-revalidate") {
        seconds(policy.stale_while_revalidate)
    } else {
        meta.stale_while_revalidate_sec()
    };
    let stale_if = if silent("stale-if-error") {
        seconds(policy.stale_if_error)
    } else {
        meta.stale_if_error_sec()
    };
    let age = Duration::from_secs(age.unwrap_or(0).into());
    let until = meta.fresh_until();
    let until = until.checked_sub(age).unwrap_or(until);
    CacheMeta::new(
        until,
        meta.created(),
        stale_while,
        stale_if,
        meta.response_header_copy(),
    )
}

fn primary_of(session: &Session, record: &RequestRecord) -> String {
    let route = record
        .route
        .as_ref()
        .map_or("", |route| route.name.as_str());
    primary(&record.tenant, route, &url_of(session, record))
}

fn url_of(session: &Session, record: &RequestRecord) -> String {
    let tls = record.connection.as_ref().is_some_and(|c| c.tls.is_some());
    let scheme = if tls { "https" } else { "http" };
    let host = record.request.as_ref().map_or("", |line| line.host());
    let uri = &session.req_header().uri;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    format!("{scheme}://{}{path}", host.to_ascii_lowercase())
}
