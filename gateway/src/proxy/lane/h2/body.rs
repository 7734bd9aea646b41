//! The body of an HTTP/1.1 answer, taken out of its framing: HTTP/2 has its own.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::proxy::lane::chunks::{ChunkError, Chunks};
use crate::proxy::lane::head::{Framing, HEADERS_MAX};

/// Where in a body the upstream is.
pub struct Body {
    rest: Rest,
}

enum Rest {
    Length(u64),
    Chunked(Chunks, Vec<u8>),
    UntilClose,
}

/// What bytes of an answer mean.
pub struct Taken {
    /// Payload.
    pub payload: Bytes,
    /// Bytes followed that belong to no answer.
    pub surplus: bool,
}

impl Body {
    /// A whole body.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let rest = match framing {
            Framing::None => Rest::Length(0),
            Framing::Length(length) => Rest::Length(length),
            Framing::Chunked => Rest::Chunked(Chunks::default(), Vec::new()),
            Framing::UntilClose => Rest::UntilClose,
        };
        Self { rest }
    }

    /// Takes the next bytes. Those of a chunked body are copied together, so that small chunks do
    /// not become small frames.
    ///
    /// # Errors
    /// [`ChunkError`]: where the body ends cannot be known.
    pub fn take(&mut self, mut bytes: Bytes) -> Result<Taken, ChunkError> {
        match &mut self.rest {
            Rest::Length(left) => {
                let here = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= here as u64;
                let payload = bytes.split_to(here);
                Ok(Taken {
                    payload,
                    surplus: !bytes.is_empty(),
                })
            }
            Rest::UntilClose => Ok(Taken {
                payload: bytes,
                surplus: false,
            }),
            Rest::Chunked(chunks, trailers) => {
                let mut payload = BytesMut::with_capacity(bytes.len());
                let mut at = 0;
                while at < bytes.len() && !chunks.is_done() {
                    let (taken, piece) = chunks.piece(&bytes[at..], trailers)?;
                    payload.extend_from_slice(piece);
                    at += taken;
                }
                Ok(Taken {
                    payload: payload.freeze(),
                    surplus: at < bytes.len(),
                })
            }
        }
    }

    /// Nothing more will come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match &self.rest {
            Rest::Length(left) => *left == 0,
            Rest::Chunked(chunks, _) => chunks.is_done(),
            Rest::UntilClose => false,
        }
    }

    /// Whether the upstream may end it by closing.
    #[must_use]
    pub fn may_close(&self) -> bool {
        matches!(self.rest, Rest::UntilClose)
    }

    /// What followed the last chunk; None when nothing did, or nothing that is header lines.
    #[must_use]
    pub fn trailers(&self) -> Option<HeaderMap> {
        let Rest::Chunked(_, text) = &self.rest else {
            return None;
        };
        let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(text, &mut lines)
        else {
            return None;
        };
        let mut map = HeaderMap::with_capacity(lines.len());
        for line in lines {
            let name = HeaderName::from_bytes(line.name.as_bytes()).ok()?;
            map.append(name, HeaderValue::from_bytes(line.value).ok()?);
        }
        (!map.is_empty()).then_some(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_framing_ends_where_it_says() {
        let mut body = Body::new(Framing::Length(5));
        let taken = body.take(Bytes::from_static(b"hel")).unwrap();
        assert_eq!((&taken.payload[..], taken.surplus), (&b"hel"[..], false));
        assert!(!body.is_done());
        let taken = body.take(Bytes::from_static(b"loX")).unwrap();
        assert_eq!((&taken.payload[..], taken.surplus), (&b"lo"[..], true));
        assert!(body.is_done() && !body.may_close());

        let mut body = Body::new(Framing::Chunked);
        let whole = Bytes::from_static(b"4\r\nWiki\r\n5\r\npedia\r\n0\r\nX-Sum: 9\r\n\r\n");
        let taken = body.take(whole).unwrap();
        assert_eq!(
            (&taken.payload[..], taken.surplus),
            (&b"Wikipedia"[..], false)
        );
        assert_eq!(body.trailers().unwrap()["x-sum"], "9");
        assert!(body.take(Bytes::from_static(b"more")).unwrap().surplus);

        let mut body = Body::new(Framing::UntilClose);
        assert_eq!(
            body.take(Bytes::from_static(b"all")).unwrap().payload,
            "all"
        );
        assert!(!body.is_done() && body.may_close());
        assert!(Body::new(Framing::None).is_done());
    }
}
