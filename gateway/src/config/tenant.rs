//! Tenants named by where a request goes: a label of its host, a segment of its path.

use std::fmt;

use super::Name;
use super::pattern::Refused;

/// What stands for the tenant.
const PLACE: &str = "{tenant}";

/// `{tenant}.shop.example`: one whole label of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTemplate {
    before: Box<str>,
    after: Box<str>,
}

/// `/t/{tenant}` or `/t/{tenant}/orders`: one whole segment of the path, and everything below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathTemplate {
    before: Box<str>,
    after: Box<str>,
}

impl HostTemplate {
    pub(super) fn parse(text: &str) -> Result<Self, Refused> {
        let fix = || "write such as \"{tenant}.shop.example\"".to_owned();
        let lower = text.to_ascii_lowercase();
        let Some((before, after)) = lower.split_once(PLACE) else {
            return Err(("does not say which label is the `{tenant}`", fix()));
        };
        let whole_label = (before.is_empty() || before.ends_with('.')) && after.starts_with('.');
        let plain = |part: &str| {
            part.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        if !whole_label || after.len() < 2 || !plain(before) || !plain(after) {
            return Err(("is not a host with one whole `{tenant}` label", fix()));
        }
        Ok(Self {
            before: before.into(),
            after: after.into(),
        })
    }

    /// The tenant a host names. Ports, a trailing dot and capitals do not matter.
    #[must_use]
    pub fn tenant(&self, host: &str) -> Option<Box<str>> {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let label = name
            .strip_prefix(&*self.before)?
            .strip_suffix(&*self.after)?;
        (!label.contains('.') && Name::is_valid(label)).then(|| label.into())
    }
}

impl PathTemplate {
    pub(super) fn parse(text: &str) -> Result<Self, Refused> {
        let fix = || "write such as \"/t/{tenant}\"".to_owned();
        let Some((before, after)) = text.split_once(PLACE) else {
            return Err(("does not say which segment is the `{tenant}`", fix()));
        };
        let whole = before.starts_with('/')
            && before.ends_with('/')
            && (after.is_empty() || after.starts_with('/'));
        let graphic = text.bytes().all(|byte| byte.is_ascii_graphic());
        if !whole || !graphic || text.contains(['?', '#']) || after.contains(PLACE) {
            return Err(("is not a path with one whole `{tenant}` segment", fix()));
        }
        Ok(Self {
            before: before.into(),
            after: after.trim_end_matches('/').into(),
        })
    }

    /// The tenant a raw path names.
    #[must_use]
    pub fn tenant(&self, path: &str) -> Option<Box<str>> {
        let rest = path.strip_prefix(&*self.before)?;
        let end = rest.find('/').unwrap_or(rest.len());
        let (segment, below) = rest.split_at(end);
        let below = below.strip_prefix(&*self.after)?;
        let boundary = below.is_empty() || below.starts_with('/');
        (boundary && Name::is_valid(segment)).then(|| segment.into())
    }
}

impl fmt::Display for HostTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{PLACE}{}", self.before, self.after)
    }
}

impl fmt::Display for PathTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{PLACE}{}", self.before, self.after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_of_the_host() {
        let template = HostTemplate::parse("{tenant}.Shop.example").unwrap();
        for (host, tenant) in [
            ("acme.shop.example", Some("acme")),
            ("ACME.shop.example.:8443", Some("acme")),
            ("a.b.shop.example", None),
            (".shop.example", None),
            ("shop.example", None),
            ("acme.shop.example.evil", None),
            ("-x.shop.example", None),
        ] {
            assert_eq!(template.tenant(host).as_deref(), tenant, "{host}");
        }
        let inner = HostTemplate::parse("api.{tenant}.example").unwrap();
        assert_eq!(inner.tenant("api.acme.example").as_deref(), Some("acme"));
        for text in [
            "shop.example",
            "{tenant}",
            "x{tenant}.a",
            "{tenant}.{tenant}.a",
            "{tenant}.",
        ] {
            assert!(HostTemplate::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_segment_of_the_path() {
        let template = PathTemplate::parse("/t/{tenant}").unwrap();
        let deeper = PathTemplate::parse("/t/{tenant}/orders/").unwrap();
        for (path, tenant, with_orders) in [
            ("/t/acme", Some("acme"), None),
            ("/t/acme/orders", Some("acme"), Some("acme")),
            ("/t/acme/orders/7", Some("acme"), Some("acme")),
            ("/t/acme/ordersx", Some("acme"), None),
            ("/t/ACME/orders", None, None),
            ("/t/a%2Fb/orders", None, None),
            ("/t//orders", None, None),
            ("/x/acme", None, None),
        ] {
            assert_eq!(template.tenant(path).as_deref(), tenant, "{path}");
            assert_eq!(deeper.tenant(path).as_deref(), with_orders, "{path}");
        }
        for text in [
            "/t",
            "t/{tenant}",
            "/t{tenant}",
            "/{tenant}x",
            "/{tenant}?a",
            "/{tenant}/{tenant}",
        ] {
            assert!(PathTemplate::parse(text).is_err(), "{text}");
        }
    }
}
