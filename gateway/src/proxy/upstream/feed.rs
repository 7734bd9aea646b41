//! What the kernel sees of a peer's connections, as a share of the traffic. Pure, integers only.
//!
//! Requests cannot tell loss from slowness: a lost segment looks like one slow answer in fifty. The
//! kernel can: it retransmitted. Loss, and a round-trip time far above the best peer's, lower a
//! peer's share; resets in numbers take it away. A peer that gets no traffic is forgiven a little
//! at each look, so that it is tried again.

/// A whole share.
pub const SHARE_WHOLE: u32 = 1_000;
/// The least: enough to notice that it is well again.
const SHARE_MIN: u32 = 10;
/// Frames sent in an interval that say something about loss.
const FRAMES_MIN: u64 = 20;
/// Lost per thousand sent, from which half a share is left.
const LOSS_HALF: u64 = 3;
/// Lost per thousand from which a peer gets nothing.
const LOSS_BEYOND: u64 = 300;
/// Resets in an interval that are beyond accident.
const RESETS_BEYOND: u64 = 5;
/// Round-trip times below this are all alike, microseconds.
const RTT_ALIKE_US: u32 = 2_000;
/// Looks without traffic after which half of a round-trip time above the best one is forgiven.
const RTT_HALF_LIFE: u32 = 45;

/// Sums over a peer's connections since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerSample {
    /// Frames with payload or not that were sent.
    pub sent_frames: u64,
    /// Of them, retransmitted.
    pub retransmitted_frames: u64,
    /// Connections the peer reset.
    pub resets: u64,
    /// The mean of the connections' smoothed round-trip times, microseconds; 0 unknown.
    pub rtt_us: u32,
}

/// Smoothed over the looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerHealth {
    /// Retransmitted frames per million sent.
    pub loss_ppm: u64,
    /// Smoothed round-trip time, microseconds; 0 unknown.
    pub rtt_us: u32,
    /// Resets in the last interval.
    pub resets: u64,
    /// How many looks in a row saw no traffic: what is known about the path grows old.
    idle: u32,
    pending_sent: u64,
    pending_retransmitted: u64,
}

impl PeerHealth {
    /// One interval more.
    pub fn observe(&mut self, sample: &PeerSample) {
        self.resets = sample.resets;
        self.idle = match sample.sent_frames {
            0 => self.idle.saturating_add(1),
            _ => 0,
        };
        self.pending_sent += sample.sent_frames;
        self.pending_retransmitted += sample.retransmitted_frames;
        if self.pending_sent >= FRAMES_MIN {
            let now = self.pending_retransmitted * 1_000_000 / self.pending_sent;
            // Bad news counts for more than good: it is rarer in one interval.
            self.loss_ppm = if now > self.loss_ppm {
                (self.loss_ppm + now) / 2
            } else {
                (self.loss_ppm * 7 + now) / 8
            };
            (self.pending_sent, self.pending_retransmitted) = (0, 0);
        } else if sample.sent_frames == 0 {
            self.loss_ppm -= self.loss_ppm / 64;
        }
        if sample.rtt_us > 0 {
            self.rtt_us = match self.rtt_us {
                0 => sample.rtt_us,
                rtt => {
                    let sum = u64::from(rtt) * 3 + u64::from(sample.rtt_us);
                    u32::try_from(sum / 4).unwrap_or(u32::MAX)
                }
            };
        }
    }

    /// The round-trip time, when known.
    pub fn rtt_us(&self) -> Option<u32> {
        Some(self.rtt_us).filter(|rtt| *rtt > 0)
    }

    /// The share of what its weight would give it, given the best peer's round-trip time.
    pub fn share(&self, best_rtt_us: Option<u32>) -> u32 {
        let loss = self.loss_ppm;
        let half = LOSS_HALF * 1_000;
        let whole = u128::from(SHARE_WHOLE);
        let square = u128::from(half) * u128::from(half);
        // 1 / (1 + (loss / half)²)
        let share = whole * square / (square + u128::from(loss) * u128::from(loss));
        let best = best_rtt_us.unwrap_or(0).max(RTT_ALIKE_US);
        let share = match self.rtt_us {
            rtt if rtt > best => share * u128::from(best) / u128::from(self.aged(rtt, best)),
            _ => share,
        };
        u32::try_from(share).unwrap_or(SHARE_WHOLE).max(SHARE_MIN)
    }

    /// A round-trip time above the best one, less of the difference the longer nobody measured it:
    /// the path may have changed, and only traffic can tell. The best peer's time does not age, or
    /// an idle peer would become the measure of those that work.
    fn aged(&self, rtt: u32, best: u32) -> u32 {
        let halvings = self.idle / RTT_HALF_LIFE;
        best + (rtt - best).checked_shr(halvings).unwrap_or(0)
    }

    /// Whether it should get no requests at all for a while.
    pub fn is_beyond_use(&self) -> bool {
        self.loss_ppm > LOSS_BEYOND * 1_000 || self.resets >= RESETS_BEYOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(sent: u64, retransmitted: u64, rtt: u32) -> PeerSample {
        PeerSample {
            sent_frames: sent,
            retransmitted_frames: retransmitted,
            rtt_us: rtt,
            resets: 0,
        }
    }

    #[test]
    fn a_clean_peer_has_its_whole_share() {
        let mut health = PeerHealth::default();
        assert_eq!(health.share(None), SHARE_WHOLE);
        for _ in 0..10 {
            health.observe(&sample(1_000, 0, 300));
        }
        assert_eq!(health.share(Some(100)), SHARE_WHOLE, "both are near");
    }

    #[test]
    fn loss_takes_most_of_a_share_within_two_looks() {
        let mut health = PeerHealth::default();
        health.observe(&sample(1_000, 20, 300));
        health.observe(&sample(1_000, 20, 300));
        assert!(health.share(None) < 50, "{}", health.share(None));
        assert!(!health.is_beyond_use());
    }

    #[test]
    fn without_traffic_it_is_forgiven_slowly() {
        let mut health = PeerHealth::default();
        health.observe(&sample(1_000, 40, 300));
        let before = health.share(None);
        for _ in 0..300 {
            health.observe(&PeerSample::default());
        }
        assert!(before < 50 && health.share(None) > 900);
    }

    #[test]
    fn a_distant_peer_has_less() {
        let mut health = PeerHealth::default();
        health.observe(&sample(100, 0, 20_000));
        assert_eq!(health.share(Some(5_000)), 250);
        assert_eq!(health.share(Some(20_000)), SHARE_WHOLE);
    }

    #[test]
    fn distance_that_nobody_measures_any_more_is_forgiven_slowly() {
        let mut health = PeerHealth::default();
        health.observe(&sample(100, 0, 200_000));
        assert_eq!(health.share(None), SHARE_MIN);
        for _ in 0..300 {
            health.observe(&PeerSample::default());
        }
        assert!(health.share(None) > 300, "{}", health.share(None));
        assert_eq!(health.rtt_us(), Some(200_000), "no measure for others");
        health.observe(&sample(100, 0, 200_000));
        assert_eq!(health.share(None), SHARE_MIN, "still far");
    }

    #[test]
    fn few_frames_wait_for_more() {
        let mut health = PeerHealth::default();
        health.observe(&sample(10, 1, 0));
        assert_eq!(health.loss_ppm, 0, "one of ten says nothing");
        health.observe(&sample(90, 0, 0));
        assert_eq!(health.loss_ppm, 5_000, "1 % of a hundred, half believed");
    }

    #[test]
    fn resets_and_a_dead_link_are_beyond_use() {
        let mut health = PeerHealth::default();
        health.observe(&PeerSample {
            resets: 5,
            ..PeerSample::default()
        });
        assert!(health.is_beyond_use());
        let mut health = PeerHealth::default();
        for _ in 0..3 {
            health.observe(&sample(100, 50, 0));
        }
        assert!(health.is_beyond_use());
    }
}
