//! HTTP/2 to the client: the lean lane against pingora's own server, and what only a connection
//! with many streams can show.

use std::{
    collections::BTreeSet,
    future::poll_fn,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, client::SendRequest};
use http::{HeaderMap, Request, Response};

use crate::{
    lanes::{self, Message},
    local::{Local, PATIENCE, free},
};

pub const HOST: &str = "http://shop.example";

/// What a client was answered.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    lines: BTreeSet<(String, String)>,
    body: Vec<u8>,
    trailers: BTreeSet<(String, String)>,
}

fn lines(headers: &HeaderMap) -> BTreeSet<(String, String)> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers
        .iter()
        .filter(|(name, _)| *name != "date")
        .map(|(name, value)| (name.as_str().to_owned(), text(value)))
        .collect()
}

pub fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.unwrap() })
}

/// A client with prior knowledge; the connection ends with the runtime.
pub async fn client(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    client
}

/// One request to its end. `length`: whether the body's length is announced.
async fn ask(
    client: &SendRequest<Bytes>,
    (method, path): (&str, &str),
    headers: &[(&str, &str)],
    body: &[u8],
    length: bool,
) -> Result<Answer, h2::Error> {
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{HOST}{path}"))
        .header("x-request-id", "1");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    if length {
        request = request.header("content-length", body.len());
    }
    let mut client = client.clone().ready().await?;
    let (response, mut send) = client.send_request(request.body(()).unwrap(), body.is_empty())?;
    if !body.is_empty() {
        let mut body = Bytes::copy_from_slice(body);
        while !body.is_empty() {
            send.reserve_capacity(body.len());
            let Some(room) = poll_fn(|cx| send.poll_capacity(cx)).await else {
                break;
            };
            let part = body.split_to(room?.min(body.len()));
            send.send_data(part, body.is_empty())?;
        }
    }
    whole(response.await?).await
}

async fn whole(response: Response<h2::RecvStream>) -> Result<Answer, h2::Error> {
    let (head, mut stream) = response.into_parts();
    let mut body = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data?;
        stream.flow_control().release_capacity(data.len())?;
        body.extend_from_slice(&data);
    }
    let trailers = stream.trailers().await?;
    Ok(Answer {
        status: head.status.as_u16(),
        lines: lines(&head.headers),
        body,
        trailers: trailers.as_ref().map(lines).unwrap_or_default(),
    })
}

struct Site {
    gateway: Local,
    address: SocketAddr,
    received: Arc<Mutex<Vec<Message>>>,
}

/// A gateway before the origin of `lanes`. Below `/full` are the same answers by a route that the
/// lean lane does not serve.
fn start(lane: &str) -> Site {
    let received = Arc::new(Mutex::new(Vec::new()));
    let origin = TcpListener::bind("127.0.0.1:0").unwrap();
    let origin_address = origin.local_addr().unwrap();
    let log = Arc::clone(&received);
    std::thread::spawn(move || {
        for stream in origin.incoming().flatten() {
            let log = Arc::clone(&log);
            std::thread::spawn(move || lanes::serve(stream, &log));
        }
    });
    let address = free();
    let text = format!(
        "[[listeners]]\nname = \"public\"\naddress = \"{address}\"\nhttp2 = true\n\
         [[upstreams]]\nname = \"o\"\npeers = [\"{origin_address}\"]\n\
         [[upstreams]]\nname = \"nobody\"\npeers = [\"{}\"]\n\
         [[routes]]\nname = \"lean\"\nupstream = \"o\"\npath = {{ prefix = \"/\" }}\n\
         tenant = {{ header = \"x-tenant\", default = \"public\" }}\n\
         [[routes]]\nname = \"full\"\nupstream = \"o\"\npath = {{ prefix = \"/full\" }}\n\
         rewrite = {{ prefix = \"/\" }}\n\
         [[routes]]\nname = \"down\"\nupstream = \"nobody\"\npath = {{ prefix = \"/down\" }}\n",
        free()
    );
    let gateway = Local::start_with(&format!("lane = \"{lane}\""), &text, |_| {});
    Site {
        gateway,
        address,
        received,
    }
}

type Case = (
    &'static str,
    (&'static str, &'static str),
    &'static [(&'static str, &'static str)],
    Vec<u8>,
    bool,
);

fn case(
    name: &'static str,
    line: (&'static str, &'static str),
    headers: &'static [(&'static str, &'static str)],
    body: Vec<u8>,
    length: bool,
) -> Case {
    (name, line, headers, body, length)
}

fn cases() -> Vec<Case> {
    let get = |path| ("GET", path);
    let large = vec![b'x'; 200_000];
    vec![
        case("a plain request", get("/length"), &[], vec![], false),
        case("a query", get("/length?a=b&c=%20d;e"), &[], vec![], false),
        case("chunks", get("/chunked"), &[], vec![], false),
        case("until it closes", get("/close"), &[], vec![], false),
        case("no content", get("/204"), &[], vec![], false),
        case("not modified", get("/304"), &[], vec![], false),
        case("a head", ("HEAD", "/length"), &[], vec![], false),
        case("an error", get("/500"), &[], vec![], false),
        case("a large answer", get("/large"), &[], vec![], false),
        case("early hints", get("/103"), &[], vec![], false),
        case("a body", ("POST", "/echo"), &[], b"{}".to_vec(), true),
        case("a larger body", ("POST", "/echo"), &[], large.clone(), true),
        case(
            "a body of unknown length",
            ("POST", "/echo"),
            &[],
            large,
            false,
        ),
        case("no body", ("DELETE", "/length"), &[], vec![], false),
        case(
            "forwarded before, and forged",
            get("/length"),
            &[
                ("x-forwarded-for", "192.0.2.1"),
                ("x-forwarded-for", "192.0.2.2"),
                ("x-forwarded-host", "evil"),
                ("x-forwarded-proto", "https"),
                ("x-edgemeter-variant", "mine"),
            ],
            vec![],
            false,
        ),
        case("TE", get("/length"), &[("te", "trailers")], vec![], false),
        case(
            "a tenant",
            get("/cookies"),
            &[("x-tenant", "acme")],
            vec![],
            false,
        ),
        case("a rewrite", get("/full/length"), &[], vec![], false),
        case(
            "a deadline",
            get("/length"),
            &[("x-edgemeter-timeout-ms", "50000")],
            vec![],
            false,
        ),
        case("a dead upstream", get("/down"), &[], vec![], false),
    ]
}

#[test]
fn both_lanes_say_the_same_to_both_sides_of_http2() {
    let (lean, full) = (start("auto"), start("full"));
    for (name, line, headers, body, length) in cases() {
        let [one, other] = [&lean, &full].map(|site| {
            let asked = run(async {
                let client = client(site.address).await;
                ask(&client, line, headers, &body, length).await
            });
            let mut received = std::mem::take(&mut *site.received.lock().unwrap());
            for message in &mut received {
                // What is left of the wait differs by what has passed.
                message
                    .lines
                    .retain(|(name, _)| name != "x-edgemeter-timeout-ms");
            }
            (asked.unwrap_or_else(|e| panic!("{name}: {e}")), received)
        });
        if name == "a dead upstream" {
            assert_eq!((one.0.status, other.0.status), (502, 502));
            continue;
        }
        assert_eq!(one.0, other.0, "{name}: what the client was answered");
        assert_eq!(one.1, other.1, "{name}: what the origin was sent");
    }
}

#[test]
fn what_http2_has_and_http1_has_not_comes_through() {
    let site = start("auto");
    run(async {
        let client = client(site.address).await;
        for path in ["/trailers", "/full/trailers"] {
            let answer = ask(&client, ("GET", path), &[], &[], false).await.unwrap();
            assert_eq!(answer.body, b"Wiki", "{path}");
        }
        // pingora does not read an HTTP/1.1 upstream's trailers.
        let answer = ask(&client, ("GET", "/trailers"), &[], &[], false).await;
        let trailer = ("x-sum".to_owned(), "9".to_owned());
        assert!(answer.unwrap().trailers.contains(&trailer));
        let crumbs = [("cookie", "a=1"), ("cookie", "b=2")];
        for path in ["/length", "/full/length"] {
            site.received.lock().unwrap().clear();
            ask(&client, ("GET", path), &crumbs, &[], false)
                .await
                .unwrap();
            let received = site.received.lock().unwrap();
            let cookie = ("cookie".to_owned(), "a=1; b=2".to_owned());
            assert!(received[0].lines.contains(&cookie), "{path}: {received:?}");
        }
        for path in ["/103", "/full/103"] {
            let request = Request::get(format!("{HOST}{path}")).body(()).unwrap();
            let mut client = client.clone().ready().await.unwrap();
            let (mut response, _) = client.send_request(request, true).unwrap();
            let early = poll_fn(|cx| response.poll_informational(cx)).await;
            let early = early.unwrap().unwrap();
            assert_eq!(early.status(), 103, "{path}");
            assert_eq!(early.headers()["link"], "</a.css>; rel=preload");
            assert_eq!(response.await.unwrap().status(), 200, "{path}");
        }
    });
}

#[test]
fn streams_of_both_lanes_share_a_connection() {
    let site = start("auto");
    run(async {
        let client = client(site.address).await;
        // From then on the client knows how many streams it may open.
        let first = ask(&client, ("GET", "/length"), &[], &[], false).await;
        assert_eq!(first.unwrap().status, 200);
        let mut asked = tokio::task::JoinSet::new();
        for number in 0..120_u32 {
            let client = client.clone();
            asked.spawn(async move {
                let path = ["/length", "/full/chunked", "/echo", "/large"][number as usize % 4];
                let tenant = format!("t{}", number % 7);
                let body = vec![b'b'; number as usize * usize::from(path == "/echo")];
                let method = if body.is_empty() { "GET" } else { "POST" };
                let headers = [("x-tenant", tenant.as_str())];
                let line = (method, path);
                let answer = ask(&client, line, &headers, &body, true).await.unwrap();
                assert_eq!(answer.status, 200, "{path}");
                let bytes = match path {
                    "/length" => 5,
                    "/full/chunked" => 9,
                    "/large" => 3_000_000,
                    _ => body.len(),
                };
                assert_eq!(answer.body.len(), bytes, "{path}");
            });
        }
        while let Some(done) = asked.join_next().await {
            done.unwrap();
        }
    });
    let logged = || site.gateway.access_log().lines().count();
    site.gateway
        .until("121 lines in the access log", || logged() == 121);
}

/// Answers with an endless body; counts what it could write.
fn endless() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            std::thread::spawn(move || {
                let mut space = [0; 4096];
                if !matches!(stream.read(&mut space), Ok(1..)) {
                    return;
                }
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
                while let Ok(sent) = stream.write(&[b'e'; 65_536]) {
                    count.fetch_add(sent, Ordering::SeqCst);
                }
            });
        }
    });
    (address, written)
}

#[test]
fn a_client_that_reads_nothing_holds_the_upstream_back_and_one_that_leaves_is_accounted() {
    let (origin, written) = endless();
    let address = free();
    let text = format!(
        "[[listeners]]\nname = \"public\"\naddress = \"{address}\"\nhttp2 = true\n\
         [[upstreams]]\nname = \"o\"\npeers = [\"{origin}\"]\n\
         [[routes]]\nname = \"lean\"\nupstream = \"o\"\npath = {{ prefix = \"/\" }}\n"
    );
    let gateway = Local::start(&text, |_| {});
    let before = gateway.resident();
    run(async {
        let mut client = client(address).await.ready().await.unwrap();
        let request = Request::get(format!("{HOST}/endless")).body(()).unwrap();
        let (response, mut send) = client.send_request(request, true).unwrap();
        let body = response.await.unwrap().into_body();
        // The window and the sockets fill, and then nothing moves any more.
        let mut seen = usize::MAX;
        while seen != written.load(Ordering::SeqCst) {
            seen = written.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert!(seen < 32 << 20, "{seen} bytes for a client that reads none");
        assert!(gateway.resident().saturating_sub(before) < 32 << 20);
        send.send_reset(Reason::CANCEL);
        drop(body);
        while gateway.access_log().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let logged = gateway.access_log();
    assert_eq!(logged.lines().count(), 1, "{logged}");
    assert!(logged.contains("\"status\":200"), "{logged}");
    assert!(logged.contains("client: "), "{logged}");
}

#[test]
fn a_stopping_gateway_says_goaway_and_finishes_what_it_began() {
    let (origin, _) = endless();
    let address = free();
    let text = format!(
        "[[listeners]]\nname = \"public\"\naddress = \"{address}\"\nhttp2 = true\n\
         [[upstreams]]\nname = \"o\"\npeers = [\"{origin}\"]\n\
         [[routes]]\nname = \"lean\"\nupstream = \"o\"\npath = {{ prefix = \"/\" }}\n"
    );
    let gateway = Local::start_with("grace_seconds = 30", &text, |_| {});
    run(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut client = client.ready().await.unwrap();
        let request = Request::get(format!("{HOST}/endless")).body(()).unwrap();
        let (response, send) = client.send_request(request, true).unwrap();
        let mut body = response.await.unwrap().into_body();
        gateway.terminate();
        // No new streams, and the one under way goes on.
        while client.clone().ready().await.is_ok() {
            let data = body.data().await.unwrap().unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        let data = body.data().await.unwrap().unwrap();
        assert!(!data.is_empty());
        drop((body, send, client));
        let _ = connection.await;
    });
}

#[test]
fn malformed_requests_cost_their_stream_and_too_many_the_connection() {
    let site = start("auto");
    run(async {
        let client = client(site.address).await;
        let other = ask(
            &client,
            ("GET", "/length"),
            &[("host", "b.example")],
            &[],
            false,
        )
        .await;
        assert_eq!(other.unwrap().status, 400);
        let fine = ask(&client, ("GET", "/length"), &[], &[], false).await;
        assert_eq!(fine.unwrap().status, 200);
        let mut refused = 0;
        let ended = loop {
            match ask(
                &client,
                ("GET", "/length"),
                &[("host", "b.example")],
                &[],
                false,
            )
            .await
            {
                Ok(answer) => assert_eq!(answer.status, 400),
                Err(error) => break error,
            }
            refused += 1;
            assert!(refused < 64, "all of them were answered");
        };
        assert_eq!(ended.reason(), Some(Reason::ENHANCE_YOUR_CALM), "{ended}");
    });
}
