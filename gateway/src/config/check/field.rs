//! What the check of any field needs: ranges, choices, names, addresses, paths, and where a
//! value was met first.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Checker;
use crate::config::Name;
use crate::config::fields::example;
use crate::config::problem::{ConfigError, Source, invalid, nearest, quoted};
use crate::config::raw::{Number, Text};

/// Checks every part of the file shares.
impl<'a> Checker<'a> {
    pub(in crate::config) fn new(source: &'a Source<'a>, base: &'a Path) -> Self {
        Self {
            source,
            base,
            problems: Vec::new(),
        }
    }

    /// The checked value, or every problem found.
    pub(in crate::config) fn finish<T>(self, checked: Option<T>) -> Result<T, ConfigError> {
        match checked {
            Some(value) if self.problems.is_empty() => Ok(value),
            _ => {
                debug_assert!(!self.problems.is_empty(), "refused without a reason");
                Err(invalid(self.problems))
            }
        }
    }

    pub(in crate::config) fn report(
        &mut self,
        at: Range<usize>,
        field: impl Into<String>,
        wrong: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let problem = self.source.problem(at, field, wrong, fix);
        self.problems.push(problem);
    }

    pub(in crate::config) fn number<T: TryFrom<i64>>(
        &mut self,
        raw: Option<&Number>,
        field: &str,
        range: RangeInclusive<i64>,
        default: i64,
    ) -> Option<T> {
        let Some(number) = raw else {
            return T::try_from(default).ok();
        };
        let value = *number.get_ref();
        if range.contains(&value) {
            return T::try_from(value).ok();
        }
        let (low, high) = range.into_inner();
        let wrong = format!("{value} is out of range");
        self.report(
            number.span(),
            field,
            wrong,
            format!("write a number from {low} to {high}"),
        );
        None
    }

    /// The first choice is the default.
    pub(in crate::config) fn choice_or<T: Copy>(
        &mut self,
        raw: Option<&Text>,
        field: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        match raw {
            Some(text) => self.choice(text, field, choices),
            None => choices.first().map(|&(_, value)| value),
        }
    }

    pub(in crate::config) fn choice<T: Copy>(
        &mut self,
        text: &Text,
        field: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let written = text.get_ref();
        if let Some(&(_, value)) = choices.iter().find(|&&(name, _)| name == written) {
            return Some(value);
        }
        let names = choices.iter().map(|&(name, _)| name);
        let fix = match nearest(written, names.clone()) {
            Some(meant) => format!("write \"{meant}\""),
            None => format!("write one of {}", quoted(names.clone())),
        };
        let wrong = format!("\"{written}\" is not one of {}", quoted(names));
        self.report(text.span(), field, wrong, fix);
        None
    }

    /// For types whose own error says what is wrong and whose example says how it looks.
    pub(in crate::config) fn parsed<T: FromStr<Err: std::fmt::Display>>(
        &mut self,
        text: &Text,
        field: &str,
    ) -> Option<T> {
        match text.get_ref().parse() {
            Ok(value) => Some(value),
            Err(error) => {
                let fix = format!("write such as `{}`", example(field).unwrap_or_default());
                let wrong = format!("\"{}\" {error}", text.get_ref());
                self.report(text.span(), field, wrong, fix);
                None
            }
        }
    }

    pub(in crate::config) fn name(
        &mut self,
        text: &str,
        at: Range<usize>,
        field: &str,
    ) -> Option<Name> {
        let name = Name::new(text);
        if name.is_none() {
            self.report(
                at,
                field,
                format!("\"{text}\" is not a name"),
                format!(
                    "write at most {} of a-z 0-9 . _ -, beginning with a letter or digit",
                    Name::LENGTH_MAX
                ),
            );
        }
        name
    }

    pub(in crate::config) fn unique_name<'r>(
        &mut self,
        seen: &mut Seen<&'r str>,
        text: &'r Text,
        field: &str,
    ) -> Option<Name> {
        let written = text.get_ref().as_str();
        let name = self.name(written, text.span(), field)?;
        self.unique(seen, written, text.span(), field, "write another name")?;
        Some(name)
    }

    /// `None`, and a problem, when the value was seen before.
    pub(in crate::config) fn unique<K: Hash + Eq + std::fmt::Display + Clone>(
        &mut self,
        seen: &mut Seen<K>,
        value: K,
        at: Range<usize>,
        field: &str,
        fix: &str,
    ) -> Option<()> {
        let Some(first) = seen.insert(value.clone(), field.to_owned()) else {
            return Some(());
        };
        self.report(at, field, format!("\"{value}\" is already in {first}"), fix);
        None
    }

    pub(in crate::config) fn address(
        &mut self,
        text: &str,
        at: Range<usize>,
        field: &str,
    ) -> Option<SocketAddr> {
        let address = text.parse().ok();
        if address.is_none() {
            let fix = if text.parse::<IpAddr>().is_ok() {
                "add a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"".to_owned()
            } else if let Some(port) = text.strip_prefix("localhost:") {
                format!("write \"127.0.0.1:{port}\"")
            } else if let Some(port) = text.strip_prefix(':') {
                format!("write \"0.0.0.0:{port}\"")
            } else {
                "write IP:port, such as \"127.0.0.1:8080\"; names are not resolved".to_owned()
            };
            let wrong = format!("\"{text}\" is not a socket address");
            self.report(at, field, wrong, fix);
        }
        address
    }

    /// Relative to the configuration file's folder.
    pub(in crate::config) fn path(&mut self, text: &Text, field: &str) -> Option<PathBuf> {
        if text.get_ref().is_empty() {
            let fix = format!("write such as `{}`", example(field).unwrap_or_default());
            self.report(text.span(), field, "is empty", fix);
            return None;
        }
        Some(self.base.join(text.get_ref()))
    }

    /// A file that can be read now and holds this kind of PEM block.
    pub(in crate::config) fn pem_file(
        &mut self,
        text: &Text,
        field: &str,
        kind: &str,
    ) -> Option<PathBuf> {
        let path = self.path(text, field)?;
        let shown = path.display();
        let (wrong, fix) = match std::fs::read_to_string(&path) {
            Ok(pem) if pem.contains(&format!("{kind}-----")) => return Some(path),
            Ok(_) => (
                format!("\"{shown}\" holds no PEM block ending in `{kind}-----`"),
                format!("name a PEM file with a {}", kind.to_lowercase()),
            ),
            Err(error) => (
                format!("\"{shown}\" cannot be read: {error}"),
                "name an existing PEM file; relative paths start at the configuration file's folder"
                    .to_owned(),
            ),
        };
        self.report(text.span(), field, wrong, fix);
        None
    }
}

/// Values met so far and the field each was first met in.
pub(in crate::config) struct Seen<K>(HashMap<K, String>);

impl<K> Default for Seen<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Seen<K> {
    /// The field this value was met in before, if any; that one stays the first.
    pub(in crate::config) fn insert(&mut self, value: K, field: String) -> Option<String> {
        match self.0.get(&value) {
            Some(first) => Some(first.clone()),
            None => {
                self.0.insert(value, field);
                None
            }
        }
    }
}
