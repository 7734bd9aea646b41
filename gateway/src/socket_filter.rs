//! A listener's access list, acting in the kernel: a classic BPF program on the listening socket,
//! which turns a SYN away before there is a connection (`SO_ATTACH_FILTER`, socket(7)).
//!
//! The TC programs only observe: nothing they do changes a packet's fate, and they have counted a
//! frame before this program sees it. So the bytes of the refused are still in the ledger. The
//! proxy asks the same list again: it is right also where no program could be attached.
//!
//! Classic and not eBPF, because it needs no map, no pin and no privilege, and ends with its
//! socket: a process that dies leaves nothing behind that drops packets.

use std::{
    collections::HashSet,
    io,
    mem::ManuallyDrop,
    net::{SocketAddr, TcpListener},
    os::fd::{FromRawFd as _, RawFd},
};

use ipnet::IpNet;

use crate::config::{Access, Config};

/// Offsets from here on are from the packet's network header (`SKF_NET_OFF`).
const NETWORK_HEADER: u32 = 0xfff0_0000;
const SOURCE_V4: u32 = NETWORK_HEADER + 12;
const SOURCE_V6: u32 = NETWORK_HEADER + 8;
const PASS: u32 = u32::MAX;
const DROP: u32 = 0;
/// Index of the drops in what `SO_MEMINFO` answers (`SK_MEMINFO_DROPS`).
const MEMINFO_DROPS: usize = 8;

/// The program of a list.
#[must_use]
pub fn program(access: &Access) -> Vec<libc::sock_filter> {
    let v4 = family(access, |network| matches!(network, IpNet::V4(_)));
    let v6 = family(access, |network| matches!(network, IpNet::V6(_)));
    let mut all = vec![
        load_byte(NETWORK_HEADER),
        // The version is in the upper four bits.
        statement(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 4),
        jump_if_equal(4, 1, 0),
        // Farther than a conditional jump reaches.
        statement(
            libc::BPF_JMP | libc::BPF_JA,
            u32::try_from(v4.len()).unwrap_or(u32::MAX),
        ),
    ];
    all.extend(v4);
    all.extend(v6);
    all
}

/// The part for one address family; it ends with a verdict whatever the address.
fn family(access: &Access, of_it: impl Fn(&IpNet) -> bool) -> Vec<libc::sock_filter> {
    let mut part = Vec::new();
    for (networks, verdict) in [(&access.deny, DROP), (&access.allow, PASS)] {
        for network in networks.iter().filter(|network| of_it(network)) {
            part.extend(verdict_within(network, verdict));
        }
    }
    part.push(give(if access.allow.is_empty() { PASS } else { DROP }));
    part
}

/// Gives the verdict when the source is in the network, else goes on behind these instructions.
fn verdict_within(network: &IpNet, verdict: u32) -> Vec<libc::sock_filter> {
    let (source, words): (u32, Vec<u32>) = match network {
        IpNet::V4(v4) => (SOURCE_V4, vec![v4.network().to_bits()]),
        IpNet::V6(v6) => {
            let octets = v6.network().octets();
            let words = octets.chunks_exact(4).map(|chunk| {
                let word: [u8; 4] = chunk.try_into().unwrap_or_default();
                u32::from_be_bytes(word)
            });
            (SOURCE_V6, words.collect())
        }
    };
    let mut bits = u32::from(network.prefix_len());
    let mut groups = Vec::new();
    let mut offset = source;
    for word in words {
        if bits == 0 {
            break;
        }
        let counted = bits.min(32);
        let mut group = vec![load_word(offset)];
        if counted < 32 {
            let mask = !(u32::MAX >> counted);
            group.push(statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask));
        }
        groups.push((group, word));
        offset += 4;
        bits -= counted;
    }
    // From the last to the first: how far it is to the end is known then.
    let mut rest = vec![give(verdict)];
    for (mut group, word) in groups.into_iter().rev() {
        let end = u8::try_from(rest.len()).unwrap_or(u8::MAX);
        group.push(jump_if_equal(word, 0, end));
        group.append(&mut rest);
        rest = group;
    }
    rest
}

/// The listening sockets of this process at these addresses, each once however many descriptors
/// lead to it: a second hold is kept for another process.
///
/// # Errors
/// `/proc` cannot be read.
pub fn listening(addresses: &[SocketAddr]) -> io::Result<Vec<(SocketAddr, RawFd)>> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        let accepts: libc::c_int = match option(fd, libc::SO_ACCEPTCONN) {
            Ok(accepts) => accepts,
            // Not a socket, or closed since.
            Err(_) => continue,
        };
        if accepts == 0 {
            continue;
        }
        let address = local_address(fd).filter(|address| addresses.contains(address));
        let cookie: u64 = option(fd, libc::SO_COOKIE).unwrap_or(0);
        if let Some(address) = address.filter(|_| seen.insert(cookie)) {
            found.push((address, fd));
        }
    }
    Ok(found)
}

/// Brings the lists of a configuration onto its listening sockets; a listener without one gets rid
/// of an earlier one's. Returns how many listeners have none open yet.
///
/// # Errors
/// The kernel refuses a program, or `/proc` cannot be read.
pub fn apply(config: &Config) -> io::Result<usize> {
    let all: Vec<SocketAddr> = config.listeners.iter().map(|one| one.address).collect();
    let open = listening(&all)?;
    let mut missing = 0;
    for listener in &config.listeners {
        let access = &listener.protection.access;
        let mut here = open
            .iter()
            .filter(|(address, _)| *address == listener.address)
            .peekable();
        if here.peek().is_none() {
            missing += 1;
        }
        for &(_, fd) in here {
            if access.kernel {
                attach(fd, &program(access))?;
            } else {
                detach(fd)?;
            }
        }
    }
    Ok(missing)
}

/// Packets the kernel has dropped at the listening sockets of an address: by the list, or because
/// the accept queue was full.
///
/// # Errors
/// `/proc` cannot be read.
pub fn drops(address: SocketAddr) -> io::Result<u64> {
    let open = listening(&[address])?;
    let of = |fd| option::<[u32; 9]>(fd, libc::SO_MEMINFO).map_or(0, |info| info[MEMINFO_DROPS]);
    Ok(open.into_iter().map(|(_, fd)| u64::from(of(fd))).sum())
}

fn attach(fd: RawFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let mut instructions = program.to_vec();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(io::Error::other)?,
        filter: instructions.as_mut_ptr(),
    };
    set_option(fd, libc::SO_ATTACH_FILTER, &program)
}

fn detach(fd: RawFd) -> io::Result<()> {
    let nothing: libc::c_int = 0;
    match set_option(fd, libc::SO_DETACH_FILTER, &nothing) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

fn set_option<T>(fd: RawFd, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the value is readable for the length given; the kernel copies it, and what it points
    // to, before the call returns.
    let result = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            name,
            std::ptr::from_ref(value).cast(),
            length,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// A plain integer, or an array of them.
fn option<T: Copy + Default>(fd: RawFd, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the value is writable for the length given, and any bytes are a value of it: it is
    // only used with integers and arrays of them.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(value);
    }
    Err(io::Error::last_os_error())
}

fn local_address(fd: RawFd) -> Option<SocketAddr> {
    // SAFETY: never dropped, so the descriptor stays its owner's; it is only asked for its address,
    // and one that was closed since answers with an error.
    let listener = ManuallyDrop::new(unsafe { TcpListener::from_raw_fd(fd) });
    listener.local_addr().ok()
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: 0,
        jf: 0,
        k,
    }
}

fn load_byte(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, offset)
}

fn load_word(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn jump_if_equal(k: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    libc::sock_filter {
        jt: then,
        jf: otherwise,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k)
    }
}

fn give(verdict: u32) -> libc::sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, verdict)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NETWORKS_MAX;
    use std::net::IpAddr;

    /// What the kernel does with a program: the few instructions used here.
    fn run(program: &[libc::sock_filter], source: IpAddr) -> u32 {
        let header = match source {
            IpAddr::V4(v4) => [&[0x45; 12][..], &v4.octets()].concat(),
            IpAddr::V6(v6) => [&[0x60; 8][..], &v6.octets()].concat(),
        };
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let one = program[at];
            at += 1;
            let offset = usize::try_from(one.k.wrapping_sub(NETWORK_HEADER)).unwrap();
            match u32::from(one.code) {
                code if code == libc::BPF_LD | libc::BPF_B | libc::BPF_ABS => {
                    a = u32::from(header[offset]);
                }
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    a = u32::from_be_bytes(header[offset..offset + 4].try_into().unwrap());
                }
                code if code == libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K => a >>= one.k,
                code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => a &= one.k,
                code if code == libc::BPF_JMP | libc::BPF_JA => {
                    at += usize::try_from(one.k).unwrap();
                }
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    at += usize::from(if a == one.k { one.jt } else { one.jf });
                }
                code if code == libc::BPF_RET | libc::BPF_K => return one.k,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn access(allow: &[&str], deny: &[&str]) -> Access {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Access {
            allow: networks(allow),
            deny: networks(deny),
            kernel: true,
        }
    }

    #[test]
    fn the_program_says_what_the_list_says() {
        let lists = [
            access(&[], &[]),
            access(&[], &["192.0.2.0/24", "2001:db8::/33", "::1/128"]),
            access(&["10.0.0.0/8", "2001:db8:8000::/35"], &["10.6.6.0/23"]),
            access(&["10.0.0.0/8"], &[]),
            access(&["0.0.0.0/0"], &["203.0.113.7/32"]),
            access(&["::/0"], &["2001:db8::/127"]),
        ];
        let sources = [
            "192.0.2.1",
            "192.0.3.1",
            "10.6.6.1",
            "10.6.7.255",
            "10.6.8.0",
            "11.0.0.0",
            "203.0.113.7",
            "203.0.113.6",
            "2001:db8::",
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8:7fff::1",
            "2001:db8:8000::1",
            "2001:db8:a000::1",
            "::1",
        ];
        for list in &lists {
            let program = program(list);
            for source in sources {
                let source: IpAddr = source.parse().unwrap();
                let passed = run(&program, source) != DROP;
                assert_eq!(passed, list.permits(source), "{source} by {list:?}");
            }
        }
    }

    #[test]
    fn the_longest_list_fits_and_the_kernel_takes_it() {
        let networks = (0..NETWORKS_MAX).map(|n| format!("2001:db8::{n:x}/127"));
        let networks: Vec<IpNet> = networks.map(|text| text.parse().unwrap()).collect();
        let list = Access {
            allow: Vec::new(),
            deny: networks,
            kernel: true,
        };
        let program = program(&list);
        assert!(program.len() <= 4096, "{}", program.len());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let [(_, fd)] = listening(&[address]).unwrap()[..] else {
            panic!("one listening socket");
        };
        attach(fd, &program).unwrap();
        std::net::TcpStream::connect(address).unwrap();
        detach(fd).unwrap();
        detach(fd).unwrap();
    }
}
