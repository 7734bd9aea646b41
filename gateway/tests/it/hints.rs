//! 103 Early Hints: to whom, when, and what a real browser makes of them.

use std::{
    collections::BTreeSet,
    future::poll_fn,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use xtask::browser::Browser;

use crate::{
    http2::{HOST, client, run},
    local::{Local, example, free},
};

/// How long the origin waits with the browser's page for what the page needs to be asked for.
const PATIENCE: Duration = Duration::from_secs(20);

const PAGE: &str = "<!doctype html><link rel=stylesheet href=/app.css><p id=a>hinted</p>";

/// Header lines of a request.
type Lines<'l> = &'l [(&'l str, &'l str)];

/// Pages and what they need.
fn origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let styled = Arc::new(AtomicBool::new(false));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let styled = Arc::clone(&styled);
            std::thread::spawn(move || serve(stream, &styled));
        }
    });
    address
}

fn serve(mut stream: TcpStream, styled: &AtomicBool) {
    loop {
        let mut head = String::new();
        let mut byte = [0];
        while !head.ends_with("\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(char::from(byte[0])),
                _ => return,
            }
        }
        let path = head.split(' ').nth(1).unwrap();
        let (lines, body) = match path {
            "/stored" => (
                "Content-Type: text/html\r\nCache-Control: max-age=100\r\n",
                "<p>stored",
            ),
            "/learned" => (
                "Content-Type: text/html\r\nLink: </own.css>; rel=preload; as=style, </next>; rel=next\r\n",
                "<p>learned",
            ),
            "/browser" => {
                let started = Instant::now();
                while !styled.load(Ordering::SeqCst) && started.elapsed() < PATIENCE {
                    std::thread::sleep(Duration::from_millis(5));
                }
                let hinted = styled.load(Ordering::SeqCst);
                let page = if hinted { PAGE } else { "<p id=a>not hinted" };
                ("Content-Type: text/html\r\n", page)
            }
            "/app.css" => {
                styled.store(true, Ordering::SeqCst);
                (
                    "Content-Type: text/css\r\nCache-Control: max-age=100\r\n",
                    "#a { color: rgb(1, 2, 3) }",
                )
            }
            _ => ("Content-Type: text/html\r\n", "<p>a page"),
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\n{lines}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn start() -> (Local, SocketAddr) {
    let address = free();
    let text = example(
        "content.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &origin().to_string()),
        ],
    );
    (Local::start(&text, |_| {}), address)
}

/// The paths that 103s named before the answer, which must be 200.
async fn early(
    client: &SendRequest<Bytes>,
    path: &str,
    headers: &[(&str, &str)],
) -> BTreeSet<String> {
    let mut request = Request::get(format!("{HOST}{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut client = client.clone().ready().await.unwrap();
    let (mut response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let mut named = BTreeSet::new();
    while let Some(early) = poll_fn(|cx| response.poll_informational(cx)).await {
        let early = early.unwrap();
        assert_eq!(early.status(), 103);
        for link in early.headers().get_all("link") {
            let link = link.to_str().unwrap();
            named.insert(link.split(['<', '>']).nth(1).unwrap().to_owned());
        }
        assert!(!early.headers().contains_key("set-cookie"));
    }
    assert_eq!(response.await.unwrap().status(), 200, "{path}");
    named
}

#[test]
fn hints_come_early_to_those_worth_it_and_never_with_what_is_stored() {
    let (gateway, address) = start();
    let worth = ("x-user-value", "10");
    let navigates = ("sec-fetch-mode", "navigate");
    run(async {
        let client = client(address).await;
        let named = |paths: &[&str]| paths.iter().map(|&p| p.to_owned()).collect::<BTreeSet<_>>();
        let nobody = named(&[]);
        let cases: [(&str, Lines<'_>, &[&str]); 10] = [
            ("/page", &[worth, navigates], &["/app.css"]),
            ("/page", &[worth], &[]),
            ("/page", &[worth, ("sec-fetch-mode", "cors")], &[]),
            ("/page", &[navigates, ("x-user-value", "9")], &[]),
            ("/page", &[navigates], &[]),
            // Asked of the origin once, and then stored.
            ("/stored", &[worth, navigates], &["/app.css"]),
            ("/stored", &[worth, navigates], &[]),
            ("/stored", &[worth, navigates], &[]),
            // What the page said itself is known from the second time on.
            ("/learned", &[worth, navigates], &["/app.css"]),
            ("/learned", &[worth, navigates], &["/app.css", "/own.css"]),
        ];
        for (path, headers, expected) in cases {
            assert_eq!(
                early(&client, path, headers).await,
                named(expected),
                "{path} {headers:?}"
            );
        }
        let other = [worth, navigates, ("x-tenant", "other")];
        assert_eq!(
            early(&client, "/learned", &other).await,
            named(&["/app.css"])
        );
        assert_ne!(
            early(&client, "/learned", &[worth, navigates]).await,
            nobody
        );
    });
    let sent = |source: &str| {
        gateway
            .scrape()
            .sum("edgemeter_early_hints_total", |sample| {
                sample.label("route") == "catalogue" && sample.label("source") == source
            })
    };
    assert_eq!((sent("gateway"), sent("upstream")), (6, 0));
}

#[test]
fn chromium_takes_the_hints_and_renders_the_page() {
    let address = free();
    let text = example(
        "content.toml",
        &[
            (
                "address = \"0.0.0.0:8080\"\nhttp2 = true\n",
                &format!(
                    "address = \"{address}\"\nhttp2 = true\n\
                     tls = {{ certificate = \"cert.pem\", key = \"key.pem\" }}\n"
                ),
            ),
            ("127.0.0.1:9000", &origin().to_string()),
            ("min_value = 10\n", ""),
        ],
    );
    let mut trusted = String::new();
    let gateway = Local::start(&text, |folder| {
        let certificate = xtask::certificate::write(folder, &[address.ip()]).unwrap();
        trusted = certificate.key_sha256;
    });
    let mut browser = Browser::start(&[
        &format!("--ignore-certificate-errors-spki-list={trusted}"),
        &format!("--host-resolver-rules=MAP shop.example {address}"),
    ])
    .unwrap();
    let page = browser.open().unwrap();
    let nothing = serde_json::json!({});
    browser.command(&page, "Network.enable", nothing).unwrap();
    browser
        .go_to(&page, "https://shop.example/browser")
        .unwrap();
    let hints = browser
        .event(&page, "Network.responseReceivedEarlyHints")
        .unwrap();
    let headers = hints["params"]["headers"].to_string();
    assert!(headers.contains("/app.css"), "{headers}");
    let mut value = |script: &str| browser.evaluate(&page, script).unwrap();
    let colour = value("getComputedStyle(document.getElementById('a')).color");
    assert_eq!(colour, "rgb(1, 2, 3)");
    let style =
        value("performance.getEntriesByName('https://shop.example/app.css')[0].initiatorType");
    assert_eq!(style, "early-hints");
    // The origin answers the page once it has been asked for the style sheet.
    assert_eq!(value("document.getElementById('a').innerText"), "hinted");
    assert_eq!(
        gateway.count("edgemeter_early_hints_total", "source", "gateway"),
        1
    );
}
