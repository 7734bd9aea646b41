//! Signatures by the Standard Webhooks specification: HMAC-SHA256 over
//! `webhook-id.webhook-timestamp.body`, with one signature for each secret, so that a secret can
//! be replaced while the sink still knows the old one.

use std::path::Path;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::hmac;

/// Fewer random bytes than this are no secret.
const SECRET_BYTES_MIN: usize = 16;

/// The keys to sign with.
#[derive(Clone, Default)]
pub struct Secrets(Vec<hmac::Key>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

impl Secrets {
    /// Reads a file with one `whsec_<base64>` a line, newest first.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no secret; the secret itself is not shown.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Self::parse(&text).map_err(|what| format!("{}: {what}", path.display()))
    }

    /// From the text of such a file.
    ///
    /// # Errors
    /// A line is no secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let refused = |what: &str| {
                format!(
                    "line {} {what}; write `whsec_` and at least {SECRET_BYTES_MIN} random bytes \
                     in base64",
                    index + 1
                )
            };
            let text = line
                .strip_prefix("whsec_")
                .ok_or_else(|| refused("does not begin with `whsec_`"))?;
            let bytes = STANDARD
                .decode(text)
                .map_err(|_| refused("is not base64"))?;
            if bytes.len() < SECRET_BYTES_MIN {
                return Err(refused("is too short"));
            }
            keys.push(hmac::Key::new(hmac::HMAC_SHA256, &bytes));
        }
        if keys.is_empty() {
            return Err("holds no secret; write `whsec_` and random bytes in base64".into());
        }
        Ok(Self(keys))
    }
}

/// The value of `webhook-signature`.
#[must_use]
pub fn sign(secrets: &Secrets, id: &str, timestamp: i64, body: &str) -> String {
    let content = format!("{id}.{timestamp}.{body}");
    let signatures = secrets.0.iter().map(|key| {
        format!(
            "v1,{}",
            STANDARD.encode(hmac::sign(key, content.as_bytes()))
        )
    });
    signatures.collect::<Vec<_>>().join(" ")
}

/// Whether one of the signatures is by one of our keys: what a sink does.
#[must_use]
pub fn verify(secrets: &Secrets, id: &str, timestamp: i64, body: &str, signatures: &str) -> bool {
    let content = format!("{id}.{timestamp}.{body}");
    signatures
        .split(' ')
        .filter_map(|signature| STANDARD.decode(signature.strip_prefix("v1,")?).ok())
        .any(|tag| {
            let mut keys = secrets.0.iter();
            keys.any(|key| hmac::verify(key, content.as_bytes(), &tag).is_ok())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the Standard Webhooks specification.
    #[test]
    fn the_specifications_own_example() {
        let secrets = Secrets::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
        let body = r#"{"test": 2432232314}"#;
        let signature = sign(
            &secrets,
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            body,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn both_keys_sign_while_one_is_replaced() {
        let old = "whsec_b2xkb2xkb2xkb2xkb2xkb2xk";
        let new = "whsec_bmV3bmV3bmV3bmV3bmV3bmV3";
        let signature = sign(
            &Secrets::parse(&format!("{new}\n{old}\n")).unwrap(),
            "m",
            1,
            "x",
        );
        for known in [old, new] {
            let known = Secrets::parse(known).unwrap();
            assert!(verify(&known, "m", 1, "x", &signature));
            assert!(!verify(&known, "m", 2, "x", &signature));
            assert!(!verify(&known, "m", 1, "y", &signature));
        }
    }

    #[test]
    fn what_is_no_secret_is_refused_without_showing_it() {
        for (text, why) in [
            ("", "holds no secret"),
            ("hunter2", "does not begin"),
            ("whsec_hunter2!", "is not base64"),
            ("whsec_aGk=", "is too short"),
        ] {
            let error = Secrets::parse(text).unwrap_err();
            assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
        }
    }
}
