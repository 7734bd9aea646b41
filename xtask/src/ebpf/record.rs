//! What is written beside the committed object: which tools made it, from which sources.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::toolchain::Tools;

/// Everything besides flow-tc's own sources that changes the object.
const SOURCES: [&str; 5] = [
    "flow-tc/src",
    "flow-tc/Cargo.toml",
    "flow-tc/Cargo.lock",
    "flow-abi/src",
    "flow-abi/Cargo.toml",
];

const HEADER: &str = "# Written by `cargo xtask build-ebpf`: what ebpf/flow-tc.bpf.o was made with and from.\n\
    # `cargo xtask build-ebpf --check` rebuilds it and compares.\n";

/// The content of `flow-tc.toolchain.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    rustc: String,
    rustc_commit: String,
    rustc_llvm: String,
    bpf_linker: String,
    bpf_linker_llvm: String,
    aya_ebpf: String,
    /// Of the object, stripped, as committed.
    pub object_sha256: String,
    /// Of all files the object is made from; see [`sources_sha256`].
    pub sources_sha256: String,
}

impl Record {
    /// Describes an object that these tools have just built.
    ///
    /// # Errors
    /// When the sources cannot be read.
    pub fn new(ebpf: &Path, tools: &Tools, object: &[u8]) -> Result<Self> {
        Ok(Self {
            rustc: tools.rustc.version.clone(),
            rustc_commit: tools.rustc.commit.clone(),
            rustc_llvm: tools.rustc.llvm.clone(),
            bpf_linker: tools.linker_version().to_owned(),
            bpf_linker_llvm: tools.linker_llvm(),
            aya_ebpf: locked_version(&ebpf.join("flow-tc/Cargo.lock"), "aya-ebpf")?,
            object_sha256: sha256(object),
            sources_sha256: sources_sha256(ebpf)?,
        })
    }

    /// # Errors
    /// When the file is missing or does not parse.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!(
                "reading {} (`cargo xtask build-ebpf` writes it)",
                path.display()
            )
        })?;
        toml::from_str(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let fields = toml::to_string(self).context("encoding the record")?;
        std::fs::write(path, format!("{HEADER}{fields}"))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// One line for each tool that is not the recorded one; bytes are comparable when none is.
    pub fn version_differences(&self, present: &Self) -> Vec<String> {
        [
            ("rustc", &self.rustc, &present.rustc),
            ("rustc commit", &self.rustc_commit, &present.rustc_commit),
            ("LLVM in rustc", &self.rustc_llvm, &present.rustc_llvm),
            ("bpf-linker", &self.bpf_linker, &present.bpf_linker),
            (
                "LLVM in bpf-linker",
                &self.bpf_linker_llvm,
                &present.bpf_linker_llvm,
            ),
            ("aya-ebpf", &self.aya_ebpf, &present.aya_ebpf),
        ]
        .into_iter()
        .filter(|(_, recorded, present)| recorded != present)
        .map(|(name, recorded, present)| format!("{name}: recorded {recorded}, here {present}"))
        .collect()
    }
}

/// One hash over the path, length and content of every source file, sorted by path: the same
/// in every checkout, and different when a file changes, moves, appears or goes.
///
/// # Errors
/// When a file cannot be read.
pub(super) fn sources_sha256(ebpf: &Path) -> Result<String> {
    let mut files = vec![];
    for source in SOURCES {
        collect_files(&ebpf.join(source), &mut files)?;
    }
    let mut named = vec![];
    for file in files {
        let name = file
            .strip_prefix(ebpf)
            .context("a source outside of ebpf")?;
        named.push((name.to_string_lossy().into_owned(), file));
    }
    named.sort();
    let mut hash = Sha256::new();
    for (name, file) in named {
        let content =
            std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        hash.update(format!("{name}\0{}\0", content.len()));
        hash.update(&content);
    }
    Ok(hexadecimal(&hash.finalize()))
}

fn collect_files(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_path_buf());
        return Ok(());
    }
    for entry in std::fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        collect_files(
            &entry
                .with_context(|| format!("reading {}", path.display()))?
                .path(),
            files,
        )?;
    }
    Ok(())
}

/// The hash of one object, in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn locked_version(lock: &Path, package: &str) -> Result<String> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
    }
    let text =
        std::fs::read_to_string(lock).with_context(|| format!("reading {}", lock.display()))?;
    let lock: Lock = toml::from_str(&text).context("parsing flow-tc's Cargo.lock")?;
    lock.package
        .into_iter()
        .find(|candidate| candidate.name == package)
        .map(|found| found.version)
        .with_context(|| format!("{package} is not in flow-tc's Cargo.lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Result<tempfile::TempDir> {
        let ebpf = tempfile::tempdir()?;
        for folder in ["flow-tc/src", "flow-abi/src"] {
            std::fs::create_dir_all(ebpf.path().join(folder))?;
        }
        for file in [
            "flow-tc/src/main.rs",
            "flow-tc/Cargo.toml",
            "flow-abi/src/lib.rs",
            "flow-abi/Cargo.toml",
        ] {
            std::fs::write(ebpf.path().join(file), file)?;
        }
        let lock = "[[package]]\nname = \"aya-ebpf\"\nversion = \"0.2.1\"\n";
        std::fs::write(ebpf.path().join("flow-tc/Cargo.lock"), lock)?;
        Ok(ebpf)
    }

    #[test]
    fn the_source_hash_moves_with_content_and_place_only() -> Result<()> {
        let (here, there) = (sources()?, sources()?);
        let original = sources_sha256(here.path())?;
        assert_eq!(original, sources_sha256(there.path())?);

        let main = there.path().join("flow-tc/src/main.rs");
        let other = there.path().join("flow-tc/src/other.rs");
        std::fs::rename(&main, &other)?;
        assert_ne!(original, sources_sha256(there.path())?, "moved");
        std::fs::rename(&other, &main)?;
        assert_eq!(original, sources_sha256(there.path())?);
        std::fs::write(&main, "changed")?;
        assert_ne!(original, sources_sha256(there.path())?, "changed");
        Ok(())
    }

    #[test]
    fn the_record_survives_its_file_and_names_what_differs() -> Result<()> {
        let ebpf = sources()?;
        let version = locked_version(&ebpf.path().join("flow-tc/Cargo.lock"), "aya-ebpf")?;
        assert_eq!(version, "0.2.1");
        let record = Record {
            rustc: "rustc 1.96.0".into(),
            rustc_commit: "ac68".into(),
            rustc_llvm: "22.1.8".into(),
            bpf_linker: "0.13.0".into(),
            bpf_linker_llvm: "22.1.8".into(),
            aya_ebpf: version,
            object_sha256: sha256(b""),
            sources_sha256: sources_sha256(ebpf.path())?,
        };
        let path = ebpf.path().join("record.toml");
        record.write(&path)?;
        let read = Record::read(&path)?;
        assert_eq!(read, record);
        assert!(record.version_differences(&read).is_empty());

        let newer = Record {
            rustc: "rustc 1.97.0".into(),
            ..read
        };
        let expected = ["rustc: recorded rustc 1.96.0, here rustc 1.97.0"];
        assert_eq!(record.version_differences(&newer), expected);
        Ok(())
    }
}
