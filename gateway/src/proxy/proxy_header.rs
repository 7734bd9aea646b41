//! The PROXY protocol, versions 1 and 2: a load balancer before us says whose connection it is,
//! before anything else and before TLS.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use pingora::protocols::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use super::records::RecordCutter;

/// What version 1 can take at most, CRLF included.
const V1_LENGTH_MAX: usize = 107;
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_FIXED_LENGTH: usize = 16;
/// Room for the addresses and type-length-values; more is refused.
const V2_REST_MAX: usize = 2048;

/// Writes of fewer bytes than a segment holds are gathered, up to that.
const GATHERED_MAX: usize = 1460;

/// A connection whose first bytes may have been read already.
#[derive(Debug)]
pub struct Opened {
    /// The socket.
    pub stream: Stream,
    /// Read and not yet passed on.
    pub before: BytesMut,
    /// Bytes read from the socket so far.
    pub received: Arc<AtomicU64>,
    /// Bytes that the socket has taken so far.
    pub sent: Arc<AtomicU64>,
    /// Of these, handed on or taken as the header.
    passed: u64,
    /// While TLS shakes hands.
    records: Option<RecordCutter>,
    /// Small writes until a flush, where they are gathered; nothing between two flushes.
    gathered: Option<Vec<u8>>,
}

/// Whom a header names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// The client.
    Client(SocketAddr),
    /// Nobody: the load balancer speaks for itself, such as in a health check.
    Nobody,
}

/// Not a PROXY header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Neither version's.
    #[error("no PROXY protocol header")]
    Missing,
    /// Malformed.
    #[error("malformed PROXY protocol header")]
    Malformed,
    /// The connection failed or ended within it.
    #[error("reading the PROXY protocol header: {0}")]
    Io(#[from] io::Error),
}

impl Opened {
    /// Nothing was read.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            before: BytesMut::new(),
            received: Arc::default(),
            sent: Arc::default(),
            passed: 0,
            records: None,
            gathered: None,
        }
    }

    /// From here on small writes are gathered until a flush: for who writes a head and its body
    /// apart. Whoever writes both at once needs no buffer, and an idle connection has none.
    pub fn gather_writes(&mut self) {
        self.gathered.get_or_insert_default();
    }

    /// Writes what was gathered.
    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(gathered) = &mut self.gathered else {
            return Poll::Ready(Ok(()));
        };
        while !gathered.is_empty() {
            let taken = ready!(Pin::new(&mut self.stream).poll_write(cx, gathered))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            gathered.drain(..taken);
        }
        *gathered = Vec::new();
        Poll::Ready(Ok(()))
    }

    /// Whether so many bytes are to be gathered; otherwise nothing is left to be written before
    /// them.
    fn poll_gathers(&mut self, cx: &mut Context<'_>, more: usize) -> Poll<io::Result<bool>> {
        let Some(gathered) = &self.gathered else {
            return Poll::Ready(Ok(false));
        };
        if gathered.len() + more > GATHERED_MAX {
            ready!(self.poll_gathered(cx))?;
        }
        Poll::Ready(Ok(more < GATHERED_MAX))
    }

    /// From here on TLS shakes hands: it is handed one record at a time.
    pub fn handshake_begins(&mut self) {
        self.records = Some(RecordCutter::default());
    }

    /// The handshake is over. Returns how many bytes of the stream came before what follows it.
    pub fn handshake_is_over(&mut self) -> u64 {
        self.records = None;
        if self.before.is_empty() {
            // Or it is there for as long as the connection is.
            self.before = BytesMut::new();
        }
        self.passed
    }

    /// Hands on what is there of the record under way.
    fn poll_record(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(records) = &mut self.records else {
            return Poll::Ready(Ok(()));
        };
        if records.pause() {
            // The reader looks whether that was the last one, and asks again if not.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.before.is_empty() {
            let mut space = [0; 4096];
            let mut chunk = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut chunk))?;
            let read = chunk.filled().len() as u64;
            self.received.fetch_add(read, Ordering::Relaxed);
            self.before.extend_from_slice(chunk.filled());
        }
        let length = records.cut(&self.before, buffer.remaining());
        buffer.put_slice(&self.before[..length]);
        self.before.advance(length);
        self.passed += length as u64;
        Poll::Ready(Ok(()))
    }

    /// Reads a header, and not a byte more is taken from what follows. Has no deadline of its own.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub async fn read_header(&mut self) -> Result<Named, HeaderError> {
        loop {
            if let Some((length, named)) = parse(&self.before)? {
                self.before.advance(length);
                self.passed += length as u64;
                return Ok(named);
            }
            let mut space = [0; 512];
            let read = self.stream.read(&mut space).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.received.fetch_add(read as u64, Ordering::Relaxed);
            self.before.extend_from_slice(&space[..read]);
        }
    }
}

/// The header's length and whom it names; None: more is needed.
fn parse(bytes: &[u8]) -> Result<Option<(usize, Named)>, HeaderError> {
    let is_v2 = bytes.starts_with(V2_SIGNATURE);
    let may_be = |signature: &[u8]| {
        let known = signature.len().min(bytes.len());
        bytes[..known] == signature[..known]
    };
    if is_v2 {
        let Some(&[high, low]) = bytes.get(V2_FIXED_LENGTH - 2..V2_FIXED_LENGTH) else {
            return Ok(None);
        };
        let rest = usize::from(u16::from_be_bytes([high, low]));
        if rest > V2_REST_MAX {
            return Err(HeaderError::Malformed);
        }
        let length = V2_FIXED_LENGTH + rest;
        let Some(header) = bytes.get(..length) else {
            return Ok(None);
        };
        let header = ppp::v2::Header::try_from(header).map_err(|_| HeaderError::Malformed)?;
        let named = match (header.command, header.addresses) {
            (ppp::v2::Command::Local, _) => Named::Nobody,
            (_, ppp::v2::Addresses::IPv4(a)) => {
                Named::Client((a.source_address, a.source_port).into())
            }
            (_, ppp::v2::Addresses::IPv6(a)) => {
                Named::Client(plain((a.source_address, a.source_port).into()))
            }
            _ => Named::Nobody,
        };
        return Ok(Some((length, named)));
    }
    if !may_be(b"PROXY ") && !may_be(V2_SIGNATURE) {
        return Err(HeaderError::Missing);
    }
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() >= V1_LENGTH_MAX {
            Err(HeaderError::Malformed)
        } else {
            Ok(None)
        };
    };
    if may_be(V2_SIGNATURE) {
        return Ok(None);
    }
    let line = bytes.get(..end + 2).unwrap_or_default();
    let header = ppp::v1::Header::try_from(line).map_err(|_| HeaderError::Malformed)?;
    let named = match header.addresses {
        ppp::v1::Addresses::Tcp4(a) => Named::Client((a.source_address, a.source_port).into()),
        ppp::v1::Addresses::Tcp6(a) => {
            Named::Client(plain((a.source_address, a.source_port).into()))
        }
        ppp::v1::Addresses::Unknown => Named::Nobody,
    };
    Ok(Some((end + 2, named)))
}

/// An IPv4 address written as IPv6 is one address, not two.
#[must_use]
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The version 2 header that names a client to an upstream.
#[must_use]
pub fn encode(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let (client, local) = (plain(client), plain(local));
    let mut header = V2_SIGNATURE.to_vec();
    match (client.ip(), local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.extend([0x21, 0x11, 0, 12]);
            header.extend(from.octets());
            header.extend(to.octets());
        }
        (from, to) => {
            let v6 = |ip| match ip {
                IpAddr::V4(ip) => std::net::Ipv4Addr::to_ipv6_mapped(&ip),
                IpAddr::V6(ip) => ip,
            };
            header.extend([0x21, 0x21, 0, 36]);
            header.extend(v6(from).octets());
            header.extend(v6(to).octets());
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header
}

/// The version 1 header that names a client to an upstream.
#[must_use]
pub fn encode_text(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let (client, local) = (plain(client), plain(local));
    match (client.ip(), local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            format!(
                "PROXY TCP4 {from} {to} {} {}\r\n",
                client.port(),
                local.port()
            )
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            format!(
                "PROXY TCP6 {from} {to} {} {}\r\n",
                client.port(),
                local.port()
            )
        }
        _ => "PROXY UNKNOWN\r\n".to_owned(),
    }
    .into_bytes()
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.records.is_some() {
            return self.poll_record(cx, buffer);
        }
        if self.before.is_empty() {
            let start = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
            let read = buffer.filled().len() - start;
            self.received.fetch_add(read as u64, Ordering::Relaxed);
            return Poll::Ready(Ok(()));
        }
        let length = self.before.len().min(buffer.remaining());
        buffer.put_slice(&self.before[..length]);
        self.before.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Opened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let gathers = ready!(self.poll_gathers(cx, bytes.len()))?;
        let taken = match &mut self.gathered {
            Some(gathered) if gathers => {
                gathered.extend_from_slice(bytes);
                bytes.len()
            }
            _ => ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?,
        };
        self.sent.fetch_add(taken as u64, Ordering::Relaxed);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_gathered(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_gathered(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let more = slices.iter().map(|slice| slice.len()).sum();
        let gathers = ready!(self.poll_gathers(cx, more))?;
        let taken = match &mut self.gathered {
            Some(gathered) if gathers => {
                for slice in slices {
                    gathered.extend_from_slice(slice);
                }
                more
            }
            _ => ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?,
        };
        self.sent.fetch_add(taken as u64, Ordering::Relaxed);
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn both_versions_name_the_client_and_take_no_more() {
        let local = address("10.0.0.1:443");
        for client in ["192.0.2.7:4711", "[2001:db8::7]:4711"].map(address) {
            let to = if client.is_ipv4() {
                local
            } else {
                address("[::1]:443")
            };
            for header in [encode(client, to), encode_text(client, to)] {
                let mut bytes = header.clone();
                bytes.extend(b"\x16\x03\x01GET / HTTP/1.1\r\n\r\n");
                let parsed = parse(&bytes).unwrap();
                assert_eq!(parsed, Some((header.len(), Named::Client(client))));
                for end in 0..header.len() {
                    assert_eq!(parse(&header[..end]).unwrap(), None, "{end}");
                }
            }
        }
        let mapped = encode(address("[::ffff:192.0.2.7]:1"), local);
        let (_, named) = parse(&mapped).unwrap().unwrap();
        assert_eq!(named, Named::Client(address("192.0.2.7:1")));
        assert_eq!(
            parse(b"PROXY UNKNOWN\r\n").unwrap(),
            Some((15, Named::Nobody))
        );
        let health = [V2_SIGNATURE, &[0x20, 0, 0, 0]].concat();
        assert_eq!(parse(&health).unwrap(), Some((16, Named::Nobody)));
    }

    #[test]
    fn anything_else_is_refused() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 99999 1\r\n",
            b"PROXY TCP4 ::1 ::1 1 1\r\n",
            &[b'P'; 3],
        ] {
            assert!(parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        let endless = [b"PROXY ".to_vec(), vec![b'x'; 200]].concat();
        assert!(parse(&endless).is_err());
        let huge = [V2_SIGNATURE, &[0x21, 0x11, 0xff, 0xff]].concat();
        assert!(parse(&huge).is_err());
    }
}
