//! What a page will need, said before its service has answered (103 Early Hints, RFC 8297), and
//! with the answer (`Link`).
//!
//! A 103 goes only where a browser uses one, to a navigation over HTTP/2; only where the route and
//! the client's worth say so; and only once a request has to ask its upstream: what comes from the
//! cache comes at once.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::{Result, http::ResponseHeader, prelude::Session};

use super::{Gateway, coding::says, cookie, edge::speaks_http2, record::RequestRecord, token};
use crate::config::{Early, Hints};

static SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

/// Pages whose hints are remembered; the one learned first goes first.
const PAGES_MAX: usize = 4096;
/// Links of one page.
const LINKS_MAX: usize = 16;
/// A longer link is not remembered.
const LINK_BYTES_MAX: usize = 512;

/// What pages said last that they need.
#[derive(Default)]
pub struct Learned {
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    links: HashMap<Arc<str>, Arc<[HeaderValue]>>,
    order: VecDeque<Arc<str>>,
}

impl Learned {
    /// What a page needs, by its last answer.
    #[must_use]
    pub fn of(&self, page: &str) -> Option<Arc<[HeaderValue]>> {
        self.lock().links.get(page).cloned()
    }

    /// A page has answered.
    pub fn note(&self, page: &str, headers: &HeaderMap) {
        let links: Vec<HeaderValue> = preloads(headers).take(LINKS_MAX).collect();
        let mut pages = self.lock();
        if let Some(known) = pages.links.get_mut(page) {
            if known[..] != links[..] {
                *known = links.into();
            }
            return;
        }
        if links.is_empty() {
            return;
        }
        if pages.order.len() == PAGES_MAX
            && let Some(oldest) = pages.order.pop_front()
        {
            pages.links.remove(&oldest);
        }
        let page: Arc<str> = page.into();
        pages.order.push_back(Arc::clone(&page));
        pages.links.insert(page, links.into());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The links that a browser can act on before it has the page. A comma inside `<…>` or quotes
/// would end one too early; what is left then does not begin with `<`, and is no link.
fn preloads(headers: &HeaderMap) -> impl Iterator<Item = HeaderValue> {
    const USED: [&str; 3] = ["preload", "modulepreload", "preconnect"];
    let lines = headers.get_all(header::LINK).iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|link| {
            let mut parameters = link.split(';').skip(1).map(str::trim);
            link.starts_with('<')
                && link.len() <= LINK_BYTES_MAX
                && parameters.any(|parameter| {
                    let relation = parameter
                        .strip_prefix("rel=")
                        .map(|rel| rel.trim_matches('"'));
                    relation.is_some_and(|relation| USED.contains(&relation))
                })
        })
        .filter_map(|link| HeaderValue::from_str(link).ok())
}

impl Gateway {
    fn hints_of(record: &RequestRecord) -> Option<&Hints> {
        let route = record.route.as_ref()?;
        let config = &record.generation.config;
        Some(&config.routes[route.index.0].policy.hints)
    }

    /// The upstream is about to be asked: says what the page will need while it thinks.
    pub(super) async fn hint_early(&self, session: &mut Session, record: &mut RequestRecord) {
        if record.hinted_early || !is_navigation(session) {
            return;
        }
        let Some(hints) = Self::hints_of(record) else {
            return;
        };
        let Some(early) = hints.early.as_ref() else {
            return;
        };
        if !applies(early, hints, session, record) {
            return;
        }
        let mut links = self.hints(session, record);
        if early.learn
            && let Some(learned) = self.shared.learned.of(&page(record))
        {
            links.extend(learned.iter().cloned());
        }
        if links.is_empty() {
            return;
        }
        record.take_turn();
        // Only our own sessions send interim responses on HTTP/2.
        let Some(client) = session.as_downstream_mut().as_custom_mut() else {
            return;
        };
        let Ok(mut head) = ResponseHeader::build(StatusCode::EARLY_HINTS, Some(links.len())) else {
            return;
        };
        for link in links {
            if head.append_header(header::LINK, link).is_err() {
                return;
            }
        }
        record.hinted_early = true;
        match client.write_response_header(Box::new(head), false).await {
            Ok(()) => self.count_early(record, "gateway"),
            // The client is gone: whoever waits for the answer finds out.
            Err(error) => log::debug!("early hints: {error}"),
        }
    }

    /// Counts a 103 that a client was sent.
    pub(super) fn count_early(&self, record: &RequestRecord, source: &'static str) {
        if let Some(route) = &record.route {
            self.shared.edge.hinted_early(route.name.as_str(), source);
        }
    }

    /// The configured hints for this client.
    fn hints(&self, session: &Session, record: &RequestRecord) -> Vec<HeaderValue> {
        let Some(hints) = Self::hints_of(record).filter(|hints| !hints.hints.is_empty()) else {
            return Vec::new();
        };
        let worth = worth(hints, session, record);
        let given = hints.hints.iter().filter(|hint| {
            worth >= hint.min_value
                && hint
                    .cached_path
                    .as_ref()
                    .is_none_or(|path| self.is_cached(session, record, path))
        });
        given
            .filter_map(|hint| HeaderValue::from_str(&hint.link).ok())
            .collect()
    }

    /// A page has come: remembers what it says it needs, and adds what is configured.
    pub(super) fn add_hints(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        record: &RequestRecord,
    ) -> Result<()> {
        if !response.status.is_success()
            || !says(&response.headers, &header::CONTENT_TYPE, "text/html")
        {
            return Ok(());
        }
        let early = Self::hints_of(record).and_then(|hints| hints.early.as_ref());
        if early.is_some_and(|early| early.learn) && session.req_header().method == Method::GET {
            self.shared.learned.note(&page(record), &response.headers);
        }
        let hints = self.hints(session, record);
        if let Some(route) = record.route.as_ref().filter(|_| !hints.is_empty()) {
            self.shared.edge.hinted(route.name.as_str(), hints.len());
        }
        for hint in hints {
            response.append_header(header::LINK, hint)?;
        }
        Ok(())
    }
}

/// Whether a browser goes to a page, over a protocol on which browsers take a 103.
fn is_navigation(session: &Session) -> bool {
    let request = session.req_header();
    let mode = request.headers.get(&SEC_FETCH_MODE);
    speaks_http2(session)
        && request.method == Method::GET
        && mode.is_some_and(|mode| mode.as_bytes() == b"navigate")
}

fn applies(early: &Early, hints: &Hints, session: &Session, record: &RequestRecord) -> bool {
    let tenants = &early.tenants;
    let is_dealt = |variant: &str| {
        let mut dealt = record.assignment.variants.split(", ");
        dealt.any(|dealt| dealt == variant)
    };
    (early.min_value == 0 || worth(hints, session, record) >= early.min_value)
        && (tenants.is_empty() || tenants.iter().any(|name| name.as_str() == &*record.tenant))
        && early.variant.as_deref().is_none_or(is_dealt)
}

/// The page a request is for: hints of one tenant or host are nobody else's.
fn page(record: &RequestRecord) -> String {
    let (host, path) = match &record.request {
        Some(line) => (line.host(), line.path()),
        None => ("", ""),
    };
    let route = record
        .route
        .as_ref()
        .map_or("", |route| route.name.as_str());
    format!("{route} {} {host}{path}", record.tenant)
}

/// What a client is worth: by its verified token, else its header, else its cookie, else nothing.
fn worth(hints: &Hints, session: &Session, record: &RequestRecord) -> u64 {
    let request = session.req_header();
    let claimed = || -> Option<u64> {
        let (name, Ok(claims)) = (hints.value_claim.as_ref()?, record.token.as_ref()?) else {
            return None;
        };
        token::claim(claims, name)?.parse().ok()
    };
    let header = || -> Option<u64> {
        let value = request.headers.get(hints.value_header.as_ref()?)?;
        value.to_str().ok()?.parse().ok()
    };
    let stored = || -> Option<u64> {
        cookie(request, hints.value_cookie.as_deref()?)?
            .parse()
            .ok()
    };
    claimed().or_else(header).or_else(stored).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(links: &[&str]) -> HeaderMap {
        let value = |link: &&str| (header::LINK, HeaderValue::from_str(link).unwrap());
        links.iter().map(value).collect()
    }

    #[test]
    fn only_what_a_browser_can_use_early_is_remembered() {
        let learned = Learned::default();
        learned.note(
            "p",
            &headers(&[
                "</a.css>; rel=preload; as=style, </b.js>; rel=\"modulepreload\"",
                "</next>; rel=next",
                "</odd,path.css>; rel=preload",
                "<https://cdn.example>; rel=preconnect",
            ]),
        );
        let links = learned.of("p").unwrap();
        assert_eq!(
            links[..],
            [
                "</a.css>; rel=preload; as=style",
                "</b.js>; rel=\"modulepreload\"",
                "<https://cdn.example>; rel=preconnect",
            ]
        );
        learned.note("p", &headers(&["</c.css>; rel=preload; as=style"]));
        assert_eq!(learned.of("p").unwrap().len(), 1);
        learned.note("p", &HeaderMap::new());
        assert!(learned.of("p").unwrap().is_empty());
        learned.note("q", &HeaderMap::new());
        assert!(learned.of("q").is_none());
    }

    #[test]
    fn pages_are_bounded() {
        let learned = Learned::default();
        let one = headers(&["</a.css>; rel=preload"]);
        for number in 0..=PAGES_MAX {
            learned.note(&number.to_string(), &one);
        }
        assert!(learned.of("0").is_none());
        assert!(learned.of("1").is_some());
        assert_eq!(learned.lock().links.len(), PAGES_MAX);
    }
}
