//! The reference: what must grow, by what etherparse finds.

use etherparse::ether_type::{
    IPV4, IPV6, MACSEC, PROVIDER_BRIDGING, VLAN_DOUBLE_TAGGED_FRAME, VLAN_TAGGED_FRAME,
};
use etherparse::ip_number::{
    AUTH, ICMP, IPV6_DEST_OPTIONS, IPV6_FRAG, IPV6_HOP_BY_HOP, IPV6_ICMP as ICMP6, IPV6_ROUTE, TCP,
    UDP,
};
use etherparse::{
    EtherType, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6RawExtHeaderSlice,
    LaxIpv6Slice, LaxLinkExtSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice, TcpSlice, UdpSlice,
};
use flow_abi::{FlowKey, cell};

use super::frames::Frame;
use super::{LOOPBACK, number};

/// Where the kernel program and etherparse differ, by design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rule {
    /// At most two tags are looked behind (QinQ); etherparse takes three off.
    ThirdTag,
    /// 0x9100 is no standard's, and Linux makes no VLAN device of it: a tag to etherparse only.
    Tag9100,
    /// A MACsec frame is not for this interface's flows: the MACsec device above has them.
    Macsec,
    /// The ethertype decides the IP version, as in the stack; etherparse believes the nibble.
    VersionMismatch,
    /// An authenticated packet is another protocol (ESP is, too); etherparse looks behind it.
    Authentication,
    /// Hop-by-hop options in the wrong place are read all the same: the ports behind are real.
    LateHopByHop,
    /// At most six extension headers are looked behind, for the verifier wants a bound: a seventh
    /// is "another protocol".
    SevenExtensions,
    /// An IPv4 total length below the header's own is malformed (zero is a jumbo's); etherparse
    /// takes the frame's end instead.
    TotalBelowHeader,
    /// IPv4 options or an IPv6 extension are cut off, but the part that is there names a better
    /// reason (fragment, other protocol) than "unparsable".
    CutBehindReason,
    /// Payload goes to the end of the IP packet; etherparse ends it at the UDP length.
    UdpLength,
    /// A run of segments is payload to its end: the length field is one segment's, or zero.
    SegmentedLength,
}

/// Source and destination as on the wire, before they become local and remote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    source: [u8; 16],
    destination: [u8; 16],
    ports: [u16; 2],
    protocol: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Cell(usize),
    Flow { tuple: Tuple, header_len: usize },
}

#[derive(Clone, Debug)]
struct Headers {
    found: Found,
    pub(super) rules: Vec<Rule>,
}

impl Headers {
    fn cell(number: usize) -> Self {
        Self {
            found: Found::Cell(number),
            rules: Vec::new(),
        }
    }

    fn by(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }
}

/// What one frame adds in one direction.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) place: Place,
    pub(super) bytes: u64,
    pub(super) frames: u64,
    pub(super) payload: u64,
    pub(super) rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Cell(usize),
    Flow(FlowKey),
}

pub(super) fn expect(frame: &Frame, direction: usize) -> Expected {
    let bytes = &frame.bytes;
    let packet = LaxSlicedPacket::from_ethernet(bytes).unwrap();
    let tagged = link(&packet);
    let Headers { found, rules } = headers(bytes);

    let len = bytes.len();
    let mut expected = Expected {
        place: Place::Cell(0),
        bytes: number(len),
        frames: 1,
        payload: 0,
        rules,
    };
    let (tuple, header_len) = match found {
        Found::Cell(number) => {
            expected.place = Place::Cell(number);
            return expected;
        }
        Found::Flow { tuple, header_len } => (tuple, header_len),
    };
    let (source, destination) = (
        (tuple.source, tuple.ports[0]),
        (tuple.destination, tuple.ports[1]),
    );
    let (local, remote) = if direction == 0 {
        (destination, source)
    } else {
        (source, destination)
    };
    expected.place = Place::Flow(FlowKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        ifindex: LOOPBACK,
        protocol: tuple.protocol,
        reserved: [0; 3],
    });
    let end = tagged.map_or(len, |(_, offset)| {
        packet_end(&packet, offset).unwrap_or(len)
    });
    let by_length = end.min(len).saturating_sub(header_len);
    let behind = len.saturating_sub(header_len);
    if frame.gso_size != 0 && behind != 0 {
        // The kernel hands over a run of segments; the wire carries the headers of each.
        if by_length != behind {
            expected.rules.push(Rule::SegmentedLength);
        }
        expected.payload = number(behind);
        expected.frames = number(behind).div_ceil(u64::from(frame.gso_size));
        expected.bytes += (expected.frames - 1) * number(header_len);
    } else {
        expected.payload = number(by_length);
        if let Some(etherparse::TransportSlice::Udp(udp)) = &packet.transport
            && udp.payload().len() != by_length
        {
            expected.rules.push(Rule::UdpLength);
        }
    }
    expected
}

/// The IP ethertype behind the tags and where its packet begins, or why there is none.
fn link(packet: &LaxSlicedPacket<'_>) -> Result<(EtherType, usize), Headers> {
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
        panic!("fourteen bytes are an Ethernet header");
    };
    let mut ethertype = ethernet.ether_type();
    let mut tags = 0;
    for extension in &packet.link_exts {
        match extension {
            LaxLinkExtSlice::Vlan(tag) if ethertype != VLAN_DOUBLE_TAGGED_FRAME && tags < 2 => {
                ethertype = tag.ether_type();
                tags += 1;
            }
            LaxLinkExtSlice::Vlan(_) | LaxLinkExtSlice::Macsec(_) => break,
        }
    }
    let non_ip = Headers::cell(cell::NON_IP);
    match ethertype {
        VLAN_TAGGED_FRAME | PROVIDER_BRIDGING if tags == 2 => Err(non_ip.by(Rule::ThirdTag)),
        // Not taken off above: it is cut short.
        VLAN_TAGGED_FRAME | PROVIDER_BRIDGING => Err(Headers::cell(cell::UNPARSABLE)),
        VLAN_DOUBLE_TAGGED_FRAME => Err(non_ip.by(Rule::Tag9100)),
        MACSEC => Err(non_ip.by(Rule::Macsec)),
        IPV4 | IPV6 => Ok((ethertype, 14 + 4 * tags)),
        _ => Err(non_ip),
    }
}

/// Everything up to the layer-4 payload.
fn headers(frame: &[u8]) -> Headers {
    let packet = LaxSlicedPacket::from_ethernet(frame).unwrap();
    let (ethertype, offset) = match link(&packet) {
        Ok(found) => found,
        Err(why) => return why,
    };
    match (&packet.net, ethertype) {
        (Some(LaxNetSlice::Ipv4(ip)), IPV4) => {
            let header = ip.header();
            let options = header.slice().len();
            if let Some(cell) = ipv4_cell(header) {
                return cell;
            }
            layer4(
                mapped(header.source()),
                mapped(header.destination()),
                header.protocol(),
                ip.payload().payload,
                offset + options,
            )
        }
        (Some(LaxNetSlice::Ipv6(ip)), IPV6) => ipv6(ip, frame, offset),
        (Some(_), _) => Headers::cell(cell::UNPARSABLE).by(Rule::VersionMismatch),
        (None, IPV4) => {
            // Cut off. The fixed header may be there all the same, and say why it does not matter.
            let mut whole = frame[offset..].to_vec();
            let fixed = whole.len() >= 20;
            whole.resize(60, 0);
            match Ipv4HeaderSlice::from_slice(&whole) {
                Ok(header) if fixed => match ipv4_cell(header) {
                    Some(cell) if cell.found == Found::Cell(cell::UNPARSABLE) => cell,
                    Some(cell) => cell.by(Rule::CutBehindReason),
                    None => Headers::cell(cell::UNPARSABLE),
                },
                _ => Headers::cell(cell::UNPARSABLE),
            }
        }
        (None, _) => Headers::cell(cell::UNPARSABLE),
    }
}

/// The cell an IPv4 header alone is reason for.
fn ipv4_cell(header: Ipv4HeaderSlice<'_>) -> Option<Headers> {
    let total = usize::from(header.total_len());
    if total != 0 && total < header.slice().len() {
        Some(Headers::cell(cell::UNPARSABLE).by(Rule::TotalBelowHeader))
    } else if header.is_fragmenting_payload() {
        Some(Headers::cell(cell::FRAGMENT))
    } else if header.protocol() == AUTH {
        Some(Headers::cell(cell::OTHER_L4).by(Rule::Authentication))
    } else if matches!(header.protocol(), ICMP | ICMP6) {
        Some(Headers::cell(cell::ICMP))
    } else if !matches!(header.protocol(), TCP | UDP) {
        Some(Headers::cell(cell::OTHER_L4))
    } else {
        None
    }
}

fn ipv6(ip: &LaxIpv6Slice<'_>, frame: &[u8], offset: usize) -> Headers {
    // etherparse's own chain may stop early, and its iterator is then out of bounds: take the
    // headers one by one from what it takes for the IP packet.
    let extensions = ip.extensions().slice();
    let start = offset + 40;
    let end = start + extensions.len() + ip.payload().payload.len();
    let mut at = start;
    let mut next = ip.header().next_header();
    let mut walked = 0;
    let mut late = None;
    while is_extension(next) {
        let rest = &frame[at..end];
        if walked == 6 {
            return Headers::cell(cell::OTHER_L4).by(Rule::SevenExtensions);
        }
        if next == IPV6_HOP_BY_HOP && walked > 0 {
            late = Some(Rule::LateHopByHop);
        }
        if next == IPV6_FRAG {
            let Ok(head) = Ipv6FragmentHeaderSlice::from_slice(rest) else {
                return cut_extension(next, rest, walked);
            };
            if head.is_fragmenting_payload() {
                return Headers::cell(cell::FRAGMENT);
            }
            next = head.next_header();
            at += head.slice().len();
        } else {
            let Ok(head) = Ipv6RawExtHeaderSlice::from_slice(rest) else {
                return cut_extension(next, rest, walked);
            };
            next = head.next_header();
            at += head.slice().len();
        }
        walked += 1;
    }
    let mut found = match next {
        TCP | UDP => {
            if late.is_none() {
                // Then etherparse has come as far.
                assert_eq!(
                    (ip.payload().ip_number, extensions.len()),
                    (next, at - start)
                );
            }
            layer4(
                ip.header().source(),
                ip.header().destination(),
                next,
                &frame[at..end],
                at,
            )
        }
        AUTH => Headers::cell(cell::OTHER_L4).by(Rule::Authentication),
        ICMP | ICMP6 => Headers::cell(cell::ICMP),
        _ => Headers::cell(cell::OTHER_L4),
    };
    found.rules.extend(late);
    found
}

/// An extension header that does not fit: nothing follows it, but its first bytes may already be
/// reason for a cell.
fn cut_extension(kind: IpNumber, rest: &[u8], walked: usize) -> Headers {
    let mut whole = rest.to_vec();
    whole.resize(8 * 256, 0);
    let next = if kind == IPV6_FRAG {
        if rest.len() < 4 {
            return Headers::cell(cell::UNPARSABLE);
        }
        let head = Ipv6FragmentHeaderSlice::from_slice(&whole).unwrap();
        if head.is_fragmenting_payload() {
            return Headers::cell(cell::FRAGMENT).by(Rule::CutBehindReason);
        }
        head.next_header()
    } else {
        if rest.len() < 2 {
            return Headers::cell(cell::UNPARSABLE);
        }
        Ipv6RawExtHeaderSlice::from_slice(&whole)
            .unwrap()
            .next_header()
    };
    if matches!(next, TCP | UDP) || (is_extension(next) && walked + 1 < 6) {
        Headers::cell(cell::UNPARSABLE)
    } else if matches!(next, ICMP | ICMP6) {
        Headers::cell(cell::ICMP).by(Rule::CutBehindReason)
    } else {
        Headers::cell(cell::OTHER_L4).by(Rule::CutBehindReason)
    }
}

fn is_extension(number: IpNumber) -> bool {
    matches!(
        number,
        IPV6_HOP_BY_HOP | IPV6_DEST_OPTIONS | IPV6_ROUTE | IPV6_FRAG
    )
}

/// TCP or UDP at `offset` of the frame, with `rest` of the packet there.
fn layer4(
    source: [u8; 16],
    destination: [u8; 16],
    protocol: IpNumber,
    rest: &[u8],
    offset: usize,
) -> Headers {
    let flow = |ports, length| Headers {
        found: Found::Flow {
            tuple: Tuple {
                source,
                destination,
                ports,
                protocol: protocol.0,
            },
            header_len: offset + length,
        },
        rules: Vec::new(),
    };
    let tcp = |tcp: &TcpSlice<'_>| {
        flow(
            [tcp.source_port(), tcp.destination_port()],
            tcp.header_len(),
        )
    };
    if protocol == UDP {
        return UdpSlice::from_slice_lax(rest).map_or_else(
            |_| Headers::cell(cell::UNPARSABLE),
            |udp| flow([udp.source_port(), udp.destination_port()], 8),
        );
    }
    match TcpSlice::from_slice(rest) {
        Ok(found) => tcp(&found),
        Err(_) => Headers::cell(cell::UNPARSABLE),
    }
}

fn mapped(address: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets()
}

/// Where the IP packet ends within the frame by its own length field; None when that is zero.
fn packet_end(packet: &LaxSlicedPacket<'_>, offset: usize) -> Option<usize> {
    let length = match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => usize::from(ip.header().total_len()),
        LaxNetSlice::Ipv6(ip) => match ip.header().payload_length() {
            0 => 0,
            length => 40 + usize::from(length),
        },
        LaxNetSlice::Arp(_) => 0,
    };
    (length != 0).then_some(offset + length)
}
