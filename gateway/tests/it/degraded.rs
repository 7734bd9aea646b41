//! Where eBPF cannot load, the gateway serves and says so; where it must, it refuses to start.

use xtask::{
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site};

#[test]
fn without_a_bpffs_it_serves_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let bpffs = Some(directory.path().join("not-a-bpffs"));
    let site = Site::start(
        "dg",
        &Setup {
            bpffs,
            required: false,
            ..Setup::default()
        },
    );
    for (tls, protocol) in [(false, Protocol::Http1), (true, Protocol::Http2)] {
        let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), tls, protocol, 30);
        let summary = load::run(&site.hosts.client, &plan).unwrap();
        assert_eq!(summary["small"].requests, 10);
    }
    let page = site.scrape();
    assert_eq!(page.sum("edgemeter_observer_up", |_| true), 0);
    assert_eq!(page.sum("edgemeter_requests_total", |_| true), 60);
    assert_eq!(
        page.sum("edgemeter_wire_bytes_total", |_| true),
        0,
        "nothing is guessed"
    );
    let (_, ready) = site.get("/readyz").unwrap();
    assert!(
        ready.contains("degraded") && ready.contains("bpffs"),
        "{ready}"
    );
    assert!(site.log().contains("running degraded"), "{}", site.log());
    let log = std::fs::read_to_string(site.directory.path().join("access.jsonl")).unwrap();
    assert!(
        log.lines().all(|line| line.contains("\"wire\":null")),
        "{log}"
    );
}

#[test]
fn where_it_is_required_it_refuses_and_names_the_fix() {
    let site = Site::start("dr", &Setup::default());
    let text = std::fs::read_to_string(site.config()).unwrap();
    let other = site.directory.path().join("other.toml");
    let changed = text
        .replace("edge0", "edge9")
        .replace("9901", "9902")
        .replace("\"state\"", "\"other-state\"")
        .replace(
            "/sys/fs/bpf/edgemeter-test-",
            "/sys/fs/bpf/edgemeter-test-other-",
        );
    std::fs::write(&other, changed).unwrap();
    let mut edgemeter = site
        .hosts
        .gateway
        .command(env!("CARGO_BIN_EXE_edgemeter"))
        .unwrap();
    let output = edgemeter
        .args(["run", "--config"])
        .arg(&other)
        .output()
        .unwrap();
    for entry in std::fs::read_dir("/sys/fs/bpf").unwrap().flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with("edgemeter-test-other-")
        {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("edge9") && said.contains("known:") && said.contains("edge0"),
        "{said}"
    );
}

#[test]
fn a_wrong_configuration_is_explained_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bad.toml");
    std::fs::write(
        &path,
        "[[listeners]]\nname = \"a\"\naddres = \"0.0.0.0:80\"\n",
    )
    .unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_edgemeter"))
        .args(["check", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("bad.toml:3:1") && said.contains("address"),
        "{said}"
    );
}

/// What can be missing while bytes are counted.
const FEATURES: [&str; 5] = [
    "connection_life",
    "socket_owner",
    "resets",
    "drops",
    "tunnels",
];

#[test]
fn the_doctor_names_what_is_missing_and_what_is_lost() {
    let site = Site::start("do", &Setup::default());
    let doctor = |config: &std::path::Path| {
        let mut edgemeter = site
            .hosts
            .gateway
            .command(env!("CARGO_BIN_EXE_edgemeter"))
            .unwrap();
        let output = edgemeter
            .args(["doctor", "--config"])
            .arg(config)
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (fit, said) = doctor(&site.config());
    assert!(
        fit && said.contains("edge0: Ethernet") && !said.contains("MISSING"),
        "{said}"
    );
    assert!(said.contains("the least is 5.15"), "{said}");
    for feature in FEATURES {
        assert!(said.contains(&format!("ok       {feature}")), "{said}");
    }
    // Without the rights: each feature by name, and what is lost without it.
    let mut weak = site.hosts.gateway.command("setpriv").unwrap();
    let weak = weak
        .args(["--bounding-set", "-bpf,-perfmon,-sys_admin,-net_admin"])
        .arg(env!("CARGO_BIN_EXE_edgemeter"))
        .args(["doctor", "--config"])
        .arg(site.config())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&weak.stdout);
    let missing = "MISSING  capabilities    without CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON";
    assert!(!weak.status.success() && told.contains(missing), "{told}");
    assert!(told.contains("MISSING  programs"), "{told}");
    for feature in FEATURES {
        let line = told
            .lines()
            .find(|line| line.starts_with(&format!("absent   {feature} ")));
        let line = line.unwrap_or_else(|| panic!("{feature}: {told}"));
        let lost = line.split("; lost: ").nth(1);
        assert!(lost.is_some_and(|lost| !lost.is_empty()), "{line}");
    }
    let text = std::fs::read_to_string(site.config()).unwrap();
    let other = site.directory.path().join("other.toml");
    std::fs::write(
        &other,
        text.replace("\"edge0\"", "\"lo\"").replace("svc0", "svc9"),
    )
    .unwrap();
    let (fit, said) = doctor(&other);
    assert!(
        !fit && said.contains("lo: loopback") && said.contains("svc9: No such device"),
        "{said}"
    );
}
