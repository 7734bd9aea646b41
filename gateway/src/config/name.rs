//! Names people choose: short, lower-case, safe as metric labels and in file names.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// `[a-z0-9][a-z0-9._-]*`, at most 64 bytes. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// The longest name, in bytes.
    pub const LENGTH_MAX: usize = 64;

    /// `None` when the text does not follow the rule. Also for names that arrive in requests.
    pub fn new(text: &str) -> Option<Self> {
        Self::is_valid(text).then(|| Self(text.into()))
    }

    /// Whether [`new`](Self::new) would accept the text, without allocating.
    pub fn is_valid(text: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let mut bytes = text.bytes();
        text.len() <= Self::LENGTH_MAX
            && bytes.next().is_some_and(plain)
            && bytes.all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Name;

    #[test]
    fn the_rule() {
        for good in ["a", "0", "orders-create", "a.b_c-d", &"x".repeat(64)] {
            assert!(Name::is_valid(good), "{good}");
        }
        for bad in ["", "-a", ".a", "A", "a b", "é", &"x".repeat(65)] {
            assert!(Name::new(bad).is_none(), "{bad}");
        }
    }
}
