//! A client that knows, to the byte, where on the stream each request and each answer begins, and
//! what follows from that for every frame of a capture.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use edgemeter::owner::{Leg, OwnerKind};
use flow_abi::Direction;
use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};
use xtask::{
    capture::{Capture, Segment},
    netns::GATEWAY_TO_CLIENT,
};

use crate::harness::Site;

pub const OVERHEAD: &str = "(overhead)";
pub const UNCLAIMED: &str = "(unclaimed)";
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const TLS_HEADER: usize = 5;

/// Wire bytes and frames by direction and owner.
pub type Owned = BTreeMap<(Direction, String), (i64, i64)>;

/// One connection.
pub struct Talk {
    pub stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
    /// To be sent; with TLS the end of the handshake at first.
    pub pending: Vec<u8>,
    sent: u64,
    raw: Vec<u8>,
    received: u64,
    plain: Vec<u8>,
    answered_to: usize,
    /// Where on the stream a record begins, by where its contents do.
    records: BTreeMap<usize, u64>,
    heard: Heard,
}

/// Where each owner's bytes begin.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub port: u16,
    asked: Vec<(u64, &'static str)>,
    answered: Vec<(u64, &'static str)>,
}

/// Connects from a port, which may have been used a moment ago; 0 for any.
pub fn connect_from(port: u16, to: SocketAddr) -> TcpStream {
    let from = SocketAddr::from((GATEWAY_TO_CLIENT.far_v4, port));
    let socket = socket2(libc::SOCK_STREAM);
    let one = 1;
    option(
        socket.as_raw_fd(),
        libc::SOL_SOCKET,
        libc::SO_REUSEADDR,
        &one,
    );
    for (address, call) in [
        (from, libc::bind as unsafe extern "C" fn(_, _, _) -> _),
        (to, libc::connect),
    ] {
        let SocketAddr::V4(address) = address else {
            panic!("{address} is not IPv4")
        };
        // SAFETY: all zero is a valid sockaddr_in.
        let mut name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        name.sin_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap();
        name.sin_port = address.port().to_be();
        name.sin_addr.s_addr = u32::from(*address.ip()).to_be();
        let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).unwrap();
        // SAFETY: a socket of ours and an address of the given length.
        let done = unsafe { call(socket.as_raw_fd(), (&raw const name).cast(), length) };
        assert_eq!(done, 0, "{address}: {}", std::io::Error::last_os_error());
    }
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

fn socket2(kind: i32) -> OwnedFd {
    // SAFETY: three integers; the descriptor is fresh and nobody else's.
    unsafe {
        let fd = libc::socket(libc::AF_INET, kind | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// Sets a socket option.
pub fn option<T>(fd: i32, level: i32, name: i32, value: &T) {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    // SAFETY: an option of the given length.
    let result =
        unsafe { libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

impl Talk {
    pub fn plain(stream: TcpStream) -> Self {
        let port = stream.local_addr().unwrap().port();
        Self {
            stream,
            tls: None,
            pending: Vec::new(),
            sent: 0,
            raw: Vec::new(),
            received: 0,
            plain: Vec::new(),
            answered_to: 0,
            records: BTreeMap::new(),
            heard: Heard {
                port,
                ..Heard::default()
            },
        }
    }

    /// Shakes hands; the last flight is not sent yet, so that a request can go with it.
    pub fn shaken(stream: TcpStream, config: &Arc<ClientConfig>) -> Self {
        let name = ServerName::from(std::net::IpAddr::from(GATEWAY_TO_CLIENT.v4));
        let tls = ClientConnection::new(Arc::clone(config), name).unwrap();
        let mut talk = Self::plain(stream);
        talk.tls = Some(Box::new(tls));
        loop {
            talk.encrypt();
            if !talk.tls.as_ref().unwrap().is_handshaking() {
                return talk;
            }
            talk.send();
            talk.hear();
        }
    }

    fn encrypt(&mut self) {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                tls.write_tls(&mut self.pending).unwrap();
            }
        }
    }

    /// Makes a request ready to be sent.
    pub fn ask(&mut self, route: &'static str, request: &[u8]) {
        let begins = self.sent + self.pending.len() as u64;
        self.heard.asked.push((begins, route));
        match &mut self.tls {
            Some(tls) => tls.writer().write_all(request).unwrap(),
            None => self.pending.extend_from_slice(request),
        }
        self.encrypt();
    }

    /// Sends what is ready, in one call.
    pub fn send(&mut self) {
        self.send_some(usize::MAX);
    }

    /// Sends some of what is ready.
    pub fn send_some(&mut self, bytes: usize) {
        let length = bytes.min(self.pending.len());
        let rest = self.pending.split_off(length);
        self.stream.write_all(&self.pending).unwrap();
        self.sent += length as u64;
        self.pending = rest;
    }

    /// Reads once; with TLS, at least a record.
    fn hear(&mut self) {
        let mut buffer = [0; 65536];
        let read = self.stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the gateway closed");
        self.raw.extend_from_slice(&buffer[..read]);
        let Some(tls) = &mut self.tls else {
            self.received += read as u64;
            self.plain.append(&mut self.raw);
            return;
        };
        while let Some(&[high, low]) = self.raw.get(3..TLS_HEADER) {
            let length = TLS_HEADER + usize::from(u16::from_be_bytes([high, low]));
            if self.raw.len() < length {
                break;
            }
            let record: Vec<u8> = self.raw.drain(..length).collect();
            let mut rest = &record[..];
            while !rest.is_empty() {
                tls.read_tls(&mut rest).unwrap();
            }
            let state = tls.process_new_packets().unwrap();
            let content = state.plaintext_bytes_to_read();
            if content > 0 {
                self.records.insert(self.plain.len(), self.received);
                let from = self.plain.len();
                self.plain.resize(from + content, 0);
                tls.reader().read_exact(&mut self.plain[from..]).unwrap();
            }
            self.received += length as u64;
        }
    }

    /// Reads one answer, and notes where it began.
    pub fn answer(&mut self, route: &'static str, body: usize) {
        loop {
            let here = &self.plain[self.answered_to..];
            if let Some(end) = here.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&here[..end]);
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                let whole = end + 4 + body;
                if here.len() >= whole {
                    let begins = match self.tls {
                        None => self.answered_to as u64,
                        Some(_) => *self
                            .records
                            .get(&self.answered_to)
                            .expect("an answer begins with a record"),
                    };
                    self.heard.answered.push((begins, route));
                    self.answered_to += whole;
                    return;
                }
            }
            self.hear();
        }
    }

    /// Reads to the end of the stream.
    pub fn end(&mut self) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
    }

    pub fn heard(&self) -> Heard {
        self.heard.clone()
    }
}

pub fn get(route: &str, body: usize) -> Vec<u8> {
    format!("GET /{route}/bytes/{body} HTTP/1.1\r\nhost: x\r\n\r\n").into_bytes()
}

pub fn post(route: &str, body: usize, upload: usize) -> Vec<u8> {
    let head = format!(
        "POST /{route}/bytes/{body} HTTP/1.1\r\nhost: x\r\ncontent-length: {upload}\r\n\r\n"
    );
    let mut request = head.into_bytes();
    request.resize(request.len() + upload, b'u');
    request
}

/// Whose every frame of the capture is: a header is its first payload byte's owner's, a payload
/// byte whoever's stood at its offset, a frame without payload the connection's.
pub fn by_capture(capture: &Capture, listener: u16, talks: &[Heard]) -> Owned {
    #[derive(Default)]
    struct Under<'a> {
        talk: Option<&'a Heard>,
        isn: [u32; 2],
        begun: usize,
    }
    let mut under: BTreeMap<u16, Under<'_>> = BTreeMap::new();
    let mut owned = Owned::new();
    for segment in capture.segments() {
        let (direction, port) = match (segment.flow.source_port, segment.flow.destination_port) {
            (port, to) if to == listener => (Direction::Rx, port),
            (from, port) if from == listener => (Direction::Tx, port),
            _ => continue,
        };
        let under = under.entry(port).or_default();
        let index = usize::from(direction == Direction::Tx);
        if segment.flags & SYN != 0 {
            if direction == Direction::Rx && (under.talk.is_none() || under.isn[0] != segment.seq) {
                let mut of_port = talks.iter().filter(|talk| talk.port == port);
                under.talk = of_port.nth(under.begun);
                assert!(
                    under.talk.is_some(),
                    "a connection from {port} that nobody made"
                );
                under.begun += 1;
            }
            under.isn[index] = segment.seq;
        }
        let talk = under.talk.expect("a SYN comes first");
        let begins = [&talk.asked, &talk.answered][index];
        let offset = u64::from(segment.seq.wrapping_sub(under.isn[index]).wrapping_sub(1));
        divide(&mut owned, direction, segment, offset, begins);
    }
    owned
}

fn divide(
    owned: &mut Owned,
    direction: Direction,
    segment: &Segment,
    offset: u64,
    begins: &[(u64, &'static str)],
) {
    let owner_at = |offset: u64| {
        let before = begins.iter().rev().find(|(begin, _)| *begin <= offset);
        before.map_or(OVERHEAD, |(_, route)| *route)
    };
    let mut add = |owner: &str, bytes: u64, frames| {
        let sum = owned.entry((direction, owner.to_owned())).or_default();
        sum.0 += i64::try_from(bytes).unwrap();
        sum.1 += frames;
    };
    if segment.payload == 0 {
        add(OVERHEAD, segment.bytes, 1);
        return;
    }
    add(owner_at(offset), segment.bytes - segment.payload, 1);
    let end = offset + segment.payload;
    let mut cuts: Vec<u64> = begins.iter().map(|(begin, _)| *begin).collect();
    cuts.retain(|cut| *cut > offset && *cut < end);
    cuts.insert(0, offset);
    cuts.push(end);
    for pair in cuts.windows(2) {
        add(owner_at(pair[0]), pair[1] - pair[0], 0);
    }
}

/// The same, by the ledger; of the client leg. Owners without a frame are left out.
pub fn by_ledger(site: &Site) -> Owned {
    let (balances, owners) = site.ledger();
    let mut owned = Owned::new();
    for (interface, direction, id, amount) in balances.amounts() {
        if interface != GATEWAY_TO_CLIENT.device {
            continue;
        }
        let owner = &owners[&id];
        assert_eq!(owner.leg, Leg::Client, "{owner:?}");
        let name = match owner.kind {
            OwnerKind::Route => owner.route.as_str(),
            OwnerKind::Overhead => OVERHEAD,
            OwnerKind::Unclaimed => UNCLAIMED,
            OwnerKind::Foreign => "(foreign)",
        };
        let sum = owned.entry((direction, name.to_owned())).or_default();
        sum.0 += amount.wire_bytes;
        sum.1 += amount.frames;
    }
    owned.retain(|_, sum| *sum != (0, 0));
    owned
}

/// What of one direction was whose.
pub fn of(owned: &Owned, wanted: Direction) -> Vec<(&str, (i64, i64))> {
    owned
        .iter()
        .filter(|((direction, _), _)| *direction == wanted)
        .map(|((_, owner), sum)| (owner.as_str(), *sum))
        .collect()
}

/// Frames of the capture that are so.
pub fn frames(capture: &Capture, of: impl Fn(&Segment) -> bool) -> usize {
    capture
        .segments()
        .iter()
        .filter(|segment| of(segment))
        .count()
}

/// From the client, and neither opening nor ending a connection.
pub fn is_bare(segment: &Segment, listener: u16) -> bool {
    segment.flow.destination_port == listener
        && segment.payload == 0
        && segment.flags & (SYN | FIN | RST) == 0
        && segment.flags & ACK != 0
}
