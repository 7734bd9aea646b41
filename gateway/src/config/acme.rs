//! `[listeners.tls.acme]`: a certificate that the gateway orders itself.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::check::Checker;
use super::raw::{Number, Text};

/// From whom, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// URL of the server's directory.
    pub directory: String,
    /// Host names, in lower case; not empty, no wildcards: http-01 cannot prove them.
    pub domains: Vec<Box<str>>,
    /// Such as `mailto:ops@shop.example`.
    pub contact: Vec<Box<str>>,
    /// PEM certificates of those who may vouch for the server; None: the system's.
    pub authorities: Option<PathBuf>,
    /// Before a failed order is tried again; twice as long after each failure.
    pub retry: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawAcme {
    pub(super) directory: Text,
    domains: Spanned<Vec<Text>>,
    contact: Option<Spanned<Vec<Text>>>,
    authorities: Option<Text>,
    retry_seconds: Option<Number>,
}

impl Checker<'_> {
    pub(super) fn acme(&mut self, raw: &RawAcme, here: &str) -> Option<Acme> {
        let directory = raw.directory.get_ref();
        let is_url = directory.starts_with("https://") && directory.parse::<http::Uri>().is_ok();
        if !is_url {
            self.report(
                raw.directory.span(),
                format!("{here}.directory"),
                format!("\"{directory}\" is not an https:// URL"),
                "write the URL of the server's directory, such as \
                 \"https://acme-v02.api.letsencrypt.org/directory\"",
            );
        }
        let domains = self.list(
            raw.domains.get_ref(),
            raw.domains.span(),
            &format!("{here}.domains"),
            |checker, text, field| {
                let name = text.get_ref().to_ascii_lowercase();
                if rustls::pki_types::DnsName::try_from(name.as_str()).is_ok() {
                    return Some(Box::from(name));
                }
                let wrong = format!("\"{name}\" is not a host name that http-01 can prove");
                let fix = "write a host name without a wildcard, such as \"shop.example\"";
                checker.report(text.span(), field, wrong, fix);
                None
            },
        );
        let contact = match &raw.contact {
            None => Some(Vec::new()),
            Some(list) => self.list(
                list.get_ref(),
                list.span(),
                &format!("{here}.contact"),
                |checker, text, field| {
                    let address = text.get_ref();
                    if address.starts_with("mailto:") && address.contains('@') {
                        return Some(Box::from(address.as_str()));
                    }
                    let wrong = format!("\"{address}\" is not a mailto: address");
                    checker.report(
                        text.span(),
                        field,
                        wrong,
                        "write \"mailto:ops@shop.example\"",
                    );
                    None
                },
            ),
        };
        let authorities = match &raw.authorities {
            None => Some(None),
            Some(text) => self
                .pem_file(text, &format!("{here}.authorities"), "CERTIFICATE")
                .map(Some),
        };
        let retry = raw.retry_seconds.as_ref();
        let retry = self.number(retry, &format!("{here}.retry_seconds"), 1..=86_400, 60);
        Some(Acme {
            directory: is_url.then(|| directory.clone())?,
            domains: domains?,
            contact: contact?,
            authorities: authorities?,
            retry: Duration::from_secs(retry?),
        })
    }
}
