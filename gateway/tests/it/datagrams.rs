//! UDP in large pieces: one send that the kernel cuts into datagrams (GSO), datagrams that it puts
//! together for one receive (GRO). The programs see the large piece, the wire carries the frames.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use xtask::{
    capture::FiveTuple,
    netns::{GATEWAY_TO_CLIENT, Namespace},
};

use crate::{
    flows::{exact, listing},
    harness::{Setup, Site, assert_equal_to_far_end},
    talk::option,
};

/// Payload of a datagram; the last one of a send is shorter.
const SEGMENT: u16 = 1_200;
/// Sends in each direction.
const SENDS: usize = 40;
const LAST: usize = 77;
/// A large piece: 20 whole datagrams and a short one.
const PIECE: usize = 20 * SEGMENT as usize + LAST;
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
const SOL_UDP: libc::c_int = 17;

fn socket(namespace: &Namespace, address: SocketAddr) -> UdpSocket {
    let bound = namespace.run(|| UdpSocket::bind(address).unwrap()).unwrap();
    bound
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let room: libc::c_int = 4 << 20;
    option(
        bound.as_raw_fd(),
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        &room,
    );
    let one: libc::c_int = 1;
    option(bound.as_raw_fd(), SOL_UDP, UDP_GRO, &one);
    bound
}

/// Sends large pieces and waits for them. Returns the most that came in one receive.
fn talk(from: &UdpSocket, to: &UdpSocket) -> usize {
    let segment = libc::c_int::from(SEGMENT);
    option(from.as_raw_fd(), SOL_UDP, UDP_SEGMENT, &segment);
    let mut largest = 0;
    let mut buffer = vec![0; 65_536];
    for _ in 0..SENDS {
        let sent = from
            .send_to(&[0x5a; PIECE], to.local_addr().unwrap())
            .unwrap();
        assert_eq!(sent, PIECE);
        let mut received = 0;
        while received < PIECE {
            let (more, _) = to.recv_from(&mut buffer).unwrap();
            largest = largest.max(more);
            received += more;
        }
        assert_eq!(received, PIECE);
    }
    largest
}

#[test]
fn every_datagram_of_a_large_send_and_of_a_large_receive_is_a_frame() {
    let site = Site::start("gs", &Setup::default());
    let captures = site.captures();
    let mut pairs = Vec::new();
    for (near, far) in [
        (
            IpAddr::from(GATEWAY_TO_CLIENT.v4),
            IpAddr::from(GATEWAY_TO_CLIENT.far_v4),
        ),
        (GATEWAY_TO_CLIENT.v6.into(), GATEWAY_TO_CLIENT.far_v6.into()),
    ] {
        let near = socket(&site.hosts.gateway, (near, 9_800).into());
        let far = socket(&site.hosts.client, (far, 9_801).into());
        // The far end merges nothing, so that its capture has what the wire carried.
        assert_eq!(talk(&near, &far), usize::from(SEGMENT));
        let merged = talk(&far, &near);
        assert!(
            merged > usize::from(SEGMENT),
            "nothing was merged on the way in: {merged} B at once"
        );
        pairs.push((near.local_addr().unwrap(), far.local_addr().unwrap()));
    }
    site.quiet();
    let [capture, _] = captures.map(|capture| capture.stop().unwrap());
    let listing = listing(&site, "100");
    exact(&listing);
    let rows = listing["flows"].as_array().unwrap();
    for (near, far) in pairs {
        let row = rows
            .iter()
            .find(|row| row["local"] == near.to_string() && row["remote"] == far.to_string());
        let row = row.unwrap_or_else(|| panic!("{near} {far}: {listing}"));
        for (from, to, frames, bytes) in [
            (near, far, "tx_frames", "tx_bytes"),
            (far, near, "rx_frames", "rx_bytes"),
        ] {
            let truth = capture.flows()[&FiveTuple {
                protocol: 17,
                source: from.ip(),
                source_port: from.port(),
                destination: to.ip(),
                destination_port: to.port(),
            }];
            assert_eq!(truth.frames, 21 * SENDS as u64, "{from} {to}");
            assert_eq!(row[frames], truth.frames, "{from} {to}");
            assert_eq!(row[bytes], truth.bytes, "{from} {to}");
        }
    }
    assert_equal_to_far_end(&site.ledger().0, &GATEWAY_TO_CLIENT, &capture);
}
