//! Address prefixes, and the classes they make.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use super::check::{Checker, Seen};
use super::raw::RawClass;
use super::{Class, Name};
use crate::class::DEFAULT_NAME;

/// An address prefix without host bits, such as `10.0.0.0/8` or `2001:db8::/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// IPv4 is mapped.
    bits: u128,
    /// Of the mapped address: an IPv4 prefix has 96 more.
    length: u8,
}

/// Why a text is no prefix. [`fmt::Display`] says what is wrong, [`CidrError::fix`] what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// No slash, or no address before it.
    #[error("is not an address prefix")]
    Syntax,
    /// A bare address.
    #[error("has no prefix length")]
    NoLength(IpAddr),
    /// Longer than the address.
    #[error("has a prefix length above {0}")]
    Length(u8),
    /// Bits after the prefix are set: perhaps a typing mistake, so nothing is guessed.
    #[error("has bits set after its prefix")]
    HostBits(Cidr),
    /// An IPv4 prefix written as IPv6.
    #[error("is IPv4 written as IPv6")]
    Mapped,
}

impl CidrError {
    /// What to write instead.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Syntax => "write such as \"10.0.0.0/8\" or \"2001:db8::/32\"".into(),
            Self::NoLength(address) => {
                let all = if address.is_ipv4() { 32 } else { 128 };
                format!("write \"{address}/{all}\" for this one address")
            }
            Self::Length(most) => format!("write a length from 0 to {most}"),
            Self::HostBits(meant) => format!("write \"{meant}\""),
            Self::Mapped => "write the IPv4 prefix, such as \"10.0.0.0/8\"".into(),
        }
    }
}

/// `::ffff:0:0/96`.
const MAPPED: Cidr = Cidr {
    bits: 0xffff_0000_0000,
    length: 96,
};

impl Cidr {
    /// All of IPv4, as it lies in IPv6. An IPv6 prefix never holds an IPv4 address: whoever fills
    /// a table of mapped addresses puts this between them.
    pub const IPV4: Self = MAPPED;

    /// Leading bits that count, of the mapped address.
    #[must_use]
    pub fn length(self) -> u32 {
        u32::from(self.length)
    }

    /// The mapped address, network byte order.
    #[must_use]
    pub fn octets(self) -> [u8; 16] {
        self.bits.to_be_bytes()
    }

    fn masked(bits: u128, length: u8) -> Self {
        let mask = u128::MAX
            .checked_shl(128 - u32::from(length))
            .unwrap_or_default();
        Self {
            bits: bits & mask,
            length,
        }
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let Some((address, length)) = text.split_once('/') else {
            return Err(text.parse().map_or(CidrError::Syntax, CidrError::NoLength));
        };
        let address: IpAddr = address.parse().map_err(|_| CidrError::Syntax)?;
        let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        let (bits, most, extra) = match address {
            IpAddr::V4(v4) => (v4.to_ipv6_mapped().to_bits(), 32, 96),
            IpAddr::V6(v6) => (v6.to_bits(), 128, 0),
        };
        if !digits {
            return Err(CidrError::Syntax);
        }
        let length = length
            .parse::<u8>()
            .ok()
            .filter(|length| *length <= most)
            .ok_or(CidrError::Length(most))?;
        let cidr = Self::masked(bits, length + extra);
        if address.is_ipv6() && cidr.length >= MAPPED.length && Self::masked(bits, 96) == MAPPED {
            return Err(CidrError::Mapped);
        }
        if cidr.bits != bits {
            return Err(CidrError::HostBits(cidr));
        }
        Ok(cidr)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from_bits(self.bits);
        match address.to_ipv4_mapped() {
            Some(v4) if self.length >= 96 => write!(f, "{v4}/{}", self.length - 96),
            _ => write!(f, "{address}/{}", self.length),
        }
    }
}

impl Checker<'_> {
    pub(super) fn classes(&mut self, raw: &[RawClass]) -> Option<Vec<Class>> {
        let mut names = Seen::default();
        let mut prefixes: Seen<Cidr> = Seen::default();
        let classes: Vec<Option<Class>> = raw
            .iter()
            .enumerate()
            .map(|(index, raw)| {
                self.class(raw, &format!("classes[{index}]"), &mut names, &mut prefixes)
            })
            .collect();
        classes.into_iter().collect()
    }

    fn class<'r>(
        &mut self,
        raw: &'r RawClass,
        here: &str,
        names: &mut Seen<&'r str>,
        prefixes: &mut Seen<Cidr>,
    ) -> Option<Class> {
        let name = self.unique_name(names, &raw.name, &format!("{here}.name"));
        let reserved = name.as_ref().map(Name::as_str) == Some(DEFAULT_NAME);
        if reserved {
            let wrong = format!("\"{DEFAULT_NAME}\" is the class of addresses in no other");
            let fix = "write another name";
            self.report(raw.name.span(), format!("{here}.name"), wrong, fix);
        }
        if raw.cidrs.get_ref().is_empty() {
            let fix = r#"write such as `cidrs = ["0.0.0.0/0", "::/0"]`"#;
            self.report(raw.cidrs.span(), format!("{here}.cidrs"), "is empty", fix);
            return None;
        }
        let mut cidrs = Vec::new();
        for (index, text) in raw.cidrs.get_ref().iter().enumerate() {
            let field = format!("{here}.cidrs[{index}]");
            cidrs.push(match text.get_ref().parse::<Cidr>() {
                Ok(cidr) => self
                    .unique(prefixes, cidr, text.span(), &field, "keep it in one class")
                    .map(|()| cidr),
                Err(error) => {
                    let wrong = format!("\"{}\" {error}", text.get_ref());
                    self.report(text.span(), field, wrong, error.fix());
                    None
                }
            });
        }
        Some(Class {
            name: name.filter(|_| !reserved)?,
            cidrs: cidrs.into_iter().collect::<Option<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_what_they_say() {
        for (text, octets, length) in [
            ("0.0.0.0/0", "::ffff:0.0.0.0", 96),
            ("10.0.0.0/8", "::ffff:10.0.0.0", 104),
            ("10.1.2.3/32", "::ffff:10.1.2.3", 128),
            ("::/0", "::", 0),
            ("2001:db8::/32", "2001:db8::", 32),
            ("2001:db8::1/128", "2001:db8::1", 128),
        ] {
            let cidr: Cidr = text.parse().unwrap();
            assert_eq!(cidr.octets(), octets.parse::<Ipv6Addr>().unwrap().octets());
            assert_eq!(cidr.length(), length, "{text}");
            assert_eq!(cidr.to_string(), text);
        }
        assert_eq!(Cidr::IPV4, "0.0.0.0/0".parse().unwrap());
    }

    #[test]
    fn what_is_no_prefix_says_why_and_what_to_write() {
        for (text, wrong, fix) in [
            ("10.0.0.1", "has no prefix length", "\"10.0.0.1/32\""),
            ("fd00::1", "has no prefix length", "\"fd00::1/128\""),
            ("10.0.0.0/33", "above 32", "from 0 to 32"),
            ("fd00::/129", "above 128", "from 0 to 128"),
            ("10.0.0.0/999", "above 32", "from 0 to 32"),
            ("10.1.2.3/8", "bits set after its prefix", "\"10.0.0.0/8\""),
            ("::1/0", "bits set after its prefix", "\"::/0\""),
            ("::ffff:10.0.0.0/104", "IPv4 written as IPv6", "10.0.0.0/8"),
            ("10.0.0.0/", "is not an address prefix", "10.0.0.0/8"),
            ("10.0.0.0/+8", "is not an address prefix", "10.0.0.0/8"),
            ("internet", "is not an address prefix", "10.0.0.0/8"),
        ] {
            let error = text.parse::<Cidr>().unwrap_err();
            assert!(error.to_string().contains(wrong), "{text}: {error}");
            assert!(error.fix().contains(fix), "{text}: {}", error.fix());
        }
    }
}
