//! The classic capture file format, and as much of Ethernet and IP as a 5-tuple takes.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};

use super::Capture;

/// Timestamps in microseconds and nanoseconds; they are not read.
const MAGICS: [u32; 2] = [0xa1b2_c3d4, 0xa1b2_3c4d];
const LINK_TYPE_ETHERNET: u32 = 1;
/// No capture of ours keeps more of a frame; a larger length is a damaged file.
const CAPTURED_MAX: u32 = 1 << 18;

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
const ETHERNET_HEADER: usize = 14;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Who speaks to whom, in the direction of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FiveTuple {
    /// IP protocol: 6 for TCP, 17 for UDP.
    pub protocol: u8,
    /// Sender's address.
    pub source: IpAddr,
    /// Sender's port.
    pub source_port: u16,
    /// Receiver's address.
    pub destination: IpAddr,
    /// Receiver's port.
    pub destination_port: u16,
}

/// A TCP frame as the wire carried it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who speaks to whom.
    pub flow: FiveTuple,
    /// Sequence number of its first byte.
    pub seq: u32,
    /// The header's low byte of flags: FIN 1, SYN 2, RST 4, PSH 8, ACK 16.
    pub flags: u8,
    /// As written in the header, not scaled.
    pub window: u16,
    /// Payload bytes.
    pub payload: u64,
    /// Bytes of the whole frame.
    pub bytes: u64,
}

/// Reads a whole capture.
///
/// # Errors
/// When it is not a classic Ethernet capture, or ends inside a record.
pub(super) fn sum_up(mut file: impl Read) -> Result<Capture> {
    let mut header = [0; FILE_HEADER];
    file.read_exact(&mut header)
        .context("the capture has no complete header")?;
    let order = ByteOrder::of(&header)?;
    // The upper bits hold the length of a checksum, which Ethernet captures do not have.
    let link_type = order.u32(&header, 20) & 0x0fff_ffff;
    ensure!(
        link_type == LINK_TYPE_ETHERNET,
        "the capture is not of Ethernet: {link_type}"
    );

    let mut capture = Capture::default();
    let mut frame = vec![];
    for number in 1_u64.. {
        let mut record = [0; RECORD_HEADER];
        if !read_all_or_nothing(&mut file, &mut record)
            .with_context(|| format!("the capture ends in the header of frame {number}"))?
        {
            break;
        }
        let captured = order.u32(&record, 8);
        let on_wire = order.u32(&record, 12);
        ensure!(
            captured <= CAPTURED_MAX && captured <= on_wire,
            "frame {number} is damaged: {captured} bytes kept of {on_wire}"
        );
        frame.resize(usize::try_from(captured).context("frame length")?, 0);
        file.read_exact(&mut frame)
            .with_context(|| format!("the capture ends in frame {number}"))?;
        add(&mut capture, &frame, on_wire).with_context(|| format!("frame {number}"))?;
    }
    Ok(capture)
}

fn add(capture: &mut Capture, frame: &[u8], on_wire: u32) -> Result<()> {
    let destination = array(frame, 0).context("has no Ethernet header")?;
    let source = array(frame, 6).context("has no Ethernet header")?;
    capture.total.add(on_wire);
    capture
        .by_destination
        .entry(destination)
        .or_default()
        .add(on_wire);
    capture.by_source.entry(source).or_default().add(on_wire);
    if let Some((flow, at, end)) = five_tuple(frame) {
        capture.by_flow.entry(flow).or_default().add(on_wire);
        if flow.protocol == TCP {
            let segment = segment(frame, flow, at, end, on_wire);
            capture
                .segments
                .push(segment.context("has half a TCP header")?);
        }
    }
    Ok(())
}

/// The TCP header begins at `at`, the IP packet ends at `end`.
fn segment(frame: &[u8], flow: FiveTuple, at: usize, end: usize, on_wire: u32) -> Option<Segment> {
    let header = usize::from(frame.get(at + 12)? >> 4) * 4;
    Some(Segment {
        flow,
        seq: array(frame, at + 4).map(u32::from_be_bytes)?,
        flags: *frame.get(at + 13)?,
        window: u16_at(frame, at + 14)?,
        payload: end.checked_sub(at + header)? as u64,
        bytes: on_wire.into(),
    })
}

/// With where the layer above IP begins and where the packet ends. `None` for what has no ports,
/// or not in this frame.
fn five_tuple(frame: &[u8]) -> Option<(FiveTuple, usize, usize)> {
    let mut at = ETHERNET_HEADER;
    let mut kind = u16_at(frame, at - 2)?;
    // 802.1Q and 802.1ad tags, of which there are one or two.
    while matches!(kind, 0x8100 | 0x88a8) {
        at += 4;
        kind = u16_at(frame, at - 2)?;
    }
    let (protocol, source, destination, ports, end): (u8, IpAddr, IpAddr, usize, usize) = match kind
    {
        0x0800 => {
            let first = *frame.get(at)?;
            // More fragments follow, or this is not the first: the ports are in one only.
            if u16_at(frame, at + 6)? & 0x3fff != 0 {
                return None;
            }
            let source = Ipv4Addr::from(array::<4>(frame, at + 12)?);
            let destination = Ipv4Addr::from(array::<4>(frame, at + 16)?);
            let header = usize::from(first & 0x0f) * 4;
            (
                *frame.get(at + 9)?,
                source.into(),
                destination.into(),
                at + header,
                at + usize::from(u16_at(frame, at + 2)?),
            )
        }
        0x86dd => {
            let source = Ipv6Addr::from(array::<16>(frame, at + 8)?);
            let destination = Ipv6Addr::from(array::<16>(frame, at + 24)?);
            // An extension header is neither TCP nor UDP and ends below.
            (
                *frame.get(at + 6)?,
                source.into(),
                destination.into(),
                at + 40,
                at + 40 + usize::from(u16_at(frame, at + 4)?),
            )
        }
        _ => return None,
    };
    if !matches!(protocol, TCP | UDP) {
        return None;
    }
    let flow = FiveTuple {
        protocol,
        source,
        source_port: u16_at(frame, ports)?,
        destination,
        destination_port: u16_at(frame, ports + 2)?,
    };
    Some((flow, ports, end))
}

/// The writer's byte order, which the magic number shows.
#[derive(Clone, Copy)]
enum ByteOrder {
    Little,
    Big,
}

impl ByteOrder {
    fn of(header: &[u8; FILE_HEADER]) -> Result<Self> {
        for order in [Self::Little, Self::Big] {
            if MAGICS.contains(&order.u32(header, 0)) {
                return Ok(order);
            }
        }
        bail!(
            "not a classic capture file: it starts with {:02x?}",
            &header[..4]
        )
    }

    fn u32<const N: usize>(self, bytes: &[u8; N], at: usize) -> u32 {
        let word = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        match self {
            Self::Little => u32::from_le_bytes(word),
            Self::Big => u32::from_be_bytes(word),
        }
    }
}

/// False at a clean end of the file.
fn read_all_or_nothing(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}
