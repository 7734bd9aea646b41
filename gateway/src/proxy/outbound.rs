//! Towards upstreams: TLS with the upstream's own authorities and identity, and the PROXY header
//! that names the client.

use std::{
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    path::Path,
    sync::Arc,
};

use async_trait::async_trait;
use pingora::{
    Error, ErrorType, OrErr as _, Result,
    connectors::l4::Connect,
    protocols::{
        l4::{socket::SocketAddr as L4Address, stream::Stream},
        tls::CaType,
    },
    upstreams::peer::HttpPeer,
    utils::tls::{CertKey, WrappedX509, parse_x509},
};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject as _};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{
    proxy_header,
    tls::{TlsError, certificates},
};
use crate::config::{ProxyVersion, UpstreamTls};

/// What connections to one upstream are made with.
pub struct Outbound {
    server_name: Box<str>,
    verify: bool,
    authorities: Option<Arc<CaType>>,
    identity: Option<Arc<CertKey>>,
}

impl Outbound {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn load(tls: &UpstreamTls) -> std::result::Result<Self, TlsError> {
        let authorities = match &tls.authorities {
            None => None,
            Some(path) => {
                let all = certificates(path)?;
                let parsed = all
                    .iter()
                    .map(|der| WrappedX509::new(der.to_vec(), parse_x509));
                Some(Arc::from(parsed.collect::<Vec<_>>()))
            }
        };
        let identity = match &tls.identity {
            None => None,
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                let chain = chain.iter().map(|der| der.to_vec()).collect();
                let key = private_key(key)?;
                Some(Arc::new(CertKey::new(chain, key)))
            }
        };
        Ok(Self {
            server_name: tls.server_name.clone(),
            verify: tls.verify,
            authorities,
            identity,
        })
    }

    /// Makes the peer one that is spoken to in TLS.
    pub fn apply(&self, peer: &mut HttpPeer) {
        peer.scheme = pingora::upstreams::peer::Scheme::HTTPS;
        peer.sni = self.server_name.to_string();
        peer.client_cert_key.clone_from(&self.identity);
        let options = &mut peer.options;
        options.verify_cert = self.verify;
        options.verify_hostname = self.verify;
        options.ca.clone_from(&self.authorities);
    }
}

fn private_key(path: &Path) -> std::result::Result<Vec<u8>, TlsError> {
    let key = PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::new(path, error))?;
    Ok(key.secret_der().to_vec())
}

/// Makes the peer's connections begin with a PROXY header. They are pooled for this client only.
pub fn name_client(peer: &mut HttpPeer, client: SocketAddr, version: ProxyVersion) {
    let mut hasher = DefaultHasher::new();
    client.hash(&mut hasher);
    peer.group_key = hasher.finish();
    peer.options.custom_l4 = Some(Arc::new(Naming { client, version }));
}

struct Naming {
    client: SocketAddr,
    version: ProxyVersion,
}

#[async_trait]
impl Connect for Naming {
    async fn connect(&self, address: &L4Address) -> Result<Stream> {
        let Some(address) = address.as_inet() else {
            return Err(Error::explain(ErrorType::ConnectError, "no address"));
        };
        let mut stream = TcpStream::connect(address)
            .await
            .or_err(ErrorType::ConnectError, "connecting")?;
        let local = stream
            .peer_addr()
            .or_err(ErrorType::ConnectError, "asking for the address")?;
        let header = match self.version {
            ProxyVersion::V1 => proxy_header::encode_text(self.client, local),
            ProxyVersion::V2 => proxy_header::encode(self.client, local),
        };
        stream
            .write_all(&header)
            .await
            .or_err(ErrorType::WriteError, "writing the PROXY header")?;
        Ok(stream.into())
    }
}

impl fmt::Debug for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PROXY header for {}", self.client)
    }
}
