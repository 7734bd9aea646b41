//! Idempotency: which request a key stands for, and the answer that is replayed.
//!
//! A key belongs to one principal and one route. Its first request decides the body; the
//! same key with another body is refused, never executed. Success and business refusals
//! are remembered; overload and malformed input are not, because trying again may help.

use sha2::{Digest as _, Sha256};

/// Longest accepted key, in characters.
pub const KEY_LEN_MAX: usize = 255;

/// The client's name for one intended effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key(String);

impl Key {
    /// Parses the header value, quoted (`"abc"`, RFC 8941 string) or bare (`abc`); both
    /// forms name the same key.
    ///
    /// # Errors
    /// [`KeyError`] when the key is empty, too long, not printable ASCII, or badly quoted.
    pub fn parse(header: &[u8]) -> Result<Self, KeyError> {
        let text = std::str::from_utf8(header)
            .map_err(|_| KeyError::Character)?
            .trim();
        let key = match text.strip_prefix('"') {
            Some(rest) => unquote(rest)?,
            None => text.to_owned(),
        };
        match key.len() {
            0 => Err(KeyError::Empty),
            1..=KEY_LEN_MAX if key.bytes().all(|byte| matches!(byte, b' '..=b'~')) => Ok(Self(key)),
            1..=KEY_LEN_MAX => Err(KeyError::Character),
            _ => Err(KeyError::Long),
        }
    }

    /// The key without quotes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The rest of a quoted string, after its opening quote.
fn unquote(rest: &str) -> Result<String, KeyError> {
    let mut key = String::with_capacity(rest.len());
    let mut characters = rest.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' if characters.as_str().is_empty() => return Ok(key),
            '"' => return Err(KeyError::Quote),
            '\\' => match characters.next() {
                Some(escaped @ ('"' | '\\')) => key.push(escaped),
                _ => return Err(KeyError::Quote),
            },
            other => key.push(other),
        }
    }
    Err(KeyError::Quote)
}

/// Why a header value is not a key. Always the client's fault; retrying does not help.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// No key, or an empty one.
    #[error("the key is empty")]
    Empty,
    /// More than [`KEY_LEN_MAX`] characters.
    #[error("the key is longer than {KEY_LEN_MAX} characters")]
    Long,
    /// A character outside printable ASCII.
    #[error("the key has a character outside printable ASCII")]
    Character,
    /// Quotes that do not match.
    #[error("the key's quotes or escapes do not match")]
    Quote,
}

/// Where a key is unique.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Who asked.
    pub principal: String,
    /// The method and route template asked for.
    pub route: &'static str,
    /// The client's key.
    pub key: Key,
}

/// SHA-256 of the request body, byte for byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of `body`.
    #[must_use]
    pub fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }

    /// The fingerprint of `body` sent to `path`, for routes whose path names what is changed.
    #[must_use]
    pub fn of_request(path: &str, body: &[u8]) -> Self {
        let mut digest = Sha256::new();
        digest.update(path.as_bytes());
        digest.update([0]);
        digest.update(body);
        Self(digest.finalize().into())
    }
}

/// A rendered answer, kept with the key and replayed unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status code.
    pub status: u16,
    /// Media type of the body.
    pub content_type: String,
    /// The `Location` header, if any.
    pub location: Option<String>,
    /// The `ETag` header, if any.
    pub etag: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_and_bare_name_the_same_key() {
        assert_eq!(Key::parse(b"\"abc-1\""), Key::parse(b"abc-1"));
        assert_eq!(Key::parse(br#""a\"b\\c""#).unwrap().as_str(), r#"a"b\c"#);
    }

    #[test]
    fn bad_keys_say_why() {
        for (header, error) in [
            (&b""[..], KeyError::Empty),
            (b"  ", KeyError::Empty),
            (b"\"\"", KeyError::Empty),
            (b"\"open", KeyError::Quote),
            (b"\"a\"b", KeyError::Quote),
            (b"\"a\\x\"", KeyError::Quote),
            (b"tab\there", KeyError::Character),
            ("键".as_bytes(), KeyError::Character),
            (b"\xff", KeyError::Character),
            (&[b'k'; KEY_LEN_MAX + 1], KeyError::Long),
        ] {
            assert_eq!(Key::parse(header), Err(error), "{header:?}");
        }
        assert!(Key::parse(&[b'k'; KEY_LEN_MAX]).is_ok());
    }

    #[test]
    fn one_changed_byte_changes_the_fingerprint() {
        assert_eq!(Fingerprint::of(b"{}"), Fingerprint::of(b"{}"));
        assert_ne!(Fingerprint::of(b"{}"), Fingerprint::of(b"{} "));
    }
}
