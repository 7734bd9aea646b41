//! What the admin port shows of connections and events: rows, and which of them are asked for.

use std::{net::IpAddr, str::FromStr};

use flow_abi::{Connection, connection::UNKNOWN, kind, via};
use serde::{Deserialize, Serialize};

use super::{Connections, End, Place, address, ended::state_name, owner::container};
use crate::{kernel::events::Event, owner::Leg};

/// Rows answered unless asked otherwise.
const LIMIT: usize = 1000;

/// Which connections are asked for; every condition must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Either address lies in it.
    pub cidr: Option<(IpAddr, u8)>,
    /// Either port.
    pub port: Option<u16>,
    /// `tcp`.
    pub protocol: Option<String>,
    /// Process id, command, container id (or its beginning), cgroup path, listener or upstream.
    pub owner: Option<String>,
    /// Under way.
    pub open: bool,
    /// Over, as far as remembered.
    pub closed: bool,
    /// At most so many rows, newest first.
    pub limit: usize,
}

/// A query that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FilterError(String);

impl Default for Filter {
    fn default() -> Self {
        Self {
            cidr: None,
            port: None,
            protocol: None,
            owner: None,
            open: true,
            closed: false,
            limit: LIMIT,
        }
    }
}

impl Filter {
    /// From a URL's query: `cidr=10.0.0.0/8&port=443&owner=curl&state=all&limit=50`.
    ///
    /// # Errors
    /// Names the parameter and what may be written.
    pub fn from_query(query: &str) -> Result<Self, FilterError> {
        let mut filter = Self::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decoded(value);
            filter.set(name, &value)?;
        }
        Ok(filter)
    }

    /// Sets one condition, by its name in the query.
    ///
    /// # Errors
    /// As [`Self::from_query`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), FilterError> {
        let refuse = |fix: &str| Err(FilterError(format!("{name}={value}: {fix}")));
        match name {
            "cidr" => match cidr(value) {
                Some(cidr) => self.cidr = Some(cidr),
                None => return refuse("write an address or a prefix, such as 10.0.0.0/8"),
            },
            "port" => match value.parse() {
                Ok(port) => self.port = Some(port),
                Err(_) => return refuse("write a number from 0 to 65535"),
            },
            "protocol" => match value {
                "tcp" => self.protocol = Some(value.into()),
                // An empty list would look like an answer.
                _ => return refuse("only tcp has connections; UDP and ICMP are in the metrics"),
            },
            "owner" => self.owner = Some(value.into()),
            "state" => match value {
                "open" => (self.open, self.closed) = (true, false),
                "closed" => (self.open, self.closed) = (false, true),
                "all" => (self.open, self.closed) = (true, true),
                _ => return refuse("write open, closed or all"),
            },
            "limit" => match value.parse() {
                Ok(limit) => self.limit = limit,
                Err(_) => return refuse("write a number"),
            },
            _ => {
                return Err(FilterError(format!(
                    "{name}: no such parameter; known: cidr, port, protocol, owner, state, limit"
                )));
            }
        }
        Ok(())
    }

    /// The query that [`Self::from_query`] reads back.
    #[must_use]
    pub fn to_query(&self) -> String {
        let mut pairs = Vec::new();
        if let Some((ip, bits)) = self.cidr {
            pairs.push(format!("cidr={ip}/{bits}"));
        }
        if let Some(port) = self.port {
            pairs.push(format!("port={port}"));
        }
        if let Some(protocol) = &self.protocol {
            pairs.push(format!("protocol={protocol}"));
        }
        if let Some(owner) = &self.owner {
            pairs.push(format!("owner={}", percent_encoded(owner)));
        }
        let state = match (self.open, self.closed) {
            (true, true) => "all",
            (false, true) => "closed",
            _ => "open",
        };
        pairs.push(format!("state={state}"));
        pairs.push(format!("limit={}", self.limit));
        pairs.join("&")
    }

    fn matches(&self, connection: &Connection, row: &Row) -> bool {
        let addresses = [address(&connection.local), address(&connection.remote)];
        let ports = [connection.local_port, connection.remote_port];
        self.cidr
            .is_none_or(|cidr| addresses.iter().any(|address| within(*address, cidr)))
            && self.port.is_none_or(|port| ports.contains(&port))
            && self.protocol.as_deref().is_none_or(|word| word == "tcp")
            && self.owner.as_deref().is_none_or(|word| row.is_of(word))
    }
}

/// One connection, as shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Socket cookie.
    pub cookie: u64,
    /// Network namespace; empty for the gateway's own.
    pub namespace: String,
    /// `tcp`.
    pub protocol: String,
    /// As `ss` prints it.
    pub state: String,
    /// Of a closed connection: how it ended.
    pub end: Option<String>,
    /// `client`, `upstream`, or null: not the gateway's.
    pub leg: Option<String>,
    /// Listener or upstream.
    pub endpoint: String,
    /// True when the host opened it. Of one from before the start: true unless its port is
    /// listened on.
    pub opened_here: bool,
    /// It was there before the gateway: its duration is since then, and what the programs count
    /// (zero windows, resets, drops, loss, reordering, whose it is) is not known.
    #[serde(default)]
    pub earlier: bool,
    /// Address and port.
    pub local: String,
    /// Address and port.
    pub remote: String,
    /// Since the SYN, or since it was accepted, microseconds; up to now or to its end.
    pub duration_us: u64,
    /// Null: never done, or not measured (the SYN-ACK had to be sent again).
    pub handshake_us: Option<u32>,
    /// Null: never measured.
    pub srtt_us: Option<u32>,
    /// Null: never measured.
    pub min_rtt_us: Option<u32>,
    /// Stream bytes the peer acknowledged.
    pub bytes_acked: u64,
    /// Stream bytes received.
    pub bytes_received: u64,
    /// Segments.
    pub segments_out: u32,
    /// Segments.
    pub segments_in: u32,
    /// Segments sent again.
    pub retransmits: u32,
    /// Segments marked lost; null where this kernel does not tell.
    pub lost: Option<u32>,
    /// Segments received out of order; null where this kernel does not tell.
    pub out_of_order: Option<u32>,
    /// Frames with window 0 that the host sent; counted on observed interfaces.
    pub zero_windows_sent: u32,
    /// Frames with window 0 that the peer sent; counted on observed interfaces.
    pub zero_windows_received: u32,
    /// Resets the host sent.
    pub resets_sent: u32,
    /// Resets the peer sent.
    pub resets_received: u32,
    /// Frames of this connection that this host dropped on receipt.
    pub drops: u32,
    /// Whose it is; null when unknown.
    pub owner: Option<OwnerRow>,
}

/// A process, as shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnerRow {
    /// In the initial pid namespace.
    pub pid: u32,
    /// Command of the thread that called.
    pub command: String,
    /// cgroup v2 path; null when it was gone before it was looked up.
    pub cgroup: Option<String>,
    /// 64 digits, when the cgroup's path shows one.
    pub container: Option<String>,
    /// `connect`: it called connect(). `listener`: it made the listening socket that accepted.
    /// `socket`: it made the socket.
    pub via: String,
}

impl Row {
    fn is_of(&self, word: &str) -> bool {
        let endpoint = self.endpoint == word;
        let Some(owner) = &self.owner else {
            return endpoint;
        };
        endpoint
            || owner.command == word
            || owner.pid.to_string() == word
            || owner.cgroup.as_deref() == Some(word)
            || owner
                .container
                .as_deref()
                .is_some_and(|id| word.len() >= 4 && id.starts_with(word))
    }
}

/// One event, as shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventLine {
    /// Monotonic nanoseconds, when it happened.
    pub timestamp_ns: u64,
    /// From there to here, nanoseconds.
    pub delay_ns: u64,
    /// `open`, `close`, `retransmit`, `drop`, `reset`.
    pub event: String,
    /// Network namespace; empty for the gateway's own.
    pub namespace: String,
    /// Socket cookie; 0 when no socket is known.
    pub cookie: u64,
    /// IP protocol number; 0 when not IP.
    pub protocol: u32,
    /// Host's address and port; of a drop: the source.
    pub local: String,
    /// Peer's address and port; of a drop: the destination.
    pub remote: String,
    /// Retransmit: segments. Reset: who sent it. Drop: the kernel's reason. Open: microseconds of
    /// the handshake.
    pub detail: String,
    /// Drop: bytes of the buffer.
    pub length: u32,
    /// Drop: interface index; 0 when unknown.
    pub ifindex: u32,
}

impl Connections {
    /// The rows a filter asks for, newest first.
    #[must_use]
    pub fn rows(&self, filter: &Filter, now_ns: u64) -> Vec<Row> {
        let mut connections = if filter.open { self.open() } else { Vec::new() };
        if filter.closed {
            connections.extend(self.memory().closed.iter().copied());
        }
        connections.sort_by_key(|connection| std::cmp::Reverse(connection.opened_ns));
        let mut rows = Vec::new();
        for connection in &connections {
            if rows.len() >= filter.limit {
                break;
            }
            let row = self.row(connection, now_ns);
            if filter.matches(connection, &row) {
                rows.push(row);
            }
        }
        rows
    }

    fn row(&self, connection: &Connection, now_ns: u64) -> Row {
        let Place { leg, endpoint } = self.place(connection);
        let over = connection.closed_ns != 0;
        let until = if over { connection.closed_ns } else { now_ns };
        let measured = |value: u32| (value != 0).then_some(value);
        let known = |value: u32| (value != UNKNOWN).then_some(value);
        Row {
            cookie: connection.cookie,
            namespace: self.namespace(connection.namespace),
            protocol: "tcp".into(),
            state: state_name(connection.state).into(),
            end: over.then(|| End::of(connection).as_str().into()),
            leg: leg.map(|leg| leg.as_str().into()),
            endpoint: endpoint.to_string(),
            opened_here: connection.active != 0,
            earlier: self.is_earlier(connection.cookie),
            local: socket(&connection.local, connection.local_port),
            remote: socket(&connection.remote, connection.remote_port),
            duration_us: until.saturating_sub(connection.opened_ns) / 1000,
            handshake_us: measured(connection.handshake_us),
            srtt_us: measured(connection.srtt_us),
            min_rtt_us: measured(connection.min_rtt_us),
            bytes_acked: connection.bytes_acked,
            bytes_received: connection.bytes_received,
            segments_out: connection.segments_out,
            segments_in: connection.segments_in,
            retransmits: connection.retransmits,
            lost: known(connection.lost),
            out_of_order: known(connection.out_of_order),
            zero_windows_sent: connection.zero_windows_sent,
            zero_windows_received: connection.zero_windows_received,
            resets_sent: connection.resets_sent,
            resets_received: connection.resets_received,
            drops: connection.drops,
            owner: self.owner(connection),
        }
    }

    fn owner(&self, connection: &Connection) -> Option<OwnerRow> {
        let process = &connection.process;
        let via = match (process.via, connection.active) {
            (via::CONNECT, _) => "connect",
            (via::SOCKET, 0) => "listener",
            (via::SOCKET, _) => "socket",
            _ => return None,
        };
        let end = process.command.iter().position(|byte| *byte == 0);
        let command = &process.command[..end.unwrap_or(process.command.len())];
        let cgroup = self.cgroups().path(process.cgroup);
        Some(OwnerRow {
            pid: process.pid,
            command: String::from_utf8_lossy(command).into_owned(),
            container: cgroup.as_deref().and_then(container).map(str::to_owned),
            cgroup,
            via: via.into(),
        })
    }

    /// Looks a new connection's cgroup up while it is there.
    pub(super) fn meet(&self, connection: &Connection) {
        let _ = self.cgroups().path(connection.process.cgroup);
    }

    fn cgroups(&self) -> std::sync::MutexGuard<'_, super::Cgroups> {
        self.cgroups
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The last events, oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<EventLine> {
        let events: Vec<(Event, u64)> = self.memory().events.iter().copied().collect();
        let lines = events.iter();
        lines
            .map(|(event, delay_ns)| self.line(event, *delay_ns))
            .collect()
    }

    fn line(&self, event: &Event, delay_ns: u64) -> EventLine {
        let head = event.head();
        let name = kind::NAMES
            .get(usize::try_from(head.kind).unwrap_or(0))
            .copied()
            .unwrap_or_default();
        match event {
            Event::Connection(event) => {
                let connection = &event.connection;
                EventLine {
                    timestamp_ns: head.timestamp_ns,
                    delay_ns,
                    event: name.into(),
                    namespace: self.namespace(connection.namespace),
                    cookie: connection.cookie,
                    protocol: 6,
                    local: socket(&connection.local, connection.local_port),
                    remote: socket(&connection.remote, connection.remote_port),
                    detail: connection.handshake_us.to_string(),
                    length: 0,
                    ifindex: 0,
                }
            }
            Event::Packet(event) => EventLine {
                timestamp_ns: head.timestamp_ns,
                delay_ns,
                event: name.into(),
                namespace: self.namespace(event.namespace),
                cookie: event.cookie,
                protocol: event.protocol,
                local: socket(&event.local, event.local_port),
                remote: socket(&event.remote, event.remote_port),
                detail: match head.kind {
                    kind::DROP => self.drop_reason(event.detail),
                    kind::RESET if event.detail == 1 => "sent".into(),
                    kind::RESET => "received".into(),
                    _ => event.detail.to_string(),
                },
                length: event.length,
                ifindex: event.ifindex,
            },
        }
    }
}

/// Which leg, as a label; empty when none.
#[must_use]
pub fn leg_word(leg: Option<Leg>) -> &'static str {
    leg.map_or("", Leg::as_str)
}

fn socket(bytes: &[u8; 16], port: u16) -> String {
    std::net::SocketAddr::new(address(bytes), port).to_string()
}

fn cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, bits) = match text.split_once('/') {
        Some((ip, bits)) => (ip, Some(u8::from_str(bits).ok()?)),
        None => (text, None),
    };
    let ip: IpAddr = ip.parse().ok()?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let bits = bits.unwrap_or(most);
    (bits <= most).then_some((ip, bits))
}

fn within(ip: IpAddr, (network, bits): (IpAddr, u8)) -> bool {
    let shifted = |value: u128, width: u32| {
        let drop = width - u32::from(bits);
        if drop >= 128 { 0 } else { value >> drop }
    };
    match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => {
            shifted(u32::from(ip).into(), 32) == shifted(u32::from(network).into(), 32)
        }
        (IpAddr::V6(ip), IpAddr::V6(network)) => {
            shifted(ip.into(), 128) == shifted(network.into(), 128)
        }
        _ => false,
    }
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = (*first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(if *first == b'+' { b' ' } else { *first });
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'/' | b':' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_understood_and_a_wrong_one_explained() {
        let filter = Filter::from_query(
            "cidr=10.1.0.0%2F16&port=443&protocol=tcp&owner=my%20app&state=all&limit=5",
        )
        .unwrap();
        assert_eq!(filter.cidr, Some(("10.1.0.0".parse().unwrap(), 16)));
        assert_eq!((filter.port, filter.limit), (Some(443), 5));
        assert_eq!(filter.owner.as_deref(), Some("my app"));
        assert!(filter.open && filter.closed);
        assert_eq!(Filter::from_query(&filter.to_query()), Ok(filter));
        assert_eq!(Filter::from_query("").unwrap(), Filter::default());
        for (query, says) in [
            ("cidr=10.0.0.0/33", "10.0.0.0/8"),
            ("cidr=x", "cidr=x"),
            ("port=70000", "65535"),
            ("protocol=udp", "only tcp"),
            ("state=half", "open, closed or all"),
            ("colour=red", "known: cidr"),
        ] {
            let error = Filter::from_query(query).unwrap_err().to_string();
            assert!(error.contains(says), "{query}: {error}");
        }
    }

    #[test]
    fn prefixes_hold_what_lies_in_them() {
        let within = |ip: &str, prefix: &str| within(ip.parse().unwrap(), cidr(prefix).unwrap());
        assert!(within("10.1.2.3", "10.0.0.0/8"));
        assert!(!within("11.1.2.3", "10.0.0.0/8"));
        assert!(within("10.1.2.3", "10.1.2.3"));
        assert!(within("10.1.2.3", "0.0.0.0/0"));
        assert!(within("fd00::1", "fd00::/64") && within("fd00::1", "::/0"));
        assert!(!within("fd00::1", "0.0.0.0/0"));
    }
}
