//! Disks that are full, read-only or damaged: metering goes on, the reason is told, and what comes
//! to the ledger in the end is what the far ends saw.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site, assert_equal_to_far_ends};

const DEADLINE: Duration = Duration::from_secs(30);

/// A small disk in memory, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn over(directory: &Path, bytes: u64) -> Self {
        mount(directory, 0, Some(&format!("size={bytes}"))).unwrap();
        Self(directory.to_owned())
    }

    fn read_only(&self, on: bool) {
        let flags = libc::MS_REMOUNT | if on { libc::MS_RDONLY } else { 0 };
        mount(&self.0, flags, None).unwrap();
    }

    /// Takes all the space there is.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        for size in [65_536, 4_096, 512, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let path = CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path; detached, so that open files do not keep it.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

fn mount(at: &Path, flags: u64, options: Option<&str>) -> std::io::Result<()> {
    let at = CString::new(at.to_str().unwrap()).unwrap();
    let options = options.map(|options| CString::new(options).unwrap());
    // SAFETY: NUL-terminated strings that outlive the call.
    let outcome = unsafe {
        libc::mount(
            c"tmpfs".as_ptr(),
            at.as_ptr(),
            c"tmpfs".as_ptr(),
            flags,
            options
                .as_ref()
                .map_or(std::ptr::null(), |text| text.as_ptr().cast()),
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Stops the gateway, moves its state to a small disk, starts it again.
fn on_a_small_disk(site: &mut Site) -> Disk {
    site.end(libc::SIGTERM);
    let state = site.directory.path().join("state");
    let kept: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&state)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        // Made again.
        .filter(|path| !path.ends_with("admin.token"))
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    let disk = Disk::over(&state, 2 << 20);
    for (path, bytes) in kept {
        fs::write(path, bytes).unwrap();
    }
    site.launch();
    disk
}

fn wait_for(site: &Site, what: &str, is: impl Fn() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(
            started.elapsed() < DEADLINE,
            "{what} does not come: {}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn ledger_up(site: &Site) -> bool {
    site.scrape().sum("edgemeter_ledger_up", |_| true) == 1
}

#[test]
fn a_full_and_then_a_read_only_disk_lose_and_double_nothing() {
    let setup = Setup {
        required: false,
        ..Setup::default()
    };
    let mut site = Site::start("df", &setup);
    let captures = site.captures();
    let disk = on_a_small_disk(&mut site);
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 10);
    load::run(&site.hosts.client, &plan).unwrap();
    wait_for(&site, "a good ledger", || ledger_up(&site));

    disk.fill();
    load::run(&site.hosts.client, &plan).unwrap();
    wait_for(&site, "a bad ledger", || !ledger_up(&site));
    let (status, ready) = site.get("/readyz").unwrap();
    assert!(
        status == 200 && ready.contains("make space on its disk"),
        "{ready}"
    );
    load::run(&site.hosts.client, &plan).unwrap();
    disk.make_room();
    wait_for(&site, "a good ledger", || ledger_up(&site));
    assert!(
        site.log().contains("everything is posted"),
        "{}",
        site.log()
    );

    // kill -9, and the disk comes back read-only: what passes is counted all the same.
    site.end(libc::SIGKILL);
    disk.read_only(true);
    site.launch();
    load::run(&site.hosts.client, &plan).unwrap();
    wait_for(&site, "a bad ledger", || !ledger_up(&site));
    let (status, ready) = site.get("/readyz").unwrap();
    assert!(
        status == 200 && ready.contains("make it writable"),
        "{ready}"
    );
    site.end(libc::SIGKILL);
    disk.read_only(false);
    site.launch();
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    wait_for(&site, "a good ledger", || ledger_up(&site));
    let (sound, said) = site.edgemeter(&["ledger", "check", "--config", "edgemeter.toml"]);
    assert!(sound, "{said}");
    let captures = captures.map(|capture| capture.stop().unwrap());
    let (balances, _) = site.ledger();
    assert_equal_to_far_ends(&balances, captures);
    site.end(libc::SIGTERM);
}

#[test]
fn a_damaged_ledger_is_told_and_the_gateway_serves() {
    let mut site = Site::start(
        "dd",
        &Setup {
            required: false,
            ..Setup::default()
        },
    );
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 10);
    load::run(&site.hosts.client, &plan).unwrap();
    site.quiet();
    site.end(libc::SIGTERM);
    // Brings what is in the write-ahead log into the file.
    let (fine, said) = site.edgemeter(&["ledger", "check", "--config", "edgemeter.toml"]);
    assert!(fine, "{said}");
    let file = site.directory.path().join("state/ledger.db");
    let sound = fs::read(&file).unwrap();
    let mut damaged = sound.clone();
    let length = damaged.len();
    damaged[length / 2..].fill(0x5a);
    fs::write(&file, damaged).unwrap();
    let (fine, said) = site.edgemeter(&["ledger", "check", "--config", "edgemeter.toml"]);
    assert!(!fine && said.contains("edgemeter ledger restore"), "{said}");

    site.launch();
    let (_, ready) = site.get("/readyz").unwrap();
    assert!(
        ready.contains("degraded") && ready.contains("ledger restore"),
        "{ready}"
    );
    assert!(!ledger_up(&site));
    load::run(&site.hosts.client, &plan).unwrap();
    site.end(libc::SIGTERM);

    // The kernel has counted all the while; with the sound file back, everything is posted.
    fs::write(&file, sound).unwrap();
    site.launch();
    site.quiet();
    let (sound, said) = site.edgemeter(&["ledger", "check", "--config", "edgemeter.toml"]);
    assert!(sound && said.contains("difference 0 B"), "{said}");
}

#[test]
fn the_file_can_be_moved_to_another_place_by_export_and_restore() {
    let directory = tempfile::tempdir().unwrap();
    let edgemeter = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_edgemeter"))
            .args(arguments)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), said)
    };
    let config = |state: &str| {
        format!(
            "[gateway]\nstate_dir = \"{state}\"\n[[listeners]]\nname = \"a\"\n\
             address = \"127.0.0.1:1\"\n[[upstreams]]\nname = \"u\"\npeers = [\"127.0.0.1:2\"]\n\
             [[routes]]\nname = \"r\"\nupstream = \"u\"\n"
        )
    };
    fs::write(directory.path().join("a.toml"), config("a")).unwrap();
    fs::write(directory.path().join("b.toml"), config("b")).unwrap();
    let (fine, said) = edgemeter(&["ledger", "export", "--config", "a.toml", "--to", "dump"]);
    assert!(fine && said.contains("rows of"), "{said}");
    let (fine, said) = edgemeter(&["ledger", "restore", "--config", "b.toml", "--from", "dump"]);
    assert!(fine, "{said}");
    let (fine, said) = edgemeter(&["ledger", "export", "--config", "a.toml", "--to", "dump"]);
    assert!(
        !fine && said.contains("--to dump"),
        "not overwritten: {said}"
    );
}
