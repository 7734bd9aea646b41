//! HTTP/2 frames as they pass, counted by kind: what no honest client needs so many of ends the
//! connection. Pure: time is an argument.
//!
//! The h2 crate bounds memory (pending resets, header lists, CONTINUATION frames); what it does
//! not bound is the work of frames that cost the sender nothing. Allowances grow with the traffic
//! that explains such frames: window updates and bandwidth probes follow data.

use std::time::Instant;

use super::strict::Refusal;

/// Bytes of the client's connection preface.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADER_LENGTH: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Frames of a kind that may come at once, and how many more each second.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    burst: u64,
    per_second: u64,
    /// One more for as many bytes of traffic in either direction; 0: none.
    bytes_each: u64,
}

const fn allowance(burst: u64, per_second: u64, bytes_each: u64) -> Allowance {
    Allowance {
        burst,
        per_second,
        bytes_each,
    }
}

/// In the order of [`kind`].
const ALLOWANCES: [Allowance; 7] = [
    // Empty DATA frames that end nothing.
    allowance(100, 10, 0),
    // PRIORITY, which nobody needs any more.
    allowance(400, 100, 0),
    // RST_STREAM: a page that is left cancels what it asked for.
    allowance(200, 50, 0),
    allowance(20, 5, 0),
    // PING: gRPC estimates bandwidth with one for each round trip of data.
    allowance(100, 20, 4 * 1024),
    // WINDOW_UPDATE follows what it acknowledges.
    allowance(1000, 100, 512),
    // CONTINUATION, and kinds this protocol does not know.
    allowance(100, 20, 0),
];

/// One connection's frames.
#[derive(Debug)]
pub struct FrameScanner {
    preface_left: usize,
    header: [u8; HEADER_LENGTH],
    have: usize,
    payload_left: usize,
    spent: [u64; ALLOWANCES.len()],
    began: Instant,
    traffic_bytes: u64,
    /// Since when a header block is incomplete.
    open_block: Option<Instant>,
    /// The frame under way belongs to a header block.
    in_block: bool,
    ends_block: bool,
}

impl FrameScanner {
    /// A connection that starts with its preface.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            preface_left: PREFACE.len(),
            header: [0; HEADER_LENGTH],
            have: 0,
            payload_left: 0,
            spent: [0; ALLOWANCES.len()],
            began: now,
            traffic_bytes: 0,
            open_block: None,
            in_block: false,
            ends_block: false,
        }
    }

    /// Bytes were sent to the client.
    pub fn sent(&mut self, bytes: usize) {
        self.traffic_bytes += bytes as u64;
    }

    /// Since when the client is inside a header block.
    #[must_use]
    pub fn open_block(&self) -> Option<Instant> {
        self.open_block
    }

    /// The next bytes from the client.
    ///
    /// # Errors
    /// [`Refusal::Http2Flood`].
    pub fn scan(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Refusal> {
        while !bytes.is_empty() {
            let skip = self.preface_left.min(bytes.len());
            if skip > 0 {
                self.preface_left -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            if self.have < HEADER_LENGTH {
                self.header[self.have] = bytes[0];
                self.have += 1;
                bytes = &bytes[1..];
                if self.have == HEADER_LENGTH {
                    self.begin(now)?;
                }
            } else {
                let skip = self.payload_left.min(bytes.len());
                self.payload_left -= skip;
                bytes = &bytes[skip..];
            }
            if self.have == HEADER_LENGTH && self.payload_left == 0 {
                self.have = 0;
                if self.in_block && self.ends_block {
                    self.open_block = None;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, now: Instant) -> Result<(), Refusal> {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.payload_left = length;
        self.in_block = matches!(kind, HEADERS | CONTINUATION);
        self.ends_block = flags & END_HEADERS != 0;
        if self.in_block {
            self.open_block.get_or_insert(now);
        }
        let index = match kind {
            DATA if length == 0 && flags & END_STREAM == 0 => 0,
            DATA => {
                self.traffic_bytes += length as u64;
                return Ok(());
            }
            HEADERS => return Ok(()),
            PRIORITY => 1,
            RST_STREAM => 2,
            SETTINGS => 3,
            PING => 4,
            WINDOW_UPDATE => 5,
            _ => 6,
        };
        self.spend(index, now)
    }

    fn spend(&mut self, index: usize, now: Instant) -> Result<(), Refusal> {
        let allowance = ALLOWANCES[index];
        let seconds = now.saturating_duration_since(self.began).as_secs();
        let explained = self
            .traffic_bytes
            .checked_div(allowance.bytes_each)
            .unwrap_or(0);
        let timed = seconds * allowance.per_second;
        // What time gave and nobody took is forgotten beyond a burst.
        let spent = self.spent[index].max(timed.saturating_sub(allowance.burst)) + 1;
        self.spent[index] = spent;
        if spent > timed + explained + allowance.burst {
            return Err(Refusal::Http2Flood);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.resize(frame.len() + payload, 0);
        frame
    }

    /// How many frames in a row are let through.
    fn allowed(scanner: &mut FrameScanner, frame: &[u8], now: Instant) -> usize {
        (0..100_000)
            .take_while(|_| scanner.scan(frame, now).is_ok())
            .count()
    }

    fn begun(now: Instant) -> FrameScanner {
        let mut scanner = FrameScanner::new(now);
        scanner.scan(PREFACE, now).unwrap();
        scanner
    }

    #[test]
    fn each_kind_has_its_burst() {
        let now = Instant::now();
        for (kind, flags, payload, burst) in [
            (DATA, 0, 0, 100),
            (PRIORITY, 0, 5, 400),
            (RST_STREAM, 0, 4, 200),
            (SETTINGS, 0, 0, 20),
            (PING, 0, 8, 100),
            (WINDOW_UPDATE, 0, 4, 1000),
            (CONTINUATION, 0, 10, 100),
            (77, 0, 3, 100),
        ] {
            let count = allowed(&mut begun(now), &frame(kind, flags, payload), now);
            assert_eq!(count, burst, "kind {kind}");
        }
        for (kind, flags, payload) in [(DATA, 0, 1000), (DATA, END_STREAM, 0), (HEADERS, 4, 50)] {
            let count = allowed(&mut begun(now), &frame(kind, flags, payload), now);
            assert_eq!(
                count, 100_000,
                "requests and their bodies are not control frames"
            );
        }
    }

    #[test]
    fn time_gives_more_but_saves_no_more_than_a_burst() {
        let now = Instant::now();
        let reset = frame(RST_STREAM, 0, 4);
        let mut scanner = begun(now);
        assert_eq!(allowed(&mut scanner, &reset, now), 200);
        let mut scanner = begun(now);
        let later = now + Duration::from_secs(3600);
        assert!(allowed(&mut scanner, &reset, later) <= 401);
    }

    #[test]
    fn window_updates_follow_data() {
        let now = Instant::now();
        let mut scanner = begun(now);
        scanner.sent(10 << 20);
        let updates = allowed(&mut scanner, &frame(WINDOW_UPDATE, 0, 4), now);
        assert!(updates >= 20_000, "{updates}");
    }

    #[test]
    fn a_header_block_is_open_until_it_ends() {
        let now = Instant::now();
        let mut scanner = begun(now);
        scanner.scan(&frame(HEADERS, 0, 10), now).unwrap();
        assert_eq!(scanner.open_block(), Some(now));
        let later = now + Duration::from_secs(1);
        scanner.scan(&frame(CONTINUATION, 0, 10), later).unwrap();
        assert_eq!(scanner.open_block(), Some(now));
        let last = frame(CONTINUATION, END_HEADERS, 10);
        scanner.scan(&last[..15], later).unwrap();
        assert_eq!(scanner.open_block(), Some(now));
        scanner.scan(&last[15..], later).unwrap();
        assert_eq!(scanner.open_block(), None);
    }

    #[test]
    fn frames_may_arrive_in_any_pieces() {
        let now = Instant::now();
        let mut scanner = FrameScanner::new(now);
        let mut stream = PREFACE.to_vec();
        for _ in 0..20 {
            stream.extend(frame(SETTINGS, 0, 12));
            stream.extend(frame(DATA, 0, 7));
        }
        for byte in &stream {
            scanner.scan(std::slice::from_ref(byte), now).unwrap();
        }
        assert!(scanner.scan(&frame(SETTINGS, 0, 0), now).is_err());
    }
}
