//! `[listeners.tls]`: certificates, versions, cipher suites, client certificates.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde::Deserialize;
use toml::Spanned;

use super::acme::{Acme, RawAcme};
use super::check::Checker;
use super::fields::example;
use super::raw::Text;
use super::upstream::RawUpstream;

/// How clients are spoken to in TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// For clients that name no host, or none of the others.
    pub pair: KeyPair,
    /// Chosen by the names in them.
    pub certificates: Vec<KeyPair>,
    /// Not empty.
    pub versions: Vec<TlsVersion>,
    /// Empty: the library's choice.
    pub ciphers: Vec<Box<str>>,
    /// None: no certificate is asked for.
    pub client: Option<ClientCertificates>,
    /// The pair is ordered by the gateway, and kept under its state directory.
    pub acme: Option<Acme>,
}

/// Files that were readable PEM when the configuration was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPair {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// An OCSP response in DER to staple.
    pub ocsp: Option<PathBuf>,
}

/// Who may vouch for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// PEM certificates of the authorities.
    pub authorities: PathBuf,
    /// Refuse clients without one.
    pub required: bool,
}

/// A protocol version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// How an upstream's peers are spoken to in TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// The name in the peers' certificates, and in the handshake.
    pub server_name: Box<str>,
    /// PEM certificates of those who may vouch for peers; None: the system's.
    pub authorities: Option<PathBuf>,
    /// Certificate chain and private key the gateway shows.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Take no certificate that is not vouched for, or for another name.
    pub verify: bool,
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    /// Text.
    V1,
    /// Binary.
    V2,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawUpstreamTls {
    server_name: Text,
    authorities: Option<Text>,
    certificate: Option<Text>,
    key: Option<Text>,
    verify: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct RawTls {
    certificate: Option<Text>,
    key: Option<Text>,
    acme: Option<Spanned<RawAcme>>,
    ocsp: Option<Text>,
    #[serde(default)]
    certificates: Vec<RawKeyPair>,
    versions: Option<Spanned<Vec<Text>>>,
    ciphers: Option<Spanned<Vec<Text>>>,
    client: Option<RawClient>,
}

impl RawTls {
    /// Where `acme` is written.
    pub(super) fn acme_span(&self) -> Option<Range<usize>> {
        self.acme.as_ref().map(Spanned::span)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawKeyPair {
    certificate: Text,
    key: Text,
    ocsp: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct RawClient {
    authorities: Text,
    required: Option<bool>,
}

/// Whether a key is a certificate's; else what is wrong with it.
fn fit(certificate: &Path, key: &Path) -> Result<(), String> {
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain =
        chain.map_err(|error| format!("cannot be compared with its certificate: {error}"))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| format!("holds no usable key: {error}"))?;
    let provider = rustls::crypto::ring::default_provider();
    match rustls::sign::CertifiedKey::from_der(chain, key, &provider) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(format!("is not the key of \"{}\"", certificate.display()))
        }
        Err(error) => Err(format!("cannot be used: {error}")),
    }
}

impl Checker<'_> {
    /// Where `certificate` and `key` are, `acme` may not be; one of the two must. The file of an
    /// ordered pair is `ordered`.
    pub(super) fn tls(
        &mut self,
        raw: &RawTls,
        here: &str,
        span: Range<usize>,
        ordered: Option<PathBuf>,
    ) -> Option<Tls> {
        let here = format!("{here}.tls");
        let acme = match &raw.acme {
            None => Some(None),
            Some(acme) => self.acme(acme.get_ref(), &format!("{here}.acme")).map(Some),
        };
        let pair = match (&raw.certificate, &raw.key, &raw.acme) {
            (Some(certificate), Some(key), None) => {
                self.key_pair(certificate, key, raw.ocsp.as_ref(), &here)
            }
            (None, None, Some(_)) => ordered.map(|file| KeyPair {
                certificate: file.clone(),
                key: file,
                ocsp: None,
            }),
            (Some(lone), _, Some(_)) | (None, Some(lone), Some(_)) => {
                let wrong = "stands beside `acme`, which orders the pair itself";
                self.report(lone.span(), &here, wrong, "keep one of the two");
                None
            }
            (certificate, _, None) => {
                let (missing, span) = match certificate {
                    Some(certificate) => ("key", certificate.span()),
                    None => ("certificate", span),
                };
                let field = format!("{here}.{missing}");
                let wrong = "is missing";
                let line = example(&format!("listeners.tls.{missing}")).unwrap_or_default();
                let fix = format!("add `{line}`, or [listeners.tls.acme]");
                self.report(span, field, wrong, fix);
                None
            }
        };
        let more: Vec<Option<KeyPair>> = raw
            .certificates
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                let here = format!("{here}.certificates[{index}]");
                self.key_pair(&raw.certificate, &raw.key, raw.ocsp.as_ref(), &here)
            })
            .collect();
        let versions = match &raw.versions {
            None => Some(vec![TlsVersion::V1_2, TlsVersion::V1_3]),
            Some(list) => {
                let field = format!("{here}.versions");
                let known = [("1.2", TlsVersion::V1_2), ("1.3", TlsVersion::V1_3)];
                self.list(
                    list.get_ref(),
                    list.span(),
                    &field,
                    |checker, text, field| checker.choice(text, field, &known),
                )
            }
        };
        let ciphers = match &raw.ciphers {
            None => Some(Vec::new()),
            Some(list) => {
                let field = format!("{here}.ciphers");
                let suites = rustls::crypto::ring::ALL_CIPHER_SUITES.iter();
                let names: Vec<String> = suites.map(|s| format!("{:?}", s.suite())).collect();
                let known: Vec<(&str, &str)> =
                    names.iter().map(|n| (n.as_str(), n.as_str())).collect();
                self.list(
                    list.get_ref(),
                    list.span(),
                    &field,
                    |checker, text, field| checker.choice(text, field, &known).map(Box::from),
                )
            }
        };
        let client = match &raw.client {
            None => Some(None),
            Some(raw) => {
                let field = format!("{here}.client.authorities");
                self.pem_file(&raw.authorities, &field, "CERTIFICATE")
                    .map(|authorities| {
                        Some(ClientCertificates {
                            authorities,
                            required: raw.required.unwrap_or(true),
                        })
                    })
            }
        };
        Some(Tls {
            pair: pair?,
            certificates: more.into_iter().collect::<Option<_>>()?,
            versions: versions?,
            ciphers: ciphers?,
            client: client?,
            acme: acme?,
        })
    }

    fn key_pair(
        &mut self,
        certificate: &Text,
        key: &Text,
        ocsp: Option<&Text>,
        here: &str,
    ) -> Option<KeyPair> {
        let field = format!("{here}.key");
        let span = key.span();
        let certificate = self.pem_file(certificate, &format!("{here}.certificate"), "CERTIFICATE");
        let key = self.pem_file(key, &field, "PRIVATE KEY");
        let (certificate, key) = self.fitting(certificate, key, span, &field).unzip();
        let ocsp = match ocsp {
            None => Some(None),
            Some(text) => self.path(text, &format!("{here}.ocsp")).map(Some),
        };
        Some(KeyPair {
            certificate: certificate?,
            key: key?,
            ocsp: ocsp?,
        })
    }

    /// The pair, if the key is the certificate's.
    fn fitting(
        &mut self,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
        span: Range<usize>,
        field: &str,
    ) -> Option<(PathBuf, PathBuf)> {
        let (certificate, key) = certificate.zip(key)?;
        let Err(wrong) = fit(&certificate, &key) else {
            return Some((certificate, key));
        };
        let shown = key.display();
        let wrong = format!("\"{shown}\" {wrong}");
        let fix = format!(
            "name the key that \"{}\" was made with",
            certificate.display()
        );
        self.report(span, field, wrong, fix);
        None
    }

    /// An upstream's TLS and PROXY header.
    #[allow(clippy::type_complexity)]
    pub(super) fn outbound(
        &mut self,
        raw: &RawUpstream,
        here: &str,
    ) -> (Option<Option<UpstreamTls>>, Option<Option<ProxyVersion>>) {
        let tls = match &raw.tls {
            None => Some(None),
            Some(raw) => self.upstream_tls(raw, &format!("{here}.tls")).map(Some),
        };
        let version = match &raw.proxy_protocol {
            None => Some(None),
            Some(text) => {
                let known = [("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)];
                self.choice(text, &format!("{here}.proxy_protocol"), &known)
                    .map(Some)
            }
        };
        (tls, version)
    }

    fn upstream_tls(&mut self, raw: &RawUpstreamTls, here: &str) -> Option<UpstreamTls> {
        let name = raw.server_name.get_ref();
        let valid = rustls::pki_types::DnsName::try_from(name.as_str()).is_ok();
        if !valid {
            let wrong = format!("\"{name}\" is not a host name");
            let fix = "write the name in the peers' certificates, such as \"orders.internal\"";
            self.report(
                raw.server_name.span(),
                format!("{here}.server_name"),
                wrong,
                fix,
            );
        }
        let authorities = match &raw.authorities {
            None => Some(None),
            Some(text) => self
                .pem_file(text, &format!("{here}.authorities"), "CERTIFICATE")
                .map(Some),
        };
        let identity = match (&raw.certificate, &raw.key) {
            (None, None) => Some(None),
            (Some(certificate), Some(key)) => {
                let field = format!("{here}.certificate");
                let certificate = self.pem_file(certificate, &field, "CERTIFICATE");
                let (field, span) = (format!("{here}.key"), key.span());
                let key = self.pem_file(key, &field, "PRIVATE KEY");
                self.fitting(certificate, key, span, &field).map(Some)
            }
            (Some(lone), None) | (None, Some(lone)) => {
                let wrong = "needs both `certificate` and `key`, or neither";
                self.report(lone.span(), here, wrong, "add the other one");
                None
            }
        };
        Some(UpstreamTls {
            server_name: valid.then(|| name.as_str().into())?,
            authorities: authorities?,
            identity: identity?,
            verify: raw.verify.unwrap_or(true),
        })
    }
}
