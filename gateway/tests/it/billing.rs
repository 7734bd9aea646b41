//! The examples of the billing side, each run by a gateway of its own, without the kernel side.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use xtask::{exposition, host, server::Postgres};

const DEADLINE: Duration = Duration::from_secs(30);

/// A gateway running an example, killed when dropped.
pub struct Example {
    child: Child,
    pub admin: SocketAddr,
    pub listen: SocketAddr,
    pub directory: tempfile::TempDir,
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Example {
    /// Runs `gateway/examples/<name>` on ports of its own, with words replaced and lines added.
    pub fn run(name: &str, replace: &[(&str, &str)], extra: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = host::workspace_root().join("gateway/examples").join(name);
        let mut text = std::fs::read_to_string(file).unwrap();
        for (from, to) in replace {
            assert!(text.contains(from), "{name} has no {from}");
            text = text.replace(from, to);
        }
        let (listen, admin) = (free_port(), free_port());
        let text = text.replace("127.0.0.1:8080", &listen.to_string());
        let text = format!("{text}\n[admin]\nlisten = \"{admin}\"\n{extra}");
        std::fs::write(directory.path().join("edgemeter.toml"), text).unwrap();
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n";
        std::fs::write(directory.path().join("push.secret"), secret).unwrap();
        let log = std::fs::File::create(directory.path().join("gateway.log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_edgemeter"))
            .args(["run", "--config", "edgemeter.toml"])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut example = Self {
            child,
            admin,
            listen,
            directory,
        };
        let started = Instant::now();
        while !exposition::get(admin, "/readyz").is_ok_and(|(status, _)| status == 200) {
            assert!(started.elapsed() < DEADLINE, "{name}: {}", example.log());
            let ended = example.child.try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {}", example.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        example
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("gateway.log")).unwrap_or_default()
    }

    /// Another command on the same configuration: success, and what it printed.
    pub fn edgemeter(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_edgemeter"))
            .args(arguments)
            .args(["--config", "edgemeter.toml"])
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }
}

fn free_port() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}

#[test]
fn the_push_example_runs_and_says_what_its_sink_has() {
    let example = Example::run("push.toml", &[], "");
    let (fine, said) = example.edgemeter(&["push", "status"]);
    assert!(fine && said.starts_with("meter: 0 acknowledged"), "{said}");
    let (fine, said) = example.edgemeter(&["push", "decide", "--sink", "nobody", "--arrived"]);
    assert!(
        !fine && said.contains("no sink is named \"nobody\""),
        "{said}"
    );
    let (_, page) = exposition::get(example.admin, "/metrics").unwrap();
    assert!(
        page.contains("edgemeter_push_lag_seconds{sink=\"meter\"} 0"),
        "{page}"
    );
}

#[test]
fn two_gateways_share_a_ledger_and_the_same_one_twice_does_not() {
    let url = Postgres::shared().unwrap().create_database().unwrap();
    let place = [("postgres://edgemeter@127.0.0.1:5432/bill", url.as_str())];
    let one = Example::run("shared-ledger.toml", &place, "");
    let two = [place[0], ("\"edge-1\"", "\"edge-2\"")];
    let two = Example::run("shared-ledger.toml", &two, "");
    for example in [&one, &two] {
        let (sound, said) = example.edgemeter(&["ledger", "check"]);
        assert!(sound && said.contains("every invariant holds"), "{said}");
    }
    // A second process with the first one's name.
    let text = std::fs::read_to_string(one.directory.path().join("edgemeter.toml")).unwrap();
    std::fs::write(two.directory.path().join("edgemeter.toml"), text).unwrap();
    let (fine, said) = two.edgemeter(&["run"]);
    assert!(!fine && said.contains("same gateway.id"), "{said}");
    let dump = one.directory.path().join("dump");
    let (fine, said) = one.edgemeter(&["ledger", "export", "--to", dump.to_str().unwrap()]);
    assert!(fine && said.contains(" rows of postgres://"), "{said}");
    assert!(lines(&dump) > 3);
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap().lines().count()
}

#[test]
fn tenants_come_from_the_first_place_that_names_one() {
    use std::io::{Read as _, Write as _};
    let example = Example::run("tenants.toml", &[("127.0.0.1:9000", "127.0.0.1:1")], "");
    let cases = [
        ("acme.shop.example", "/t/globex", "initech", "acme"),
        ("ACME.shop.example:8080", "/", "initech", "acme"),
        ("shop.example", "/t/globex/orders", "initech", "globex"),
        ("shop.example", "/t", "initech", "initech"),
        ("shop.example", "/", "No Name", "public"),
    ];
    for (host, path, header, _) in cases {
        let mut stream = std::net::TcpStream::connect(example.listen).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nX-Tenant: {header}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
    }
    let path = example.directory.path().join("access.jsonl");
    let started = Instant::now();
    let text = loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.lines().count() == cases.len() {
            break text;
        }
        assert!(started.elapsed() < DEADLINE, "{text}{}", example.log());
        std::thread::sleep(Duration::from_millis(50));
    };
    // Connections may be on different workers: their lines have no order among them.
    let mut logged: Vec<(String, String)> = text
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let word = |field: &str| line[field].as_str().unwrap().to_owned();
            (word("path"), word("tenant"))
        })
        .collect();
    let mut expected: Vec<(String, String)> = cases
        .iter()
        .map(|(_, path, _, tenant)| ((*path).to_owned(), (*tenant).to_owned()))
        .collect();
    logged.sort();
    expected.sort();
    assert_eq!(logged, expected, "{text}");
}
