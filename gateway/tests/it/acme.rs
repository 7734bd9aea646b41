//! Certificates from a real ACME server, Debian's pebble, by `examples/acme.toml`.

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use xtask::{certificate, exposition, host};

use crate::{
    echo::Echo,
    example::{Example, free_address, try_ask},
};

/// pebble, and the name server it asks: every name is this host.
struct Pebble {
    processes: Vec<Child>,
    directory: tempfile::TempDir,
    address: SocketAddr,
    management: SocketAddr,
    names: SocketAddr,
    root: CertificateDer<'static>,
}

impl Pebble {
    fn start(http_port: u16, lifetime_seconds: u32) -> Self {
        host::need(&[host::Tool::PEBBLE]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let address = free_address();
        let certificate =
            certificate::write(directory.path(), &[std::net::Ipv4Addr::LOCALHOST.into()]).unwrap();
        let mut pebble = Self {
            processes: Vec::new(),
            address,
            management: free_address(),
            names: free_address(),
            root: certificate.root,
            directory,
        };
        let mut names = Command::new("pebble-challtestsrv");
        names.args(["-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""]);
        for off in ["-http01", "-https01", "-tlsalpn01"] {
            names.args([off, ""]);
        }
        names.args(["-dns01", &pebble.names.to_string()]);
        names.args(["-management", &free_address().to_string()]);
        pebble.spawn(names);
        pebble.serve(http_port, lifetime_seconds);
        pebble
    }

    fn serve(&mut self, http_port: u16, lifetime_seconds: u32) {
        let config = serde_json::json!({ "pebble": {
            "listenAddress": self.address.to_string(),
            "managementListenAddress": self.management.to_string(),
            "certificate": self.directory.path().join("cert.pem"),
            "privateKey": self.directory.path().join("key.pem"),
            "httpPort": http_port,
            "tlsPort": 1,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": false,
            "certificateValidityPeriod": lifetime_seconds,
        }});
        let path = self.directory.path().join("pebble.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let mut server = Command::new("pebble");
        server.arg("-config").arg(&path);
        server.args(["-dnsserver", &self.names.to_string()]);
        // One nonce in four is refused, as RFC 8555 allows at any time.
        server.env("PEBBLE_WFE_NONCEREJECT", "25");
        server.env("PEBBLE_VA_NOSLEEP", "1");
        self.spawn(server);
        let started = std::time::Instant::now();
        while std::net::TcpStream::connect(self.address).is_err() {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn spawn(&mut self, mut command: Command) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.processes.push(child);
    }

    fn stop_server(&mut self) {
        let mut server = self.processes.pop().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// What issues here, for who is to trust it.
    fn issuer(&self) -> String {
        let root = self.root.clone();
        let management = self.management;
        tls_get(management, "127.0.0.1", &root, "/roots/0").unwrap()
    }
}

impl Drop for Pebble {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            eprintln!("pebble log:\n{}", self.log());
        }
    }
}

/// One request over TLS that trusts `root` and nobody else: the body.
fn tls_get(
    address: SocketAddr,
    name: &str,
    root: &CertificateDer<'static>,
    path: &str,
) -> std::io::Result<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut socket = std::net::TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    use std::io::{Read as _, Write as _};
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    // Some servers close without a word.
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => return Err(error),
        _ => {}
    }
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.to_owned())
}

fn gateway(pebble: &Pebble, plain: SocketAddr, secure: SocketAddr, origin: SocketAddr) -> Example {
    let path = host::workspace_root().join("gateway/examples/acme.toml");
    let root = pebble.directory.path().join("root.pem");
    write_pem(&root, &pebble.root);
    let text = std::fs::read_to_string(path)
        .unwrap()
        .replace("localhost:14000", &pebble.address.to_string())
        .replace("acme-root.pem", &root.display().to_string())
        .replace("127.0.0.1:8443", &secure.to_string())
        .replace("127.0.0.1:8080", &plain.to_string());
    Example::run(&text, &[origin])
}

fn write_pem(path: &Path, certificate: &CertificateDer<'_>) {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    let text = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    );
    std::fs::write(path, text).unwrap();
}

fn orders(gateway: &Example, result: &str) -> i128 {
    gateway
        .scrape()
        .sum("edgemeter_acme_orders_total", |sample| {
            sample.label("result") == result
        })
}

#[test]
fn a_certificate_is_ordered_served_and_renewed_without_a_dropped_connection() {
    let (plain, secure) = (free_address(), free_address());
    // Renewed ten seconds after it was issued.
    let pebble = Pebble::start(plain.port(), 15);
    let origin = Echo::start("origin");
    let gateway = gateway(&pebble, plain, secure, origin.address);
    gateway.wait_for("certificate", || orders(&gateway, "issued") > 0);
    let issuer = pebble.issuer();
    let issuer = CertificateDer::from_pem_slice(issuer.as_bytes()).unwrap();
    let body = tls_get(secure, "shop.example", &issuer, "/a").unwrap();
    assert!(body.contains("/a"), "{body}");
    tls_get(secure, "www.shop.example", &issuer, "/a").unwrap();

    let state = gateway.directory.path().join("state/acme");
    let mut kept: Vec<String> = Vec::new();
    for file in std::fs::read_dir(&state).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", file.path());
        kept.push(file.file_name().to_string_lossy().into_owned());
    }
    assert_eq!(kept.len(), 2, "an account and a pair: {kept:?}");
    let expiry = |gateway: &Example| {
        gateway
            .scrape()
            .sum("edgemeter_acme_certificate_expiry_seconds", |_| true)
    };
    let first = expiry(&gateway);
    // A connection that is open before the renewal, and asks again after it.
    let mut open = KeptOpen::connect(secure, "shop.example", &issuer);
    open.ask();
    gateway.wait_for("renewal", || orders(&gateway, "issued") > 1);
    gateway.wait_for("later expiry", || expiry(&gateway) > first);
    open.ask();
    tls_get(secure, "shop.example", &issuer, "/b").unwrap();

    // Everything else on the plain listener goes its way.
    let get = |path: &str| try_ask(plain, "GET", "shop.example", path, &[], "").unwrap();
    let answer = get("/.well-known/acme-challenge/none");
    assert_eq!(answer.status, 301, "{answer:?}");
    let answer = get("/");
    assert_eq!(answer.status, 301, "{answer:?}");
    assert_eq!(exposition::get(gateway.admin, "/readyz").unwrap().0, 200);
}

#[test]
fn a_name_that_cannot_be_proved_is_said_and_tried_again_until_it_can() {
    let (plain, secure) = (free_address(), free_address());
    // Nobody answers where this server looks.
    let mut pebble = Pebble::start(free_address().port(), 3600);
    let origin = Echo::start("origin");
    let gateway = gateway(&pebble, plain, secure, origin.address);
    gateway.wait_for("failed order", || orders(&gateway, "failed") > 0);
    gateway.wait_for("reason", || gateway.log().contains("no certificate from"));
    assert!(
        gateway.log().contains("shop.example"),
        "the log says for which name: {}",
        gateway.log()
    );
    // What stands in is served meanwhile, and nobody should trust it.
    let issuer = pebble.issuer();
    let issuer = CertificateDer::from_pem_slice(issuer.as_bytes()).unwrap();
    tls_get(secure, "shop.example", &issuer, "/a").unwrap_err();

    // The server forgets everything, the account as well, and looks in the right place now.
    pebble.stop_server();
    pebble.serve(plain.port(), 3600);
    gateway.wait_for("certificate", || orders(&gateway, "issued") > 0);
    let issuer = pebble.issuer();
    let issuer = CertificateDer::from_pem_slice(issuer.as_bytes()).unwrap();
    tls_get(secure, "shop.example", &issuer, "/a").unwrap();
}

/// One TLS connection with keep-alive.
struct KeptOpen {
    session: rustls::ClientConnection,
    socket: std::net::TcpStream,
}

impl KeptOpen {
    fn connect(address: SocketAddr, name: &str, root: &CertificateDer<'static>) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = std::net::TcpStream::connect(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self { session, socket }
    }

    fn ask(&mut self) {
        use std::io::{Read as _, Write as _};
        let mut stream = rustls::Stream::new(&mut self.session, &mut self.socket);
        write!(stream, "HEAD /kept HTTP/1.1\r\nhost: shop.example\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let mut piece = [0; 1024];
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
            let read = stream.read(&mut piece).unwrap();
            assert!(read > 0, "the connection was closed");
            answer.extend_from_slice(&piece[..read]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    }
}
