//! The admin token: whoever can read its file may change the gateway.

use std::{
    fs::OpenOptions,
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::Context as _;

/// A bearer token.
pub struct Token(String);

impl Token {
    /// Reads the file; makes it, readable by its owner only, when there is none.
    ///
    /// # Errors
    /// It cannot be read or made, is shorter than 16 characters, or others may read it.
    pub fn load_or_make(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
        {
            Ok(mut file) => {
                let token = random()?;
                file.write_all(format!("{token}\n").as_bytes())
                    .with_context(|| format!("{shown}: cannot be written"))?;
                Ok(Self(token))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(error) => Err(error).with_context(|| format!("{shown}: cannot be made")),
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// As above.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let mode = std::fs::metadata(path)
            .with_context(|| format!("{shown}: cannot be read"))?
            .permissions()
            .mode();
        anyhow::ensure!(
            mode & 0o077 == 0,
            "{shown}: others may read the admin token; fix: chmod 600 {shown}"
        );
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read"))?;
        let token = text.trim().to_owned();
        anyhow::ensure!(
            token.len() >= 16,
            "{shown}: the admin token is shorter than 16 characters; fix: delete the file, the next start makes one"
        );
        Ok(Self(token))
    }

    /// Whether an `Authorization` header carries it. Takes as long for any wrong token.
    #[must_use]
    pub fn authorizes(&self, header: Option<&[u8]>) -> bool {
        let given = header.and_then(|header| header.strip_prefix(b"Bearer "));
        let given = given.unwrap_or_default();
        let (mut differs, known) = (given.len() ^ self.0.len(), self.0.as_bytes());
        for (index, byte) in given.iter().enumerate() {
            differs |= usize::from(byte ^ known[index % known.len()]);
        }
        differs == 0
    }

    /// For a request of ours.
    #[must_use]
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

/// 256 bits in hexadecimal.
fn random() -> anyhow::Result<String> {
    let mut bytes = [0_u8; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("/dev/urandom cannot be read")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let made = Token::load_or_make(&path).unwrap();
        let read = Token::load_or_make(&path).unwrap();
        assert!(read.authorizes(Some(made.header().as_bytes())));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn only_the_whole_token_will_do() {
        let token = Token("0123456789abcdef".into());
        assert!(token.authorizes(Some(b"Bearer 0123456789abcdef")));
        for wrong in [
            None,
            Some(&b""[..]),
            Some(b"Bearer "),
            Some(b"0123456789abcdef"),
            Some(b"Bearer 0123456789abcde"),
            Some(b"Bearer 0123456789abcdeF"),
            Some(b"Bearer 0123456789abcdef0123456789abcdef"),
        ] {
            assert!(!token.authorizes(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn a_file_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "0123456789abcdef").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Token::load(&path).err().unwrap().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
