//! What an earlier schema's programs left is taken over: they go on counting, into the same maps,
//! until ours replace them in their own links.
//!
//! A map whose layout has not changed keeps its counters by keeping its pin. One whose layout has
//! is made anew; were that the accounts or the interfaces, new counters would begin (and a new
//! epoch), so both have kept theirs since the schema they are carried from.

use std::{fs, io, path::Path};

use flow_abi::SCHEMA;

use super::{
    PinDirectory,
    pins::{self, PinError},
};

/// The oldest schema whose maps of equal layout mean the same.
const CARRIED_FROM: u32 = 3;

/// Moves the pins of the newest earlier schema in place of what is missing. Returns notices.
///
/// # Errors
/// Another process uses the earlier schema's directory, or it cannot be read.
pub(super) fn carry_over(bpffs: &Path, pins: &PinDirectory) -> Result<Vec<String>, PinError> {
    let mut notices = Vec::new();
    for schema in (CARRIED_FROM..SCHEMA).rev() {
        let root = bpffs.join(format!("v{schema}"));
        if !root.exists() {
            continue;
        }
        let old = PinDirectory::at(root);
        let _lock = old.lock()?;
        let mut left = Vec::new();
        let done = move_all(&old, pins, &mut left).and_then(|()| old.remove_root());
        done.map_err(|source| PinError::Io {
            path: old.root().to_owned(),
            source,
        })?;
        let anew = if left.is_empty() {
            String::new()
        } else {
            format!("; of another layout, and empty: {}", left.join(", "))
        };
        notices.push(format!(
            "took over the maps and links of schema {schema}{anew}"
        ));
    }
    Ok(notices)
}

fn move_all(old: &PinDirectory, new: &PinDirectory, left: &mut Vec<String>) -> io::Result<()> {
    for layout in pins::layouts() {
        let (from, to) = (old.map(layout.name), new.map(layout.name));
        if !from.exists() || to.exists() {
            continue;
        }
        if layout.is_of(&from)? {
            fs::rename(from, to)?;
        } else {
            left.push(layout.name.to_owned());
        }
    }
    for kind in ["links", "clsact"] {
        let (from, to) = (old.root().join(kind), new.root().join(kind));
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let to = to.join(entry.file_name());
            if fs::symlink_metadata(&to).is_err() {
                fs::rename(entry.path(), to)?;
            }
        }
    }
    Ok(())
}
