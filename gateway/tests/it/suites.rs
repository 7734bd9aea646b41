//! What others wrote to find fault with servers, let loose on a gateway: the Autobahn WebSocket
//! cases, slowhttptest, and sslyze with Mozilla's TLS configuration.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, process::Command, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use tokio_tungstenite::tungstenite::{Error, protocol::WebSocketConfig};
use xtask::{
    certificate,
    host::{self, Tool},
    python,
};

use crate::local::{Echo, Local, example, free, get};

/// Drives Autobahn's own case files; Autobahn's runner needs Python 2.
const AUTOBAHN: &[&str] = &["kosoku==0.1.0"];
const SSLYZE: &[&str] = &["sslyze==6.3.1"];

/// Sends every message back.
async fn echo(listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let config = WebSocketConfig::default();
            let accepted = tokio_tungstenite::accept_async_with_config(stream, Some(config)).await;
            let Ok(mut socket) = accepted else { return };
            while let Some(message) = socket.next().await {
                let answered = match message {
                    Ok(message) if message.is_text() || message.is_binary() => {
                        socket.send(message).await
                    }
                    Ok(_) => Ok(()),
                    Err(Error::ConnectionClosed) => return,
                    Err(error) => Err(error),
                };
                if answered.is_err() {
                    return;
                }
            }
        });
    }
}

/// Case → how it went and how it closed.
fn autobahn(address: SocketAddr, path: &str, reports: &Path) -> BTreeMap<String, (String, String)> {
    let tools = python::venv("autobahn", AUTOBAHN).unwrap();
    let output = Command::new(tools.join("bin/kosoku"))
        // 9: how fast; 12 and 13: compression, which the service does not speak.
        .args([
            "-m",
            "fuzzingclient",
            "-x",
            "9.*",
            "-x",
            "12.*",
            "-x",
            "13.*",
        ])
        .args(["-p", "8", "-o"])
        .arg(reports)
        .arg(format!("ws://{address}{path}"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let index = std::fs::read_to_string(reports.join("index.json")).unwrap_or_else(|error| {
        panic!("no report: {error}: {said}");
    });
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let agents = index.as_object().unwrap();
    let cases = agents.values().flat_map(|cases| cases.as_object().unwrap());
    let text = |case: &serde_json::Value, key: &str| case[key].as_str().unwrap().to_owned();
    cases
        .map(|(id, case)| {
            (
                id.clone(),
                (text(case, "behavior"), text(case, "behaviorClose")),
            )
        })
        .collect()
}

#[test]
fn the_autobahn_websocket_cases_pass_through_the_gateway() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let service = listener.local_addr().unwrap();
    runtime.spawn(echo(listener));
    let address = free();
    let text = format!(
        "[[listeners]]\nname = \"public\"\naddress = \"{address}\"\n\
         [[upstreams]]\nname = \"chat\"\npeers = [\"{service}\"]\n\
         [[routes]]\nname = \"chat\"\nupstream = \"chat\"\n"
    );
    let gateway = Local::start(&text, |_| {});
    let reports = gateway.directory.path().join("autobahn");
    let cases = autobahn(address, "/chat", &reports);
    assert!(cases.len() > 200, "only {} cases ran", cases.len());
    let good = |word: &str| ["OK", "NON-STRICT", "INFORMATIONAL"].contains(&word);
    let bad: Vec<_> = cases
        .iter()
        .filter(|(_, (behavior, close))| !good(behavior) || !good(close))
        .collect();
    assert!(bad.is_empty(), "{} of {}: {bad:?}", bad.len(), cases.len());
    let tunnelled = gateway.count("edgemeter_requests_total", "status_class", "1xx");
    assert!(
        tunnelled >= i128::try_from(cases.len()).unwrap() / 2,
        "{tunnelled} upgrades went through the gateway"
    );
}

/// A service whose answers are larger than any socket's buffers, but for `/small`.
fn large_answers() -> SocketAddr {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut space = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut space) {
                    let small = space[..read].starts_with(b"GET /small");
                    let size = if small { 10 } else { 30 << 20 };
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
                    let sent = stream.write_all(head.as_bytes());
                    if sent
                        .and_then(|()| stream.write_all(&vec![b'x'; size]))
                        .is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// The kernel's sockets at an address, but for the listening one and those that only wait out the
/// time after an orderly end.
fn sockets(address: SocketAddr) -> usize {
    const LISTEN: &str = "0A";
    const TIME_WAIT: &str = "06";
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_it = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next().unwrap(), fields.nth(1).unwrap());
        local.ends_with(&port) && ![LISTEN, TIME_WAIT].contains(&state)
    };
    table.lines().skip(1).filter(of_it).count()
}

/// Runs one mode; what it printed.
fn slow(mode: &[&str], url: &str) -> String {
    let output = Command::new("slowhttptest")
        // 200 connections, 100 a second, for 45 s.
        .args(["-c", "200", "-r", "100", "-l", "45"])
        .args(mode)
        .args(["-u", url])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn slow_headers_bodies_and_readers_are_cut_off_while_others_are_served() {
    host::need(&[Tool::SLOWHTTPTEST]).unwrap();
    let address = free();
    let text = example(
        "protection.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &large_answers().to_string()),
            (
                "connections_per_client_max = 100",
                "connections_per_client_max = 1000",
            ),
        ],
    );
    let gateway = Local::start(&text, |_| {});
    let url = format!("http://{address}/");
    for (mode, reason) in [
        (&["-H", "-i", "3"][..], "header_timeout"),
        (&["-B", "-i", "3", "-s", "900"], "body_too_slow"),
        (
            &["-X", "-n", "5", "-w", "1", "-y", "10", "-z", "2"],
            "reads_too_slowly",
        ),
    ] {
        // Its own probe gives up after seconds, which a busy machine may need.
        let (said, served) = std::thread::scope(|scope| {
            let attack = scope.spawn(|| slow(mode, &url));
            let mut served = 0;
            while !attack.is_finished() {
                assert_eq!(get(address, "/small", "").0, 200, "{mode:?}");
                served += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            (attack.join().unwrap(), served)
        });
        assert!(served > 10, "{mode:?}: {served} requests beside it");
        if mode[0] == "-X" {
            // It sees an end only when it has read all that came before, a few bytes at a time.
            // The gateway's host knows: nothing of what was cut off is left, nor waits to be taken.
            let left = sockets(address);
            assert!(left < 10, "{left} connections stay open: {said}");
        } else {
            assert!(
                said.contains("No open connections left"),
                "{mode:?}: connections stay open: {said}"
            );
        }
        let refused = gateway.count("edgemeter_requests_refused_total", "reason", reason);
        assert!(refused >= 100, "{mode:?}: {refused} for {reason}");
    }
    assert_eq!(get(address, "/", "").0, 200);
}

#[test]
fn sslyze_finds_nothing_beyond_mozillas_intermediate_configuration() {
    let (address, echo) = (free(), Echo::start());
    let text = format!(
        "[[listeners]]\nname = \"public\"\naddress = \"{address}\"\n\
         tls = {{ certificate = \"cert.pem\", key = \"key.pem\" }}\n\
         [[upstreams]]\nname = \"shop\"\npeers = [\"{}\"]\n\
         [[routes]]\nname = \"all\"\nupstream = \"shop\"\n",
        echo.address
    );
    let mut root = None;
    let _gateway = Local::start(&text, |directory| {
        root = Some(certificate::write(directory, &[address.ip()]).unwrap());
    });
    let tools = python::venv("sslyze", SSLYZE).unwrap();
    let report = _gateway.directory.path().join("sslyze.json");
    let output = Command::new(tools.join("bin/sslyze"))
        .args(["--mozilla_config", "intermediate", "--json_out"])
        .arg(&report)
        .arg(address.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
    let result = &report["server_scan_results"][0];
    assert_eq!(result["scan_status"], "COMPLETED", "{said}");
    let scan = &result["scan_result"];
    let accepted = |version: &str| {
        let suites = &scan[version]["result"]["accepted_cipher_suites"];
        suites
            .as_array()
            .unwrap_or_else(|| panic!("{version}: {said}"))
            .len()
    };
    for old in [
        "ssl_2_0_cipher_suites",
        "ssl_3_0_cipher_suites",
        "tls_1_0_cipher_suites",
        "tls_1_1_cipher_suites",
    ] {
        assert_eq!(accepted(old), 0, "{old}");
    }
    assert!(accepted("tls_1_2_cipher_suites") > 0 && accepted("tls_1_3_cipher_suites") > 0);
    for (check, flaw) in [
        ("heartbleed", "is_vulnerable_to_heartbleed"),
        ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection"),
        ("tls_compression", "supports_compression"),
        (
            "session_renegotiation",
            "is_vulnerable_to_client_renegotiation_dos",
        ),
    ] {
        assert_eq!(scan[check]["result"][flaw], false, "{check}: {said}");
    }
    let secure = &scan["session_renegotiation"]["result"]["supports_secure_renegotiation"];
    assert_eq!(*secure, true, "{said}");
    // Mozilla's word on everything but the certificate, which a test's own authority signed.
    let complaints: Vec<&str> = said
        .lines()
        .skip_while(|line| !line.contains("COMPLIANCE"))
        .filter(|line| line.trim_start().starts_with('*'))
        .filter(|line| !line.contains("certificate") && !line.contains("maximum_certificate"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}: {said}");
}
