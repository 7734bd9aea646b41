//! Where a ledger is.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// A file of one gateway, or a database that several share.
#[derive(Clone, PartialEq, Eq)]
pub enum Place {
    /// An SQLite file.
    File(PathBuf),
    /// A `postgres://` URL.
    Shared(String),
}

impl Place {
    /// `ledger.db` in a gateway's state directory.
    #[must_use]
    pub fn in_directory(state_dir: &Path) -> Self {
        Self::File(state_dir.join("ledger.db"))
    }

    /// Whether several gateways may use it.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Shared(_))
    }

    /// A `postgres://` URL.
    ///
    /// # Errors
    /// What is wrong with it, without the password.
    pub fn shared(url: &str) -> Result<Self, String> {
        super::postgres::parse(url).map(|_| Self::Shared(url.to_owned()))
    }
}

/// A password does not belong into a log.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Shared(url) => {
                let (scheme, rest) = url.split_once("://").unwrap_or(("postgres", url));
                let rest = rest.split('?').next().unwrap_or_default();
                match rest.rsplit_once('@') {
                    Some((user, host)) => {
                        let user = user.split(':').next().unwrap_or_default();
                        write!(f, "{scheme}://{user}@{host}")
                    }
                    None => write!(f, "{scheme}://{rest}"),
                }
            }
        }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn a_password_is_not_shown() {
        let place =
            Place::shared("postgres://edge:s3cret@db.example:5433/bill?password=s3cret").unwrap();
        assert_eq!(place.to_string(), "postgres://edge@db.example:5433/bill");
        assert!(!format!("{place:?}").contains("s3cret"));
    }
}
