//! TLS towards clients: certificates by name, versions and cipher suites, stapled OCSP responses,
//! client certificates. Built whole from a configuration; a reload builds another one, and
//! connections keep theirs.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use pingora::protocols::tls::SslDigest;
use rustls::{
    RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{
        ClientHello, NoClientAuth, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
        danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{
    connection::{Identity, Tls as Agreed},
    proxy_header::Opened,
};
use crate::{
    acme,
    config::{ClientCertificates, KeyPair, Tls, TlsVersion},
};

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {wrong}", path.display())]
pub struct TlsError {
    path: PathBuf,
    wrong: String,
}

impl TlsError {
    pub(super) fn new(path: &Path, wrong: impl fmt::Display) -> Self {
        Self {
            path: path.to_owned(),
            wrong: wrong.to_string(),
        }
    }
}

/// What a listener's connections are accepted with.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn server_config(tls: &Tls, http2: bool) -> Result<ServerConfig, TlsError> {
    let mut provider = ring::default_provider();
    if !tls.ciphers.is_empty() {
        provider.cipher_suites.retain(|suite| {
            let name = format!("{:?}", suite.suite());
            tls.ciphers.iter().any(|wanted| **wanted == *name)
        });
    }
    let provider = Arc::new(provider);
    let versions: Vec<&'static SupportedProtocolVersion> = tls
        .versions
        .iter()
        .map(|version| match version {
            TlsVersion::V1_2 => &TLS12,
            TlsVersion::V1_3 => &TLS13,
        })
        .collect();
    let wrong = |error: rustls::Error| TlsError::new(&tls.pair.certificate, error);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .map_err(wrong)?;
    let verifier = match &tls.client {
        Some(client) => verifier(client, &provider)?,
        None => Arc::new(NoClientAuth),
    };
    let certificates = Certificates::load(tls, &provider)?;
    let mut config = builder
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = if http2 {
        vec![b"h2".to_vec(), b"http/1.1".to_vec()]
    } else {
        vec![b"http/1.1".to_vec()]
    };
    config.ticketer = tickets()?;
    config.send_tls13_tickets = 2;
    Ok(config)
}

/// One key for the life of the process: a session may be resumed after a reload. Not where client
/// certificates are asked for: rustls keeps the identity in the ticket.
fn tickets() -> Result<Arc<dyn ProducesTickets>, TlsError> {
    static TICKETS: OnceLock<Arc<dyn ProducesTickets>> = OnceLock::new();
    if let Some(tickets) = TICKETS.get() {
        return Ok(Arc::clone(tickets));
    }
    let made = ring::Ticketer::new().map_err(|error| TlsError::new(Path::new("tickets"), error))?;
    Ok(Arc::clone(TICKETS.get_or_init(|| made)))
}

fn verifier(
    client: &ClientCertificates,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&client.authorities)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::new(&client.authorities, error))?;
    }
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let builder = if client.required {
        builder
    } else {
        builder.allow_unauthenticated()
    };
    builder
        .build()
        .map_err(|error| TlsError::new(&client.authorities, error))
}

pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| TlsError::new(path, error))?
        .collect();
    let all = all.map_err(|error| TlsError::new(path, error))?;
    if all.is_empty() {
        return Err(TlsError::new(path, "holds no certificate"));
    }
    Ok(all)
}

/// A listener's certificates, by the names in them.
#[derive(Debug)]
struct Certificates {
    exact: HashMap<Box<str>, Arc<CertifiedKey>>,
    /// By what follows the asterisk, its dot included.
    wildcard: HashMap<Box<str>, Arc<CertifiedKey>>,
    default: Arc<CertifiedKey>,
}

impl Certificates {
    fn load(tls: &Tls, provider: &CryptoProvider) -> Result<Self, TlsError> {
        if let Some(acme) = &tls.acme {
            acme::ensure(&tls.pair.certificate, &acme.domains)
                .map_err(|error| TlsError::new(&tls.pair.certificate, format!("{error:#}")))?;
        }
        let (default, names) = load(&tls.pair, provider)?;
        let mut certificates = Self {
            exact: HashMap::new(),
            wildcard: HashMap::new(),
            default: Arc::clone(&default),
        };
        certificates.add(names, &default);
        for pair in &tls.certificates {
            let (key, names) = load(pair, provider)?;
            certificates.add(names, &key);
        }
        Ok(certificates)
    }

    /// The first certificate for a name keeps it.
    fn add(&mut self, names: Vec<String>, key: &Arc<CertifiedKey>) {
        for name in names {
            match name.strip_prefix('*') {
                Some(suffix) => self
                    .wildcard
                    .entry(suffix.into())
                    .or_insert_with(|| Arc::clone(key)),
                None => self
                    .exact
                    .entry(name.into())
                    .or_insert_with(|| Arc::clone(key)),
            };
        }
    }

    fn find(&self, name: Option<&str>) -> Arc<CertifiedKey> {
        let found = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            self.exact.get(name.as_str()).or_else(|| {
                // A wildcard stands for one label.
                let dot = name.find('.')?;
                self.wildcard.get(name.get(dot..)?)
            })
        });
        Arc::clone(found.unwrap_or(&self.default))
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.find(hello.server_name()))
    }
}

fn load(
    pair: &KeyPair,
    provider: &CryptoProvider,
) -> Result<(Arc<CertifiedKey>, Vec<String>), TlsError> {
    let chain = certificates(&pair.certificate)?;
    let key =
        PrivateKeyDer::from_pem_file(&pair.key).map_err(|error| TlsError::new(&pair.key, error))?;
    let names = chain.first().map(|leaf| names(leaf)).unwrap_or_default();
    let mut certified = CertifiedKey::from_der(chain, key, provider).map_err(|error| {
        let path = match error {
            rustls::Error::InconsistentKeys(_) => &pair.key,
            _ => &pair.certificate,
        };
        TlsError::new(path, error)
    })?;
    if let Some(path) = &pair.ocsp {
        let staple = std::fs::read(path).map_err(|error| TlsError::new(path, error))?;
        if staple.first() != Some(&0x30) {
            return Err(TlsError::new(path, "is no OCSP response in DER"));
        }
        certified.ocsp = Some(staple);
    }
    Ok((Arc::new(certified), names))
}

/// The DNS names and addresses a certificate is for, in lower case.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let names = names.value.general_names.iter();
    names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect()
}

/// What a finished handshake agreed on, for requests and for pingora.
#[must_use]
pub fn agreed(stream: &TlsStream<Opened>) -> (Agreed, SslDigest) {
    let (_, session) = stream.get_ref();
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "unknown",
    };
    let cipher = session
        .negotiated_cipher_suite()
        .and_then(|suite| suite.suite().as_str())
        .unwrap_or("unknown");
    let agreed = Agreed {
        server_name: session.server_name().map(Into::into),
        version,
        cipher,
        identity: session
            .peer_certificates()
            .and_then(<[_]>::first)
            .map(|leaf| identity(leaf)),
    };
    let digest = SslDigest::new(cipher, version, None, None, Vec::new());
    (agreed, digest)
}

fn identity(certificate: &CertificateDer<'_>) -> Identity {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Identity::default();
    };
    let alternative_name = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .and_then(|names| {
            names
                .value
                .general_names
                .iter()
                .find_map(|name| match name {
                    GeneralName::DNSName(name)
                    | GeneralName::URI(name)
                    | GeneralName::RFC822Name(name) => Some((*name).into()),
                    _ => None,
                })
        });
    let common_name = certificate
        .subject()
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .map(Into::into);
    Identity {
        alternative_name,
        common_name,
    }
}
