//! What a route compares a request with, in the normal form the router looks up.

use std::fmt;
use std::net::Ipv6Addr;

use http::HeaderName;

use super::Name;
use super::tenant::{HostTemplate, PathTemplate};

/// A host a route is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// Lower-case name or IPv4 address, without port or trailing dot.
    Exact(Box<str>),
    /// An IPv6 literal: compared as an address, so that every spelling of it matches.
    Ipv6(Ipv6Addr),
    /// Lower-case suffix with its leading dot: `.shop.example` stands for `*.shop.example` and
    /// matches any number of labels before it, but not none.
    Wildcard(Box<str>),
}

/// A text that is no host pattern: what is wrong and what to write instead.
pub(super) type Refused = (&'static str, String);

impl HostPattern {
    const LENGTH_MAX: usize = 253;

    pub(super) fn parse(text: &str) -> Result<Self, Refused> {
        let lower = text.to_ascii_lowercase();
        let bare = lower
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if let Ok(address) = bare.unwrap_or(&lower).parse() {
            return Ok(Self::Ipv6(address));
        }
        if lower == "*" {
            return Err((
                "a lone `*` is not a host",
                "leave `hosts` out to match any host".into(),
            ));
        }
        if let Some((name, port)) = lower.rsplit_once(':')
            && (name.ends_with(']') || !name.contains(':'))
            && port.bytes().all(|byte| byte.is_ascii_digit())
        {
            return Err((
                "has a port, and hosts are compared without it",
                format!("write \"{name}\""),
            ));
        }
        if let Some(name) = lower.strip_suffix('.') {
            return Err(("ends in a dot", format!("write \"{name}\"")));
        }
        let name = lower.strip_prefix("*.").unwrap_or(&lower);
        if name.contains('*') {
            return Err((
                "has a `*` elsewhere than in front",
                "write \"*.shop.example\"".into(),
            ));
        }
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if lower.len() > Self::LENGTH_MAX || !name.split('.').all(label) {
            return Err((
                "is not a host name",
                "write a name such as \"shop.example\", \"*.shop.example\" or \"[::1]\"".into(),
            ));
        }
        Ok(if name.len() < lower.len() {
            Self::Wildcard(lower[1..].into())
        } else {
            Self::Exact(lower.into())
        })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Ipv6(address) => write!(f, "[{address}]"),
            Self::Wildcard(suffix) => write!(f, "*{suffix}"),
        }
    }
}

/// The paths a route is for. Compared with the raw path: no decoding, no query.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// This path only.
    Exact(Box<str>),
    /// This path and everything below it. Without trailing slashes, so the empty text is
    /// everything.
    Prefix(Box<str>),
    /// Paths that match as a whole.
    Regex(Regex),
}

/// A regular expression that a text matches as a whole. Equal when written alike.
#[derive(Clone, Debug)]
pub struct Regex {
    text: Box<str>,
    compiled: regex::Regex,
}

impl Regex {
    pub(super) fn parse(text: &str) -> Result<Self, Refused> {
        match regex::Regex::new(&Self::whole(text)) {
            Ok(compiled) => Ok(Self {
                text: text.into(),
                compiled,
            }),
            Err(error) => {
                let error = error.to_string();
                let said = error.lines().last().unwrap_or_default().trim();
                let said = said.strip_prefix("error: ").unwrap_or(said);
                Err((
                    "is not a regular expression",
                    format!("see the syntax of Rust's regex crate: {said}"),
                ))
            }
        }
    }

    fn whole(text: &str) -> String {
        format!("^(?:{text})$")
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// For sets: anchored at both ends.
    pub fn anchored(&self) -> &str {
        self.compiled.as_str()
    }

    /// Whether the whole text matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.compiled.is_match(text)
    }
}

impl PartialEq for Regex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Regex {}

impl std::hash::Hash for Regex {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl PathPattern {
    pub(super) fn exact(text: &str) -> Result<Self, Refused> {
        raw_path(text)?;
        Ok(Self::Exact(text.into()))
    }

    pub(super) fn prefix(text: &str) -> Result<Self, Refused> {
        raw_path(text)?;
        Ok(Self::Prefix(text.trim_end_matches('/').into()))
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Prefix(prefix) => write!(f, "{prefix}/*"),
            Self::Regex(regex) => write!(f, " ~{}", regex.as_str()),
        }
    }
}

/// Refuses what a request's raw path can never contain.
fn raw_path(text: &str) -> Result<(), Refused> {
    if !text.starts_with('/') {
        return Err(("does not start with `/`", format!("write \"/{text}\"")));
    }
    if let Some(at) = text.find(['?', '#']) {
        return Err((
            "contains a query or fragment, and only paths are compared",
            format!("write \"{}\"", &text[..at]),
        ));
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err((
            "contains bytes that arrive percent-encoded",
            "write them as in the request line, such as `%20` for a space".into(),
        ));
    }
    Ok(())
}

/// On whose account a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TenantRule {
    /// Always this tenant.
    Fixed(Name),
    /// The tenant named in a request header.
    Header {
        /// Which header.
        header: HeaderName,
        /// When the header is missing or holds no valid [`Name`].
        default: Name,
    },
    /// The tenant a verified client certificate names.
    Certificate {
        /// Which name of it.
        part: CertificatePart,
        /// When there is no certificate, or its name is no valid [`Name`].
        default: Name,
    },
    /// The tenant a verified token names.
    Claim {
        /// Which claim.
        claim: Box<str>,
        /// When there is no token, or the claim is no valid [`Name`].
        default: Name,
    },
    /// The tenant that a label of the host names.
    Host {
        /// Which label.
        template: HostTemplate,
        /// When the host is another or the label no valid [`Name`].
        default: Name,
    },
    /// The tenant that a segment of the path names.
    Path {
        /// Which segment.
        template: PathTemplate,
        /// When the path is another or the segment no valid [`Name`].
        default: Name,
    },
    /// The first of several that names one: what is verified before what a client merely says,
    /// and where a request goes before what it carries.
    FirstOf {
        /// In this order.
        rules: Vec<TenantRule>,
        /// When none does.
        default: Name,
    },
}

/// Which name of a client certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificatePart {
    /// The first subject alternative name, else the common name.
    Name,
    /// The first subject alternative name.
    AlternativeName,
    /// The subject's common name.
    CommonName,
}

impl TenantRule {
    /// Whose the requests are that name no tenant.
    #[must_use]
    pub fn fallback(&self) -> &Name {
        match self {
            Self::Fixed(name) => name,
            Self::Header { default, .. }
            | Self::Certificate { default, .. }
            | Self::Claim { default, .. }
            | Self::Host { default, .. }
            | Self::Path { default, .. }
            | Self::FirstOf { default, .. } => default,
        }
    }
}

impl TenantRule {
    /// Whether it asks for what was verified about the client.
    #[must_use]
    pub fn needs_identity(&self) -> bool {
        match self {
            Self::Certificate { .. } | Self::Claim { .. } => true,
            Self::FirstOf { rules, .. } => rules.iter().any(Self::needs_identity),
            Self::Fixed(_) | Self::Header { .. } | Self::Host { .. } | Self::Path { .. } => false,
        }
    }

    /// Where the tenant is read, in words.
    fn source(&self) -> String {
        match self {
            Self::Fixed(name) => name.to_string(),
            Self::Header { header, .. } => format!("header {header}"),
            Self::Certificate { .. } => "client certificate".into(),
            Self::Claim { claim, .. } => format!("claim {claim}"),
            Self::Host { template, .. } => format!("host {template}"),
            Self::Path { template, .. } => format!("path {template}"),
            Self::FirstOf { rules, .. } => {
                let sources: Vec<String> = rules.iter().map(Self::source).collect();
                sources.join(", ")
            }
        }
    }
}

impl fmt::Display for TenantRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(name) => name.fmt(f),
            rule => write!(f, "{} or {}", rule.source(), rule.fallback()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HostPattern, PathPattern};

    #[test]
    fn hosts_reach_their_normal_form() {
        for (text, normal) in [
            ("Shop.Example", "shop.example"),
            ("*.Shop.example", "*.shop.example"),
            ("10.0.0.1", "10.0.0.1"),
            ("[0:0::1]", "[::1]"),
            ("::1", "[::1]"),
        ] {
            assert_eq!(HostPattern::parse(text).unwrap().to_string(), normal);
        }
    }

    #[test]
    fn other_hosts_are_refused() {
        for (text, fix) in [
            ("shop.example:80", "write \"shop.example\""),
            ("[::1]:80", "write \"[::1]\""),
            ("shop.example.", "write \"shop.example\""),
            ("a.*.example", "write \"*.shop.example\""),
            ("*", "leave `hosts` out to match any host"),
        ] {
            assert_eq!(HostPattern::parse(text).unwrap_err().1, fix, "{text}");
        }
        for text in ["", ".a", "a..b", "a b", "é.example", "[::1", "*.", "a/b"] {
            assert!(HostPattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn prefixes_lose_trailing_slashes_and_exact_paths_keep_them() {
        assert_eq!(PathPattern::prefix("/").unwrap().to_string(), "/*");
        assert_eq!(PathPattern::prefix("/a/").unwrap().to_string(), "/a/*");
        assert_eq!(PathPattern::exact("/a/").unwrap().to_string(), "/a/");
        for text in ["", "a", "/a?b", "/a#b", "/a b", "/é"] {
            assert!(PathPattern::prefix(text).is_err(), "{text}");
        }
    }
}
