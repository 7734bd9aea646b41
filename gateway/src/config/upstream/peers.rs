//! The servers of an upstream, and what chooses between them.

use std::num::NonZeroU16;
use std::ops::Range;

use toml::Spanned;

use super::raw::{RawHash, RawUpstream};
use super::{Balance, HashKey, Peer, PeerAddress};
use crate::config::check::{Checker, Seen};
use crate::config::fields::example;
use crate::config::raw::RawPeer;

impl Checker<'_> {
    pub(super) fn peers(&mut self, raw: &RawUpstream, here: &str) -> Option<Vec<Peer>> {
        if raw.peers.get_ref().is_empty() {
            let fix = format!("write such as `{}`", example(here).unwrap_or_default());
            self.report(raw.peers.span(), here, "is empty", fix);
            return None;
        }
        let mut seen = Seen::default();
        let checked: Vec<Option<Peer>> = raw
            .peers
            .get_ref()
            .iter()
            .enumerate()
            .map(|(index, peer)| {
                let here = format!("{here}[{index}]");
                let (text, at, field, weight) = match peer.get_ref() {
                    RawPeer::Address(text) => (text, peer.span(), here.clone(), Some(1)),
                    RawPeer::Weighted(raw) => {
                        let weight = format!("{here}.weight");
                        let weight = self.number(raw.weight.as_ref(), &weight, 1..=1_000, 1);
                        let address = &raw.address;
                        let field = format!("{here}.address");
                        (address.get_ref(), address.span(), field, weight)
                    }
                };
                let address = self.peer_address(text, at.clone(), &field)?;
                let fix = "delete it; use `weight` for a larger share";
                self.unique(&mut seen, address.to_string(), at, &field, fix)?;
                Some(Peer {
                    address,
                    weight: weight.and_then(NonZeroU16::new)?,
                })
            })
            .collect();
        checked.into_iter().collect()
    }

    /// An address, or a host name with a port.
    fn peer_address(&mut self, text: &str, at: Range<usize>, field: &str) -> Option<PeerAddress> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        let address = match text.rsplit_once(':') {
            // A name has a letter in its last label; what has none is an address, if a wrong one.
            Some((host, port))
                if host.split('.').all(label)
                    && host.rsplit('.').next().is_some_and(|last| {
                        last.bytes().any(|byte| byte.is_ascii_alphabetic())
                    })
                    && port.parse::<u16>().is_ok() =>
            {
                PeerAddress::Name {
                    host: host.to_ascii_lowercase().into(),
                    port: port.parse().unwrap_or_default(),
                }
            }
            _ => PeerAddress::Socket(self.address(text, at.clone(), field)?),
        };
        let port = match &address {
            PeerAddress::Socket(address) => address.port(),
            PeerAddress::Name { port, .. } => *port,
        };
        if port == 0 {
            let fix = "write the port the server listens on";
            self.report(at, field, "port 0 cannot be connected to", fix);
            return None;
        }
        Some(address)
    }

    pub(super) fn balance(&mut self, raw: &RawUpstream, here: &str) -> Option<Balance> {
        let hash = match &raw.hash {
            Some(hash) => Some(self.hash_key(hash, &format!("{here}.hash"))?),
            None => None,
        };
        let Some(text) = &raw.balance else {
            return Some(hash.map_or(Balance::LeastRequest, Balance::Hash));
        };
        let field = format!("{here}.balance");
        let chosen = self.choice(
            text,
            &field,
            &[("least-request", 0), ("round-robin", 1), ("hash", 2)],
        )?;
        match (chosen, hash) {
            (0, None) => Some(Balance::LeastRequest),
            (1, None) => Some(Balance::RoundRobin),
            (2, Some(key)) => Some(Balance::Hash(key)),
            (2, None) => {
                let fix = "add such as `hash = { cookie = \"uid\" }`";
                self.report(text.span(), field, "does not say what is hashed", fix);
                None
            }
            _ => {
                let fix = "write `balance = \"hash\"` or delete `hash`";
                self.report(text.span(), field, "stands beside `hash`", fix);
                None
            }
        }
    }

    fn hash_key(&mut self, raw: &Spanned<RawHash>, here: &str) -> Option<HashKey> {
        let table = raw.get_ref();
        match (&table.header, &table.cookie, table.source) {
            (Some(text), None, None) => self
                .header_name(text, &format!("{here}.header"))
                .map(HashKey::Header),
            (None, Some(text), None) => Some(HashKey::Cookie(text.get_ref().as_str().into())),
            (None, None, Some(true)) => Some(HashKey::Source),
            _ => {
                let fix = "write one of `header`, `cookie` and `source = true`";
                self.report(raw.span(), here, "does not name one thing to hash", fix);
                None
            }
        }
    }
}
