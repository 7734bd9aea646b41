//! A memory limit, to which the kernel charges the maps: where they do not fit, the gateway serves
//! and says so.

use std::path::PathBuf;

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site};

/// A control group with a memory limit, of whichever hierarchy has the memory controller here.
/// Declare it before the processes in it: it goes when they have ended.
struct MemoryGroup {
    path: PathBuf,
    unified: bool,
}

impl MemoryGroup {
    fn make(name: &str) -> Self {
        crate::require_root();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = |kind: &str, option: &str| {
            mounts.lines().find_map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                let fits = words[2] == kind && words[3].split(',').any(|word| word == option);
                fits.then(|| PathBuf::from(words[1]))
            })
        };
        let unified = mounted("cgroup2", "rw").filter(|root| {
            let has = std::fs::read_to_string(root.join("cgroup.controllers"));
            has.is_ok_and(|all| all.split_whitespace().any(|one| one == "memory"))
        });
        let (root, unified) = match unified {
            Some(root) => {
                std::fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
                (root, true)
            }
            None => {
                let root = mounted("cgroup", "memory");
                (root.expect("this test needs the memory controller"), false)
            }
        };
        let path = root.join(format!("edgemeter-test-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self { path, unified }
    }

    fn file(&self, unified: &str, other: &str) -> PathBuf {
        self.path.join(if self.unified { unified } else { other })
    }

    fn limit(&self, bytes: u64) {
        let file = self.file("memory.max", "memory.limit_in_bytes");
        std::fs::write(file, bytes.to_string()).unwrap();
    }

    fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        for _ in 0..50 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("{} is left behind", self.path.display());
    }
}

#[test]
fn maps_that_do_not_fit_the_limit_leave_a_gateway_that_serves_and_says_so() {
    let group = MemoryGroup::make("small");
    group.limit(64 << 20);
    let setup = Setup {
        // A quarter of a gigabyte.
        flows_max: 1 << 20,
        required: false,
        within: Some(group.processes()),
        ..Setup::default()
    };
    let site = Site::start("ml", &setup);
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 30);
    let summary = load::run(&site.hosts.client, &plan).unwrap();
    assert_eq!(summary["small"].requests, 10);
    let (_, ready) = site.get("/readyz").unwrap();
    assert!(
        ready.contains("degraded") && ready.contains("memory limit of the gateway's cgroup"),
        "{ready}"
    );
    let page = site.scrape();
    assert_eq!(page.sum("edgemeter_observer_up", |_| true), 0);
    assert_eq!(page.sum("edgemeter_requests_total", |_| true), 30);
    // The doctor, under the same limit, says what to change.
    let doctor = format!(
        "echo $$ > {} && exec {} doctor --config edgemeter.toml",
        group.processes().display(),
        env!("CARGO_BIN_EXE_edgemeter")
    );
    let mut shell = site.hosts.gateway.command("sh").unwrap();
    let told = shell
        .args(["-c", &doctor])
        .current_dir(site.directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&told.stdout);
    assert!(
        !told.status.success() && said.contains("MISSING  programs") && said.contains("memory.max"),
        "{said}"
    );
}
