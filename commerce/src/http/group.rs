//! Group buys over HTTP: offers, opening and joining, and the WebSocket that watches a group.

use std::borrow::Cow;
use std::time::Duration;

use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::keyed::{self, json, key};
use super::problem::{Kind, Problem, ProblemDocument};
use super::{Shared, principal, route};
use crate::catalogue::Sku;
use crate::census::Kind as Task;
use crate::command::Keyed;
use crate::command::group::{
    self, IssueTicket, Join, Joining, NotJoined, Place, TICKET_MS, UseTicket,
};
use crate::event::Origin;
use crate::group::{Full, Group, Offer, State as GroupState};
use crate::idempotency::{Fingerprint, Reply, Scope};
use crate::money::Money;
use crate::mutant::Mutant;
use crate::store::unix_time_ms;
use crate::trace::TraceId;
use crate::watch::{WATCHERS_MAX, Watch};

/// Open groups that an offer shows.
const SHOWN_MAX: i64 = 10;
/// Between two pings to a watcher.
const PING: Duration = Duration::from_secs(20);
/// A watcher that was silent for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(65);
/// RFC 6455 close codes.
mod close {
    pub(super) const NORMAL: u16 = 1000;
    /// The service restarts: connect again, elsewhere.
    pub(super) const RESTART: u16 = 1012;
}

/// The query for an offer.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OfferQuery {
    /// What is bought.
    #[param(example = "1001")]
    sku_id: String,
    /// Members needed.
    #[param(minimum = 2, maximum = 100, example = 3)]
    group_size: u32,
}

/// What a group would pay, and who is waiting.
#[derive(Serialize, ToSchema)]
pub(super) struct OfferAnswer {
    /// What is bought.
    sku: Sku,
    /// Members needed.
    group_size: u32,
    /// What each pays in a group.
    unit_price: Money,
    /// What it costs alone.
    list_price: Money,
    /// Places left in the fullest open group; a whole group when none is open.
    places_left: u32,
    /// Groups that can be joined, the fullest first.
    groups: Vec<Group>,
}

/// Shows the price in a group and the places left. Changes nothing.
#[utoipa::path(
    get, path = "/api/v1/group", tag = "groups", operation_id = "group_offer",
    params(OfferQuery),
    responses(
        (status = 200, description = "The offer", body = OfferAnswer),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn offer(
    State(shared): State<Shared>,
    query: Result<Query<OfferQuery>, QueryRejection>,
) -> Result<Json<OfferAnswer>, Problem> {
    let Query(query) =
        query.map_err(|rejected| Problem::new(Kind::BadRequest, rejected.body_text()))?;
    let offer = find_offer(&shared, &query.sku_id, query.group_size)?;
    let product = shared.store.product(offer.sku.clone()).await?;
    let product = product.ok_or_else(no_offer)?;
    let wanted = offer.clone();
    let groups = shared
        .store
        .read(move |connection| group::open_groups(connection, &wanted, unix_time_ms(), SHOWN_MAX))
        .await?;
    let places_left = groups.first().map_or(offer.size, |group| {
        group.counts().places_left(unix_time_ms())
    });
    Ok(Json(OfferAnswer {
        sku: offer.sku,
        group_size: offer.size,
        unit_price: offer.unit_price,
        list_price: product.price,
        places_left,
        groups,
    }))
}

fn no_offer() -> Problem {
    Problem::new(
        Kind::NotFound,
        "There is no group offer of this size for this SKU.",
    )
}

fn find_offer(shared: &Shared, sku: &str, size: u32) -> Result<Offer, Problem> {
    let sku = Sku::parse(sku).map_err(|_| no_offer())?;
    let active = shared.campaigns.active();
    active
        .campaign
        .group(&sku, size)
        .cloned()
        .ok_or_else(no_offer)
}

/// The body of a request to open or to join.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinRequest<'a> {
    /// What is bought.
    #[serde(borrow)]
    #[schema(value_type = String, pattern = "^[A-Za-z0-9._-]{1,64}$", example = "1001")]
    sku_id: Cow<'a, str>,
    /// Members needed.
    #[schema(minimum = 2, maximum = 100, example = 3)]
    group_size: u32,
    /// Which group; without it the fullest open one, or a new one.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = Uuid)]
    group_id: Option<Cow<'a, str>>,
}

/// Opens a group or joins one: holds a place and places the order that pays for it.
#[utoipa::path(
    post, path = "/api/v1/group", tag = "groups", operation_id = "group_join",
    params(("Idempotency-Key" = String, Header, description = "Names the intended effect; the same key gives the same answer", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_-]{1,64}$")),
    request_body = JoinRequest<'_>,
    responses(
        (status = 201, description = "A place; pay its order before its deadline", body = Place<'_>,
            headers(("location" = String, description = "The group"))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing; retry with the same key", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn join(
    State(shared): State<Shared>,
    Extension(trace): Extension<TraceId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let principal = principal(&headers)?;
    let key = key(&headers)?;
    let body = keyed::body(&headers, body)?;
    let request: JoinRequest<'_> = json(&body)?;
    let offer = find_offer(&shared, &request.sku_id, request.group_size)?;
    let group = match &request.group_id {
        None => None,
        Some(id) => Some(Uuid::try_parse(id).map_err(|_| unknown())?),
    };
    let seen = match group {
        Some(id) if Mutant::CheckThenAct.is_on() => {
            let read = shared
                .store
                .read(move |connection| group::find(connection, id));
            read.await?.map(|group| group.counts())
        }
        _ => None,
    };
    let join = Join {
        origin: Origin {
            actor: principal.clone(),
            trace,
        },
        principal: principal.clone(),
        offer,
        group,
        seen,
        render,
    };
    let scope = Scope {
        principal,
        route: "POST /api/v1/group",
        key,
    };
    keyed::run(
        &shared,
        Keyed {
            scope,
            fingerprint: Fingerprint::of(&body),
            effect: join,
        },
    )
    .await
}

fn unknown() -> Problem {
    Problem::new(Kind::NotFound, "There is no such group.")
}

fn render(joining: &Joining<'_>) -> Result<Reply, serde_json::Error> {
    let (group, order) = match joining {
        Joining::Joined(group, order) => (group, order),
        Joining::Refused(why) => return refusal(why).reply(),
    };
    Ok(Reply {
        status: StatusCode::CREATED.as_u16(),
        content_type: "application/json".to_owned(),
        location: Some(format!("{}/{}", route::GROUP_OFFER, group.id)),
        etag: None,
        body: serde_json::to_vec(&Place { group, order })?,
    })
}

fn refusal(why: &NotJoined) -> Problem {
    match why {
        NotJoined::Unknown => unknown(),
        NotJoined::Full(Full::Full) => Problem::new(
            Kind::GroupFull,
            "Every place is held or paid; one may become free.",
        ),
        NotJoined::Full(Full::Over) => Problem::new(Kind::GroupOver, "The group is over."),
        NotJoined::Member => Problem::new(
            Kind::AlreadyMember,
            "You have a place in this group already.",
        ),
        NotJoined::Order(refusal) => Problem::from(refusal),
    }
}

/// Shows a group.
#[utoipa::path(
    get, path = "/api/v1/group/{id}", tag = "groups", operation_id = "group_show",
    params(("id" = String, Path, format = Uuid, description = "The group")),
    responses(
        (status = 200, description = "The group", body = Group, headers(("etag" = String, description = "Its version"))),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn show(
    State(shared): State<Shared>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let id = Uuid::try_parse(&id).map_err(|_| unknown())?;
    let read = shared
        .store
        .read(move |connection| group::find(connection, id));
    let group = read.await?.ok_or_else(unknown)?;
    let etag = format!("\"{}\"", group.version);
    Ok(([(header::ETAG, etag)], Json(group)).into_response())
}

/// Admission to a WebSocket.
#[derive(Serialize, ToSchema)]
pub(super) struct Ticket {
    /// Goes into the query of the WebSocket's URL; good once.
    ticket: String,
    /// Seconds it is good for.
    expires_in: i64,
}

/// Issues a ticket to watch a group: a browser cannot send headers with a WebSocket.
#[utoipa::path(
    post, path = "/api/v1/group/{id}/ticket", tag = "groups", operation_id = "group_ticket",
    params(("id" = String, Path, format = Uuid, description = "The group")),
    responses(
        (status = 201, description = "A ticket for one WebSocket", body = Ticket),
        (status = "4XX", description = "Refused", body = ProblemDocument, content_type = "application/problem+json"),
        (status = 503, description = "Overloaded or failing", body = ProblemDocument, content_type = "application/problem+json"),
    ),
)]
pub(super) async fn ticket(
    State(shared): State<Shared>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let group = Uuid::try_parse(&id).map_err(|_| unknown())?;
    let ticket = super::random_token()?;
    let issue = IssueTicket {
        group,
        ticket: ticket.clone(),
    };
    if !shared.store.run(issue).await? {
        return Err(unknown());
    }
    let ticket = Ticket {
        ticket,
        expires_in: TICKET_MS / 1_000,
    };
    Ok((StatusCode::CREATED, Json(ticket)).into_response())
}

/// The query of a WebSocket.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WatchQuery {
    ticket: String,
}

/// `GET /api/v1/group/{id}/watch?ticket=`: a snapshot, then a hint for each version.
pub(super) async fn watch(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    headers: HeaderMap,
    query: Result<Query<WatchQuery>, QueryRejection>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Problem> {
    check_origin(&shared, &headers)?;
    let Query(WatchQuery { ticket }) =
        query.map_err(|rejected| Problem::new(Kind::BadRequest, rejected.body_text()))?;
    let id = Uuid::try_parse(&id).map_err(|_| unknown())?;
    if shared.drain.has_begun() {
        return Err(Problem::new(
            Kind::Draining,
            "The service is about to stop.",
        ));
    }
    let watchers = shared.census.count(Task::Watcher).0;
    if usize::try_from(watchers).map_or(true, |watchers| watchers >= WATCHERS_MAX) {
        return Err(Problem::new(Kind::Overloaded, "Too many watch already."));
    }
    if !shared.store.run(UseTicket { group: id, ticket }).await? {
        return Err(Problem::new(
            Kind::Forbidden,
            "The ticket is unknown, used or too old; take a new one.",
        ));
    }
    let watch = shared.hub.watch(id).await?.ok_or_else(unknown)?;
    let entry = shared.census.enter(Task::Watcher);
    let metrics = shared.metrics.clone();
    let drain = shared.drain.clone();
    // Watchers only listen: what they send is small.
    let upgrade = upgrade.max_message_size(4096).max_frame_size(4096);
    Ok(upgrade.on_upgrade(async move |socket| {
        let ended = serve(socket, watch, drain, &metrics).await;
        if let Err(error) = ended {
            tracing::debug!(%error, "a watcher's connection ended");
        }
        drop(entry);
    }))
}

/// A page of another site must not watch with a visitor's ticket. Clients that are no
/// browser send no `Origin`.
fn check_origin(shared: &Shared, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let origin = origin.to_str().unwrap_or_default();
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let own = origin
        .strip_prefix("https://")
        .or_else(|| origin.strip_prefix("http://"));
    if own == Some(host) && !host.is_empty() || shared.origins.iter().any(|known| known == origin) {
        Ok(())
    } else {
        Err(Problem::new(
            Kind::Forbidden,
            "This Origin may not watch; start the service with --origin to allow it.",
        ))
    }
}

/// What a watcher gets.
#[derive(Serialize)]
struct Hint<'a> {
    r#type: &'static str,
    version: i64,
    state: GroupState,
    places_left: u32,
    group: &'a Group,
}

async fn serve(
    mut socket: WebSocket,
    mut watch: Watch,
    mut drain: super::Drain,
    metrics: &crate::metrics::Metrics,
) -> Result<(), axum::Error> {
    let mut heard = tokio::time::Instant::now();
    let mut ping = tokio::time::interval_at(heard + PING, PING);
    let mut kind = "snapshot";
    loop {
        let group = watch.group.borrow_and_update().clone();
        let hint = Hint {
            r#type: kind,
            version: group.version,
            state: group.state,
            places_left: group.counts().places_left(unix_time_ms()),
            group: &group,
        };
        let text = serde_json::to_string(&hint).map_err(axum::Error::new)?;
        socket.send(Message::Text(text.into())).await?;
        metrics.watcher_told();
        kind = "hint";
        if group.state != GroupState::Forming {
            return end(&mut socket, close::NORMAL, "the group is over").await;
        }
        loop {
            tokio::select! {
                changed = watch.group.changed() => match changed {
                    Ok(()) => break,
                    // Its reader has ended: the store is closing.
                    Err(_) => return end(&mut socket, close::RESTART, "service restart").await,
                },
                () = drain.begun() => {
                    return end(&mut socket, close::RESTART, "service restart").await;
                }
                _ = ping.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Ok(());
                    }
                    socket.send(Message::Ping(Bytes::new())).await?;
                }
                message = socket.recv() => match message {
                    None | Some(Ok(Message::Close(_))) => return Ok(()),
                    Some(message) => {
                        message?;
                        heard = tokio::time::Instant::now();
                    }
                },
            }
        }
    }
}

/// Says why, and waits a moment for the other side to say it too.
async fn end(socket: &mut WebSocket, code: u16, reason: &'static str) -> Result<(), axum::Error> {
    let frame = CloseFrame {
        code,
        reason: reason.into(),
    };
    socket.send(Message::Close(Some(frame))).await?;
    let answered = async {
        while let Some(Ok(message)) = socket.recv().await {
            if matches!(message, Message::Close(_)) {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), answered).await;
    Ok(())
}
