//! A memory limit, to which the kernel charges the maps: where they do not fit, the gateway serves
//! and says so; where an entry finds no memory, its bytes are in a cell.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
};

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::{
    flows::{exact, listing},
    harness::{PLAIN, Setup, Site, assert_equal_to_far_ends},
};

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

    fn usage(&self) -> u64 {
        let file = self.file("memory.current", "memory.usage_in_bytes");
        let text = std::fs::read_to_string(file).unwrap();
        text.trim().parse().unwrap()
    }

    /// From now on there is no more than is in use, by the maps: what else there is is given back.
    fn close(&self) {
        // Maps of a process that has ended go a while after it.
        let mut usage = self.usage();
        loop {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let now = self.usage();
            if now == usage {
                break;
            }
            usage = now;
        }
        let (file, word) = if self.unified {
            ("memory.reclaim", "1G")
        } else {
            ("memory.force_empty", "0")
        };
        // More than there is: an error, and as much as possible is done. So with a limit of nothing,
        // for which what processors have put by is collected too.
        let _ = std::fs::write(self.path.join(file), word);
        let limit = self.file("memory.max", "memory.limit_in_bytes");
        let _ = std::fs::write(limit, "0");
        self.limit(self.usage());
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
    // Room for the process and the smaller maps.
    group.limit(160 << 20);
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

/// Requests of so many tenants on one connection.
fn ask(address: SocketAddr, tenants: std::ops::Range<usize>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut answer = [0; 4096];
    for tenant in tenants {
        let request =
            format!("GET /small/bytes/100 HTTP/1.1\r\nhost: x\r\nx-tenant: t{tenant}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut length = 0;
        loop {
            let more = stream.read(&mut answer[length..]).unwrap();
            assert!(more > 0, "{}", answer[..length].escape_ascii());
            length += more;
            let head = answer[..length]
                .windows(4)
                .position(|end| end == b"\r\n\r\n");
            if head.is_some_and(|head| length == head + 4 + 100) {
                break;
            }
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"));
    }
}

#[test]
fn accounts_that_find_no_memory_leave_their_bytes_in_a_cell() {
    const TENANTS: usize = 3_000;
    const PACE: usize = 300;
    let group = MemoryGroup::make("tight");
    let setup = Setup {
        within: Some(group.processes()),
        ..Setup::default()
    };
    let mut site = Site::start("mt", &setup);
    let captures = site.captures();
    let address: SocketAddr = (GATEWAY_TO_CLIENT.v4, PLAIN).into();
    site.hosts.client.run(|| ask(address, 0..20)).unwrap();
    site.quiet();
    // The maps stay charged to the group of the process that made them. The next one is outside, so
    // that memory is refused to the maps and to nothing else.
    site.end(libc::SIGTERM);
    site.within(None);
    site.launch();
    // Not before: what only the programs of the one before held has gone with them.
    group.close();
    for first in (20..TENANTS).step_by(PACE) {
        let some = first..TENANTS.min(first + PACE);
        site.hosts.client.run(|| ask(address, some)).unwrap();
        // Names go to the ledger, and make room for others.
        std::thread::sleep(std::time::Duration::from_millis(400));
    }
    let page = site.quiet();
    let captures = captures.map(|capture| capture.stop().unwrap());
    let refused = page.sum("edgemeter_unattributed_bytes_total", |sample| {
        sample.label("cell") == "accounts_full"
    });
    assert!(refused > 0, "every account found memory: {}", group.usage());
    assert_eq!(page.sum("edgemeter_conservation_gap_bytes", |_| true), 0);
    assert_eq!(page.sum("edgemeter_ledger_difference_bytes", |_| true), 0);
    exact(&listing(&site, "0"));
    assert_equal_to_far_ends(&site.ledger().0, captures);
}
