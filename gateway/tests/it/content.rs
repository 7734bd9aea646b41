//! Caching, compression and hints, from `examples/content.toml`.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::local::{Local, connect, example, free, get, read_response};

/// Answers by path and counts; can be down.
struct Origin {
    address: SocketAddr,
    hits: Arc<AtomicUsize>,
    down: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Origin {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let origin = Self {
            address: listener.local_addr().unwrap(),
            hits: Arc::default(),
            down: Arc::default(),
            seen: Arc::default(),
        };
        let (hits, down) = (Arc::clone(&origin.hits), Arc::clone(&origin.down));
        let seen = Arc::clone(&origin.seen);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (hits, down, seen) = (Arc::clone(&hits), Arc::clone(&down), Arc::clone(&seen));
                std::thread::spawn(move || serve(stream, &hits, &down, &seen));
            }
        });
        origin
    }

    fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

fn serve(mut stream: TcpStream, hits: &AtomicUsize, down: &AtomicBool, seen: &Mutex<Vec<String>>) {
    loop {
        let mut head = String::new();
        let mut byte = [0];
        while !head.ends_with("\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(char::from(byte[0])),
                _ => return,
            }
        }
        let number = hits.fetch_add(1, Ordering::SeqCst);
        let lower = head.to_ascii_lowercase();
        seen.lock().unwrap().push(lower.clone());
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let (path, _) = path.split_once('?').unwrap_or((&path, ""));
        if down.load(Ordering::SeqCst) {
            let _ = stream.write_all(b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n");
            continue;
        }
        let control = match path {
            "/fresh" | "/cached.css" | "/auth" => "Cache-Control: max-age=100\r\n",
            "/slow" => {
                std::thread::sleep(Duration::from_millis(300));
                "Cache-Control: max-age=100\r\n"
            }
            "/public" => "Cache-Control: public, max-age=100\r\n",
            "/private" => "Cache-Control: private, max-age=100\r\n",
            "/store" => "Cache-Control: no-store\r\n",
            "/cookie" => "Cache-Control: max-age=100\r\nSet-Cookie: a=b\r\n",
            "/shared" => "Cache-Control: max-age=0, s-maxage=100\r\n",
            "/vary" => "Cache-Control: max-age=100\r\nVary: Accept-Language\r\n",
            "/star" => "Cache-Control: max-age=100\r\nVary: *\r\n",
            "/old" => "Cache-Control: max-age=100\r\nAge: 99\r\n",
            "/tag" => "Cache-Control: no-cache\r\nETag: \"v1\"\r\n",
            "/swr" => "Cache-Control: max-age=1, stale-while-revalidate=100\r\n",
            "/text" => "Cache-Control: max-age=100\r\nETag: \"strong\"\r\n",
            _ => "",
        };
        let kind = match path {
            "/page" => "text/html",
            "/picture.png" => "image/png",
            _ => "text/plain",
        };
        if path == "/tag" && lower.contains("if-none-match: \"v1\"") {
            let answer = format!("HTTP/1.1 304 Not Modified\r\n{control}\r\n");
            let _ = stream.write_all(answer.as_bytes());
            continue;
        }
        let body = match path {
            "/text" | "/picture.png" => "words and words ".repeat(200),
            _ => format!("{path} {number}"),
        };
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{control}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

struct Site {
    gateway: Local,
    origin: Origin,
    address: SocketAddr,
}

fn start() -> Site {
    let origin = Origin::start();
    let address = free();
    let text = example(
        "content.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &origin.address.to_string()),
        ],
    );
    Site {
        gateway: Local::start(&text, |_| {}),
        origin,
        address,
    }
}

impl Site {
    /// How many of two requests reach the service.
    fn fetched(&self, path: &str, first: &str, second: &str) -> usize {
        let before = self.origin.hits();
        for headers in [first, second] {
            assert_eq!(get(self.address, path, headers).0, 200, "{path}");
        }
        self.origin.hits() - before
    }
}

#[test]
fn what_may_be_stored_is_and_nothing_else() {
    let site = start();
    let de = "Accept-Language: de\r\n";
    let en = "Accept-Language: en\r\n";
    let ann = "Authorization: Basic YW5u\r\n";
    for (path, first, second, fetched) in [
        ("/fresh", "", "", 1),
        ("/fresh?a", "", "", 1),
        ("/shared", "", "", 1),
        ("/private", "", "", 2),
        ("/store", "", "", 2),
        ("/cookie", "", "", 2),
        ("/star", "", "", 2),
        ("/nothing", "", "", 2),
        ("/vary", de, en, 2),
        ("/vary", de, en, 0),
        ("/auth", ann, ann, 2),
        ("/public", ann, ann, 1),
        ("/pictures/a", "", "", 1),
        ("/fresh", "Cache-Control: no-cache\r\n", "", 1),
        ("/fresh", "Cache-Control: no-store\r\n", "", 1),
        ("/fresh", "X-Tenant: other\r\n", "", 1),
    ] {
        assert_eq!(
            site.fetched(path, first, second),
            fetched,
            "{path} {first:?} {second:?}"
        );
    }
    let (_, head, _) = get(site.address, "/fresh", "");
    assert!(
        head.contains("age: ") && head.contains("cache-status: edgemeter; hit"),
        "{head}"
    );
    let (status, head, body) = get(site.address, "/fresh", "Range: bytes=1-3\r\n");
    assert_eq!((status, body.as_str()), (206, "fre"), "{head}");
    // A year-old response in another cache has a second left, then it is fetched again.
    get(site.address, "/old", "");
    let before = site.origin.hits();
    site.gateway.until("the end of its freshness", || {
        get(site.address, "/old", "");
        site.origin.hits() > before
    });
    // Revalidated: asked, but not sent again.
    let (_, _, first) = get(site.address, "/tag", "");
    let (_, head, second) = get(site.address, "/tag", "");
    assert_eq!(first, second);
    assert!(head.contains("revalidated"), "{head}");
    assert_eq!(
        get(site.address, "/tag", "If-None-Match: \"v1\"\r\n").0,
        304
    );
    let saved = site
        .gateway
        .count("edgemeter_cache_saved_bytes_total", "route", "catalogue");
    assert!(saved > 0);
    assert!(
        site.gateway
            .count("edgemeter_cache_requests_total", "result", "revalidated")
            >= 1
    );
}

#[test]
fn many_ask_and_one_fetches() {
    let site = start();
    let bodies: Vec<String> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| get(site.address, "/slow", "").2))
            .collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    assert_eq!(site.origin.hits(), 1);
}

#[test]
fn stale_is_served_while_it_is_fetched() {
    let site = start();
    let (_, _, first) = get(site.address, "/swr", "");
    let mut stale = 0;
    site.gateway.until("a fresh one", || {
        let (status, head, body) = get(site.address, "/swr", "");
        assert_eq!(status, 200);
        stale += usize::from(head.contains("detail=stale"));
        body != first
    });
    let counted = site
        .gateway
        .count("edgemeter_cache_requests_total", "result", "stale");
    assert!(counted >= 1, "{counted}");
    site.origin.down.store(true, Ordering::SeqCst);
    assert_eq!(
        get(site.address, "/fresh", "").0,
        503,
        "what is not stored cannot be served"
    );
}

#[test]
fn stale_is_served_when_the_service_is_down_or_gone() {
    let origin = Origin::start();
    let address = free();
    let text = example(
        "content.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &origin.address.to_string()),
            ("default_seconds = 60", "default_seconds = 1"),
        ],
    );
    let gateway = Local::start(&text, |_| {});
    let (_, _, stored) = get(address, "/pictures/a", "");
    origin.down.store(true, Ordering::SeqCst);
    // While it is fresh the service is not asked; then it is, and has nothing better.
    gateway.until("a stale one", || {
        let (status, head, body) = get(address, "/pictures/a", "");
        assert_eq!((status, &body), (200, &stored), "{head}");
        head.contains("stale")
    });
    assert_eq!(get(address, "/pictures/b", "").0, 503, "never stored");
    assert_eq!(get(address, "/else", "").0, 503, "another route");
    let counted = gateway.count("edgemeter_cache_requests_total", "result", "stale");
    assert!(counted >= 1, "{counted}");
    // The service is back: what it says now is what clients get.
    origin.down.store(false, Ordering::SeqCst);
    gateway.until("a fresh one", || {
        get(address, "/pictures/a", "").2 != stored
    });
}

#[test]
fn what_the_cache_saves_is_money() {
    let origin = Origin::start();
    let address = free();
    let prices = "\n[prices]\ncurrency = \"USD\"\n[[prices.rates]]\nid = \"from-service\"\nleg = \"upstream\"\n\
                  direction = \"rx\"\nprice = \"2\"\nunit_bytes = 1000\n";
    let text = example(
        "content.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &origin.address.to_string()),
        ],
    ) + prices;
    let gateway = Local::start(&text, |_| {});
    for _ in 0..5 {
        assert_eq!(get(address, "/text", "").0, 200);
    }
    assert_eq!(origin.hits(), 1);
    let bytes = 4 * 200 * i128::try_from("words and words ".len()).unwrap();
    let of = |metric| gateway.count(metric, "route", "catalogue");
    gateway.until("the counts", || {
        of("edgemeter_cache_saved_bytes_total") == bytes
    });
    // 2 USD a thousand bytes are 2,000,000 nanos a byte.
    assert_eq!(of("edgemeter_cache_saved_nanos"), bytes * 2_000_000);
}

#[test]
fn a_change_or_an_operator_empties_it() {
    let site = start();
    assert_eq!(site.fetched("/fresh", "", ""), 1);
    let mut stream = connect(site.address);
    stream
        .write_all(b"DELETE /fresh HTTP/1.1\r\nHost: shop.example\r\n\r\n")
        .unwrap();
    assert_eq!(read_response(&mut stream).0, 200);
    assert_eq!(site.fetched("/fresh", "", ""), 1, "RFC 9111 4.4");
    let answer = site.gateway.purge("url_prefix=http://shop.example/fre");
    assert!(answer.ends_with("{\"purged\":1}\n"), "{answer}");
    assert_eq!(site.fetched("/fresh", "", ""), 1);
    assert!(site.gateway.purge("nonsense=1").contains(" 400 "));
    let stored = site
        .gateway
        .count("edgemeter_cache_objects", "tier", "memory");
    assert!(
        site.gateway
            .purge("all=true")
            .contains(&format!("\"purged\":{stored}"))
    );
    assert_eq!(
        site.gateway
            .count("edgemeter_cache_objects", "tier", "disk"),
        0
    );
}

#[test]
fn responses_are_compressed_where_it_is_worth_it() {
    let site = start();
    let plain = "words and words ".repeat(200);
    let ask = |path: &str, accepted: &str| {
        let mut stream = connect(site.address);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nAccept-Encoding: {accepted}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        let end = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8_lossy(&all[..end]).to_ascii_lowercase();
        (head, all.len() - end)
    };
    for (accepted, coding) in [
        ("gzip", "gzip"),
        ("br", "br"),
        ("zstd", "zstd"),
        ("gzip;q=0, br", "br"),
        ("gzip;q=0.1, zstd;q=0.9", "zstd"),
    ] {
        let (head, length) = ask("/text", accepted);
        assert!(
            head.contains(&format!("content-encoding: {coding}")),
            "{accepted}: {head}"
        );
        assert!(head.contains("vary: accept-encoding"), "{head}");
        assert!(head.contains("etag: w/\"strong\""), "{head}");
        assert!(length < plain.len() / 4, "{length}");
    }
    for (path, accepted) in [
        ("/text", "identity"),
        ("/text", "gzip;q=0"),
        ("/fresh", "gzip"),
        ("/picture.png", "gzip"),
    ] {
        let (head, _) = ask(path, accepted);
        assert!(
            !head.contains("content-encoding"),
            "{path} {accepted}: {head}"
        );
    }
    // The service was asked once for what five clients got in four codings.
    let seen = site.origin.seen.lock().unwrap();
    assert_eq!(
        seen.iter()
            .filter(|head| head.starts_with("get /text "))
            .count(),
        1
    );
    drop(seen);
    let saved = site.gateway.count(
        "edgemeter_compression_saved_bytes_total",
        "route",
        "catalogue",
    );
    assert!(saved > 5 * 2000, "{saved}");
}

#[test]
fn pages_are_hinted_by_worth_and_by_what_is_stored() {
    let site = start();
    let links = |headers: &str| {
        let (_, head, _) = get(site.address, "/page", headers);
        let links = head.lines().filter(|line| line.starts_with("link: "));
        links
            .map(|line| line.split(['<', '>']).nth(1).unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(links(""), ["/app.css"]);
    assert_eq!(links("X-User-Value: 99\r\n"), ["/app.css"]);
    assert_eq!(links("X-User-Value: 100\r\n"), ["/app.css", "/big.js"]);
    get(site.address, "/cached.css", "");
    assert_eq!(links(""), ["/app.css", "/cached.css"]);
    assert!(
        !get(site.address, "/fresh", "").1.contains("link: "),
        "only pages"
    );
    assert_eq!(
        site.gateway
            .count("edgemeter_hints_total", "route", "catalogue"),
        6
    );
}
