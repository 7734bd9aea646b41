//! An upstream's HTTP/1.1 answer as an HTTP/2 response: interim responses, head, body, trailers.

use std::future::poll_fn;
use std::io;

use bytes::{Bytes, BytesMut};
use h2::{SendStream, server::SendResponse};
use http::{HeaderName, HeaderValue, Response, StatusCode, Version, header};
use pingora::protocols::http::date::get_cached_date;
use tokio::io::AsyncReadExt as _;

use super::body::Body;
use super::stream::{Broken, Planned, unless_reset};
use super::{Client, broken};
use crate::{
    proxy::{
        lane::{
            buffers::BUFFER_BYTES,
            exchange::{Answer, Failure, HEADROOM, upstream_is_done},
            forward::named_by_connection,
            head::{self, Framing, ResponseHead, is_hop_by_hop},
            pool::UpstreamConnection,
            relay::Patience,
            timer::Timer,
        },
        record::RequestRecord,
    },
    units::PayloadBytes,
};

/// Where a response head ends, and what follows.
struct Final {
    response: Response<()>,
    head_bytes: usize,
    framing: Framing,
    reusable: bool,
}

impl Client<'_> {
    /// Passes an answer on to its end.
    pub async fn answer(
        &self,
        planned: &mut Planned,
        answer: Answer,
        respond: &mut SendResponse<Bytes>,
        timer: &mut Timer,
    ) -> Result<(), Broken> {
        let patience = planned.out.patience();
        let Answer {
            mut connection,
            key,
            mut read,
        } = answer;
        let head = loop {
            match parse(&read.bytes[HEADROOM..], planned.to_head) {
                Ok(Some(head)) if head.response.status().is_informational() => {
                    let status = head.response.status();
                    self.turn(&mut planned.out.record).await;
                    respond
                        .send_informational(head.response)
                        .map_err(|error| Broken::Client(broken(error)))?;
                    self.passed_on(&planned.out.record, status);
                    read.bytes.drain(HEADROOM..HEADROOM + head.head_bytes);
                }
                Ok(Some(head)) => break head,
                Ok(None) => {
                    let more =
                        timer.within(patience.read, connection.stream.read_buf(&mut read.bytes));
                    let failure = match unless_reset(|cx| respond.poll_reset(cx), more).await {
                        None => return Err(gave_up()),
                        Some(Ok(1..)) => continue,
                        Some(Ok(0)) => Failure::bad_gateway("closed inside its head".into()),
                        Some(Err(error)) => Failure::from(error),
                    };
                    return self.refuse(planned, failure, respond).await;
                }
                Err(what) => {
                    return self
                        .refuse(planned, Failure::bad_gateway(what), respond)
                        .await;
                }
            }
        };
        let record = &mut planned.out.record;
        record.status = head.response.status().as_u16();
        let mut body = Body::new(head.framing);
        let rest = Bytes::copy_from_slice(&read.bytes[HEADROOM + head.head_bytes..]);
        drop(read);
        let taken = body
            .take(rest)
            .map_err(|error| Broken::Upstream(io::Error::other(error)))?;
        let mut reusable = head.reusable && !taken.surplus;
        if body.is_done() {
            upstream_is_done(record);
        }
        let ends = head.framing == Framing::None;
        self.turn(record).await;
        let mut stream = respond
            .send_response(head.response, ends)
            .map_err(|error| Broken::Client(broken(error)))?;
        if !ends {
            let trailers = body.trailers();
            let last = body.is_done() && trailers.is_none();
            self.send(&mut stream, record, taken.payload, last).await?;
            let again = self
                .relay(
                    &mut connection,
                    &mut body,
                    &mut stream,
                    record,
                    (patience, timer),
                )
                .await?;
            reusable &= again;
        }
        if reusable {
            self.lane.keep(&planned.out, connection, key);
        }
        Ok(())
    }

    fn passed_on(&self, record: &RequestRecord, status: StatusCode) {
        if let Some(route) = record
            .route
            .as_ref()
            .filter(|_| status == StatusCode::EARLY_HINTS)
        {
            let metrics = &self.lane.shared.edge;
            metrics.hinted_early(route.name.as_str(), "upstream");
        }
    }

    /// The rest of a body. True when the upstream's connection can be used again.
    async fn relay(
        &self,
        connection: &mut UpstreamConnection,
        body: &mut Body,
        stream: &mut SendStream<Bytes>,
        record: &mut RequestRecord,
        (patience, timer): (Patience, &mut Timer),
    ) -> Result<bool, Broken> {
        let mut clean = true;
        let mut buffer = BytesMut::new();
        while !body.is_done() {
            buffer.reserve(BUFFER_BYTES / 8);
            let more = timer.within(patience.read, connection.stream.read_buf(&mut buffer));
            let read = unless_reset(|cx| stream.poll_reset(cx), more)
                .await
                .ok_or_else(gave_up)?
                .map_err(Broken::Upstream)?;
            if read == 0 {
                if !body.may_close() {
                    let early =
                        io::Error::new(io::ErrorKind::UnexpectedEof, "closed inside its answer");
                    return Err(Broken::Upstream(early));
                }
                upstream_is_done(record);
                self.send(stream, record, Bytes::new(), true).await?;
                return Ok(false);
            }
            let taken = body
                .take(buffer.split().freeze())
                .map_err(|error| Broken::Upstream(io::Error::other(error)))?;
            clean &= !taken.surplus;
            let mut last = body.is_done();
            if last {
                upstream_is_done(record);
                last = body.trailers().is_none();
            }
            self.send(stream, record, taken.payload, last).await?;
        }
        if let Some(trailers) = body.trailers() {
            self.turn(record).await;
            stream
                .send_trailers(trailers)
                .map_err(|error| Broken::Client(broken(error)))?;
        }
        Ok(clean)
    }

    /// Hands payload over as fast as the client takes it.
    async fn send(
        &self,
        stream: &mut SendStream<Bytes>,
        record: &mut RequestRecord,
        mut payload: Bytes,
        last: bool,
    ) -> Result<(), Broken> {
        let client = |error| Broken::Client(broken(error));
        if payload.is_empty() && !last {
            return Ok(());
        }
        loop {
            stream.reserve_capacity(payload.len());
            let mut room = stream.capacity();
            if room < payload.len() && room == 0 {
                let waiting = poll_fn(|cx| stream.poll_capacity(cx));
                room = tokio::time::timeout(self.limits.write_timeout, waiting)
                    .await
                    .map_err(|_| Broken::Client(io::ErrorKind::TimedOut.into()))?
                    .ok_or_else(gave_up)?
                    .map_err(client)?;
            }
            let part = payload.split_to(room.min(payload.len()));
            record.response_body += PayloadBytes(part.len() as u64);
            self.turn(record).await;
            let ends = payload.is_empty();
            stream.send_data(part, ends && last).map_err(client)?;
            if ends {
                return Ok(());
            }
        }
    }

    /// The connection's next bytes are this request's.
    async fn turn(&self, record: &mut RequestRecord) {
        if let Some(leg) = &record.client {
            self.turn.take(leg.owner).await;
        }
        record.take_turn();
    }

    /// Answers in the upstream's place.
    pub async fn refuse(
        &self,
        planned: &mut Planned,
        failure: Failure,
        respond: &mut SendResponse<Bytes>,
    ) -> Result<(), Broken> {
        let record = &mut planned.out.record;
        record.status = failure.status;
        record.error.get_or_insert(failure.what);
        let body = serde_json::json!({
            "type": "about:blank", "title": failure.title, "status": failure.status,
        })
        .to_string();
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(failure.status).unwrap_or(StatusCode::BAD_GATEWAY);
        let headers = response.headers_mut();
        let kind = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, kind);
        headers.insert(header::CONTENT_LENGTH, body.len().into());
        headers.insert(header::DATE, get_cached_date());
        if failure.status == 503 {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        self.turn(record).await;
        let mut stream = respond
            .send_response(response, planned.to_head)
            .map_err(|error| Broken::Client(broken(error)))?;
        if planned.to_head {
            return Ok(());
        }
        self.send(&mut stream, record, body.into(), true).await
    }
}

fn gave_up() -> Broken {
    Broken::Client(io::Error::other("the client has given up"))
}

/// Reads a head; None when more of it must come.
fn parse(bytes: &[u8], to_head: bool) -> Result<Option<Final>, String> {
    let mut lines = head::room();
    let Some(head) = head::response(bytes, &mut lines, to_head).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    Ok(Some(Final {
        response: response(&head).map_err(|error| error.to_string())?,
        head_bytes: head.bytes,
        framing: head.framing,
        reusable: head.keep_alive,
    }))
}

/// The same lines, without those of the upstream's connection.
fn response(head: &ResponseHead<'_, '_>) -> Result<Response<()>, http::Error> {
    let mut response = Response::new(());
    *response.version_mut() = Version::HTTP_2;
    *response.status_mut() = StatusCode::from_u16(head.status)?;
    let headers = response.headers_mut();
    headers.reserve(head.headers.len() + 1);
    let named = named_by_connection(head.headers, head.names_lines);
    for line in head.headers {
        if !is_hop_by_hop(line.name, named) {
            let name = HeaderName::from_bytes(line.name.as_bytes())?;
            headers.append(name, HeaderValue::from_bytes(line.value)?);
        }
    }
    if head.status >= 200 && !headers.contains_key(header::DATE) {
        headers.insert(header::DATE, get_cached_date());
    }
    Ok(response)
}
