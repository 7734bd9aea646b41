//! Certificates, client identities and the PROXY protocol, from `examples/tls.toml`.

use std::{
    io::Write as _,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};

use crate::local::{Echo, Local, connect, example, free, read_response, tls};

/// What the last handshake presented.
#[derive(Debug, Default)]
struct Presented {
    certificate: Mutex<Vec<u8>>,
    ocsp: Mutex<Vec<u8>>,
}

/// Takes every certificate and remembers it: these tests ask which one came, not whether to trust.
#[derive(Debug)]
struct Remember(Arc<Presented>);

impl ServerCertVerifier for Remember {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.0.certificate.lock().unwrap() = certificate.to_vec();
        *self.0.ocsp.lock().unwrap() = ocsp.to_vec();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client(
    presented: &Arc<Presented>,
    versions: &[&'static rustls::SupportedProtocolVersion],
    identity: Option<Identity>,
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Remember(Arc::clone(presented))));
    let mut config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    Arc::new(config)
}

/// A self-signed certificate for these names; returns it in DER.
fn write(directory: &Path, certificate: &str, key: &str, names: &[&str]) -> Vec<u8> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    std::fs::write(directory.join(certificate), made.cert.pem()).unwrap();
    std::fs::write(directory.join(key), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().to_vec()
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn issue(authority: &CertifiedIssuer<'static, KeyPair>, name: &str) -> Identity {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params
        .distinguished_name
        .push(DnType::CommonName, "somebody");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    (vec![certificate.der().clone()], key)
}

struct Site {
    gateway: Local,
    echo: Echo,
    public: SocketAddr,
    partners: SocketAddr,
    balanced: SocketAddr,
    plain: SocketAddr,
    default: Vec<u8>,
    shop: Vec<u8>,
    partners_ca: CertifiedIssuer<'static, KeyPair>,
}

/// Not an OCSP response that anybody signed: what is stapled is what the file holds.
const STAPLE: &[u8] = &[0x30, 0x03, 0x0a, 0x01, 0x06];

fn start() -> Site {
    let echo = Echo::start();
    let [public, partners, balanced, plain] = [(); 4].map(|()| free());
    let text = example(
        "tls.toml",
        &[
            ("0.0.0.0:8443", &public.to_string()),
            ("0.0.0.0:8444", &partners.to_string()),
            ("0.0.0.0:8445", &balanced.to_string()),
            ("0.0.0.0:8085", &plain.to_string()),
            ("127.0.0.1:9000", &echo.address.to_string()),
        ],
    );
    let partners_ca = authority("partners");
    let (mut default, mut shop) = (Vec::new(), Vec::new());
    let gateway = Local::start(&text, |directory| {
        default = write(directory, "cert.pem", "key.pem", &["default.example"]);
        shop = write(
            directory,
            "shop.pem",
            "shop-key.pem",
            &["shop.example", "*.shop.example"],
        );
        std::fs::write(directory.join("shop.ocsp"), STAPLE).unwrap();
        std::fs::write(directory.join("partners-ca.pem"), partners_ca.pem()).unwrap();
    });
    Site {
        gateway,
        echo,
        public,
        partners,
        balanced,
        plain,
        default,
        shop,
        partners_ca,
    }
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n";
const BOTH: &[&rustls::SupportedProtocolVersion] =
    &[&rustls::version::TLS12, &rustls::version::TLS13];

#[test]
fn the_certificate_is_chosen_by_name_and_replaced_without_dropping_a_connection() {
    let site = start();
    let presented = Arc::new(Presented::default());
    for versions in [&BOTH[..1], &BOTH[1..]] {
        let config = client(&presented, versions, None);
        for (name, certificate, staple) in [
            ("shop.example", &site.shop, STAPLE),
            ("a.shop.example", &site.shop, STAPLE),
            ("a.b.shop.example", &site.default, &[]),
            ("elsewhere.example", &site.default, &[]),
        ] {
            let mut stream = tls(connect(site.public), &config, name).unwrap();
            assert_eq!(
                *presented.certificate.lock().unwrap(),
                *certificate,
                "{name}"
            );
            assert_eq!(*presented.ocsp.lock().unwrap(), staple, "{name}");
            stream.write_all(REQUEST).unwrap();
            assert_eq!(read_response(&mut stream).0, 200);
        }
    }
    let config = client(&presented, BOTH, None);
    let mut before = tls(connect(site.public), &config, "shop.example").unwrap();
    before.write_all(REQUEST).unwrap();
    assert_eq!(read_response(&mut before).0, 200);
    let directory = site.gateway.directory.path();
    let renewed = write(directory, "shop.pem", "shop-key.pem", &["shop.example"]);
    site.gateway.hang_up();
    before.write_all(REQUEST).unwrap();
    assert_eq!(read_response(&mut before).0, 200, "the connection lives on");
    let mut after = tls(connect(site.public), &config, "shop.example").unwrap();
    assert_eq!(*presented.certificate.lock().unwrap(), renewed);
    after.write_all(REQUEST).unwrap();
    assert_eq!(read_response(&mut after).0, 200);
    // A key that does not fit is refused, and what serves goes on.
    std::fs::copy(directory.join("key.pem"), directory.join("shop-key.pem")).unwrap();
    site.gateway.hang_up();
    assert!(
        site.gateway.log().contains("shop-key.pem"),
        "{}",
        site.gateway.log()
    );
    tls(connect(site.public), &config, "shop.example").unwrap();
    assert_eq!(*presented.certificate.lock().unwrap(), renewed);
}

#[test]
fn a_client_certificate_is_the_tenant() {
    let site = start();
    let presented = Arc::new(Presented::default());
    let acme = issue(&site.partners_ca, "acme");
    let config = client(&presented, BOTH, Some(acme));
    let mut stream = tls(connect(site.partners), &config, "default.example").unwrap();
    stream.write_all(REQUEST).unwrap();
    assert_eq!(read_response(&mut stream).0, 200);
    assert_eq!(
        stream.conn.negotiated_cipher_suite().unwrap().suite(),
        rustls::CipherSuite::TLS13_AES_256_GCM_SHA384
    );
    site.gateway.until("the access log", || {
        site.gateway.access_log().contains(r#""tenant":"acme""#)
    });
    // Nobody, somebody vouched for by another authority, and TLS 1.2: all refused.
    let stranger = issue(&authority("strangers"), "acme");
    for config in [
        client(&presented, BOTH, None),
        client(&presented, BOTH, Some(stranger)),
        client(&presented, &BOTH[..1], None),
    ] {
        let refused =
            tls(connect(site.partners), &config, "default.example").and_then(|mut stream| {
                stream.write_all(REQUEST)?;
                // TLS 1.3 tells a client only after it has sent.
                std::io::Read::read(&mut stream, &mut [0])
            });
        assert!(refused.is_err() || matches!(refused, Ok(0)), "{refused:?}");
    }
    site.gateway.until("three refused handshakes", || {
        site.gateway.count(
            "edgemeter_connections_refused_total",
            "reason",
            "tls_handshake",
        ) == 3
    });
    assert_eq!(site.echo.seen().len(), 1);
}

#[test]
fn a_proxy_header_names_the_client_on_plain_and_tls() {
    let site = start();
    let presented = Arc::new(Presented::default());
    let config = client(&presented, BOTH, None);
    let from: SocketAddr = "203.0.113.9:4711".parse().unwrap();
    let to: SocketAddr = "192.0.2.1:443".parse().unwrap();
    for header in [
        edgemeter::proxy::proxy_header::encode(from, to),
        edgemeter::proxy::proxy_header::encode_text(from, to),
    ] {
        let mut stream = connect(site.plain);
        stream.write_all(&[&header, REQUEST].concat()).unwrap();
        let (status, _, seen) = read_response(&mut stream);
        assert_eq!(status, 200);
        assert!(seen.contains("203.0.113.9"), "{seen}");
        let mut stream = connect(site.balanced);
        stream.write_all(&header).unwrap();
        let mut stream = tls(stream, &config, "default.example").unwrap();
        stream.write_all(REQUEST).unwrap();
        let (status, _, seen) = read_response(&mut stream);
        assert_eq!(status, 200);
        assert!(
            seen.contains("203.0.113.9") && seen.contains("https"),
            "{seen}"
        );
    }
    let turned = || {
        site.gateway.count(
            "edgemeter_connections_refused_total",
            "reason",
            "proxy_header",
        )
    };
    assert_eq!(turned(), 0);
    assert_eq!(
        crate::local::exchange(site.plain, REQUEST),
        "",
        "a header must come first"
    );
    site.gateway.until("the count", || turned() == 1);
    site.gateway.until("the access log", || {
        site.gateway
            .access_log()
            .matches("203.0.113.9:4711")
            .count()
            == 4
    });
}
