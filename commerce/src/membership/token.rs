//! Access tokens: JWTs signed with Ed25519, and the ring of keys behind them.
//!
//! Issuer, audience, algorithm and key id are pinned; a token lives [`ACCESS_MS`]. A key is
//! published before it signs, so that gateways have fetched it, and stays published until
//! the last token it signed has ended:
//!
//! ```text
//!  published ── LEAD ──► signs ── ROTATE ──► next one signs ── ACCESS + SKEW ──► gone
//! ```

use jsonwebtoken::jwk::{Jwk, JwkSet, KeyOperations, PublicKeyUse, ThumbprintHash};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

/// Life of an access token, in milliseconds: 10 minutes.
pub const ACCESS_MS: i64 = 10 * 60 * 1_000;
/// How long a key is published before it signs, in milliseconds: 10 minutes.
pub const LEAD_MS: i64 = 10 * 60 * 1_000;
/// How long a key signs, in milliseconds: 1 day.
pub const ROTATE_MS: i64 = 24 * 3_600 * 1_000;
/// How far clocks may differ, in milliseconds: 1 minute.
pub const SKEW_MS: i64 = 60 * 1_000;

/// What an access token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who issued it.
    pub iss: String,
    /// Whom it is for.
    pub aud: String,
    /// The member.
    pub sub: String,
    /// Seconds since the Unix epoch at which it ends.
    pub exp: i64,
    /// Seconds since the Unix epoch at which it was issued.
    pub iat: i64,
    /// Its own identity.
    pub jti: String,
}

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Too old.
    #[error("the token has expired")]
    Expired,
    /// Signed by a key that is not in the ring.
    #[error("the token names no key of ours")]
    UnknownKey,
    /// Not what we issue: signature, algorithm, issuer, audience or form.
    #[error("the token is not valid: {0}")]
    Invalid(#[from] jsonwebtoken::errors::Error),
}

/// A signing key.
#[derive(Clone)]
pub struct Key {
    id: String,
    /// PKCS #8.
    private: Vec<u8>,
    public: Jwk,
    created_ms: i64,
}

/// PKCS #8 of an Ed25519 key is this and the 32 bytes of its seed (RFC 8410).
const PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

impl Key {
    /// The key of a seed, which must be random. Its id is the RFC 7638 thumbprint.
    ///
    /// # Errors
    /// [`TokenError::Invalid`]; no seed is known to cause it.
    pub fn from_seed(seed: &[u8; 32], created_ms: i64) -> Result<Self, TokenError> {
        let private = [&PKCS8_PREFIX[..], seed].concat();
        let encoding = EncodingKey::from_ed_der(&private);
        let mut public = Jwk::from_encoding_key(&encoding, Algorithm::EdDSA)?;
        let id = public.thumbprint(ThumbprintHash::SHA256)?;
        public.common.key_id = Some(id.clone());
        public.common.public_key_use = Some(PublicKeyUse::Signature);
        public.common.key_operations = Some(vec![KeyOperations::Verify]);
        Ok(Self {
            id,
            private,
            public,
            created_ms,
        })
    }

    /// Its id, as in `kid`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// The keys, oldest first.
#[derive(Clone, Default)]
pub struct Ring {
    keys: Vec<Key>,
}

impl Ring {
    /// A ring of these keys.
    #[must_use]
    pub fn new(mut keys: Vec<Key>) -> Self {
        keys.sort_by_key(|key| key.created_ms);
        Self { keys }
    }

    /// The key that signs: the newest one that has been published long enough. The first
    /// key of all signs at once: nobody has an older ring.
    fn signing(&self, now_ms: i64) -> Option<&Key> {
        self.keys
            .iter()
            .rev()
            .find(|key| key.created_ms.saturating_add(LEAD_MS) <= now_ms)
            .or(self.keys.first())
    }

    /// Whether a new key should be made.
    #[must_use]
    pub fn wants_key(&self, now_ms: i64) -> bool {
        self.keys
            .last()
            .is_none_or(|newest| newest.created_ms.saturating_add(ROTATE_MS) <= now_ms)
    }

    /// The keys a verifier needs: none whose last token has ended.
    fn published(&self, now_ms: i64) -> impl Iterator<Item = &Key> {
        self.keys.iter().enumerate().filter_map(move |(at, key)| {
            let signs_until = self
                .keys
                .get(at + 1)
                .map(|next| next.created_ms.saturating_add(LEAD_MS));
            let needed = signs_until.is_none_or(|until| now_ms < until + ACCESS_MS + SKEW_MS);
            needed.then_some(key)
        })
    }

    /// The JWK set to publish.
    #[must_use]
    pub fn jwks(&self, now_ms: i64) -> JwkSet {
        JwkSet {
            keys: self
                .published(now_ms)
                .map(|key| key.public.clone())
                .collect(),
        }
    }

    /// Signs a token.
    ///
    /// # Errors
    /// [`TokenError::UnknownKey`] for an empty ring.
    pub fn sign(&self, claims: &Claims, now_ms: i64) -> Result<String, TokenError> {
        let key = self.signing(now_ms).ok_or(TokenError::UnknownKey)?;
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(key.id.clone());
        let encoding = EncodingKey::from_ed_der(&key.private);
        Ok(jsonwebtoken::encode(&header, claims, &encoding)?)
    }

    /// The claims of a token that is ours, for us, and has not ended.
    ///
    /// # Errors
    /// [`TokenError`]
    pub fn verify(
        &self,
        token: &str,
        issuer: &str,
        audience: &str,
        now_ms: i64,
    ) -> Result<Claims, TokenError> {
        let header = jsonwebtoken::decode_header(token)?;
        let key = header
            .kid
            .and_then(|id| self.published(now_ms).find(|key| key.id == id))
            .ok_or(TokenError::UnknownKey)?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[issuer]);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // Time is an argument here; theirs is the system's clock.
        validation.validate_exp = false;
        let decoding = DecodingKey::from_jwk(&key.public)?;
        let claims = jsonwebtoken::decode::<Claims>(token, &decoding, &validation)?.claims;
        if claims.exp.saturating_mul(1_000).saturating_add(SKEW_MS) <= now_ms {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_800_000_000_000;

    fn ring(created: &[i64]) -> Ring {
        let keys = created
            .iter()
            .zip(1_u8..)
            .map(|(&created, seed)| Key::from_seed(&[seed; 32], created).unwrap());
        Ring::new(keys.collect())
    }

    fn claims() -> Claims {
        Claims {
            iss: "https://shop.example".to_owned(),
            aud: "shop".to_owned(),
            sub: "m-1".to_owned(),
            exp: (NOW_MS + ACCESS_MS) / 1_000,
            iat: NOW_MS / 1_000,
            jti: "t-1".to_owned(),
        }
    }

    fn verify(ring: &Ring, token: &str, now_ms: i64) -> Result<Claims, TokenError> {
        ring.verify(token, "https://shop.example", "shop", now_ms)
    }

    #[test]
    fn a_token_is_accepted_as_issued() {
        let ring = ring(&[NOW_MS]);
        let token = ring.sign(&claims(), NOW_MS).unwrap();
        assert_eq!(verify(&ring, &token, NOW_MS).unwrap(), claims());
        let end = NOW_MS + ACCESS_MS + SKEW_MS;
        assert!(verify(&ring, &token, end - 1).is_ok());
        assert!(matches!(
            verify(&ring, &token, end),
            Err(TokenError::Expired)
        ));
    }

    #[test]
    fn what_we_did_not_issue_is_refused() {
        let ring = ring(&[NOW_MS]);
        let token = ring.sign(&claims(), NOW_MS).unwrap();
        let refused = |token: &str| verify(&ring, token, NOW_MS).is_err();
        assert!(refused("") && refused("a.b.c"));
        let (body, signature) = token.rsplit_once('.').unwrap();
        let flipped = if signature.starts_with('A') { "B" } else { "A" };
        assert!(refused(&format!("{body}.{flipped}{}", &signature[1..])));
        // Signed with another key under our key's id.
        let stranger = Key::from_seed(&[99; 32], NOW_MS).unwrap();
        let forged = Ring::new(vec![Key {
            id: ring.keys[0].id.clone(),
            ..stranger
        }]);
        assert!(refused(&forged.sign(&claims(), NOW_MS).unwrap()));
        // The public key as an HMAC secret: the classic confusion of algorithms.
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(ring.keys[0].id.clone());
        let secret = serde_json::to_vec(&ring.keys[0].public).unwrap();
        let key = EncodingKey::from_secret(&secret);
        let confused = jsonwebtoken::encode(&header, &claims(), &key).unwrap();
        assert!(refused(&confused));
        for other in [
            Claims {
                aud: "another".to_owned(),
                ..claims()
            },
            Claims {
                iss: "https://evil.example".to_owned(),
                ..claims()
            },
        ] {
            assert!(refused(&ring.sign(&other, NOW_MS).unwrap()));
        }
    }

    #[test]
    fn a_key_is_published_before_it_signs_and_until_its_tokens_have_ended() {
        let second = NOW_MS + ROTATE_MS;
        let ring = ring(&[NOW_MS, second]);
        let signer = |now| ring.signing(now).unwrap().id.clone();
        let published = |now| ring.jwks(now).keys.len();
        assert_eq!(signer(NOW_MS), ring.keys[0].id, "the first one at once");
        assert_eq!(signer(second + LEAD_MS - 1), ring.keys[0].id);
        assert_eq!(signer(second + LEAD_MS), ring.keys[1].id);
        assert_eq!(published(second), 2);
        let last = second + LEAD_MS + ACCESS_MS + SKEW_MS;
        assert_eq!((published(last - 1), published(last)), (2, 1));
        assert!(!ring.wants_key(second + ROTATE_MS - 1));
        assert!(ring.wants_key(second + ROTATE_MS));
        assert!(Ring::default().wants_key(0));
    }

    #[test]
    fn the_published_set_has_no_private_part() {
        let set = serde_json::to_value(ring(&[NOW_MS]).jwks(NOW_MS)).unwrap();
        let key = &set["keys"][0];
        assert_eq!(
            (&key["kty"], &key["crv"]),
            (&"OKP".into(), &"Ed25519".into())
        );
        assert_eq!((&key["alg"], &key["use"]), (&"EdDSA".into(), &"sig".into()));
        assert!(key["kid"].as_str().unwrap().len() > 40);
        assert!(key.get("d").is_none());
    }
}
