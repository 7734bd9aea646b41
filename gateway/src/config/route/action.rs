//! What becomes of a request: forwarded, redirected, and what is edited on the way.

use std::collections::BTreeMap;
use std::ops::Range;

use http::{HeaderName, HeaderValue, header};
use toml::Spanned;

use super::raw::{RawBackend, RawHeaderEdits, RawRedirect, RawRoute};
use super::{Action, Backend, HeaderEdits, Match, PathEdit, Redirect, Rewrite};
use crate::config::check::{Checker, Seen};
use crate::config::raw::Text;
use crate::config::traffic::Known;
use crate::config::{HostPattern, PathPattern, UpstreamIndex};

impl Checker<'_> {
    pub(super) fn action(
        &mut self,
        spanned: &Spanned<RawRoute>,
        here: &str,
        known: &Known<'_>,
        matches: Option<&[Match]>,
    ) -> Option<Action> {
        let raw = spanned.get_ref();
        let prefixed = matches.is_none_or(|matches| {
            let mut paths = matches.iter().map(|one| &one.path);
            paths.all(|path| matches!(path, PathPattern::Prefix(_)))
        });
        let one = Backend {
            upstream: UpstreamIndex(0),
            weight: 1,
        };
        let backends = match (&raw.upstream, &raw.backends, &raw.redirect) {
            (Some(text), None, None) => {
                let field = format!("{here}.upstream");
                let upstream = self.reference(text, &field, "upstream", &known.upstreams)?;
                vec![Backend {
                    upstream: UpstreamIndex(upstream),
                    ..one
                }]
            }
            (None, Some(list), None) => {
                let field = format!("{here}.backends");
                self.backends(list.get_ref(), list.span(), &field, known)?
            }
            (None, None, Some(redirect)) => {
                let field = format!("{here}.redirect");
                if let Some(rewrite) = &raw.rewrite {
                    let fix = "write what changes into `redirect`";
                    let field = format!("{here}.rewrite");
                    self.report(rewrite.span(), field, "stands beside `redirect`", fix);
                }
                return self
                    .redirect(redirect.get_ref(), redirect.span(), &field, prefixed)
                    .map(Action::Redirect);
            }
            (None, None, None) => {
                let fix = "add `upstream = \"orders\"`, `backends` or `redirect`";
                let wrong = "goes nowhere: has neither `upstream`, `backends` nor `redirect`";
                self.report(spanned.span(), here, wrong, fix);
                return None;
            }
            _ => {
                let fix = "keep one of `upstream`, `backends` and `redirect`";
                let wrong = "has more than one of `upstream`, `backends` and `redirect`";
                self.report(spanned.span(), here, wrong, fix);
                return None;
            }
        };
        let rewrite = match &raw.rewrite {
            None => Rewrite::default(),
            Some(raw) => {
                let (raw, at) = (raw.get_ref(), raw.span());
                let field = format!("{here}.rewrite");
                let host = match &raw.host {
                    Some(text) => self.plain_host(text, &format!("{field}.host")).map(Some),
                    None => Some(None),
                };
                let (full, prefix) = (raw.path.as_ref(), raw.prefix.as_ref());
                let path = self.path_edit(full, prefix, at, &field, prefixed);
                Rewrite {
                    host: host?,
                    path: path?,
                }
            }
        };
        Some(Action::Forward { backends, rewrite })
    }

    fn backends(
        &mut self,
        list: &[RawBackend],
        at: Range<usize>,
        here: &str,
        known: &Known<'_>,
    ) -> Option<Vec<Backend>> {
        let mut seen = Seen::default();
        let checked: Vec<Option<Backend>> = list
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("{here}[{index}]");
                let field = format!("{here}.upstream");
                let upstream = self.reference(&raw.upstream, &field, "upstream", &known.upstreams);
                let name = raw.upstream.get_ref().as_str();
                self.unique(
                    &mut seen,
                    name,
                    raw.upstream.span(),
                    &field,
                    "add the weights",
                );
                let weight = raw.weight.as_ref();
                let weight = self.number(weight, &format!("{here}.weight"), 0..=1_000_000, 1);
                Some(Backend {
                    upstream: UpstreamIndex(upstream?),
                    weight: weight?,
                })
            })
            .collect();
        let backends: Option<Vec<Backend>> = checked.into_iter().collect();
        if backends.as_ref()?.iter().all(|backend| backend.weight == 0) {
            let fix = "give at least one backend a weight above 0";
            self.report(at, here, "gets no request: every weight is 0", fix);
            return None;
        }
        backends
    }

    fn redirect(
        &mut self,
        raw: &RawRedirect,
        at: Range<usize>,
        here: &str,
        prefixed: bool,
    ) -> Option<Redirect> {
        let scheme = match &raw.scheme {
            Some(text) => self
                .choice(
                    text,
                    &format!("{here}.scheme"),
                    &[("http", "http"), ("https", "https")],
                )
                .map(Some),
            None => Some(None),
        };
        let host = match &raw.host {
            Some(text) => self.plain_host(text, &format!("{here}.host")).map(Some),
            None => Some(None),
        };
        let port = match &raw.port {
            Some(_) => self
                .number(raw.port.as_ref(), &format!("{here}.port"), 1..=65_535, 1)
                .map(Some),
            None => Some(None),
        };
        let (full, prefix) = (raw.path.as_ref(), raw.prefix.as_ref());
        let path = self.path_edit(full, prefix, at.clone(), here, prefixed);
        let status: Option<u16> = self.number(
            raw.status.as_ref(),
            &format!("{here}.status"),
            301..=308,
            302,
        );
        if let Some(304..=306) = status {
            let fix = "write 301, 302, 303, 307 or 308";
            self.report(at.clone(), format!("{here}.status"), "is no redirect", fix);
        }
        let redirect = Redirect {
            scheme: scheme?,
            host: host?,
            port: port?,
            path: path?,
            status: status?,
        };
        let same = redirect.scheme.is_none()
            && redirect.host.is_none()
            && redirect.port.is_none()
            && redirect.path.is_none();
        if same {
            let fix = r#"write such as `redirect = { scheme = "https" }`"#;
            self.report(at, here, "leads to where it came from", fix);
            return None;
        }
        Some(redirect)
    }

    fn path_edit(
        &mut self,
        full: Option<&Text>,
        prefix: Option<&Text>,
        at: Range<usize>,
        here: &str,
        prefixed: bool,
    ) -> Option<Option<PathEdit>> {
        let raw = |text: &str| PathPattern::exact(text).map(|_| Box::<str>::from(text));
        match (full, prefix) {
            (None, None) => Some(None),
            (Some(text), None) => self
                .accepted(raw(text.get_ref()), text, &format!("{here}.path"))
                .map(|path| Some(PathEdit::Full(path))),
            (None, Some(text)) => {
                let field = format!("{here}.prefix");
                if !prefixed {
                    let wrong = "replaces a prefix, and the route does not match by prefix alone";
                    let fix = "write `path` instead, or match with `path = { prefix = … }`";
                    self.report(text.span(), field, wrong, fix);
                    return None;
                }
                let path = match text.get_ref().as_str() {
                    "" => Some("".into()),
                    path => self.accepted(raw(path), text, &field),
                };
                path.map(|path| Some(PathEdit::Prefix(path)))
            }
            (Some(_), Some(_)) => {
                self.report(
                    at,
                    here,
                    "has both `path` and `prefix`",
                    "keep one of the two",
                );
                None
            }
        }
    }

    /// A host to write into a message.
    fn plain_host(&mut self, text: &Text, field: &str) -> Option<Box<str>> {
        let host = match HostPattern::parse(text.get_ref()) {
            Ok(HostPattern::Wildcard(_)) => {
                Err(("stands for many hosts", "write one name".to_owned()))
            }
            Ok(host) => Ok(host.to_string().into()),
            Err(refused) => Err(refused),
        };
        self.accepted(host, text, field)
    }

    pub(super) fn header_edits(
        &mut self,
        raw: Option<&RawHeaderEdits>,
        here: &str,
    ) -> Option<HeaderEdits> {
        let Some(raw) = raw else {
            return Some(HeaderEdits::default());
        };
        let mut seen = Seen::default();
        let mut values = |checker: &mut Self, map: &Option<BTreeMap<Text, Text>>, key: &str| {
            let pairs = map.iter().flatten().map(|(name, value)| {
                let field = format!("{here}.{key}.{}", name.get_ref());
                let header = checker.edited_header(name, &field, &mut seen);
                let parsed = HeaderValue::from_str(value.get_ref());
                if parsed.is_err() {
                    let fix = "write visible ASCII characters";
                    let wrong = "is not a header value";
                    checker.report(value.span(), field, wrong, fix);
                }
                header.zip(parsed.ok())
            });
            pairs.collect::<Vec<_>>()
        };
        let set = values(self, &raw.set, "set");
        let add = values(self, &raw.add, "add");
        let remove: Vec<Option<HeaderName>> = raw
            .remove
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, name)| {
                self.edited_header(name, &format!("{here}.remove[{index}]"), &mut seen)
            })
            .collect();
        Some(HeaderEdits {
            set: set.into_iter().collect::<Option<_>>()?,
            add: add.into_iter().collect::<Option<_>>()?,
            remove: remove.into_iter().collect::<Option<_>>()?,
        })
    }

    fn edited_header(
        &mut self,
        text: &Text,
        field: &str,
        seen: &mut Seen<String>,
    ) -> Option<HeaderName> {
        /// What frames the message, or has a field of its own.
        const FIXED: [HeaderName; 6] = [
            header::HOST,
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::CONNECTION,
            header::UPGRADE,
            header::TE,
        ];
        let name = self.header_name(text, field)?;
        if FIXED.contains(&name) {
            let wrong = format!("`{name}` is the gateway's to write");
            let fix = "delete it; the host is changed with `rewrite`";
            self.report(text.span(), field, wrong, fix);
            return None;
        }
        let key = name.as_str().to_owned();
        self.unique(seen, key, text.span(), field, "keep one of the two")?;
        Some(name)
    }
}
