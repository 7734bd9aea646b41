//! How pingora reads a stored body, and writes one.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use pingora::{
    Error, ErrorType, Result,
    cache::{
        CacheKey,
        storage::{HandleHit, HandleMiss, MissFinishType, Storage},
        trace::SpanHandle,
    },
};

use super::{Object, Store};

/// A body that is read, whole or a range of it.
pub struct Hit {
    body: Arc<[Bytes]>,
    length: usize,
    /// What is still to be read.
    at: usize,
    end: usize,
}

impl Hit {
    pub fn new(object: &Object) -> Self {
        let length = object.body_length();
        Self {
            body: Arc::clone(&object.body),
            length,
            at: 0,
            end: length,
        }
    }

    fn next(&mut self) -> Option<Bytes> {
        let mut start = 0;
        for piece in self.body.iter() {
            let stop = start + piece.len();
            if self.at < stop && self.at < self.end {
                let (from, to) = (self.at - start, self.end.min(stop) - start);
                self.at = self.end.min(stop);
                return Some(piece.slice(from..to));
            }
            start = stop;
        }
        None
    }
}

#[async_trait]
impl HandleHit for Hit {
    async fn read_body(&mut self) -> Result<Option<Bytes>> {
        Ok(self.next())
    }

    async fn finish(
        self: Box<Self>,
        _: &'static (dyn Storage + Sync),
        _: &CacheKey,
        _: &SpanHandle,
    ) -> Result<()> {
        Ok(())
    }

    fn can_seek(&self) -> bool {
        true
    }

    fn seek(&mut self, start: usize, end: Option<usize>) -> Result<()> {
        if start >= self.length {
            return Err(Error::explain(
                ErrorType::InternalError,
                "range outside the body",
            ));
        }
        self.at = start;
        self.end = end.unwrap_or(self.length).min(self.length);
        Ok(())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }

    fn as_any_mut(&mut self) -> &mut (dyn Any + Send + Sync) {
        self
    }
}

/// A body that is written. Dropped before its end it leaves nothing behind.
pub struct Miss {
    store: &'static Store,
    key: String,
    primary: Arc<str>,
    meta: Arc<(Vec<u8>, Vec<u8>)>,
    body: Vec<Bytes>,
}

impl Miss {
    pub fn new(
        store: &'static Store,
        key: String,
        primary: Arc<str>,
        meta: Arc<(Vec<u8>, Vec<u8>)>,
    ) -> Self {
        Self {
            store,
            key,
            primary,
            meta,
            body: Vec::new(),
        }
    }
}

#[async_trait]
impl HandleMiss for Miss {
    async fn write_body(&mut self, data: Bytes, _: bool) -> Result<()> {
        if !data.is_empty() {
            // A copy: the piece may be a small window of a large read buffer.
            self.body.push(Bytes::copy_from_slice(&data));
        }
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<MissFinishType> {
        let object = Object {
            primary: self.primary,
            meta: self.meta,
            body: self.body.into(),
        };
        let size = object.body_length();
        self.store.put(self.key, object);
        Ok(MissFinishType::Created(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cross_pieces() {
        let object = Object {
            primary: "p".into(),
            meta: Arc::default(),
            body: Arc::from(
                ["abc", "", "defg", "h"].map(|text| Bytes::from_static(text.as_bytes())),
            ),
        };
        let mut hit = Hit::new(&object);
        let all = |hit: &mut Hit| {
            let pieces: Vec<Bytes> = std::iter::from_fn(|| hit.next()).collect();
            String::from_utf8(pieces.concat()).unwrap()
        };
        assert_eq!(all(&mut hit), "abcdefgh");
        for (start, end, text) in [
            (0, None, "abcdefgh"),
            (2, Some(5), "cde"),
            (7, Some(99), "h"),
        ] {
            hit.seek(start, end).unwrap();
            assert_eq!(all(&mut hit), text);
        }
        assert!(hit.seek(8, None).is_err());
    }
}
