//! Where a chunked body ends, found without changing a byte of it (RFC 9112, section 7.1).

use super::head::HEAD_BYTES_MAX;

/// A position in a chunked body, fed with its bytes as they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chunks {
    state: State,
    /// Bytes left of the current chunk, or the size read so far.
    left: u64,
    /// Bytes of the current line, so that none is endless.
    line: u16,
    /// Payload bytes taken.
    data: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the first digit of a size.
    #[default]
    Size,
    /// After a digit.
    MoreSize,
    /// In an extension, up to CR.
    Extension,
    /// After the CR of a size line.
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line.
    Trailer,
    /// In a trailer line.
    TrailerLine,
    /// After the CR of a trailer line.
    TrailerLf,
    /// After the CR of the empty last line.
    LastLf,
    Done,
}

/// The bytes are not a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed chunked body")]
pub struct ChunkError;

/// Longest size or trailer line.
const LINE_MAX: u16 = 4096;

impl Chunks {
    /// Takes bytes; returns how many of them belong to the body.
    ///
    /// # Errors
    /// [`ChunkError`]: the end cannot be found; close both connections.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        let mut at = 0;
        while at < bytes.len() && self.state != State::Done {
            if self.state == State::Data {
                let rest = u64::try_from(bytes.len() - at).map_err(|_| ChunkError)?;
                let step = self.left.min(rest);
                self.left -= step;
                self.data += step;
                // No more than the bytes at hand, which fit.
                at += usize::try_from(step).map_err(|_| ChunkError)?;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.step(bytes[at])?;
            at += 1;
        }
        Ok(at)
    }

    /// Takes bytes up to the end of the next piece of payload; returns how many, and the payload
    /// among them, which is empty at the body's end and when more is needed. Trailer lines are
    /// added to `trailers` as they stand, with the empty line that ends them.
    ///
    /// # Errors
    /// [`ChunkError`]: the end cannot be found, or the trailers have none.
    pub fn piece<'b>(
        &mut self,
        bytes: &'b [u8],
        trailers: &mut Vec<u8>,
    ) -> Result<(usize, &'b [u8]), ChunkError> {
        let mut at = 0;
        while at < bytes.len() && self.state != State::Done {
            if self.state == State::Data {
                let end = bytes
                    .len()
                    .min(at.saturating_add(usize::try_from(self.left).unwrap_or(usize::MAX)));
                // Takes no further than the chunk's last byte.
                let taken = self.take(&bytes[at..end])?;
                return Ok((at + taken, &bytes[at..at + taken]));
            }
            let in_trailers = matches!(
                self.state,
                State::Trailer | State::TrailerLine | State::TrailerLf | State::LastLf
            );
            self.step(bytes[at])?;
            if in_trailers {
                if trailers.len() == HEAD_BYTES_MAX {
                    return Err(ChunkError);
                }
                trailers.push(bytes[at]);
            }
            at += 1;
        }
        Ok((at, &[]))
    }

    /// True once the last byte of the body has been taken.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Payload bytes taken so far: sizes, extensions and trailers are not among them.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.data
    }

    fn step(&mut self, byte: u8) -> Result<(), ChunkError> {
        self.line = self.line.saturating_add(1);
        if self.line > LINE_MAX {
            return Err(ChunkError);
        }
        self.state = match (self.state, byte) {
            (State::Size | State::MoreSize, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = (byte as char).to_digit(16).ok_or(ChunkError)?;
                let shifted = self.left.checked_mul(16).ok_or(ChunkError)?;
                self.left = shifted.checked_add(u64::from(digit)).ok_or(ChunkError)?;
                State::MoreSize
            }
            (State::MoreSize, b'\r') | (State::Extension, b'\r') => State::SizeLf,
            (State::MoreSize, b';') => State::Extension,
            // No control characters: a bare LF here is the classic way to smuggle.
            (State::Extension, b'\t' | b' '..=b'~' | 0x80..) => State::Extension,
            (State::SizeLf, b'\n') => {
                self.line = 0;
                if self.left == 0 {
                    State::Trailer
                } else {
                    State::Data
                }
            }
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => {
                self.line = 0;
                State::Size
            }
            (State::Trailer, b'\r') => State::LastLf,
            (State::TrailerLine, b'\r') => State::TrailerLf,
            (State::Trailer | State::TrailerLine, b'\t' | b' '..=b'~' | 0x80..) => {
                State::TrailerLine
            }
            (State::TrailerLf, b'\n') => {
                self.line = 0;
                State::Trailer
            }
            (State::LastLf, b'\n') => State::Done,
            _ => return Err(ChunkError),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"4\r\nWiki\r\n5;x=\"y\"\r\npedia\r\n0\r\nTrailer: 1\r\n\r\n";

    #[test]
    fn the_end_is_found_wherever_the_bytes_are_cut() {
        let mut followed = BODY.to_vec();
        followed.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        for cut in 0..followed.len() {
            let mut chunks = Chunks::default();
            let first = chunks.take(&followed[..cut]).unwrap();
            let second = chunks.take(&followed[first..]).unwrap();
            assert_eq!(first + second, BODY.len(), "cut at {cut}");
            assert!(chunks.is_done());
            assert_eq!(chunks.data(), 9);
        }
    }

    #[test]
    fn payload_and_trailers_come_out_wherever_the_bytes_are_cut() {
        for cut in 0..=BODY.len() {
            let (mut chunks, mut payload, mut trailers) = Default::default();
            for mut bytes in [&BODY[..cut], &BODY[cut..]] {
                while !bytes.is_empty() {
                    let (taken, piece) = Chunks::piece(&mut chunks, bytes, &mut trailers).unwrap();
                    Vec::extend_from_slice(&mut payload, piece);
                    bytes = &bytes[taken..];
                }
            }
            assert!(chunks.is_done(), "cut at {cut}");
            assert_eq!(payload, b"Wikipedia");
            assert_eq!(trailers, b"Trailer: 1\r\n\r\n");
        }
    }

    #[test]
    fn what_is_not_chunked_is_refused() {
        for body in [
            &b"\r\n"[..],
            b"4\nWiki\r\n0\r\n\r\n",
            b"4\r\nWikiX",
            b"4\r\nWiki\n",
            b"g\r\n",
            b"-4\r\n",
            b"0x4\r\n",
            b" 4\r\n",
            b"4 \r\n",
            b"4;a\nb\r\n",
            b"0\r\nX: 1\n",
            b"10000000000000000\r\n",
        ] {
            let mut chunks = Chunks::default();
            assert_eq!(
                chunks.take(body),
                Err(ChunkError),
                "{:?}",
                String::from_utf8_lossy(body)
            );
        }
    }

    #[test]
    fn no_line_is_endless() {
        let mut chunks = Chunks::default();
        let mut body = b"4;".to_vec();
        body.resize(10_000, b'x');
        assert_eq!(chunks.take(&body), Err(ChunkError));
    }
}
