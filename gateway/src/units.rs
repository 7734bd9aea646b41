//! Byte counts that must not be mixed up. Wire bytes are what an interface moved; payload bytes
//! are what HTTP carried. There is no conversion between them, and none to money except
//! [`crate::money::Rate`].

use std::ops::{Add, AddAssign};

macro_rules! byte_count {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

byte_count! {
    /// Layer-2 bytes without the frame check sequence: headers, TLS and retransmits included.
    WireBytes
}
byte_count! {
    /// HTTP body bytes.
    PayloadBytes
}
