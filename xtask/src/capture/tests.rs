//! The parser on crafted bytes, the whole on a real cable.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::*;
use crate::host::{self, Tool};
use crate::netns::{GATEWAY_TO_CLIENT, Topology};

const A: Mac = [2, 0, 0, 0, 0, 0xa];
const B: Mac = [2, 0, 0, 0, 0, 0xb];

/// Ethernet with optional VLAN tag, IPv4, UDP ports 1000 to 2000.
fn frame(source: Mac, destination: Mac, vlan: bool) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    if vlan {
        bytes.extend([0x81, 0, 0, 7]);
    }
    bytes.extend([
        8, 0, 0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes.extend([0x03, 0xe8, 0x07, 0xd0, 0, 8, 0, 0]);
    bytes
}

/// A capture file in either byte order; each frame with its length on the wire.
fn file(magic: u32, big: bool, frames: &[(Vec<u8>, u32)]) -> Vec<u8> {
    let word = |value: u32| {
        if big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    };
    let mut bytes = word(magic).to_vec();
    // Version, zone, accuracy and snapshot length are not read.
    bytes.extend([0; 16]);
    bytes.extend(word(1));
    for (frame, on_wire) in frames {
        let captured = u32::try_from(frame.len()).unwrap();
        for value in [0, 0, captured, *on_wire] {
            bytes.extend(word(value));
        }
        bytes.extend(frame);
    }
    bytes
}

#[test]
fn both_byte_orders_and_both_clocks_read_the_same() -> Result<()> {
    let frames = [
        (frame(A, B, false), 1514),
        (frame(A, B, true), 1518),
        (frame(B, A, false), 60),
    ];
    for magic in [0xa1b2_c3d4, 0xa1b2_3c4d] {
        for big in [false, true] {
            let capture = pcap::sum_up(file(magic, big, &frames).as_slice())?;
            assert_eq!(
                capture.total(),
                Count {
                    frames: 3,
                    bytes: 3092
                }
            );
            assert_eq!(
                capture.sent_by(A),
                Count {
                    frames: 2,
                    bytes: 3032
                }
            );
            assert_eq!(
                capture.sent_to(A),
                Count {
                    frames: 1,
                    bytes: 60
                }
            );
            assert_eq!(capture.sent_by([0; 6]), Count::default());
            let flow = FiveTuple {
                protocol: 17,
                source: IpAddr::from([10, 0, 0, 1]),
                source_port: 1000,
                destination: IpAddr::from([10, 0, 0, 2]),
                destination_port: 2000,
            };
            // The crafted reply has the same IP header.
            assert_eq!(
                capture.flows()[&flow],
                Count {
                    frames: 3,
                    bytes: 3092
                }
            );
        }
    }
    Ok(())
}

#[test]
fn a_file_cut_anywhere_but_between_frames_is_an_error() -> Result<()> {
    let whole = file(0xa1b2_c3d4, false, &[(frame(A, B, false), 1514)]);
    assert_eq!(pcap::sum_up(whole.as_slice())?.total().frames, 1);
    assert_eq!(pcap::sum_up(&whole[..24])?.total().frames, 0);
    for length in (0..24).chain(25..whole.len()) {
        assert!(
            pcap::sum_up(&whole[..length]).is_err(),
            "cut to {length} bytes"
        );
    }
    Ok(())
}

#[test]
fn what_is_not_an_ethernet_capture_is_an_error() {
    assert!(pcap::sum_up([0; 24].as_slice()).is_err(), "magic");
    let mut cooked = file(0xa1b2_c3d4, false, &[]);
    cooked[20] = 113;
    assert!(pcap::sum_up(cooked.as_slice()).is_err(), "link type");
    let damaged = file(0xa1b2_c3d4, false, &[(frame(A, B, false), 10)]);
    assert!(
        pcap::sum_up(damaged.as_slice()).is_err(),
        "longer than on the wire"
    );
    let stub = file(0xa1b2_c3d4, false, &[(vec![0; 11], 11)]);
    assert!(pcap::sum_up(stub.as_slice()).is_err(), "no Ethernet header");
}

#[test]
fn fragments_and_strangers_count_but_have_no_flow() -> Result<()> {
    let mut fragment = frame(A, B, false);
    fragment[20] = 0x20;
    let mut icmp = frame(A, B, false);
    icmp[23] = 1;
    let mut arp = frame(A, B, false);
    arp[13] = 6;
    let frames = [fragment, icmp, arp].map(|frame| (frame, 42));
    let capture = pcap::sum_up(file(0xa1b2_c3d4, false, &frames).as_slice())?;
    assert_eq!(capture.total().frames, 3);
    assert!(capture.flows().is_empty());
    Ok(())
}

#[test]
fn a_capture_must_say_that_it_is_complete() {
    let said = |line: &str| check_complete(&[line.to_owned()]);
    assert!(said("0 packets dropped by kernel").is_ok());
    assert!(said("10 packets dropped by kernel").is_err());
    assert!(said("5 packets captured").is_err());
}

/// Known datagrams through a real cable, both directions, both IP versions: the capture has
/// every byte and not one more.
#[test]
fn the_far_end_sees_every_byte() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP, Tool::ETHTOOL, Tool::TCPDUMP])?;
    const DATAGRAMS: u64 = 200;
    const ETHERNET_AND_UDP: u64 = 14 + 8;

    let topology = Topology::three_hosts(&Namespace::unique_prefix("em-test-capture"))?;
    let link = GATEWAY_TO_CLIENT;
    let far_end = FarEnd::start(&topology.client, link.far_device)?;
    let mut expected = BTreeMap::new();
    for (near, far, ip_header) in [
        (IpAddr::from(link.v4), IpAddr::from(link.far_v4), 20),
        (link.v6.into(), link.far_v6.into(), 40),
    ] {
        let gateway = topology
            .gateway
            .run(|| UdpSocket::bind(SocketAddr::new(near, 0)))??;
        let client = topology
            .client
            .run(|| UdpSocket::bind(SocketAddr::new(far, 0)))??;
        for (from, to) in [(&gateway, &client), (&client, &gateway)] {
            let mut count = Count::default();
            for payload in 1..=DATAGRAMS {
                let datagram = vec![0x5a; usize::try_from(payload)?];
                from.send_to(&datagram, to.local_addr()?)?;
                count.frames += 1;
                count.bytes += payload + ETHERNET_AND_UDP + ip_header;
            }
            let flow = FiveTuple {
                protocol: 17,
                source: from.local_addr()?.ip(),
                source_port: from.local_addr()?.port(),
                destination: to.local_addr()?.ip(),
                destination_port: to.local_addr()?.port(),
            };
            expected.insert(flow, count);
        }
    }
    let capture = far_end.stop()?;
    assert_eq!(*capture.flows(), expected);
    // The cable is silent: there is nothing on it but what we sent.
    let both_ways: u64 = expected.values().map(|count| count.bytes).sum();
    let one_way = Count {
        frames: 2 * DATAGRAMS,
        bytes: both_ways / 2,
    };
    assert_eq!(capture.sent_by(link.mac), one_way);
    assert_eq!(capture.sent_to(link.mac), one_way);
    assert_eq!(capture.total().bytes, both_ways);
    Ok(())
}

#[test]
fn a_missing_interface_is_told() -> Result<()> {
    host::require_root("this test")?;
    host::need(&[Tool::IP, Tool::TCPDUMP])?;
    let namespace = Namespace::create(&Namespace::unique_prefix("em-test-nodev"))?;
    let error = FarEnd::start(&namespace, "absent0").expect_err("there is no such interface");
    assert!(error.to_string().contains("absent0"), "{error:#}");
    Ok(())
}
