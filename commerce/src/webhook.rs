//! Standard Webhooks (standardwebhooks.com): a signature over id, time and body.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use uuid::Uuid;

/// How a secret is written.
const PREFIX: &str = "whsec_";
/// Oldest and newest time that is taken, in seconds around now: what limits a replay.
const TOLERANCE_SECONDS: i64 = 300;

/// The headers' names.
pub const ID: &str = "webhook-id";
/// Unix seconds.
pub const TIMESTAMP: &str = "webhook-timestamp";
/// `v1,` and the signature in base64.
pub const SIGNATURE: &str = "webhook-signature";

/// What sender and receiver share.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Why a message is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WebhookError {
    /// Not `whsec_` and base64 of at least 16 bytes.
    #[error("a secret is whsec_ and the base64 of at least 16 bytes")]
    Secret,
    /// A header is missing or malformed.
    #[error("webhook-id, webhook-timestamp and webhook-signature are required")]
    Header,
    /// Too old, or from the future.
    #[error("the timestamp is more than {TOLERANCE_SECONDS} seconds off")]
    Time,
    /// Signed with another secret, or changed on the way.
    #[error("no signature matches")]
    Signature,
}

impl Secret {
    /// Parses `whsec_…`.
    ///
    /// # Errors
    /// [`WebhookError::Secret`]
    pub fn parse(text: &str) -> Result<Self, WebhookError> {
        let encoded = text.strip_prefix(PREFIX).ok_or(WebhookError::Secret)?;
        let bytes = STANDARD.decode(encoded).map_err(|_| WebhookError::Secret)?;
        if bytes.len() < 16 {
            return Err(WebhookError::Secret);
        }
        Ok(Self(bytes))
    }

    /// A new secret, as its text: 30 bytes of which 222 bits are random.
    #[must_use]
    pub fn generate() -> String {
        let mut bytes = Vec::with_capacity(32);
        bytes.extend_from_slice(Uuid::new_v4().as_bytes());
        bytes.extend_from_slice(Uuid::new_v4().as_bytes());
        format!("{PREFIX}{}", STANDARD.encode(bytes))
    }

    fn mac(&self, id: &str, seconds: i64, body: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        mac.update(id.as_bytes());
        mac.update(format!(".{seconds}.").as_bytes());
        mac.update(body);
        Some(mac)
    }

    /// The `webhook-signature` header.
    #[must_use]
    pub fn sign(&self, id: &str, seconds: i64, body: &[u8]) -> String {
        // HMAC takes keys of any length.
        let tag = self
            .mac(id, seconds, body)
            .map(|mac| mac.finalize().into_bytes());
        format!("v1,{}", STANDARD.encode(tag.unwrap_or_default()))
    }

    /// Proves that a message is the sender's and fresh. Compared in constant time.
    ///
    /// # Errors
    /// [`WebhookError`]
    pub fn verify(
        &self,
        id: Option<&str>,
        timestamp: Option<&str>,
        signature: Option<&str>,
        body: &[u8],
        now_seconds: i64,
    ) -> Result<(), WebhookError> {
        let (id, signatures) = id.zip(signature).ok_or(WebhookError::Header)?;
        let seconds: i64 = timestamp
            .and_then(|text| text.parse().ok())
            .ok_or(WebhookError::Header)?;
        if now_seconds.saturating_sub(seconds).saturating_abs() > TOLERANCE_SECONDS {
            return Err(WebhookError::Time);
        }
        // Several, while a secret is being replaced.
        let matches = signatures
            .split(' ')
            .filter_map(|signature| signature.strip_prefix("v1,"))
            .filter_map(|encoded| STANDARD.decode(encoded).ok())
            .any(|tag| {
                self.mac(id, seconds, body)
                    .is_some_and(|mac| mac.verify_slice(&tag).is_ok())
            });
        if matches {
            Ok(())
        } else {
            Err(WebhookError::Signature)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specifications_example_verifies() {
        // From the Standard Webhooks specification's reference tests.
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let (id, seconds) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330);
        let body = br#"{"test": 2432232314}"#;
        let signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(secret.sign(id, seconds, body), signature);
        let timestamp = seconds.to_string();
        let verify = |signature: &str, body: &[u8], now| {
            secret.verify(Some(id), Some(&timestamp), Some(signature), body, now)
        };
        assert_eq!(verify(signature, body, seconds), Ok(()));
        assert_eq!(
            verify(&format!("v1,AAAA {signature}"), body, seconds),
            Ok(())
        );
        assert_eq!(
            verify(signature, b"{}", seconds),
            Err(WebhookError::Signature)
        );
        assert_eq!(
            verify(signature, body, seconds + 301),
            Err(WebhookError::Time)
        );
    }

    #[test]
    fn secrets_are_long_enough() {
        assert!(Secret::parse(&Secret::generate()).is_ok());
        for wrong in [
            "",
            "whsec_",
            "whsec_AAAA",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        ] {
            assert!(Secret::parse(wrong).is_err(), "{wrong}");
        }
    }
}
