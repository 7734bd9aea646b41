//! Key and chain in one file that only its owner can read.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// What is served now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    not_before: SystemTime,
    pub(super) not_after: SystemTime,
    names: Vec<String>,
    /// Self-signed, by [`ensure`].
    pub(super) stands_in: bool,
}

impl Held {
    /// When another one is to be ordered.
    pub(super) fn due(&self) -> SystemTime {
        if self.stands_in {
            return UNIX_EPOCH;
        }
        let lifetime = self.not_after.duration_since(self.not_before);
        self.not_before + lifetime.unwrap_or_default() * 2 / 3
    }

    /// Whether it has all these names.
    pub(super) fn is_for(&self, domains: &[Box<str>]) -> bool {
        let has = |domain: &str| self.names.iter().any(|name| name == domain);
        domains.iter().all(|domain| has(domain))
    }
}

/// Where a listener's key and chain are.
#[must_use]
pub fn file(state_dir: &Path, listener: &str) -> PathBuf {
    state_dir.join("acme").join(format!("{listener}.pem"))
}

/// Reads the leaf; None when there is no readable one.
pub(super) fn read(path: &Path) -> Option<Held> {
    let leaf = CertificateDer::pem_file_iter(path).ok()?.next()?.ok()?;
    let (_, leaf) = X509Certificate::from_der(&leaf).ok()?;
    let at = |time: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
    };
    let names = leaf.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.as_slice());
    let names = names
        .unwrap_or_default()
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        });
    Some(Held {
        not_before: at(leaf.validity().not_before),
        not_after: at(leaf.validity().not_after),
        names: names.collect(),
        stands_in: leaf.issuer() == leaf.subject(),
    })
}

/// Makes a self-signed certificate stand in where there is none yet: a listener cannot be without.
///
/// # Errors
/// The folder or file cannot be written.
pub fn ensure(path: &Path, domains: &[Box<str>]) -> anyhow::Result<()> {
    if read(path).is_some() {
        return Ok(());
    }
    let names: Vec<String> = domains.iter().map(|name| name.to_string()).collect();
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    replace(
        path,
        &format!("{}{}", key.serialize_pem(), certificate.pem()),
    )
}

/// Puts key and chain in the place of what is there, whole or not at all. They must fit.
///
/// # Errors
/// They do not, or the file cannot be written.
pub(super) fn replace(path: &Path, pem: &str) -> anyhow::Result<()> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())?;
    let provider = rustls::crypto::ring::default_provider();
    rustls::sign::CertifiedKey::from_der(chain?, key, &provider)
        .context("the certificate that came does not fit its key")?;
    write_private(path, pem)
}

/// Writes a file that only its owner can read, beside and renamed.
pub(super) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let shown = path.display();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    }
    let beside = path.with_extension("new");
    let _ = fs::remove_file(&beside);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .with_context(|| format!("{shown}: cannot be written"))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("{shown}: cannot be written"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn issued(names: &[&str], days: i64) -> String {
        let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        authority
            .distinguished_name
            .push(rcgen::DnType::CommonName, "an authority");
        let issuer =
            rcgen::CertifiedIssuer::self_signed(authority, rcgen::KeyPair::generate().unwrap())
                .unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut leaf = rcgen::CertificateParams::new(names).unwrap();
        leaf.not_before = rcgen::date_time_ymd(2026, 1, 1);
        leaf.not_after = rcgen::date_time_ymd(2026, 1, 1 + u8::try_from(days).unwrap());
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        format!("{}{}", key.serialize_pem(), leaf.pem())
    }

    #[test]
    fn one_stands_in_until_one_is_issued_and_is_due_at_two_thirds() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "public");
        let domains = [Box::from("shop.example")];
        ensure(&path, &domains).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let stands_in = read(&path).unwrap();
        assert!(stands_in.is_for(&domains));
        assert_eq!(stands_in.due(), UNIX_EPOCH, "at once");

        replace(&path, &issued(&["shop.example"], 9)).unwrap();
        let held = read(&path).unwrap();
        let begun = held.due().duration_since(held.not_before).unwrap();
        assert_eq!(begun, Duration::from_secs(6 * 86_400));
        assert!(!held.is_for(&[Box::from("other.example")]));
        ensure(&path, &domains).unwrap();
        assert_eq!(read(&path).unwrap(), held, "nothing stands in for it");
    }

    #[test]
    fn a_pair_that_does_not_fit_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "public");
        let good = issued(&["shop.example"], 9);
        replace(&path, &good).unwrap();
        let other = issued(&["shop.example"], 9);
        let at = |pem: &str| pem.find("-----BEGIN CERTIFICATE").unwrap();
        let mixed = format!("{}{}", &good[..at(&good)], &other[at(&other)..]);
        let error = format!("{:#}", replace(&path, &mixed).unwrap_err());
        assert!(error.contains("does not fit"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), good);
    }
}
