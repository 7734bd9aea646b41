//! Numbers and addresses as text, for what is written with every request: without the formatter,
//! which takes a hundred instructions and more for each.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

/// A whole number in decimal.
pub fn number(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// An address without a port.
pub fn address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => dotted(out, v4, None),
        IpAddr::V6(v6) => {
            // Writing to memory cannot fail.
            let _ = write!(out, "{v6}");
        }
    }
}

/// An address with its port.
pub fn socket(out: &mut Vec<u8>, socket: SocketAddr) {
    match socket {
        SocketAddr::V4(v4) => dotted(out, *v4.ip(), Some(v4.port())),
        SocketAddr::V6(v6) => {
            // Writing to memory cannot fail.
            let _ = write!(out, "{v6}");
        }
    }
}

/// Thirty-two digits.
#[must_use]
pub fn hex(value: u128) -> [u8; 32] {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let mut text = [0; 32];
    for (at, byte) in value.to_be_bytes().into_iter().enumerate() {
        text[2 * at] = DIGITS[usize::from(byte >> 4)];
        text[2 * at + 1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

/// In one piece: `255.255.255.255:65535` is the longest.
fn dotted(out: &mut Vec<u8>, address: Ipv4Addr, port: Option<u16>) {
    let mut text = [0_u8; 24];
    let mut length = 0;
    let mut put = |byte: u8| {
        text[length] = byte;
        length += 1;
    };
    for (index, octet) in address.octets().into_iter().enumerate() {
        if index > 0 {
            put(b'.');
        }
        if octet >= 100 {
            put(b'0' + octet / 100);
        }
        if octet >= 10 {
            put(b'0' + octet / 10 % 10);
        }
        put(b'0' + octet % 10);
    }
    if let Some(port) = port {
        put(b':');
        itoa::Buffer::new().format(port).bytes().for_each(put);
    }
    out.extend_from_slice(&text[..length]);
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_the_formatter_writes_it(v4: u32, v6: u128, port: u16, id: u128) {
            for ip in [IpAddr::V4(v4.into()), IpAddr::V6(Ipv6Addr::from(v6))] {
                let mut out = Vec::new();
                address(&mut out, ip);
                prop_assert_eq!(std::str::from_utf8(&out).unwrap(), ip.to_string());
                let with_port = SocketAddr::new(ip, port);
                out.clear();
                socket(&mut out, with_port);
                prop_assert_eq!(std::str::from_utf8(&out).unwrap(), with_port.to_string());
            }
            let text = hex(id);
            prop_assert_eq!(std::str::from_utf8(&text).unwrap(), format!("{id:032x}"));
        }
    }

    #[test]
    fn the_shortest_and_the_longest() {
        for text in ["0.0.0.0:0", "255.255.255.255:65535", "1.20.100.9:10"] {
            let mut out = Vec::new();
            socket(&mut out, text.parse().unwrap());
            assert_eq!(std::str::from_utf8(&out).unwrap(), text);
        }
    }
}
