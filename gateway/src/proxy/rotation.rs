//! Weighted turns without a lock: in any run of as many picks as the reduced weights sum to, each choice
//! comes exactly as often as it weighs, and its turns are spread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the picks.
#[derive(Debug, Default)]
pub struct Rotation(AtomicU64);

impl Rotation {
    /// The position of the next choice; `None` when nothing weighs anything.
    pub fn pick<I>(&self, weights: I) -> Option<usize>
    where
        I: IntoIterator<Item = u64>,
        I::IntoIter: Clone,
    {
        let weights = weights.into_iter();
        // Weights that share a factor have shorter rounds without it.
        let unit = weights.clone().fold(0, gcd).max(1);
        let weights = weights.map(|weight| weight / unit);
        let total: u64 = weights.clone().sum();
        if total == 0 {
            return None;
        }
        let turn = self.0.fetch_add(1, Ordering::Relaxed);
        // Steps of about the golden section: consecutive turns fall far apart.
        let mut step = (total * 5 / 8).max(1);
        while gcd(step, total) != 1 {
            step += 1;
        }
        let product = u128::from(turn) * u128::from(step) % u128::from(total);
        let mut at = u64::try_from(product).unwrap_or(0);
        for (index, weight) in weights.enumerate() {
            if at < weight {
                return Some(index);
            }
            at -= weight;
        }
        None
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_in_every_window_and_spread() {
        for weights in [
            vec![5, 1, 1],
            vec![95, 5],
            vec![1],
            vec![3, 0, 7],
            vec![1; 7],
        ] {
            let rotation = Rotation::default();
            let total: u64 = weights.iter().sum();
            assert!(
                Rotation::default()
                    .pick(weights.iter().map(|w| w * 1_000))
                    .is_some()
            );
            for _ in 0..5 {
                let mut counts = vec![0; weights.len()];
                for _ in 0..total {
                    counts[rotation.pick(weights.iter().copied()).unwrap()] += 1;
                }
                assert_eq!(counts, weights);
            }
        }
        let rotation = Rotation::default();
        let picks: Vec<usize> = (0..10).map(|_| rotation.pick([5, 5]).unwrap()).collect();
        assert!(
            picks
                .windows(4)
                .all(|four| four.contains(&0) && four.contains(&1)),
            "{picks:?}"
        );
    }

    #[test]
    fn nothing_weighs_nothing() {
        assert_eq!(Rotation::default().pick([0, 0]), None);
        assert_eq!(Rotation::default().pick([]), None);
    }

    #[test]
    fn threads_share_the_turns() {
        let rotation = Rotation::default();
        let ones: usize = std::thread::scope(|scope| {
            let pick = || {
                (0..1_000)
                    .filter(|_| rotation.pick([3, 1]) == Some(1))
                    .count()
            };
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(pick)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .sum()
        });
        assert_eq!(ones, 1_000);
    }
}
