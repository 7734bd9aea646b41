//! gRPC, WebSocket, TLS and the PROXY protocol to upstreams, from `examples/transport.toml`.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, Request, Response};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned, crypto::ring,
    pki_types::PrivateKeyDer, server::WebPkiClientVerifier,
};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::local::{Local, example, free, get};

struct Site {
    gateway: Local,
    address: SocketAddr,
}

/// `upstreams`: grpc, chat, vault, legacy.
fn start(upstreams: [SocketAddr; 4], files: impl FnOnce(&Path)) -> Site {
    start_with(&[], upstreams, files)
}

fn start_with(
    changes: &[(&str, &str)],
    upstreams: [SocketAddr; 4],
    files: impl FnOnce(&Path),
) -> Site {
    let address = free();
    let addresses = upstreams.map(|upstream| upstream.to_string());
    let listener = address.to_string();
    let mut replace = changes.to_vec();
    replace.extend([
        ("0.0.0.0:8080", listener.as_str()),
        ("127.0.0.1:9001", &addresses[0]),
        ("127.0.0.1:9002", &addresses[1]),
        ("127.0.0.1:9003", &addresses[2]),
        ("127.0.0.1:9004", &addresses[3]),
    ]);
    let text = example("transport.toml", &replace);
    let ca = authority();
    let gateway = Local::start(&text, |directory| {
        std::fs::write(directory.join("internal-ca.pem"), ca.pem()).unwrap();
        let (certificate, key) = issue(&ca, "gateway.internal");
        std::fs::write(directory.join("gateway.pem"), certificate.pem()).unwrap();
        std::fs::write(directory.join("gateway-key.pem"), key.serialize_pem()).unwrap();
        files(directory);
    });
    Site { gateway, address }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn issue(ca: &CertifiedIssuer<'static, KeyPair>, name: &str) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    (params.signed_by(&key, ca).unwrap(), key)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Echoes each message as it comes and ends with `grpc-status` in trailers.
async fn grpc_server(listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let head = Response::builder().header("content-type", "application/grpc");
                    let mut send = respond
                        .send_response(head.body(()).unwrap(), false)
                        .unwrap();
                    let mut body = request.into_body();
                    let mut bytes = 0;
                    while let Some(Ok(data)) = body.data().await {
                        let _ = body.flow_control().release_capacity(data.len());
                        bytes += data.len();
                        send.send_data(data, false).unwrap();
                    }
                    let sent = body.trailers().await.unwrap();
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    trailers.insert("grpc-message", format!("{bytes} bytes").parse().unwrap());
                    if let Some(checksum) = sent.as_ref().and_then(|t| t.get("x-checksum")) {
                        trailers.insert("x-checksum", checksum.clone());
                    }
                    send.send_trailers(trailers).unwrap();
                });
            }
        });
    }
}

#[test]
fn grpc_streams_both_ways_and_ends_in_trailers() {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let grpc = listener.local_addr().unwrap();
    runtime.spawn(grpc_server(listener));
    let site = start([grpc, free(), free(), free()], |_| {});
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(site.address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let mut calls = Vec::new();
        for call in 0..10_u8 {
            let mut client = client.clone().ready().await.unwrap();
            calls.push(tokio::spawn(async move {
                let request = Request::post("http://shop.example/shop.Orders/Watch")
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(())
                    .unwrap();
                let (response, mut send) = client.send_request(request, false).unwrap();
                send.send_data(Bytes::from(vec![call; 5]), false).unwrap();
                // The answer begins while the request is under way.
                let response = response.await.unwrap();
                assert_eq!(response.status(), 200);
                let mut body = response.into_body();
                let mut got = Vec::new();
                for round in 0..20_u8 {
                    while got.len() < 5 * (usize::from(round) + 1) {
                        let data = body.data().await.unwrap().unwrap();
                        body.flow_control().release_capacity(data.len()).unwrap();
                        got.extend_from_slice(&data);
                    }
                    if round < 19 {
                        send.send_data(Bytes::from(vec![call; 5]), false).unwrap();
                    }
                }
                let mut trailers = HeaderMap::new();
                trailers.insert("x-checksum", call.to_string().parse().unwrap());
                send.send_trailers(trailers).unwrap();
                assert!(body.data().await.is_none());
                let trailers = body.trailers().await.unwrap().expect("trailers");
                assert_eq!(trailers["grpc-status"], "0");
                assert_eq!(trailers["grpc-message"], "100 bytes");
                assert_eq!(got, vec![call; 100]);
            }));
        }
        for call in calls {
            call.await.unwrap();
        }
    });
}

/// Greets at once, then echoes; says goodbye with the code it is told.
async fn chat_server(listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
                return;
            };
            // With the 101, before the client can have said anything.
            socket.send(Message::text("hello")).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                match message {
                    Message::Text(text) if text.starts_with("close ") => {
                        let code: u16 = text.as_str()[6..].parse().unwrap();
                        let frame = CloseFrame {
                            code: CloseCode::from(code),
                            reason: "asked to".into(),
                        };
                        let _ = socket.close(Some(frame)).await;
                    }
                    Message::Text(_) | Message::Binary(_) => socket.send(message).await.unwrap(),
                    _ => {}
                }
            }
        });
    }
}

#[test]
fn websockets_carry_every_kind_of_message_and_close_as_they_are_closed() {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let chat = listener.local_addr().unwrap();
    runtime.spawn(chat_server(listener));
    let site = start([free(), chat, free(), free()], |_| {});
    let url = format!("ws://{}/chat", site.address);
    runtime.block_on(async {
        // Often: the greeting races the 101 through two proxies' buffers.
        for _ in 0..100 {
            let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
            let greeting = socket.next().await.unwrap().unwrap();
            assert_eq!(greeting, Message::text("hello"));
            socket.send(Message::text("x")).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("x"));
        }
        let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
        socket.next().await.unwrap().unwrap();
        for size in [0, 1, 125, 126, 65_535, 65_536, 1 << 20, 4 << 20] {
            let binary = Message::binary(vec![7; size]);
            socket.send(binary.clone()).await.unwrap();
            assert!(
                socket.next().await.unwrap().unwrap() == binary,
                "{size} bytes"
            );
            let text = Message::text("ü".repeat(size / 2));
            socket.send(text.clone()).await.unwrap();
            assert!(
                socket.next().await.unwrap().unwrap() == text,
                "{size} bytes of text"
            );
        }
        socket
            .send(Message::Ping(Bytes::from_static(b"are you there")))
            .await
            .unwrap();
        let pong = socket.next().await.unwrap().unwrap();
        assert_eq!(pong, Message::Pong(Bytes::from_static(b"are you there")));
        // Many at once, in order.
        for n in 0..1000 {
            socket.feed(Message::text(n.to_string())).await.unwrap();
        }
        socket.flush().await.unwrap();
        for n in 0..1000 {
            assert_eq!(
                socket.next().await.unwrap().unwrap(),
                Message::text(n.to_string())
            );
        }
        for code in [1000, 1001, 1008, 1011, 3000, 4999] {
            let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
            socket.next().await.unwrap().unwrap();
            socket
                .send(Message::text(format!("close {code}")))
                .await
                .unwrap();
            let Some(Ok(Message::Close(Some(frame)))) = socket.next().await else {
                panic!("no close frame for {code}");
            };
            assert_eq!(
                (u16::from(frame.code), frame.reason.as_str()),
                (code, "asked to")
            );
            assert!(
                !matches!(socket.next().await, Some(Ok(_))),
                "{code}: closed"
            );
        }
    });
}

/// A frame of the client, masked with zeros.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    assert!(length < 126);
    [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
}

#[test]
fn a_websocket_message_may_come_in_fragments_and_frames_in_pieces() {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let chat = listener.local_addr().unwrap();
    runtime.spawn(chat_server(listener));
    let site = start([free(), chat, free(), free()], |_| {});
    let mut stream = crate::local::connect(site.address);
    let request = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    // Half of the first frame comes with the request, before the 101.
    let message = [
        frame(0x01, b"frag"),
        frame(0x89, b"ping"),
        frame(0x00, b"ment"),
        frame(0x80, b"ed"),
    ]
    .concat();
    let (early, late) = message.split_at(3);
    stream
        .write_all(&[request.as_bytes(), early].concat())
        .unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    for byte in late {
        stream.write_all(std::slice::from_ref(byte)).unwrap();
    }
    let expected = [
        &b"\x81\x05hello"[..],
        b"\x8a\x04ping",
        b"\x81\x0afragmented",
    ]
    .concat();
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(
        got.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );
}

/// Of a service that shows a certificate and wants one, both by this authority.
fn vault_config(ca: &CertifiedIssuer<'static, KeyPair>) -> Arc<ServerConfig> {
    let (certificate, key) = issue(ca, "vault.internal");
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    Arc::new(config)
}

#[test]
fn an_upstream_is_verified_and_sees_the_gateways_certificate_and_the_client() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let vault = listener.local_addr().unwrap();
    let legacy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let legacy_address = legacy.local_addr().unwrap();
    // The files decide whom the gateway trusts: made here, before it starts.
    let ca = authority();
    let config = vault_config(&ca);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            std::thread::spawn(move || {
                let session = ServerConnection::new(config).unwrap();
                let mut stream = StreamOwned::new(session, stream);
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read(&mut byte) {
                        Ok(1) => head.push(byte[0]),
                        _ => return,
                    }
                }
                let identity = stream.conn.peer_certificates().map_or(0, <[_]>::len);
                let body = format!("{identity} certificate");
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes());
            });
        }
    });
    std::thread::spawn(move || {
        for mut stream in legacy.incoming().flatten() {
            let mut head = String::new();
            let mut byte = [0];
            while !head.ends_with("\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                head.push(char::from(byte[0]));
            }
            let body = head.lines().next().unwrap_or_default();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let site = start([free(), free(), vault, legacy_address], |directory| {
        std::fs::write(directory.join("internal-ca.pem"), ca.pem()).unwrap();
        let (certificate, key) = issue(&ca, "gateway.internal");
        std::fs::write(directory.join("gateway.pem"), certificate.pem()).unwrap();
        std::fs::write(directory.join("gateway-key.pem"), key.serialize_pem()).unwrap();
    });
    let (status, _, body) = get(site.address, "/vault", "");
    assert_eq!((status, body.as_str()), (200, "1 certificate"));
    // Its handshake is in the histogram, under its upstream and route.
    let page = site.gateway.scrape();
    let handshakes = page.sum("edgemeter_upstream_tls_handshake_seconds_count", |sample| {
        sample.label("upstream") == "vault" && sample.label("route") == "vault"
    });
    assert_eq!(handshakes, 1);
    let (status, _, body) = get(site.address, "/legacy", "");
    assert_eq!(status, 200);
    assert!(
        body.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 "),
        "{body}"
    );
    let page = site.gateway.scrape();
    let all = page.sum("edgemeter_upstream_tls_handshake_seconds_count", |_| true);
    assert_eq!(all, 1, "no other upstream has TLS");
    // With authorities of its own (those `start` makes) the gateway does not take that certificate.
    let site = start([free(), free(), vault, legacy_address], |_| {});
    assert_eq!(get(site.address, "/vault", "").0, 502);
}

/// Reads a PROXY header of version 2, then a request, in TLS or not; answers with whom the header
/// names.
fn say_who(mut stream: std::net::TcpStream, tls: Option<Arc<ServerConfig>>) -> std::io::Result<()> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let signature = *b"\r\n\r\n\0\r\nQUIT\n";
    let expected = [&signature[..], &[0x21, 0x11, 0, 12]].concat();
    if head[..] != expected[..] {
        return Err(std::io::Error::other(
            "no PROXY header of version 2 for TCP over IPv4",
        ));
    }
    let mut addresses = [0; 12];
    stream.read_exact(&mut addresses)?;
    let [a, b, c, d, _, _, _, _, high, low, ..] = addresses;
    let client = SocketAddr::from(([a, b, c, d], u16::from_be_bytes([high, low])));
    match tls {
        None => answer_all(&mut stream, &client.to_string()),
        Some(config) => {
            let session = ServerConnection::new(config).map_err(std::io::Error::other)?;
            answer_all(&mut StreamOwned::new(session, stream), &client.to_string())
        }
    }
}

/// Every request on a connection gets the same answer.
fn answer_all(
    stream: &mut (impl std::io::Read + std::io::Write),
    body: &str,
) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        stream.flush()?;
    }
}

#[test]
fn version_2_names_each_client_in_plain_and_before_tls() {
    let ca = authority();
    let services = [None, Some(vault_config(&ca))].map(|tls| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let tls = tls.clone();
                std::thread::spawn(move || say_who(stream, tls));
            }
        });
        address
    });
    let changes = [
        ("proxy_protocol = \"v1\"", "proxy_protocol = \"v2\""),
        (
            "name = \"vault\"\npeers",
            "name = \"vault\"\nproxy_protocol = \"v2\"\npeers",
        ),
    ];
    let site = start_with(
        &changes,
        [free(), free(), services[1], services[0]],
        |directory| {
            std::fs::write(directory.join("internal-ca.pem"), ca.pem()).unwrap();
            let (certificate, key) = issue(&ca, "gateway.internal");
            std::fs::write(directory.join("gateway.pem"), certificate.pem()).unwrap();
            std::fs::write(directory.join("gateway-key.pem"), key.serialize_pem()).unwrap();
        },
    );
    for path in ["/legacy", "/vault"] {
        // Kept open side by side: no client's requests may go over another's connection.
        let mut clients: Vec<_> = (0..4)
            .map(|_| crate::local::connect(site.address))
            .collect();
        for _ in 0..3 {
            for client in &mut clients {
                write!(client, "GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n").unwrap();
                let (status, _, body) = crate::local::read_response(client);
                let itself = client.local_addr().unwrap().to_string();
                assert_eq!((status, body), (200, itself), "{path}");
            }
        }
    }
}
