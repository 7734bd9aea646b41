//! Tenants named by where a request goes: a label of its host, a segment of its path.

use std::fmt;
use std::ops::Range;

use http::HeaderName;
use toml::Spanned;

use super::check::Checker;
use super::pattern::Refused;
use super::raw::{RawTenant, RawTenantHeader};
use super::{CertificatePart, Name, TenantRule};

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

impl Checker<'_> {
    pub(super) fn tenant(
        &mut self,
        raw: Option<&Spanned<RawTenant>>,
        field: &str,
    ) -> Option<TenantRule> {
        let none = || Name::new("none");
        let Some(tenant) = raw else {
            return none().map(TenantRule::Fixed);
        };
        match tenant.get_ref() {
            RawTenant::Fixed(text) => self.name(text, tenant.span(), field).map(TenantRule::Fixed),
            RawTenant::Header(table) => self.tenant_of(table, tenant.span(), field),
        }
    }

    /// The rules of a table, in their fixed order: what is verified before what a client says, and where a request
    /// goes before what it carries.
    fn tenant_of(
        &mut self,
        table: &RawTenantHeader,
        at: Range<usize>,
        field: &str,
    ) -> Option<TenantRule> {
        let default = match &table.default {
            Some(text) => self.name(text.get_ref(), text.span(), &format!("{field}.default")),
            None => Name::new("none"),
        }?;
        let mut rules = Vec::new();
        if let Some(text) = &table.claim {
            rules.push(Some(TenantRule::Claim {
                claim: text.get_ref().as_str().into(),
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.certificate {
            let known = [
                ("name", CertificatePart::Name),
                ("alternative_name", CertificatePart::AlternativeName),
                ("common_name", CertificatePart::CommonName),
            ];
            let part = self.choice(text, &format!("{field}.certificate"), &known);
            rules.push(part.map(|part| TenantRule::Certificate {
                part,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.host {
            let template = HostTemplate::parse(text.get_ref());
            let template = self.accepted(template, text, &format!("{field}.host"));
            rules.push(template.map(|template| TenantRule::Host {
                template,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.path {
            let template = PathTemplate::parse(text.get_ref());
            let template = self.accepted(template, text, &format!("{field}.path"));
            rules.push(template.map(|template| TenantRule::Path {
                template,
                default: default.clone(),
            }));
        }
        if let Some(text) = &table.header {
            let header: Option<HeaderName> = text.get_ref().parse().ok();
            if header.is_none() {
                let wrong = format!("\"{}\" is not a header name", text.get_ref());
                let fix = "write such as `header = \"x-tenant\"`";
                self.report(text.span(), format!("{field}.header"), wrong, fix);
            }
            rules.push(header.map(|header| TenantRule::Header {
                header,
                default: default.clone(),
            }));
        }
        let mut rules = rules.into_iter().collect::<Option<Vec<TenantRule>>>()?;
        match rules.len() {
            0 => {
                let wrong = "says nowhere to read the tenant from";
                let fix =
                    "write such as `tenant = { header = \"x-tenant\", default = \"public\" }`";
                self.report(at, field, wrong, fix);
                None
            }
            1 => rules.pop(),
            _ => Some(TenantRule::FirstOf { rules, default }),
        }
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
