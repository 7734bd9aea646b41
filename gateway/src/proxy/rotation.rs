//! Weighted turns without a lock: in any run of as many picks as the reduced weights sum to, each choice
//! comes exactly as often as it weighs, and its turns are spread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the picks.
#[derive(Debug, Default)]
pub struct Rotation(AtomicU64);

/// A round longer than this is not kept.
const ROUND_MAX: u64 = 65_536;

impl Rotation {
    /// The position of the next choice; `None` when nothing weighs anything.
    pub fn pick<I>(&self, weights: I) -> Option<usize>
    where
        I: IntoIterator<Item = u64>,
        I::IntoIter: Clone,
    {
        let weights = weights.into_iter();
        let mut first_two = weights.clone();
        // Most often there is no choice.
        if let (Some(weight), None) = (first_two.next(), first_two.next()) {
            return (weight > 0).then_some(0);
        }
        let (weights, total, step) = reduced(weights)?;
        at(weights, total, step, self.turn())
    }

    /// The positions of a whole round of picks; None when nothing weighs anything, or the round is
    /// too long to keep.
    pub fn round<I>(weights: I) -> Option<Box<[u32]>>
    where
        I: IntoIterator<Item = u64>,
        I::IntoIter: Clone,
    {
        let (weights, total, step) = reduced(weights.into_iter())?;
        // Who has which place of the round, so that each turn is looked up.
        let mut places = Vec::new();
        for (index, weight) in weights.enumerate() {
            let index = u32::try_from(index).ok()?;
            if places.len() as u64 + weight > ROUND_MAX {
                return None;
            }
            places.extend((0..weight).map(|_| index));
        }
        (0..total)
            .map(|turn| places.get(place(total, step, turn)?).copied())
            .collect()
    }

    /// The number of the next turn.
    pub fn turn(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Weights that share a factor have shorter rounds without it. With their sum, and steps of about
/// the golden section: consecutive turns fall far apart.
fn reduced<I>(weights: I) -> Option<(impl Iterator<Item = u64> + Clone, u64, u64)>
where
    I: Iterator<Item = u64> + Clone,
{
    let unit = weights.clone().fold(0, gcd).max(1);
    let weights = weights.map(move |weight| weight / unit);
    let total: u64 = weights.clone().sum();
    if total == 0 {
        return None;
    }
    let mut step = (total * 5 / 8).max(1);
    while gcd(step, total) != 1 {
        step += 1;
    }
    Some((weights, total, step))
}

/// The place in the round of a turn.
fn place(total: u64, step: u64, turn: u64) -> Option<usize> {
    let product = u128::from(turn) * u128::from(step) % u128::from(total);
    usize::try_from(product).ok()
}

fn at(weights: impl Iterator<Item = u64>, total: u64, step: u64, turn: u64) -> Option<usize> {
    let mut at = place(total, step, turn)? as u64;
    for (index, weight) in weights.enumerate() {
        if at < weight {
            return Some(index);
        }
        at -= weight;
    }
    None
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
            let round = Rotation::round(weights.iter().copied()).unwrap();
            let picks = Rotation::default();
            for place in &round {
                let pick = picks.pick(weights.iter().copied()).unwrap();
                assert_eq!(pick, *place as usize);
            }
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
