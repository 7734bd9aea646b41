//! Tokens, forward authentication and shared rate limits, from `examples/identity.toml`, with a
//! real Redis.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use xtask::server::Redis;

use crate::local::{Echo, Local, example, free, get};

/// An issuer's key.
struct Key {
    pair: EcdsaKeyPair,
    id: &'static str,
}

impl Key {
    fn new(id: &'static str) -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random);
        let document = document.unwrap();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap();
        Self { pair, id }
    }

    fn jwk(&self) -> serde_json::Value {
        let point = self.pair.public_key().as_ref();
        serde_json::json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id,
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
        })
    }

    fn sign(&self, header: &serde_json::Value, claims: &serde_json::Value) -> String {
        let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = self
            .pair
            .sign(&SystemRandom::new(), signed.as_bytes())
            .unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn token(&self, claims: &serde_json::Value) -> String {
        self.sign(
            &serde_json::json!({ "alg": "ES256", "kid": self.id }),
            claims,
        )
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn claims() -> serde_json::Value {
    serde_json::json!({
        "iss": "https://id.example", "aud": "shop", "sub": "ann", "tenant": "acme",
        "exp": now() + 600, "nbf": now() - 600,
    })
}

fn changed(name: &str, value: impl Into<serde_json::Value>) -> serde_json::Value {
    let mut claims = claims();
    claims[name] = value.into();
    claims
}

fn write_keys(directory: &Path, keys: &[&Key]) {
    let keys: Vec<_> = keys.iter().map(|key| key.jwk()).collect();
    let document = serde_json::json!({ "keys": keys });
    std::fs::write(directory.join("jwks.json"), document.to_string()).unwrap();
}

struct Site {
    gateway: Local,
    echo: Echo,
    address: SocketAddr,
}

fn start(keys: &[&Key], more: &[(&str, &str)]) -> Site {
    let echo = Echo::start();
    let address = free();
    let (to, peer) = (address.to_string(), echo.address.to_string());
    let mut replace = vec![
        ("0.0.0.0:8080", to.as_str()),
        ("127.0.0.1:9000", peer.as_str()),
    ];
    replace.extend(more);
    let text = example("identity.toml", &replace);
    let gateway = Local::start(&text, |directory| write_keys(directory, keys));
    Site {
        gateway,
        echo,
        address,
    }
}

impl Site {
    fn with(&self, token: &str) -> (u16, String, String) {
        get(
            self.address,
            "/members",
            &format!("Authorization: Bearer {token}\r\nX-User: mallory\r\n"),
        )
    }
}

/// Serves a key document by HTTP; with None, 500.
struct KeyServer {
    address: SocketAddr,
    document: Arc<Mutex<Option<String>>>,
}

impl KeyServer {
    fn start(keys: &[&Key]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            document: Arc::default(),
        };
        server.publish(keys);
        let document = Arc::clone(&server.document);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut space = [0; 2048];
                let _ = stream.read(&mut space);
                let (status, body) = match &*document.lock().unwrap() {
                    Some(document) => ("200 OK", document.clone()),
                    None => ("500 Down", String::new()),
                };
                let answer = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        server
    }

    fn publish(&self, keys: &[&Key]) {
        let keys: Vec<_> = keys.iter().map(|key| key.jwk()).collect();
        let document = serde_json::json!({ "keys": keys }).to_string();
        *self.document.lock().unwrap() = Some(document);
    }
}

#[test]
fn keys_from_a_url_rotate_and_survive_an_outage() {
    let (old, new, newest) = (Key::new("old"), Key::new("new"), Key::new("newest"));
    let server = KeyServer::start(&[&old]);
    let keys = format!("keys = \"http://{}/jwks\"", server.address);
    let site = start(&[], &[("keys = \"jwks.json\"", &keys)]);
    let status = |key: &Key| site.with(&key.token(&claims())).0;
    site.gateway.until("the keys", || status(&old) == 200);
    assert_eq!(status(&new), 401, "not published yet");
    // Both for a while, then the new one alone.
    server.publish(&[&old, &new]);
    site.gateway.until("the new key", || status(&new) == 200);
    assert_eq!(status(&old), 200);
    server.publish(&[&new]);
    site.gateway
        .until("the old key's end", || status(&old) == 401);
    // An outage, and then nonsense: the last good keys stay.
    let failures = || {
        let page = site.gateway.scrape();
        page.sum("edgemeter_token_key_failures_total", |_| true)
    };
    for broken in [None, Some("no JSON".to_owned())] {
        let before = failures();
        *server.document.lock().unwrap() = broken;
        site.gateway.until("a failure", || failures() > before);
        assert_eq!(status(&new), 200);
        assert_eq!(status(&newest), 401);
    }
    server.publish(&[&new, &newest]);
    site.gateway.until("recovery", || status(&newest) == 200);
}

#[test]
fn a_token_is_believed_only_when_everything_about_it_is_right() {
    let (key, other) = (Key::new("one"), Key::new("two"));
    let site = start(&[&key], &[]);
    site.gateway
        .until("the keys", || site.with(&key.token(&claims())).0 == 200);
    let (_, _, seen) = site.with(&key.token(&claims()));
    assert!(
        seen.contains("x-user: ann") && !seen.contains("mallory"),
        "{seen}"
    );
    site.gateway.until("the access log", || {
        site.gateway.access_log().contains(r#""tenant":"acme""#)
    });
    let none = serde_json::json!({ "alg": "none", "kid": "one" });
    let unsigned = key.sign(&none, &claims());
    let secret = serde_json::json!({ "alg": "HS256", "kid": "one" });
    let header = |kid| serde_json::json!({ "alg": "ES256", "kid": kid });
    let mut altered = key.token(&claims());
    altered.replace_range(altered.len() - 4.., "AAAA");
    let mut no_expiry = claims();
    no_expiry.as_object_mut().unwrap().remove("exp");
    let before = site.echo.seen().len();
    for (what, token) in [
        ("nothing", String::new()),
        ("no token", "abc".to_owned()),
        ("expired", key.token(&changed("exp", now() - 60))),
        ("not yet", key.token(&changed("nbf", now() + 60))),
        (
            "another issuer",
            key.token(&changed("iss", "https://evil.example")),
        ),
        ("another audience", key.token(&changed("aud", "bank"))),
        ("no expiry", key.token(&no_expiry)),
        (
            "unsigned",
            unsigned
                .rsplit_once('.')
                .map(|(signed, _)| format!("{signed}."))
                .unwrap(),
        ),
        ("a shared secret", key.sign(&secret, &claims())),
        ("an unknown key", other.token(&claims())),
        (
            "another's key by a known name",
            other.sign(&header("one"), &claims()),
        ),
        ("an altered signature", altered),
    ] {
        let (status, head, _) = site.with(&token);
        assert_eq!(status, 401, "{what}");
        assert!(head.contains("www-authenticate: bearer"), "{what}: {head}");
    }
    assert_eq!(get(site.address, "/members", "").0, 401);
    assert_eq!(
        site.echo.seen().len(),
        before,
        "the service saw none of them"
    );
    // A new key beside the old one, then alone: tokens of each pass as long as it is published.
    write_keys(site.gateway.directory.path(), &[&key, &other]);
    site.gateway.until("the new key", || {
        site.with(&other.token(&claims())).0 == 200
    });
    assert_eq!(site.with(&key.token(&claims())).0, 200);
    write_keys(site.gateway.directory.path(), &[&other]);
    site.gateway.until("the old key's end", || {
        site.with(&key.token(&claims())).0 == 401
    });
    // A document that cannot be read leaves the keys as they are.
    std::fs::write(site.gateway.directory.path().join("jwks.json"), "{").unwrap();
    site.gateway.until("a failure", || {
        site.gateway
            .scrape()
            .sum("edgemeter_token_key_failures_total", |_| true)
            > 0
    });
    assert_eq!(site.with(&other.token(&claims())).0, 200);
}

/// Lets cookies that say so through, and sends the others to log in.
fn auth_service() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut head = String::new();
                let mut byte = [0];
                while stream.read(&mut byte).is_ok_and(|read| read == 1) {
                    head.push(char::from(byte[0]));
                    if !head.ends_with("\r\n\r\n") {
                        continue;
                    }
                    let asked = std::mem::take(&mut head).to_ascii_lowercase();
                    assert!(asked.starts_with("get /verify "), "{asked}");
                    assert!(asked.contains("x-forwarded-uri: /account?x=1"), "{asked}");
                    assert!(asked.contains("x-forwarded-host: shop.example"), "{asked}");
                    let answer = if asked.contains("cookie: session=ann") {
                        "HTTP/1.1 204 No Content\r\nX-User: ann\r\n\r\n"
                    } else {
                        "HTTP/1.1 302 Found\r\nLocation: /login\r\nX-Secret: s\r\nContent-Length: 5\r\n\r\nlogin"
                    };
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            });
        }
    });
    address
}

#[test]
fn a_service_is_asked_and_its_answer_is_the_clients() {
    let service = auth_service().to_string();
    let key = Key::new("one");
    let site = start(&[&key], &[("127.0.0.1:9100", &service)]);
    for _ in 0..3 {
        let headers = "Cookie: session=ann\r\nX-User: mallory\r\n";
        let (status, _, seen) = get(site.address, "/account?x=1", headers);
        assert_eq!(status, 200);
        assert!(
            seen.contains("x-user: ann") && !seen.contains("mallory"),
            "{seen}"
        );
        let (status, head, body) = get(site.address, "/account?x=1", "Cookie: session=bob\r\n");
        assert_eq!((status, body.as_str()), (302, "login"));
        assert!(
            head.contains("location: /login") && !head.contains("x-secret"),
            "{head}"
        );
    }
    assert_eq!(site.echo.seen().len(), 3);
    let nobody = free().to_string();
    let site = start(&[&key], &[("127.0.0.1:9100", &nobody)]);
    assert_eq!(get(site.address, "/account?x=1", "").0, 503);
    site.gateway.reload(
        "response_headers = [\"x-user\"]",
        "response_headers = [\"x-user\"]\non_error = \"allow\"",
    );
    assert_eq!(get(site.address, "/account?x=1", "").0, 200);
}

#[test]
fn gateways_share_a_limit_and_decide_for_themselves_when_the_store_is_gone() {
    let redis = Redis::start().unwrap();
    let url = redis.url();
    let key = Key::new("one");
    let sites = [(); 2].map(|()| start(&[&key], &[("redis://127.0.0.1:6379", &url)]));
    let passed = (0..30)
        .filter(|n| get(sites[n % 2].address, "/shared", "").0 == 200)
        .count();
    assert_eq!(passed, 10, "ten in all, not ten each");
    let (status, head, _) = get(sites[0].address, "/shared", "");
    assert_eq!(status, 429);
    assert!(head.contains("retry-after: "), "{head}");
    drop(redis);
    assert_eq!(get(sites[0].address, "/shared", "").0, 429, "fails closed");
    sites[1]
        .gateway
        .reload("on_error = \"deny\"", "on_error = \"allow\"");
    assert_eq!(get(sites[1].address, "/shared", "").0, 200, "fails open");
    let errors = sites[1].gateway.scrape();
    assert!(errors.sum("edgemeter_rate_limit_store_errors_total", |_| true) > 0);
}
