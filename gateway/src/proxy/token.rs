//! Tokens (JWT, RFC 7519): verified against an issuer's public keys, or refused. The algorithm,
//! the issuer, the audience and the key are what the configuration says, never what the token says.
//!
//! Keys come from a JWKS (RFC 7517) file or URL and are looked at again now and then, and when a
//! token names a key nobody knows. The last good keys stay when a look fails.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use jsonwebtoken::{
    Algorithm as Signature, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{Jwk, JwkSet, KeyAlgorithm},
};
use serde_json::{Map, Value};

use crate::config::{Algorithm, TokenIssuer};

/// What a verified token says.
pub type Claims = Map<String, Value>;

/// Longer tokens are refused unread.
const TOKEN_LENGTH_MAX: usize = 16 * 1024;

/// Why a token is refused; the word in the log and in `WWW-Authenticate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is none, and one must be.
    Missing,
    /// It is no JWT.
    Malformed,
    /// Signed with what the configuration does not allow.
    Algorithm,
    /// Signed with a key nobody knows.
    Key,
    /// The signature is not the key's.
    Signature,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    Immature,
    /// Another issuer's.
    Issuer,
    /// For somebody else.
    Audience,
    /// Something that must be in it is not.
    Claims,
    /// The issuer's keys were never read.
    NoKeys,
}

impl Refused {
    /// In words.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Missing => "no token",
            Self::Malformed => "malformed token",
            Self::Algorithm => "algorithm not allowed",
            Self::Key => "unknown key",
            Self::Signature => "wrong signature",
            Self::Expired => "expired token",
            Self::Immature => "token not valid yet",
            Self::Issuer => "wrong issuer",
            Self::Audience => "wrong audience",
            Self::Claims => "incomplete token",
            Self::NoKeys => "no keys to verify with",
        }
    }
}

/// An issuer's keys, by their names.
#[derive(Default)]
struct Keys {
    by_id: HashMap<String, Key>,
    /// The only one, where there is one only: its tokens need not name it.
    only: Option<Key>,
}

#[derive(Clone)]
struct Key {
    decoding: DecodingKey,
    /// What the document says it is for.
    algorithm: Option<Signature>,
}

/// Verifies one issuer's tokens.
pub struct Verifier {
    issuer: TokenIssuer,
    allowed: Vec<Signature>,
    keys: ArcSwap<Keys>,
    /// Tokens that named a key nobody knows: the keys are worth another look.
    pub unknown_keys: AtomicU64,
    started: AtomicBool,
}

impl Verifier {
    /// Without keys yet.
    #[must_use]
    pub fn new(issuer: TokenIssuer) -> Self {
        let allowed = issuer.algorithms.iter().copied().map(signature).collect();
        Self {
            issuer,
            allowed,
            keys: ArcSwap::default(),
            unknown_keys: AtomicU64::new(0),
            started: AtomicBool::new(false),
        }
    }

    /// True once: whoever is told so looks after the keys.
    pub fn starts(&self) -> bool {
        !self.started.swap(true, Ordering::Relaxed)
    }

    /// The issuer.
    #[must_use]
    pub fn issuer(&self) -> &TokenIssuer {
        &self.issuer
    }

    /// Takes the keys of a JWKS document; returns how many can be used.
    ///
    /// # Errors
    /// It is no such document or holds no key that may be used: the keys stay.
    pub fn take_keys(&self, document: &str) -> Result<usize, String> {
        let set: JwkSet = serde_json::from_str(document).map_err(|error| error.to_string())?;
        let mut keys = Keys::default();
        let mut usable: Vec<(Option<String>, Key)> = Vec::new();
        for jwk in &set.keys {
            if let Some(key) = self.usable(jwk) {
                usable.push((jwk.common.key_id.clone(), key));
            }
        }
        if usable.is_empty() {
            return Err("holds no public key for the algorithms allowed".to_owned());
        }
        if let [(_, key)] = &usable[..] {
            keys.only = Some(key.clone());
        }
        let count = usable.len();
        for (id, key) in usable {
            keys.by_id.extend(id.map(|id| (id, key)));
        }
        self.keys.store(Arc::new(keys));
        Ok(count)
    }

    fn usable(&self, jwk: &Jwk) -> Option<Key> {
        let algorithm = match jwk.common.key_algorithm {
            Some(algorithm) => Some(registered(algorithm)?),
            None => None,
        };
        if algorithm.is_some_and(|algorithm| !self.allowed.contains(&algorithm)) {
            return None;
        }
        // A shared secret in a public document is nobody's secret.
        if matches!(
            jwk.algorithm,
            jsonwebtoken::jwk::AlgorithmParameters::OctetKey(_)
        ) {
            return None;
        }
        Some(Key {
            decoding: DecodingKey::from_jwk(jwk).ok()?,
            algorithm,
        })
    }

    /// What the token says, if it is to be believed. Takes the time from the system's clock.
    ///
    /// # Errors
    /// Why it is not.
    pub fn verify(&self, token: &str) -> Result<Claims, Refused> {
        if token.len() > TOKEN_LENGTH_MAX {
            return Err(Refused::Malformed);
        }
        let header = decode_header(token).map_err(|_| Refused::Malformed)?;
        if !self.allowed.contains(&header.alg) {
            return Err(Refused::Algorithm);
        }
        let keys = self.keys.load();
        if keys.by_id.is_empty() && keys.only.is_none() {
            return Err(Refused::NoKeys);
        }
        let key = match &header.kid {
            Some(id) => keys.by_id.get(id),
            None => keys.only.as_ref(),
        };
        let Some(key) = key else {
            self.unknown_keys.fetch_add(1, Ordering::Relaxed);
            return Err(Refused::Key);
        };
        if key
            .algorithm
            .is_some_and(|algorithm| algorithm != header.alg)
        {
            return Err(Refused::Algorithm);
        }
        let mut validation = Validation::new(header.alg);
        validation.leeway = self.issuer.leeway.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer.issuer]);
        validation.set_audience(&[&self.issuer.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        decode::<Claims>(token, &key.decoding, &validation)
            .map(|data| data.claims)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidSignature => Refused::Signature,
                ErrorKind::ExpiredSignature => Refused::Expired,
                ErrorKind::ImmatureSignature => Refused::Immature,
                ErrorKind::InvalidIssuer => Refused::Issuer,
                ErrorKind::InvalidAudience => Refused::Audience,
                ErrorKind::MissingRequiredClaim(_) => Refused::Claims,
                ErrorKind::InvalidAlgorithm => Refused::Algorithm,
                _ => Refused::Malformed,
            })
    }
}

/// The token in an Authorization header.
#[must_use]
pub fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// A claim as text; None for one that is no text, number or truth value.
#[must_use]
pub fn claim(claims: &Claims, name: &str) -> Option<String> {
    match claims.get(name)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

fn signature(algorithm: Algorithm) -> Signature {
    match algorithm {
        Algorithm::Rs256 => Signature::RS256,
        Algorithm::Rs384 => Signature::RS384,
        Algorithm::Rs512 => Signature::RS512,
        Algorithm::Ps256 => Signature::PS256,
        Algorithm::Ps384 => Signature::PS384,
        Algorithm::Ps512 => Signature::PS512,
        Algorithm::Es256 => Signature::ES256,
        Algorithm::Es384 => Signature::ES384,
        Algorithm::EdDsa => Signature::EdDSA,
    }
}

fn registered(algorithm: KeyAlgorithm) -> Option<Signature> {
    Some(match algorithm {
        KeyAlgorithm::RS256 => Signature::RS256,
        KeyAlgorithm::RS384 => Signature::RS384,
        KeyAlgorithm::RS512 => Signature::RS512,
        KeyAlgorithm::PS256 => Signature::PS256,
        KeyAlgorithm::PS384 => Signature::PS384,
        KeyAlgorithm::PS512 => Signature::PS512,
        KeyAlgorithm::ES256 => Signature::ES256,
        KeyAlgorithm::ES384 => Signature::ES384,
        KeyAlgorithm::EdDSA => Signature::EdDSA,
        _ => return None,
    })
}
