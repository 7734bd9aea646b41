//! Which of the bytes that came during a TLS handshake are the first request's.
//!
//! The kernel cannot know: TLS 1.3 wraps both alike. It writes down what came, by sequence number;
//! the gateway counts the bytes of the handshake's records as it hands them to the TLS library.
//! A frame's header belongs to the owner of its first payload byte, a retransmit to whoever's
//! bytes it carries.

use flow_abi::{ARRIVALS, Arrival};

use super::Claimed;

/// Arrivals, divided. Interface and class are not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Divided {
    /// The handshake's.
    pub(super) handshake: Claimed,
    /// The first request's.
    pub(super) application: Claimed,
    /// Every place is taken, and the handshake goes on beyond the last: where it ends was not
    /// seen.
    pub(super) cut_short: bool,
}

/// Divides at a stream offset. Without the stream's first sequence number all is the
/// handshake's: no frame was sent since, so none can have answered it with a request.
pub(super) fn divide(
    arrivals: impl IntoIterator<Item = Arrival>,
    first_seq: Option<u32>,
    application_from: u64,
) -> Divided {
    let mut divided = Divided::default();
    let (mut seen, mut end) = (0, 0);
    for arrival in arrivals {
        let start = first_seq.map_or(0, |first| {
            // Below the first byte: a keep-alive probe's, which is the handshake's.
            u64::try_from(arrival.seq.wrapping_sub(first).cast_signed()).unwrap_or(0)
        });
        let from = if first_seq.is_some() {
            application_from
        } else {
            u64::MAX
        };
        add(&mut divided, &arrival, start, from);
        seen += 1;
        end = end.max(start + u64::from(arrival.payload));
    }
    divided.cut_short = seen == ARRIVALS && end < application_from;
    divided
}

fn add(divided: &mut Divided, arrival: &Arrival, start: u64, application_from: u64) {
    let payload = u64::from(arrival.payload);
    let segment = u64::from(arrival.segment).max(1);
    let all = Claimed {
        bytes: arrival.bytes.into(),
        frames: payload.div_ceil(segment),
        payload_bytes: payload,
        ..Claimed::default()
    };
    if application_from <= start {
        divided.application = divided.application.plus(all);
        return;
    }
    let cut = payload.min(application_from - start);
    let frames = all.frames - cut.div_ceil(segment);
    let application = Claimed {
        bytes: payload - cut + frames * u64::from(arrival.header),
        frames,
        payload_bytes: payload - cut,
        ..Claimed::default()
    };
    divided.application = divided.application.plus(application);
    divided.handshake = divided.handshake.plus(all.since(application));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: u32 = u32::MAX - 100;

    fn arrival(offset: u32, payload: u32, segment: u16, header: u16) -> Arrival {
        let frames = payload.div_ceil(segment.into());
        Arrival {
            taken: 1,
            bytes: payload + frames * u32::from(header),
            seq: FIRST.wrapping_add(offset),
            payload,
            segment,
            header,
        }
    }

    fn counts(claimed: Claimed) -> (u64, u64, u64) {
        (claimed.bytes, claimed.frames, claimed.payload_bytes)
    }

    #[test]
    fn a_frames_header_is_its_first_bytes_owners() {
        let last_flight = arrival(200, 80, 1448, 66);
        let with_request = arrival(280, 64 + 300, 1448, 66);
        let divided = divide([last_flight, with_request], Some(FIRST), 344);
        assert_eq!(counts(divided.handshake), (146 + 66 + 64, 2, 144));
        assert_eq!(counts(divided.application), (300, 0, 300));
        let divided = divide([last_flight, with_request], Some(FIRST), 280);
        assert_eq!(counts(divided.handshake), (146, 1, 80));
        assert_eq!(counts(divided.application), (66 + 364, 1, 364));
        let unknown = divide([last_flight, with_request], None, 280);
        assert_eq!(counts(unknown.application), (0, 0, 0));
    }

    #[test]
    fn a_handshake_longer_than_the_memory_is_told() {
        let frames = |count: u32| (0..count).map(|n| arrival(n * 100, 100, 1448, 66));
        let all = u32::try_from(ARRIVALS).unwrap();
        assert!(divide(frames(all), Some(FIRST), 900).cut_short);
        assert!(!divide(frames(all), Some(FIRST), 750).cut_short);
        assert!(!divide(frames(all - 1), Some(FIRST), 900).cut_short);
    }

    proptest! {
        /// Byte by byte: each payload byte by its offset, each header by its frame's first.
        #[test]
        fn it_agrees_with_counting_each_byte(
            frames in prop::collection::vec((0u32..3000, 1u32..4000, 1u16..1500), 1..8),
            from in 0u64..5000,
        ) {
            let mut expected = [(0, 0, 0), (0, 0, 0)];
            for (offset, payload, segment) in &frames {
                for byte in 0..*payload {
                    let side = usize::from(u64::from(offset + byte) >= from);
                    expected[side].0 += 1;
                    expected[side].2 += 1;
                    if byte % u32::from(*segment) == 0 {
                        expected[side].0 += 54;
                        expected[side].1 += 1;
                    }
                }
            }
            let arrivals = frames.iter().map(|(o, p, s)| arrival(*o, *p, *s, 54));
            let divided = divide(arrivals, Some(FIRST), from);
            prop_assert_eq!(counts(divided.handshake), expected[0]);
            prop_assert_eq!(counts(divided.application), expected[1]);
        }
    }
}
