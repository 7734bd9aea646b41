//! A Prometheus far away is a view of the ledger: a real one scrapes the gateway and writes to
//! another, and what that one has is what the ledger has. Never the bill, for it may miss scrapes.

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use xtask::{
    exposition,
    host::{self, Tool},
    load::{self, Protocol},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::{Setup, Site};

const PATIENCE: Duration = Duration::from_secs(60);
/// Of the Prometheus that is written to.
const FAR: &str = "127.0.0.1:9191";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one on an address of the gateway's loopback, which is not observed.
fn prometheus(site: &Site, listen: &str, config: &str, receives: bool) -> Killed {
    let directory = site.directory.path().join(listen.replace(':', "-"));
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("prometheus.yml");
    std::fs::write(&file, config).unwrap();
    let mut command = site.hosts.gateway.command("prometheus").unwrap();
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.join("data").display()
        ))
        .arg(format!("--web.listen-address={listen}"));
    if receives {
        command.arg("--web.enable-remote-write-receiver");
    }
    let log = std::fs::File::create(directory.join("log")).unwrap();
    Killed(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap(),
    )
}

/// `sum(edgemeter_wire_bytes_total)` as the far one answers it; None while it has nothing.
fn far_sum(site: &Site) -> Option<i128> {
    let path = "/api/v1/query?query=sum(edgemeter_wire_bytes_total)";
    let asked = site
        .hosts
        .gateway
        .run(|| exposition::get(FAR.parse().unwrap(), path))
        .unwrap();
    let (status, text) = asked.ok()?;
    let answer: serde_json::Value = serde_json::from_str(&text).ok()?;
    let value = answer["data"]["result"][0]["value"][1].as_str()?;
    (status == 200).then(|| value.parse().ok())?
}

#[test]
fn a_prometheus_written_to_by_another_has_what_the_ledger_has() {
    host::need(&[Tool::PROMETHEUS]).unwrap();
    let site = Site::start("pr", &Setup::default());
    let _far = prometheus(&site, FAR, "global: {}\n", true);
    let near = format!(
        "global: {{ scrape_interval: 1s }}\n\
         scrape_configs: [{{ job_name: edgemeter, static_configs: [{{ targets: ['127.0.0.1:9901'] }}] }}]\n\
         remote_write: [{{ url: 'http://{FAR}/api/v1/write' }}]\n"
    );
    let _near = prometheus(&site, "127.0.0.1:9190", &near, false);
    let plan = site.plan(GATEWAY_TO_CLIENT.v4.into(), false, Protocol::Http1, 300);
    load::run(&site.hosts.client, &plan).unwrap();
    let page = site.quiet();
    let here = page.sum("edgemeter_wire_bytes_total", |_| true);
    assert!(here > 0);
    let began = Instant::now();
    loop {
        let there = far_sum(&site);
        if there == Some(here) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{there:?} there, {here} here");
        std::thread::sleep(Duration::from_millis(500));
    }
}
