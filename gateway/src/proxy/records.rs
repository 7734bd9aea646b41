//! Where TLS records end, so that a handshake takes not a byte more than its own.
//!
//! The TLS library reads as much as there is. What comes with the client's last flight may be its
//! first request already; handed on a record at a time, the handshake's bytes can be counted.

const HEADER: usize = 5;

/// Follows a stream of TLS records.
#[derive(Debug, Default)]
pub struct RecordCutter {
    header: [u8; HEADER],
    /// Of the header, how much is known.
    known: usize,
    /// Of the body, how much is to come.
    left: usize,
    ended: bool,
}

impl RecordCutter {
    /// How many of these bytes, `room` at most, belong to the record under way.
    pub fn cut(&mut self, bytes: &[u8], room: usize) -> usize {
        let bytes = &bytes[..bytes.len().min(room)];
        let mut taken = 0;
        while taken < bytes.len() {
            if self.known < HEADER {
                self.header[self.known] = bytes[taken];
                self.known += 1;
                taken += 1;
                if self.known == HEADER {
                    self.left = u16::from_be_bytes([self.header[3], self.header[4]]).into();
                }
            } else {
                let more = self.left.min(bytes.len() - taken);
                self.left -= more;
                taken += more;
            }
            if self.known == HEADER && self.left == 0 {
                self.known = 0;
                self.ended = true;
                break;
            }
        }
        taken
    }

    /// True once after each record: the reader is to look at what it has before it gets more.
    pub fn pause(&mut self) -> bool {
        std::mem::take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_are_handed_on_one_at_a_time(
            bodies in prop::collection::vec(0usize..500, 1..6),
            chunks in prop::collection::vec((1usize..300, 1usize..300), 1..10),
        ) {
            let mut stream = Vec::new();
            let mut ends = Vec::new();
            for body in &bodies {
                stream.extend([23, 3, 3]);
                stream.extend(u16::try_from(*body).unwrap().to_be_bytes());
                stream.resize(stream.len() + body, 0xff);
                ends.push(stream.len());
            }
            let mut cutter = RecordCutter::default();
            let (mut at, mut paused) = (0, Vec::new());
            for (there, room) in chunks.iter().cycle() {
                if at == stream.len() {
                    break;
                }
                let end = stream.len().min(at + there);
                at += cutter.cut(&stream[at..end], *room);
                if cutter.pause() {
                    paused.push(at);
                }
            }
            prop_assert_eq!(paused, ends);
        }
    }
}
