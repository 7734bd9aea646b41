//! A stream as pingora's phases see a session: what `pingora_core`'s own HTTP/2 session does, with
//! two differences. It is made from a stream that was accepted here, and it sends interim
//! responses, which pingora drops on HTTP/2.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderName, Response, header, request::Parts};
use pingora::{
    Error, ErrorType, OrErr as _, Result,
    http::{RequestHeader, ResponseHeader},
    protocols::{
        Digest,
        http::{
            HttpTask,
            body_buffer::FixedBuffer,
            custom::{CustomMessageWrite, server},
            date::get_cached_date,
            v1::client::http_req_header_to_wire,
            v2,
        },
        l4::socket::SocketAddr,
    },
};

/// Kept of a request body so that it can be sent again, as pingora does.
const RETRY_BYTES: usize = 64 * 1024;

/// One stream.
pub struct Session {
    request: RequestHeader,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
    written: Option<Box<ResponseHeader>>,
    /// END_STREAM was sent.
    ended: bool,
    /// Payload bytes.
    read: usize,
    sent: usize,
    retry: Option<FixedBuffer>,
    digest: Arc<Digest>,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
    drain_timeout: Option<Duration>,
}

impl Session {
    /// Of an accepted stream.
    pub fn new(
        parts: Parts,
        body: RecvStream,
        respond: SendResponse<Bytes>,
        digest: Arc<Digest>,
    ) -> Self {
        Self {
            request: RequestHeader::from(parts),
            body,
            respond,
            stream: None,
            written: None,
            ended: false,
            read: 0,
            sent: 0,
            retry: None,
            digest,
            read_timeout: None,
            write_timeout: None,
            drain_timeout: None,
        }
    }

    fn write_head(&mut self, mut head: Box<ResponseHeader>, end: bool) -> Result<()> {
        if self.ended || self.written.is_some() {
            return Ok(());
        }
        // What is about an HTTP/1.1 connection (RFC 9113, 8.2.2).
        for name in [
            header::TRANSFER_ENCODING,
            header::CONNECTION,
            header::UPGRADE,
        ] {
            head.remove_header(&name);
        }
        head.remove_header(&HeaderName::from_static("keep-alive"));
        head.remove_header(&HeaderName::from_static("proxy-connection"));
        if head.status.is_informational() {
            let response = Response::from_parts(head.as_owned_parts(), ());
            let sent = self.respond.send_informational(response);
            return sent.or_err(ErrorType::WriteError, "sending an interim response");
        }
        head.insert_header(header::DATE, get_cached_date())?;
        let response = Response::from_parts(head.as_owned_parts(), ());
        let stream = self
            .respond
            .send_response(response, end)
            .or_err(ErrorType::WriteError, "sending a response header")?;
        self.stream = Some(stream);
        self.written = Some(head);
        self.ended = end;
        Ok(())
    }

    async fn write(&mut self, data: Bytes, end: bool) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        let Some(stream) = &mut self.stream else {
            return Error::e_explain(ErrorType::H2Error, "a body before its header");
        };
        let length = data.len();
        v2::write_body(stream, data, end, self.write_timeout)
            .await
            .map_err(|error| error.into_down())?;
        self.sent += length;
        self.ended = end;
        Ok(())
    }

    /// Ends the stream, if a response has begun; else dropping it resets it.
    fn end(&mut self) -> Result<()> {
        if !self.ended
            && let Some(stream) = &mut self.stream
        {
            stream
                .send_data(Bytes::new(), true)
                .or_err(ErrorType::WriteError, "ending a response")?;
            self.ended = true;
        }
        Ok(())
    }

    fn reset(&mut self, reason: Reason) {
        if !self.ended {
            self.respond.send_reset(reason);
        }
    }
}

#[async_trait]
impl server::Session for Session {
    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        let data = self
            .body
            .data()
            .await
            .transpose()
            .or_err(ErrorType::ReadError, "reading a request body")?;
        if let Some(data) = &data {
            self.read += data.len();
            if let Some(retry) = &mut self.retry {
                retry.write_to_buffer(data);
            }
            // Fails when the stream is gone, and then the next read says so.
            let _ = self.body.flow_control().release_capacity(data.len());
        }
        Ok(data)
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        let limit = self.drain_timeout;
        let drain = async {
            while !self.is_body_done() && self.read_body_bytes().await?.is_some() {}
            Ok(())
        };
        match limit {
            None => drain.await,
            Some(limit) => tokio::time::timeout(limit, drain)
                .await
                .unwrap_or_else(|_| Error::e_explain(ErrorType::ReadTimedout, "draining a body")),
        }
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.write_head(head, end)
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, end: bool) -> Result<()> {
        self.write_head(Box::new(head.clone()), end)
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.write(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        let Some(stream) = &mut self.stream else {
            return Error::e_explain(ErrorType::H2Error, "trailers before a header");
        };
        stream
            .send_trailers(trailers)
            .or_err(ErrorType::WriteError, "sending trailers")?;
        self.ended = true;
        Ok(())
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut end = false;
        for task in tasks {
            end |= match task {
                HttpTask::Header(head, end) => {
                    self.write_head(head, end)
                        .map_err(|error| error.into_down())?;
                    end
                }
                HttpTask::Body(data, end) => {
                    if let Some(data) = data.filter(|data| !data.is_empty()) {
                        self.write(data, end)
                            .await
                            .map_err(|error| error.into_down())?;
                    }
                    end
                }
                HttpTask::UpgradedBody(..) => {
                    return Error::e_explain(ErrorType::InternalError, "an upgrade on HTTP/2");
                }
                HttpTask::Trailer(Some(trailers)) => {
                    self.write_trailers(*trailers).await?;
                    true
                }
                HttpTask::Trailer(None) | HttpTask::Done => true,
                HttpTask::Failed(error) => return Err(error),
            };
        }
        if end {
            self.end().map_err(|error| error.into_down())?;
        }
        Ok(end)
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.read_timeout
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.write_timeout
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.drain_timeout = timeout;
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.drain_timeout
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri)
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.written.as_deref()
    }

    async fn shutdown(&mut self, code: u32, _: &str) {
        self.reset(Reason::from(code));
    }

    async fn abandon(&mut self, _: &str) {
        self.reset(Reason::INTERNAL_ERROR);
    }

    fn is_body_done(&mut self) -> bool {
        self.is_body_empty() || self.body.is_end_stream()
    }

    async fn finish(&mut self) -> Result<()> {
        self.end()
    }

    fn is_body_empty(&mut self) -> bool {
        let length = self.request.headers.get(header::CONTENT_LENGTH);
        let none = length.is_some_and(|length| length.as_bytes() == b"0");
        self.read == 0 && (self.body.is_end_stream() || none)
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if !no_body_expected && !self.is_body_done() {
            return self.read_body_bytes().await;
        }
        let reset = std::future::poll_fn(|cx| match &mut self.stream {
            Some(stream) => stream.poll_reset(cx),
            None => self.respond.poll_reset(cx),
        });
        let reason = reset
            .await
            .or_err(ErrorType::H2Error, "the client is gone")?;
        Error::e_explain(
            ErrorType::H2Error,
            format!("Client closed H2, reason: {reason}"),
        )
    }

    fn body_bytes_sent(&self) -> usize {
        self.sent
    }

    fn body_bytes_read(&self) -> usize {
        self.read
    }

    fn digest(&self) -> Option<&Digest> {
        Some(&self.digest)
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        Arc::get_mut(&mut self.digest)
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.digest.socket_digest.as_ref()?.peer_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.digest.socket_digest.as_ref()?.local_addr()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        // Fails on target bytes that were refused when the stream was accepted.
        http_req_header_to_wire(&self.request).map_or_else(Bytes::new, |bytes| bytes.freeze())
    }

    fn enable_retry_buffering(&mut self) {
        self.retry
            .get_or_insert_with(|| FixedBuffer::new(RETRY_BYTES));
    }

    fn retry_buffer_truncated(&self) -> bool {
        self.retry.as_ref().is_some_and(FixedBuffer::is_truncated)
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        let retry = self.retry.as_ref()?;
        if retry.is_truncated() {
            return None;
        }
        retry.get_buffer()
    }

    // HTTP/2 has no messages beside requests and responses.
    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _: Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
