//! Which requests a route is for.

use std::ops::Range;

use http::Method;
use toml::Spanned;

use super::raw::{RawPath, RawRoute, RawValueMatch};
use super::{Match, ValuePattern};
use crate::config::check::Checker;
use crate::config::raw::Text;
use crate::config::{HostPattern, PathPattern, Regex};

impl Checker<'_> {
    pub(super) fn matches(&mut self, raw: &RawRoute, here: &str) -> Option<Vec<Match>> {
        let Some(list) = &raw.matches else {
            let (headers, query) = (raw.headers.as_deref(), raw.query.as_deref());
            let one = self.one_match(
                raw.path.as_ref(),
                raw.methods.as_ref(),
                headers,
                query,
                here,
            );
            return one.map(|one| vec![one]);
        };
        let field = format!("{here}.matches");
        let outside = raw.path.is_some()
            || raw.methods.is_some()
            || raw.headers.is_some()
            || raw.query.is_some();
        if outside {
            let wrong = "stands beside `path`, `methods`, `headers` or `query`";
            let fix = "move them into one of the matches";
            self.report(list.span(), &field, wrong, fix);
            return None;
        }
        if list.get_ref().is_empty() {
            let fix = "leave it out to match everything";
            self.report(list.span(), &field, "is empty", fix);
            return None;
        }
        let checked: Vec<Option<Match>> = list
            .get_ref()
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let raw = raw.get_ref();
                let (headers, query) = (raw.headers.as_deref(), raw.query.as_deref());
                let here = format!("{field}[{index}]");
                self.one_match(
                    raw.path.as_ref(),
                    raw.methods.as_ref(),
                    headers,
                    query,
                    &here,
                )
            })
            .collect();
        checked.into_iter().collect()
    }

    fn one_match(
        &mut self,
        path: Option<&Spanned<RawPath>>,
        methods: Option<&Spanned<Vec<Text>>>,
        headers: Option<&[RawValueMatch]>,
        query: Option<&[RawValueMatch]>,
        here: &str,
    ) -> Option<Match> {
        let methods = match methods {
            Some(list) => {
                let field = format!("{here}.methods");
                self.list(list.get_ref(), list.span(), &field, Self::method)
            }
            None => Some(Vec::new()),
        };
        let path = match path {
            Some(path) => self.path_pattern(path.get_ref(), path.span(), &format!("{here}.path")),
            None => Some(PathPattern::Prefix("".into())),
        };
        let headers = self.values(headers, &format!("{here}.headers"), Self::header_name);
        let query = self.values(query, &format!("{here}.query"), |_, text, _| {
            Some(Box::<str>::from(text.get_ref().as_str()))
        });
        let mut headers = headers?;
        headers.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        let mut query = query?;
        query.sort_by(|(a, _), (b, _)| a.cmp(b));
        Some(Match {
            path: path?,
            methods: methods?,
            headers,
            query,
        })
    }

    fn values<N: PartialEq>(
        &mut self,
        raw: Option<&[RawValueMatch]>,
        here: &str,
        mut named: impl FnMut(&mut Self, &Text, &str) -> Option<N>,
    ) -> Option<Vec<(N, ValuePattern)>> {
        let mut values: Vec<Option<(N, ValuePattern)>> = Vec::new();
        for (index, raw) in raw.unwrap_or_default().iter().enumerate() {
            let here = format!("{here}[{index}]");
            let name = named(self, &raw.name, &format!("{here}.name"));
            if let Some(name) = &name
                && values.iter().flatten().any(|(known, _)| known == name)
            {
                let wrong = format!("\"{}\" is already matched", raw.name.get_ref());
                let fix = "keep one; write a regex for several values";
                self.report(raw.name.span(), format!("{here}.name"), wrong, fix);
            }
            let pattern = match (&raw.exact, &raw.regex) {
                (Some(text), None) => Some(ValuePattern::Exact(text.get_ref().as_str().into())),
                (None, Some(text)) => {
                    let regex = Regex::parse(text.get_ref());
                    self.accepted(regex, text, &format!("{here}.regex"))
                        .map(ValuePattern::Regex)
                }
                _ => {
                    let fix = "write either `exact` or `regex`";
                    let wrong = "needs one of `exact` and `regex`";
                    self.report(raw.name.span(), &here, wrong, fix);
                    None
                }
            };
            values.push(name.zip(pattern));
        }
        values.into_iter().collect()
    }

    pub(super) fn host(&mut self, text: &Text, field: &str) -> Option<HostPattern> {
        let pattern = HostPattern::parse(text.get_ref());
        self.accepted(pattern, text, field)
    }

    fn method(&mut self, text: &Text, field: &str) -> Option<Method> {
        let written = text.get_ref();
        let capital = written.to_ascii_uppercase();
        let method = match Method::from_bytes(written.as_bytes()) {
            Ok(method) if *written == capital => Ok(method),
            Ok(_) => Err(("is not in capital letters", format!("write \"{capital}\""))),
            Err(_) => Err(("is not a method", "write such as \"GET\"".to_owned())),
        };
        self.accepted(method, text, field)
    }

    fn path_pattern(
        &mut self,
        raw: &RawPath,
        at: Range<usize>,
        field: &str,
    ) -> Option<PathPattern> {
        match (&raw.exact, &raw.prefix, &raw.regex) {
            (Some(text), None, None) => {
                let pattern = PathPattern::exact(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.exact"))
            }
            (None, Some(text), None) => {
                let pattern = PathPattern::prefix(text.get_ref());
                self.accepted(pattern, text, &format!("{field}.prefix"))
            }
            (None, None, Some(text)) => {
                let pattern = Regex::parse(text.get_ref()).map(PathPattern::Regex);
                self.accepted(pattern, text, &format!("{field}.regex"))
            }
            (exact, prefix, _) => {
                let wrong = match (exact, prefix) {
                    (Some(_), Some(_)) => "has both `exact` and `prefix`",
                    (None, None) => "has neither `exact`, `prefix` nor `regex`",
                    _ => "has a `regex` beside another pattern",
                };
                let fix = r#"write `path = { prefix = "/api" }` or `path = { exact = "/x" }`"#;
                self.report(at, field, wrong, fix);
                None
            }
        }
    }
}
