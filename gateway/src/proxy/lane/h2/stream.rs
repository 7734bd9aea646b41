//! One stream: which lane it takes, its request body, and its upstream's answer.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Request, header, request::Parts};
use pingora::{apps::HttpServerApp as _, protocols::http::ServerSession};

use super::{Client, broken, session::Session};
use crate::proxy::lane::timer::Timer;
use crate::{
    owner::Quality,
    proxy::lane::{
        admit::Head,
        buffers::Buffer,
        exchange::Outbound,
        forward::{self, Forwarded},
    },
    units::PayloadBytes,
};

/// From a request's header to the end of its body.
const BODY_DEADLINE: Duration = Duration::from_secs(60);
/// A body larger than this, or of unknown length, streams through the full lane.
const BODY_MAX: u64 = 48 * 1024;

/// A request that the lean lane serves.
pub struct Planned {
    /// For the upstream; the body is appended.
    pub out: Outbound,
    /// The answer has no body.
    pub to_head: bool,
}

/// Why a stream ends before its answer does.
pub enum Broken {
    /// The client has given it up, or is gone.
    Client(io::Error),
    /// The upstream's answer does not reach its end.
    Upstream(io::Error),
}

impl Client<'_> {
    /// Serves a stream to its end.
    pub async fn stream(&self, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let (parts, body) = request.into_parts();
        match self.plan(&parts, &body) {
            Some(planned) => self.lean(planned, body, respond).await,
            // Boxed: its state is many times the lean lane's.
            None => Box::pin(self.full(parts, body, respond)).await,
        }
    }

    async fn full(&self, parts: Parts, body: RecvStream, respond: SendResponse<Bytes>) {
        let digest = Arc::clone(&self.digest);
        let session = Session::new(parts, body, respond, digest);
        let session = ServerSession::new_custom(Box::new(session));
        let proxy = self.full.proxy();
        proxy.process_new_http(session, self.shutdown).await;
    }

    /// None: the request is the full lane's.
    fn plan(&self, parts: &Parts, body: &RecvStream) -> Option<Planned> {
        let lane = self.lane;
        if !lane.may_begin() || parts.headers.contains_key(header::EXPECT) {
            return None;
        }
        let body_bytes = match parts.headers.get(header::CONTENT_LENGTH) {
            _ if body.is_end_stream() => 0,
            Some(length) => {
                let length: u64 = length.to_str().ok()?.parse().ok()?;
                usize::try_from(length)
                    .ok()
                    .filter(|_| length <= BODY_MAX)?
            }
            None => return None,
        };
        let authority = parts.uri.authority().map(|authority| authority.as_str());
        let host = match authority {
            Some(authority) => authority,
            None => parts.headers.get(header::HOST)?.to_str().ok()?,
        };
        let head = Head {
            method: &parts.method,
            host,
            target: parts.uri.path_and_query()?.as_str(),
            lines: &parts.headers,
            version: "HTTP/2",
            quality: Quality::Estimated,
            more: true,
        };
        let admitted = lane.admit(&head, self.connection, self.tracked.as_ref())?;
        self.connection.request_begins();
        let mut bytes = Buffer::take();
        let forwarded = Forwarded::of(self.connection, &admitted.record);
        let target = (head.target, host);
        let span_at = forward::request_of_http2(
            &mut bytes.bytes,
            &parts.method,
            target,
            &parts.headers,
            &forwarded,
        );
        Some(Planned {
            out: Outbound {
                record: admitted.record,
                upstream: admitted.upstream,
                bytes,
                body_bytes,
                span_at,
                repeatable: admitted.repeatable,
            },
            to_head: parts.method == Method::HEAD,
        })
    }

    async fn lean(&self, mut planned: Planned, body: RecvStream, mut respond: SendResponse<Bytes>) {
        if let Err(error) = receive(body, &mut planned.out).await {
            planned.out.record.error = Some(format!("the client's body did not come: {error}"));
            respond.send_reset(Reason::CANCEL);
            return;
        }
        let mut timer = Timer::default();
        let asked = self.lane.answer(&mut planned.out, &mut timer);
        let Some(answer) = unless_reset(|cx| respond.poll_reset(cx), asked).await else {
            planned.out.record.error = Some("the client has given up".into());
            return;
        };
        let answered = match answer {
            Ok(answer) => {
                self.answer(&mut planned, answer, &mut respond, &mut timer)
                    .await
            }
            Err(failure) => self.refuse(&mut planned, failure, &mut respond).await,
        };
        let error = match answered {
            Ok(()) => return,
            Err(Broken::Client(error)) => {
                respond.send_reset(Reason::CANCEL);
                format!("client: {error}")
            }
            Err(Broken::Upstream(error)) => {
                // Or the client would take what it has for the whole.
                respond.send_reset(Reason::INTERNAL_ERROR);
                format!("upstream: {error}")
            }
        };
        planned.out.record.error.get_or_insert(error);
    }
}

/// Reads a body of known length.
async fn receive(mut body: RecvStream, out: &mut Outbound) -> io::Result<()> {
    if out.body_bytes == 0 {
        return Ok(());
    }
    let from = out.bytes.bytes.len();
    let reading = async {
        while let Some(data) = body.data().await {
            let data = data.map_err(broken)?;
            out.bytes.bytes.extend_from_slice(&data);
            // The crate holds the client to the length it announced.
            body.flow_control()
                .release_capacity(data.len())
                .map_err(broken)?;
        }
        Ok::<(), io::Error>(())
    };
    tokio::time::timeout(BODY_DEADLINE, reading)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    if out.bytes.bytes.len() - from != out.body_bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    out.record.request_body = PayloadBytes(out.body_bytes as u64);
    Ok(())
}

/// None: the client has given the stream up before the work was done.
pub async fn unless_reset<T>(
    mut reset: impl FnMut(&mut Context<'_>) -> Poll<Result<Reason, h2::Error>>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(done));
        }
        reset(cx).map(|_| None)
    })
    .await
}
