//! A self-signed certificate for a demo or a test, made anew each time.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::PublicKeyData as _;
use sha2::{Digest as _, Sha256};
use tokio_rustls::rustls::pki_types::CertificateDer;

/// Files for a server, and the root for its clients.
#[derive(Debug)]
pub struct Certificate {
    /// PEM chain.
    pub certificate: PathBuf,
    /// PEM key.
    pub key: PathBuf,
    /// What clients trust.
    pub root: CertificateDer<'static>,
    /// SHA-256 of its public key, base64. A browser told to trust that key caches what it gets, which
    /// it does not when it is told to ignore errors.
    pub key_sha256: String,
}

/// Writes `cert.pem` and `key.pem` for these addresses into a directory.
///
/// # Errors
/// The files cannot be written.
pub fn write(directory: &Path, addresses: &[IpAddr]) -> Result<Certificate> {
    let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let made = rcgen::generate_simple_self_signed(names).context("making a certificate")?;
    let certificate = directory.join("cert.pem");
    let key = directory.join("key.pem");
    std::fs::write(&certificate, made.cert.pem()).context("writing cert.pem")?;
    std::fs::write(&key, made.signing_key.serialize_pem()).context("writing key.pem")?;
    Ok(Certificate {
        certificate,
        key,
        root: made.cert.der().clone(),
        key_sha256: BASE64_STANDARD
            .encode(Sha256::digest(made.signing_key.subject_public_key_info())),
    })
}
