//! Consistent hashing: each peer has points on a ring, as many as it weighs; a key belongs to the
//! next point. A peer that comes or goes moves only the keys next to its points.

use std::net::SocketAddr;

/// Points for the least weight, at least.
const POINTS_MIN: u64 = 160;
/// Points in all, at most.
const POINTS_MAX: u64 = 200_000;

/// Sorted points, each with its peer's position.
#[derive(Debug)]
pub struct Ring(Vec<(u64, usize)>);

impl Ring {
    /// Places peers by address, so that every gateway has the same ring.
    pub fn new(peers: impl Iterator<Item = (SocketAddr, u64)>) -> Self {
        let peers: Vec<(SocketAddr, u64)> = peers.collect();
        let total: u64 = peers.iter().map(|(_, weight)| weight).sum();
        let least = peers
            .iter()
            .map(|(_, weight)| *weight)
            .min()
            .unwrap_or(1)
            .max(1);
        let mut points = Vec::new();
        for (position, (address, weight)) in peers.iter().enumerate() {
            let wanted = weight * POINTS_MIN / least;
            let count = wanted.min(weight * POINTS_MAX / total.max(1)).max(1);
            let name = address.to_string();
            let start = hash(name.as_bytes());
            points.extend((0..count).map(|n| (mix(start ^ mix(n + 1)), position)));
        }
        points.sort_unstable();
        Self(points)
    }

    /// Peers in the order in which a key prefers them; each may come more than once.
    pub fn walk(&self, key: u64) -> impl Iterator<Item = usize> {
        let at = self.0.partition_point(|(point, _)| *point < key);
        let around = self.0[at..].iter().chain(&self.0[..at]);
        around.map(|(_, position)| *position)
    }
}

/// FNV-1a, mixed: stable over restarts and machines.
pub fn hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(fnv)
}

/// The finalizer of splitmix64: every input bit moves every output bit.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(count: u16) -> Vec<(SocketAddr, u64)> {
        (0..count)
            .map(|n| {
                (
                    SocketAddr::from(([10, 0, 0, 1], 9000 + n)),
                    1 + u64::from(n % 2),
                )
            })
            .collect()
    }

    fn owner(ring: &Ring, key: u64) -> usize {
        ring.walk(mix(key)).next().unwrap()
    }

    #[test]
    fn keys_spread_by_weight() {
        let ring = Ring::new(peers(4).into_iter());
        let mut counts = [0_u32; 4];
        for key in 0..60_000 {
            counts[owner(&ring, key)] += 1;
        }
        for (count, expected) in counts.iter().zip([10_000_u32, 20_000, 10_000, 20_000]) {
            assert!(count.abs_diff(expected) < expected / 5, "{counts:?}");
        }
    }

    #[test]
    fn a_peer_that_goes_moves_only_its_own_keys() {
        let all = peers(4);
        let before = Ring::new(all.iter().copied());
        let after = Ring::new(all.iter().copied().filter(|(at, _)| at.port() != 9003));
        for key in 0..5_000 {
            let was = owner(&before, key);
            if was != 3 {
                assert_eq!(owner(&after, key), was);
            } else {
                // And they go where the walk would have gone.
                let next = before.walk(mix(key)).find(|at| *at != 3).unwrap();
                assert_eq!(owner(&after, key), next);
            }
        }
    }

    #[test]
    fn an_empty_ring_leads_nowhere() {
        assert_eq!(Ring::new(std::iter::empty()).walk(7).next(), None);
    }
}
