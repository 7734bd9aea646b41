//! Whole files, good and bad. What is asserted of a bad one is exactly what people would read.

mod accepted;
mod refused;

use std::path::PathBuf;

use super::*;

/// Every field there is.
const FULL: &str = include_str!("tests/full.toml");

/// Every field of protection, TLS, authentication and content.
const EDGE: &str = include_str!("tests/edge.toml");

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("edgemeter-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Folder {
    /// A certificate and its key.
    fn write_pair(&self, certificate: &str, key: &str) {
        let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()]).unwrap();
        self.write(certificate, &made.cert.pem());
        self.write(key, &made.signing_key.serialize_pem());
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn full(test: &str) -> (Folder, Config) {
    let folder = Folder::new(test);
    folder.write_pair("cert.pem", "key.pem");
    folder.write("push.secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    folder.write("push.token", "t");
    let path = folder.write("edgemeter.toml", FULL);
    match Config::load(path) {
        Ok(config) => (folder, config),
        Err(error) => panic!("{error}"),
    }
}

/// The least a file can say, one line each, for bad files to differ from.
const SMALL: &str = r#"[[listeners]]
name = "public"
address = "0.0.0.0:8080"
[[upstreams]]
name = "orders"
peers = ["10.0.0.2:9000"]
[[routes]]
name = "all"
upstream = "orders"
"#;

/// What people would read, without the file name.
fn complaints(text: &str) -> Vec<String> {
    match Config::parse(text, "c.toml") {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error
            .to_string()
            .lines()
            .map(|line| line.strip_prefix("c.toml:").unwrap().to_owned())
            .collect(),
    }
}

/// [`SMALL`] with one text replaced is refused with exactly this.
#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    assert_eq!(SMALL.matches(from).count(), 1, "{from}");
    assert_eq!(complaints(&SMALL.replace(from, to)).join("\n"), expected);
}

/// [`SMALL`] with this after its nine lines is refused with exactly this.
#[track_caller]
fn refused_after(more: &str, expected: &str) {
    assert_eq!(complaints(&format!("{SMALL}{more}")).join("\n"), expected);
}
