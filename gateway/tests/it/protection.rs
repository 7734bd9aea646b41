//! Clients that mean harm, from `examples/protection.toml`.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::local::{
    Echo, Local, connect, example, exchange, free, get, read_response, read_to_end,
};

struct Site {
    gateway: Local,
    echo: Echo,
    address: SocketAddr,
}

fn start(more: &[(&str, &str)]) -> Site {
    let echo = Echo::start();
    let address = free();
    let (to, peer) = (address.to_string(), echo.address.to_string());
    let mut replace = vec![
        ("0.0.0.0:8080", to.as_str()),
        ("127.0.0.1:9000", peer.as_str()),
    ];
    replace.extend(more);
    let text = example("protection.toml", &replace);
    let gateway = Local::start(&text, |_| {});
    Site {
        gateway,
        echo,
        address,
    }
}

impl Site {
    fn refused(&self, reason: &str) -> i128 {
        self.gateway
            .count("edgemeter_requests_refused_total", "reason", reason)
    }
}

#[test]
fn ambiguous_requests_are_refused_counted_and_never_passed_on() {
    let site = start(&[]);
    let long = "x".repeat(5000);
    let many = "A: b\r\n".repeat(60);
    let cases: &[(&str, &str, &str)] = &[
        ("GET / HTTP/1.1\nHost: a\n\n", "400", "bare_lf"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
            "400",
            "bare_cr",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
            "400",
            "control_byte",
        ),
        ("GET /a<b HTTP/1.1\r\nHost: a\r\n\r\n", "400", "uri_byte"),
        ("GET /\u{fc} HTTP/1.1\r\nHost: a\r\n\r\n", "400", "uri_byte"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
            "400",
            "obs_fold",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n",
            "400",
            "space_before_colon",
        ),
        ("GET / HTTP/1.1\r\nX: a\r\n\r\n", "400", "host_missing"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "400",
            "host_repeated",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
            "400",
            "content_length_repeated",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
            "400",
            "content_length_invalid",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
            "400",
            "length_and_encoding",
        ),
        ("GET / HTTP/3.0\r\nHost: a\r\n\r\n", "505", "version"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01", "400", "control_byte"),
    ];
    let mut expected: std::collections::BTreeMap<&str, i128> = std::collections::BTreeMap::new();
    for (request, status, reason) in cases {
        let answer = exchange(site.address, request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:?}: {answer:?}"
        );
        assert!(
            answer.to_ascii_lowercase().contains("connection: close"),
            "{answer}"
        );
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        *expected.entry(reason).or_default() += 1;
    }
    let uri = exchange(
        site.address,
        format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes(),
    );
    assert!(uri.starts_with("HTTP/1.1 414 "), "{uri}");
    let lines = format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n");
    assert!(exchange(site.address, lines.as_bytes()).starts_with("HTTP/1.1 431 "));
    for (reason, count) in expected {
        assert_eq!(site.refused(reason), count, "{reason}");
    }
    assert_eq!(
        site.echo.seen(),
        Vec::<String>::new(),
        "the service saw none of it"
    );
    site.gateway.until("the access log", || {
        site.gateway.access_log().lines().count() == cases.len() + 2
    });
    assert!(
        site.gateway
            .access_log()
            .contains("refused: length_and_encoding")
    );
    // What is well formed is served, one after the other on one connection, also pipelined.
    let mut stream = connect(site.address);
    let one =
        "POST /one HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let two = "POST /two HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc";
    let three = "GET /three HTTP/1.1\r\nHost: a\r\n\r\n";
    stream
        .write_all(format!("{one}{two}{three}\r\n{three}").as_bytes())
        .unwrap();
    for path in ["/one", "/two", "/three", "/three"] {
        let (status, _, body) = read_response(&mut stream);
        assert_eq!(status, 200);
        assert!(body.contains(path), "{body}");
    }
}

#[test]
fn a_chunked_body_that_two_parsers_could_read_differently_ends_the_connection() {
    let site = start(&[]);
    for body in [
        "5\nabcde\r\n0\r\n\r\n",
        "5;\x01\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcdeXX0\r\n\r\n",
        "0x5\r\nabcde\r\n0\r\n\r\n",
    ] {
        let request =
            format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let answer = exchange(site.address, request.as_bytes());
        assert!(!answer.contains(" 200 "), "{body:?}: {answer}");
    }
    let counted = site.refused("bare_lf") + site.refused("control_byte") + site.refused("chunk");
    assert_eq!(counted, 4);
}

#[test]
fn headers_that_never_end_and_bodies_that_drip_are_cut_off() {
    let site = start(&[]);
    // A header a byte at a time, for longer than it may take in all.
    let mut slow: Vec<TcpStream> = (0..20).map(|_| connect(site.address)).collect();
    let header = b"GET / HTTP/1.1\r\nHost: a\r\nX: ";
    for byte in header.iter().chain(std::iter::repeat_n(&b'a', 40)) {
        for stream in &mut slow {
            let _ = stream.write_all(std::slice::from_ref(byte));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    for mut stream in slow {
        let answer = read_to_end(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer:?}");
    }
    // Nothing at all: nothing is answered.
    assert_eq!(exchange(site.address, b""), "");
    assert_eq!(site.refused("header_timeout"), 21);
    let mut stream = connect(site.address);
    let body = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n";
    stream.write_all(body.as_bytes()).unwrap();
    for _ in 0..24 {
        let _ = stream.write_all(b"x");
        std::thread::sleep(Duration::from_millis(500));
    }
    read_to_end(&mut stream);
    assert_eq!(site.refused("body_too_slow"), 1);
    assert_eq!(get(site.address, "/alive", "").0, 200);
}

#[test]
fn bodies_have_a_limit_declared_or_not() {
    let site = start(&[]);
    for (path, length, status) in [
        ("/", 1000, 200),
        ("/", 1001, 413),
        ("/operations", 101, 413),
    ] {
        let inside = "X-Forwarded-For: 10.1.1.1\r\nConnection: close\r\n";
        let request =
            format!("POST {path} HTTP/1.1\r\nHost: a\r\n{inside}Content-Length: {length}\r\n\r\n");
        let request = [request.as_bytes(), &vec![b'x'; length]].concat();
        let answer = exchange(site.address, &request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path} {length}: {answer}"
        );
        let chunk = format!("{length:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(length));
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: a\r\n{inside}Transfer-Encoding: chunked\r\n\r\n{chunk}"
        );
        let answer = exchange(site.address, request.as_bytes());
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "chunked {path} {length}: {answer}"
        );
    }
    assert_eq!(
        site.gateway.count(
            "edgemeter_requests_denied_total",
            "reason",
            "body_too_large"
        ),
        4
    );
}

#[test]
fn clients_are_known_by_their_address_behind_trusted_proxies_and_may_or_may_not() {
    let site = start(&[]);
    assert_eq!(get(site.address, "/operations", "").0, 403);
    assert_eq!(
        get(site.address, "/operations", "X-Forwarded-For: 10.9.9.9\r\n").0,
        200
    );
    // The last one that no trusted proxy vouches for counts, not what the client wrote before.
    let claimed = "X-Forwarded-For: 10.9.9.9, 198.51.100.7, 10.0.0.1\r\n";
    assert_eq!(get(site.address, "/operations", claimed).0, 403);
    assert_eq!(
        site.gateway
            .count("edgemeter_requests_denied_total", "reason", "access_list"),
        2
    );
    site.gateway.until("the access log", || {
        site.gateway
            .access_log()
            .contains(r#""client":"198.51.100.7""#)
            || site.gateway.access_log().contains("198.51.100.7")
    });
}

#[test]
fn rate_limits_are_exact_and_say_so() {
    let site = start(&[(
        "requests = 1\nper_seconds = 1\n",
        "requests = 1\nper_seconds = 3600\n",
    )]);
    let ask = |client: &str| {
        get(
            site.address,
            "/search",
            &format!("X-Forwarded-For: {client}\r\n"),
        )
    };
    for left in (0..5).rev() {
        let (status, head, _) = ask("198.51.100.1");
        assert_eq!(status, 200);
        assert!(
            head.contains(&format!("ratelimit: \"each-client\";r={left};t=")),
            "{head}"
        );
        assert!(
            head.contains("ratelimit-policy: \"each-client\";q=1;w=3600"),
            "{head}"
        );
    }
    let (status, head, body) = ask("198.51.100.1");
    assert_eq!(status, 429, "{body}");
    assert!(head.contains("retry-after: 36"), "{head}");
    assert!(head.contains("application/problem+json"), "{head}");
    assert_eq!(
        ask("198.51.100.2").0,
        200,
        "another client has a limit of its own"
    );
    assert_eq!(
        site.gateway
            .count("edgemeter_requests_denied_total", "reason", "rate_limit"),
        1
    );
    // A reload that leaves the limit alone leaves its count alone.
    site.gateway.reload("headers_max = 50", "headers_max = 51");
    assert_eq!(ask("198.51.100.1").0, 429);
}

#[test]
fn connections_are_capped_and_given_back() {
    let site = start(&[(
        "connections_per_client_max = 100",
        "connections_per_client_max = 3",
    )]);
    let mut kept: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut stream = connect(site.address);
            stream
                .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                .unwrap();
            assert_eq!(read_response(&mut stream).0, 200);
            stream
        })
        .collect();
    assert_eq!(
        exchange(site.address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ""
    );
    let turned = || {
        site.gateway.count(
            "edgemeter_connections_refused_total",
            "reason",
            "full_for_client",
        )
    };
    site.gateway.until("the count", || turned() == 1);
    kept.pop();
    site.gateway.until("a place", || {
        exchange(
            site.address,
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
        .contains(" 200 ")
    });
}

#[test]
fn more_connections_than_the_inherited_limit_of_files_are_served() {
    let address = free();
    let text = example(
        "protection.toml",
        &[
            ("0.0.0.0:8080", &address.to_string()),
            ("127.0.0.1:9000", &Echo::start().address.to_string()),
            (
                "connections_per_client_max = 100",
                "connections_per_client_max = 1000",
            ),
        ],
    );
    // What a shell gives by default is 1024; this is less, so that the test need not open many.
    let launcher = ["prlimit", "--nofile=128:1500"];
    let gateway = Local::start_by(&launcher, "", &text, |_| {});
    let kept: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = connect(address);
            stream
                .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                .unwrap();
            assert_eq!(read_response(&mut stream).0, 200);
            stream
        })
        .collect();
    // The example lets more in than 1500 files are enough for, which is said.
    assert!(gateway.log().contains("at most 1500 open files"));
    drop(kept);
}

#[test]
fn a_connection_has_so_many_requests_and_no_more() {
    let site = start(&[(
        "requests_per_connection_max = 1000",
        "requests_per_connection_max = 2",
    )]);
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(3);
    let answer = exchange(site.address, request.as_bytes()).to_ascii_lowercase();
    assert_eq!(answer.matches("http/1.1 200 ok\r\n").count(), 2, "{answer}");
    assert_eq!(answer.matches("connection: close").count(), 1, "{answer}");
}

#[test]
fn a_connection_lives_so_long_and_then_says_goodbye() {
    let site = start(&[
        (
            "connection_age_max_seconds = 3600",
            "connection_age_max_seconds = 1",
        ),
        ("name = \"public\"\n", "name = \"public\"\nhttp2 = true\n"),
    ]);
    // HTTP/1.1: the answer after its time says so, and the connection closes after it.
    let mut stream = connect(site.address);
    let mut answers = 0;
    site.gateway.until("connection: close", || {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let (status, head, _) = read_response(&mut stream);
        assert_eq!(status, 200);
        answers += 1;
        head.contains("connection: close")
    });
    assert!(answers > 1, "it was told to close by its first answer");
    assert_eq!(read_to_end(&mut stream), "");
    // HTTP/2: GOAWAY.
    let mut stream = connect(site.address);
    let preface = [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        &frame(4, 0, 0, &[]),
    ]
    .concat();
    stream.write_all(&preface).unwrap();
    let kinds = std::iter::from_fn(|| {
        let mut head = [0; 9];
        std::io::Read::read_exact(&mut stream, &mut head).ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        std::io::Read::read_exact(&mut stream, &mut payload).ok()?;
        Some(head[3])
    });
    let kinds: Vec<u8> = kinds.collect();
    assert!(kinds.contains(&7), "no GOAWAY before the end: {kinds:?}");
}

/// A frame header and its payload.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `GET /` with `:authority: a`, by HPACK's static table and literals.
const HEADER_BLOCK: &[u8] = &[0x82, 0x86, 0x84, 0x01, 0x01, b'a'];

/// The frames of a round.
type Flood<'f> = &'f dyn Fn(u32) -> Vec<u8>;

#[test]
fn http2_floods_are_cut_off_with_bounded_memory() {
    let site = start(&[("name = \"public\"\n", "name = \"public\"\nhttp2 = true\n")]);
    let preface = [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        &frame(4, 0, 0, &[]),
    ]
    .concat();
    let flood = |each: &dyn Fn(u32) -> Vec<u8>| {
        let mut stream = connect(site.address);
        stream
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        stream.write_all(&preface).unwrap();
        let mut sent = 0_u32;
        for round in 0..50_000 {
            if stream.write_all(&each(round)).is_err() {
                break;
            }
            sent = round;
            if round % 50 == 0 {
                let mut space = [0; 16_384];
                match std::io::Read::read(&mut stream, &mut space) {
                    Ok(0) => break,
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                    _ => {}
                }
            }
        }
        sent
    };
    get(site.address, "/warm", "");
    let before = site.gateway.resident();
    let floods: [(&str, Flood<'_>); 7] = [
        ("rapid reset", &|n| {
            let id = 2 * n + 1;
            [
                frame(1, 5, id, HEADER_BLOCK),
                frame(3, 0, id, &8_u32.to_be_bytes()),
            ]
            .concat()
        }),
        ("settings", &|_| frame(4, 0, 0, &[0, 4, 0, 0, 0xff, 0xff])),
        ("ping", &|_| frame(6, 0, 0, &[7; 8])),
        ("window update", &|n| {
            frame(8, 0, 0, &(n % 2 + 1).to_be_bytes())
        }),
        ("continuation", &|n| match n {
            0 => frame(1, 1, 1, HEADER_BLOCK),
            _ => frame(9, 0, 1, &[0, 1, b'x', 1, b'y']),
        }),
        ("empty data", &|n| match n {
            0 => frame(1, 4, 1, &[0x83, 0x86, 0x84, 0x01, 0x01, b'a']),
            _ => frame(0, 0, 1, &[]),
        }),
        ("priority", &|n| frame(2, 0, 2 * n + 1, &[0, 0, 0, 0, 1])),
    ];
    for (name, each) in floods {
        let sent = flood(each);
        assert!(sent < 49_999, "{name}: all of it was taken");
        assert_eq!(get(site.address, "/alive", "").0, 200, "{name}");
    }
    assert!(
        site.refused("http2_flood") >= 5,
        "{}",
        site.refused("http2_flood")
    );
    let grown = site.gateway.resident().saturating_sub(before);
    assert!(grown < 64 << 20, "grown by {grown} bytes");
}
