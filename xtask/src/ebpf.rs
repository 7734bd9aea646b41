//! `cargo xtask build-ebpf`: the committed BPF object, and the proof that it is what its
//! sources say.
//!
//! The object is committed so that a newcomer needs no BPF toolchain. That is only honest while
//! anybody can build the same bytes again: paths are remapped, versions are pinned and written
//! down beside the object, and `--check` compares. Compilers of other versions make other
//! bytes, so there the check is that the rebuilt object passes the same kernel tests.

mod compile;
mod record;
mod toolchain;
mod wrapper;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host;
use record::Record;
pub use toolchain::Toolchain;
use toolchain::Tools;
pub(crate) use toolchain::debian_toolchain_is_fit;
pub use wrapper::become_rustc_if_called_by_cargo;

/// What the gateway embeds unless this variable names another object.
const OBJECT_VARIABLE: &str = "EDGEMETER_BPF_OBJECT";

/// Builds the object and replaces the committed one and its record.
///
/// # Errors
/// When no toolchain is fit, the build fails, or the object lacks BTF.
pub fn build(choice: Option<Toolchain>) -> Result<()> {
    let paths = Paths::of_workspace();
    let tools = Tools::find(choice)?;
    let object = compile::compile(&paths.ebpf, &tools, &host::target_directory().join("ebpf"))?;
    let record = Record::new(&paths.ebpf, &tools, &object)?;
    let bytes = object.len();
    std::fs::write(&paths.object, object)
        .with_context(|| format!("writing {}", paths.object.display()))?;
    record.write(&paths.record)?;
    println!(
        "{} ({bytes} bytes, sha256 {})",
        paths.object.display(),
        record.object_sha256
    );
    Ok(())
}

/// Proves the committed object: its sources are the present ones, its bytes are the recorded
/// ones, and a rebuild gives the same bytes, or with other compilers passes the kernel tests.
///
/// # Errors
/// Says which of these is not so.
pub fn check(choice: Option<Toolchain>) -> Result<()> {
    let paths = Paths::of_workspace();
    let committed = check_committed(&paths)?;
    let tools = Tools::find(choice)?;
    // A fresh directory: a cached artifact would prove only that the cache is the same.
    let scratch = tempfile::tempdir().context("creating a directory for the rebuild")?;
    let object = compile::compile(&paths.ebpf, &tools, scratch.path())?;
    let rebuilt = Record::new(&paths.ebpf, &tools, &object)?;

    let differences = committed.version_differences(&rebuilt);
    if differences.is_empty() {
        ensure!(
            rebuilt.object_sha256 == committed.object_sha256,
            "the same versions built other bytes: committed sha256 {}, rebuilt {}",
            committed.object_sha256,
            rebuilt.object_sha256,
        );
        println!("rebuilt byte for byte: sha256 {}", committed.object_sha256);
        return Ok(());
    }
    println!("bytes cannot be compared, the versions differ:");
    for difference in differences {
        println!("  {difference}");
    }
    if rebuilt.object_sha256 == committed.object_sha256 {
        println!(
            "they are equal nevertheless: sha256 {}",
            committed.object_sha256
        );
    }
    test_in_kernel(&object)
}

/// Says in no time, without cargo or a BPF toolchain, whether the committed object belongs to
/// the sources beside it.
///
/// # Errors
/// When it does not, or object or record are missing.
pub fn check_not_stale() -> Result<()> {
    check_committed(&Paths::of_workspace()).map(drop)
}

fn check_committed(paths: &Paths) -> Result<Record> {
    let record = Record::read(&paths.record)?;
    let sources = record::sources_sha256(&paths.ebpf)?;
    if sources != record.sources_sha256 {
        bail!(
            "ebpf/flow-tc.bpf.o is stale: flow-tc or flow-abi changed after it was built \
             (sources sha256 {sources}, built from {}); run `cargo xtask build-ebpf`",
            record.sources_sha256
        );
    }
    let object = std::fs::read(&paths.object)
        .with_context(|| format!("reading {}", paths.object.display()))?;
    let bytes = record::sha256(&object);
    if bytes != record.object_sha256 {
        bail!(
            "ebpf/flow-tc.bpf.o is not the object its record describes (sha256 {bytes}, \
             recorded {}); run `cargo xtask build-ebpf`",
            record.object_sha256
        );
    }
    compile::verify_sections(&object)?;
    Ok(record)
}

/// Other compilers, other bytes: what remains to prove is that they behave the same.
fn test_in_kernel(object: &[u8]) -> Result<()> {
    let directory = host::target_directory().join("ebpf");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("creating {}", directory.display()))?;
    let path = directory.join("flow-tc.rebuilt.bpf.o");
    std::fs::write(&path, object).with_context(|| format!("writing {}", path.display()))?;

    println!(
        "{OBJECT_VARIABLE}={} cargo test -p edgemeter --test it kernel",
        path.display()
    );
    let mut command = host::cargo();
    command.args(["test", "-p", "edgemeter", "--test", "it", "kernel"]);
    command.env(OBJECT_VARIABLE, &path);
    host::run(&mut command).context("the rebuilt object fails the kernel tests")
}

/// The files this command is about.
struct Paths {
    ebpf: PathBuf,
    object: PathBuf,
    record: PathBuf,
}

impl Paths {
    fn of_workspace() -> Self {
        let ebpf: &Path = &host::workspace_root().join("ebpf");
        Self {
            ebpf: ebpf.to_path_buf(),
            object: ebpf.join("flow-tc.bpf.o"),
            record: ebpf.join("flow-tc.toolchain.toml"),
        }
    }
}
