//! What the running kernel's own BTF says: where structure members lie, what drop reasons are
//! called. Stands in for CO-RE relocations, which Rust does not emit.

use std::{collections::HashMap, fs::File, io, ops::Deref, os::fd::AsRawFd as _, path::Path};

use flow_abi::KernelLayout;

/// The kernel's types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_INT: u32 = 1;
const KIND_ENUM64: u32 = 19;

/// Offsets and names, as far as this kernel has them.
#[derive(Clone, Debug, Default)]
pub struct KernelTypes {
    /// For the programs.
    pub layout: KernelLayout,
    /// `skb_drop_reason` by number, in lower case and without the prefix.
    pub drop_reasons: HashMap<u32, String>,
}

impl KernelTypes {
    /// Reads the running kernel's types.
    ///
    /// # Errors
    /// There is no BTF, or it is not what this parser knows.
    pub fn read() -> io::Result<Self> {
        let bytes = types()?;
        Self::parse(&bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{VMLINUX} is not BTF"))
        })
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let btf = Btf::parse(bytes)?;
        let at = |structure: &str, member: &str| btf.offset(structure, member).unwrap_or(0);
        let layout = KernelLayout {
            tcp_out_of_order: at("tcp_sock", "rcv_ooopack"),
            tcp_lost: at("tcp_sock", "lost"),
            sock_namespace: at("sock_common", "skc_net"),
            namespace_cookie: at("net", "net_cookie"),
            device_namespace: at("net_device", "nd_net"),
            device_index: at("net_device", "ifindex"),
            skb_device: at("sk_buff", "dev"),
            skb_socket: at("sk_buff", "sk"),
            skb_len: at("sk_buff", "len"),
            skb_head: at("sk_buff", "head"),
            skb_network_header: at("sk_buff", "network_header"),
            skb_protocol: at("sk_buff", "protocol"),
            // The first parameter is the tracepoint's own; then skb, location, reason, socket.
            drop_names_socket: u32::from(btf.parameters("btf_trace_kfree_skb") == Some(5)),
        };
        let drop_reasons = btf
            .values("skb_drop_reason")
            .into_iter()
            .map(|(value, name)| {
                let name = name.trim_start_matches("SKB_DROP_REASON_");
                (value, name.to_lowercase())
            })
            .collect();
        Some(Self {
            layout,
            drop_reasons,
        })
    }
}

/// The kernel's types as they are.
pub(super) fn types() -> io::Result<Blob> {
    Blob::read(Path::new(VMLINUX))
}

/// What is looked for: a start waits for it, and a kernel has more than a hundred thousand types.
const WANTED: [(u32, &str); 7] = [
    (KIND_STRUCT, "tcp_sock"),
    (KIND_STRUCT, "sock_common"),
    (KIND_STRUCT, "net"),
    (KIND_STRUCT, "net_device"),
    (KIND_STRUCT, "sk_buff"),
    (KIND_ENUM, "skb_drop_reason"),
    (KIND_TYPEDEF, "btf_trace_kfree_skb"),
];

/// The file, mapped where the kernel lets it be (Linux 6.16): reading 5 MiB page by page takes
/// longer than parsing them.
pub(super) enum Blob {
    Mapped(*const u8, usize),
    Read(Vec<u8>),
}

impl Blob {
    fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        // SAFETY: a fresh private mapping of `len` bytes, which stay as they are while the kernel
        // runs; it refuses a length of zero.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return std::fs::read(path).map(Self::Read);
        }
        Ok(Self::Mapped(base.cast(), len))
    }
}

impl Deref for Blob {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: what `read` mapped, for as long as this lives.
            Self::Mapped(base, len) => unsafe { std::slice::from_raw_parts(*base, *len) },
            Self::Read(bytes) => bytes,
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if let Self::Mapped(base, len) = self {
            // SAFETY: what `read` mapped.
            unsafe { libc::munmap(base.cast_mut().cast(), *len) };
        }
    }
}

/// `include/uapi/linux/btf.h`: a header, types one after the other, strings.
struct Btf<'a> {
    bytes: &'a [u8],
    /// Where each type starts; number 0 is void.
    types: Vec<u32>,
    strings: usize,
    /// Where those of [`WANTED`] are.
    found: [Option<usize>; WANTED.len()],
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        const MAGIC: u16 = 0xeb9f;
        let mut btf = Self {
            bytes,
            types: vec![0],
            strings: 0,
            found: [None; WANTED.len()],
        };
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = btf.word(4)?;
        let mut at = header + btf.word(8)?;
        let end = at + btf.word(12)?;
        btf.strings = header + btf.word(16)?;
        while at < end {
            let (kind, count) = btf.kind(at)?;
            btf.types.push(u32::try_from(at).ok()?);
            if matches!(kind, KIND_STRUCT | KIND_ENUM | KIND_TYPEDEF) {
                let name = btf.strings + btf.word(at)?;
                for (found, (wanted_kind, wanted)) in btf.found.iter_mut().zip(WANTED) {
                    if kind == wanted_kind && found.is_none() && is_named(bytes, name, wanted) {
                        *found = Some(at);
                    }
                }
            }
            at += 12
                + match kind {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * count,
                    KIND_ENUM | KIND_FUNC_PROTO => 8 * count,
                    _ => 0,
                };
        }
        Some(btf)
    }

    fn word(&self, at: usize) -> Option<usize> {
        let bytes = self.bytes.get(at..at + 4)?;
        usize::try_from(u32::from_ne_bytes(bytes.try_into().ok()?)).ok()
    }

    fn kind(&self, at: usize) -> Option<(u32, usize)> {
        let info = self.word(at + 4)?;
        Some((u32::try_from(info >> 24 & 0x1f).ok()?, info & 0xffff))
    }

    fn string(&self, offset: usize) -> Option<&'a str> {
        let bytes = self.bytes.get(self.strings + offset..)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&bytes[..end]).ok()
    }

    fn find(&self, kind: u32, name: &str) -> Option<usize> {
        let number = WANTED.iter().position(|wanted| *wanted == (kind, name))?;
        self.found[number]
    }

    /// Byte offset of a member, also of an anonymous structure inside.
    fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let at = self.find(KIND_STRUCT, structure)?;
        u32::try_from(self.member(at, member, 0)?).ok()
    }

    fn member(&self, at: usize, wanted: &str, depth: u32) -> Option<usize> {
        let (kind, count) = self.kind(at)?;
        if !matches!(kind, KIND_STRUCT | KIND_UNION) || depth > 8 {
            return None;
        }
        for index in 0..count {
            let entry = at + 12 + 12 * index;
            let name = self.string(self.word(entry)?)?;
            let offset = (self.word(entry + 8)? & 0x00ff_ffff) / 8;
            if name == wanted {
                return Some(offset);
            }
            if name.is_empty()
                && let Some(inside) = self.resolve(self.word(entry + 4)?)
                && let Some(more) = self.member(inside, wanted, depth + 1)
            {
                return Some(offset + more);
            }
        }
        None
    }

    /// Through const, volatile, restrict, typedef and type tags.
    fn resolve(&self, mut number: usize) -> Option<usize> {
        for _ in 0..16 {
            let at = usize::try_from(*self.types.get(number)?).ok()?;
            match self.kind(at)?.0 {
                8..=11 | 18 => number = self.word(at + 8)?,
                _ => return Some(at),
            }
        }
        None
    }

    fn values(&self, enumeration: &str) -> Vec<(u32, &'a str)> {
        let Some(at) = self.find(KIND_ENUM, enumeration) else {
            return Vec::new();
        };
        let count = self.kind(at).map_or(0, |(_, count)| count);
        (0..count)
            .filter_map(|index| {
                let entry = at + 12 + 8 * index;
                let value = u32::try_from(self.word(entry + 4)?).ok()?;
                Some((value, self.string(self.word(entry)?)?))
            })
            .collect()
    }

    /// Number of parameters of the function a typedef points to.
    fn parameters(&self, typedef: &str) -> Option<usize> {
        let at = self.find(KIND_TYPEDEF, typedef)?;
        let pointer = self.resolve(self.word(at + 8)?)?;
        let function = self.resolve(self.word(pointer + 8)?)?;
        let (kind, count) = self.kind(function)?;
        (kind == KIND_FUNC_PROTO).then_some(count)
    }
}

/// Whether this string is there, with its end.
fn is_named(bytes: &[u8], at: usize, name: &str) -> bool {
    let there = bytes.get(at..at + name.len() + 1);
    there.is_some_and(|there| there.strip_prefix(name.as_bytes()) == Some(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_mapped_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // The kernel maps nothing that is empty.
        assert!(matches!(Blob::read(file.path()), Ok(Blob::Read(ref bytes)) if bytes.is_empty()));
        std::fs::write(file.path(), b"types").unwrap();
        assert_eq!(&*Blob::read(file.path()).unwrap(), b"types");
        assert!(Blob::read(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn the_running_kernels_types_are_found() {
        let types = KernelTypes::read().unwrap();
        let layout = types.layout;
        // A pointer and the two before it, on every 64-bit kernel there has been.
        assert_eq!((layout.skb_device, layout.skb_socket), (16, 24));
        for (what, offset) in [
            ("tcp_sock.rcv_ooopack", layout.tcp_out_of_order),
            ("tcp_sock.lost", layout.tcp_lost),
            ("sock_common.skc_net", layout.sock_namespace),
            ("net.net_cookie", layout.namespace_cookie),
            ("net_device.nd_net", layout.device_namespace),
            ("sk_buff.network_header", layout.skb_network_header),
        ] {
            assert_ne!(offset, 0, "{what}");
        }
        let tcp = types
            .drop_reasons
            .values()
            .any(|name| name == "netfilter_drop");
        assert!(tcp, "{:?}", types.drop_reasons);
    }

    #[test]
    fn what_is_not_btf_is_refused() {
        assert!(KernelTypes::parse(b"").is_none());
        assert!(KernelTypes::parse(&[0; 64]).is_none());
        let cut: Vec<u8> = vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0];
        assert!(KernelTypes::parse(&cut).is_none());
    }
}
