//! Chunked bodies: where one ends.

use super::Refusal;

/// Bytes of chunk extensions and of trailers one body may have.
const CHUNK_EXTRAS_MAX: usize = 8 * 1024;

/// Follows a chunked body to its end.
#[derive(Debug)]
pub struct ChunkScanner {
    at: Chunk,
    extras: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size {
        value: u64,
        digits: u8,
    },
    Extension {
        value: u64,
    },
    SizeLf {
        value: u64,
    },
    Data(u64),
    DataCr,
    DataLf,
    /// In a trailer line of this many bytes so far.
    Trailer(usize),
    TrailerLf(usize),
    End,
}

impl Default for ChunkScanner {
    fn default() -> Self {
        Self {
            at: Chunk::START,
            extras: 0,
        }
    }
}

impl Chunk {
    const START: Self = Self::Size {
        value: 0,
        digits: 0,
    };
}

impl ChunkScanner {
    /// The next bytes of the body. Some: the body ends after this many of them.
    ///
    /// # Errors
    /// [`Refusal::Chunk`], or what is wrong with a line end.
    pub fn scan(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        let mut position = 0;
        while let Some(&byte) = bytes.get(position) {
            if let Chunk::Data(left) = self.at {
                let here = (bytes.len() - position) as u64;
                if here < left {
                    self.at = Chunk::Data(left - here);
                    return Ok(None);
                }
                position += usize::try_from(left).map_err(|_| Refusal::Chunk)?;
                self.at = Chunk::DataCr;
                continue;
            }
            position += 1;
            self.at = self.step(byte)?;
            if self.at == Chunk::End {
                return Ok(Some(position));
            }
        }
        Ok(None)
    }

    fn step(&mut self, byte: u8) -> Result<Chunk, Refusal> {
        Ok(match self.at {
            Chunk::Size { value, digits } => match (byte, char::from(byte).to_digit(16)) {
                (_, Some(digit)) if digits < 15 => Chunk::Size {
                    value: value * 16 + u64::from(digit),
                    digits: digits + 1,
                },
                (b';', _) if digits > 0 => Chunk::Extension { value },
                (b'\r', _) if digits > 0 => Chunk::SizeLf { value },
                (b'\n', _) => return Err(Refusal::BareLf),
                _ => return Err(Refusal::Chunk),
            },
            Chunk::Extension { value } => match byte {
                b'\r' => Chunk::SizeLf { value },
                b'\n' => return Err(Refusal::BareLf),
                b'\t' | 0x20..=0x7e | 0x80.. => {
                    self.extra()?;
                    Chunk::Extension { value }
                }
                _ => return Err(Refusal::ControlByte),
            },
            Chunk::SizeLf { value } => match (byte, value) {
                (b'\n', 0) => Chunk::Trailer(0),
                (b'\n', _) => Chunk::Data(value),
                _ => return Err(Refusal::BareCr),
            },
            Chunk::Data(_) | Chunk::End => return Err(Refusal::Chunk),
            Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
            Chunk::DataLf if byte == b'\n' => Chunk::START,
            Chunk::DataCr | Chunk::DataLf => return Err(Refusal::Chunk),
            Chunk::Trailer(length) => match byte {
                b'\r' => Chunk::TrailerLf(length),
                b'\n' => return Err(Refusal::BareLf),
                b' ' | b'\t' if length == 0 => return Err(Refusal::ObsoleteFolding),
                b'\t' | 0x20..=0x7e | 0x80.. => {
                    self.extra()?;
                    Chunk::Trailer(length + 1)
                }
                _ => return Err(Refusal::ControlByte),
            },
            Chunk::TrailerLf(length) => match (byte, length) {
                // The empty line: the end.
                (b'\n', 0) => Chunk::End,
                (b'\n', _) => Chunk::Trailer(0),
                _ => return Err(Refusal::BareCr),
            },
        })
    }

    fn extra(&mut self) -> Result<(), Refusal> {
        self.extras += 1;
        if self.extras > CHUNK_EXTRAS_MAX {
            return Err(Refusal::Chunk);
        }
        Ok(())
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(text: &[u8]) -> Result<Option<usize>, Refusal> {
        let at_once = ChunkScanner::default().scan(text);
        let mut scanner = ChunkScanner::default();
        for (position, byte) in text.iter().enumerate() {
            match scanner.scan(std::slice::from_ref(byte)) {
                Ok(None) => {}
                Ok(Some(end)) => {
                    assert_eq!(at_once, Ok(Some(position + end)), "{}", text.escape_ascii());
                    return at_once;
                }
                Err(refusal) => {
                    assert_eq!(at_once, Err(refusal), "{}", text.escape_ascii());
                    return at_once;
                }
            }
        }
        assert_eq!(at_once, Ok(None));
        at_once
    }

    #[test]
    fn chunked_bodies_end_where_they_end() {
        for text in [
            "0\r\n\r\n",
            "5\r\nhello\r\n0\r\n\r\n",
            "5;a=b\r\nhello\r\n1\r\nx\r\n0\r\n\r\n",
            "A\r\n0123456789\r\n000\r\nTrailer: x\r\nOther: y\r\n\r\n",
        ] {
            assert_eq!(chunks(text.as_bytes()), Ok(Some(text.len())), "{text:?}");
            let more = format!("{text}GET / HTTP/1.1\r\n");
            assert_eq!(
                ChunkScanner::default().scan(more.as_bytes()),
                Ok(Some(text.len()))
            );
        }
        for (text, reason) in [
            ("5\nhello\r\n", "bare_lf"),
            ("5\r\nhelloX\r\n", "chunk"),
            ("5\r\nhello\n", "chunk"),
            ("0x5\r\n", "chunk"),
            (" 5\r\n", "chunk"),
            ("5 \r\n", "chunk"),
            ("\r\n", "chunk"),
            (";a\r\n", "chunk"),
            ("-5\r\n", "chunk"),
            ("1111111111111111\r\n", "chunk"),
            ("5\rhello", "bare_cr"),
            ("5;a\nhello", "bare_lf"),
            ("5;\0\r\n", "control_byte"),
            ("0\r\nA: b\n\r\n", "bare_lf"),
            ("0\r\n A: b\r\n\r\n", "obs_fold"),
        ] {
            assert_eq!(
                chunks(text.as_bytes()).map_err(Refusal::reason),
                Err(reason),
                "{text:?}"
            );
        }
        let long = format!("5;{}", "a".repeat(CHUNK_EXTRAS_MAX + 1));
        assert_eq!(chunks(long.as_bytes()), Err(Refusal::Chunk));
    }
}
