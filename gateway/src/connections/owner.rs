//! cgroup ids to paths, and the container a path names.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::kernel::cgroup2;

/// Directories looked at in one walk: a bound against a hierarchy gone wild.
const WALK_MAX: usize = 65_536;
/// Between two walks: each costs a system call a directory.
const WALK_INTERVAL: Duration = Duration::from_secs(1);
/// Paths remembered of cgroups that are gone.
const REMEMBERED_MAX: usize = 65_536;

/// Paths of cgroups by id. A cgroup's id is the inode number of its directory; one that is gone
/// before it was looked up stays unknown.
#[derive(Debug, Default)]
pub struct Cgroups {
    paths: HashMap<u64, String>,
    walked: Option<Instant>,
}

impl Cgroups {
    /// The path below the cgroup2 mount, `/` for its root. None when unknown.
    pub fn path(&mut self, id: u64) -> Option<String> {
        if id == 0 {
            return None;
        }
        if !self.paths.contains_key(&id)
            && self
                .walked
                .is_none_or(|walked| walked.elapsed() >= WALK_INTERVAL)
        {
            self.walked = Some(Instant::now());
            if let Ok(root) = cgroup2() {
                self.walk(&root);
            }
        }
        self.paths.get(&id).cloned()
    }

    fn walk(&mut self, root: &Path) {
        if self.paths.len() > REMEMBERED_MAX {
            self.paths.clear();
        }
        let mut left: Vec<PathBuf> = vec![root.to_owned()];
        let mut seen = 0;
        while let Some(directory) = left.pop() {
            seen += 1;
            if seen > WALK_MAX {
                return;
            }
            if let Ok(metadata) = fs::metadata(&directory) {
                let below = directory.strip_prefix(root).unwrap_or(&directory);
                let path = format!("/{}", below.display());
                self.paths.insert(metadata.ino(), path);
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    left.push(entry.path());
                }
            }
        }
    }
}

/// The container id a cgroup path shows: 64 hexadecimal digits, as Docker, containerd, CRI-O and
/// Podman write them, innermost first. None when it shows none.
#[must_use]
pub(super) fn container(path: &str) -> Option<&str> {
    const LENGTH: usize = 64;
    path.rsplit('/').find_map(|component| {
        component
            .split(|character: char| !character.is_ascii_hexdigit())
            .find(|run| run.len() == LENGTH && !run.bytes().any(|byte| byte.is_ascii_uppercase()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_ids_are_read_from_the_paths_that_engines_make() {
        let id = "4f0c1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c5d6e7";
        for path in [
            format!("/docker/{id}"),
            format!("/system.slice/docker-{id}.scope"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f.slice/cri-containerd-{id}.scope"
            ),
            format!("/kubepods/besteffort/pod2d1e0c-11/{id}"),
            format!("/system.slice/containerd.service/kubepods-pod0f.slice:cri-containerd:{id}"),
            format!("/machine.slice/libpod-{id}.scope/container"),
            format!("/kubepods.slice/crio-{id}.scope"),
        ] {
            assert_eq!(container(&path), Some(id), "{path}");
        }
        for path in [
            "/",
            "/user.slice/user-0.slice/session-1.scope",
            "/a/deadbeef",
        ] {
            assert_eq!(container(path), None, "{path}");
        }
        assert_eq!(container(&format!("/x/{id}0")), None, "65 digits are no id");
    }

    #[test]
    fn a_new_cgroup_is_found_by_its_number() {
        let Ok(root) = cgroup2() else {
            panic!("no cgroup2 file system is mounted");
        };
        let mut cgroups = Cgroups::default();
        let number = fs::metadata(&root).unwrap().ino();
        assert_eq!(cgroups.path(number).as_deref(), Some("/"));
        assert_eq!(cgroups.path(0), None);
        assert_eq!(cgroups.path(u64::MAX), None);
    }
}
